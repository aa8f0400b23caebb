"""3x3 convolutions by Winograd's minimal filtering: 4/9 of the multiplications, same result except for rounding."""

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

#: Minimum number of input and of output channels: the saving grows with their product, the cost with their sum.
MIN_CHANNELS = 512

# F(2x2, 3x3) of A. Lavin and S. Gray, "Fast Algorithms for Convolutional Neural Networks" (2016): along an axis, two
# outputs are `_pair` of (KERNEL @ w) * (INPUT @ x), with w three taps and x four inputs: 4 multiplications, not 6.
INPUT = torch.tensor([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], dtype=torch.float64)
KERNEL = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)


class WinogradConv(nn.Module):
    """A 3x3 convolution with padding 1: [B, C, H, W] -> [B, Cout, H, W], H and W even, in squares of 2x2 outputs.

    `windows` (depthwise convolutions) compute sixteen sums of each 4x4 window of inputs. `products` (1x1 convolutions)
    multiply each sum by its own matrix. Each of the four outputs is a sum of products.
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
            if place == 5:  # row 1, column 1: the only product that all four outputs add
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
    """Return the two outputs along an axis from their four products."""
    return a + b + c, b - c - d


def use_winograd(model: Model) -> Model:
    """Return a copy of the model with its `wide_convolutions` replaced by `WinogradConv`.

    Exact except for rounding. In fp32 rounding errors decrease, since each product sums a ninth of the terms; in half
    precision they increase, because the sums before the products are rounded. The weights take 16/9 of the memory.
    """
    model = copy.deepcopy(model)
    for resnet, name in list(wide_convolutions(model)):
        resnet.add_module(name, WinogradConv(cast(nn.Conv2d, getattr(resnet, name))))
    return model


def wide_convolutions(model: ReferenceVae) -> Iterator[tuple[ResnetBlock, str]]:
    """Yield (resnet, attribute name) of the convolutions that `use_winograd` replaces.

    These have at least MIN_CHANNELS input and output channels, and maps whose sides are even for every image: before
    the last downsampling of the encoder and after the first upsampling of the decoder. Convolutions of fewer channels
    gain nothing: the transforms, which read each map sixteen times, cost what the products save.
    """
    if "winograd" not in family_of(model).rewrites:
        return
    network = cast(Any, model)
    for block in [*list(network.encoder.down_blocks)[:-1], *list(network.decoder.up_blocks)[1:]]:
        for resnet in cast("Iterator[ResnetBlock]", block.resnets):
            for name in ("conv1", "conv2"):
                conv = getattr(resnet, name, None)  # `LeanResnet` has no `conv1`: it is split into parts
                if isinstance(conv, nn.Conv2d) and min(conv.in_channels, conv.out_channels) >= MIN_CHANNELS:
                    yield resnet, name


def _constant(values: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(values.to(dtype).contiguous(), requires_grad=False)
