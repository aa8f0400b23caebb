"""The network of `AutoencoderTiny` and TAEF2 in JAX: functions of a tree of parameters, channels last.

The parameters have the names of diffusers, as `runtimes.flax.params.from_torch` writes them:
`params["decoder"]["layers_3"]["conv_0"]["kernel"]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax import Array, lax
from jax import numpy as jnp

from runtimes.flax.layers import ACTIVATIONS, fold_nearest

POOL_GROUPS = 4
POOL_EPS = 1e-5  #: PyTorch's default for a group norm

Tree = Mapping[str, Any]


class TinyNetwork(NamedTuple):
    """Encoder and decoder of a config; `dtype` is that of activations, `precision` JAX's precision of products."""

    config: Any
    dtype: Any = jnp.float32
    precision: Any = None

    def encode(self, params: Tree, x: Array) -> Array:
        """Images [B, H, W, in_channels] in [-1, 1] -> latents [B, H/f, W/f, latent_channels]."""
        layers, x = params["encoder"], (x.astype(self.dtype) + 1) / 2
        last = len(self.config.num_encoder_blocks) + sum(self.config.num_encoder_blocks)
        for index in range(last + 1):
            layer = layers[f"layers_{index}"]
            if "kernel" in layer:
                x = self._conv(layer, x, stride=1 if index in (0, last) else 2)
            else:
                x = self._block(layer, x)
        return x

    def decode(self, params: Tree, z: Array) -> Array:
        """Latents [B, h, w, latent_channels] -> images [B, f*h, f*w, out_channels], not clipped."""
        layers, x = params["decoder"], 3 * jnp.tanh(z.astype(self.dtype) / 3)
        x = self._activation(self._conv(layers["layers_0"], x))
        index = 2  # layer 1 is the activation
        for stage, blocks in enumerate(self.config.num_decoder_blocks):
            for _ in range(blocks):
                x = self._block(layers[f"layers_{index}"], x)
                index += 1
            if stage < len(self.config.num_decoder_blocks) - 1:
                x = self._upsample(layers[f"layers_{index + 1}"], x)  # layer `index` is the upsampling
                index += 2
        return self._conv(layers[f"layers_{index}"], x) * 2 - 1

    def _block(self, layer: Tree, x: Array) -> Array:
        if "pool_0" in layer:
            pooled = self._conv(layer["pool_0"], x)
            x = x + self._conv(layer["pool_3"], jax.nn.relu(_group_norm(layer["pool_1"], pooled).astype(self.dtype)))
        h = self._activation(self._conv(layer["conv_0"], x))
        h = self._activation(self._conv(layer["conv_2"], h))
        return jax.nn.relu(self._conv(layer["conv_4"], h) + x)

    def _conv(self, layer: Tree, x: Array, stride: int = 1) -> Array:
        kernel = layer["kernel"].astype(self.dtype)
        pad = kernel.shape[0] // 2
        y: Array = lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(stride, stride),
            padding=((pad, pad), (pad, pad)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=self.precision,
        )
        return y + layer["bias"].astype(self.dtype) if "bias" in layer else y

    def _upsample(self, layer: Tree, x: Array) -> Array:
        """Nearest neighbour by the config's factor, and the convolution behind it."""
        factor = self.config.upsampling_scaling_factor
        if factor == 2:
            return fold_nearest(x, layer["kernel"], layer.get("bias"), self.dtype, self.precision)
        return self._conv(layer, jnp.repeat(jnp.repeat(x, factor, axis=1), factor, axis=2))

    @property
    def _activation(self) -> Callable[[Any], Any]:
        return ACTIVATIONS[self.config.act_fn]


def _group_norm(layer: Tree, x: Array) -> Array:
    """Group norm in fp32 over [B, H, W, C]; the variance is the mean square after subtracting the mean."""
    b, h, w, c = x.shape
    groups = x.astype(jnp.float32).reshape(b, h * w, POOL_GROUPS, c // POOL_GROUPS)
    centred = groups - groups.mean((1, 3), keepdims=True)
    normed = centred * lax.rsqrt((centred * centred).mean((1, 3), keepdims=True) + POOL_EPS)
    scale, bias = (layer[name].astype(jnp.float32) for name in ("kernel", "bias"))
    result: Array = normed.reshape(b, h, w, c) * scale + bias
    return result
