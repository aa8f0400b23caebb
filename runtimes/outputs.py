"""Result classes of encode and decode, named as in diffusers, for arrays of any kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class AutoencoderKLOutput:
    """Result of encode: `latent_dist` is the posterior over latents [B, C, H/f, W/f]."""

    latent_dist: Any

    def __getitem__(self, index: int) -> Any:
        return (self.latent_dist,)[index]


@dataclass
class AutoencoderTinyOutput:
    """Result of encode for a family without a posterior: `latents` [B, C, H/f, W/f]."""

    latents: Any

    def __getitem__(self, index: int) -> Any:
        return (self.latents,)[index]


@dataclass
class DecoderOutput:
    """Result of decode: `sample` holds images [B, 3, f*h, f*w], nominally in [-1, 1] and not clipped."""

    sample: Any
    commit_loss: Any = None

    def __getitem__(self, index: int) -> Any:
        return (self.sample,)[index]
