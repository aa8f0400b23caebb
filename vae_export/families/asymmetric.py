"""The reference `AsymmetricAutoencoderKL`: an AutoencoderKL whose decoder has widths and layers of its own.

It was made for inpainting with Stable Diffusion 1.5 (Zhu et al., arXiv:2306.04632), where its decoder can take the
masked image as well. Encoding and decoding without a mask, which is what a pipeline of diffusers does with it, are
supported; the weights for a mask are kept, so that `save_pretrained` writes them again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from runtimes.config import (
    ACTIVATIONS,
    DOWN_BLOCK_TYPES,
    UP_BLOCK_TYPES,
    ConfigFile,
    check_factors,
    check_layers,
    check_levels,
    check_sizes,
    require,
)
from runtimes.errors import ConfigError
from runtimes.latent_space import LatentSpace
from runtimes.outputs import DecoderOutput
from vae_export.checkpoints.architecture import PublicVae, infer_architecture, layers_of, widths_of
from vae_export.checkpoints.keys import select_vae_keys, to_diffusers_names
from vae_export.families import autoencoder_kl
from vae_export.families.autoencoder_kl import KLNetwork

CONDITION_STRIDE = 16  #: of the encoder of masked images, in pixels, whatever the model's own factor


@dataclass(frozen=True)
class AsymmetricConfig(ConfigFile):
    """The config of an `AsymmetricAutoencoderKL`, with diffusers' defaults.

    Raises `ConfigError` on construction for a value that no `AsymmetricAutoencoderKL` can have.
    """

    class_names = ("AsymmetricAutoencoderKL",)
    # What every model of this family has, and an AutoencoderKL says in its config.
    use_quant_conv: ClassVar[bool] = True
    use_post_quant_conv: ClassVar[bool] = True
    mid_block_add_attention: ClassVar[bool] = True

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    down_block_out_channels: tuple[int, ...] = (64,)
    layers_per_down_block: int = 1
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    up_block_out_channels: tuple[int, ...] = (64,)
    layers_per_up_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float | None = 0.18215

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, origin: str = "config", strict: bool = False) -> Any:
        """Read a diffusers config, which has two more fields: the decoder's widths again, and force_upcast."""
        if isinstance(data, Mapping):
            more = ("block_out_channels", "force_upcast")
            data = {name: value for name, value in data.items() if name not in more}
        return super().from_dict(data, origin=origin, strict=strict)

    def _check(self) -> None:
        check_sizes(self, "in_channels", "out_channels", "latent_channels", "norm_num_groups", "sample_size")
        check_layers(self, "layers_per_down_block", "layers_per_up_block")
        check_levels(self, "down_block_out_channels", down_block_types=DOWN_BLOCK_TYPES)
        check_levels(self, "up_block_out_channels", up_block_types=UP_BLOCK_TYPES)
        fits = len(self.up_block_out_channels) == len(self.down_block_out_channels)
        require(self, "up_block_out_channels", fits, "must have as many levels as down_block_out_channels")
        require(self, "act_fn", self.act_fn in ACTIVATIONS, f"known activations are {', '.join(ACTIVATIONS)}")
        check_factors(self)

    @property
    def downscale(self) -> int:
        """Pixels for each latent, along each side of an image."""
        return int(2 ** (len(self.down_block_out_channels) - 1))

    @property
    def latent_space(self) -> LatentSpace:
        """The relation between raw latents and the latents of a diffusion model: that of Stable Diffusion 1.5."""
        return LatentSpace.scaled(self.latent_channels, self.downscale, self.scaling_factor)

    # The names under which the network of AutoencoderKL asks for them ------------------------------------------------

    @property
    def block_out_channels(self) -> tuple[int, ...]:
        """Channels of the encoder's levels, the one of the image's size first."""
        return self.down_block_out_channels

    @property
    def layers_per_block(self) -> int:
        """Number of resnets of each of the encoder's levels."""
        return self.layers_per_down_block

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Channels of the decoder's levels, the one of the image's size first."""
        return self.up_block_out_channels

    @property
    def decoder_layers(self) -> int:
        """Number of resnets of each of the decoder's levels."""
        return self.layers_per_up_block + 1


class ConditionEncoder(nn.Module):
    """The weights of the encoder of masked images, which graphs without a mask do not use."""

    def __init__(self, in_channels: int, narrowest: int, widest: int) -> None:
        super().__init__()
        widths, width, stride = [], narrowest, CONDITION_STRIDE
        while stride > 1:
            stride, doubled = stride // 2, 2 * width
            width = min(width, widest)
            widths.append(width)
            last = widest if stride == 1 else doubled
            width *= 2
        widths.append(last)
        layers = []
        for index, (inside, outside) in enumerate(zip([in_channels, *widths[:-1]], widths, strict=True)):
            kernel, stride = (3, 1) if index < 2 else (4, 2)
            layers.append(nn.Conv2d(inside, outside, kernel, stride=stride, padding=1))
        self.layers = nn.Sequential(*layers)


class AsymmetricAutoencoderKL(KLNetwork):
    """The VAE: images in [-1, 1] to a posterior over raw latents, and raw latents back to images."""

    family = "AsymmetricAutoencoderKL"
    config_class = AsymmetricConfig
    config: AsymmetricConfig

    def __init__(self, config: AsymmetricConfig | None = None, **config_fields: Any) -> None:
        super().__init__(config, **config_fields)
        widths = self.config.up_block_out_channels
        self.decoder.condition_encoder = ConditionEncoder(self.config.out_channels, widths[0], widths[-1])

    def decode(
        self,
        z: Tensor,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
        *,
        image: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Raw latents [B, latent_channels, h, w] -> images [B, out_channels, f*h, f*w], not clipped.

        Raises `ConfigError` for an image or a mask, which this toolkit does not support.
        """
        if image is not None or mask is not None:
            raise ConfigError(
                "decoding with an image and a mask is not supported: decode without them, and put the masked part of "
                "the result into the image"
            )
        return super().decode(z, return_dict, generator)


# Single files ---------------------------------------------------------------------------------------------------------

_CONDITION = re.compile(r"decoder\.condition_encoder\.layers\.\d+\.(?:weight|bias)")


def recognises(names: Iterable[str]) -> bool:
    """Whether names of tensors, without prefix, are those of an AsymmetricAutoencoderKL."""
    return any(map(_CONDITION.fullmatch, names))


def tensor_names(keys: Iterable[str]) -> dict[str, str]:
    """{name in diffusers: key in the file} for the tensors of an AsymmetricAutoencoderKL among the keys of a file."""
    selected = select_vae_keys(keys)
    names = to_diffusers_names(selected)
    return {names[bare]: key for bare, key in selected.items()}


def architecture(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The config fields that the shapes of a complete checkpoint (diffusers keys) determine."""
    found = infer_architecture(shapes)
    same = ("in_channels", "out_channels", "latent_channels", "down_block_types", "up_block_types")
    return {name: found[name] for name in same} | {
        "down_block_out_channels": found["block_out_channels"],
        "layers_per_down_block": found["layers_per_block"],
        "up_block_out_channels": widths_of(shapes, "decoder")[::-1],
        "layers_per_up_block": layers_of(shapes, "decoder") - 1,
    }


def complete_config(
    architecture: Mapping[str, Any], *, given: Mapping[str, Any] | None = None, public: PublicVae | None = None
) -> AsymmetricConfig:
    """A config from what the shapes say and what the caller gives, which wins.

    The scaling factor and the norm groups, which shapes cannot tell, must be given.
    """
    known = {name: value for name, value in (given or {}).items() if not name.startswith("_")}
    if "norm_num_groups" not in known:
        raise ConfigError(
            "the file does not say norm_num_groups of this AsymmetricAutoencoderKL; give the model's config.json with "
            "config= (--config)"
        )
    fields = {"_class_name": "AsymmetricAutoencoderKL", "scaling_factor": None, **architecture, **known}
    return cast(AsymmetricConfig, AsymmetricConfig.from_dict(fields))


# The rewrites, the stages and the estimates of memory are those of the network of AutoencoderKL.
FAMILY = replace(
    autoencoder_kl.FAMILY,
    network=AsymmetricAutoencoderKL,
    recognises=recognises,
    tensor_names=tensor_names,
    architecture=architecture,
    complete_config=complete_config,
)
