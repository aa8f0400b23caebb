"""Facts about the precisions that bundles are computed in."""

from __future__ import annotations

FP16_LARGEST = 65504.0  #: the largest finite fp16
