"""The reference `AutoencoderKLFlux2`, the image VAE of FLUX.2, ERNIE-Image and Ideogram 4.

Its network is that of AutoencoderKL, with decoder widths of its own. `encode` and `decode` work on raw latents
[B, 32, h, w]. A diffusion model takes normalised ones, [B, 128, h/2, w/2]: squares of 2x2 positions become channels,
and each of these channels is normalised with a mean and a variance that are stored in the weights (`bn.running_mean`,
`bn.running_var`). The class never applies them; in diffusers the pipeline does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from runtimes.config import UP_BLOCK_TYPES, ConfigFile, check_levels, check_network, is_real, is_size, require
from runtimes.errors import ConfigError, NumericsError
from runtimes.latent_space import LatentSpace
from vae_export.checkpoints.architecture import PublicVae, infer_architecture, widths_of
from vae_export.checkpoints.keys import select_vae_keys, to_diffusers_names
from vae_export.families import autoencoder_kl
from vae_export.families.autoencoder_kl import KLNetwork

LEVELS = 4
#: encoder and decoder widths of the public VAEs, all with 2 layers a block, 32 norm groups and an eps of 1e-4
PUBLIC_WIDTHS = (((128, 256, 512, 512), None), ((128, 256, 512, 512), (96, 192, 384, 384)))
PUBLIC_LAYERS = 2

MEAN, VARIANCE, COUNT = "bn.running_mean", "bn.running_var", "bn.num_batches_tracked"


@dataclass(frozen=True)
class Flux2Config(ConfigFile):
    """The config of an `AutoencoderKLFlux2`, with diffusers' defaults.

    There is neither scaling nor shift: the statistics of the latents are in the weights. `decoder_block_out_channels`
    is None where the decoder is as wide as the encoder.

    Raises `ConfigError` on construction for a value that no `AutoencoderKLFlux2` can have.
    """

    class_names = ("AutoencoderKLFlux2",)

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * LEVELS
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",) * LEVELS
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_block_out_channels: tuple[int, ...] | None = None
    layers_per_block: int = 2
    act_fn: str = "silu"
    latent_channels: int = 32
    norm_num_groups: int = 32
    sample_size: int = 1024
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    batch_norm_eps: float = 1e-4
    batch_norm_momentum: float = 0.1
    patch_size: tuple[int, int] = (2, 2)

    def _check(self) -> None:
        check_network(self)
        if self.decoder_block_out_channels is not None:
            check_levels(self, "decoder_block_out_channels", up_block_types=UP_BLOCK_TYPES)
            fits = len(self.decoder_block_out_channels) == len(self.block_out_channels)
            require(self, "decoder_block_out_channels", fits, "must have as many levels as block_out_channels")
        fits = is_real(self.batch_norm_eps) and self.batch_norm_eps > 0
        require(self, "batch_norm_eps", fits, "must be a positive finite number")
        momentum = self.batch_norm_momentum
        require(self, "batch_norm_momentum", momentum is None or is_real(momentum), "must be a finite number")
        patch = self.patch_size
        fits = isinstance(patch, tuple) and len(patch) == 2 and all(is_size(side) for side in patch)
        require(self, "patch_size", fits, "must be two positive integers")
        require(self, "patch_size", patch[0] == patch[1] <= 64, "only squares of at most 64x64 positions are supported")

    @property
    def downscale(self) -> int:
        """Pixels for each raw latent, along each side of an image: 8 for FLUX.2."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Channels of the decoder's levels, the one of the image's size first."""
        return self.decoder_block_out_channels or self.block_out_channels

    @property
    def decoder_layers(self) -> int:
        """Number of resnets of each of the decoder's levels."""
        return self.layers_per_block + 1

    @property
    def normalised_channels(self) -> int:
        """Number of channels of normalised latents: 128 for FLUX.2."""
        return self.latent_channels * math.prod(self.patch_size)


class AutoencoderKLFlux2(KLNetwork):
    """The VAE: images in [-1, 1] to a posterior over raw latents [B, 32, H/8, W/8], and raw latents back to images.

    `latent_space` converts raw latents to those of the diffusion model, [B, 128, H/16, W/16].
    """

    family = "AutoencoderKLFlux2"
    config_class = Flux2Config
    config: Flux2Config

    def __init__(self, config: Flux2Config | None = None, **config_fields: Any) -> None:
        super().__init__(config, **config_fields)
        config = self.config
        eps, momentum = config.batch_norm_eps, config.batch_norm_momentum
        self.bn = nn.BatchNorm2d(config.normalised_channels, eps=eps, momentum=momentum, affine=False)

    @property
    def latent_space(self) -> LatentSpace:
        """Shape and normalisation of the latents; the constants are computed in fp64 from the weights."""
        config = self.config
        mean, variance = cast(Tensor, self.bn.running_mean).double(), cast(Tensor, self.bn.running_var).double()
        multiply = (variance + config.batch_norm_eps).rsqrt()
        return LatentSpace(
            config.latent_channels,
            config.downscale,
            tuple(multiply.tolist()),
            tuple(mean.tolist()),
            patch=config.patch_size[0],
        )


# Single files ---------------------------------------------------------------------------------------------------------

# The original files have each of these convolutions inside the part that it belongs to.
_MOVED = re.compile(r"(?:encoder\.(quant_conv)|decoder\.(post_quant_conv))\.(weight|bias)")


def recognises(names: Iterable[str]) -> bool:
    """Whether names of tensors, without prefix, are those of a FLUX.2 VAE in diffusers' or the original format."""
    return any(name == MEAN or _MOVED.fullmatch(name) for name in names)


def tensor_names(keys: Iterable[str]) -> dict[str, str]:
    """{name in diffusers: key in the file} for the tensors of an AutoencoderKLFlux2 among the keys of a file."""
    selected = select_vae_keys(keys)
    names = to_diffusers_names(selected)
    return {_MOVED.sub(r"\1\2.\3", names[bare]): key for bare, key in selected.items()}


def architecture(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The config fields that the shapes of a complete checkpoint (diffusers keys) determine."""
    fields = infer_architecture(shapes)
    decoder = widths_of(shapes, "decoder")[::-1]
    return fields | {"decoder_block_out_channels": None if decoder == fields["block_out_channels"] else decoder}


def complete_config(
    architecture: Mapping[str, Any], *, given: Mapping[str, Any] | None = None, public: PublicVae | None = None
) -> Flux2Config:
    """A config from what the shapes say and what the caller gives, which wins.

    The number of norm groups and the eps of the statistics, which shapes cannot tell, are known for public VAEs only.
    """
    given = {name: value for name, value in (given or {}).items() if not name.startswith("_")}
    widths = architecture["block_out_channels"], architecture["decoder_block_out_channels"]
    missing = [name for name in ("norm_num_groups", "batch_norm_eps") if name not in given]
    if missing and (widths not in PUBLIC_WIDTHS or architecture["layers_per_block"] != PUBLIC_LAYERS):
        raise ConfigError(
            f"the file does not say {' and '.join(missing)}, and encoder widths {list(widths[0])} with decoder widths "
            f"{list(widths[1] or widths[0])} are of no public FLUX.2 VAE, whose values would be known; give the "
            "model's config.json with config= (--config)"
        )
    return Flux2Config.from_dict({"_class_name": "AutoencoderKLFlux2", **architecture, **given})


def checked_tensors(tensors: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint, with the count of batches that nobody reads where it is missing.

    Raises `ConfigError` where the statistics of the latents are missing, `NumericsError` where they are impossible.
    """
    missing = [name for name in (MEAN, VARIANCE) if name not in tensors]
    if missing:
        raise ConfigError(
            f"{origin} has no {' and no '.join(missing)}: without the statistics of its latents a FLUX.2 VAE cannot "
            "serve a diffusion model. Take the file from which this one was made, or copy the tensors from it"
        )
    mean, variance = tensors[MEAN], tensors[VARIANCE]
    if not bool(torch.isfinite(mean).all() and torch.isfinite(variance).all()):
        raise NumericsError(f"{origin}: {MEAN} or {VARIANCE} holds NaN or infinity; the file is damaged")
    if bool((variance < 0).any()):
        raise NumericsError(f"{origin}: {VARIANCE} has {variance.min().item():g}, and a variance is not negative")
    count = tensors.get(COUNT, torch.zeros(()))
    return {**tensors, COUNT: count.reshape(()).to(torch.int64)}


def decoder_fields(model: AutoencoderKLFlux2) -> dict[str, Any]:
    """The statistics of the latents, where OpenVINO GenAI and Optimum look for them."""
    mean, variance = cast(Tensor, model.bn.running_mean), cast(Tensor, model.bn.running_var)
    return {"bn_running_mean_data": mean.tolist(), "bn_running_var_data": variance.tolist()}


# The rewrites, the stages and the estimates of memory are those of the network of AutoencoderKL.
FAMILY = replace(
    autoencoder_kl.FAMILY,
    network=AutoencoderKLFlux2,
    recognises=recognises,
    tensor_names=tensor_names,
    architecture=architecture,
    complete_config=complete_config,
    checked_tensors=checked_tensors,
    decoder_fields=decoder_fields,
)
