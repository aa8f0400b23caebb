"""The result of a stage: OUT/STAGE.json with everything, OUT/STAGE.md for people. Both are whole at any time."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.compare_report import describe_machine, short
from benchmarks.gpu.card import WHO, ask
from benchmarks.gpu.made import sources_digest
from runtimes.files import written_whole

Row = dict[str, Any]
ROOT = Path(__file__).parents[2]
PACKAGES = (
    "torch", "triton", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "jax", "jaxlib", "flax", "cupy-cuda13x",
    "tensorrt", "tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu13-libs", "cuda-bindings", "nvidia-cudnn-cu13",
    "nvidia-cublas", "numpy", "pyarrow", "pillow", "pytest",
)  # fmt: skip
LEAST_PSNR_DB = 30.0  #: that of bf16 in vae_export.comparison, the least that any precision must keep
TIMES = (
    "model", "graph", "size", "batch", "precision", "how", "device ms", "host ms (least-most)", "TFLOP/s", "of peak",
    "of best torch", "peak GB", "PSNR dB", "first s", "SM MHz", "°C",
)  # fmt: skip
LEGEND = (
    "device: between two events; host: from the call until its work is done; medians. TFLOP/s: of the model as it is "
    "written, by the device's time, or the host's. of peak: share of the fastest matrix product of that precision on "
    "this card (stage torch). of best torch: host time over that of the fastest row of stage torch for the same model, "
    "graph, size, batch and precision. PSNR: of the first image, against PyTorch in fp32 without TF32. SM MHz, °C: "
    "median clock, and highest temperature, during the row."
)


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Of the project, where it is a checkout; "+" where files differ from it."""
    try:
        head, changed = (
            subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class Report:
    """What is known of a stage so far. Everything that changes it also writes it."""

    def __init__(
        self, out: Path, stage: str, command: str, rehearsal: bool, kept: dict[str, Any] | None = None
    ) -> None:
        self.path = out / f"{stage}.json"
        self._torch = out / "torch.json"
        machine = describe_machine("cpu")
        self.data: dict[str, Any] = {
            "stage": stage,
            "rehearsal": rehearsal,
            "commit": commit(),
            "sources": sources_digest(),
            "commands": [*(kept or {}).get("commands", []), command],
            "started": now(),
            "ended": None,
            "end": "at work, or cut off",
            "card": ask(WHO) or None,
            "machine": {name: machine[name] for name in ("cpu", "cores", "memory_gb", "os", "python")},
            "packages": versions(),
            "before": None,
            "after": None,
            "during": None,
            "lacks": None,
            "notes": [],
            "rows": [],
            "skipped": [],
            "stderr": "",
        }
        if kept:
            self.data |= {name: kept[name] for name in ("rows", "notes", "before")}

    @property
    def rows(self) -> list[Row]:
        rows: list[Row] = self.data["rows"]
        return rows

    def add(self, row: Row) -> None:
        self.data["rows"].append(row)
        self.write()

    def set(self, **values: Any) -> None:
        self.data |= values
        self.write()

    def note(self, text: str) -> None:
        if text not in self.data["notes"]:
            self.data["notes"].append(text)
        self.write()

    def write(self) -> None:
        derive(self.rows, self.rows if self.data["stage"] == "torch" else self._torch_rows())
        texts = {self.path: json.dumps(self.data, indent=1), self.path.with_suffix(".md"): markdown(self.data)}
        for path, text in texts.items():
            with written_whole(path) as partial:
                partial.write_text(f"{text}\n", encoding="utf-8")

    def _torch_rows(self) -> list[Row]:
        """The rows of stage torch, where they are of the same card."""
        found = read(self._torch)
        same = found is not None and all(found[name] == self.data[name] for name in ("card", "rehearsal"))
        return found["rows"] if found is not None and same else []


def failures(data: dict[str, Any]) -> list[str]:
    """A line for each row that failed."""
    return [f"{row['name']}: {row['failed']}" for row in data["rows"] if "failed" in row]


def wrong_results(data: dict[str, Any]) -> list[str]:
    """A line for each row whose output is not that of the reference."""
    lines = [f"{row['name']}: {row['wrong']}" for row in data["rows"] if "wrong" in row]
    known = [row for row in data["rows"] if row.get("psnr_db") is not None]
    return lines + [f"{r['name']}: {r['psnr_db']:.1f} dB" for r in known if r["psnr_db"] < LEAST_PSNR_DB]


def read(path: Path) -> dict[str, Any] | None:
    """An earlier result, or None where there is none that can be read."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def kept_from(path: Path, rehearsal: bool) -> dict[str, Any] | None:
    """An earlier result to go on with, of the same card, sources and packages; rows that failed are to run again."""
    found = read(path)
    now_here = {"card": ask(WHO) or None, "sources": sources_digest(), "packages": versions(), "rehearsal": rehearsal}
    if found is None or any(found.get(name) != value for name, value in now_here.items()):
        return None
    return found | {"rows": [row for row in found["rows"] if not {"failed", "lacks"} & row.keys()]}


# What follows from the rows -------------------------------------------------------------------------------------------


def derive(rows: list[Row], torch_rows: list[Row]) -> None:
    """TFLOP/s, share of the peak, and ratio to the fastest row of PyTorch. In place."""
    peaks = {
        row["precision"]: row["tflops"] for row in torch_rows if row["name"].startswith("peak ") and "tflops" in row
    }
    best: dict[tuple[Any, ...], float] = {}
    for row in torch_rows:
        if "host_ms" in row:
            best[case_of(row)] = min(row["host_ms"], best.get(case_of(row), row["host_ms"]))
    for row in rows:
        if "host_ms" not in row:
            continue
        if row.get("flop"):
            row["tflops"] = row["flop"] / row.get("device_ms", row["host_ms"]) / 1e9
            if row["precision"] in peaks:
                row["of_peak"] = row["tflops"] / peaks[row["precision"]]
        if case_of(row) in best:
            row["of_best_torch"] = row["host_ms"] / best[case_of(row)]


def case_of(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("model", "graph", "size", "batch", "precision"))


# For people -----------------------------------------------------------------------------------------------------------


def markdown(data: dict[str, Any]) -> str:
    return "\n".join(_lines(data))


def _lines(data: dict[str, Any]) -> Iterator[str]:
    card = data["card"]
    on = "the CPU" if card is None else f"{card['name']}, driver {card['driver']}"
    yield f"# Stage {data['stage']} on {on}"
    yield ""
    if data["rehearsal"]:
        faked = " NVIDIA's packages are imitated by tests/fakes." if data["stage"].endswith("-faked") else ""
        yield f"**A rehearsal on the CPU with the smallest sizes: no number here says anything.{faked}**"
        yield ""
    yield f"- {data['started']} to {data['ended'] or '(not ended)'}: {data['end']}"
    yield from (f"- `{command}`" for command in data["commands"])
    machine = data["machine"]
    yield f"- {machine['cores']} cores, {machine['cpu']}, Python {machine['python']}"
    yield f"- commit {data['commit']}, sources {data['sources']}"
    yield f"- {', '.join(f'{name} {version}' for name, version in data['packages'].items())}"
    yield f"- before: {_state(data['before'])}; after: {_state(data['after'])}"
    if data["lacks"]:
        yield f"- **lacks:** {data['lacks']}"
    yield from (f"- {note}" for note in data["notes"])
    timed = [row for row in data["rows"] if "host_ms" in row]
    others = [row for row in data["rows"] if "host_ms" not in row and not {"failed", "lacks"} & row.keys()]
    if timed:
        yield f"\n| {' | '.join(TIMES)} |"
        yield f"|---|---|---:|---:|---|---|{'---:|' * (len(TIMES) - 6)}"
        yield from (f"| {' | '.join(_cells(row))} |" for row in timed)
        yield f"\n{LEGEND}"
        remarks = [f"- {row['name']}: {row[what]}" for row in timed for what in ("wrong", "said") if row.get(what)]
        if remarks:
            yield "\nWhat was noticed:\n"
            yield from remarks
    if others:
        yield "\n| what | found |\n|---|---|"
        yield from (f"| {_escaped(row['name'])} | {_escaped(_found(row))} |" for row in others)
    for title, key in (("Failed", "failed"), ("Lacking", "lacks")):
        those = [f"- {row['name']}: {row[key]}" for row in data["rows"] if key in row]
        if those:
            yield f"\n{title}:\n"
            yield from those
    if data["skipped"]:
        yield f"\nNot run, for want of time ({len(data['skipped'])}): {'; '.join(data['skipped'])}"


def _state(state: dict[str, Any] | None) -> str:
    if not state:
        return "nvidia-smi says nothing"
    numbers = {name: state.get(name) for name in ("sm_mhz", "celsius", "watts", "used_mib")}
    return ", ".join(f"{name} {value:g}" for name, value in numbers.items() if isinstance(value, float))


def _cells(row: Row) -> Iterator[str]:
    def text(name: str, form: str = "{}") -> str:
        return form.format(row[name]) if row.get(name) is not None else ""

    yield from (_escaped(str(row.get(name, ""))) for name in ("model", "graph", "size", "batch", "precision", "how"))
    yield short(row["device_ms"]) if "device_ms" in row else ""
    yield f"{short(row['host_ms'])} ({short(row['host_ms_least'])}-{short(row['host_ms_most'])})"
    yield text("tflops", "{:.1f}")
    yield text("of_peak", "{:.0%}")
    yield text("of_best_torch", "{:.2f}")
    yield text("peak_memory_gb", "{:.2f}")
    yield ("equal" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}") if "psnr_db" in row else ""
    yield text("first_seconds", "{:.2f}")
    during = row.get("during") or {}
    yield f"{during['sm_mhz']['median']:.0f}" if "sm_mhz" in during else ""
    yield f"{during['celsius']['most']:.0f}" if "celsius" in during else ""


def _found(row: Row) -> str:
    facts = {name: value for name, value in row.items() if name not in ("name", "during", "rehearsal", "text")}
    lines = [f"{name} {f'{value:.4g}' if isinstance(value, float) else value}" for name, value in facts.items()]
    during = row.get("during") or {}
    return ", ".join(lines + [f"{name} of the card {values['median']:g} (median)" for name, values in during.items()])


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def outcome(row: Row) -> str:
    """What came of a row, for the terminal."""
    for what in ("failed", "lacks", "wrong"):
        if what in row:
            return f"{what}: {row[what]}"
    if "host_ms" in row:
        device = f", on the device {short(row['device_ms'])} ms" if "device_ms" in row else ""
        error = f", {row['psnr_db']:.1f} dB" if row.get("psnr_db") is not None else ""
        return f"{short(row['host_ms'])} ms{device}{error}"
    numbers = {name: value for name, value in row.items() if isinstance(value, float) and name != "took_seconds"}
    return ", ".join(f"{name} {value:.4g}" for name, value in numbers.items()) or "done"


def as_line(data: dict[str, Any]) -> str:
    """One line for the terminal."""
    counts = {
        "measured": sum(not {"failed", "lacks"} & row.keys() for row in data["rows"]),
        "failed": sum("failed" in row for row in data["rows"]),
        "lacking": sum("lacks" in row for row in data["rows"]),
        "not run": len(data["skipped"]),
    }
    text = ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "nothing measured"
    lacks = f"; lacks {data['lacks']}" if data["lacks"] else ""
    return f"{data['stage']}: {text}; {data['end']}{lacks}"
