"""Random inputs of the tiny model, what a VAE makes of them, and how near backends come to the reference."""

import numpy as np

# The same fp32 arithmetic in another order: sums of some hundred terms of order 1, a dozen layers deep; and weights
# of the upsampling added before they are multiplied.
TOLERANCE = 2e-5
SHAPES = [(1, 1, 1), (1, 8, 8), (3, 5, 7), (2, 1, 9)]  # [B, h, w] in latents
RNG = np.random.default_rng(0)


def images(batch=1, height=4, width=6):
    return RNG.uniform(-1, 1, (batch, 3, 8 * height, 8 * width)).astype(np.float32)


def latents(batch=1, height=4, width=6):
    return RNG.standard_normal((batch, 4, height, width)).astype(np.float32)


def pixels(batch=1, height=4, width=6):
    return RNG.integers(0, 256, (batch, 8 * height, 8 * width, 3), dtype=np.uint8)


def results(vae, x, z):
    return vae.encode(x).latent_dist.parameters, vae.decode(z).sample
