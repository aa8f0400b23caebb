"""Pixels and samples: the one conversion between values in 0..255 and values in [-1, 1].

It is that of diffusers' VaeImageProcessor. Arrays may be NumPy's or torch's, of float32: the graphs with pixels inside
are traced through the same two functions.
"""

from __future__ import annotations

from typing import Any


def to_samples(levels: Any) -> Any:
    """Pixel levels in 0..255, as float32 -> samples in [-1, 1]."""
    return levels / 127.5 - 1.0


def to_levels(samples: Any) -> Any:
    """Samples, nominally in [-1, 1], as float32 -> pixel levels in 0..255, clipped and not yet rounded.

    Rounding, halves to even, is left to the caller: tiles are blended before it.
    """
    return (samples / 2 + 0.5).clip(0.0, 1.0) * 255
