"""The reference `AutoencoderTiny`: TAESD and its kin, small VAEs for previews, of convolutions and ReLU only.

Public ones are taesd (Stable Diffusion), taesdxl, taesd3 and taef1 (FLUX.1). Their encoder returns latents without a
posterior, and these are already the latents of the diffusion model: there is no scaling factor to apply. Each is a
distilled copy of the large VAE of its diffusion model (madebyollin, https://github.com/madebyollin/taesd).

The network has a further part for `vae_export.families.taef2`, which is not in diffusers: blocks with a norm over the
whole image.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from runtimes.config import ACTIVATIONS as ACTIVATION_NAMES
from runtimes.config import ConfigFile, check_factors, check_sizes, is_real, is_size, require
from runtimes.errors import ConfigError
from runtimes.latent_space import LatentSpace
from runtimes.names import Graph
from vae_export.checkpoints.architecture import PublicVae
from vae_export.checkpoints.keys import select_vae_keys
from vae_export.families.autoencoder_kl import ACTIVATIONS, Upsample
from vae_export.families.base import Family, ReferenceVae
from vae_export.rewrites.form import Form

POOL_WIDTH, POOL_GROUPS = 4, 4  #: of a pooled block: channels of its norm for each of its own, and groups of the norm


@dataclass(frozen=True)
class TinyConfig(ConfigFile):
    """The config of an `AutoencoderTiny`, with diffusers' defaults.

    `num_encoder_blocks` and `num_decoder_blocks` list the blocks of each stage, in the order of the computation.
    `latent_magnitude` and `latent_shift` tell how latents are stored as bytes; the network does not use them.

    Raises `ConfigError` on construction for a value that no `AutoencoderTiny` can have.
    """

    class_names = ("AutoencoderTiny",)
    pooled: ClassVar[bool] = False  #: whether the blocks at the size of the latents have a norm over the whole image

    in_channels: int = 3
    out_channels: int = 3
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    act_fn: str = "relu"
    upsample_fn: str = "nearest"
    latent_channels: int = 4
    upsampling_scaling_factor: int = 2
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    latent_magnitude: float = 3
    latent_shift: float = 0.5
    force_upcast: bool = False
    scaling_factor: float = 1.0
    shift_factor: float = 0.0

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, origin: str = "config", strict: bool = False) -> Any:
        """Read a diffusers config, which repeats the decoder's widths as `block_out_channels`."""
        if isinstance(data, Mapping):
            data = {name: value for name, value in data.items() if name != "block_out_channels"}
        return super().from_dict(data, origin=origin, strict=strict)

    def _check(self) -> None:
        check_sizes(self, "in_channels", "out_channels", "latent_channels", "upsampling_scaling_factor")
        for side in ("encoder", "decoder"):
            widths, blocks = f"{side}_block_out_channels", f"num_{side}_blocks"
            for name in (widths, blocks):
                values = getattr(self, name)
                fits = isinstance(values, tuple) and 0 < len(values) <= 16 and all(is_size(value) for value in values)
                require(self, name, fits, "must be a list of 1 to 16 positive integers")
            require(self, widths, len(set(getattr(self, widths))) == 1, "all stages must have the same width")
            fits = len(getattr(self, blocks)) == len(getattr(self, widths))
            require(self, blocks, fits, f"must have as many entries as {widths}")
        require(self, "act_fn", self.act_fn in ACTIVATION_NAMES, f"known are {', '.join(ACTIVATION_NAMES)}")
        require(self, "upsample_fn", self.upsample_fn == "nearest", "only nearest is supported")
        require(self, "scaling_factor", self.scaling_factor is not None, "must be a number")
        check_factors(self)
        for name in ("latent_magnitude", "latent_shift"):
            require(self, name, is_real(getattr(self, name)), "must be a finite number")
        grown = self.upsampling_scaling_factor ** (len(self.num_decoder_blocks) - 1)
        rule = f"the encoder divides the sides of an image by {self.downscale}, and the decoder multiplies by {grown}"
        require(self, "upsampling_scaling_factor", grown == self.downscale, rule)

    @property
    def sample_size(self) -> int:
        """Side in pixels of a tile, where tiling is enabled and nothing else is said: diffusers' value."""
        return 512

    @property
    def downscale(self) -> int:
        """Pixels for each latent, along each side of an image: 8 for TAESD."""
        return int(2 ** (len(self.num_encoder_blocks) - 1))

    @property
    def latent_space(self) -> LatentSpace:
        """The latents are those of the diffusion model: scaling 1 and shift 0 in every public config."""
        space = LatentSpace.scaled(self.latent_channels, self.downscale, self.scaling_factor, self.shift_factor)
        return LatentSpace(space.channels, space.factor, space.multiply, space.add, posterior=False)


# The network ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """[B, C, H, W] -> the same: three convolutions, added to the input, and a ReLU whatever the activation between.

    A pooled block first adds a norm over the whole image, between two 1x1 convolutions, to its input.
    """

    def __init__(self, channels: int, act_fn: str, pooled: bool = False) -> None:
        super().__init__()
        activation = ACTIVATIONS[act_fn]
        convs = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convs[0], activation(), convs[1], activation(), convs[2])
        self.fuse = nn.ReLU()
        if pooled:
            inner = POOL_WIDTH * channels
            self.pool = nn.Sequential(
                nn.Conv2d(channels, inner, 1, bias=False),
                nn.GroupNorm(POOL_GROUPS, inner),
                nn.ReLU(),
                nn.Conv2d(inner, channels, 1, bias=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "pool"):
            x = x + self.pool(x)
        return cast(Tensor, self.fuse(self.conv(x) + x))


class Nearest(nn.Module):
    """[B, C, H, W] -> [B, C, factor*H, factor*W], nearest neighbour."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.interpolate(x, scale_factor=float(self.factor), mode="nearest")


class Encoder(nn.Module):
    """Images [B, in_channels, H, W] in [-1, 1] -> latents [B, latent_channels, H/f, W/f]."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        stages = list(zip(config.encoder_block_out_channels, config.num_encoder_blocks, strict=True))
        for stage, (width, blocks) in enumerate(stages):
            if stage == 0:
                layers.append(nn.Conv2d(config.in_channels, width, 3, padding=1))
            else:
                layers.append(nn.Conv2d(width, width, 3, padding=1, stride=2, bias=False))
            pooled = config.pooled and stage == len(stages) - 1
            layers += [Block(width, config.act_fn, pooled) for _ in range(blocks)]
        layers.append(nn.Conv2d(config.encoder_block_out_channels[-1], config.latent_channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.layers((x + 1) / 2))


class Decoder(nn.Module):
    """Latents [B, latent_channels, h, w], softly limited to [-3, 3] -> images [B, out_channels, f*h, f*w]."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        widths, activation = config.decoder_block_out_channels, ACTIVATIONS[config.act_fn]
        layers: list[nn.Module] = [nn.Conv2d(config.latent_channels, widths[0], 3, padding=1), activation()]
        for stage, (width, blocks) in enumerate(zip(widths, config.num_decoder_blocks, strict=True)):
            layers += [Block(width, config.act_fn, config.pooled and stage == 0) for _ in range(blocks)]
            if stage < len(widths) - 1:
                layers += [Nearest(config.upsampling_scaling_factor), nn.Conv2d(width, width, 3, padding=1, bias=False)]
            else:
                layers.append(nn.Conv2d(width, config.out_channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        return cast(Tensor, self.layers(3 * torch.tanh(z / 3))) * 2 - 1


class AutoencoderTiny(ReferenceVae):
    """The VAE: images in [-1, 1] to latents of the diffusion model, and those back to images, not clipped.

    Build one from a `TinyConfig` or from its fields (random weights), or load one with `from_pretrained` or
    `from_single_file` (fp32, eval mode). Tiling and slicing: see `TilingSettings`.
    """

    family = "AutoencoderTiny"
    config_class: ClassVar[type[TinyConfig]] = TinyConfig
    config: TinyConfig

    def __init__(self, config: TinyConfig | None = None, **config_fields: Any) -> None:
        if config is not None and config_fields:
            raise ConfigError(f"give a {self.config_class.__name__} or its fields, not both")
        super().__init__(self.config_class(**config_fields) if config is None else config)
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def encode_moments(self, x: Tensor) -> Tensor:
        """Images [B, in_channels, H, W] in [-1, 1] -> latents [B, latent_channels, H/f, W/f]."""
        return cast(Tensor, self.encoder(x))

    def decode_latents(self, z: Tensor) -> Tensor:
        """Latents [B, latent_channels, h, w] -> images [B, out_channels, f*h, f*w], not clipped."""
        return cast(Tensor, self.decoder(z))


# What rewrites and estimates ask of the family ------------------------------------------------------------------------


def halo(model: AutoencoderTiny, graph: Graph) -> int | None:
    """How far in latents the result at a place depends on the input around it; None where on the whole image.

    Walking back from the result, each 3x3 convolution reads one pixel more on each side, a strided one twice as many
    and one more, and an upsampling by n an nth.
    """
    config = model.config
    if config.pooled:
        return None
    reach = 0
    for layer in reversed(list(cast(Any, model.encoder if graph == "encoder" else model.decoder).layers)):
        if isinstance(layer, Block):
            reach += 3
        elif isinstance(layer, nn.Conv2d):
            reach = reach * 2 + 1 if layer.stride == (2, 2) else reach + 1
        elif isinstance(layer, Nearest):
            reach = -(-reach // layer.factor)
    return -(-reach // config.downscale) if graph == "encoder" else reach


def fold_upsampling(model: AutoencoderTiny) -> AutoencoderTiny:
    """Turn each upsampling x2 and the convolution behind it into one `Upsample`, in place, which rewrites know."""
    layers = cast(Any, model.decoder).layers
    for index, layer in enumerate(layers):
        if isinstance(layer, Nearest) and layer.factor == 2:
            conv = layers[index + 1]
            upsample = Upsample(conv.in_channels)
            upsample.conv = conv
            layers[index], layers[index + 1] = upsample, nn.Identity()
    return model


def activation_places(
    config: TinyConfig, graph: Graph, batch: int, height: int, width: int, form: Form
) -> Iterator[int]:
    """Elements of activations that are alive, stage by stage, on images of this size in pixels.

    In a block these are its input and two maps; around a change of resolution, both sides of it.
    """
    channels = (config.encoder_block_out_channels if graph == "encoder" else config.decoder_block_out_channels)[0]
    for stage in range(len(config.num_encoder_blocks)):
        pixels = batch * (height >> stage) * (width >> stage)
        yield 3 * channels * pixels
        yield channels * (pixels + pixels // 4 * (2 if graph == "encoder" or form.upsample == "deconv" else 5))
    if config.pooled:
        yield (2 * POOL_WIDTH + 2) * channels * batch * (height // config.downscale) * (width // config.downscale)


# Single files ---------------------------------------------------------------------------------------------------------

_ORIGINAL = re.compile(r"(encoder|decoder)\.(\d+)\.((?:conv\.\d+\.|skip\.|pool\.\d+\.)?(?:weight|bias))")
_NAME = re.compile(r"(?:encoder|decoder)\.layers\.\d+\.(?:conv\.\d+\.|skip\.|pool\.\d+\.)?(?:weight|bias)")
POOL = re.compile(r"(?:encoder|decoder)\.(?:layers\.)?\d+\.pool\..*")


def recognises(names: Iterable[str]) -> bool:
    """Whether names of tensors, without prefix, are those of an AutoencoderTiny in diffusers' or TAESD's format."""
    names = list(names)
    return any(map(_is_tiny, names)) and not any(map(POOL.fullmatch, names))


def _is_tiny(name: str) -> bool:
    return bool(_NAME.fullmatch(name) or _ORIGINAL.fullmatch(name))


def tensor_names(keys: Iterable[str]) -> dict[str, str]:
    """{name in diffusers: key in the file} for the tensors of an AutoencoderTiny among the keys of a file.

    In the original format the decoder begins with a clamp, which diffusers does not count among the layers.
    """
    selected = select_vae_keys(keys)
    if not any(map(_is_tiny, selected)):
        raise ConfigError(
            "it is another VAE: no tensor is named as those of an AutoencoderTiny (encoder.layers.0.weight); the first "
            f"is {next(iter(selected), None)!r}"
        )

    def renamed(name: str) -> str:
        match = _ORIGINAL.fullmatch(name)
        if match is None:
            return name
        side, layer, rest = match.groups()
        return f"{side}.layers.{int(layer) - (side == 'decoder')}.{rest}"

    return {renamed(name): key for name, key in selected.items()}


def architecture(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The config fields that the shapes of a complete checkpoint (diffusers keys) determine."""
    encoder_widths, encoder_blocks, first, latent = _stages(shapes, "encoder")
    decoder_widths, decoder_blocks, _, last = _stages(shapes, "decoder")
    return {
        "in_channels": first,
        "out_channels": last,
        "latent_channels": latent,
        "encoder_block_out_channels": encoder_widths,
        "decoder_block_out_channels": decoder_widths,
        "num_encoder_blocks": encoder_blocks,
        "num_decoder_blocks": decoder_blocks,
    }


def _stages(shapes: Mapping[str, tuple[int, ...]], side: Graph) -> tuple[tuple[int, ...], tuple[int, ...], int, int]:
    """Widths and numbers of blocks of the stages, and channels of the input and of the result."""
    prefix = f"{side}.layers."
    layers = sorted({int(name.removeprefix(prefix).partition(".")[0]) for name in shapes if name.startswith(prefix)})
    convs = [shapes[name] for layer in layers if (name := f"{prefix}{layer}.weight") in shapes]
    if len(convs) < 2 or any(len(shape) != 4 for shape in convs):
        raise ConfigError(f"not an AutoencoderTiny: the {side} has no convolutions at its start and end")
    widths: list[int] = []
    blocks: list[int] = []
    for layer in layers[:-1]:  # the last is a convolution that ends a stage
        conv = shapes.get(f"{prefix}{layer}.weight")
        if conv is not None:
            widths.append(conv[0])
            blocks.append(0)
        else:
            blocks[-1] += 1
    return tuple(widths), tuple(blocks), convs[0][1], convs[-1][0]


def complete_config(
    architecture: Mapping[str, Any], *, given: Mapping[str, Any] | None = None, public: PublicVae | None = None
) -> TinyConfig:
    """A config from what the shapes say and what the caller gives, which wins.

    What shapes cannot tell (activation, upsampling, scaling) is the same for all public TAESDs: diffusers' defaults.
    """
    return completed(TinyConfig, architecture, given)


def completed(kind: type[TinyConfig], architecture: Mapping[str, Any], given: Mapping[str, Any] | None) -> TinyConfig:
    """A config of this class from fields without those that begin with an underscore; `given` wins."""
    known = {field: value for field, value in (given or {}).items() if not field.startswith("_")}
    return cast(TinyConfig, kind.from_dict({"_class_name": kind.class_names[0], **architecture, **known}))


FAMILY = Family(
    network=AutoencoderTiny,
    rewrites=frozenset({"upsample"}),
    recognises=recognises,
    tensor_names=tensor_names,
    architecture=architecture,
    complete_config=complete_config,
    prepared=fold_upsampling,
    halo=halo,
    activation_places=activation_places,
)
