"""The target `onnx`: one ONNX file per graph, and per step of seamless tiling."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, cast

from runtimes.manifest import Step
from runtimes.names import GRAPHS, Graph
from vae_export.families.autoencoder_kl import KLNetwork
from vae_export.families.base import ReferenceVae
from vae_export.rewrites.form import Form
from vae_export.rewrites.tileable import TileableExport
from vae_export.targets.base import Export, Target, Written
from vae_export.targets.onnx_graphs import write_onnx


class OnnxTarget(Target):
    """ONNX graphs, for ONNX Runtime and every other program that reads ONNX."""

    name = "onnx"
    graph_file = "model.onnx"
    # The fastest forms on the CPU of the measurements in docs/speed.md. Half precision also uses norms by rows, because
    # ONNX Runtime's GroupNormalization subtracts squares and returns NaN in fp16 for an image of a single colour.
    forms: ClassVar = {
        "fp32": Form(upsample="conv", norm="rows", last_block="lean", attention_blocks=16),
        "fp16": Form(upsample="conv", norm="rows", attention_blocks=16),
        "bf16": Form(upsample="conv", norm="rows", attention_blocks=16),
    }
    io_precisions = ("fp32", "same")
    tileable = True

    def write(self, export: Export, graph: Graph, path: Path) -> Written:
        return Written(write_onnx(export, graph, path))

    def reason_not_run(self, precision: str) -> str | None:
        if precision == "bf16":
            return "ONNX Runtime has no bfloat16 kernels on the CPU; run `vae-export validate` on a GPU"
        return None

    def write_steps(self, export: Export, divided: ReferenceVae, directory: Path) -> Mapping[str, tuple[Step, ...]]:
        steps = TileableExport(cast(KLNetwork, divided), directory, export.precision, export.form("decoder"))
        return {graph: steps.steps(graph) for graph in GRAPHS}
