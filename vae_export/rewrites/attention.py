"""Attention computed with MatMul and Softmax only, optionally in blocks of queries."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor

from vae_export.families.autoencoder_kl import Attention
from vae_export.families.base import Model
from vae_export.rewrites.operators import attend_in_blocks


class PortableAttention(Attention):
    """Attention computed with MatMul and Softmax only, in `blocks` blocks of queries.

    Every runtime has fast kernels for these two operators. TensorRT rejects the fused ONNX operator (Attention-23) at a
    head size of 512, and ONNX Runtime computes it more slowly on the CPU.
    """

    blocks = 1

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q * q.shape[-1] ** -0.5
        if self.blocks == 1:
            return torch.matmul(torch.softmax(torch.matmul(q, k.transpose(1, 2)), dim=-1), v)
        return cast(Tensor, attend_in_blocks(q, k, v, self.blocks))

    def forward(self, x: Tensor) -> Tensor:
        # Apply the norm to [B, C, H, W], before flattening, like all other norms, so that one rewrite covers them all.
        b, c, h, w = x.shape
        positions = self.group_norm(x).view(b, c, h * w).transpose(1, 2)
        out = self.to_out[0](self.attend(*self.project(positions)))
        return cast(Tensor, out.transpose(1, 2).reshape(b, c, h, w) + x)


def use_portable_attention(model: Model, blocks: int = 1) -> Model:
    """Return a copy of the model with attention as softmax(q k^T / sqrt(C)) v, one of `blocks` query blocks at a time.

    This replaces the fused attention kernel by its definition.
    """
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, Attention):
            module.__class__ = PortableAttention
            cast(PortableAttention, module).blocks = blocks
    return model
