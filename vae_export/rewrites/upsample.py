"""Nearest-neighbour upsampling folded into the convolution that follows it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vae_export.families import family_of
from vae_export.families.autoencoder_kl import Upsample
from vae_export.families.base import Model


class DeconvUpsample(nn.Module):
    """Nearest x2 and its 3x3 convolution as one transposed convolution: [B, C, H, W] -> [B, C, 2*H, 2*W]."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        # Along an axis: output 2i = w0 x[i-1] + (w1 + w2) x[i], output 2i+1 = (w0 + w1) x[i] + w2 x[i+1].
        taps = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.float64)
        kernel = torch.einsum("ak,bl,oikl->ioab", taps, taps, conv.weight.double())
        self.conv = nn.ConvTranspose2d(conv.in_channels, conv.out_channels, 4, stride=2, padding=1)
        self.conv.weight = nn.Parameter(kernel.to(conv.weight.dtype), requires_grad=False)
        self.conv.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv(x))


class FourConvUpsample(nn.Module):
    """Nearest x2 and its 3x3 convolution as four interleaved 2x2 convolutions: [B, C, H, W] -> [B, C, 2*H, 2*W]."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        # The same sums as in DeconvUpsample, with one convolution for each of the four positions in a 2x2 square.
        taps = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float64)
        self.convs = nn.ModuleList()
        for row in range(2):
            for column in range(2):
                kernel = torch.einsum("ak,bl,oikl->oiab", taps[row], taps[column], conv.weight.double())
                part = nn.Conv2d(conv.in_channels, conv.out_channels, 2)
                part.weight = nn.Parameter(kernel.to(conv.weight.dtype), requires_grad=False)
                part.bias = conv.bias
                self.convs.append(part)

    def forward(self, x: Tensor) -> Tensor:
        # Along an axis, even outputs read the previous pixel and odd outputs the next.
        sides = [(1 - column, column, 1 - row, row) for row in range(2) for column in range(2)]
        parts = [conv(F.pad(x, side)) for conv, side in zip(self.convs, sides, strict=True)]
        return F.pixel_shuffle(torch.stack(parts, dim=2).flatten(1, 2), 2)


_FOLDED: dict[str, type[nn.Module]] = {"deconv": DeconvUpsample, "conv": FourConvUpsample}


def fold_upsample(model: Model, form: str) -> Model:
    """Return a copy of the model with each nearest-neighbour upsampling folded into the convolution after it.

    The folded convolution needs 4/9 of the multiplications. The taps of the original convolution fall on repeated
    pixels; adding the weights of such taps beforehand gives the same sums, except for rounding.

    `form` is "deconv" (one transposed convolution), "conv" (four small interleaved convolutions) or "none". The fastest
    depends on the runtime.
    """
    model = copy.deepcopy(model)
    if form != "none":
        model = family_of(model).prepared(model)
        for parent, name, upsample in list(_children(model, Upsample)):
            parent.add_module(name, _FOLDED[form](cast(Upsample, upsample).conv))
    return model


def _children(root: nn.Module, kind: type[nn.Module]) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in root.modules():
        for name, child in parent.named_children():
            if isinstance(child, kind):
                yield parent, name, child
