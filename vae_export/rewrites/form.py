"""Exact rewrites for speed and memory: a model in, a model out that computes the same in a form that suits a backend.

Each says why it is exact, but for rounding. None changes the model that it is given. `Form` names a choice of them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vae_export.families.autoencoder_kl import Attention, AutoencoderKL, ResnetBlock, Upsample
from vae_export.rewrites.operators import attend_in_blocks, row_norm
from vae_export.rewrites.winograd import use_winograd, wide_convolutions

UPSAMPLES = ("none", "conv", "deconv")
NORMS = ("group", "rows")
LAST_BLOCKS = ("plain", "lean")
CONVOLUTIONS = ("direct", "winograd")


class Form(NamedTuple):
    """Which of its equivalent forms a graph is written in; what is the fastest depends on the backend."""

    upsample: str = "none"  #: one of UPSAMPLES, see `fold_upsample`
    norm: str = "group"  #: one of NORMS, see `use_row_norms`
    last_block: str = "plain"  #: one of LAST_BLOCKS, see `slim_last_block`
    attention_blocks: int = 1  #: see `use_portable_attention`
    convolutions: str = "direct"  #: one of CONVOLUTIONS, see `winograd.use_winograd`

    def records(self) -> list[dict[str, Any]]:
        """What the manifest says of the rewrites in this form."""
        records: list[dict[str, Any]] = []
        if self.upsample != "none":
            records.append({"name": "fold_upsample", "form": self.upsample})
        if self.last_block == "lean":
            records.append({"name": "slim_last_block"})
        if self.norm == "rows":
            records.append({"name": "row_norms"})
        if self.convolutions != "direct":
            records.append({"name": "convolutions", "form": self.convolutions})
        if self.attention_blocks > 1:
            records.append({"name": "attention_in_blocks", "blocks": self.attention_blocks})
        return records


PLAIN = Form()  #: as the reference has it


def rewrite(model: AutoencoderKL, form: Form) -> AutoencoderKL:
    """The model in the given form: the same function, but for rounding."""
    if form.last_block == "lean":
        model = slim_last_block(model)
    model = fold_upsample(model, form.upsample)
    if form.norm == "rows":
        model = use_row_norms(model)
    if form.convolutions == "winograd":
        model = use_winograd(model)
    return use_portable_attention(model, form.attention_blocks)


def fitted(form: Form, model: AutoencoderKL) -> Form:
    """The form less what changes nothing in this model: what its manifest is to tell of."""
    if not any(wide_convolutions(model)):
        form = form._replace(convolutions="direct")
    return form if _has_lean_form(model) else form._replace(last_block="plain")


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


# The last block ---------------------------------------------------------------------------------------------------


class LeanUpsample(nn.Module):
    """[B, C, H, W] -> (parts of the upsampled map, each [B, C / n, 2*H, 2*W]; the shortcut [B, Cout, 2*H, 2*W])."""

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
    """A resnet that is given its input in parts, and its shortcut: what `LeanUpsample` gives -> [B, Cout, H, W]."""

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


def slim_last_block(model: AutoencoderKL) -> AutoencoderKL:
    """Compute the first resnet of the decoder's last block without ever holding its input twice.

    The peak of a decoder's memory lies there: the upsampled map, twice as wide as what follows, is kept for the
    shortcut while its normalised copy is convolved. Two identities, exact but for rounding, take that apart:

    - a 1x1 convolution (the shortcut) behind a convolution (the upsampling's) is one convolution, whose weights are
      their product. It reads the map in front of the upsampling, a quarter of the size, and the large one is freed as
      soon as it is normalised. The price is a convolution instead of a point-wise one, 2-3% of all multiplications;
    - groups of channels do not see each other before `conv1`, which adds up what each gives: a quarter of the channels
      are upsampled, normalised and freed, then the next. (Halves need more: 1.75 GB where quarters need 1.49, in
      OpenVINO in bf16 at 1024 x 1024.)

    A model whose last block has no such shortcut is left as it is.
    """
    model = copy.deepcopy(model)
    if not _has_lean_form(model):
        return model
    blocks = cast(Any, model.decoder.up_blocks)
    resnet = blocks[-1].resnets[0]
    parts = next(count for count in (4, 2, 1) if resnet.norm1.num_groups % count == 0)
    blocks[-2].upsamplers[0] = LeanUpsample(blocks[-2].upsamplers[0].conv, resnet.conv_shortcut, parts)
    blocks[-1].resnets[0] = LeanResnet(resnet, parts)
    return model


def _has_lean_form(model: AutoencoderKL) -> bool:
    blocks = cast(Any, model.decoder.up_blocks)
    return len(blocks) > 1 and blocks[-1].resnets[0].conv_shortcut is not None
