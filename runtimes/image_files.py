"""Read image files, their bytes and PIL images as sRGB pixels: grey, RGB or RGBA."""

from __future__ import annotations

import io
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageFile, UnidentifiedImageError

from runtimes.edge import check_count
from runtimes.errors import ShapeError
from runtimes.warning import warn_caller

Readable: TypeAlias = "str | os.PathLike[Any] | bytes | bytearray | memoryview | IO[bytes] | Image.Image"
"""A path, the content of a file, a file that is open for reading bytes, or a PIL image."""

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  #: channels of a model's images -> mode of Pillow

#: EXIF orientation -> the operation that makes the stored pixels upright; other values need none
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

_LIMIT = threading.RLock()  # held while Pillow's limit of pixels is changed
_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # two tags of TIFF files, and a value of the second
_PROFILE_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab ": "LAB"}  # colour space of a profile -> mode
_SEVERAL_PICTURES_OF_ONE = ("MPO", "PSD")  # formats whose other frames are previews, gain maps or layers


class TooManyPixels(ShapeError):
    """An image with more pixels than the limit; `max_pixels` raises the limit."""


def is_readable(source: Any) -> bool:
    """Return whether `load_image` can read the source; other sources are arrays of pixels."""
    if isinstance(source, memoryview):
        return source.ndim == 1 and source.itemsize == 1
    known = (str, os.PathLike, bytes, bytearray, Image.Image)
    return isinstance(source, known) or hasattr(source, "read")


def load_image(source: Readable, channels: int = 3, *, max_pixels: int | None = None) -> npt.NDArray[np.uint8]:
    """Read an image as uint8 [H, W, channels]: see `load_pil`."""
    pixels = np.array(load_pil(source, channels, max_pixels=max_pixels))  # a writable copy
    return pixels[..., None] if pixels.ndim == 2 else pixels


def load_pil(source: Readable, channels: int = 3, *, max_pixels: int | None = None) -> Image.Image:
    """Read an image as grey (1 channel), RGB (3) or RGBA (4), in sRGB.

    EXIF orientation is applied. Transparent pixels are composed over white; RGBA keeps them. Colours are converted to
    sRGB by the file's ICC profile; without a profile they are taken as sRGB. 16-bit values keep their high byte. If
    there are several frames, the first is read, with a warning. Open files are read from their beginning, and stay
    open.

    `max_pixels` limits the pixels of the image (default: Pillow's limit against decompression bombs,
    `PIL.Image.MAX_IMAGE_PIXELS`, 89 million).

    Raises `ShapeError` for a source that is not a complete image, has too many pixels, or has grey values of 32 bits or
    floats, whose white level is unknown.
    """
    if channels not in MODES:
        raise ShapeError(
            f"images of {channels} channels cannot be read from files: Pillow has grey (1), RGB (3) and RGBA (4). Give "
            "arrays of them"
        )
    check_count("max_pixels", max_pixels)
    limit = _pillows_limit() if max_pixels is None else max_pixels
    name = _name(source)
    try:
        if isinstance(source, Image.Image):
            return _converted(source, name, channels)  # reads the pixels now, if Pillow has only opened the file
        with _content(source) as file, _pillow_allows(limit), _identified(file) as image:
            if limit is not None and image.width * image.height > limit:
                raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels are more than {limit}")
            return _converted(image, name, channels)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooManyPixels(
            f"{name} is too large to open safely: {error}. If you trust it, raise max_pixels (--max-pixels)"
        ) from None
    except UnidentifiedImageError:
        is_content = isinstance(source, (bytes, bytearray, memoryview))
        hint = "; a path is given as str or Path" if is_content else ""
        raise ShapeError(f"{name} is not an image in a format that Pillow reads{hint}") from None
    except FileNotFoundError:
        raise ShapeError(f"{name} does not exist") from None
    except (OSError, SyntaxError, ValueError, EOFError, RuntimeError, TypeError, struct.error) as error:
        # Pillow raises all of these for broken files: RuntimeError for an AVIF, the last two for tags of the wrong type
        # in a TIFF or EXIF.
        raise ShapeError(f"{name} cannot be read as an image: {error}") from None


# Opening ------------------------------------------------------------------------------------------------------------


def _name(source: Any) -> str:
    """Return the name of a source for errors and warnings. Raises `ShapeError` for anything that is not readable."""
    if isinstance(source, (str, os.PathLike)):
        return os.fsdecode(source)
    if not is_readable(source):
        raise ShapeError(f"an image is an array, a PIL image, a path or a file, not {type(source).__name__}")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return "the content of a file, as bytes,"
    name = getattr(source, "filename" if isinstance(source, Image.Image) else "name", None)
    return os.fsdecode(name) if name and isinstance(name, (str, bytes)) else "the image"


def _content(source: Any) -> IO[bytes]:
    """Open the content of a source as a new file; the caller closes it."""
    if isinstance(source, (str, os.PathLike)):
        path = Path(os.fsdecode(source))
        if path.stat().st_size == 0 and path.is_file():
            raise ShapeError(f"{path} is empty (0 bytes)")
        return path.open("rb")
    if hasattr(source, "read"):
        if not hasattr(source, "seekable") or source.seekable():
            source.seek(0)
        source = source.read()
        if isinstance(source, str):
            raise ShapeError('the file is open for reading text: open it in mode "rb"')
    if not len(source):
        raise ShapeError("the image is empty (0 bytes)")
    return io.BytesIO(source)


@contextmanager
def _pillow_allows(limit: int | None) -> Iterator[None]:
    """Raise Pillow's own limit to `limit` if it is lower, because Pillow checks it again while it reads some formats.

    Pillow's limit applies to the whole process, so only one image at a time is read with a changed limit.
    """
    usual = _pillows_limit()
    if usual is None or (limit is not None and limit <= usual):
        yield
        return
    with _LIMIT:
        Image.MAX_IMAGE_PIXELS = limit
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = usual


def _pillows_limit() -> int | None:
    with _LIMIT:  # waits while another thread has raised it
        return Image.MAX_IMAGE_PIXELS


def _identified(file: IO[bytes]) -> Image.Image:
    """Do what `Image.open` does, without its check of the number of pixels.

    That check only warns up to twice the limit, and a warning cannot be silenced for a single thread.
    """
    start, name = file.read(16), os.fspath(getattr(file, "name", ""))
    tried: set[str] = set()
    for load_plugins in (Image.preinit, Image.init):  # the usual formats, then all
        load_plugins()
        for format in [format for format in Image.ID if format not in tried]:
            tried.add(format)
            factory, accepts = Image.OPEN[format]
            accepted = accepts is None or accepts(start)
            if not accepted or isinstance(accepted, str):  # a text is the reason why Pillow lacks support
                continue
            file.seek(0)
            try:
                return factory(file, name)
            except (SyntaxError, IndexError, TypeError, struct.error):  # another format; Pillow catches the same errors
                continue
    raise UnidentifiedImageError(name)


# Conversion ---------------------------------------------------------------------------------------------------------


def _converted(image: Image.Image, name: str, channels: int) -> Image.Image:
    """Return a copy of an image: upright, in sRGB, in the mode for `channels`."""
    opened = image
    image.load()
    # Not ImageOps.exif_transpose: it rewrites all tags, and fails if any of them is broken.
    upright = UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    profile = image.info.get("icc_profile")
    image = _in_8_bits(image)
    if upright is not None:
        image = image.transpose(upright)
    has_alpha = image.has_transparency_data
    alpha = image.convert("RGBA").getchannel("A") if has_alpha else None
    colours = _in_srgb(_without_alpha(image), profile, name)
    _warn_of_frames(opened, name)
    if channels == 4:
        colours = colours.convert("RGB")
        colours.putalpha(255 if alpha is None else alpha)
        return colours
    if alpha is not None:
        layer = colours.convert("RGB")
        layer.putalpha(alpha)
        colours = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return colours.convert(MODES[channels])


def _warn_of_frames(image: Image.Image, name: str) -> None:
    frames = False
    if isinstance(image, ImageFile.ImageFile) and image.format not in _SEVERAL_PICTURES_OF_ONE and image.tell() == 0:
        with suppress(OSError, SyntaxError, ValueError, EOFError, struct.error):  # the second frame is broken
            frames = getattr(image, "is_animated", False)
    if frames:
        warn_caller(f"{name} has several frames or pages: the first one is taken")


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Convert grey of 12 or 16 bits to mode L or LA; `ValueError` for grey values whose white level is unknown."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    # Pillow reads 16-bit PGM files as 32-bit integers.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        levels = np.asarray(image).astype(np.int64)  # Pillow would clip these at 255
        if tags.get(_BITS) == (12,):
            levels *= 16
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow applies this tag only to 8 bits
            levels = 65535 - levels
        grey, transparent = Image.fromarray((levels // 256).astype(np.uint8)), image.info.get("transparency")
        if isinstance(transparent, int):  # the 16-bit value of transparent pixels
            grey.putalpha(Image.fromarray(np.where(levels == transparent, 0, 255).astype(np.uint8)))
        return grey
    if image.mode == "I":
        raise ValueError(
            "grey values of 32 bits, of which nobody knows which one is white; save it with 8 or 16 bits, or give "
            "uint8 pixels"
        )
    if image.mode == "F":
        raise ValueError("floating-point pixels, of which nobody knows which value is white; give uint8 pixels")
    return image.convert("LA") if image.mode == "La" else image  # Pillow converts La only to LA


def _without_alpha(image: Image.Image) -> Image.Image:
    """Return the colours of an image without its transparency, in mode L, RGB, CMYK or LAB."""
    if image.mode in ("1", "L", "LA"):
        return image.convert("L")
    if image.mode in ("CMYK", "LAB"):
        return image
    if image.has_transparency_data:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _in_srgb(image: Image.Image, profile: Any, name: str) -> Image.Image:
    """Convert colours to sRGB, mode L or RGB, by their ICC profile or, without one, by their mode."""
    source: Any = None
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            space = _PROFILE_MODES.get(source.profile.xcolor_space)
            if "srgb" in ImageCms.getProfileDescription(source).lower():
                return image  # a conversion from sRGB to sRGB would only add rounding errors
        except (ImageCms.PyCMSError, OSError, TypeError, ImportError) as error:
            space = None
            warn_caller(f"the ICC profile of {name} cannot be read ({error}): its colours are taken as sRGB")
        else:
            if space != image.mode:
                space = None
                warn_caller(f"the ICC profile of {name} is not one of {image.mode} pixels: colours are taken as sRGB")
        source = None if space is None else source
    if source is None and image.mode == "LAB":
        source = ImageCms.createProfile("LAB")
    if source is None:
        return image
    converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert converted is not None  # None only for conversions in place
    return converted
