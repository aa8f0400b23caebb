"""Operators that graphs are written with: what each computes in PyTorch, and how it is spelt in ONNX.

Traced operation by operation, their symbolic sizes take most of an export's time; as operators of their own they cost
nothing, and what is written to the graph is decided here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset22 as op
from torch import Tensor
from torch.nn import functional as F

# Attention in blocks ----------------------------------------------------------------------------------------------


@torch.library.custom_op("vae_export::attend_in_blocks", mutates_args=())
def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, blocks: int) -> Tensor:
    """softmax(q k^T) v for [B, HW, C], a block of the queries at a time: HW * HW / blocks scores at once.

    A softmax runs over the keys of one query: blocks of queries do not see each other.
    """
    parts = [
        torch.matmul(torch.softmax(torch.matmul(part, k.transpose(1, 2)), dim=-1), v) for part in q.chunk(blocks, dim=1)
    ]
    return torch.cat(parts, dim=1)


@attend_in_blocks.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, blocks: int) -> Tensor:
    return torch.empty_like(q)


def _attend_in_blocks(q: Any, k: Any, v: Any, blocks: int) -> Any:
    """Unrolled: a fixed number of blocks, of a size that follows the image's. Runtimes neither plan nor fuse a Loop.

    The last block is filled up with zeros, so that none is empty where there are fewer positions than blocks.
    """
    positions = op.Shape(q, start=1, end=2)
    size = op.Div(op.Add(positions, _ints(blocks - 1)), _ints(blocks))
    missing = op.Sub(op.Mul(size, _ints(blocks)), positions)
    none, axis = _ints(0), _ints(1)
    q = op.Pad(q, op.Concat(none, none, none, none, missing, none, axis=0))
    keys = op.Transpose(k, perm=[0, 2, 1])
    parts = []
    for block in range(blocks):
        start, end = (op.Mul(size, _ints(at)) for at in (block, block + 1))
        scores = op.MatMul(op.Slice(q, start, end, axis), keys)
        parts.append(op.MatMul(op.Softmax(scores, axis=-1), v))
    return op.Slice(op.Concat(*parts, axis=1), none, positions, axis)


# GroupNorm by rows ------------------------------------------------------------------------------------------------


@torch.library.custom_op("vae_export::row_norm", mutates_args=())
def row_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """GroupNorm of [B, C, H, W] from the mean and the L2 norm of every row, as a scale and a shift for each channel.

    With m the mean and q the mean square of a group, its variance is q - m^2, and (x - m) / deviation * weight + bias
    is x * scale + shift. The reductions run over W, and nothing is reshaped until H and W are 1: a CPU runtime stays in
    its channels-last or blocked layout, where GroupNormalization costs it two reorders of the whole tensor, and scale,
    shift and activation become one pass.

    Rounding: sums over a row, then over rows, keep about as many digits as a pairwise sum. q - m^2 loses those by which
    m^2 exceeds the variance, about as many as x itself has lost. All that follows the rows is fp32 whatever x is; in
    fp16 the norm of a row could overflow, so the rows too.
    """
    batch, channels, height, width = x.shape
    grouped = (batch, groups, channels // groups)
    values = x.float() if x.dtype == torch.float16 else x
    row_means = values.mean(3, keepdim=True).float()
    row_norms = torch.linalg.vector_norm(values, dim=3, keepdim=True).float()
    mean = (row_means.sum(2) / height).reshape(grouped).mean(2, keepdim=True)
    mean_square = ((row_norms * row_norms).sum(2) / (height * width)).reshape(grouped).mean(2, keepdim=True)
    # Where a group is constant, rounding may leave less than nothing.
    deviation = torch.sqrt(F.relu(mean_square - mean * mean) + eps)
    scale = weight.float().reshape(1, *grouped[1:]) / deviation
    shift = bias.float().reshape(1, *grouped[1:]) - mean * scale
    scale, shift = (part.reshape(batch, channels, 1, 1).to(x.dtype) for part in (scale, shift))
    return x * scale + shift


@row_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    return torch.empty_like(x)


def _row_norm(x: Any, weight: Any, bias: Any, groups: int, eps: float) -> Any:
    def fp32(part: Any) -> Any:  # of what has the type of x
        return part if x.dtype == FLOAT else op.Cast(part, to=FLOAT)

    values = fp32(x) if x.dtype == FLOAT16 else x
    rows = [reduce(values, _ints(3), keepdims=1) for reduce in (op.ReduceMean, op.ReduceL2)]
    row_means, row_norms = rows if x.dtype == FLOAT16 else map(fp32, rows)
    size = op.Shape(x, start=2, end=4)
    height = op.Cast(op.Gather(size, _ints(0)), to=FLOAT)
    area = op.Cast(op.ReduceProd(size, keepdims=1), to=FLOAT)
    # Sums, not means, along the rows: OpenVINO would merge two means into one over all pixels, of half the digits.
    means = op.Div(op.ReduceSum(row_means, _ints(2), keepdims=1), height)
    mean_squares = op.Div(op.ReduceSum(op.Mul(row_norms, row_norms), _ints(2), keepdims=1), area)
    # [B, C, 1, 1] -> [B, groups, C / groups] -> [B, groups, 1]
    mean, mean_square = (
        op.ReduceMean(op.Reshape(part, _ints(0, groups, -1)), _ints(2), keepdims=1) for part in (means, mean_squares)
    )
    variance = op.Relu(op.Sub(mean_square, op.Mul(mean, mean)))
    deviation = op.Sqrt(op.Add(variance, op.Constant(value_float=eps)))
    weight, bias = (op.Reshape(fp32(part), _ints(1, groups, -1)) for part in (weight, bias))
    scale = op.Div(weight, deviation)
    shift = op.Sub(bias, op.Mul(mean, scale))
    scale, shift = (op.CastLike(op.Reshape(part, _ints(0, x.shape[1], 1, 1)), x) for part in (scale, shift))
    return op.Add(op.Mul(x, scale), shift)


def _ints(*values: int) -> Any:
    return op.Constant(value_ints=list(values))


FLOAT, FLOAT16 = 1, 10  #: onnx.TensorProto's numbers

#: operator -> its ONNX, for torch.onnx.export
TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.vae_export.attend_in_blocks.default: _attend_in_blocks,
    torch.ops.vae_export.row_norm.default: _row_norm,
}
