"""The names, channels and free dimensions that every target gives its graphs."""

# Names and free dimensions of input and output; 4 latent channels.
TABLE = {
    "encoder": (("sample", 3, "height", "width"), ("latent_parameters", 8, "latent_height", "latent_width")),
    "decoder": (("latent_sample", 4, "latent_height", "latent_width"), ("sample", 3, "height", "width")),
}
