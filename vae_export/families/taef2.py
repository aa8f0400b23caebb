"""`TAEF2`, the VAE for previews of FLUX.2: an AutoencoderTiny on FLUX.2's normalised latents.

Its blocks at the size of the latents add a norm over the whole image to their input. diffusers does not load it; the
network is that of taesd.py in https://github.com/madebyollin/taesd (2025-12).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from runtimes.config import check_sizes
from runtimes.latent_space import LatentSpace
from vae_export.checkpoints.architecture import PublicVae
from vae_export.families import tiny
from vae_export.families.tiny import POOL, AutoencoderTiny, TinyConfig, completed


@dataclass(frozen=True)
class Taef2Config(TinyConfig):
    """The config of `TAEF2`, of which there is one public model: an `AutoencoderTiny` with pooled blocks."""

    class_names = ("TAEF2",)
    pooled = True
    latent_channels: int = 32
    patch_size: int = 2

    def _check(self) -> None:
        super()._check()
        check_sizes(self, "patch_size")

    @property
    def latent_space(self) -> LatentSpace:
        """FLUX.2's normalised latents: squares of 2x2 positions become the channels of the diffusion model.

        The normalisation itself has been applied: TAEF2 was trained on normalised latents.
        """
        count = self.latent_channels * self.patch_size**2
        zeros, ones = (0.0,) * count, (1.0,) * count
        return LatentSpace(self.latent_channels, self.downscale, ones, zeros, self.patch_size, posterior=False)


class TAEF2(AutoencoderTiny):
    """FLUX.2's VAE for previews: an `AutoencoderTiny` on normalised latents, with pooled blocks."""

    family = "TAEF2"
    config_class = Taef2Config


def recognises(names: Iterable[str]) -> bool:
    """Whether names of tensors, without prefix, are those of TAEF2."""
    return any(map(POOL.fullmatch, names))


def complete_config(
    architecture: Mapping[str, Any], *, given: Mapping[str, Any] | None = None, public: PublicVae | None = None
) -> TinyConfig:
    """A config from what the shapes say and what the caller gives, which wins."""
    return completed(Taef2Config, architecture, given)


# Its norms see the whole image: no halo is enough.
FAMILY = replace(tiny.FAMILY, network=TAEF2, recognises=recognises, complete_config=complete_config, halo=None)
