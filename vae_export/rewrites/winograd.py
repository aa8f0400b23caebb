"""3x3 convolutions by Winograd's minimal filtering: 4/9 of the multiplications, the same sums but for rounding."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vae_export.families import family_of
from vae_export.families.autoencoder_kl import ResnetBlock
from vae_export.families.base import Model, ReferenceVae

#: Of input and output, where it pays: what is saved grows with their product, what it costs with their sum.
LEAST_CHANNELS = 512

# F(2x2, 3x3) of A. Lavin and S. Gray, "Fast Algorithms for Convolutional Neural Networks" (2016): along an axis two
# outputs from four inputs, `_pair` of (KERNEL @ w) * (INPUT @ x): four multiplications in the place of six.
INPUT = torch.tensor([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], dtype=torch.float64)
KERNEL = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)


class WinogradConv(nn.Module):
    """[B, C, H, W] -> [B, Cout, H, W], H and W even: a 3x3 convolution with padding 1, in squares of 2x2 outputs.

    Of each window of 4x4 inputs sixteen sums are taken (`windows`: convolutions of each channel alone), each is
    multiplied by a matrix of its own (`products`: 1x1 convolutions), and four sums of those are the outputs.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        channels = conv.in_channels
        sums = torch.einsum("ak,bl->abkl", INPUT, INPUT).flatten(0, 1)
        matrices = torch.einsum("ak,bl,oikl->aboi", KERNEL, KERNEL, conv.weight.double()).flatten(0, 1)
        self.windows, self.products = nn.ModuleList(), nn.ModuleList()
        for place, (kernel, matrix) in enumerate(zip(sums, matrices, strict=True)):
            window = nn.Conv2d(channels, channels, 4, stride=2, padding=1, groups=channels, bias=False)
            window.weight = _constant(kernel.expand(channels, 1, 4, 4), conv.weight.dtype)
            product = nn.Conv2d(channels, conv.out_channels, 1, bias=False)
            product.weight = _constant(matrix[:, :, None, None], conv.weight.dtype)
            if place == 5:  # row 1, column 1: all four outputs add it
                product.bias = conv.bias
            self.windows.append(window)
            self.products.append(product)

    def forward(self, x: Tensor) -> Tensor:
        parts = [product(window(x)) for window, product in zip(self.windows, self.products, strict=True)]
        columns = zip(*(_pair(*parts[start : start + 4]) for start in range(0, 16, 4)), strict=True)
        left, right = (_pair(*column) for column in columns)
        outputs = [left[0], right[0], left[1], right[1]]
        return F.pixel_shuffle(torch.stack(outputs, dim=2).flatten(1, 2), 2)


def _pair(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Two outputs along an axis, of four products."""
    return a + b + c, b - c - d


def use_winograd(model: Model) -> Model:
    """Compute the wide convolutions of resnets by `WinogradConv`: see `wide_convolutions`.

    Exact but for rounding, and with less of that in fp32, since each product sums a ninth of the terms; in half
    precision the sums before the products round more than that saves. Weights take 16/9 of the place.
    """
    model = copy.deepcopy(model)
    for resnet, name in list(wide_convolutions(model)):
        resnet.add_module(name, WinogradConv(cast(nn.Conv2d, getattr(resnet, name))))
    return model


def wide_convolutions(model: ReferenceVae) -> Iterator[tuple[ResnetBlock, str]]:
    """What `use_winograd` replaces: convolutions of many channels, where sides are even whatever the image is.

    That is in front of the encoder's last downsampling and behind the decoder's first upsampling. Larger maps have
    fewer channels, and there the transforms, which read each map sixteen times, cost what the products save.
    """
    if "winograd" not in family_of(model).rewrites:
        return
    network = cast(Any, model)
    for block in [*list(network.encoder.down_blocks)[:-1], *list(network.decoder.up_blocks)[1:]]:
        for resnet in cast("Iterator[ResnetBlock]", block.resnets):
            for name in ("conv1", "conv2"):
                conv = getattr(resnet, name, None)  # `rewrite.LeanResnet` has its first in parts
                if isinstance(conv, nn.Conv2d) and min(conv.in_channels, conv.out_channels) >= LEAST_CHANNELS:
                    yield resnet, name


def _constant(values: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(values.to(dtype).contiguous(), requires_grad=False)
