"""Images: uint8 arrays, PIL images and files to and from the arrays that the VAE works on.

Arrays are RGB as they are; what has transparency, a palette, one channel or an orientation comes as a PIL image or a
file, which say so: see `load_rgb`.

The conversion and its rounding are those of diffusers' VaeImageProcessor: x = u / 127.5 - 1, and back
u = round(255 * clip(x / 2 + 0.5, 0, 1)), halves to even.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from runtimes.errors import BundleError, ShapeError
from runtimes.files import is_stream, written_whole
from runtimes.pixels import to_levels, to_samples

Images: TypeAlias = Any
"""uint8 [B, H, W, 3] or [H, W, 3], a PIL image, a path, or a list of PIL images, paths or arrays [H, W, 3]."""

USUAL_EXTENSIONS = (".png", ".jpg", ".webp", ".tiff", ".bmp")  #: of pictures, to name in errors

#: EXIF orientation -> what makes the stored pixels upright; 1, or anything else, is upright already
ORIENTATION, UPRIGHT = (
    0x0112,
    {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    },
)


def load_image(source: str | Path | Image.Image) -> npt.NDArray[np.uint8]:
    """A photograph as uint8 [H, W, 3]: see `load_rgb`."""
    return np.asarray(load_rgb(source))


def load_rgb(source: str | Path | Image.Image) -> Image.Image:
    """A photograph as an RGB image.

    EXIF orientation is applied. Transparent pixels are laid over white; grey, palette and CMYK become RGB; 16-bit grey
    keeps its high byte. Colours are taken as sRGB: a profile in the file is not applied. Of several frames it is the
    first.

    Raises `ShapeError` for what is not an image, is cut short, has grey values of 32 bits or floats (nobody knows which
    of them is white), or more pixels than Pillow's limit against decompression bombs (`PIL.Image.MAX_IMAGE_PIXELS`).
    """
    if not isinstance(source, (str, os.PathLike, Image.Image)):
        raise ShapeError(f"an image is an array, a PIL image or a path, not {type(source).__name__}")
    try:
        if isinstance(source, Image.Image):
            return _to_rgb(source)  # reads its file now, if it was only opened so far
        if os.path.getsize(source) == 0:
            raise ShapeError(f"{source} is empty (0 bytes)")
        with Image.open(source) as image:
            # Pillow only warns between one and two times its limit; nothing in between is wanted either.
            if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels")
            return _to_rgb(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ShapeError(
            f"{source} is too large to open safely: {error}. If you trust it, raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from None
    except UnidentifiedImageError:
        raise ShapeError(f"{source} is not an image in a format that Pillow reads") from None
    except FileNotFoundError:
        raise ShapeError(f"{source} does not exist") from None
    except (OSError, SyntaxError, ValueError, EOFError, RuntimeError, TypeError, struct.error) as error:
        # All of these come out of Pillow for broken files: RuntimeError for an AVIF, the last two for tags of the wrong
        # type in a TIFF or EXIF.
        raise ShapeError(f"{source} cannot be read as an image: {error}") from None


def save_image(pixels: npt.NDArray[np.uint8], path: str | Path) -> None:
    """Write uint8 [H, W, 3] in the format of the path's suffix; whole or not at all. PNG into pipes and devices."""
    format = picture_format(path)
    with written_whole(path) as partial:
        try:
            Image.fromarray(pixels).save(partial, format)
        except ValueError as error:  # such as a side that the format has no room for
            raise BundleError(f"cannot write {path}: {error}") from None


def picture_format(path: str | Path) -> str:
    """Pillow's name of the format that `save_image` writes; `BundleError` for an extension that is none of a picture.

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
    return writable[extension]


def as_uint8_batch(images: Images) -> npt.NDArray[np.uint8]:
    """Anything that `Images` names -> uint8 [B, H, W, 3]; images of one list must be of one size."""
    if isinstance(images, (str, os.PathLike, Image.Image)):
        images = [images]
    if isinstance(images, Sequence):
        if not images:
            raise ShapeError("an empty list of images")
        arrays = [image if _is_array(image) else load_image(image) for image in images]
        arrays = [_on_host(array) for array in arrays]
        for array in arrays:
            if array.ndim != 3:
                raise ShapeError(f"images of a list are [H, W, 3], not {list(array.shape)}; {_AS_PIL}")
        sizes = {array.shape for array in arrays}
        if len(sizes) > 1:
            shown = ", ".join(str(list(size)) for size in sorted(sizes)[:5])
            raise ShapeError(f"images of one batch must be of one size; these are {shown}")
        images = np.stack(arrays)
    array = _on_host(images)
    if array.dtype != np.uint8:
        raise ShapeError(f"images are uint8 in 0..255, not {array.dtype}; for float arrays in [-1, 1] use encode")
    if array.ndim == 3:
        array = array[None]
    if array.ndim != 4 or array.shape[-1] != 3 or 0 in array.shape:
        raise ShapeError(f"images are [B, H, W, 3] or [H, W, 3], not {list(array.shape)}; {_AS_PIL}")
    return array


_AS_PIL = "what is grey or has transparency is given as PIL.Image.fromarray(array)"


def _is_array(image: Any) -> bool:
    return hasattr(image, "__array__") and not isinstance(image, Image.Image)


def _on_host(array: Any) -> npt.NDArray[Any]:
    """NumPy's view of an array, or of a torch tensor wherever it is."""
    return np.asarray(array.detach().cpu() if hasattr(array, "detach") else array)


def to_float(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """uint8 [B, H, W, 3] in 0..255 -> float32 [B, 3, H, W] in [-1, 1]."""
    samples: npt.NDArray[np.float32] = to_samples(pixels.transpose(0, 3, 1, 2).astype(np.float32))
    return np.ascontiguousarray(samples)


def to_uint8(samples: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.uint8]:
    """float [B, 3, H, W], nominally in [-1, 1] -> uint8 [B, H, W, 3]."""
    levels = to_levels(samples.astype(np.float32))
    return np.ascontiguousarray(np.rint(levels).astype(np.uint8).transpose(0, 2, 3, 1))


def psnr(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB between two uint8 images; infinite where they are equal."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(255.0**2 / error))


def compare_side_by_side(
    original: npt.NDArray[np.uint8], restored: npt.NDArray[np.uint8], amplify: int = 8
) -> npt.NDArray[np.uint8]:
    """One picture [H, 3*W, 3]: original, restored, and their difference times `amplify` around middle grey."""
    difference = (restored.astype(int) - original.astype(int)) * amplify + 128
    return np.concatenate([original, restored, np.clip(difference, 0, 255).astype(np.uint8)], axis=1)


def crop_to_multiple(pixels: npt.NDArray[np.uint8], factor: int) -> npt.NDArray[np.uint8]:
    """The middle of an image [H, W, 3], its sides cut to multiples of `factor`."""
    height, width = (side - side % factor for side in pixels.shape[:2])
    if not height or not width:
        raise ShapeError(
            f"an image of {pixels.shape[1]}x{pixels.shape[0]} is smaller than one latent, {factor}x{factor}"
        )
    top, left = ((side - cut) // 2 for side, cut in zip(pixels.shape[:2], (height, width), strict=True))
    return pixels[top : top + height, left : left + width]


def _to_rgb(image: Image.Image) -> Image.Image:
    # Not ImageOps.exif_transpose: it writes all tags anew, and fails where any of them is broken.
    upright = UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    if upright is not None:
        image = image.transpose(upright)
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        values = np.asarray(image).astype(np.int64)  # Pillow would clip these at 255
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"grey values from {values.min()} to {values.max()}, where 16 bits have 0 to 65535")
        return Image.fromarray((values // 256).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels, of which nobody knows which value is white")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")  # a copy, also of what is RGB: the file may be closed
