"""The reference `AutoencoderKL`, the image VAE of Stable Diffusion, SDXL, SD3, FLUX.1 and their kin.

Module names are those of diffusers, so that its weights load as they are. In the docstrings B is the batch, C the
channels, H and W height and width, and f = 2 ** (levels - 1) the spatial ratio (8 for Stable Diffusion).

The architecture is that of Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models"
(arXiv:2112.10752), without the adversarial training around it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from runtimes.config import VaeConfig
from runtimes.errors import ConfigError
from runtimes.outputs import AutoencoderKLOutput, DecoderOutput
from runtimes.posterior import DiagonalGaussianDistribution
from runtimes.tiling.blended import run_tiled
from runtimes.tiling.settings import TilingSettings
from runtimes.tiling.tiler import Tiler
from vae_export.checkpoints.source import Source

NORM_EPS = 1e-6
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "mish": nn.Mish,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
}


class ResnetBlock(nn.Module):
    """[B, Cin, H, W] -> [B, Cout, H, W]: two normalised convolutions beside a shortcut."""

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
    """Self-attention [B, C, H, W] -> the same, over all H*W positions, one head of C channels, residual added."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])
        # The fused projection is derived from the three above: never in the state dict.
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
        """Normalised positions [B, HW, C] -> q, k, v, each [B, HW, C]."""
        if self.qkv_weight is None:
            return self.to_q(x), self.to_k(x), self.to_v(x)
        q, k, v = F.linear(x, self.qkv_weight, self.qkv_bias).chunk(3, dim=-1)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(C)) v, each [B, HW, C]."""
        # One head: PyTorch's fused kernels need the axis, and then never hold all HW x HW scores.
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        positions = self.group_norm(x.view(b, c, h * w)).transpose(1, 2)
        out = self.to_out[0](self.attend(*self.project(positions)))
        # In this order the sum keeps the attention's channels-last strides, as in diffusers: the convolutions after it
        # then run the same kernels there and here.
        return cast(Tensor, out.transpose(1, 2).reshape(b, c, h, w) + x)


class Downsample(nn.Module):
    """[B, C, H, W] -> [B, C, H // 2, W // 2]: zeros on the right and bottom only, then a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv(F.pad(x, (0, 1, 0, 1))))


class Upsample(nn.Module):
    """[B, C, H, W] -> [B, C, 2*H, 2*W]: nearest neighbour, then a convolution."""

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
    """[B, C, h, w] -> the same: resnet, attention (where the config has it), resnet."""

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
        channels, groups, act_fn = config.block_out_channels[::-1], config.norm_num_groups, config.act_fn
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], groups, act_fn, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList()
        width = channels[0]
        for kind, out in zip(config.up_block_types, channels, strict=True):
            block = Block(width, out, config.layers_per_block + 1, groups, act_fn, kind.startswith("Attn"))
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


class AutoencoderKL(TilingSettings, nn.Module):
    """The VAE: images in [-1, 1] to a posterior over latents, and latents back to images.

    Build one from a `VaeConfig` or from its fields (`AutoencoderKL(latent_channels=16, ...)`, random weights), or load
    one with `from_pretrained` or `from_single_file` (fp32, eval mode).

    Latents are raw: `scaling_factor` and `shift_factor` are the business of whoever feeds them to a diffusion model.

    Tiling and slicing: see `TilingSettings`.
    """

    def __init__(self, config: VaeConfig | None = None, **config_fields: Any) -> None:
        super().__init__()
        if config is not None and config_fields:
            raise ConfigError("give a VaeConfig or its fields, not both")
        self.config = VaeConfig(**config_fields) if config is None else config
        self.source = Source(given="memory", kind="memory")
        latent = self.config.latent_channels
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1) if self.config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if self.config.use_post_quant_conv else None

        self._set_up_tiling(self.config.sample_size, self.config.downscale)

    # Loading and saving -------------------------------------------------------------------------------------------

    @classmethod
    def from_config(cls, config: VaeConfig | Mapping[str, Any]) -> AutoencoderKL:
        """A model with random weights from a `VaeConfig` or a diffusers config dictionary."""
        return cls(config if isinstance(config, VaeConfig) else VaeConfig.from_dict(config))

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        subfolder: str | None = None,
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | None = None,
        local_files_only: bool = False,
    ) -> AutoencoderKL:
        """Load a diffusers directory or Hub repository: config.json and diffusion_pytorch_model.safetensors.

        `subfolder="vae"` picks the VAE of a whole pipeline, `variant="fp16"` the weights of
        diffusion_pytorch_model.fp16.safetensors; without it the plain file is read, or the only variant there. Weights
        may be split into parts with an index. Weights of any float type are held in fp32.

        Raises `ConfigError` for anything that is not the complete checkpoint of an `AutoencoderKL`.
        """
        from vae_export.checkpoints import hub
        from vae_export.checkpoints import load as checkpoint

        return checkpoint.load_pretrained(
            source,
            subfolder=subfolder,
            variant=variant,
            hub=hub.Hub(revision, cache_dir, token, local_files_only),
        )

    @classmethod
    def from_single_file(
        cls,
        source: str | Path,
        *,
        config: VaeConfig | Mapping[str, Any] | str | Path | None = None,
        scaling_factor: float | None = None,
        shift_factor: float | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | None = None,
        local_files_only: bool = False,
    ) -> AutoencoderKL:
        """Load one .safetensors file: a local path or the URL of a file on the Hub.

        The keys may be those of diffusers or of the original latent-diffusion code, bare, below `first_stage_model.`
        or `vae.`, alone or inside a whole checkpoint. The architecture is read off the shapes. What shapes cannot tell
        (norm groups, scaling and shift) comes from `config`, from the arguments, from the repository's own config, or
        from the table of public VAEs; where scaling stays unknown, `config.scaling_factor` is None and encoding and
        decoding raw latents works all the same.
        """
        from vae_export.checkpoints import hub
        from vae_export.checkpoints import load as checkpoint

        return checkpoint.load_single_file(
            source,
            config=config,
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
            hub=hub.Hub(revision, cache_dir, token, local_files_only),
        )

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and diffusion_pytorch_model.safetensors, as diffusers reads them."""
        from vae_export.checkpoints import load as checkpoint

        checkpoint.save_pretrained(self, Path(directory))

    # Encoding and decoding ----------------------------------------------------------------------------------------

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Images [B, in_channels, H, W] in [-1, 1] -> the posterior over latents [B, latent_channels, H//f, W//f]."""
        posterior = DiagonalGaussianDistribution(self._tiler().run(self.encode_moments, x, "encoder"))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Raw latents [B, latent_channels, h, w] -> images [B, out_channels, f*h, f*w], not clipped.

        `generator` is accepted, as in diffusers, and not used: decoding is deterministic.
        """
        sample = self._tiler().run(self.decode_latents, z, "decoder")
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Encode and decode images: through the mode of the posterior, or a draw from it with `sample_posterior`."""
        posterior = self.encode(sample)[0]
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict)

    def encode_moments(self, x: Tensor) -> Tensor:
        """The whole encoder, quant_conv included: [B, in_channels, H, W] -> [B, 2*latent_channels, H//f, W//f]."""
        moments = self.encoder(x)
        return cast(Tensor, moments if self.quant_conv is None else self.quant_conv(moments))

    def decode_latents(self, z: Tensor) -> Tensor:
        """The whole decoder, post_quant_conv included: [B, latent_channels, h, w] -> [B, out_channels, f*h, f*w]."""
        return cast(Tensor, self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z)))

    def tiled_encode(
        self, x: Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """`encode` by tiles, whatever the size and whether or not tiling is enabled."""
        posterior = DiagonalGaussianDistribution(run_tiled(self.encode_moments, x, self._tiler().grid("encoder")))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def tiled_decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """`decode` by tiles, whatever the size and whether or not tiling is enabled."""
        sample = run_tiled(self.decode_latents, z, self._tiler().grid("decoder"))
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def _tiler(self) -> Tiler:
        return Tiler(self, self.config.downscale)

    # Attention ----------------------------------------------------------------------------------------------------

    def fuse_qkv_projections(self) -> None:
        """Compute the three projections of every attention with one matrix product. Weights are not changed."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.fuse()

    def unfuse_qkv_projections(self) -> None:
        for module in self.modules():
            if isinstance(module, Attention):
                module.unfuse()

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device
