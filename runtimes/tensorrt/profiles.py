"""Profiles: the ranges of batch and image sizes, in pixels, that a TensorRT engine is built for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from runtimes.errors import ConfigError, ShapeError

LARGEST = 65536  #: the limit of batch, height and width; a larger value is a typing error


@dataclass(frozen=True)
class Range:
    """Smallest, preferred and largest value of one size; the engine is fastest at the preferred one."""

    min: int
    opt: int
    max: int

    def __contains__(self, size: int) -> bool:
        return self.min <= size <= self.max

    def __str__(self) -> str:
        return f"{self.min}..{self.max}" if self.min < self.max else str(self.max)


@dataclass(frozen=True)
class Profile:
    """Ranges of the batch and of the image's height and width in pixels, for the encoder and the decoder."""

    batch: Range
    height: Range
    width: Range

    def holds(self, batch: int, height: int, width: int) -> bool:
        """Return whether all three sizes are inside their ranges."""
        return batch in self.batch and height in self.height and width in self.width

    def distance(self, batch: int, height: int, width: int) -> float:
        """Return the factor, at least 1, by which the work on a shape differs from that on the preferred shape."""
        work, preferred = batch * height * width, self.batch.opt * self.height.opt * self.width.opt
        return max(work, preferred) / min(work, preferred)

    def shapes(self, graph: str, channels: int, factor: int) -> list[tuple[int, int, int, int]]:
        """Return the smallest, preferred and largest [B, C, H, W] of a graph's input (latents for the decoder)."""
        divide = factor if graph == "decoder" else 1
        return [
            (getattr(self.batch, at), channels, getattr(self.height, at) // divide, getattr(self.width, at) // divide)
            for at in ("min", "opt", "max")
        ]

    def __str__(self) -> str:
        opt = f"{self.batch.opt}x{self.height.opt}x{self.width.opt}"
        return f"{self.batch} x {self.height} x {self.width} (best at {opt})"

    def to_dict(self) -> dict[str, dict[str, int]]:
        """Return {"batch": {"min": ..., "opt": ..., "max": ...}, "height": ..., "width": ...}."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], factor: int) -> Profile:
        """Make a profile from the form that `to_dict` returns. Raises `ConfigError` for anything else."""
        try:
            ranges = {name: Range(**data[name]) for name in ("batch", "height", "width")}
        except (KeyError, TypeError):
            raise ConfigError(f"{data!r} is no profile: batch, height and width with min, opt and max") from None
        return checked(cls(**ranges), factor)


#: The default profile: one image of 256 to 1024 pixels a side.
DEFAULT = Profile(Range(1, 1, 1), Range(256, 1024, 1024), Range(256, 1024, 1024))


def parse_profile(text: str, factor: int) -> Profile:
    """Parse ranges of batch, height and width with preferred sizes, as in 1..4x512..1024x512..1024@1x1024x1024.

    Without "@" the preferred sizes are the smallest batch and the largest image. `ConfigError` names what is wrong.
    """
    ranges, at, opt = text.partition("@")
    parts = ranges.split("x")
    if len(parts) != 3:
        raise ConfigError(
            f"profile {text!r} is not BATCHxHEIGHTxWIDTH, as in 1..4x512..1024x512..1024@1x1024x1024 (pixels)"
        )
    return make_profile(*parts, opt=opt if at else None, factor=factor)


def make_profile(batch: str, height: str, width: str, *, opt: str | None, factor: int) -> Profile:
    """Make a profile from ranges such as "512..1024" or "1", and preferred sizes `opt` such as "1x1024x1024".

    Without `opt` the preferred sizes are the smallest batch and the largest image. `ConfigError` names what is wrong.
    """
    low_high = [_parse_range("batch", batch), _parse_range("height", height), _parse_range("width", width)]
    if opt is None:
        best = [low_high[0][0], low_high[1][1], low_high[2][1]]
    else:
        if not re.fullmatch(r"\d{1,6}x\d{1,6}x\d{1,6}", opt):
            raise ConfigError(f"preferred sizes {opt!r} are not BATCHxHEIGHTxWIDTH, as in 1x1024x1024 (pixels)")
        best = [int(size) for size in opt.split("x")]
    ranges = [Range(low, size, high) for (low, high), size in zip(low_high, best, strict=True)]
    return checked(Profile(*ranges), factor)


def checked(profile: Profile, factor: int) -> Profile:
    """Return the profile. Raises `ConfigError` that names an invalid size."""
    for name in ("batch", "height", "width"):
        sizes: Range = getattr(profile, name)
        values = (sizes.min, sizes.opt, sizes.max)
        if not all(isinstance(size, int) and not isinstance(size, bool) and 1 <= size <= LARGEST for size in values):
            raise ConfigError(f"{name} {values} of a profile: sizes are whole numbers from 1 to {LARGEST}")
        if not sizes.min <= sizes.opt <= sizes.max:
            raise ConfigError(
                f"{name} of a profile goes from {sizes.min} to {sizes.max}, best at {sizes.opt}: "
                "the preferred size lies between smallest and largest"
            )
        for size in values:
            if name != "batch" and size % factor:
                raise ConfigError(
                    f"{name} {size} of a profile is not a multiple of {factor}; take {size + -size % factor}"
                )
    return profile


def nearest(profiles: Sequence[Profile], batch: int, height: int, width: int) -> int:
    """Return the index of the profile that holds a shape and whose preferred shape is nearest to it.

    `ShapeError` lists all profiles if none holds the shape.
    """
    fitting = [index for index, profile in enumerate(profiles) if profile.holds(batch, height, width)]
    if not fitting:
        raise ShapeError(
            f"{batch} x {height} x {width} (batch, height, width in pixels) is outside of what the engine was built "
            f"for: {'; '.join(map(str, profiles))}. Tiling or slicing may bring it inside (enable_tiling(), "
            "enable_slicing()); or build an engine with another profile"
        )
    return min(fitting, key=lambda index: profiles[index].distance(batch, height, width))


def _parse_range(name: str, text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,6})(?:\.\.(\d{1,6}))?", text.strip())
    if match is None:
        raise ConfigError(f"{name} {text!r} is no size and no range of sizes, such as 1024 or 512..1024")
    low, high = int(match[1]), int(match[2] or match[1])
    if low > high:
        raise ConfigError(f"{name} {text!r} begins above its end; write {high}..{low}")
    return low, high
