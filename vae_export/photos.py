"""Photographs to measure with: the embedded ones, or the user's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from runtimes.errors import ConfigError
from runtimes.images import load_image, to_float

EMBEDDED = Path(__file__).parent / "assets" / "photos"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


def photographs(directory: Path | None = None) -> list[Path]:
    """The image files below `directory`, or the embedded ones. `ConfigError` where there are none."""
    if directory is not None and not directory.is_dir():
        raise ConfigError(f"{directory} is not a directory of photographs")
    found = sorted(path for path in (directory or EMBEDDED).rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise ConfigError(f"{directory} holds no photographs ({', '.join(SUFFIXES)})")
    return found


def middle_of(path: Path, height: int, width: int, channels: int = 3) -> Tensor:
    """The middle of a photograph, [1, channels, height, width] in [-1, 1]; a smaller one is continued by reflection."""
    pixels = load_image(path)
    missing = [(0, max(0, side - have)) for side, have in zip((height, width), pixels.shape[:2], strict=True)]
    pixels = np.pad(pixels, (*missing, (0, 0)), mode="symmetric")
    top, left = ((have - side) // 2 for side, have in zip((height, width), pixels.shape[:2], strict=True))
    x = torch.from_numpy(to_float(pixels[None, top : top + height, left : left + width]))
    return x[:, [channel % 3 for channel in range(channels)]]
