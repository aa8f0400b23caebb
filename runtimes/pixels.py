"""Conversion between pixel levels in 0..255 and samples in [-1, 1], equal to diffusers' VaeImageProcessor.

Both functions accept float32 NumPy arrays and torch tensors; graphs with uint8 inputs or outputs are traced through
them.
"""

from __future__ import annotations

from typing import Any


def to_samples(levels: Any) -> Any:
    """Convert pixel levels in 0..255, float32, to samples in [-1, 1]."""
    return levels / 127.5 - 1.0


def to_levels(samples: Any) -> Any:
    """Convert samples, float32, nominally in [-1, 1], to pixel levels in 0..255, clipped but not rounded.

    The caller rounds (halves to even), because tiles are blended before rounding.
    """
    return (samples / 2 + 0.5).clip(0.0, 1.0) * 255
