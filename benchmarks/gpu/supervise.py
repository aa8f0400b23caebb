"""One stage from outside: its process, its time, its crashes; what it tells is written as it comes."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from benchmarks.gpu.card import STATE, Sampler, ask
from benchmarks.gpu.report import Report, kept_from, now, outcome

ROOT = Path(__file__).parents[2]
FAKES = ROOT / "tests" / "fakes"
GRACE = 10.0  #: seconds that a stage is told less than it has, to end by itself; a tenth of its time at most
MOST_CRASHES = 12  #: after which a stage is given up
LAST_WORDS = 4000  #: characters of standard error that are kept


@dataclass(frozen=True)
class Options:
    out: Path
    models: Path
    command: str
    rehearsal: bool = False
    seconds: float = 480.0  #: for the whole stage
    row_seconds: float = 150.0  #: for one row
    only: tuple[str, ...] = ()
    go_on: bool = False  #: with the rows of an earlier run
    package: str = "benchmarks.gpu"  #: in which the module `run_STAGE` is


def run_stage(stage: str, options: Options) -> dict[str, Any]:
    """Run a stage to its end, or to that of its time -> its result, which is also in the files."""
    options.out.mkdir(parents=True, exist_ok=True)
    kept = kept_from(options.out / f"{stage}.json", options.rehearsal) if options.go_on else None
    report = Report(options.out, stage, options.command, options.rehearsal, kept)
    report.set(before=report.data["before"] or ask(STATE) or None)
    end = "interrupted"
    with Sampler() as sampler, tempfile.TemporaryDirectory(prefix=f"gpu-{stage}-") as scratch:
        start = time.monotonic()
        try:
            end = _Supervisor(stage, options, report, sampler, Path(scratch)).run(start + options.seconds)
        finally:
            report.set(
                ended=now(),
                end=end,
                after=ask(STATE) or None,
                during=sampler.between(start, time.monotonic()) or None,
            )
    return report.data


class _Supervisor:
    def __init__(self, stage: str, options: Options, report: Report, sampler: Sampler, scratch: Path) -> None:
        self.stage, self.options, self.report, self.sampler, self.scratch = stage, options, report, sampler, scratch
        self.done = [row["name"] for row in report.rows]
        self.crashes = 0

    def run(self, deadline: float) -> str:
        """How it ended."""
        while True:
            left = deadline - time.monotonic() - min(GRACE, 0.1 * self.options.seconds)
            process = _Child(self.stage, self.options, self.done, left, self.scratch)
            try:
                end = self._follow(process, deadline)
            finally:
                process.kill()
                self.report.set(stderr=process.said()[-LAST_WORDS:])
            if end is not None:
                return end
            self.crashes += 1
            if self.crashes == MOST_CRASHES:
                return f"given up after {self.crashes} crashes"

    def _follow(self, process: _Child, deadline: float) -> str | None:
        """Until the stage ends; None where it crashed in a row, and goes on with the next."""
        row: str | None = None
        began = time.monotonic()
        while True:
            limit = deadline if row is None else min(deadline, began + self.options.row_seconds)
            try:
                told = process.told(limit - time.monotonic())
            except TimeoutError:
                if time.monotonic() >= deadline:
                    self._row_failed(row, began, "cut off by the time limit of the stage")
                    return f"ended by the time limit of {self.options.seconds:.0f} s"
                self._row_failed(row, began, f"not done within {self.options.row_seconds:.0f} s")
                return None
            if told is None:
                words = process.last_words()
                if row is None:
                    return f"crashed: {words}"
                self._row_failed(row, began, words)
                return None
            if "begin" in told:
                row, began = told["begin"], time.monotonic()
                print(f"  {row}: ", end="", flush=True)
            elif "row" in told:
                self._add(told["row"], began)
                row = None
            elif "note" in told:
                self.report.note(told["note"])
            elif "lacks" in told:
                self.report.set(lacks=told["lacks"])
            elif "skipped" in told:
                self.report.set(skipped=told["skipped"])
            elif "again" in told:
                return None
            elif "finished" in told:
                return "ran out of time" if self.report.data["skipped"] else "complete"

    def _add(self, row: dict[str, Any], began: float) -> None:
        during = self.sampler.between(began, time.monotonic())
        print(outcome(row), flush=True)
        self.done.append(row["name"])
        self.report.add(row | ({"during": during} if during else {}))

    def _row_failed(self, name: str | None, began: float, why: str) -> None:
        if name is not None:
            self._add({"name": name, "failed": why, **({"rehearsal": True} if self.options.rehearsal else {})}, began)


class _Child:
    """The process of a stage; a thread reads what it tells."""

    def __init__(self, stage: str, options: Options, done: list[str], seconds: float, scratch: Path) -> None:
        job = {
            "stage": stage,
            "module": f"{options.package}.run_{stage.removesuffix('-faked')}",
            "out": str(options.out),
            "models": str(options.models),
            "rehearsal": options.rehearsal,
            "seconds": seconds,
            "done": done,
            "only": options.only,
        }
        self._said = ""
        self._errors = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115  (closed in kill)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.child", json.dumps(job)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
            env=_environment(stage, options, scratch),
            start_new_session=True,  # its helpers end with it
        )
        assert self._process.stdout is not None
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()

    def _read(self, lines: TextIO) -> None:
        with lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put(None)

    def told(self, seconds: float) -> dict[str, Any] | None:
        """What it tells next, None where it has ended; `TimeoutError`."""
        try:
            line = self._lines.get(timeout=max(0.0, seconds))
        except queue.Empty:
            raise TimeoutError from None
        found: dict[str, Any] | None = None if line is None else json.loads(line)
        return found

    def last_words(self) -> str:
        code = self._process.wait()
        lines = [line.strip() for line in self.said().splitlines() if line.strip()]
        ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"its process ended with {ended}: {lines[-1][:500] if lines else 'without a word'}"

    def said(self) -> str:
        if self._errors.closed:
            return self._said
        self._errors.seek(0)
        self._said = self._errors.read().decode(errors="replace")
        return self._said

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.said()
        self._errors.close()


def _environment(stage: str, options: Options, scratch: Path) -> dict[str, str]:
    paths = [str(FAKES)] if stage.endswith("-faked") else []
    paths += [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "TMPDIR": str(scratch),  # what a killed process leaves behind goes with it
        "VAE_EXPORT_CACHE": str(scratch / "cache"),  # plans are to be built, and timed
        "TORCHINDUCTOR_CACHE_DIR": str(options.models / "inductor"),
        "TRITON_CACHE_DIR": str(options.models / "triton"),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # JAX would take three quarters of the card, beside the reference
    }
