"""Which backend encodes and decodes the fastest here, in how much memory, and how far from the reference?

    python -m benchmarks.compare --sizes 256 512 --rounds 5 --memory-sizes 1024
    python -m benchmarks.compare --quick            # about five minutes on two cores
    python -m benchmarks.compare --model tiny --sizes 64 --rows "ours" "openvino plain"

Every row is a process of its own that opens the whole VAE and sleeps until it is asked for one call. All are asked in
turn, A B C A B C ..., so that a slow minute of the machine hits all of them alike. Where they do not fit the memory
together, as many are asked in turn as fit, then the next. Peak memory is that of the process after its first call; on
a GPU (--device cuda) it is the GPU's.

Writes OUT/compare.json (everything) and OUT/compare.png, prints tables and a verdict a graph, size and precision.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.status import Status

from benchmarks.compare_report import describe_machine, plot, print_markdown, print_tables, short
from benchmarks.peers import GPU_ROWS, GRAPHS, ROWS, Case, Row

ROOT = Path(__file__).parents[1]
MULTIPLE = 8  #: pixels per latent of both models
FULL = {"sizes": [256, 512], "rounds": 5}
QUICK = {"sizes": [256], "rounds": 3}
#: left out by --quick: a minute a row, graph and size before the first call; a minute and a half to quantize
SLOW_TO_MAKE = ("torch.compile", "int8")
ROOM = 1.5  #: a row not yet run is taken to need this much more than the hungriest before it
#: seconds between calls: threads of ONNX Runtime and OpenMP spin some 10 ms after a call, before they sleep
SETTLE = 0.05

MEMORY_GRAPH = "decode"  #: the hungrier one

Result = dict[str, Any]


class Failed(Exception):
    """A process could not do its work; the message is the reason."""


class Worker:
    """A process of benchmarks.peers: started with a job, asked with lines, answering with lines of JSON."""

    def __init__(self, scratch: Path, **job: Any) -> None:
        self._errors = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115  (closed below)
        # Compiled kernels are not to be found again by the next run; nor are they to stay behind.
        environment = {**os.environ, "TMPDIR": str(scratch), "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.peers", json.dumps({"directory": str(scratch), **job})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
            env=environment,
            start_new_session=True,  # its helpers end with it, and Ctrl-C is for this process to handle
        )

    def ask(self, what: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died, which `answer` finds
            self._process.stdin.write(f"{what}\n")
            self._process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        found: dict[str, Any] = json.loads(line) if line.endswith("\n") else {"failed": self._last_words()}
        if set(found) == {"failed"}:
            raise Failed(found["failed"])
        return found

    def _last_words(self) -> str:
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return "killed; most likely the memory ran out"
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"ended with exit code {code}: {said[-1] if said else 'without a word'}"

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()


def prepare(
    scratch: Path, model: str, cases: Sequence[tuple[Case, bool]], device: str, status: Status
) -> dict[str, Any]:
    """Inputs and references -> {"parameters", "gflop" {case: number}, "peak_gflops" {precision: number or reason}}."""
    status.update("Building the model")
    with contextlib.closing(Worker(scratch, do="prepare", model=model, cases=cases, device=device)) as worker:
        found = worker.answer() | {"gflop": {}}
        for case, _ in cases:
            status.update(f"{case}: computing the reference")
            found["gflop"][case] = worker.answer()["gflop"]
        status.update("Measuring the peak of this machine")
        return found | worker.answer()


def export(scratch: Path, model: str, rows: Sequence[Row], status: Status) -> tuple[dict[str, float], dict[str, str]]:
    """What the rows open, written by one process -> ({artifact: seconds}, {artifact: why it failed})."""
    seconds: dict[str, float] = {}
    failed: dict[str, str] = {}
    left = list(dict.fromkeys(row.artifact for row in rows))
    while left:
        with contextlib.closing(Worker(scratch, do="export", model=model, artifacts=left)) as worker:
            try:
                while left:
                    artifact = left.pop(0)
                    status.update(f"Exporting {artifact}")
                    answer = worker.answer()
                    if answer["failed"]:
                        failed[artifact] = answer["failed"]
                    else:
                        seconds[artifact] = answer["seconds"]
            except Failed as error:  # the process is gone: a new one for those that are left
                failed[artifact] = str(error)
    return seconds, failed


def measure(
    scratch: Path, case: Case, rows: Sequence[Row], rounds: int, broken: dict[str, str], status: Status
) -> tuple[list[Result], list[list[str]]]:
    """(a result a row, the order of the calls in each group of rows that were asked in turn)."""
    results: list[Result] = []
    orders: list[list[str]] = []
    waiting = list(rows)
    while waiting:
        with contextlib.ExitStack() as stack:
            opened: list[tuple[Worker, Result]] = []
            while waiting and (not opened or fits(results)):
                row = waiting.pop(0)
                status.update(f"{case}: opening {row}")
                result: Result = {**case._asdict(), "row": row.name, "precision": row.precision, "ours": row.ours}
                results.append(result)
                try:
                    if row.artifact in broken:
                        raise Failed(broken[row.artifact])
                    worker = stack.enter_context(
                        contextlib.closing(Worker(scratch, do="work", row=str(row), case=case))
                    )
                    result |= open_and_compare(scratch, case, worker)
                    opened.append((worker, result))
                except Failed as error:
                    result["unavailable"] = str(error)
            orders.append(ask_in_turn(case, opened, rounds, status))
            for _, result in opened:
                result["group"] = len(orders)
    return results, [order for order in orders if order]


def open_and_compare(scratch: Path, case: Case, worker: Worker) -> Result:
    """Time to open, first call, its peak memory, and its output against the reference."""
    load = worker.answer()["load_seconds"]
    first = worker.ask("keep")
    result = {
        "load_seconds": load,
        "first_call_seconds": first["seconds"],
        "peak_memory_gb": first["peak_memory_gb"],
        "seconds": [],
        "idle_cpu_share": 0.0,
    }
    reference = scratch / f"{case.file}-reference.npy"
    output = np.load(scratch / "output.npy")
    return result | (distance(output, np.load(reference)) if reference.exists() else {})


def distance(actual: np.ndarray, expected: np.ndarray) -> Result:
    """As vae_export.comparison has it: PSNR over the range of the reference's output, None where nothing differs."""
    if actual.shape != expected.shape or not np.isfinite(actual).all():
        raise Failed(f"the output is of {list(actual.shape)} for {list(expected.shape)}, or holds NaN or infinity")
    difference = np.abs(actual.astype(np.float64) - expected)
    mean_square, span = float(np.mean(difference**2)), float(expected.max() - expected.min()) or 1.0
    psnr = 10 * math.log10(span**2 / mean_square) if mean_square else None
    return {"psnr_db": psnr, "max_abs": float(difference.max())}


def fits(results: Sequence[Result]) -> bool:
    """Whether one more process has room, by what the others needed at their peak."""
    available = available_memory()
    return available is None or available > ROOM * max(result.get("peak_memory_gb") or 0 for result in results)


def available_memory() -> float | None:
    """GB; None where the system does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 / 1e9
    return None


def ask_in_turn(case: Case, opened: list[tuple[Worker, Result]], rounds: int, status: Status) -> list[str]:
    """One call of each, round after round, the times noted in their results; the order of the calls."""
    order = []
    for turn in range(rounds):
        status.update(f"{case}: round {turn + 1} of {rounds}, {len(opened)} in turn")
        for worker, result in opened:
            if "unavailable" in result:
                continue
            order.append(f"{result['row']} {result['precision']}")
            time.sleep(SETTLE)
            try:
                found = worker.ask("again")
            except Failed as error:
                result["unavailable"] = str(error)
                continue
            result["seconds"].append(found["seconds"])
            share = found["idle_cpu_seconds"] / max(found["idle_seconds"], 1e-9)
            result["idle_cpu_share"] = max(result["idle_cpu_share"], share)
    return order


def derive(results: Sequence[Result], gflop: float, peaks: dict[str, float | str]) -> None:
    """What follows from the times of one case: median, spread, images a second, ratios, shares. In place."""
    timed = [result for result in results if result.get("seconds") and "unavailable" not in result]
    for result in timed:
        seconds = result["seconds"]
        median = statistics.median(seconds)
        peak = peaks[result["precision"]]
        result |= {
            "median_seconds": median,
            "min_seconds": min(seconds),
            "max_seconds": max(seconds),
            "images_per_second": result["batch"] / median,
            "gflops": gflop / median,
            "share_of_peak": None if isinstance(peak, str) else gflop / median / peak,
        }
    for result in timed:
        peer = best(timed, result["precision"], ours=False)
        result["best_peer"] = peer and peer["row"]
        result["ratio_to_best_peer"] = peer and result["median_seconds"] / peer["median_seconds"]


def best(results: Sequence[Result], precision: str, *, ours: bool) -> Result | None:
    """The fastest of a precision, of ours or of the peers."""
    those = [r for r in results if r["precision"] == precision and r["ours"] == ours and "median_seconds" in r]
    return min(those, key=lambda result: result["median_seconds"], default=None)


def verdicts(case: Case, results: Sequence[Result]) -> Iterator[str]:
    """A line a precision that has a row of ours; int8 has no peer, and is held against our bf16."""
    for precision in dict.fromkeys(result["precision"] for result in results if result["ours"]):
        ours = best(results, precision, ours=True)
        other = best(results, "bf16", ours=True) if precision == "int8" else best(results, precision, ours=False)
        label = "our bf16" if precision == "int8" else "best peer"
        if ours is None:
            yield f"{case} {precision}: ours was not measured"
            continue
        mine = f"{case} {precision}: ours ({ours['row'].removeprefix('ours ')}) {short(ours['median_seconds'])} s"
        if other is None:
            yield f"{mine}, no {label} to compare with"
            continue
        ratio = ours["median_seconds"] / other["median_seconds"]
        apart = "" if ours["group"] == other["group"] else " (not in turn)"
        name = other["row"].removeprefix("ours ")
        yield f"{mine}, {label} ({name}) {short(other['median_seconds'])} s: {ratio:.2f}{apart}"


def memory_verdicts(case: Case, results: Sequence[Result]) -> Iterator[str]:
    """Ours that needs the least against the peer that does, a line a precision."""
    for precision in dict.fromkeys(result["precision"] for result in results if result["ours"]):
        known = [r for r in results if r["precision"] == precision and r.get("peak_memory_gb")]
        least = {ours: min((r for r in known if r["ours"] == ours), key=peak, default=None) for ours in (True, False)}
        mine, theirs = least[True], least[False]
        if mine and theirs:
            yield (
                f"{case} {precision} peak memory: ours ({mine['row'].removeprefix('ours ')}) {peak(mine):.2f} GB, "
                f"leanest peer ({theirs['row']}) {peak(theirs):.2f} GB: {peak(mine) / peak(theirs):.2f}"
            )


def peak(result: Result) -> float:
    return float(result["peak_memory_gb"])


def compare(arguments: argparse.Namespace, rows: Sequence[Row], save: Callable[[dict[str, Any]], None]) -> None:
    """The whole run. What compare.json is to hold is saved after each case, so that a run cut short is not lost."""
    timed = [
        Case(graph, size, batch)
        for batch in arguments.batches
        for size in arguments.sizes
        for graph in arguments.graphs
    ]
    sized = [Case(MEMORY_GRAPH, size, 1) for size in arguments.memory_sizes]
    report: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.compare", *sys.argv[1:]]),
        "started": now(),
        "finished": None,
        "machine": {**describe_machine(arguments.device), "load_average_before": round(os.getloadavg()[0], 2)},
        "model": arguments.model,
        **{name: [] for name in ("results", "turns", "memory", "verdicts")},
    }
    with (
        tempfile.TemporaryDirectory(prefix="compare-") as directory,
        Console(stderr=True).status("Starting") as status,
    ):
        scratch = Path(directory)
        planned = [(case, True) for case in timed] + [(case, False) for case in sized]
        found = prepare(scratch, arguments.model, planned, arguments.device, status)
        gflop = found["gflop"]
        report |= {name: found[name] for name in ("parameters", "peak_gflops")}
        report["gflop"] = [{**case._asdict(), "gflop": number} for case, number in gflop.items()]
        report["export_seconds"], broken = export(scratch, arguments.model, rows, status)
        for case in timed:
            measured, orders = measure(scratch, case, rows, arguments.rounds, broken, status)
            derive(measured, gflop[case], found["peak_gflops"])
            report["results"] += measured
            report["turns"] += [
                {**case._asdict(), "group": group, "calls": calls} for group, calls in enumerate(orders, 1)
            ]
            report["verdicts"] += verdicts(case, measured)
            save(report)
        for case in sized:
            alone = []
            for row in rows:  # one at a time: only the first call is of interest
                alone += measure(scratch, case, [row], 0, broken, status)[0]
                save(report | {"memory": report["memory"] + alone})
            report["memory"] += alone
            report["verdicts"] += memory_verdicts(case, alone)
    save(report | {"finished": now()})


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# The command line -----------------------------------------------------------------------------------------------------


def parse() -> tuple[argparse.Namespace, list[Row]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", nargs="+", choices=list(GRAPHS), default=list(GRAPHS))
    parser.add_argument("--sizes", nargs="+", type=pixels, help=f"pixels a side; {FULL['sizes']}")
    parser.add_argument("--batches", nargs="+", type=positive, default=[1])
    parser.add_argument("--rounds", type=positive, help=f"timed calls of every row; {FULL['rounds']}")
    parser.add_argument("--rows", nargs="+", metavar="TEXT", help="only rows with one of these texts in their name")
    parser.add_argument(
        "--memory-sizes", nargs="+", type=pixels, default=[], help="sizes to decode for peak memory alone"
    )
    parser.add_argument("--model", choices=["sd", "tiny"], default="sd", help="sd: random weights; tiny: the embedded")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: the rows of NVIDIA GPUs")
    parser.add_argument("--markdown", action="store_true", help="print the tables in Markdown")
    parser.add_argument(
        "--quick", action="store_true", help=f"sizes {QUICK['sizes']}, few rounds, no {' and no '.join(SLOW_TO_MAKE)}"
    )
    arguments = parser.parse_args()
    for name, value in (QUICK if arguments.quick else FULL).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    known = GPU_ROWS if arguments.device == "cuda" else ROWS
    if arguments.rows:
        rows = [row for row in known if any(text in str(row) for text in arguments.rows)]
    else:
        rows = [row for row in known if not (arguments.quick and {row.name, row.precision} & {*SLOW_TO_MAKE})]
    if not rows:
        parser.error(f"no row has {' or '.join(arguments.rows)} in its name; there are {', '.join(map(str, known))}")
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {arguments.out}: {error.strerror}")
    return arguments, rows


def pixels(text: str) -> int:
    size = positive(text)
    if size % MULTIPLE:
        raise argparse.ArgumentTypeError(f"{size} is not a multiple of {MULTIPLE}")
    return size


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def main() -> int:
    arguments, rows = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that workers and files go
    report: dict[str, Any] = {}

    def save(found: dict[str, Any]) -> None:
        report.update(found)
        (arguments.out / "compare.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    try:
        compare(arguments, rows, save)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except Failed as error:
        print(f"error: preparing: {error}", file=sys.stderr)
        return 1
    plot(report, arguments.out / "compare.png")
    (print_markdown if arguments.markdown else print_tables)(report)
    print("\n".join(report["verdicts"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
