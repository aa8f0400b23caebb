"""Operators that graphs are written with: what each computes in PyTorch, and how it is spelt in ONNX.

Traced operation by operation, their symbolic sizes take most of an export's time; as operators of their own they cost
nothing, and what is written to the graph is decided here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnx import TensorProto
from onnxscript import opset22 as op
from torch import Tensor
from torch.nn import functional as F

FLOAT, FLOAT16 = 1, 10  #: onnx.TensorProto's numbers

# Attention in blocks ----------------------------------------------------------------------------------------------


@torch.library.custom_op("vae_export::attend_in_blocks", mutates_args=())
def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, blocks: int) -> Tensor:
    """softmax(q k^T) v for [B, HW, C], a block of the queries at a time: HW * HW / blocks scores at once.

    A softmax runs over the keys of one query: blocks of queries do not see each other.
    """
    return attend_in_turn(q, k, v, -(-q.shape[1] // blocks))


def attend_in_turn(q: Tensor, k: Tensor, v: Tensor, queries: int) -> Tensor:
    """softmax(q k^T) v for [B, HW, C], so many of the queries at a time, as PyTorch operations that can be watched."""
    keys = k.transpose(1, 2)
    blocks = (q[:, start : start + queries] for start in range(0, q.shape[1], queries))
    parts = [torch.matmul(torch.softmax(torch.matmul(block, keys), dim=-1), v) for block in blocks]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


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
        weights = op.Softmax(op.MatMul(op.Slice(q, start, end, axis), keys), axis=-1)
        if q.dtype != FLOAT:
            # Changes nothing, but for TensorRT-RTX 1.7: what it takes for half-precision attention it fuses, and where
            # blocks share their keys and the size of the image is fixed, its build fails over that.
            one: Any = op.Constant(value_float=1.0)
            weights = op.Min(weights, op.CastLike(one, q))
        parts.append(op.MatMul(weights, v))
    return op.Slice(op.Concat(*parts, axis=1), none, positions, axis)


# GroupNorm by rows ------------------------------------------------------------------------------------------------


@torch.library.custom_op("vae_export::row_norm", mutates_args=())
def row_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """GroupNorm of [B, C, H, W] from the means and the L2 norms of rows.

    The mean of a group comes from those of its rows, the variance from the norms of the rows of what is left when the
    mean is subtracted; then a scale and a shift for each channel. The reductions run over W, and nothing is reshaped
    until H and W are 1: a CPU runtime stays in its channels-last or blocked layout, where GroupNormalization costs it
    two reorders of the whole tensor, and scale, shift and activation become one pass over x.

    Rounding: sums over a row, then over rows, keep about as many digits as a pairwise sum. (The mean square less the
    squared mean would save a pass, and has no digits left where a picture is of one colour.) Statistics, scale and
    shift are fp32 whatever x is, and so is the result until it is rounded once; in fp16, where the norm of a row could
    overflow, all of it is. In bf16 the mean that is subtracted is rounded, so that the maps stay bf16, and what that
    adds to the variance is taken off again.
    """
    batch, channels, height, width = x.shape
    grouped = (batch, groups, channels // groups)

    def of_channels(part: Tensor) -> Tensor:  # [B, groups, 1] -> [B, C, 1, 1]
        return part.expand(grouped).reshape(batch, channels, 1, 1)

    values = x.float() if x.dtype == torch.float16 else x
    row_means = values.mean(3, keepdim=True).float()
    mean = (row_means.sum(2) / height).reshape(grouped).mean(2, keepdim=True)
    rounded = mean.to(values.dtype)
    centred = values - of_channels(rounded)
    row_norms = torch.linalg.vector_norm(centred, dim=3, keepdim=True).float()
    variance = ((row_norms * row_norms).sum(2) / (height * width)).reshape(grouped).mean(2, keepdim=True)
    # Where a group is constant, rounding may leave less than nothing.
    variance = F.relu(variance - (mean - rounded.float()) ** 2)
    scale = (weight.float().reshape(1, *grouped[1:]) / torch.sqrt(variance + eps)).reshape(batch, channels, 1, 1)
    shift = bias.float().reshape(1, channels, 1, 1) - of_channels(mean) * scale
    return (x.float() * scale + shift).to(x.dtype)


@row_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    return torch.empty_like(x)


def _row_norm(x: Any, weight: Any, bias: Any, groups: int, eps: float) -> Any:
    def fp32(part: Any) -> Any:  # of what has the type of x
        return part if x.dtype == FLOAT else op.Cast(part, to=FLOAT)

    def fp32_row(part: Any) -> Any:  # in fp16 they are fp32 already
        return part if x.dtype == FLOAT16 else fp32(part)

    def group_mean(part: Any) -> Any:  # [B, C, 1, 1] -> [B, groups, 1]
        return op.ReduceMean(op.Reshape(part, _ints(0, groups, -1)), _ints(2), keepdims=1)

    channels = x.shape[1]
    values = fp32(x)
    row_means = fp32_row(op.ReduceMean(values if x.dtype == FLOAT16 else x, _ints(3), keepdims=1))
    size = op.Shape(x, start=2, end=4)
    height = op.Cast(op.Gather(size, _ints(0)), to=FLOAT)
    area = op.Cast(op.ReduceProd(size, keepdims=1), to=FLOAT)
    # Sums, not means, along the rows: OpenVINO would merge two means into one over all pixels, of half the digits.
    mean = group_mean(op.Div(op.ReduceSum(row_means, _ints(2), keepdims=1), height))
    ones = op.Constant(
        value=TensorProto(data_type=FLOAT, dims=[1, 1, channels // groups], float_data=[1.0] * (channels // groups))
    )

    def of_channels(part: Any) -> Any:  # [B, groups, 1] -> [B, C, 1, 1]
        return op.Reshape(op.Mul(part, ones), _ints(0, channels, 1, 1))

    if x.dtype in (FLOAT, FLOAT16):
        centred, rest = op.Sub(values, of_channels(mean)), None
    else:
        # For each group, not for each channel: beside the map, OpenVINO would make one slow loop of both.
        rounded = op.Cast(op.CastLike(mean, x), to=FLOAT)
        centred, rest = op.Sub(x, op.CastLike(of_channels(rounded), x)), op.Sub(mean, rounded)
    row_norms = fp32_row(op.ReduceL2(centred, _ints(3), keepdims=1))
    variance = group_mean(op.Div(op.ReduceSum(op.Mul(row_norms, row_norms), _ints(2), keepdims=1), area))
    if rest is not None:
        variance = op.Relu(op.Sub(variance, op.Mul(rest, rest)))
    mean = of_channels(mean)
    deviation = op.Sqrt(op.Add(variance, op.Constant(value_float=eps)))
    scale = op.Div(op.Reshape(fp32(weight), _ints(1, groups, -1)), deviation)
    scale = op.Reshape(scale, _ints(0, channels, 1, 1))
    shift = op.Sub(op.Reshape(fp32(bias), _ints(1, channels, 1, 1)), op.Mul(mean, scale))
    result = op.Add(op.Mul(values, scale), shift)
    return result if x.dtype == FLOAT else op.CastLike(result, x)


def _ints(*values: int) -> Any:
    return op.Constant(value_ints=list(values))


#: operator -> its ONNX, for torch.onnx.export
TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.vae_export.attend_in_blocks.default: _attend_in_blocks,
    torch.ops.vae_export.row_norm.default: _row_norm,
}
