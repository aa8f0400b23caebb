"""The reference `AutoencoderKL`, the image VAE of Stable Diffusion, SDXL, SD3, FLUX.1 and their kin.

Module names are those of diffusers, so that its weights load unchanged. In the docstrings B is the batch, C the
channels, H and W height and width, and f = 2 ** (levels - 1) the spatial ratio (8 for Stable Diffusion).

The architecture is that of Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models"
(arXiv:2112.10752), without the adversarial training around it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from runtimes.config import VaeConfig
from runtimes.errors import ConfigError
from runtimes.names import Graph
from vae_export.checkpoints.architecture import complete_config, infer_architecture
from vae_export.checkpoints.keys import tensor_names
from vae_export.families.base import Family, ReferenceVae, Stage
from vae_export.rewrites.form import Form

NORM_EPS = 1e-6
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "mish": nn.Mish,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
}


class ResnetBlock(nn.Module):
    """[B, Cin, H, W] -> [B, Cout, H, W]: two convolutions with norm and activation, added to a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, act_fn: str) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=NORM_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nonlinearity = ACTIVATIONS[act_fn]()
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.nonlinearity(self.norm1(x)))
        h = self.conv2(self.nonlinearity(self.norm2(h)))
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return cast(Tensor, shortcut + h)


class Attention(nn.Module):
    """[B, C, H, W] -> the same shape: self-attention over all positions with one head, added to the input."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])
        # The fused projection is derived from the three above, so it is not in the state dict.
        self.register_buffer("qkv_weight", None, persistent=False)
        self.register_buffer("qkv_bias", None, persistent=False)

    qkv_weight: Tensor | None
    qkv_bias: Tensor | None

    def fuse(self) -> None:
        """Compute q, k and v with one matrix product instead of three."""
        parts = (self.to_q, self.to_k, self.to_v)
        self.qkv_weight = torch.cat([part.weight.detach() for part in parts])
        self.qkv_bias = torch.cat([part.bias.detach() for part in parts])

    def unfuse(self) -> None:
        self.qkv_weight = None
        self.qkv_bias = None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project normalised positions [B, HW, C] to q, k and v, each [B, HW, C]."""
        if self.qkv_weight is None:
            return self.to_q(x), self.to_k(x), self.to_v(x)
        q, k, v = F.linear(x, self.qkv_weight, self.qkv_bias).chunk(3, dim=-1)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return softmax(q k^T / sqrt(C)) v, [B, HW, C]."""
        # The axis of the one head selects PyTorch's fused kernels, which never store all HW x HW scores.
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        positions = self.group_norm(x.view(b, c, h * w)).transpose(1, 2)
        out = self.to_out[0](self.attend(*self.project(positions)))
        # In this order the sum has the attention's channels-last strides, as in diffusers, so that the following
        # convolutions use the same kernels in both.
        return cast(Tensor, out.transpose(1, 2).reshape(b, c, h, w) + x)


class Downsample(nn.Module):
    """[B, C, H, W] -> [B, C, H // 2, W // 2]: zeros on the right and bottom only, then a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv(F.pad(x, (0, 1, 0, 1))))


class Upsample(nn.Module):
    """[B, C, H, W] -> [B, C, 2*H, 2*W]: nearest-neighbour upsampling, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))


class Block(nn.Module):
    """One level: resnets, each followed by attention in the Attn block types, then down- or upsampling."""

    def __init__(
        self, in_channels: int, out_channels: int, layers: int, groups: int, act_fn: str, attention: bool
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (layers - 1)
        self.resnets = nn.ModuleList(ResnetBlock(width, out_channels, groups, act_fn) for width in widths)
        if attention:
            self.attentions = nn.ModuleList(Attention(out_channels, groups) for _ in range(layers))

    @property
    def has_attention(self) -> bool:
        return hasattr(self, "attentions")

    def before_resampling(self, x: Tensor) -> Tensor:
        attentions = self.attentions if self.has_attention else [None] * len(self.resnets)
        for resnet, attention in zip(self.resnets, cast("list[Attention | None]", attentions), strict=True):
            x = resnet(x)
            if attention is not None:
                x = attention(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.before_resampling(x)
        for resample in (*getattr(self, "downsamplers", ()), *getattr(self, "upsamplers", ())):
            x = resample(x)
        return x


class MidBlock(nn.Module):
    """[B, C, h, w] -> the same shape: resnet, attention (if the config enables it), resnet."""

    def __init__(self, channels: int, groups: int, act_fn: str, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups, act_fn) for _ in range(2))
        if attention:
            self.attentions = nn.ModuleList([Attention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in getattr(self, "attentions", ()):
            x = attention(x)
        return cast(Tensor, self.resnets[1](x))


class Encoder(nn.Module):
    """Images [B, in_channels, H, W] -> moments before quant_conv [B, 2 * latent_channels, H // f, W // f]."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        channels, groups, act_fn = config.block_out_channels, config.norm_num_groups, config.act_fn
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        width = channels[0]
        for kind, out in zip(config.down_block_types, channels, strict=True):
            block = Block(width, out, config.layers_per_block, groups, act_fn, kind.startswith("Attn"))
            if len(self.down_blocks) < len(channels) - 1:
                block.downsamplers = nn.ModuleList([Downsample(out)])
            self.down_blocks.append(block)
            width = out
        self.mid_block = MidBlock(width, groups, act_fn, config.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, width, eps=NORM_EPS)
        self.conv_out = nn.Conv2d(width, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return cast(Tensor, self.conv_out(F.silu(self.conv_norm_out(x))))


class Decoder(nn.Module):
    """Latents after post_quant_conv [B, latent_channels, h, w] -> images [B, out_channels, f*h, f*w]."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        channels, groups, act_fn = config.decoder_widths[::-1], config.norm_num_groups, config.act_fn
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], groups, act_fn, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList()
        width = channels[0]
        for kind, out in zip(config.up_block_types, channels, strict=True):
            block = Block(width, out, config.decoder_layers, groups, act_fn, kind.startswith("Attn"))
            if len(self.up_blocks) < len(channels) - 1:
                block.upsamplers = nn.ModuleList([Upsample(out)])
            self.up_blocks.append(block)
            width = out
        self.conv_norm_out = nn.GroupNorm(groups, width, eps=NORM_EPS)
        self.conv_out = nn.Conv2d(width, config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)
        x = self.mid_block(x)
        for block in self.up_blocks:
            x = block(x)
        return cast(Tensor, self.conv_out(F.silu(self.conv_norm_out(x))))


class KLNetwork(ReferenceVae):
    """Encoder, decoder and the two 1x1 convolutions between them: the network of AutoencoderKL and of its relatives.

    Build one from a config or from its fields (`AutoencoderKL(latent_channels=16, ...)`, random weights), or load one
    with `from_pretrained` or `from_single_file` (fp32, eval mode).

    Tiling and slicing: see `TilingSettings`.
    """

    def __init__(self, config: Any = None, **config_fields: Any) -> None:
        if config is not None and config_fields:
            raise ConfigError(f"give a {self.config_class.__name__} or its fields, not both")
        super().__init__(self.config_class(**config_fields) if config is None else config)
        latent = self.config.latent_channels
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1) if self.config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if self.config.use_post_quant_conv else None

    @property
    def smallest_side(self) -> int:
        """Side in latents of the smallest image on which exports are validated.

        For an image of one latent, a norm group of one channel has a single value and no variance (PyTorch raises an
        error), and a group of two channels has a noisy variance.
        """
        narrowest = min(*self.config.block_out_channels[-2:], *self.config.decoder_widths[-2:])
        return 1 if narrowest > 2 * self.config.norm_num_groups else 2

    def encode_moments(self, x: Tensor) -> Tensor:
        """Run the encoder and quant_conv: [B, in_channels, H, W] -> [B, 2*latent_channels, H//f, W//f]."""
        moments = self.encoder(x)
        return cast(Tensor, moments if self.quant_conv is None else self.quant_conv(moments))

    def decode_latents(self, z: Tensor) -> Tensor:
        """Run post_quant_conv and the decoder: [B, latent_channels, h, w] -> [B, out_channels, f*h, f*w]."""
        return cast(Tensor, self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z)))

    # Attention ----------------------------------------------------------------------------------------------------

    def fuse_qkv_projections(self) -> None:
        """Compute the three projections of every attention with one matrix product. The weights do not change."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.fuse()

    def unfuse_qkv_projections(self) -> None:
        for module in self.modules():
            if isinstance(module, Attention):
                module.unfuse()


class AutoencoderKL(KLNetwork):
    """The VAE: images in [-1, 1] to a posterior over latents, and latents back to images.

    Latents are raw: `scaling_factor` and `shift_factor` are the business of whoever feeds them to a diffusion model.
    """

    family = "AutoencoderKL"
    config_class = VaeConfig
    config: VaeConfig


# What rewrites and estimates ask of the family ------------------------------------------------------------------------


def stages(model: KLNetwork, side: Graph) -> Iterator[Stage]:
    """The stages of the encoder or the decoder, in the order of the computation."""
    part = cast(Any, getattr(model, side))
    names = {module: name for name, module in model.named_modules()}
    groups: list[list[nn.Module]] = [[block] for block in (part.down_blocks if side == "encoder" else part.up_blocks)]
    if side == "encoder":
        groups[-1].append(part.mid_block)
    else:
        groups[0].insert(0, part.mid_block)
    entry: nn.Conv2d = part.conv_in
    for index, blocks in enumerate(groups):
        last = index == len(groups) - 1
        resnets: dict[str, ResnetBlock] = {}
        attentions: dict[str, Attention] = {}
        for block in cast("list[Block | MidBlock]", blocks):
            resnets |= {names[m]: m for m in block.modules() if isinstance(m, ResnetBlock)}
            attentions |= {names[m]: m for m in block.modules() if isinstance(m, Attention)}
        resamplers = [r for b in blocks for kind in ("downsamplers", "upsamplers") for r in getattr(b, kind, ())]
        yield Stage(
            name=f"{side}.{'down' if side == 'encoder' else 'up'}_blocks.{index}",
            entry=entry,
            entry_name=names[entry],
            resnets=resnets,
            attentions=attentions,
            exit_name=names[resamplers[0]] if resamplers else "",
            norm_out=part.conv_norm_out if last else None,
        )
        if resamplers:
            entry = resamplers[0].conv


def activation_places(
    config: VaeConfig, graph: Graph, batch: int, height: int, width: int, form: Form
) -> Iterator[int]:
    """Yield the number of live tensor elements at each place of a graph, on images of this size in pixels.

    Live are, in a residual block, its input and two maps inside of it; at a change of resolution, the maps before and
    after; in attention, queries, keys, values and a block of scores.
    """
    walk = _encoder_places if graph == "encoder" else _decoder_places
    yield from walk(config, batch, height, width, form)


def _resnet(inside: int, outside: int, pixels: int) -> int:
    return max(2 * inside + outside, inside + 2 * outside) * pixels


def _middle(config: VaeConfig, channels: int, batch: int, tokens: int, form: Form) -> Iterator[int]:
    yield _resnet(channels, channels, batch * tokens)
    if config.mid_block_add_attention:
        yield _attention(channels, batch, tokens, form)


def _attention(channels: int, batch: int, tokens: int, form: Form) -> int:
    scores = 2 * batch * tokens * -(-tokens // form.attention_blocks)  # and their softmax
    return 5 * channels * batch * tokens + scores


def _decoder_places(config: VaeConfig, batch: int, height: int, width: int, form: Form) -> Iterator[int]:
    """Yield the number of live elements at each place of the decoder."""
    tokens = (height // config.downscale) * (width // config.downscale)
    pixels, inside = batch * tokens, config.decoder_widths[-1]
    yield from _middle(config, inside, batch, tokens, form)
    for index, (outside, kind) in enumerate(zip(reversed(config.decoder_widths), config.up_block_types, strict=True)):
        yield _resnet(inside, outside, pixels)
        yield _resnet(outside, outside, pixels)
        if kind.startswith("Attn"):
            yield _attention(outside, batch, pixels // batch, form)
        if index < len(config.decoder_widths) - 1:
            # Repeated, or computed as four maps, and then the result; a transposed convolution has the result alone.
            maps = 4 if form.upsample == "deconv" else 8
            yield outside * pixels * (1 + maps)
            pixels *= 4
        inside = outside


def _encoder_places(config: VaeConfig, batch: int, height: int, width: int, form: Form) -> Iterator[int]:
    pixels, inside = batch * height * width, config.block_out_channels[0]
    for index, (outside, kind) in enumerate(zip(config.block_out_channels, config.down_block_types, strict=True)):
        yield _resnet(inside, outside, pixels)
        yield _resnet(outside, outside, pixels)
        if kind.startswith("Attn"):
            yield _attention(outside, batch, pixels // batch, form)
        if index < len(config.block_out_channels) - 1:
            yield outside * (2 * pixels + pixels // 4)  # the map, its padded copy, and the result of a quarter size
            pixels //= 4
        inside = outside
    yield from _middle(config, inside, batch, pixels // batch, form)


FAMILY = Family(
    network=AutoencoderKL,
    rewrites=frozenset({"upsample", "norm", "attention", "last_block", "winograd", "rescale", "tileable"}),
    tensor_names=tensor_names,
    architecture=infer_architecture,
    complete_config=complete_config,
    stages=stages,
    activation_places=activation_places,
)
