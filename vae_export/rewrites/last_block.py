"""The lean form of the decoder's last block, which never holds its input twice in memory."""

from __future__ import annotations

import copy
import functools
from typing import Any, cast

import torch
from torch import Tensor, nn

from vae_export.families import family_of
from vae_export.families.autoencoder_kl import ResnetBlock, Upsample
from vae_export.families.base import Model, ReferenceVae


class LeanUpsample(nn.Module):
    """Upsampling in parts: [B, C, H, W] -> (n parts [B, C / n, 2*H, 2*W], the shortcut [B, Cout, 2*H, 2*W])."""

    def __init__(self, conv: nn.Conv2d, shortcut: nn.Conv2d, parts: int) -> None:
        super().__init__()
        weight, bias = conv.weight.double(), cast(Tensor, conv.bias).double()
        point = shortcut.weight.double()[:, :, 0, 0]
        composed = torch.einsum("om,mikl->oikl", point, weight), point @ bias + cast(Tensor, shortcut.bias).double()
        halves = zip(weight.chunk(parts), bias.chunk(parts), strict=True)
        self.parts = nn.ModuleList(_upsample(conv, *half) for half in halves)
        self.shortcut = _upsample(conv, *composed)

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        return [part(x) for part in self.parts], self.shortcut(x)


def _upsample(like: nn.Conv2d, weight: Tensor, bias: Tensor) -> Upsample:
    upsample = Upsample(like.in_channels)
    upsample.conv = _conv(weight.to(like.weight.dtype), bias.to(like.weight.dtype))
    return upsample


def _conv(weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1, bias=bias is not None)
    conv.weight = nn.Parameter(weight.clone(), requires_grad=False)
    conv.bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)
    return conv


class LeanResnet(nn.Module):
    """A resnet block that takes the output of `LeanUpsample`: (parts of its input, shortcut) -> [B, Cout, H, W]."""

    def __init__(self, resnet: ResnetBlock, parts: int) -> None:
        super().__init__()
        self.norms, self.convs = nn.ModuleList(), nn.ModuleList()
        norm, conv = resnet.norm1, resnet.conv1
        slices = zip(norm.weight.chunk(parts), norm.bias.chunk(parts), conv.weight.chunk(parts, 1), strict=True)
        for weight, bias, kernel in slices:
            part = nn.GroupNorm(norm.num_groups // parts, len(weight), eps=norm.eps)
            part.weight, part.bias = (nn.Parameter(p.clone(), requires_grad=False) for p in (weight, bias))
            self.norms.append(part)
            self.convs.append(_conv(kernel, None if len(self.convs) else conv.bias))
        self.nonlinearity, self.norm2, self.conv2 = resnet.nonlinearity, resnet.norm2, resnet.conv2

    def forward(self, given: tuple[list[Tensor], Tensor]) -> Tensor:
        parts, shortcut = given
        sums = [conv(self.nonlinearity(norm(x))) for norm, conv, x in zip(self.norms, self.convs, parts, strict=True)]
        h = functools.reduce(torch.add, sums)
        return cast(Tensor, shortcut + self.conv2(self.nonlinearity(self.norm2(h))))


def slim_last_block(model: Model) -> Model:
    """Return a copy of the model whose last decoder block never holds its input twice.

    The decoder reaches its peak memory in the first resnet of the last block: the upsampled map, with twice the
    channels of the following maps, is kept for the shortcut while its normalised copy is convolved. Two identities,
    exact except for rounding, avoid this:

    - A 1x1 convolution (the shortcut) after a convolution (of the upsampling) is one convolution, whose weights are
      their product. It reads the map before the upsampling, which has a quarter of the size, so the large map is freed
      as soon as it is normalised. The cost is a 3x3 convolution instead of a 1x1 one: 2-3% more multiplications.
    - Channel groups are independent until `conv1`, which sums their contributions. So a quarter of the channels is
      upsampled, normalised, convolved and freed before the next quarter. (Halves need 1.75 GB where quarters need
      1.49 GB, in OpenVINO in bf16 at 1024 x 1024.)

    The copy is unchanged if the last block has no such shortcut: see `has_lean_form`.
    """
    model = copy.deepcopy(model)
    if not has_lean_form(model):
        return model
    blocks = cast(Any, model).decoder.up_blocks
    resnet = blocks[-1].resnets[0]
    parts = next(count for count in (4, 2, 1) if resnet.norm1.num_groups % count == 0)
    blocks[-2].upsamplers[0] = LeanUpsample(blocks[-2].upsamplers[0].conv, resnet.conv_shortcut, parts)
    blocks[-1].resnets[0] = LeanResnet(resnet, parts)
    return model


def has_lean_form(model: ReferenceVae) -> bool:
    """Return whether `slim_last_block` changes the model."""
    if "last_block" not in family_of(model).rewrites:
        return False
    blocks = cast(Any, model).decoder.up_blocks
    return len(blocks) > 1 and blocks[-1].resnets[0].conv_shortcut is not None
