"""Which form of the graphs is the fastest here: export each, time them side by side, keep the winner.

All forms compute the same (see `rewrite.py`); which is the fastest depends on the runtime and the processor. Forms are
timed in turn, round after round, so that a slow minute of the machine hits all of them alike.
"""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from runtimes import Bundle, VaeRuntime, open_vae
from runtimes.bundle import ENGINE_TARGETS, Engine
from runtimes.cpus import available_cpus
from runtimes.errors import BackendUnavailable, ConfigError
from runtimes.profiles import DEFAULT, Profile, make_profile
from runtimes.progress import Progress
from vae_export.bundle import check_output
from vae_export.export import DEFAULT_PRECISION, FORMS, check_choices, export_bundle
from vae_export.model import AutoencoderKL
from vae_export.rewrite import CONVOLUTIONS, LAST_BLOCKS, NORMS, UPSAMPLES, Form
from vae_export.tensorrt_engines import plan_engine, present_gpu
from vae_export.winograd import wide_convolutions

NOISE = 0.02  #: a form that is faster by less than this is not preferred


class Trial(NamedTuple):
    """One graph in one form with a number of threads (None: the runtime's choice), and how long its calls took."""

    race: str  #: "forms", "last block", "convolutions" or "threads": what it was timed against, in turn
    graph: str
    form: Form
    threads: int | None
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        seconds = [round(s, 5) for s in self.seconds]
        return {
            "race": self.race,
            "graph": self.graph,
            "form": self.form._asdict(),
            "threads": self.threads,
            "seconds": seconds,
        }


class Tuned(NamedTuple):
    """A bundle in the winning forms, all that was tried for it, and the winner of each graph."""

    bundle: Bundle
    trials: tuple[Trial, ...]
    winners: dict[str, Trial]


def tune_bundle(
    model: AutoencoderKL,
    out: str | Path,
    *,
    target: str = "onnx",
    precision: str | None = None,
    height: int = 512,
    width: int = 512,
    rounds: int = 3,
    overwrite: bool = False,
    progress: Progress = lambda *_: None,
) -> Tuned:
    """Time the exact forms of both graphs on this machine, and export a validated bundle in the fastest.

    TensorRT engines are timed on the GPU that is here, the others on the CPU.

    Images of `height` x `width` pixels, batch 1. The manifest records what was timed. Raises what `export_bundle`
    raises, and `ConfigError` for a size that is not a multiple of the model's factor.
    """
    precision = DEFAULT_PRECISION.get(target, "fp32") if precision is None else precision
    if target == "flax":
        raise ConfigError("flax bundles are written in one form, the fastest on the CPU: there is nothing to tune")
    check_choices(model, target, precision, "fp32")
    check_output(out, overwrite)
    factor = model.config.downscale
    if height % factor or width % factor or min(height, width, rounds) < 1:
        raise ConfigError(
            f"cannot time {height}x{width} pixels in {rounds} rounds; sides are multiples of {factor}, rounds 1 or more"
        )
    engine = _engine(target, height, width, factor)
    with tempfile.TemporaryDirectory() as directory:
        bench = _Bench(model, target, precision, (height, width), rounds, Path(directory), progress, engine)
        winners = {graph: bench.winner(graph) for graph in ("encoder", "decoder")}
    record = {
        "name": "tuned",
        "machine": f"{platform.machine()}, {available_cpus()} cores",
        "size": [height, width],
        "winners": {graph: {"form": w.form._asdict(), "threads": w.threads} for graph, w in winners.items()},
        "trials": [trial.to_dict() for trial in bench.trials],
    }
    bundle = export_bundle(
        model,
        out,
        target=target,
        precision=precision,
        forms={graph: winner.form for graph, winner in winners.items()},
        tuning=record,
        engine=engine and replace(engine, profiles=_profiles_with(height, width, engine.profiles)),
        overwrite=overwrite,
        progress=progress,
    )
    return Tuned(bundle, tuple(bench.trials), winners)


class _Bench:
    """Times forms of one model at one size; `trials` is everything timed so far."""

    def __init__(
        self,
        model: AutoencoderKL,
        target: str,
        precision: str,
        size: tuple[int, int],
        rounds: int,
        directory: Path,
        progress: Progress,
        engine: Engine | None = None,
    ) -> None:
        self.trials: list[Trial] = []
        self._model, self._target, self._precision = model, target, precision
        self._rounds, self._directory, self._progress = rounds, directory, progress
        self._engine = engine  #: TensorRT's, for the one size
        self._bundles: dict[Form, Path] = {}
        rng, config = np.random.default_rng(0), model.config
        latent = [side // config.downscale for side in size]
        self._inputs = {
            "encoder": rng.uniform(-1, 1, (1, config.in_channels, *size)).astype(np.float32),
            "decoder": rng.standard_normal((1, config.latent_channels, *latent)).astype(np.float32),
        }

    def winner(self, graph: str) -> Trial:
        """The fastest: first among upsamplings and norms, then with another last block, with other convolutions (in
        fp32 alone, since they lose digits in half precision), and with other threads."""
        start = FORMS[self._target, self._precision]
        upsamples: tuple[str, ...] = UPSAMPLES if graph == "decoder" else (start.upsample,)
        if self._engine is not None and self._precision == "bf16":
            upsamples = tuple(upsample for upsample in upsamples if upsample != "deconv")  # TensorRT does not build it
        forms = [start._replace(upsample=u, norm=n, last_block="plain") for u in upsamples for n in NORMS]
        forms.sort(key=lambda form: form != start._replace(last_block="plain"))  # the default is the one to beat
        best = self._race("forms", graph, [(form, None) for form in forms])
        if graph == "decoder":
            blocks = sorted(LAST_BLOCKS, key=lambda block: block != start.last_block)
            best = self._race("last block", graph, [(best.form._replace(last_block=b), None) for b in blocks])
        if self._precision == "fp32" and self._engine is None and any(wide_convolutions(self._model)):
            kinds = sorted(CONVOLUTIONS, key=lambda kind: kind != start.convolutions)
            best = self._race("convolutions", graph, [(best.form._replace(convolutions=k), None) for k in kinds])
        if self._engine is not None:
            return best  # no threads to choose
        cores = available_cpus()
        counts = [None, *sorted({cores // 2, cores} - {0})] if cores > 1 else [None]
        return self._race("threads", graph, [(best.form, threads) for threads in counts])

    def _race(self, race: str, graph: str, entries: Sequence[tuple[Form, int | None]]) -> Trial:
        """Time the entries in turn. The first is the one to beat, by more than what noise alone could be."""
        x = self._inputs[graph]
        seconds: list[list[float]] = [[] for _ in entries]
        with ExitStack() as stack:
            runtimes = []
            for done, (form, threads) in enumerate(entries):
                self._progress(f"Exporting {graph} as {describe(form)}", done, len(entries))
                options: dict[str, Any] = {} if self._engine is not None else {"threads": threads}
                runtimes.append(stack.enter_context(open_vae(self._bundle(form), **options)))
            for turn in range(self._rounds + 1):
                for runtime, times in zip(runtimes, seconds, strict=True):
                    self._progress(f"Timing {graph}", turn, self._rounds + 1)
                    elapsed = _timed(runtime, graph, x)
                    if turn:  # the first warms up
                        times.append(elapsed)
        trials = [Trial(race, graph, *entry, tuple(times)) for entry, times in zip(entries, seconds, strict=True)]
        self.trials += trials
        best = min(trials, key=lambda trial: trial.median)
        return best if best.median < trials[0].median * (1 - NOISE) else trials[0]

    def _bundle(self, form: Form) -> Path:
        if form not in self._bundles:
            path = self._directory / str(len(self._bundles))
            forms = {"encoder": form, "decoder": form}
            # Rescaled or not, a graph takes the same time.
            export_bundle(
                self._model,
                path,
                target=self._target,
                precision=self._precision,
                forms=forms,
                rescale=False,
                engine=self._engine,
                run_validation=False,
            )
            self._bundles[form] = path
        return self._bundles[form]


def _engine(target: str, height: int, width: int, factor: int) -> Engine | None:
    """For TensorRT what is timed: engines for this size alone, on the GPU that is here."""
    if target not in ENGINE_TARGETS:
        return None
    size = make_profile("1", str(height), str(width), opt=None, factor=factor)
    engine = plan_engine(target, [size])
    if present_gpu() is None:
        raise BackendUnavailable(
            f"tuning {target} times engines on the GPU that will run them, and none can be used here"
        )
    return engine


def _profiles_with(height: int, width: int, tuned: tuple[Profile, ...]) -> tuple[Profile, ...]:
    """What the bundle is built for: common sizes, and the one that was timed where it is none of them."""
    return (DEFAULT,) if DEFAULT.holds(1, height, width) else (DEFAULT, *tuned)


def describe(form: Form) -> str:
    """A form in a few words, for tables."""
    said = f"upsample {form.upsample}, norm {form.norm}, last block {form.last_block}"
    return f"{said}, convolutions {form.convolutions}"


def _timed(runtime: VaeRuntime, graph: str, x: Any) -> float:
    run = runtime.encode if graph == "encoder" else runtime.decode
    start = time.perf_counter()
    run(x)
    return time.perf_counter() - start
