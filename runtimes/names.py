"""Closed sets of names that both packages use, as types that mypy checks.

Targets, backends and families are open sets, because more can be registered: they are plain strings, and their
registries check them at use.
"""

from __future__ import annotations

from typing import Literal, get_args

Graph = Literal["encoder", "decoder"]
GRAPHS: tuple[Graph, ...] = get_args(Graph)

Precision = Literal["fp32", "fp16", "bf16", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

Io = Literal["float", "uint8"]  #: of images: [B, C, H, W] in [-1, 1], or pixels [B, H, W, C]
IOS: tuple[Io, ...] = get_args(Io)

FP16_LARGEST = 65504.0  #: the largest finite number of half precision
