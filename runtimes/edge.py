"""Checks of the API's arguments: convert them to a graph's input, or raise an error with the value and the rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from runtimes.arrays import array_module, as_type, is_tensor
from runtimes.errors import ConfigError, ShapeError
from runtimes.layout import padded
from runtimes.warning import warn_caller

#: Images are in [-1, 1]. Noise of unit variance does not reach 10, so larger values are taken for pixels in 0..255.
FAR_OUTSIDE = 10.0


def as_array(x: Any, what: str) -> Any:
    """Return the argument as a dense array of its own kind; lists of arrays are stacked. `what` names it in errors.

    Raises `ShapeError` for anything that is not readable as an array.
    """
    if isinstance(x, (list, tuple)):
        x = _stacked(x, what)
    xp = array_module(x)
    if is_tensor(x):
        return _strided(x, what)
    if xp is np and not isinstance(x, np.ndarray):
        try:
            return np.from_dlpack(x) if hasattr(x, "__dlpack__") else np.asarray(x)
        except (BufferError, TypeError, ValueError) as error:  # an array on another device, or a ragged list
            raise ShapeError(f"{what} cannot be read as an array: {error}") from None
    return x


def _stacked(arrays: Sequence[Any], what: str) -> Any:
    if not arrays:
        raise ShapeError(f"{what} are empty: a list with nothing in it")
    shapes = {tuple(array.shape) for array in arrays if hasattr(array, "shape")}
    if len(shapes) > 1:
        shown = ", ".join(str(list(shape)) for shape in sorted(shapes)[:5])
        raise ShapeError(f"{what} of one batch must be of one size; these are {shown}")
    kinds = {array_module(array) for array in arrays}
    xp = kinds.pop()
    if xp is np and not kinds:
        return arrays  # as_array converts the list, or raises an error with the reason
    if kinds:
        raise ShapeError(f"{what} of one batch must be arrays of one library")
    if is_tensor(arrays[0]):
        arrays = [_strided(array, what) for array in arrays]
        places = {(str(array.device), str(array.dtype)) for array in arrays}
        if len(places) > 1:
            shown = ", ".join(" ".join(place) for place in sorted(places))
            raise ShapeError(f"{what} of one batch must be on one device and of one type; these are {shown}")
    return xp.stack(arrays)


def _strided(x: Any, what: str) -> Any:
    """Apply a torch tensor's lazy conjugation and negation. Raises `ShapeError` for a tensor that is not dense."""
    layout = str(x.layout).removeprefix("torch.")
    if x.is_meta:
        raise ShapeError(f'{what} are on torch\'s device "meta", which holds no values')
    if layout != "strided" or x.is_quantized or x.is_nested:
        kind = "quantized" if x.is_quantized else "nested" if x.is_nested else layout.removeprefix("_")
        raise ShapeError(f"{what} are a {kind} tensor; give a dense one")
    return x.resolve_conj().resolve_neg()


def checked_floats(x: Any, what: str, channels: int, dtype: str, *, multiple_of: int, pad: bool = False) -> Any:
    """Check `x`, float [B, channels, height, width], and convert it to `dtype`; `what` names it in errors.

    Height and width must be multiples of `multiple_of`; with `pad` they are padded by reflection at the end. Raises
    `ShapeError` for anything else.
    """
    x = as_array(x, what)
    if not (x.is_floating_point() if is_tensor(x) else x.dtype.kind == "f"):
        raise ShapeError(f"{what} are floating point, not {x.dtype}; uint8 images go to images_to_latents")
    if x.ndim != 4 or x.shape[1] != channels or 0 in x.shape:
        raise ShapeError(f"{what} are [B, {channels}, height, width], not {shown_shape(x)}")
    x = padded(x, (2, 3), multiple_of) if pad else x
    _check_sides(x.shape[2:], multiple_of)
    return as_type(x.detach() if is_tensor(x) else x, dtype)


def checked_pixels(x: Any, channels: int, *, multiple_of: int, pad: bool = False) -> Any:
    """Check `x`, uint8 [B, height, width, channels], for a graph that takes pixels; `pad` as in `checked_floats`."""
    x = as_array(x, "images")
    if str(x.dtype).removeprefix("torch.") != "uint8" or x.ndim != 4 or x.shape[3] != channels or 0 in x.shape:
        raise ShapeError(
            f"this bundle takes uint8 images [B, height, width, {channels}] (--io uint8), "
            f"not {x.dtype} {shown_shape(x)}"
        )
    x = padded(x, (1, 2), multiple_of) if pad else x
    _check_sides(x.shape[1:3], multiple_of)
    return x


def shown_shape(x: Any) -> str:
    """Return the shape as text for error messages."""
    return f"{list(x.shape)}, which is empty" if 0 in x.shape else str(list(x.shape))


class Notices:
    """Warnings about arguments; each is given once per runtime."""

    def __init__(self, backend: str) -> None:
        self._backend = backend
        self._given: set[str] = set()

    def about_gradients(self, x: Any) -> None:
        """Warn that no gradient flows: guidance or training through this VAE would silently have no effect."""
        arrays = x if isinstance(x, (list, tuple)) else [x]
        if not any(is_tensor(a) and a.requires_grad and array_module(a).is_grad_enabled() for a in arrays):
            return
        self._once(
            "gradients",
            f"the tensor requires grad, and no gradient flows through a VAE that runs in {self._backend}: use "
            "diffusers' own VAE for guidance or training, or call this one under torch.no_grad()",
        )

    def about_range(self, x: Any) -> None:
        """Warn if images are floats in 0..255. Checks arrays in host memory only, since a GPU's would block."""
        if str(getattr(x, "device", "cpu")) != "cpu" or "range" in self._given:
            return
        some = x[:, :, ::4, ::4]
        smallest, largest = float(some.min()), float(some.max())
        if largest > FAR_OUTSIDE or smallest < -FAR_OUTSIDE:
            self._once(
                "range",
                f"encode takes images in [-1, 1], and these reach from {smallest:g} to {largest:g}: give uint8 pixels "
                "to images_to_latents, or x / 127.5 - 1 for floats in 0..255",
            )

    def _once(self, name: str, message: str) -> None:
        if name not in self._given:
            self._given.add(name)
            warn_caller(message)


def device_name(device: Any) -> str:
    """Return the lower-case name of a device, given as text or as a `torch.device`."""
    return str(device).strip().lower()


def kept_part(size: tuple[int, int], height: int, width: int) -> tuple[slice, slice]:
    """Return the slices of rows and columns for the top left part `size`, (height, width) in pixels, of an image."""
    if not (0 < size[0] <= height and 0 < size[1] <= width):
        raise ShapeError(f"size {size[1]}x{size[0]} is not a part of the image, {width}x{height}")
    return slice(size[0]), slice(size[1])


def check_count(name: str, value: int | None) -> None:
    """Raise `ConfigError` unless `value` is a whole number of at least 1, or None."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ConfigError(f"{name} must be a whole number of at least 1, not {value!r}")


def _check_sides(sides: Sequence[int], multiple_of: int) -> None:
    """Raise `ShapeError` unless height and width are multiples of `multiple_of`."""
    for name, size in zip(("height", "width"), sides, strict=True):
        if size % multiple_of:
            full = size + -size % multiple_of
            raise ShapeError(f"{name} {size} is not a multiple of {multiple_of}; pad to {full} (pad=True)")
