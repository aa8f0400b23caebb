"""Images: uint8 arrays, PIL images and files to and from the arrays that the VAE works on.

Arrays have the channels of the model as they are; what has others, a palette or an orientation comes as a PIL image or
a file, which say so: see `runtimes.image_files.load_pil`.

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
"""uint8 [B, H, W, C] or [H, W, C], for grey [H, W] as well; a PIL image, a path, a file or its content as bytes; or a
list of these, each being one image."""

WITHOUT_ALPHA = ("JPEG", "MPO", "PPM")  #: formats that have no RGBA
USUAL_EXTENSIONS = (".png", ".jpg", ".webp", ".tiff", ".bmp")  #: of pictures, to name in errors


def to_pil(pixels: npt.NDArray[np.uint8]) -> Image.Image:
    """uint8 [H, W, C] as a PIL image: grey for 1 channel, RGB for 3, RGBA for 4."""
    return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)


def save_image(pixels: npt.NDArray[np.uint8], path: str | Path) -> None:
    """Write uint8 [H, W, C] in the format of the path's suffix; whole or not at all. PNG into pipes and devices."""
    format = picture_format(path, pixels.shape[2])
    with written_whole(path) as partial:
        try:
            to_pil(pixels).save(partial, format)
        except ValueError as error:  # such as a side that the format has no room for
            raise BundleError(f"cannot write {path}: {error}") from None


def picture_format(path: str | Path, channels: int = 3) -> str:
    """Pillow's name of the format that `save_image` writes; `BundleError` for an extension that is none of a picture,
    or one of a format without transparency where there are 4 channels.

    Pipes and devices, which may have no extension, get PNG.
    """
    Image.init()
    extension = Path(path).suffix.lower()
    writable = {name: format for name, format in Image.registered_extensions().items() if format in Image.SAVE}
    if not extension and is_stream(path):
        return "PNG"
    if extension not in writable:
        wrong = f"{extension!r} is not the extension of a picture" if extension else "the name has no extension"
        usual = ", ".join(name for name in USUAL_EXTENSIONS if name in writable)
        raise BundleError(f"cannot write {path}: {wrong}, which says the format; give one such as {usual}")
    format = writable[extension]
    if channels == 4 and format in WITHOUT_ALPHA:
        raise BundleError(f"cannot write {path}: {format} has no transparency; give a name that ends in .png or .webp")
    return format


def as_uint8_batch(images: Images, channels: int = 3, *, max_pixels: int | None = None) -> Any:
    """Anything that `Images` names -> uint8 [B, H, W, channels]; images of one list must be of one size.

    Tensors of torch and arrays of CuPy, and lists of them, stay what they are; everything else is NumPy's.
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
    """How a batch and one image of so many channels may be given."""
    return (f"[B, H, W, {channels}]", f"[H, W, {channels}]", *(["[H, W]"] if channels == 1 else []))


def to_float(pixels: Any) -> Any:
    """uint8 [B, H, W, C] in 0..255 -> float32 [B, C, H, W] in [-1, 1]; arrays of any kind."""
    return contiguous(to_samples(channels_first_floats(pixels)))


def to_uint8(samples: Any) -> Any:
    """float [B, C, H, W], nominally in [-1, 1] -> uint8 [B, H, W, C]; arrays of any kind."""
    return as_pixels(to_levels(as_type(samples, "float32")))


def psnr(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB between two uint8 images; infinite where they are equal."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(255.0**2 / error))


def compare_side_by_side(
    original: npt.NDArray[np.uint8], restored: npt.NDArray[np.uint8], amplify: int = 8
) -> npt.NDArray[np.uint8]:
    """One picture [H, 3*W, C]: original, restored, and their difference times `amplify` around middle grey.

    The difference of RGBA is that of the colours alone, opaque.
    """
    difference = (restored.astype(int) - original.astype(int)) * amplify + 128
    difference[..., 3:] = 255
    return np.concatenate([original, restored, np.clip(difference, 0, 255).astype(np.uint8)], axis=1)


def crop_to_multiple(pixels: npt.NDArray[np.uint8], factor: int) -> npt.NDArray[np.uint8]:
    """The middle of an image [H, W, C], its sides cut to multiples of `factor`."""
    height, width = (side - side % factor for side in pixels.shape[:2])
    if not height or not width:
        raise ShapeError(
            f"an image of {pixels.shape[1]}x{pixels.shape[0]} is smaller than one latent, {factor}x{factor}"
        )
    top, left = ((side - cut) // 2 for side, cut in zip(pixels.shape[:2], (height, width), strict=True))
    return pixels[top : top + height, left : left + width]
