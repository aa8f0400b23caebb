"""What the stages rtx and trt share: plans built, loaded, run, compared and timed, with the library's own words.

Plans are built from our ONNX graphs in this process, where a crash ends it and is noted. Arrays are CuPy's and stay on
the card; the rows "as users have it" go through `open_vae` with NumPy arrays.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.stage import HostClock, Lacks, Stage, Way, error_of, require, timed
from benchmarks.peers import GRAPHS, Case
from runtimes import open_vae
from runtimes.errors import CompatibilityError
from runtimes.manifest import Engine, GraphSpec
from runtimes.tensorrt import flavours as tensorrt_flavours
from runtimes.tensorrt.builder import build, build_plan
from runtimes.tensorrt.cuda import Cuda
from runtimes.tensorrt.execution import LoadedPlan, Settings
from runtimes.tensorrt.flavours import Flavour, load_flavour, system
from runtimes.tensorrt.profiles import Profile, Range
from runtimes.tensorrt.runtime import job_of

MOST_WORDS = 100  #: lines that are kept of what the library says
LAST_NEWS = 3  #: of those lines that are neither warnings nor errors
FORM = "ours"  #: that of the bundles


class Words(deque[str]):
    """What a library said, from INFO on, since it was last asked."""

    def take(self) -> str:
        """On one line: all warnings and errors, and the last of the rest."""
        said = list(dict.fromkeys(self))
        self.clear()
        news = [line for line in said if line.startswith("INFO")]
        return " | ".join([line for line in said if line not in news] + news[-LAST_NEWS:])


def listening_flavour(name: str) -> tuple[Flavour, Words]:
    """The flavour with a logger that keeps all from INFO on. To be called first: a process has one logger."""
    found = load_flavour(name)  # `BackendUnavailable` where it is missing
    trt, words = found.trt, Words(maxlen=MOST_WORDS)
    severities = trt.ILogger.Severity
    bad = {severities.ERROR, severities.INTERNAL_ERROR}
    kept = {severity: severity.name for severity in (*bad, severities.WARNING, severities.INFO)}

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in kept:
                words.append(f"{kept[severity]}: {' '.join(message.split())[:400]}")
            if severity in bad:
                found.log.append(" ".join(message.split())[:1000])

    listening = Flavour(found.name, trt, Logger(), found.log)
    # Builder, runtime and `open_vae` ask for it by its name: they are to have this one.
    tensorrt_flavours._loaded[name] = listening
    return listening, words


class Engines:
    """One flavour, the graphs of one stage and the plans that were built of them."""

    def __init__(self, stage: Stage, name: str) -> None:
        self.stage = stage
        self.flavour, self.words = listening_flavour(name)
        self.folder = stage.made.folder / f"plans-{name}-{self.flavour.version}"
        self.folder.mkdir(exist_ok=True)
        self.sizes = (64,) if stage.rehearsal else (512, 1024)
        stage.note(f"{self.flavour.trt.__name__} {self.flavour.version}")

    @property
    def profile(self) -> Profile:
        side = Range(min(self.sizes), max(self.sizes), max(self.sizes))
        return Profile(Range(1, 1, 1), side, side)

    def path(self, graph: str, precision: str, variant: str) -> Path:
        return self.folder / f"{graph}-{precision}-{variant}.plan".replace(" ", "_")

    def job(self, graph: str, precision: str) -> tuple[Any, bytes, GraphSpec]:
        """What to build, for no GPU in particular."""
        onnx, spec = self.stage.made.onnx("sd", graph, precision, FORM)
        engine = Engine(self.flavour.name, self.flavour.version, (), system(), (self.profile,))
        job = job_of(engine, GRAPHS[graph], spec, self.stage.made.config("sd").downscale)
        return job, onnx.read_bytes(), spec

    # Rows ----------------------------------------------------------------------------------------------------------

    def measure_build(self, graph: str, precision: str, variant: str, *, hidden: bool = False) -> None:
        """A row: build a plan, and keep it for the rows that run it. `hidden`: as on a machine without a GPU."""

        def row() -> dict[str, Any]:
            job, onnx, _ = self.job(graph, precision)
            self.words.clear()
            start = time.perf_counter()
            try:
                plan = self._built_without_gpu(onnx, job, graph) if hidden else build(onnx, job, lambda *_: None)
            except CompatibilityError as error:
                raise RuntimeError(f"{error} | {self.words.take()}") from None
            seconds = time.perf_counter() - start
            self.path(graph, precision, variant).write_bytes(plan)
            said = {"seconds": seconds, "megabytes": len(plan) / 1e6, "validity": self.validity(plan)}
            return said | {"said": self.words.take()}

        facts = {"graph": graph, "precision": precision, "profile": str(self.profile)}
        self.stage.measure(f"build {graph} {precision} {variant}", facts, row)

    @staticmethod
    def _built_without_gpu(onnx: bytes, job: Any, graph: str) -> bytes:
        """In a process that sees no GPU."""
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        try:
            return build_plan(onnx, job, graph)
        finally:
            if seen is None:
                del os.environ["CUDA_VISIBLE_DEVICES"]
            else:
                os.environ["CUDA_VISIBLE_DEVICES"] = seen

    def validity(self, plan: bytes) -> str:
        """What TensorRT-RTX itself says of a plan on this machine; the other has no such question."""
        runtime = self.flavour.trt.Runtime(self.flavour.logger)
        if not hasattr(runtime, "get_engine_validity"):
            return "not asked"
        validity, diagnostics = runtime.get_engine_validity(plan)
        reasons = self.flavour.trt.EngineInvalidityDiagnostics.__members__
        bits = [name for name, reason in reasons.items() if int(diagnostics) & int(reason)]
        return f"{validity.name}, diagnostics {int(diagnostics)} {' '.join(bits)}".rstrip()

    def measure_run(self, graph: str, precision: str, variant: str, how: str, **settings: Any) -> None:
        """Rows: load a plan that was built, and run it at each size."""
        for size in self.sizes:
            case = Case(graph, size, 1)
            way = Way("sd", case, precision, f"{variant}; {how}")
            self.stage.measure(
                way.name,
                way.facts,
                lambda case=case: self._run(case, precision, variant, settings),  # type: ignore[misc]
            )

    def _run(self, case: Case, precision: str, variant: str, settings: dict[str, Any]) -> dict[str, Any]:
        path = self.path(case.graph, precision, variant)
        if not path.exists():
            raise Lacks(f"the plan {variant}, which was not built")
        cuda = Cuda(0)  # `BackendUnavailable` where there is none
        cupy = require("cupy", "it holds the arrays on the card")
        x = cupy.asarray(self.stage.made.input("sd", case))
        _, _, spec = self.job(case.graph, precision)
        self.words.clear()
        start = time.perf_counter()
        with loaded(
            self.flavour, cuda, case.graph, path.read_bytes(), spec, self.profile, self.factor, settings
        ) as plan:
            load = time.perf_counter() - start
            answers: list[Any] = []

            def call() -> None:
                answers.clear()
                answers.append(plan.run_on_device(x))  # it waits for its end

            before = cuda.free_memory()[0]
            found = timed(call, HostClock(), self.stage)
            found["load_seconds"] = load
            found["peak_memory_gb"] = max(0, before - cuda.free_memory()[0]) / 1e9
            y = answers.pop().get()
        found["flop"] = self.stage.made.flop("sd", case)
        found["said"] = self.words.take()
        return found | error_of(np.asarray(y), self.stage, "sd", case)

    @property
    def factor(self) -> int:
        return self.stage.made.config("sd").downscale

    def measure_as_users_have_it(self, precision: str) -> None:
        """Rows: an ONNX bundle opened with this backend, which builds for the GPU at hand."""
        for graph in GRAPHS:
            case = Case(graph, max(self.sizes), 1)

            def row(case: Case = case) -> dict[str, Any]:
                bundle = self.stage.made.bundle("sd", "onnx", precision)
                self.words.clear()
                start = time.perf_counter()
                with open_vae(bundle, backend=self.flavour.name, profiles=[self.profile]) as vae:
                    found = run_vae(self.stage, vae, self.stage.made.input("sd", case), case)
                    opened = time.perf_counter() - start
                found |= {"opened_and_run_seconds": opened, "said": self.words.take()}
                return found | error_of(found.pop("output"), self.stage, "sd", case)

            way = Way("sd", case, precision, "as users have it")
            self.stage.measure(way.name, way.facts, row)


def run_vae(stage: Stage, vae: Any, x: np.ndarray, case: Case) -> dict[str, Any]:
    """Timed calls of an opened bundle, and its output."""

    def call() -> np.ndarray:
        found: np.ndarray = vae.decode(x).sample if case.graph == "decode" else vae.encode(x).latent_dist.parameters
        return found

    return timed(call, HostClock(), stage) | {"output": call()}


@contextmanager
def loaded(
    flavour: Flavour,
    cuda: Cuda,
    graph: str,
    plan: bytes,
    spec: GraphSpec,
    profile: Profile,
    factor: int,
    settings: dict[str, Any],
) -> Iterator[LoadedPlan]:
    chosen = Settings(
        contexts=1,
        cuda_graphs=settings.get("cuda_graphs", False),
        max_graphs=8,
        runtime_cache=None,
        kernel_specialization=settings.get("kernel_specialization"),
    )
    pixels = factor if graph == "decode" else 1
    found = LoadedPlan(flavour, cuda, GRAPHS[graph], plan, spec, (profile,), chosen, pixels, lambda: None)
    try:
        yield found
    finally:
        found.close()
