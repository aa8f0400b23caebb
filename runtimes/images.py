"""Convert uint8 arrays, PIL images and image files to the arrays that the VAE takes, and back.

Arrays must have the model's number of channels. PIL images and files may have other channels, a palette or an EXIF
orientation: `runtimes.image_files.load_pil` converts them.

The conversion and its rounding are those of diffusers' VaeImageProcessor: x = u / 127.5 - 1, and back
u = round(255 * clip(x / 2 + 0.5, 0, 1)), halves to even.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from runtimes.arrays import array_module, as_type, on_host
from runtimes.edge import as_array, shown_shape
from runtimes.errors import BundleError, ShapeError
from runtimes.files import is_stream, written_whole
from runtimes.image_files import is_readable, load_image
from runtimes.layout import as_pixels, channels_first_floats, contiguous
from runtimes.pixels import to_levels, to_samples

Images: TypeAlias = Any
"""uint8 [B, H, W, C] or [H, W, C], for grey also [H, W]; a PIL image, a path, an open file or its content as bytes; or
a list of these, each one image."""

WITHOUT_ALPHA = ("JPEG", "MPO", "PPM")  #: formats that have no RGBA
USUAL_EXTENSIONS = (".png", ".jpg", ".webp", ".tiff", ".bmp")  #: the extensions that error messages suggest


def to_pil(pixels: npt.NDArray[np.uint8]) -> Image.Image:
    """Convert uint8 [H, W, C] to a PIL image: grey for 1 channel, RGB for 3, RGBA for 4."""
    return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)


def save_image(pixels: npt.NDArray[np.uint8], path: str | Path) -> None:
    """Write uint8 [H, W, C] atomically, in the format of the path's extension; PNG into pipes and devices.

    Raises `BundleError` for the errors of `picture_format`, and for a path that cannot be written.
    """
    format = picture_format(path, pixels.shape[2])
    with written_whole(path) as partial:
        try:
            to_pil(pixels).save(partial, format)
        except ValueError as error:  # such as an image that is too large for the format
            raise BundleError(f"cannot write {path}: {error}") from None


def picture_format(path: str | Path, channels: int = 3) -> str:
    """Return Pillow's name of the format that `save_image` writes to this path.

    Pipes and devices without an extension get PNG. Raises `BundleError` for an extension that is not of an image
    format, and for a format without transparency if there are 4 channels.
    """
    Image.init()
    extension = Path(path).suffix.lower()
    writable = {name: format for name, format in Image.registered_extensions().items() if format in Image.SAVE}
    if not extension and is_stream(path):
        return "PNG"
    if extension not in writable:
        wrong = f"{extension!r} is not the extension of a picture" if extension else "the name has no extension"
        usual = ", ".join(name for name in USUAL_EXTENSIONS if name in writable)
        raise BundleError(f"cannot write {path}: {wrong}; the extension selects the format, such as {usual}")
    format = writable[extension]
    if channels == 4 and format in WITHOUT_ALPHA:
        raise BundleError(f"cannot write {path}: {format} has no transparency; give a name that ends in .png or .webp")
    return format


def as_uint8_batch(images: Images, channels: int = 3, *, max_pixels: int | None = None) -> Any:
    """Convert any `Images` to uint8 [B, H, W, channels]. Images of one list must have the same size.

    Torch tensors, CuPy arrays and lists of them keep their kind; everything else becomes a NumPy array. Raises
    `ShapeError` for another dtype or shape.
    """

    def one(image: Any) -> Any:
        array = load_image(image, channels, max_pixels=max_pixels) if is_readable(image) else as_array(image, "images")
        array = array[..., None] if channels == 1 and array.ndim == 2 else array
        if array.ndim != 3:
            raise ShapeError(f"images of a list are {_shapes(channels)[1]}, not {list(array.shape)}; {_AS_PIL}")
        return array

    if is_readable(images):
        images = [images]
    if isinstance(images, Sequence) and not isinstance(images, memoryview):
        arrays = [one(image) for image in images]
        if len({array_module(array) for array in arrays}) > 1:
            arrays = [on_host(array) for array in arrays]
        array = as_array(arrays, "images")
    else:
        array = as_array(images, "images")
    if str(array.dtype).removeprefix("torch.") != "uint8":
        raise ShapeError(f"images are uint8 in 0..255, not {array.dtype}; for float arrays in [-1, 1] use encode")
    if channels == 1 and array.ndim == 2:
        array = array[..., None]
    if array.ndim == 3:
        array = array[None]
    if array.ndim != 4 or array.shape[-1] != channels or 0 in array.shape:
        raise ShapeError(f"images are {' or '.join(_shapes(channels))}, not {shown_shape(array)}; {_AS_PIL}")
    return array


_AS_PIL = "others are given as PIL.Image.fromarray(array), which is converted"


def _shapes(channels: int) -> tuple[str, ...]:
    """Return the accepted shapes of a batch and of one image, for error messages."""
    return (f"[B, H, W, {channels}]", f"[H, W, {channels}]", *(["[H, W]"] if channels == 1 else []))


def to_float(pixels: Any) -> Any:
    """Convert uint8 [B, H, W, C] in 0..255 to float32 [B, C, H, W] in [-1, 1]; arrays of any kind."""
    return contiguous(to_samples(channels_first_floats(pixels)))


def to_uint8(samples: Any) -> Any:
    """Convert float [B, C, H, W], clipped to [-1, 1], to uint8 [B, H, W, C]; arrays of any kind."""
    return as_pixels(to_levels(as_type(samples, "float32")))


def psnr(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]) -> float:
    """Return the peak signal-to-noise ratio in dB of two uint8 images; infinity if they are equal."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(255.0**2 / error))


def compare_side_by_side(
    original: npt.NDArray[np.uint8], restored: npt.NDArray[np.uint8], amplify: int = 8
) -> npt.NDArray[np.uint8]:
    """Return one image [H, 3*W, C]: original, restored, and their difference times `amplify` around middle grey.

    The difference image of RGBA shows the colours only, and is opaque.
    """
    difference = (restored.astype(int) - original.astype(int)) * amplify + 128
    difference[..., 3:] = 255
    return np.concatenate([original, restored, np.clip(difference, 0, 255).astype(np.uint8)], axis=1)


def crop_to_multiple(pixels: npt.NDArray[np.uint8], factor: int) -> npt.NDArray[np.uint8]:
    """Crop an image [H, W, C] around its centre, so that its sides are multiples of `factor`.

    Raises `ShapeError` for an image with a side below `factor`.
    """
    height, width = (side - side % factor for side in pixels.shape[:2])
    if not height or not width:
        raise ShapeError(
            f"an image of {pixels.shape[1]}x{pixels.shape[0]} is smaller than one latent, {factor}x{factor}"
        )
    top, left = ((side - cut) // 2 for side, cut in zip(pixels.shape[:2], (height, width), strict=True))
    return pixels[top : top + height, left : left + width]
