"""Forms: combinations of exact rewrites that make a model fast, or small in memory, on a backend.

Every rewrite returns a new model and leaves its argument unchanged. Its docstring explains why it is exact, except for
rounding. `Form` selects rewrites.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
