"""The latent space: conversion between raw latents of a VAE and normalised latents of a diffusion model.

A VAE's encoder returns *raw* latents [B, channels, h, w]. A diffusion model takes *normalised* latents: squares of
`patch` x `patch` positions become channels (FLUX.2; `patch` is 1 elsewhere), and each channel is shifted and scaled:

    normalised = (patchify(raw) - add) * multiply

This is the only module that turns scaling_factor, shift_factor, means and deviations into numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from runtimes.arrays import array_module
from runtimes.errors import ConfigError, ShapeError

UNKNOWN = (
    "the checkpoint does not say its scaling_factor, and guessing it would give wrong latents; export it again with "
    "--scaling-factor (and --shift-factor), or use encode and decode on raw latents"
)


@dataclass(frozen=True)
class LatentSpace:
    """Shape and normalisation of a VAE's latents.

    `multiply` and `add` hold one number for each of the `channels * patch**2` normalised channels. They are None if
    the checkpoint does not store them; such a VAE supports raw latents only.
    """

    channels: int  #: of raw latents
    factor: int  #: pixels for each raw latent, along each side of the image
    multiply: tuple[float, ...] | None
    add: tuple[float, ...] | None
    patch: int = 1  #: side of the squares of raw latents that become channels
    posterior: bool = True  #: whether the encoder returns mean and logvar; else it returns the latents

    def __post_init__(self) -> None:
        if (self.multiply is None) != (self.add is None):
            raise ConfigError("a latent space has both multiply and add, or neither")
        for name, values in (("multiply", self.multiply), ("add", self.add)):
            if values is not None and len(values) != self.normalised_channels:
                raise ConfigError(
                    f"{name} has {len(values)} numbers, and there are {self.normalised_channels} channels"
                )

    @classmethod
    def scaled(
        cls,
        channels: int,
        factor: int,
        scaling_factor: float | None,
        shift_factor: float | None = None,
        means: Sequence[float] | None = None,
        deviations: Sequence[float] | None = None,
    ) -> LatentSpace:
        """Return the latent space of an AutoencoderKL, from the fields of its config.

        normalised = (raw - shift_factor) * scaling_factor. With means and deviations (Playground 2.5), each channel has
        its own constants: (raw - mean) * scaling_factor / deviation. An unknown scaling_factor is None.
        """
        if scaling_factor is None:
            return cls(channels, factor, None, None)
        if means is not None and deviations is not None:
            multiply = tuple(scaling_factor / deviation for deviation in deviations)
            return cls(channels, factor, multiply, tuple(means))
        return cls(channels, factor, (scaling_factor,) * channels, (shift_factor or 0.0,) * channels)

    @property
    def normalised_channels(self) -> int:
        """Number of channels of normalised latents."""
        return self.channels * self.patch**2

    @property
    def normalised_factor(self) -> int:
        """Pixels for each normalised latent, along each side of the image."""
        return self.factor * self.patch

    @property
    def encoder_channels(self) -> int:
        """Number of output channels of the encoder."""
        return 2 * self.channels if self.posterior else self.channels

    @property
    def as_normalised(self) -> LatentSpace:
        """The latent space of graphs that take and give normalised latents: these need no further conversion."""
        count = self.normalised_channels
        return LatentSpace(count, self.normalised_factor, (1.0,) * count, (0.0,) * count, posterior=False)

    @property
    def is_known(self) -> bool:
        """Whether the normalisation is known."""
        return self.multiply is not None

    @property
    def affine(self) -> dict[str, list[float]] | None:
        """`multiply` and `add` as the contract of a dataset stores them; None if they are unknown."""
        if self.multiply is None or self.add is None:
            return None
        return {"multiply": list(self.multiply), "add": list(self.add)}

    def check_known(self) -> None:
        """Raise `ConfigError` if the normalisation is unknown."""
        if not self.is_known:
            raise ConfigError(UNKNOWN)

    def normalise(self, raw: Any) -> Any:
        """Convert raw latents [B, C, h, w] to normalised latents [B, C * patch**2, h / patch, w / patch].

        Accepts NumPy, torch and JAX arrays and returns the same kind and dtype. Raises `ConfigError` if the
        normalisation is unknown, `ShapeError` if h or w is not a multiple of `patch`.
        """
        multiply, add = self._affine_like(raw)
        return (self._patchify(raw) - add) * multiply

    def denormalise(self, normalised: Any) -> Any:
        """Convert normalised latents to raw latents: the inverse of `normalise`."""
        multiply, add = self._affine_like(normalised)
        return self._unpatchify(normalised / multiply + add)

    def raw_noise(self, rng: np.random.Generator, batch: int, height: int, width: int) -> npt.NDArray[Any]:
        """Draw raw latents, float64 [batch, C, height, width], whose normalised form has unit variance.

        If the normalisation is unknown, the raw latents have unit variance.
        """
        noise = rng.standard_normal((batch, self.channels, height, width))
        if not self.is_known:
            return noise
        # Each raw channel maps to patch**2 normalised channels: use the mean of their constants.
        multiply, add = (np.reshape(values, (1, self.channels, -1)).mean(2)[..., None, None] for values in self._pair())
        return np.asarray(noise / multiply + add)

    def to_dict(self) -> dict[str, Any]:
        """Return the dictionary that a manifest stores."""
        return {
            "channels": self.channels,
            "factor": self.factor,
            "patch": self.patch,
            "encoder_gives": "posterior" if self.posterior else "latents",
            "multiply": None if self.multiply is None else list(self.multiply),
            "add": None if self.add is None else list(self.add),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LatentSpace:
        """Parse the result of `to_dict`; raises `ConfigError` for anything else."""
        if set(data) != {"channels", "factor", "patch", "encoder_gives", "multiply", "add"}:
            raise ConfigError(f"the latent space has the wrong fields: {', '.join(sorted(map(repr, data)))}")
        for name in ("channels", "factor", "patch"):
            value = data[name]
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 65536:
                raise ConfigError(f"{name} of the latent space is {value!r}, not a whole number from 1 to 65536")
        for name in ("multiply", "add"):
            value = data[name]
            if value is not None and not (isinstance(value, list) and all(_is_number(number) for number in value)):
                raise ConfigError(f"{name} of the latent space is not a list of numbers")
        if data["multiply"] is not None and 0 in data["multiply"]:
            raise ConfigError("multiply of the latent space has a 0, which cannot be undone")
        if data["encoder_gives"] not in ("posterior", "latents"):
            raise ConfigError(f"encoder_gives is {data['encoder_gives']!r}; known are posterior and latents")
        return cls(
            channels=data["channels"],
            factor=data["factor"],
            patch=data["patch"],
            posterior=data["encoder_gives"] == "posterior",
            multiply=None if data["multiply"] is None else tuple(data["multiply"]),
            add=None if data["add"] is None else tuple(data["add"]),
        )

    # The arithmetic -------------------------------------------------------------------------------------------------

    def _pair(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        self.check_known()
        assert self.multiply is not None and self.add is not None
        return self.multiply, self.add

    @cached_property
    def _affine(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        multiply, add = (np.asarray(values, np.float32).reshape(1, -1, 1, 1) for values in self._pair())
        return multiply, add

    def _affine_like(self, latents: Any) -> tuple[Any, Any]:
        multiply, add = self._affine
        xp = array_module(latents)
        if xp is np:
            return multiply, add
        if hasattr(xp, "from_numpy"):
            return tuple(xp.from_numpy(part).to(device=latents.device, dtype=latents.dtype) for part in (multiply, add))
        return xp.asarray(multiply, latents.dtype), xp.asarray(add, latents.dtype)

    def _patchify(self, raw: Any) -> Any:
        """Convert [B, C, h, w] to [B, C * p * p, h / p, w / p]; a channel's index is c * p * p + row * p + column."""
        if self.patch == 1:
            return raw
        batch, channels, height, width = raw.shape
        for name, side in (("height", height), ("width", width)):
            if side % self.patch:
                raise ShapeError(
                    f"{name} of {side} latents is not a multiple of {self.patch}: images for normalised latents have "
                    f"sides that are multiples of {self.normalised_factor} pixels"
                )
        rows, columns = height // self.patch, width // self.patch
        squares = raw.reshape(batch, channels, rows, self.patch, columns, self.patch)
        return array_module(raw).moveaxis(squares, (3, 5), (2, 3)).reshape(batch, -1, rows, columns)

    def _unpatchify(self, normalised: Any) -> Any:
        if self.patch == 1:
            return normalised
        batch, _, rows, columns = normalised.shape
        squares = normalised.reshape(batch, self.channels, self.patch, self.patch, rows, columns)
        moved = array_module(normalised).moveaxis(squares, (2, 3), (3, 5))
        return moved.reshape(batch, self.channels, rows * self.patch, columns * self.patch)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30
