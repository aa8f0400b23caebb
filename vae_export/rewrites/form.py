"""Forms: combinations of exact rewrites that make a model fast, or small in memory, on a backend.

Every rewrite returns a new model and leaves its argument unchanged. Its docstring explains why it is exact, except for
rounding. `Form` selects rewrites.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from vae_export.families import family_of
from vae_export.families.base import Model, ReferenceVae
from vae_export.rewrites.attention import use_portable_attention
from vae_export.rewrites.last_block import has_lean_form, slim_last_block
from vae_export.rewrites.norm import use_row_norms
from vae_export.rewrites.upsample import fold_upsample
from vae_export.rewrites.winograd import use_winograd, wide_convolutions

UPSAMPLES = ("none", "conv", "deconv")
NORMS = ("group", "rows")
LAST_BLOCKS = ("plain", "lean")
CONVOLUTIONS = ("direct", "winograd")


class Form(NamedTuple):
    """A selection of equivalent rewrites for a graph. The fastest selection depends on the backend."""

    upsample: str = "none"  #: one of UPSAMPLES, see `fold_upsample`
    norm: str = "group"  #: one of NORMS, see `use_row_norms`
    last_block: str = "plain"  #: one of LAST_BLOCKS, see `slim_last_block`
    attention_blocks: int = 1  #: see `use_portable_attention`
    convolutions: str = "direct"  #: one of CONVOLUTIONS, see `winograd.use_winograd`

    def records(self) -> list[dict[str, Any]]:
        """Return the manifest records of the rewrites in this form."""
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


PLAIN = Form()  #: no rewrites: the form of the reference model


def rewrite(model: Model, form: Form) -> Model:
    """Return the model in the given form. It computes the same function, except for rounding."""
    if form.last_block == "lean":
        model = slim_last_block(model)
    model = fold_upsample(model, form.upsample)
    if form.norm == "rows":
        model = use_row_norms(model)
    if form.convolutions == "winograd":
        model = use_winograd(model)
    return use_portable_attention(model, form.attention_blocks)


def fitted(form: Form, model: ReferenceVae) -> Form:
    """Return the form without rewrites that the family does not allow or that do not change this model."""
    allowed = family_of(model).rewrites
    if "winograd" not in allowed or not any(wide_convolutions(model)):
        form = form._replace(convolutions="direct")
    if "last_block" not in allowed or not has_lean_form(model):
        form = form._replace(last_block="plain")
    if "upsample" not in allowed:
        form = form._replace(upsample="none")
    if "norm" not in allowed:
        form = form._replace(norm="group")
    if "attention" not in allowed:
        form = form._replace(attention_blocks=1)
    return form
