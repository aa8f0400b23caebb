"""Conversion between pixels, uint8 [B, H, W, 3], and channels-first arrays, for NumPy arrays and torch tensors."""

from __future__ import annotations

from typing import Any

import numpy as np

from runtimes.arrays import array_module, as_type, is_tensor


def channels_first(x: Any) -> Any:
    """Convert [B, H, W, C] to [B, C, H, W], without a copy."""
    return array_module(x).moveaxis(x, 3, 1)


def channels_last(x: Any) -> Any:
    """Convert [B, C, H, W] to [B, H, W, C], without a copy."""
    return array_module(x).moveaxis(x, 1, 3)


def channels_first_floats(x: Any) -> Any:
    """Convert uint8 [B, H, W, C] to float32 [B, C, H, W] in 0..255."""
    return as_type(channels_first(x), "float32")


def padded(x: Any, axes: tuple[int, int], multiple: int) -> Any:
    """Pad `x` at the end of both axes to the next multiple of `multiple`, by reflection."""
    xp = array_module(x)
    for axis in axes:
        size = x.shape[axis]
        if size % multiple:
            mirrored = xp.asarray(np.pad(np.arange(size), (0, -size % multiple), "reflect"))
            x = x.index_select(axis, mirrored.to(x.device)) if hasattr(x, "index_select") else x.take(mirrored, axis)
    return x


def as_pixels(x: Any) -> Any:
    """Convert [B, C, H, W] in 0..255 to uint8 [B, H, W, C]; floats are rounded, halves to even."""
    xp, x = array_module(x), channels_last(x)
    pixels = x if x.dtype == xp.uint8 else as_type(xp.round(x), "uint8")
    return contiguous(pixels)


def contiguous(x: Any) -> Any:
    """Return the array with its elements in C order in memory; copies it only if needed."""
    return x.contiguous() if is_tensor(x) else array_module(x).ascontiguousarray(x)
