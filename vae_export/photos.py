"""Photographs for calibration and validation: the embedded ones, or the user's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from runtimes.errors import ConfigError
from runtimes.image_files import MODES, load_image
from runtimes.images import to_float

Pixels = npt.NDArray[np.uint8]

EMBEDDED = Path(__file__).parent / "assets" / "photos"
HELD_OUT = "coffee"  #: the embedded photograph that is used neither for training nor for calibration
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


def photographs(directory: str | Path | None = None) -> list[Path]:
    """Return the image files below `directory`, or the embedded ones. Raises `ConfigError` if there are none."""
    directory = None if directory is None else Path(directory)
    if directory is not None and not directory.is_dir():
        raise ConfigError(f"{directory} is not a directory of photographs")
    found = sorted(path for path in (directory or EMBEDDED).rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise ConfigError(f"{directory} holds no photographs ({', '.join(SUFFIXES)})")
    return found


def crops(paths: Sequence[Path], side: int, count: int, channels: int = 3) -> Iterator[Tensor]:
    """Yield about `count` squares of the photographs, [1, channels, side, side] in [-1, 1]: centres, then corners."""
    each = max(1, count // len(paths))
    places = ((0.5, 0.5), (0, 0), (1, 1), (0, 1), (1, 0))[:each]
    for path in paths[:: max(1, len(paths) // count)]:
        pixels = _at_least(_load(path, channels), side, side)
        for down, right in places:
            top, left = (round((have - side) * part) for have, part in zip(pixels.shape, (down, right), strict=False))
            yield _as_input(pixels[top : top + side, left : left + side])


def middle_of(path: Path, height: int, width: int, channels: int = 3) -> Tensor:
    """Return a photograph's centre, [1, channels, height, width] in [-1, 1]; small ones are padded by reflection."""
    pixels = _at_least(_load(path, channels), height, width)
    top, left = ((have - side) // 2 for side, have in zip((height, width), pixels.shape[:2], strict=True))
    return _as_input(pixels[top : top + height, left : left + width])


def _load(path: Path, channels: int) -> Pixels:
    """Read a photograph as grey, RGB or RGBA; other numbers of channels repeat those of RGB."""
    if channels in MODES:
        return load_image(path, channels)
    return load_image(path)[..., [channel % 3 for channel in range(channels)]]


def _at_least(pixels: Pixels, height: int, width: int) -> Pixels:
    missing = [(0, max(0, side - have)) for side, have in zip((height, width), pixels.shape[:2], strict=True)]
    return np.pad(pixels, (*missing, (0, 0)), mode="symmetric")


def _as_input(pixels: Pixels) -> Tensor:
    return torch.from_numpy(to_float(pixels[None]))
