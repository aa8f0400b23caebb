"""Build TensorRT plans from ONNX graphs, and rebuild the plans of a bundle.

Works without PyTorch, because plans are rebuilt on the machines that run them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from runtimes import Bundle
from runtimes.errors import BackendUnavailable, CompatibilityError, ConfigError
from runtimes.manifest import Engine, GraphSpec
from runtimes.names import GRAPHS, Graph
from runtimes.progress import Progress, no_progress
from runtimes.tensorrt.builder import build_plan, check_gpus
from runtimes.tensorrt.cuda import Cuda
from runtimes.tensorrt.flavours import load_flavour, system
from runtimes.tensorrt.profiles import DEFAULT, Profile
from runtimes.tensorrt.runtime import job_of
from vae_export.bundle import check_output, write_bundle

PLAN_FILE = "model.plan"
ONNX_FILE = "model.onnx"  #: the typed graph beside the plan, from which the plan can be rebuilt on another machine
NO_GPU = "no NVIDIA GPU is here to run the plan; run `vae-export validate` where there is one"


def present_gpu() -> Cuda | None:
    """Return the first GPU of this machine, or None."""
    with suppress(BackendUnavailable):
        return Cuda(0)
    return None


def plan_engine(target: str, profiles: Sequence[Profile] = (), gpus: Sequence[str] = ()) -> Engine:
    """Return the description of the engines to build: TensorRT version, GPUs and shapes.

    The default of `gpus` is the GPU of this machine; for TensorRT-RTX on a machine without GPU, all supported ones.

    Raises `BackendUnavailable` if TensorRT, or a GPU that it needs, is missing, and `ConfigError` if `gpus` cannot be
    built for.
    """
    flavour = load_flavour(target)
    present = present_gpu()
    if target == "tensorrt":
        if gpus:
            raise ConfigError("tensorrt builds for the GPU that is present; --gpu is for --to tensorrt-rtx")
        if present is None:
            raise BackendUnavailable(
                "--to tensorrt builds and times kernels on the GPU that will run them, and none can be used here; "
                "--to tensorrt-rtx builds for GeForce and RTX cards without one"
            )
    elif gpus:
        check_gpus(flavour, gpus)
    chosen = tuple(gpus) or (() if present is None else (present.compute_capability(),))
    return Engine(target, flavour.version, chosen, system(), tuple(profiles) or (DEFAULT,))


def build_graph(
    engine: Engine, graph: Graph, spec: GraphSpec, onnx: Path, factor: int, progress: Progress = no_progress
) -> GraphSpec:
    """Build the plan of a graph beside its ONNX file. Returns the spec with the plan as its file."""
    plan = build_plan(onnx.read_bytes(), job_of(engine, graph, spec, factor), graph, progress)
    (onnx.parent / PLAN_FILE).write_bytes(plan)
    return replace(spec, file=PLAN_FILE)


def rebuild_bundle(
    path: str | Path, out: str | Path, *, overwrite: bool = False, progress: Progress = no_progress
) -> Bundle:
    """Rebuild the plans of a TensorRT bundle for this machine, from the ONNX graphs in the bundle.

    With `overwrite`, `out` may be the bundle itself. The profiles are kept. The validation record is dropped, because
    it describes other plans. Raises `CompatibilityError` for a bundle without plans, and the errors of `export_bundle`.
    """
    source = Bundle(path)
    manifest = source.manifest
    if manifest.engine is None:
        raise CompatibilityError(f"{path} is a bundle of {manifest.target}, which has no plans to rebuild")
    check_output(out, overwrite)
    engine = plan_engine(manifest.target, manifest.engine.profiles)
    with write_bundle(out, overwrite=overwrite) as writer:
        graphs = {}
        for name in manifest.files:
            if not name.endswith(PLAN_FILE):
                (writer.directory / name).parent.mkdir(parents=True, exist_ok=True)
                (writer.directory / name).write_bytes(source.read(name))
        for graph in GRAPHS:
            onnx = writer.directory / f"vae_{graph}" / ONNX_FILE
            if not onnx.exists():
                raise CompatibilityError(f"{path} does not hold {onnx.relative_to(writer.directory)} to build from")
            spec = build_graph(engine, graph, manifest.graphs[graph], onnx, manifest.graph_space.factor, progress)
            graphs[graph] = replace(spec, file=f"vae_{graph}/{PLAN_FILE}")
        writer.write_manifest(
            replace(
                manifest,
                files=writer.entries(),
                graphs=graphs,
                engine=engine,
                tools={**manifest.tools, **tool_versions(engine)},
                validation={"verdict": "skipped", "reason": "the plans were built again; run `vae-export validate`"},
            )
        )
        return writer.finish()


def tool_versions(engine: Engine) -> dict[str, str]:
    """Return {name: version} of the TensorRT that builds the engine."""
    return {engine.flavour: engine.version}
