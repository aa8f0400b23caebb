"""The target `openvino`: OpenVINO IR (openvino_model.xml, openvino_model.bin), converted from the ONNX graphs."""

from __future__ import annotations

import importlib
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from xml.etree import ElementTree

import numpy as np
import torch

from runtimes.errors import ConfigError
from runtimes.manifest import GraphSpec
from runtimes.names import Graph
from runtimes.progress import Progress
from vae_export.comparison import THRESHOLDS, worst_photo
from vae_export.families.base import ReferenceVae
from vae_export.options import ExportOptions
from vae_export.photos import HELD_OUT, crops, photographs
from vae_export.rewrites.form import PLAIN, Form
from vae_export.targets.base import Export, Target, Written
from vae_export.targets.int8 import import_nncf, quantize_ir, quantize_until
from vae_export.targets.onnx_graphs import export_onnx

if TYPE_CHECKING:
    import openvino

Array = np.ndarray[Any, Any]

#: precision -> precision of the ONNX graph that is converted. For fp16 only the weights are stored in fp16: OpenVINO
#: computes in the type that suits the device. For bf16 the graph is typed, so that it determines which values are
#: rounded to bf16 and which stay fp32 (the statistics of the norms).
TYPED_AS = {"fp32": "fp32", "fp16": "fp32", "bf16": "bf16", "int8": "fp32"}


def export_ir(
    model: ReferenceVae,
    graph: str,
    path: Path,
    *,
    precision: str = "fp32",
    io_precision: str = "fp32",
    io: str = "float",
    latents: str = "raw",
    form: Form = PLAIN,
) -> GraphSpec:
    """Write one graph, "encoder" or "decoder", as IR: `path` (.xml) and the weights beside it (.bin).

    Names and shapes of input and output are those of the ONNX graphs; dtypes are float32, or uint8 for pixels, at every
    precision. Raises `ConfigError` for unsupported options.
    """
    check_available(precision, io_precision)
    ir, spec = read_graph(model, graph, precision, form, io, latents)
    save_ir(ir, path, precision)
    return replace(spec, file=path.name)


def export_int8(
    model: ReferenceVae,
    graph: str,
    path: Path,
    *,
    form: Form,
    calibration: Sequence[Array],
    measure: Callable[[Callable[[Array], Array]], float] | None,
    minimum: float,
    latents: str = "raw",
) -> tuple[GraphSpec, list[str]]:
    """Write one graph with its convolutions in int8. Returns its spec and the layers kept in higher precision.

    `measure` maps the graph, as a function, to its quality, which must be at least `minimum`; as few layers as possible
    are kept in higher precision to reach it. Without `measure` all layers are quantized. Raises `NumericsError`, with
    the measurements, if the quality cannot be reached.
    """
    ir, spec = read_graph(model, graph, "int8", form, latents=latents)
    kept: list[str] = []
    if measure is None:
        ir = quantize_ir(ir, calibration)
    else:
        ir, kept, _ = quantize_until(ir, calibration, lambda candidate: measure(runnable(candidate)), minimum)
    save_ir(ir, path, "int8")
    return replace(spec, file=path.name), kept


def check_available(precision: str, io_precision: str) -> None:
    """Raise `ConfigError` for an unsupported `io_precision`, `BackendUnavailable` if a tool is missing."""
    if io_precision != "fp32":
        raise ConfigError(f"OpenVINO bundles take and give float32 (--io-precision fp32), not {io_precision!r}")
    import_openvino()
    if precision == "int8":
        import_nncf()


def read_graph(
    model: ReferenceVae, graph: str, precision: str, form: Form, io: str = "float", latents: str = "raw"
) -> tuple[openvino.Model, GraphSpec]:
    """Return a graph as an OpenVINO model in memory, and the spec of its input and output."""
    core = _runtime_module().shared_core()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.onnx"
        spec = export_onnx(model, graph, path, precision=TYPED_AS[precision], io=io, latents=latents, form=form)
        # Not openvino.convert_model: it does the same for a file, but sends telemetry.
        ir = core.read_model(path.read_bytes())
    return ir, spec


def runnable(ir: openvino.Model) -> Callable[[Array], Array]:
    """Return an int8 graph as a function, computed on this CPU with the same settings as in `runtimes.openvino`."""
    module = _runtime_module()
    core = module.shared_core()
    hint = module.precision_hint(core, "CPU", "int8")
    compiled: dict[tuple[int, ...], Any] = {}

    def run(x: Array) -> Array:
        if x.shape not in compiled:
            fixed = ir.clone()
            fixed.reshape(list(x.shape))
            compiled[x.shape] = core.compile_model(fixed, "CPU", {"INFERENCE_PRECISION_HINT": hint})
        result: Array = compiled[x.shape]([x])[0].copy()
        return result

    return run


def save_ir(ir: openvino.Model, path: Path, precision: str) -> None:
    """Write a graph as IR, with fp16 weights for precision "fp16", and with norm statistics marked to stay fp32."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _name_unnamed(ir)
    import_openvino().save_model(ir, path, compress_to_fp16=precision == "fp16")
    exact = statistics(ir)
    if exact:
        # On CPUs with AMX, OpenVINO computes fp32 graphs in bf16 by default. The attribute `precise` keeps these
        # operations in fp32 whichever program opens the graph. The Python API cannot set it.
        tree = ElementTree.parse(path)
        for layer in tree.iterfind("layers/layer"):
            if layer.get("name") in exact:
                info = layer.find("rt_info")
                if info is None:
                    info = ElementTree.Element("rt_info")
                    layer.insert(0 if layer.find("data") is None else 1, info)
                ElementTree.SubElement(info, "attribute", name="precise", version="0")
        tree.write(path, encoding="utf-8", xml_declaration=True)


def _name_unnamed(ir: openvino.Model) -> None:
    """Name unnamed operations by their position: OpenVINO's default numbers depend on what the process did before."""
    for place, operation in enumerate(ir.get_ordered_ops()):
        kind = operation.get_type_name()
        if re.fullmatch(rf"{kind}_\d+", operation.get_friendly_name()):
            operation.set_friendly_name(f"{kind}_{place}")


def statistics(ir: openvino.Model) -> set[str]:
    """Return the names of the operations on the statistics of `operators.row_norm`, after the row reductions.

    They subtract squares, so a variance much smaller than the mean would be lost in bf16. An operation belongs to them
    if all of its inputs depend only on row statistics, constants and sizes.
    """
    rows: set[str] = set()
    found: set[str] = set()
    neutral: set[str] = set()
    for node in ir.get_ordered_ops():
        name, kind = node.get_friendly_name(), node.get_type_name()
        inputs = {port.get_source_output().get_node().get_friendly_name() for port in node.inputs()}
        if not node.get_output_size() or not node.get_output_element_type(0).is_real() or inputs <= neutral:
            if kind != "Parameter":
                neutral.add(name)
        elif kind in ("ReduceMean", "ReduceL2") and not inputs & (rows | found):
            rows.add(name)
        elif inputs <= rows | found | neutral:
            found.add(name)
    return found


def import_openvino() -> Any:
    """Return the `openvino` module, imported without telemetry. Raises `BackendUnavailable` if it is missing."""
    return _runtime_module().ov


def _runtime_module() -> Any:
    return importlib.import_module("runtimes.openvino")


class OpenVinoTarget(Target):
    """OpenVINO IR, for CPUs and for Intel GPUs and NPUs."""

    name = "openvino"
    graph_file = "openvino_model.xml"
    # The fastest forms on the CPU of the measurements in docs/speed.md. OpenVINO divides attention into blocks itself.
    forms: ClassVar = {
        "fp32": Form(upsample="deconv", norm="rows", last_block="lean", convolutions="winograd"),
        "fp16": Form(upsample="deconv"),
        "bf16": Form(upsample="deconv", norm="rows", last_block="lean"),
        "int8": Form(upsample="deconv", norm="rows", last_block="lean"),
    }

    def check(self, model: ReferenceVae, options: ExportOptions) -> None:
        if options.io == "uint8" and options.precision == "int8":
            raise ConfigError(
                "int8 bundles take and give float32 images (--io float): their ranges are calibrated on those"
            )
        check_available(str(options.precision), options.io_precision)

    def write(self, export: Export, graph: Graph, path: Path) -> Written:
        form = export.form(graph)
        if export.precision != "int8":
            io, latents = export.options.io, export.options.latents
            spec = export_ir(export.exact, graph, path, precision=export.precision, io=io, latents=latents, form=form)
            return Written(spec)
        if "calibration" not in export.memo:
            export.memo["calibration"] = int8_calibration(
                export.written(export.model), export.options.calibrate, export.progress
            )
        spec, kept = export_int8(
            export.model,
            graph,
            path,
            form=form,
            calibration=export.memo["calibration"][graph],
            measure=worst_photo(export.cases, graph, "int8") if export.cases else None,
            minimum=THRESHOLDS["int8"].psnr_db,
            latents=export.options.latents,
        )
        return Written(spec, ({"name": "quantize", "graph": graph, "kept_in_higher_precision": kept},))

    def tool_versions(self, options: ExportOptions) -> dict[str, str]:
        return {"openvino": import_openvino().__version__}


INT8_SIDE, INT8_COUNT = 256, 15  #: side in pixels, and number, of the square crops for int8 calibration


@torch.no_grad()
def int8_calibration(
    model: ReferenceVae, calibrate: str | Path | None, progress: Progress
) -> Mapping[str, list[Array]]:
    """Return {graph: inputs for int8 calibration}: square crops of photographs, and their latents.

    The crops come from the user's photographs in `calibrate`, or from the embedded ones except HELD_OUT, on which the
    result is measured.
    """
    paths = [path for path in photographs(calibrate) if calibrate is not None or path.stem != HELD_OUT]
    side = INT8_SIDE - INT8_SIDE % model.latent_space.factor
    images: list[Array] = []
    latents: list[Array] = []
    for image in crops(paths, side, INT8_COUNT, model.config.in_channels):
        progress("Encoding photographs to calibrate on", len(images), INT8_COUNT)
        images.append(image.numpy())
        latents.append(model.encode_moments(image)[:, : model.latent_space.channels].numpy())
    return {"encoder": images, "decoder": latents}
