"""The layers of `runtimes.flax.model`. Each maps [B, H, W, C] to [B, H, W, C] and is named as in diffusers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from jax import Array, lax
from jax import numpy as jnp

from runtimes.config import VaeConfig

NORM_EPS = 1e-6
#: queries per block of attention: 64 MiB of scores for a 1024x1024 image, instead of 1 GiB for all queries
QUERIES = 1024
ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "mish": jax.nn.mish,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
}


class Layer(nn.Module):
    """Base of every part of the network: config, dtype of activations, and precision of products."""

    config: VaeConfig
    dtype: Any = jnp.float32
    precision: Any = None

    @nn.nowrap
    def part(self, kind: Callable[..., Any], *arguments: Any, **options: Any) -> Callable[[Array], Array]:
        """Return a `Layer` of another class with the same settings."""
        layer: Callable[[Array], Array] = kind(self.config, self.dtype, self.precision, *arguments, **options)
        return layer

    @nn.nowrap
    def conv(self, channels: int, size: int, name: str, **options: Any) -> Callable[[Array], Array]:
        options = {"padding": size // 2, **options}
        return nn.Conv(channels, (size, size), dtype=self.dtype, precision=self.precision, name=name, **options)


class GroupNorm(Layer):
    """Group norm with statistics in fp32 for any dtype; the variance is the mean square after subtracting the mean.

    Flax computes the mean square minus the squared mean, which saves a pass but loses all digits for an image of one
    colour. Means are taken over positions first, then over the channels of a group, which takes three quarters of the
    time on a CPU for large maps.
    """

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels, groups = x.shape[-1], self.config.norm_num_groups
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))

        def group_means(values: Array) -> Array:  # [B, H, W, C] -> [B, 1, 1, C], the mean of each channel's group
            means = values.mean((1, 2)).reshape(-1, groups, channels // groups).mean(-1)
            return jnp.repeat(means, channels // groups, axis=-1)[:, None, None]

        x = x.astype(jnp.float32)
        centred = x - group_means(x)
        variance = group_means(centred * centred)
        factor = lax.rsqrt(variance + NORM_EPS) * scale.astype(jnp.float32)
        return (centred * factor + bias.astype(jnp.float32)).astype(self.dtype)


class ResnetBlock(Layer):
    """Two convolutions with norm and activation, added to a shortcut."""

    channels: int = 0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        activation = ACTIVATIONS[self.config.act_fn]
        h = self.conv(self.channels, 3, "conv1")(activation(self.part(GroupNorm, name="norm1")(x)))
        h = self.conv(self.channels, 3, "conv2")(activation(self.part(GroupNorm, name="norm2")(h)))
        return h + (x if x.shape[-1] == self.channels else self.conv(self.channels, 1, "conv_shortcut")(x))


class Attention(Layer):
    """Self-attention over all positions with one head of C channels, added to the input."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, h, w, c = x.shape
        dense = functools.partial(nn.Dense, c, dtype=self.dtype, precision=self.precision)
        positions = self.part(GroupNorm, name="group_norm")(x).reshape(b, h * w, c)
        q, k, v = (dense(name=name)(positions) for name in ("query", "key", "value"))
        return x + dense(name="proj_attn")(attend(q, k, v, self.precision)).reshape(b, h, w, c)


def attend(q: Array, k: Array, v: Array, precision: Any = None) -> Array:
    """Compute softmax(q k^T / sqrt(C)) v for [B, HW, C] in blocks of `QUERIES` queries; memory is linear in HW.

    The result is exact, because a softmax runs over the keys of one query. Gradients recompute the scores of each
    block.
    """
    batch, count, channels = q.shape

    def attend_block(queries: Array) -> Array:
        scores = jnp.einsum("bqc,bkc->bqk", queries, k, precision=precision, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * channels**-0.5, axis=-1).astype(v.dtype)
        return jnp.einsum("bqk,bkc->bqc", weights, v, precision=precision)

    if isinstance(count, int) and count <= QUERIES:
        return attend_block(q)
    # Pad the last block with zeros, and remove them by lax.pad as well: sizes may be unknown during tracing.
    blocks = (count + QUERIES - 1) // QUERIES
    missing, zero = blocks * QUERIES - count, jnp.zeros((), q.dtype)
    filled = lax.pad(q, zero, ((0, 0, 0), (0, missing, 0), (0, 0, 0)))
    in_blocks = filled.reshape(batch, blocks, QUERIES, channels).swapaxes(0, 1)
    out = lax.map(jax.checkpoint(attend_block), in_blocks).swapaxes(0, 1).reshape(batch, blocks * QUERIES, channels)
    return lax.pad(out, zero, ((0, 0, 0), (0, -missing, 0), (0, 0, 0)))


class Downsample(Layer):
    """Halve height and width: pad zeros on the right and bottom only, then a convolution with stride 2."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return self.conv(x.shape[-1], 3, "conv", strides=2, padding=((0, 1), (0, 1)))(x)


class Upsample(Layer):
    """Double height and width: nearest-neighbour upsampling and a 3x3 convolution."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return self.part(FoldedConv, name="conv")(x)


class FoldedConv(Layer):
    """Nearest x2 upsampling and a 3x3 convolution as four interleaved 2x2 convolutions: 4/9 of the multiplications.

    The result is exact except for rounding: taps on the same input pixel are added before the multiplication. Along an
    axis, output 2i is w0 x[i-1] + (w1 + w2) x[i], and output 2i+1 is (w0 + w1) x[i] + w2 x[i+1].
    """

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = x.shape[-1]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, c, c))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        return fold_nearest(x, kernel, bias, self.dtype, self.precision)


def fold_nearest(x: Array, kernel: Array, bias: Array | None, dtype: Any, precision: Any) -> Array:
    """Nearest x2 and a 3x3 convolution, [B, H, W, C] -> [B, 2*H, 2*W, Cout], as `FoldedConv` describes."""
    b, h, w, _ = x.shape
    x, kernel = x.astype(dtype), kernel.astype(jnp.float32)
    parts: list[Array] = []
    for rows in (jnp.stack([kernel[0], kernel[1] + kernel[2]]), jnp.stack([kernel[0] + kernel[1], kernel[2]])):
        for taps in ((rows[:, 0], rows[:, 1] + rows[:, 2]), (rows[:, 0] + rows[:, 1], rows[:, 2])):
            row, column = divmod(len(parts), 2)
            part = lax.conv_general_dilated(
                x,
                jnp.stack(taps, axis=1).astype(dtype),
                window_strides=(1, 1),
                # Even outputs read the previous pixel, odd ones the next.
                padding=((1 - row, row), (1 - column, column)),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                precision=precision,
            )
            parts.append(part if bias is None else part + bias.astype(dtype))
    square = jnp.stack(parts, axis=3).reshape(b, h, w, 2, 2, -1)
    return square.transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, -1)


class Block(Layer):
    """One level: resnets (each followed by attention in the Attn block types), then down- or upsampling."""

    channels: int = 0
    layers: int = 1
    kind: str = ""
    resample: Callable[..., Any] | None = None
    resample_name: str = ""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(self.layers):
            x = self.part(ResnetBlock, self.channels, name=f"resnets_{i}")(x)
            if self.kind.startswith("Attn"):
                x = self.part(Attention, name=f"attentions_{i}")(x)
        return x if self.resample is None else self.part(self.resample, name=self.resample_name)(x)


class MidBlock(Layer):
    """A resnet, attention (if the config enables it), and a resnet."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = self.part(ResnetBlock, x.shape[-1], name="resnets_0")(x)
        if self.config.mid_block_add_attention:
            x = self.part(Attention, name="attentions_0")(x)
        return self.part(ResnetBlock, x.shape[-1], name="resnets_1")(x)


class Encoder(Layer):
    """Map images [B, H, W, in_channels] to moments before quant_conv [B, H // f, W // f, 2 * latent_channels]."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config, widths = self.config, self.config.block_out_channels
        x = self.conv(widths[0], 3, "conv_in")(x)
        for i, (width, kind) in enumerate(zip(widths, config.down_block_types, strict=True)):
            down = Downsample if i < len(widths) - 1 else None
            block = self.part(
                Block, width, config.layers_per_block, kind, down, "downsamplers_0", name=f"down_blocks_{i}"
            )
            x = block(x)
        x = self.part(MidBlock, name="mid_block")(x)
        x = jax.nn.silu(self.part(GroupNorm, name="conv_norm_out")(x))
        return self.conv(2 * config.latent_channels, 3, "conv_out")(x)


class Decoder(Layer):
    """Map latents after post_quant_conv [B, h, w, latent_channels] to images [B, f*h, f*w, out_channels]."""

    @nn.compact
    def __call__(self, z: Array) -> Array:
        config, widths = self.config, self.config.decoder_widths[::-1]
        x = self.part(MidBlock, name="mid_block")(self.conv(widths[0], 3, "conv_in")(z))
        for i, (width, kind) in enumerate(zip(widths, config.up_block_types, strict=True)):
            up = Upsample if i < len(widths) - 1 else None
            block = self.part(Block, width, config.decoder_layers, kind, up, "upsamplers_0", name=f"up_blocks_{i}")
            x = block(x)
        x = jax.nn.silu(self.part(GroupNorm, name="conv_norm_out")(x))
        return self.conv(config.out_channels, 3, "conv_out")(x)
