"""Attention from MatMul and Softmax alone, in blocks of queries."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor

from vae_export.families.autoencoder_kl import Attention
from vae_export.families.base import Model
from vae_export.rewrites.operators import attend_in_blocks


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


def use_portable_attention(model: Model, blocks: int = 1) -> Model:
    """Replace the fused attention kernel by its definition, softmax(q k^T / sqrt(C)) v, `blocks` of queries in turn."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, Attention):
            module.__class__ = PortableAttention
            cast(PortableAttention, module).blocks = blocks
    return model
