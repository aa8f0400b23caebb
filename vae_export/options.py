"""What an export is asked for: the choices that `export_bundle`, `tune_bundle` and the command line share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtimes.manifest import Engine

if TYPE_CHECKING:
    from vae_export.rewrites.form import Form


@dataclass(frozen=True)
class ExportOptions:
    """The choices of one export; each is a keyword argument of `export_bundle` as well."""

    #: what is built: one of `vae_export.targets.TARGETS`
    target: str = "onnx"
    #: fp32, fp16, bf16 or int8; None is the target's default
    precision: str | None = None
    #: of inputs and outputs: "fp32", or "same" as the precision
    io_precision: str = "fp32"
    #: of images: "float" is [B, C, H, W] in [-1, 1]; "uint8" is pixels [B, H, W, C], converted inside of the graphs
    io: str = "float"
    #: whether activations are divided by powers of two, exactly, so that half precision cannot overflow
    rescale: bool = True
    #: directory of the photographs that activations are measured on; None: the embedded ones
    calibrate: str | Path | None = None
    #: graph -> the form that it is written in; None: the target's own choice
    forms: Mapping[str, Form] | None = None
    #: a record for the manifest of how `forms` were chosen
    tuning: Mapping[str, Any] | None = None
    #: for which GPUs and shapes engines are built, as `Target.plan` gives it; None: its default
    engine: Engine | None = None
    #: whether the bundle also holds both graphs cut into steps, for seamless tiling; it takes twice the space
    tileable: bool = False
    #: whether the graphs are compared with the model before the bundle is written
    run_validation: bool = True
    #: whether an existing bundle is replaced, in one step
    overwrite: bool = False
