"""The checks at the edge: what a caller gives becomes what a graph takes, or an error with the value and the rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from runtimes.arrays import array_module
from runtimes.errors import ConfigError, ShapeError
from runtimes.layout import padded


def checked_floats(x: Any, what: str, channels: int, dtype: str, *, multiple_of: int, pad: bool = False) -> Any:
    """`x` [B, channels, height, width] of any float type as an array of `dtype`; `what` is it called in errors.

    Height and width must be multiples of `multiple_of`; with `pad` they are made so by mirrored pixels at the end.
    """
    xp = array_module(x)
    if xp is np and not isinstance(x, np.ndarray):
        try:
            x = np.from_dlpack(x) if hasattr(x, "__dlpack__") else np.asarray(x)
        except (BufferError, TypeError, ValueError) as error:  # on another device, or ragged
            raise ShapeError(f"{what} cannot be read as an array: {error}") from None
    is_torch = hasattr(x, "is_floating_point")
    if not (x.is_floating_point() if is_torch else x.dtype.kind == "f"):
        raise ShapeError(f"{what} are floating point, not {x.dtype}; uint8 images go to images_to_latents")
    if x.ndim != 4 or x.shape[1] != channels or 0 in x.shape:
        raise ShapeError(f"{what} are [B, {channels}, height, width], not {list(x.shape)}")
    x = padded(x, (2, 3), multiple_of) if pad else x
    _check_sides(x.shape[2:], multiple_of)
    return x.detach().to(getattr(xp, dtype)) if is_torch else x.astype(dtype, copy=False)


def checked_pixels(x: Any, channels: int, *, multiple_of: int, pad: bool = False) -> Any:
    """`x` as uint8 [B, height, width, channels], for a graph that takes pixels."""
    x = x.detach() if hasattr(x, "detach") else np.asarray(x)
    if str(x.dtype).removeprefix("torch.") != "uint8" or x.ndim != 4 or x.shape[3] != channels or 0 in x.shape:
        raise ShapeError(
            f"this bundle takes uint8 images [B, height, width, {channels}] (--io uint8), not {x.dtype} {list(x.shape)}"
        )
    x = padded(x, (1, 2), multiple_of) if pad else x
    _check_sides(x.shape[1:3], multiple_of)
    return x


def kept_part(size: tuple[int, int], height: int, width: int) -> tuple[slice, slice]:
    """The rows and columns that `size`, height and width in pixels, keeps of an image from its top left corner."""
    if not (0 < size[0] <= height and 0 < size[1] <= width):
        raise ShapeError(f"size {size[1]}x{size[0]} is not a part of the image, {width}x{height}")
    return slice(size[0]), slice(size[1])


def check_count(name: str, value: int | None) -> None:
    """`ConfigError` unless `value` is a whole number of 1 or more, or None."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ConfigError(f"{name} must be a whole number of at least 1, not {value!r}")


def _check_sides(sides: Sequence[int], multiple_of: int) -> None:
    """`ShapeError` unless height and width are multiples."""
    for name, size in zip(("height", "width"), sides, strict=True):
        if size % multiple_of:
            full = size + -size % multiple_of
            raise ShapeError(f"{name} {size} is not a multiple of {multiple_of}; pad to {full} (pad=True)")
