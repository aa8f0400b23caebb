"""What a stage is given: rows to measure, the time that is left, and timing."""

from __future__ import annotations

import importlib
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from benchmarks.gpu.made import Made, NotMade
from benchmarks.peers import Case, reason
from runtimes.errors import BackendUnavailable

STAGES = ("torch", "ort", "jax", "rtx", "trt", "tests", "dataset")
WARM_SECONDS, MEASURED_SECONDS = 0.5, 2.5  #: of calls, before the timed ones and of the timed ones
FEWEST, MOST = 3, 30  #: timed calls
#: errors that stay with a process once they have come
_POISONED = re.compile(
    r"illegal (memory access|instruction|address)|unspecified launch failure|device-side assert", re.I
)
OWN = ("benchmarks", "runtimes", "tests", "tools", "vae_export")
LONGEST = 1500  #: characters of what went wrong
LEAST_LEFT = 5.0  #: seconds that must be left for a row to begin


class Lacks(Exception):
    """Something that this machine does not have: the stage, or a row of it, cannot run here."""


@dataclass
class Stage:
    """What the function `run` of a stage is given."""

    name: str
    out: Path
    rehearsal: bool  #: on the CPU, with the smallest sizes
    made: Made
    tell: Callable[[dict[str, Any]], None]
    deadline: float  #: of time.monotonic()
    done: frozenset[str]  #: names of rows that an earlier process of this stage has been through
    only: tuple[str, ...] = ()  #: texts, one of which the name of a row must hold
    _skipped: list[str] = field(default_factory=list)

    @property
    def device(self) -> str:
        return "cpu" if self.rehearsal else "cuda"

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def wants(self, name: str) -> bool:
        return name not in self.done and (not self.only or any(text in name for text in self.only))

    def measure(self, name: str, facts: dict[str, Any], function: Callable[[], dict[str, Any]]) -> None:
        """One row: what is known of it, and what the function finds; or why there is no number."""
        if not self.wants(name):
            return
        if self.left < LEAST_LEFT:
            self._skipped.append(name)
            return
        self.tell({"begin": name})
        row = {"name": name, **facts}
        if self.rehearsal:
            row["rehearsal"] = True
        start = time.monotonic()
        try:
            row |= function()
        except (Lacks, BackendUnavailable) as error:
            row["lacks"] = one_line(error)
        except ModuleNotFoundError as error:
            row["failed" if (error.name or "").split(".")[0] in OWN else "lacks"] = one_line(error)
        except Exception as error:  # whatever a library raises is the result of its row
            row["failed"] = one_line(error, typed=True)
        self.tell({"row": row | {"took_seconds": round(time.monotonic() - start, 2)}})
        if _POISONED.search(row.get("failed", "")):
            self.tell({"again": True})  # nothing on this card works any more in this process
            leave()

    def note(self, text: str) -> None:
        self.tell({"note": text})

    def finish(self) -> None:
        if self._skipped:
            self.tell({"skipped": self._skipped})
        self.tell({"finished": True})


def one_line(error: BaseException, typed: bool = False) -> str:
    """All that it says, on one line of at most LONGEST characters."""
    text = " ".join(str(error).split()) or reason(error)
    return (f"{type(error).__name__}: {text}" if typed else text)[:LONGEST]


def require(module: str, why: str) -> Any:
    """Import a module, or `Lacks`."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # its libraries may be missing as well as itself
        raise Lacks(f"{module} ({why}): {one_line(error)}") from None


def leave() -> NoReturn:
    """End at once: libraries that crash while they are unloaded are not to spoil what was measured."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


# Timing ---------------------------------------------------------------------------------------------------------------


class HostClock:
    """Seconds from the call until its work is done, by the host's clock."""

    def __init__(self, wait: Callable[[], Any] = lambda: None) -> None:
        self._wait = wait

    def time(self, call: Callable[[], Any]) -> tuple[float, float | None]:
        """(by the host, on the device)"""
        start = time.perf_counter()
        call()
        self._wait()
        return time.perf_counter() - start, None


class CudaClock:
    """The same, and beside it the seconds between two events on PyTorch's current stream."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def time(self, call: Callable[[], Any]) -> tuple[float, float | None]:
        self._torch.cuda.synchronize()
        start = time.perf_counter()
        self._start.record()
        call()
        self._end.record()
        self._end.synchronize()
        host = time.perf_counter() - start
        return host, self._start.elapsed_time(self._end) / 1e3


Clock = HostClock | CudaClock


def timed(
    call: Callable[[], Any], clock: Clock, stage: Stage, before: Callable[[], Any] = lambda: None
) -> dict[str, Any]:
    """First call, warm-up, then the median of some calls; `before` runs before each and is not timed."""

    def once() -> tuple[float, float | None]:
        before()
        return clock.time(call)

    first, warm = once()[0], 0.0
    part = 0.02 if stage.rehearsal else 1.0
    for _ in range(MOST):
        if warm >= part * WARM_SECONDS:
            break
        warm += once()[0]
    taken: list[tuple[float, float | None]] = []
    while len(taken) < FEWEST or (len(taken) < MOST and sum(h for h, _ in taken) < part * MEASURED_SECONDS):
        if taken and stage.left < LEAST_LEFT:
            break
        taken.append(once())
    hosts = [host for host, _ in taken]
    devices = [device for _, device in taken if device is not None]
    found = {
        "first_seconds": round(first, 3),
        "calls": len(taken),
        "host_ms": 1e3 * statistics.median(hosts),
        "host_ms_least": 1e3 * min(hosts),
        "host_ms_most": 1e3 * max(hosts),
    }
    if devices:
        found["device_ms"] = 1e3 * statistics.median(devices)
    return found


def error_of(output: Any, stage: Stage, model: str, case: Case) -> dict[str, Any]:
    """Distance of the first image of an output (NumPy) from the reference; {"wrong": why} where there is no number."""
    from benchmarks.compare import Failed, distance

    try:
        return distance(output[:1].astype("float32"), stage.made.reference(model, case))
    except (Failed, NotMade) as error:
        return {"wrong": one_line(error)}


class Way(NamedTuple):
    """One row of a table: what is run, in which precision, and how."""

    model: str
    case: Case
    precision: str
    how: str

    @property
    def name(self) -> str:
        return f"{self.model} {self.case} {self.precision} {self.how}"

    @property
    def facts(self) -> dict[str, Any]:
        return {"model": self.model, **self.case._asdict(), "precision": self.precision, "how": self.how}
