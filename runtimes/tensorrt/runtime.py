"""The TensorRT backends: run bundles of plans, and ONNX bundles whose plans are built when they are first opened.

They use `tensorrt` or `tensorrt_rtx` and cuda-python. Torch is not needed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from runtimes.arrays import answer_in_kind, array_module
from runtimes.base import VaeRuntime
from runtimes.bundle import Bundle
from runtimes.edge import check_count, device_name
from runtimes.errors import (
    BackendUnavailable,
    CompatibilityError,
    ConfigError,
    VaeError,
)
from runtimes.manifest import Engine, GraphSpec
from runtimes.names import GRAPHS, Graph
from runtimes.progress import Progress, no_progress
from runtimes.tensorrt.builder import BuildJob, build_plan
from runtimes.tensorrt.cuda import Cuda
from runtimes.tensorrt.device_arrays import on_device
from runtimes.tensorrt.execution import LoadedPlan, Settings
from runtimes.tensorrt.flavours import Flavour, load_flavour, system
from runtimes.tensorrt.plan_cache import DEFAULT_CACHE_BYTES, TIMING, PlanCache
from runtimes.tensorrt.profiles import DEFAULT, Profile, checked, parse_profile
from runtimes.tiling.tiler import Limits

SPECIALIZATIONS = ("lazy", "eager", "none")


class TensorRtVae(VaeRuntime):
    """A TensorRT bundle, or an ONNX bundle whose plans are built when it is first opened and kept in a cache.

    Safe for threads: `contexts` calls of a graph run at once, each with its own execution context, stream and memory;
    further calls wait. Memory is allocated for the shape of the call, not for the largest shape of the engine.

    `device` is "cuda" or "cuda:N". Arrays in host memory are copied to it. Torch tensors and CuPy arrays on the GPU are
    not copied, and the result is of the same kind on the same GPU.

    Only for ONNX bundles: `profiles` are the ranges of shapes to build for, as `Profile` or as text such as
    "1..4x512..1024x512..1024"; `cache_dir` is the directory of the plan cache (default: see
    `plan_cache.default_directory`), and `cache_bytes` limits its size.

    `cuda_graphs` captures the launches of a call and replays them when its shape recurs, for up to `max_graphs` shapes
    per context. TensorRT-RTX compiles kernels when they are first needed: `runtime_cache` names a file that keeps the
    compiled kernels, and `kernel_specialization` says when it compiles kernels for one shape: "lazy" (in the
    background), "eager" or "none".
    """

    backend = "tensorrt"
    default_device = "cuda"
    flavour: ClassVar[str] = "tensorrt"

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str = "cuda",
        profiles: Sequence[Profile | str] | None = None,
        contexts: int = 2,
        cuda_graphs: bool = False,
        max_graphs: int = 8,
        cache_dir: str | Path | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        runtime_cache: str | Path | None = None,
        kernel_specialization: str | None = None,
        check_finite: bool = False,
        progress: Progress = no_progress,
    ) -> None:
        super().__init__(bundle, check_finite=check_finite)
        for name, value in (("contexts", contexts), ("max_graphs", max_graphs), ("cache_bytes", cache_bytes)):
            check_count(name, value)
        if kernel_specialization is not None and kernel_specialization not in SPECIALIZATIONS:
            raise ConfigError(
                f"kernel_specialization is one of {', '.join(SPECIALIZATIONS)}, not {kernel_specialization!r}"
            )
        if self.flavour == "tensorrt" and (runtime_cache is not None or kernel_specialization is not None):
            raise ConfigError("runtime_cache and kernel_specialization are for backend tensorrt-rtx")
        self.device = device_name(device)
        index = _parse_device(device)
        flavour = load_flavour(self.flavour)
        cuda = Cuda(index)
        gpu = cuda.compute_capability()
        if bundle.manifest.engine is not None:
            if profiles is not None:
                raise ConfigError(
                    f"the plans of {bundle.path} are built: their profiles cannot be chosen; omit profiles"
                )
            engine = bundle.manifest.engine
            _check_fits(engine, flavour, gpu, bundle.path)
            plans = {graph: bundle.read(self.spec[graph].file) for graph in GRAPHS}
        else:
            engine = self._engine_of(flavour, gpu, profiles)
            plans = self._built(bundle, engine, PlanCache(cache_dir, cache_bytes), progress)
        self.profiles = engine.profiles
        settings = Settings(contexts, cuda_graphs, max_graphs, runtime_cache, kernel_specialization)
        self._engines: dict[str, LoadedPlan] = {}
        for graph in GRAPHS:
            pixels = self.graph_space.factor if graph == "decoder" else 1
            self._engines[graph] = LoadedPlan(
                flavour,
                cuda,
                graph,
                plans.pop(graph),
                self.spec[graph],
                engine.profiles,
                settings,
                pixels,
                self._make_room,
            )

    @classmethod
    def check_devices(cls) -> dict[str, str]:
        """Return {device: "works" or the reason why not}. `open_vae` checks whether a given plan runs there."""
        try:
            load_flavour(cls.flavour)
            return {"cuda": f"works ({Cuda(0).compute_capability()})"}
        except VaeError as error:
            return {"cuda": str(error)}

    def _engine_of(self, flavour: Flavour, gpu: str, profiles: Sequence[Profile | str] | None) -> Engine:
        """Return the description of the engine to build from an ONNX bundle on this machine."""
        factor = self.graph_space.factor
        chosen = [parse_profile(p, factor) if isinstance(p, str) else checked(p, factor) for p in profiles or [DEFAULT]]
        return Engine(flavour.name, flavour.version, (gpu,), system(), tuple(chosen))

    def _built(self, bundle: Bundle, engine: Engine, cache: PlanCache, progress: Progress) -> dict[Graph, bytes]:
        """Return the plans of an ONNX bundle, from the cache or newly built."""
        plans: dict[Graph, bytes] = {}
        for graph in GRAPHS:
            spec = self.spec[graph]
            job = job_of(engine, graph, spec, self.graph_space.factor)
            if engine.flavour == "tensorrt":
                job = job.with_timing_cache(cache.directory / f"{TIMING}{engine.version}-{engine.gpus[0]}")
            made_of = {"onnx": bundle.manifest.files[spec.file].sha256, **engine.to_dict(), "input": spec.input.name}

            def build(job: BuildJob = job, graph: Graph = graph, file: str = spec.file) -> bytes:
                return build_plan(bundle.read(file), job, graph, progress)

            plans[graph] = cache.get_or_build(made_of, build)
        return plans

    def _run(self, graph: Graph, x: Any) -> Any:
        engine = self._engines[graph]
        if array_module(x) is not np and on_device(x):
            return engine.run_on_device(x)
        return answer_in_kind(engine.run, x)

    def _make_room(self) -> None:
        for engine in self._engines.values():
            engine.free_idle()

    def limits(self, graph: Graph, batch: int) -> Limits:
        """Return the limits that the profiles set."""

        def smallest(side: int) -> int:  # the edge tiles must fit the same profile as the largest tiles
            return min((max(p.height.min, p.width.min) for p in self.profiles if side in p.height), default=1)

        return Limits(
            holds=lambda height, width: any(profile.holds(batch, height, width) for profile in self.profiles),
            smallest=smallest,
        )

    def _close(self) -> None:
        with ExitStack() as closing:  # closes all engines even if one raises
            for engine in self._engines.values():
                closing.callback(engine.close)


class TensorRtRtxVae(TensorRtVae):
    """The same with TensorRT-RTX, for GeForce and RTX cards; its plans may run on several GPU architectures."""

    backend = "tensorrt-rtx"
    flavour = "tensorrt-rtx"


def job_of(engine: Engine, graph: Graph, spec: GraphSpec, factor: int) -> BuildJob:
    """Return the build job for one graph of an engine."""
    positions = (0, *spec.input.axes)
    channels = int(spec.input.shape[positions[1]])
    # A profile's shapes are batch, channels, height, width; reorder them to the axes of the graph's input.
    order = [positions.index(axis) for axis in range(4)]
    shapes = tuple(
        tuple(tuple(shape[n] for n in order) for shape in profile.shapes(graph, channels, factor))
        for profile in engine.profiles
    )
    gpus = engine.gpus if engine.flavour == "tensorrt-rtx" else ()
    return BuildJob(engine.flavour, spec.input.name, shapes, gpus)  # type: ignore[arg-type]


def _check_fits(engine: Engine, flavour: Flavour, gpu: str, path: Path) -> None:
    """Raise `CompatibilityError` unless the plans were built for this GPU, system and version of TensorRT.

    Called before a plan is parsed, since TensorRT may crash on a foreign one.
    """
    wrong = None
    if engine.flavour != flavour.name:
        wrong = f"was built with {engine.flavour}, and this is {flavour.name}"
    elif engine.version != flavour.version:
        wrong = f"was built with {engine.flavour} {engine.version}, and {flavour.version} is installed"
    elif engine.system != system():
        wrong = f"was built on {engine.system}, and this is {system()}"
    elif engine.gpus and gpu not in engine.gpus:
        wrong = f"was built for {', '.join(engine.gpus)}, and this GPU is {gpu}"
    if wrong is not None:
        raise CompatibilityError(f"{path} {wrong}: vae-export rebuild {path} builds it for this machine")


def _parse_device(device: str) -> int:
    match = re.fullmatch(r"cuda(?::(\d{1,3}))?", device_name(device))
    if match is None:
        raise BackendUnavailable(f"TensorRT runs on 'cuda' or 'cuda:N', not {device!r}")
    return int(match[1] or 0)
