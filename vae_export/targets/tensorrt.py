"""The targets `tensorrt` and `tensorrt-rtx`: typed ONNX graphs and the engines that TensorRT builds from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from runtimes.bundle import Bundle
from runtimes.errors import BackendUnavailable
from runtimes.manifest import Engine
from runtimes.names import Graph
from runtimes.tensorrt.profiles import DEFAULT, Profile, checked, make_profile
from vae_export.comparison import Validator, bundle_validators
from vae_export.families import family_of
from vae_export.families.base import ReferenceVae
from vae_export.normalised import as_written
from vae_export.options import ExportOptions
from vae_export.rewrites.form import UPSAMPLES, Form
from vae_export.targets.base import Export, FormChoices, Target, Written
from vae_export.targets.engine_memory import Estimate, check_memory, estimate_memory, largest_fitting, memory_lines
from vae_export.targets.engines import NO_GPU, ONNX_FILE, build_graph, plan_engine, present_gpu, tool_versions
from vae_export.targets.onnx_graphs import write_onnx


class EngineTarget(Target):
    """Engines that TensorRT builds from typed ONNX graphs. The bundle contains the graphs as well."""

    graph_file = ONNX_FILE
    # These forms have not been timed on a GPU; `tune` finds the fastest ones there. Upsampling by four convolutions
    # builds in every precision, and norms by rows have the same accuracy in every runtime.
    forms: ClassVar = dict.fromkeys(("fp16", "fp32", "bf16"), Form(upsample="conv", norm="rows", attention_blocks=16))
    default_precision = "fp16"
    io_precisions = ("fp32", "same")
    takes_threads = False

    def plan(self, profiles: Sequence[Profile] = (), gpus: Sequence[str] = ()) -> Engine:
        return plan_engine(self.name, profiles, gpus)

    def check(self, model: ReferenceVae, options: ExportOptions) -> None:
        self.estimates(model, options)

    def estimates(self, model: ReferenceVae, options: ExportOptions) -> list[Estimate]:
        """Estimate the device memory of each graph and profile.

        Raises `OutOfMemoryError` if a profile does not fit the GPU of this machine.
        """
        engine, precision = options.engine or self.plan(), str(options.precision)
        factor = as_written(model, options.latents).latent_space.factor
        for profile in engine.profiles:
            checked(profile, factor)
        form, places = self.forms[precision], family_of(model).activation_places
        if places is None:
            return []
        estimates = estimate_memory(engine, model.config, places, form, precision)
        check_memory(estimates, largest_fitting(model.config, factor, places, form, precision), present_gpu())
        return estimates

    def notes(self, model: ReferenceVae, options: ExportOptions) -> list[str]:
        return memory_lines(self.estimates(model, options))

    def write(self, export: Export, graph: Graph, path: Path) -> Written:
        engine = export.options.engine
        assert engine is not None
        spec = write_onnx(export, graph, path)
        factor = export.written(export.model).latent_space.factor
        return Written(build_graph(engine, graph, spec, path, factor, export.progress))

    def reason_not_run(self, precision: str) -> str | None:
        return NO_GPU if present_gpu() is None else None

    def stand_ins(self, bundle: Bundle) -> Iterator[Validator]:
        """Yield the ONNX graphs of the plans, opened in ONNX Runtime, which needs no GPU but does not support bf16."""
        if bundle.manifest.precision != "bf16":
            files = {graph: f"{Path(spec.file).parent}/{ONNX_FILE}" for graph, spec in bundle.manifest.graphs.items()}
            graphs = {graph: replace(spec, file=files[graph]) for graph, spec in bundle.manifest.graphs.items()}
            yield from bundle_validators(bundle.seen_as(target="onnx", graphs=graphs, engine=None))

    def tool_versions(self, options: ExportOptions) -> dict[str, str]:
        return {} if options.engine is None else tool_versions(options.engine)

    def plan_for_size(self, height: int, width: int, factor: int) -> Engine:
        engine = self.plan([make_profile("1", str(height), str(width), opt=None, factor=factor)])
        if present_gpu() is None:
            raise BackendUnavailable(
                f"tuning {self.name} times engines on the GPU that will run them, and none can be used here"
            )
        return engine

    def with_common_sizes(self, engine: Engine | None, height: int, width: int) -> Engine | None:
        assert engine is not None
        tuned = () if DEFAULT.holds(1, height, width) else engine.profiles
        return replace(engine, profiles=(DEFAULT, *tuned))

    def choices(self, graph: Graph, precision: str) -> FormChoices:
        upsamples = tuple(
            kind for kind in UPSAMPLES if (kind, precision) != ("deconv", "bf16")
        )  # deconv in bf16 does not build
        return (
            super()
            .choices(graph, precision)
            ._replace(**({"upsamples": upsamples} if graph == "decoder" else {}), convolutions=("direct",))
        )


class TensorRtTarget(EngineTarget):
    """TensorRT: engines for the GPU that is present."""

    name = "tensorrt"


class TensorRtRtxTarget(EngineTarget):
    """TensorRT for RTX: engines for GeForce and RTX cards, built with or without one."""

    name = "tensorrt-rtx"
