"""Find the fastest form of the graphs on this machine: export each form, time them side by side, keep the fastest.

All forms compute the same function (see `vae_export.rewrites.form`); the fastest depends on the runtime and the
processor. Forms are timed in turn, round after round, so that a slow phase of the machine affects all of them alike.
"""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from runtimes import Bundle, VaeRuntime, open_vae
from runtimes.cpus import available_cpus
from runtimes.errors import ConfigError
from runtimes.names import GRAPHS, Graph
from runtimes.progress import Progress, no_progress
from vae_export.bundle import check_output
from vae_export.edge import check_path, ordinary_torch
from vae_export.export import check_choices, export_bundle
from vae_export.families.base import ReferenceVae
from vae_export.normalised import as_written
from vae_export.options import ExportOptions
from vae_export.rewrites.form import Form
from vae_export.rewrites.winograd import wide_convolutions
from vae_export.targets import target_named
from vae_export.targets.base import Target

NOISE = 0.02  #: relative speed-up below which a form is not preferred to the default


class Trial(NamedTuple):
    """Timed calls of one graph in one form, with a number of threads (None: the default of the runtime)."""

    race: str  #: the group it was timed in: "forms", "last block", "convolutions" or "threads"
    graph: Graph
    form: Form
    threads: int | None
    seconds: tuple[float, ...]  #: duration of each call

    @property
    def median(self) -> float:
        """The median duration of a call, in seconds."""
        return statistics.median(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-serialisable dictionary."""
        seconds = [round(s, 5) for s in self.seconds]
        return {
            "race": self.race,
            "graph": self.graph,
            "form": self.form._asdict(),
            "threads": self.threads,
            "seconds": seconds,
        }


class Tuned(NamedTuple):
    """A bundle in the winning forms, all trials, and the winner of each graph."""

    bundle: Bundle
    trials: tuple[Trial, ...]
    winners: Mapping[Graph, Trial]


@ordinary_torch()
def tune_bundle(
    model: ReferenceVae,
    out: str | Path,
    options: ExportOptions | None = None,
    *,
    height: int = 512,
    width: int = 512,
    rounds: int = 3,
    progress: Progress = no_progress,
    **choices: Any,
) -> Tuned:
    """Time the exact forms of both graphs on this machine, and export a validated bundle in the fastest forms.

    Forms are timed on images of `height` x `width` pixels in batches of 1: engines on the GPU that runs them,
    all other graphs on the CPU. `choices` are fields of `ExportOptions`, by name. The manifest records all timings.

    Raises the errors of `export_bundle`, and `ConfigError` for sizes that are not multiples of the downscaling factor
    of the model.
    """
    options = replace(options or ExportOptions(), **choices)
    target = target_named(options.target)
    options = replace(options, precision=target.default_precision if options.precision is None else options.precision)
    check_choices(model, target, options)
    target.choices("decoder", str(options.precision))  # raises `ConfigError` if there is nothing to choose
    check_path(out, "out")
    check_output(out, options.overwrite)
    factor = model.latent_space.factor
    if height % factor or width % factor or min(height, width, rounds) < 1:
        raise ConfigError(
            f"cannot time {height}x{width} pixels in {rounds} rounds; sides are multiples of {factor}, rounds 1 or more"
        )
    timed = replace(options, engine=target.plan_for_size(height, width, factor))
    with tempfile.TemporaryDirectory() as directory:
        bench = _Bench(model, target, timed, (height, width), rounds, Path(directory), progress)
        winners = {graph: bench.winner(graph) for graph in GRAPHS}
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
        options,
        forms={graph: winner.form for graph, winner in winners.items()},
        tuning=record,
        engine=target.with_common_sizes(timed.engine, height, width),
        progress=progress,
    )
    return Tuned(bundle, tuple(bench.trials), winners)


class _Bench:
    """A benchmark of the forms of one model at one image size. `trials` has all timings so far."""

    def __init__(
        self,
        model: ReferenceVae,
        target: Target,
        options: ExportOptions,
        size: tuple[int, int],
        rounds: int,
        directory: Path,
        progress: Progress,
    ) -> None:
        self.trials: list[Trial] = []
        self._model, self._target, self._options = model, target, options
        self._rounds, self._directory, self._progress = rounds, directory, progress
        self._bundles: dict[Form, Path] = {}
        rng, config, space = np.random.default_rng(0), model.config, as_written(model, options.latents).latent_space
        latent = [side // space.factor for side in size]
        self._inputs = {
            "encoder": rng.uniform(-1, 1, (1, config.in_channels, *size)).astype(np.float32),
            "decoder": rng.standard_normal((1, space.channels, *latent)).astype(np.float32),
        }

    def winner(self, graph: Graph) -> Trial:
        """Return the fastest trial of a graph.

        Races run one after the other, each with the winner of the one before: upsamplings and norms, last blocks,
        convolutions, and numbers of threads.
        """
        precision = str(self._options.precision)
        start, choices = self._target.forms[precision], self._target.choices(graph, precision)
        forms = [
            start._replace(upsample=upsample, norm=norm, last_block="plain")
            for upsample in choices.upsamples
            for norm in choices.norms
        ]
        best = self._race("forms", graph, _first(start._replace(last_block="plain"), forms))
        if len(choices.last_blocks) > 1:
            forms = [best.form._replace(last_block=block) for block in choices.last_blocks]
            best = self._race("last block", graph, _first(best.form._replace(last_block=start.last_block), forms))
        if len(choices.convolutions) > 1 and any(wide_convolutions(self._model)):
            forms = [best.form._replace(convolutions=kind) for kind in choices.convolutions]
            best = self._race("convolutions", graph, _first(best.form._replace(convolutions=start.convolutions), forms))
        if not self._target.takes_threads:
            return best
        cores = available_cpus()
        counts = [None, *sorted({cores // 2, cores} - {0})] if cores > 1 else [None]
        return self._race("threads", graph, [(best.form, threads) for threads in counts])

    def _race(self, race: str, graph: Graph, entries: Sequence[tuple[Form, int | None]]) -> Trial:
        """Time the entries in turn and return the fastest; the first unless another is faster by more than NOISE."""
        x = self._inputs[graph]
        seconds: list[list[float]] = [[] for _ in entries]
        with ExitStack() as stack:
            runtimes = []
            for done, (form, threads) in enumerate(entries):
                self._progress(f"Exporting {graph} as {describe(form)}", done, len(entries))
                options: dict[str, Any] = {"threads": threads} if self._target.takes_threads else {}
                runtimes.append(stack.enter_context(open_vae(self._bundle(form), **options)))
            for turn in range(self._rounds + 1):
                for runtime, times in zip(runtimes, seconds, strict=True):
                    self._progress(f"Timing {graph}", turn, self._rounds + 1)
                    elapsed = _timed(runtime, graph, x)
                    if turn:  # the first turn warms up
                        times.append(elapsed)
        trials = [Trial(race, graph, *entry, tuple(times)) for entry, times in zip(entries, seconds, strict=True)]
        self.trials += trials
        best = min(trials, key=lambda trial: trial.median)
        return best if best.median < trials[0].median * (1 - NOISE) else trials[0]

    def _bundle(self, form: Form) -> Path:
        if form not in self._bundles:
            path = self._directory / str(len(self._bundles))
            forms = {"encoder": form, "decoder": form}
            # Rescaling does not change the speed of a graph.
            export_bundle(self._model, path, self._options, forms=forms, rescale=False, run_validation=False)
            self._bundles[form] = path
        return self._bundles[form]


def _first(default: Form, forms: Sequence[Form]) -> list[tuple[Form, None]]:
    """Return the entries of a race, with the default first: `_race` prefers it."""
    return [(form, None) for form in sorted(forms, key=lambda form: form != default)]


def describe(form: Form) -> str:
    """Return a short description of a form, for tables."""
    text = f"upsample {form.upsample}, norm {form.norm}, last block {form.last_block}"
    return f"{text}, convolutions {form.convolutions}"


def _timed(runtime: VaeRuntime, graph: str, x: Any) -> float:
    run = runtime.encode if graph == "encoder" else runtime.decode
    start = time.perf_counter()
    run(x)
    return time.perf_counter() - start
