"""Decode, resize and crop the images of a dataset, and record their sizes and crops."""

from __future__ import annotations

import hashlib
import io
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from runtimes.errors import ConfigError
from runtimes.image_files import TooManyPixels, load_pil
from vae_export.dataset.items import Item, Source

POLICIES = ("none", "center-crop", "buckets")
Size = tuple[int, int]

#: (width, height) of the buckets that SDXL was trained with, about a megapixel each; from appendix I of its report
SDXL_BUCKETS: tuple[Size, ...] = (
    *((512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600)),
    *((640, 1536), (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152)),
    *((896, 1152), (896, 1088), (960, 1088), (960, 1024), (1024, 1024), (1024, 960), (1088, 960), (1088, 896)),
    *((1152, 896), (1152, 832), (1216, 832), (1280, 768), (1344, 768), (1344, 704), (1408, 704), (1472, 704)),
    *((1536, 640), (1600, 640), (1664, 576), (1728, 576), (1792, 576), (1856, 512), (1920, 512), (1984, 512)),
    (2048, 512),
)


class Resizing(NamedTuple):
    """How an image is resized and then cropped to the size that is encoded."""

    resized: Size  #: (width, height) after resizing
    crop: Size  #: (left, top) of the crop in the resized image
    size: Size  #: (width, height) of the crop


@dataclass(frozen=True)
class SizePolicy:
    """How images get a size that a VAE with downscaling factor `factor` can encode.

    "none" crops the sides around the centre to multiples of the factor. "center-crop" resizes an image so that it just
    covers the one size in `sizes`, and crops it around the centre. "buckets" does the same with the size in `sizes`
    whose aspect ratio is nearest, and keeps an image that has one of these sizes: the rule of sd-scripts. Smaller
    images are enlarged. The filter is Pillow's LANCZOS.

    `channels` and `max_pixels` are the arguments of `runtimes.image_files.load_pil`. Raises `ConfigError` for an
    unknown policy, and for sizes that do not match the policy or the factor.
    """

    policy: str
    sizes: tuple[Size, ...]
    factor: int
    channels: int = 3
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ConfigError(f"no policy {self.policy!r} for sizes; known are {', '.join(POLICIES)}")
        for width, height in self.sizes:
            if not width or not height or width % self.factor or height % self.factor:
                nearest = "x".join(str(max(1, round(side / self.factor)) * self.factor) for side in (width, height))
                raise ConfigError(
                    f"size {width}x{height}: both sides must be multiples of {self.factor}, such as {nearest}"
                )
        if (self.policy == "none") != (not self.sizes) or (self.policy == "center-crop" and len(self.sizes) != 1):
            raise ConfigError("--policy none takes no sizes, center-crop one --size, and buckets one or more")

    def fit(self, width: int, height: int) -> Resizing:
        """Return how an image of this size is resized and cropped; the crop is 0 wide or high if it is too small."""
        if self.policy == "none":
            kept = width - width % self.factor, height - height % self.factor
            return Resizing((width, height), ((width - kept[0]) // 2, (height - kept[1]) // 2), kept)
        size = self._nearest(width, height)
        scale = max(size[0] / width, size[1] / height)
        resized = max(size[0], int(width * scale + 0.5)), max(size[1], int(height * scale + 0.5))
        return Resizing(resized, ((resized[0] - size[0]) // 2, (resized[1] - size[1]) // 2), size)

    def _nearest(self, width: int, height: int) -> Size:
        if (width, height) in self.sizes:
            return width, height
        return min(self.sizes, key=lambda size: abs(size[0] / size[1] - width / height))


class Unchanged(NamedTuple):
    """The result for an image whose file has not changed."""


class Broken(NamedTuple):
    """The result for an image that cannot be encoded. Without a `sha256` the next run tries again."""

    sha256: bytes | None
    reason: str


class Prepared(NamedTuple):
    """The result for an image to encode: its pixels, uint8 [H, W, C], sizes (height, width), and crop (top, left)."""

    pixels: npt.NDArray[np.uint8]
    sha256: bytes
    original_size: Size
    resized: Size
    crop: Size


def prepare(source: Source, item: Item, known: bytes | None, policy: SizePolicy) -> Unchanged | Broken | Prepared:
    """Read an image; decode, resize and crop it unless its SHA-256 is `known`.

    Never raises: errors are returned as `Broken`.
    """
    try:
        data = source.read(item)
    except Exception as error:
        return Broken(None, f"cannot be read: {_one_line(error)}")
    sha256 = hashlib.sha256(data).digest()
    if sha256 == known:
        return Unchanged()
    try:
        return _prepared(data, sha256, policy)
    except MemoryError:
        return Broken(None, "not enough memory to decode it")
    except Exception as error:  # decoders raise anything for broken files
        return Broken(sha256, _one_line(error))


def _prepared(data: bytes, sha256: bytes, policy: SizePolicy) -> Broken | Prepared:
    try:
        image = load_pil(io.BytesIO(data), policy.channels, max_pixels=policy.max_pixels)
    except TooManyPixels as error:
        return Broken(None, _one_line(error))  # without a hash: the next run may have a higher limit
    width, height = image.size
    fit = policy.fit(width, height)
    if 0 in fit.size:
        return Broken(sha256, f"{width}x{height} is smaller than one latent, {policy.factor}x{policy.factor}")
    if fit.resized != (width, height):
        image = image.resize(fit.resized, Image.Resampling.LANCZOS)
    left, top = fit.crop
    pixels = np.asarray(image.crop((left, top, left + fit.size[0], top + fit.size[1])))
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    return Prepared(pixels, sha256, (height, width), (fit.resized[1], fit.resized[0]), (top, left))


def parse_sizes(text: str) -> tuple[Size, ...]:
    """Parse "sdxl", or WIDTHxHEIGHT,WIDTHxHEIGHT,... (also SIDE for a square). Raises `ConfigError` otherwise."""
    if text == "sdxl":
        return SDXL_BUCKETS
    sizes = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:x(\d{1,6}))?\s*", part)
        if match is None:
            raise ConfigError(f"{part!r} is not WIDTHxHEIGHT, such as 1024x768 (or 'sdxl' for buckets)")
        sizes.append((int(match[1]), int(match[2] or match[1])))
    return tuple(sizes)


def _one_line(error: Any) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    text = re.sub(r"<(PIL\.[\w.]+|_io\.BytesIO)[^>]*>", "the image", str(text))  # removes memory addresses, which vary
    return " ".join(text.split())[:500]
