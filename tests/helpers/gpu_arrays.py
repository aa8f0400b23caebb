"""Inputs of the embedded model for the tests on a real GPU, and what the reference makes of them."""

from collections.abc import Iterable

import numpy as np
import torch

from vae_export import AutoencoderKL
from vae_export.comparison import Case

SHAPES = ((1, 8, 8), (2, 12, 9), (1, 32, 32), (8, 8, 8))  # batch, height and width in latents
RNG = np.random.default_rng(0)


def latents(batch: int, height: int, width: int) -> np.ndarray:
    return RNG.standard_normal((batch, 16, height, width)).astype(np.float32)


def images(batch: int, height: int, width: int) -> np.ndarray:
    return RNG.uniform(-1, 1, (batch, 3, 8 * height, 8 * width)).astype(np.float32)


def every_shape() -> list[np.ndarray]:
    return [make(*shape) for shape in SHAPES for make in (images, latents)]


def one_colour() -> list[np.ndarray]:
    """Pictures whose first maps are next to flat: norms that subtract squares give NaN there."""
    return [np.full((1, 3, 256, 256), colour, np.float32) for colour in (-1, 0, 1)]


def run(vae, x):
    """Images through the encoder of a runtime, latents through its decoder."""
    return vae.encode(x)[0].parameters if x.shape[1] == 3 else vae.decode(x)[0]


@torch.no_grad()
def cases(model: AutoencoderKL, arrays: Iterable[np.ndarray]) -> list[Case]:
    """Arrays with what the reference makes of them, on the CPU."""
    found = []
    for x in arrays:
        graph, function = ("encoder", model.encode_moments) if x.shape[1] == 3 else ("decoder", model.decode_latents)
        found.append(Case(graph, f"array {list(x.shape)}", x, function(torch.from_numpy(x)).numpy()))
    return found
