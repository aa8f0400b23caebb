"""Write a model in a form: the rewrites that a `Form` names, one after the other."""

from __future__ import annotations

from vae_export.families import family_of
from vae_export.families.base import Model, ReferenceVae
from vae_export.rewrites.attention import use_portable_attention
from vae_export.rewrites.form import Form
from vae_export.rewrites.last_block import has_lean_form, slim_last_block
from vae_export.rewrites.norm import use_row_norms
from vae_export.rewrites.upsample import fold_upsample
from vae_export.rewrites.winograd import use_winograd, wide_convolutions


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
