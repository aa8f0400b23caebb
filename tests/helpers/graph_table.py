"""The names, channels and free dimensions that every target gives its graphs."""

from typing import Any

#: graph -> name, channels and free dimensions of its input and of its output; 4 latent channels
TABLE: dict[Any, tuple[Any, ...]] = {
    "encoder": (("sample", 3, "height", "width"), ("latent_parameters", 8, "latent_height", "latent_width")),
    "decoder": (("latent_sample", 4, "latent_height", "latent_width"), ("sample", 3, "height", "width")),
}
