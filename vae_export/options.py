"""The options of an export, shared by `export_bundle`, `tune_bundle` and the command line."""

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
    """The options of an export. Each is also a keyword argument of `export_bundle`."""

    #: the target: one of `vae_export.targets.TARGETS`
    target: str = "onnx"
    #: fp32, fp16, bf16 or int8; None means the default of the target
    precision: str | None = None
    #: precision of inputs and outputs: "fp32", or "same" for the value of `precision`
    io_precision: str = "fp32"
    #: format of images: "float" is [B, C, H, W] in [-1, 1]; "uint8" is pixels [B, H, W, C], converted by the graphs
    io: str = "float"
    #: latents that the graphs take and give: "raw" ones of the VAE, or "normalised" ones of the diffusion model
    latents: str = "raw"
    #: whether activations are divided by powers of two, which is exact, so that half precision does not overflow
    rescale: bool = True
    #: directory of the photographs on which activations are measured; None means the embedded ones
    calibrate: str | Path | None = None
    #: graph -> its form; None means the default of the target
    forms: Mapping[str, Form] | None = None
    #: record of how `forms` were chosen, for the manifest
    tuning: Mapping[str, Any] | None = None
    #: GPUs and shapes for which engines are built, from `Target.plan`; None means its default
    engine: Engine | None = None
    #: whether the bundle also contains both graphs cut into steps, for seamless tiling; this doubles its size
    tileable: bool = False
    #: whether the graphs are compared with the model before the bundle is written
    run_validation: bool = True
    #: whether an existing bundle is replaced, atomically
    overwrite: bool = False
