"""What benchmarks.compare shows: the machine, tables on the terminal and in Markdown, the picture."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

Result = dict[str, Any]

#: what makes one CPU faster than another at this
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_bf16", "amx_int8")
PACKAGES = ("torch", "diffusers", "onnx", "onnxruntime", "openvino", "nncf", "tensorrt", "jax", "flax", "numpy")
OURS, PEERS = "#1f6fb2", "#b9c0c7"
PRECISION_COLUMN = 1
COLUMNS = (
    "row", "", "median s (min-max)", "img/s", "ratio", "GFLOP/s", "peak", "GB", "load", "1st", "PSNR", "max abs"
)  # fmt: skip
LEGEND = (
    "ratio: to the best peer of the precision. GFLOP/s: multiplications and additions of the model as written, by the "
    "median; peak: their share of the fastest matrix product here. GB: peak memory, of the GPU where that computes. "
    "load, 1st: seconds to open, and of the first call, in which some compile. PSNR (dB), max abs: against PyTorch in "
    "fp32."
)
NARROWEST = 100  #: characters that a table needs


def describe_machine(device: str) -> dict[str, Any]:
    cpu = _first_values(Path("/proc/cpuinfo"))
    memory = _first_values(Path("/proc/meminfo")).get("MemTotal", "0 kB")
    flags = cpu.get("flags", "").split()
    return {
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instruction_sets": [flag for flag in FLAGS if flag in flags],
        "memory_gb": round(int(memory.split()[0]) * 1024 / 1e9, 1),
        "os": platform.platform(),
        "python": platform.python_version(),
        "packages": dict(_versions()),
        **({"gpu": _describe_gpu()} if device == "cuda" else {}),
    }


def _describe_gpu() -> str:
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        name, driver, memory = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0].split(", ")
    except (OSError, ValueError):
        return "a GPU of which nvidia-smi says nothing"
    return f"{name}, {memory}, driver {driver}"


def _first_values(path: Path) -> dict[str, str]:
    """{name: value} of lines "name : value", the first of each name; nothing where there is no such file."""
    values: dict[str, str] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            values.setdefault(name.strip(), value.strip())
    return values


def _versions() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue


# Tables ---------------------------------------------------------------------------------------------------------------


def cases(results: list[Result]) -> Iterator[tuple[str, list[Result]]]:
    """(title, results) of each graph, size and batch."""
    for (graph, size, batch), those in groupby(results, key=lambda r: (r["graph"], r["size"], r["batch"])):
        yield f"{graph} {size}x{size}" + (f", batch {batch}" if batch > 1 else ""), list(those)


def cells(result: Result) -> tuple[str, ...]:
    """A line of the table, the texts of COLUMNS."""
    name = (result["row"], result["precision"])
    if "unavailable" in result:
        return (*name, "not run", *[""] * (len(COLUMNS) - 3))
    ratio, share, psnr = result["ratio_to_best_peer"], result["share_of_peak"], result["psnr_db"]
    median, low, high = (short(result[f"{what}_seconds"]) for what in ("median", "min", "max"))
    return (
        *name,
        f"{median} ({low}-{high})",
        short(result["images_per_second"]),
        "" if ratio is None else f"{ratio:.2f}",
        f"{result['gflops']:,.0f}",
        "" if share is None else f"{share:.0%}",
        "" if result["peak_memory_gb"] is None else f"{result['peak_memory_gb']:.2f}",
        f"{result['load_seconds']:.1f}",
        f"{result['first_call_seconds']:.1f}",
        "equal" if psnr is None else f"{psnr:.1f}",
        f"{result['max_abs']:.1e}",
    )


def short(number: float) -> str:
    """Three digits, and no more than four behind the point."""
    return f"{number:.{4 if number < 0.1 else 3 if number < 1 else 2 if number < 10 else 1 if number < 100 else 0}f}"


def notes(results: list[Result]) -> Iterator[str]:
    """Why rows were not run, and which were not measured in turn with which."""
    for result in results:
        if "unavailable" in result:
            yield f"not run: {result['row']} {result['precision']}: {result['unavailable']}"
    groups: dict[int, list[str]] = {}
    for result in results:
        if "group" in result:
            groups.setdefault(result["group"], []).append(f"{result['row']} {result['precision']}")
    if len(groups) > 1:
        together = "; ".join(", ".join(names) for names in groups.values())
        yield f"they did not fit the memory together; in turn with one another were: {together}"


def print_tables(report: dict[str, Any]) -> None:
    console = Console(highlight=False, markup=False, emoji=False)
    console.width = max(console.width, NARROWEST)
    for line in introduction(report):
        console.print(line)
    for title, results in cases(report["results"]):
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, title=f"\n{title}", title_justify="left")
        for column, heading in enumerate(COLUMNS):
            table.add_column(heading, no_wrap=True, justify="left" if column <= PRECISION_COLUMN else "right")
        for result in results:
            style = "dim" if "unavailable" in result else "bold" if result["ours"] else ""
            table.add_row(*(Text(cell, style) for cell in cells(result)))
        console.print(table)
        for note in notes(results):
            console.print(note)
    for title, results in cases(report["memory"]):
        console.print(f"\nPeak memory, {title}")
        for result in results:
            console.print(f"  {result['row']} {result['precision']}: {memory_text(result)}")
    console.print(f"\n{LEGEND}\n")


def print_markdown(report: dict[str, Any]) -> None:
    print("\n".join(introduction(report)))
    for title, results in cases(report["results"]):
        print(f"\n**{title}**\n")
        print(f"| {' | '.join(COLUMNS)} |")
        print(f"|---|---|{'---:|' * (len(COLUMNS) - 2)}")
        for result in results:
            bold = "**" if result["ours"] else ""
            name, *rest = cells(result)
            print(f"| {bold}{name}{bold} | {' | '.join(rest)} |")
        for note in notes(results):
            print(f"\n{note}")
    for title, results in cases(report["memory"]):
        print(f"\n| peak memory, {title} | precision | GB |\n|---|---|---:|")
        for result in results:
            print(f"| {result['row']} | {result['precision']} | {memory_text(result)} |")
    print(f"\n{LEGEND}\n")


def memory_text(result: Result) -> str:
    if "unavailable" in result:
        return f"not run: {result['unavailable']}"
    return "unknown" if result["peak_memory_gb"] is None else f"{result['peak_memory_gb']:.2f} GB"


def introduction(report: dict[str, Any]) -> Iterator[str]:
    machine = report["machine"]
    yield (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']:.0f} GB, "
        f"{' '.join(machine['instruction_sets'])}"
    )
    if "gpu" in machine:
        yield machine["gpu"]
    yield ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    measured = {result["precision"] for result in report["results"]}
    peaks = (
        f"{precision} no number ({peak})" if isinstance(peak, str) else f"{precision} {peak:,.0f}"
        for precision, peak in report["peak_gflops"].items()
        if precision in measured
    )
    yield f"Fastest matrix products, GFLOP/s: {', '.join(peaks)}"
    if machine["load_average_before"] > machine["cores"] / 2:
        # OpenMP, and so PyTorch, suffers many times more than the others where a thread has to wait for a core.
        yield f"Not to be trusted: the machine was busy before this run (load average {machine['load_average_before']})"
    yield f"{report['command']} ({report['parameters'] / 1e6:.1f} M parameters)"


# The picture ----------------------------------------------------------------------------------------------------------


def plot(report: dict[str, Any], path: Path) -> None:
    """Medians as bars, a panel for each graph, size and batch; the whiskers are the fastest and slowest call."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    panels = [(title, [r for r in results if "median_seconds" in r]) for title, results in cases(report["results"])]
    panels = [(title, results) for title, results in panels if results]
    if not panels:
        path.unlink(missing_ok=True)  # an older picture would not be of this run
        return
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    tallest = max(len(results) for _, results in panels)
    with pyplot.rc_context({"font.family": "sans-serif", "font.size": 10, "axes.titleweight": "bold"}):
        figure, axes = pyplot.subplots(
            lines, columns, figsize=(8.5 if columns == 1 else 11.6, (0.31 * tallest + 1.0) * lines + 0.9), squeeze=False
        )
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for axis, (title, results) in zip(axes.flat, panels, strict=False):
            _panel(axis, title, results)
        machine = report["machine"]
        figure.suptitle(
            f"VAE of {report['parameters'] / 1e6:.0f} M parameters on "
            + machine.get("gpu", f"{machine['cores']} cores, {machine['cpu']}"),
            x=0.01, ha="left", fontsize=11,
        )  # fmt: skip
        handles = [Patch(color=OURS, label="ours"), Patch(color=PEERS, label="peers")]
        figure.legend(handles=handles, loc="upper right", ncols=2, frameon=False)
        figure.tight_layout(rect=(0, 0, 1, 0.98))
        figure.savefig(path, dpi=150, facecolor="white")
        pyplot.close(figure)


def _panel(axis: Any, title: str, results: list[Result]) -> None:
    """From the top down: precision after precision, the fastest first."""
    order = list(dict.fromkeys(result["precision"] for result in results))
    results = sorted(results, key=lambda r: (order.index(r["precision"]), r["median_seconds"]))
    longest = max(result["max_seconds"] for result in results)
    for place, result in enumerate(results):
        y = place + 0.6 * order.index(result["precision"])  # a gap between precisions
        median, low, high = (result[f"{what}_seconds"] for what in ("median", "min", "max"))
        axis.barh(y, median, height=0.72, color=OURS if result["ours"] else PEERS)
        axis.plot([low, high], [y, y], color="#333333", linewidth=1.1)
        axis.text(high + 0.015 * longest, y, f"{short(median)} s", va="center", fontsize=9, color="#333333")
        name = f"{result['row'].removeprefix('ours ')}  {result['precision']}"
        weight = "bold" if result["ours"] else "normal"
        axis.text(-0.015 * longest, y, name, va="center", ha="right", fontsize=9, fontweight=weight)
    axis.set_title(f"{title}, median seconds", loc="left", fontsize=10)
    axis.set_xlim(0, 1.16 * longest)
    axis.set_ylim(len(results) - 0.4 + 0.6 * (len(order) - 1), -0.6)
    axis.set_yticks([])
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    axis.tick_params(axis="x", length=0, colors="#777777", labelsize=8)
    axis.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axis.set_axisbelow(True)
