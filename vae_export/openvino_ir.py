"""Model -> OpenVINO IR, through its ONNX graphs: openvino_model.xml and openvino_model.bin."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtimes.bundle import GraphSpec
from runtimes.errors import BackendUnavailable, ConfigError
from vae_export.model import AutoencoderKL
from vae_export.onnx_graphs import export_onnx
from vae_export.rewrite import PLAIN, Form

if TYPE_CHECKING:
    import openvino

# Of the ONNX graph that is read. fp16 is stored: OpenVINO computes with what the device is best at. bf16 is typed,
# so that which values are rounded to bf16 and which stay fp32 (the statistics of the norms) is said by the graph.
TYPED_AS = {"fp32": "fp32", "fp16": "fp32", "bf16": "bf16", "int8": "fp32"}


def export_ir(
    model: AutoencoderKL,
    graph: str,
    path: Path,
    *,
    precision: str = "fp32",
    io_precision: str = "fp32",
    form: Form = PLAIN,
) -> GraphSpec:
    """Write one graph (`encoder` or `decoder`) as IR: `path` (.xml), and the weights beside it (.bin).

    Names, shapes and types of input and output are those of the ONNX graphs, float32 at any precision.
    """
    if io_precision != "fp32":
        raise ConfigError("OpenVINO bundles take and give float32 (--io-precision fp32)")
    ir, spec = read_graph(model, graph, precision=precision, form=form)
    save_ir(ir, path, precision)
    return replace(spec, file=path.name)


def read_graph(model: AutoencoderKL, graph: str, *, precision: str, form: Form) -> tuple[openvino.Model, GraphSpec]:
    """A graph as an OpenVINO model in memory, and its input and output."""
    openvino = import_openvino()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.onnx"
        spec = export_onnx(model, graph, path, precision=TYPED_AS[precision], form=form)
        # Not openvino.convert_model: it does the same for a file, and reports each use to its makers.
        ir = openvino.Core().read_model(path.read_bytes())
    return ir, spec


def save_ir(ir: openvino.Model, path: Path, precision: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    import_openvino().save_model(ir, path, compress_to_fp16=precision == "fp16")


def import_openvino() -> Any:
    try:
        import openvino
    except ModuleNotFoundError:
        raise BackendUnavailable("OpenVINO is not installed: pip install 'vae-export[openvino]'") from None
    return openvino


def tool_versions() -> dict[str, str]:
    return {"openvino": import_openvino().__version__}
