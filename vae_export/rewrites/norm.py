"""GroupNorm by rows: the same sums in an order that lets CPU runtimes keep their memory layout."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from vae_export.families.base import Model
from vae_export.rewrites.attention import use_portable_attention
from vae_export.rewrites.operators import row_norm


class RowNorm(nn.GroupNorm):
    """GroupNorm of [B, C, H, W], computed by `operators.row_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, row_norm(x, self.weight, self.bias, self.num_groups, self.eps))


def use_row_norms(model: Model) -> Model:
    """Return a copy of the model with every GroupNorm replaced by `RowNorm`.

    Attention becomes `PortableAttention`, which applies its norm to [B, C, H, W].
    """
    model = use_portable_attention(model)
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.__class__ = RowNorm
    return model
