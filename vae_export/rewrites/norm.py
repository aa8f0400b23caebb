"""Group norms by rows: the same sums in an order that CPU runtimes compute without changing the layout."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from vae_export.families.base import Model
from vae_export.rewrites.attention import use_portable_attention
from vae_export.rewrites.operators import row_norm


class RowNorm(nn.GroupNorm):
    """GroupNorm of [B, C, H, W] by rows: see `operators.row_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, row_norm(x, self.weight, self.bias, self.num_groups, self.eps))


def use_row_norms(model: Model) -> Model:
    """Replace every GroupNorm by `RowNorm`. Attention must already take its norm on images: `PortableAttention`."""
    model = use_portable_attention(model)
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.__class__ = RowNorm
    return model
