"""Exact rewrites for speed and memory: a model in, a model out that computes the same in a form that suits a backend.

Each says why it is exact, but for rounding. None changes the model that it is given. `Form` names a choice of them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vae_export.model import Attention, AutoencoderKL, ResnetBlock, Upsample
from vae_export.operators import attend_in_blocks, row_norm

UPSAMPLES = ("none", "conv", "deconv")
NORMS = ("group", "rows")
SHORTCUTS = ("direct", "composed")


class Form(NamedTuple):
    """Which of its equivalent forms a graph is written in; what is the fastest depends on the backend."""

    upsample: str = "none"  #: one of UPSAMPLES, see `fold_upsample`
    norm: str = "group"  #: one of NORMS, see `use_row_norms`
    shortcut: str = "direct"  #: one of SHORTCUTS, see `compose_shortcut`
    attention_blocks: int = 1  #: see `use_portable_attention`

    def records(self) -> list[dict[str, Any]]:
        """What the manifest says of the rewrites in this form."""
        records: list[dict[str, Any]] = []
        if self.upsample != "none":
            records.append({"name": "fold_upsample", "form": self.upsample})
        if self.shortcut == "composed":
            records.append({"name": "compose_shortcut"})
        if self.norm == "rows":
            records.append({"name": "row_norms"})
        if self.attention_blocks > 1:
            records.append({"name": "attention_in_blocks", "blocks": self.attention_blocks})
        return records


PLAIN = Form()  #: as the reference has it


def rewrite(model: AutoencoderKL, form: Form) -> AutoencoderKL:
    """The model in the given form: the same function, but for rounding."""
    if form.shortcut == "composed":
        model = compose_shortcut(model)
    model = fold_upsample(model, form.upsample)
    if form.norm == "rows":
        model = use_row_norms(model)
    return use_portable_attention(model, form.attention_blocks)


# Attention --------------------------------------------------------------------------------------------------------


class PortableAttention(Attention):
    """The same attention from MatMul and Softmax alone, in blocks of queries.

    Every runtime has fast kernels for these two; the fused ONNX operator (Attention-23) is refused by TensorRT at a
    head size of 512, and slower in ONNX Runtime on the CPU.
    """

    blocks = 1

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q * q.shape[-1] ** -0.5
        if self.blocks == 1:
            return torch.matmul(torch.softmax(torch.matmul(q, k.transpose(1, 2)), dim=-1), v)
        return cast(Tensor, attend_in_blocks(q, k, v, self.blocks))

    def forward(self, x: Tensor) -> Tensor:
        # The norm before the flattening: on images, as all other norms, so that one form of it serves them all.
        b, c, h, w = x.shape
        positions = self.group_norm(x).view(b, c, h * w).transpose(1, 2)
        out = self.to_out[0](self.attend(*self.project(positions)))
        return cast(Tensor, out.transpose(1, 2).reshape(b, c, h, w) + x)


def use_portable_attention(model: AutoencoderKL, blocks: int = 1) -> AutoencoderKL:
    """Replace the fused attention kernel by its definition, softmax(q k^T / sqrt(C)) v, `blocks` of queries in turn."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, Attention):
            module.__class__ = PortableAttention
            cast(PortableAttention, module).blocks = blocks
    return model


# Norms ------------------------------------------------------------------------------------------------------------


class RowNorm(nn.GroupNorm):
    """GroupNorm of [B, C, H, W] by rows: see `operators.row_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, row_norm(x, self.weight, self.bias, self.num_groups, self.eps))


def use_row_norms(model: AutoencoderKL) -> AutoencoderKL:
    """Replace every GroupNorm by `RowNorm`. Attention must already take its norm on images: `PortableAttention`."""
    model = use_portable_attention(model)
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.__class__ = RowNorm
    return model


# Upsampling -------------------------------------------------------------------------------------------------------


class DeconvUpsample(nn.Module):
    """[B, C, H, W] -> [B, C, 2*H, 2*W]: nearest x2 and its 3x3 convolution as one transposed convolution."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        # Along an axis: output 2i sees w0 x[i-1] + (w1 + w2) x[i], output 2i+1 sees (w0 + w1) x[i] + w2 x[i+1].
        taps = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.float64)
        kernel = torch.einsum("ak,bl,oikl->ioab", taps, taps, conv.weight.double())
        self.conv = nn.ConvTranspose2d(conv.in_channels, conv.out_channels, 4, stride=2, padding=1)
        self.conv.weight = nn.Parameter(kernel.to(conv.weight.dtype), requires_grad=False)
        self.conv.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv(x))


class FourConvUpsample(nn.Module):
    """[B, C, H, W] -> [B, C, 2*H, 2*W]: nearest x2 and its 3x3 convolution as four 2x2 ones, interleaved."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        # The same sums as in DeconvUpsample, one convolution for each of the four positions in a 2x2 square.
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
        # The even output of an axis looks one pixel back, the odd one ahead.
        sides = [(1 - column, column, 1 - row, row) for row in range(2) for column in range(2)]
        parts = [conv(F.pad(x, side)) for conv, side in zip(self.convs, sides, strict=True)]
        return F.pixel_shuffle(torch.stack(parts, dim=2).flatten(1, 2), 2)


_FOLDED: dict[str, type[nn.Module]] = {"deconv": DeconvUpsample, "conv": FourConvUpsample}


def fold_upsample(model: AutoencoderKL, form: str) -> AutoencoderKL:
    """Fold each nearest-neighbour upsampling into the convolution behind it: 4/9 of its multiplications.

    Three of four taps of the convolution fall on repeated pixels; adding their weights beforehand gives the same sums,
    exact but for rounding. `form` is "deconv" (one transposed convolution), "conv" (four small ones, interleaved) or
    "none"; which is the fastest depends on the runtime.
    """
    model = copy.deepcopy(model)
    if form != "none":
        for parent, name, upsample in list(_children(model.decoder, Upsample)):
            parent.add_module(name, _FOLDED[form](cast(Upsample, upsample).conv))
    return model


def _children(root: nn.Module, kind: type[nn.Module]) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in root.modules():
        for name, child in parent.named_children():
            if isinstance(child, kind):
                yield parent, name, child


# The widest shortcut ----------------------------------------------------------------------------------------------


class UpsampleWithShortcut(nn.Module):
    """[B, C, H, W] -> (upsampled [B, C, 2*H, 2*W], the shortcut of the resnet behind it [B, Cout, 2*H, 2*W])."""

    def __init__(self, upsample: Upsample, shortcut: nn.Conv2d) -> None:
        super().__init__()
        self.upsample = upsample
        self.shortcut = Upsample(upsample.conv.in_channels)
        conv, point = upsample.conv, shortcut.weight.double()[:, :, 0, 0]
        composed = nn.Conv2d(conv.in_channels, shortcut.out_channels, 3, padding=1)
        weight = torch.einsum("om,mikl->oikl", point, conv.weight.double())
        bias = point @ cast(Tensor, conv.bias).double() + cast(Tensor, shortcut.bias).double()
        composed.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=False)
        composed.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=False)
        self.shortcut.conv = composed

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.upsample(x), self.shortcut(x)


class ResnetBehindUpsample(nn.Module):
    """A resnet that is given its shortcut: (x [B, Cin, H, W], shortcut [B, Cout, H, W]) -> [B, Cout, H, W]."""

    def __init__(self, resnet: ResnetBlock) -> None:
        super().__init__()
        self.resnet = resnet
        resnet.conv_shortcut = None

    def forward(self, given: tuple[Tensor, Tensor]) -> Tensor:
        x, shortcut = given
        r = self.resnet
        h = r.conv1(r.nonlinearity(r.norm1(x)))
        return cast(Tensor, shortcut + r.conv2(r.nonlinearity(r.norm2(h))))


def compose_shortcut(model: AutoencoderKL) -> AutoencoderKL:
    """Compute the shortcut of the last block's first resnet from before the upsampling in front of it.

    The peak of a decoder's memory lies there: the upsampled map, twice as wide as what follows, is kept for the
    shortcut while its normalised copy is convolved. A 1x1 convolution behind a convolution is one convolution whose
    weights are their product, exact but for rounding; it reads the map of a quarter of the size, and the large one is
    freed as soon as it is normalised. The price is a convolution where a point-wise one was, 2-3% of the decoder's
    multiplications.
    """
    model = copy.deepcopy(model)
    blocks = cast(Any, model.decoder.up_blocks)
    if len(blocks) < 2 or blocks[-1].resnets[0].conv_shortcut is None:
        return model
    resnet = blocks[-1].resnets[0]
    blocks[-2].upsamplers[0] = UpsampleWithShortcut(blocks[-2].upsamplers[0], resnet.conv_shortcut)
    blocks[-1].resnets[0] = ResnetBehindUpsample(resnet)
    return model
