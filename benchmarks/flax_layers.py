"""In which form JAX computes upsampling and norms the fastest here: python -m benchmarks.flax_layers

Layers of Stable Diffusion's sizes, batch 1, fp32: each form's best of some calls, and its share of the plain form's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax import lax
from jax import numpy as jnp

from runtimes.config import VaeConfig
from runtimes.flax.layers import FoldedConv, GroupNorm

CALLS = 5
MAPS = ((32, 512), (64, 512), (128, 256))  #: side and channels in front of each upsampling of an image of 256 pixels
NORMS = ((128, 512), (256, 256), (512, 128))
LAYOUT = ("NHWC", "HWIO", "NHWC")
TAPS = np.array([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], np.float32)  #: see `DeconvUpsample`


def plain(x: Any, kernel: Any) -> Any:
    b, h, w, c = x.shape
    x = jax.image.resize(x, (b, 2 * h, 2 * w, c), "nearest")
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)


def transposed(x: Any, kernel: Any) -> Any:
    kernel = jnp.einsum("ak,bl,klio->abio", TAPS, TAPS, kernel)[::-1, ::-1]
    return lax.conv_general_dilated(x, kernel, (1, 1), ((2, 2), (2, 2)), lhs_dilation=(2, 2), dimension_numbers=LAYOUT)


def interleaved(x: Any, kernel: Any) -> Any:
    params = {"kernel": kernel, "bias": jnp.zeros(kernel.shape[-1])}
    return FoldedConv(VaeConfig()).apply({"params": params}, x)


def of_flax(x: Any) -> Any:
    norm = nn.GroupNorm(32, epsilon=1e-6, use_scale=False, use_bias=False, use_fast_variance=False)
    return norm.apply({}, x)


def positions_first(x: Any) -> Any:
    ones = jnp.ones(x.shape[-1])
    return GroupNorm(VaeConfig()).apply({"params": {"scale": ones, "bias": 0 * ones}}, x)


def fastest(function: Callable[..., Any], *arguments: Any) -> float:
    compiled, seconds = jax.jit(function), []
    for _ in range(1 + CALLS):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def main() -> None:
    rng = np.random.default_rng(0)
    for maps, forms in ((MAPS, (plain, transposed, interleaved)), (NORMS, (of_flax, positions_first))):
        for side, channels in maps:
            x = rng.standard_normal((1, side, side, channels)).astype(np.float32)
            kernel = rng.standard_normal((3, 3, channels, channels)).astype(np.float32) / 70
            given = (x, kernel) if forms[0] is plain else (x,)
            np.testing.assert_allclose(forms[-1](*given), forms[0](*given), atol=1e-3)
            seconds = [fastest(form, *given) for form in forms]
            shares = (
                f"{f.__name__} {s * 1e3:.0f} ms ({s / seconds[0]:.2f})" for f, s in zip(forms, seconds, strict=True)
            )
            print(f"{side}x{side}x{channels}: {', '.join(shares)}")


if __name__ == "__main__":
    main()
