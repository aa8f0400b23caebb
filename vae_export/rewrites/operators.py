"""Custom operators of exported graphs: their computation in PyTorch and their translation to ONNX.

If PyTorch traced these computations operation by operation, their symbolic sizes would take most of the export time.
As custom operators they trace at no cost, and this module decides which ONNX nodes they become.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnx import TensorProto
from onnxscript import opset22 as op
from torch import Tensor
from torch.nn import functional as F

FLOAT, FLOAT16 = 1, 10  #: values of onnx.TensorProto.DataType

# Attention in blocks ----------------------------------------------------------------------------------------------


@torch.library.custom_op("vae_export::attend_in_blocks", mutates_args=())
def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, blocks: int) -> Tensor:
    """Return softmax(q k^T) v for [B, HW, C], computed in `blocks` blocks of queries.

    At most HW * ceil(HW / blocks) scores exist at a time. The result is exact, because each softmax runs over the keys
    of a single query, so blocks of queries are independent.
    """
    return attend_in_turn(q, k, v, -(-q.shape[1] // blocks))


def attend_in_turn(q: Tensor, k: Tensor, v: Tensor, queries: int) -> Tensor:
    """Return softmax(q k^T) v for [B, HW, C], `queries` queries at a time, from observable PyTorch operations."""
    keys = k.transpose(1, 2)
    blocks = (q[:, start : start + queries] for start in range(0, q.shape[1], queries))
    parts = [torch.matmul(torch.softmax(torch.matmul(block, keys), dim=-1), v) for block in blocks]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


@attend_in_blocks.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, blocks: int) -> Tensor:
    return torch.empty_like(q)


def _attend_in_blocks(q: Any, k: Any, v: Any, blocks: int) -> Any:
    """Translate `attend_in_blocks` to ONNX as a fixed number of blocks, whose size depends on the size of the image.

    The blocks are unrolled, because runtimes neither plan the memory of a Loop nor fuse its operations. The queries are
    padded with zeros to a multiple of the block size, so that no block is empty if there are fewer positions than
    blocks.
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
            # min(weights, 1) does not change the result. It prevents the attention fusion of TensorRT-RTX 1.7, which
            # in half precision fails to build where blocks share their keys and the image size is fixed.
            one: Any = op.Constant(value_float=1.0)
            weights = op.Min(weights, op.CastLike(one, q))
        parts.append(op.MatMul(weights, v))
    return op.Slice(op.Concat(*parts, axis=1), none, positions, axis)


# GroupNorm by rows ------------------------------------------------------------------------------------------------


@torch.library.custom_op("vae_export::row_norm", mutates_args=())
def row_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """Return GroupNorm of x [B, C, H, W], computed from the means and the L2 norms of rows.

    The mean of a group is the mean of its row means. The variance is computed from the L2 norms of the rows after the
    mean is subtracted. A scale and a shift per channel follow. The reductions run over W, and nothing is reshaped
    until H and W are 1. A CPU runtime can therefore keep its channels-last or blocked layout, where GroupNormalization
    requires two reorders of the whole tensor, and can merge scale, shift and activation into one pass over x.

    Rounding: sums over rows of sums within rows are about as accurate as pairwise sums. (The mean square minus the
    squared mean would save a pass, but loses all digits if the image has a single colour.) Statistics, scale and shift
    are fp32 for every dtype of x, and the result is rounded to that dtype once. In fp16, where the norm of a row could
    overflow, the whole computation is fp32. In bf16 the subtracted mean is rounded, so that the maps stay bf16, and the
    error that this adds to the variance is subtracted again.
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
    # In a constant group, rounding may make the variance slightly negative.
    variance = F.relu(variance - (mean - rounded.float()) ** 2)
    scale = (weight.float().reshape(1, *grouped[1:]) / torch.sqrt(variance + eps)).reshape(batch, channels, 1, 1)
    shift = bias.float().reshape(1, channels, 1, 1) - of_channels(mean) * scale
    return (x.float() * scale + shift).to(x.dtype)


@row_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    return torch.empty_like(x)


def _row_norm(x: Any, weight: Any, bias: Any, groups: int, eps: float) -> Any:
    def fp32(part: Any) -> Any:  # `part` has the dtype of x
        return part if x.dtype == FLOAT else op.Cast(part, to=FLOAT)

    def fp32_row(part: Any) -> Any:  # if x is fp16, row statistics are already fp32
        return part if x.dtype == FLOAT16 else fp32(part)

    def group_mean(part: Any) -> Any:  # [B, C, 1, 1] -> [B, groups, 1]
        return op.ReduceMean(op.Reshape(part, _ints(0, groups, -1)), _ints(2), keepdims=1)

    channels = x.shape[1]
    values = fp32(x)
    row_means = fp32_row(op.ReduceMean(values if x.dtype == FLOAT16 else x, _ints(3), keepdims=1))
    size = op.Shape(x, start=2, end=4)
    height = op.Cast(op.Gather(size, _ints(0)), to=FLOAT)
    area = op.Cast(op.ReduceProd(size, keepdims=1), to=FLOAT)
    # A sum over the row means, not a mean: OpenVINO would merge two means into one over all pixels, of half the digits.
    mean = group_mean(op.Div(op.ReduceSum(row_means, _ints(2), keepdims=1), height))
    ones = op.Constant(
        value=TensorProto(data_type=FLOAT, dims=[1, 1, channels // groups], float_data=[1.0] * (channels // groups))
    )

    def of_channels(part: Any) -> Any:  # [B, groups, 1] -> [B, C, 1, 1]
        return op.Reshape(op.Mul(part, ones), _ints(0, channels, 1, 1))

    if x.dtype in (FLOAT, FLOAT16):
        centred, rest = op.Sub(values, of_channels(mean)), None
    else:
        # Round the means per group, not per channel: OpenVINO would fuse that with the map into one slow loop.
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


#: custom operator -> its ONNX translation, for the `custom_translation_table` of torch.onnx.export
TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.vae_export.attend_in_blocks.default: _attend_in_blocks,
    torch.ops.vae_export.row_norm.default: _row_norm,
}
