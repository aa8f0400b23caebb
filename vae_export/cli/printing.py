"""Output of the command line: tables, progress bar, doctor report."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from runtimes import Bundle
from runtimes.backends import BACKENDS
from runtimes.errors import BundleError, NotInstalled, NumericsError
from runtimes.files import check_writable, is_stdout, is_stream, written_whole
from runtimes.manifest import Manifest
from runtimes.names import FP16_LARGEST
from vae_export.families import FAMILIES
from vae_export.targets import TARGETS

if TYPE_CHECKING:
    from runtimes.tensorrt.plan_cache import CachedPlan
    from vae_export.rewrites.rescale import MeasuredRanges
    from vae_export.tune import Tuned

# Markup is disabled, because paths, models and messages may contain brackets. `Text` objects set colours.
out = Console(highlight=False, markup=False, emoji=False)
err = Console(stderr=True, highlight=False, markup=False, emoji=False)


def say(text: str, console: Console = out, *, first: str = "") -> None:
    """Print text as one line, without wrapping; its prefix `first` is red."""
    line = Text(printable(text))
    line.stylize("bold red", 0, len(first))
    console.print(line, soft_wrap=True)


def console_beside(path: Path, as_json: bool = False) -> Console:
    """Return the console for the text of a command that writes data to `path`: stderr if the data go to stdout.

    Raises `BundleError` if `path` cannot be written, or if both data and JSON would go to standard output.
    """
    check_writable(path)
    if not is_stdout(path):
        return out
    if as_json:
        raise BundleError("--json and --out - both write to standard output; give --out a file")
    return err


def printable(text: object) -> str:
    """Return the text on one line, without escape sequences, which an untrusted bundle or file could contain."""
    return "".join(character if character.isprintable() else " " for character in str(text))


def to_json(data: Any) -> str:
    """Return the data as JSON text, with null for NaN and infinity, which JSON lacks."""
    return json.dumps(_finite(data), indent=2, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {name: _finite(value) for name, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def print_error(error: Exception, exit_code: int, message: str | None = None) -> None:
    """Print an error as JSON, with its measurements if it has any."""
    record = {"class": type(error).__name__, "message": message or str(error), "exit_code": exit_code}
    if isinstance(error, NumericsError) and error.measurements:
        record["measurements"] = error.measurements
    with suppress(OSError):  # the error may be that standard output cannot be written
        print(to_json({"error": record}))


def print_result(data: Any, table: Any, as_json: bool, console: Console = out) -> None:
    """Print a result as JSON, or as a table or line of text."""
    if as_json:
        print(to_json(data))
    elif isinstance(table, str):
        say(table, console)
    else:
        console.print(table)


def print_export(path: Path, bundle: Bundle, as_json: bool) -> None:
    """Print an exported bundle and its deviation from the reference."""
    manifest = bundle.manifest
    if as_json:
        print(to_json({"bundle": str(bundle.path), "manifest": json.loads(manifest.to_json())}))
        return
    if "measurements" in manifest.validation:
        out.print(validation_table(manifest.validation["measurements"]))
    else:
        say("not validated: the graphs were not compared with the model", err)
    for line in rewrites_text(manifest.rewrites):
        say(line)
    size = sum(entry.size for entry in manifest.files.values()) / 1e6
    say(f"{path}: {manifest.target} {manifest.precision}, {size:.1f} MB")


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Return a context with a progress callback (description, steps done, total steps) that drives a bar on stderr.

    The bar is cleared at the end.
    """
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    # Without a terminal it would only print an empty line.
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("Starting", total=None)
        yield lambda what, done, total: progress.update(task, description=what, completed=done, total=total)


def validation_table(measurements: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table of comparisons with the reference."""
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title="Against the reference", title_justify="left"
    )
    for heading in ("graph", "by", "input", "shape", "max abs", "PSNR dB", "uint8", ""):
        numbers = heading in ("max abs", "PSNR dB", "uint8")
        # On a narrow terminal text columns wrap, so that numbers are not truncated.
        table.add_column(heading, no_wrap=heading not in ("by", "input"), justify="right" if numbers else "left")
    for m in measurements:
        psnr, steps = m["psnr_db"], m["uint8_steps"]
        table.add_row(
            m["graph"],
            m.get("tiling") or m["by"],
            m["input"].removeprefix("photo "),
            "x".join(map(str, m["shape"])),
            f"{m['max_abs']:.1e}",
            "equal" if psnr is None else f"{psnr:.1f}",
            "" if steps is None else str(steps),
            Text("ok", "green") if m["passed"] else Text("missed" if m["finite"] else "NaN", "red"),
        )
    return table


def measurements_table(measurements: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table of the measurements of a `NumericsError`: comparisons with the reference, or any other rows."""
    if all("psnr_db" in row for row in measurements):
        return validation_table(measurements)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="Measured", title_justify="left")
    names = list(dict.fromkeys(name for row in measurements for name in row))
    for name in names:
        table.add_column(name.replace("_", " "), overflow="fold")
    for row in measurements:
        table.add_row(*(_cell(row[name]) if name in row else "" for name in names))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return f"{len(value)}: {printable(', '.join(map(str, value)))}" if value else "none"
    return printable(value)


def latents_of(manifest: Manifest) -> str:
    """Describe the latents of a bundle: channels, size, and how a diffusion model has them."""
    config, space = manifest.config, manifest.latent_space
    text = f"{space.channels} latent channels, 1/{space.factor} of the image's size"
    if space.patch == 1:
        factors = [getattr(config, name, None) for name in ("scaling_factor", "shift_factor")]
        return f"{text}, scaling {factors[0]}, shift {factors[1]}"
    return f"{text}; normalised {space.normalised_channels} channels, 1/{space.normalised_factor}"


def bundle_table(path: str, manifest: Manifest) -> Table:
    """Return a table of the contents of a bundle."""
    source = manifest.source
    commit = f" at {source['commit']}" if source.get("commit") else ""
    verdict = manifest.validation.get("verdict", "unknown")
    table = Table(show_header=False, title=printable(path), title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")  # hashes are wrapped, not truncated
    table.add_row("target", f"{manifest.target} {manifest.precision}, by vae-export {printable(manifest.version)}")
    table.add_row("source", printable(f"{source.get('given')}{commit}"))
    if source.get("changed_in_memory"):
        table.add_row("tensors sha256", printable(f"{source.get('tensors_sha256')}, changed in memory after loading"))
    else:
        table.add_row("weights sha256", printable(source.get("weights_sha256")))
    if manifest.engine is not None:
        gpus = ", ".join(manifest.engine.gpus) or "all supported GPUs"
        table.add_row("engine", printable(f"{manifest.engine.flavour} {manifest.engine.version} for {gpus}"))
        for profile in manifest.engine.profiles:
            table.add_row("profile", f"{profile}, batch x height x width")
    table.add_row("model", printable(f"{manifest.family}: {latents_of(manifest)}"))
    if manifest.latents != "raw":
        table.add_row("latents of the graphs", "normalised, as the diffusion model has them")
    for graph, spec in manifest.graphs.items():
        shapes = (f"{t.name} {t.dtype} [{', '.join(map(str, t.shape))}]" for t in (spec.input, spec.output))
        table.add_row(graph, printable(" -> ".join(shapes)))
    for name, entry in manifest.files.items():
        table.add_row(name, f"{entry.size:,} bytes, sha256 {entry.sha256[:16]}...")
    measurements = manifest.validation.get("measurements")
    count = len(measurements) if isinstance(measurements, list) else "no"
    table.add_row("validation", printable(f"{verdict} ({manifest.validation.get('reason', f'{count} comparisons')})"))
    return table


def rewrites_text(rewrites: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield lines of text about the rescaled activations and their factors."""
    for rewrite in rewrites:
        if rewrite["name"] != "rescale_activations":
            continue
        largest, exponents = rewrite["largest_activation"], rewrite["divided_by_power_of_two"]
        yield (
            f"largest activation {largest:,.0f}; fp16 ends at {FP16_LARGEST:,.0f}, "
            f"and a factor of {rewrite['headroom']:.0f} is kept below it"
        )
        for place, exponent in exponents.items():
            yield f"  {place} divided by 2^{exponent}"
        if not exponents:
            yield "  nothing had to be rescaled"


def ranges_table(found: MeasuredRanges, picture: Path) -> Table:
    """Return a table of the twelve places with the largest activations."""
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, title=f"Largest activations, plotted in {picture}", title_justify="left"
    )
    for heading in ("place", "before", "after"):
        table.add_column(heading, no_wrap=True, justify="left" if heading == "place" else "right")
    largest = sorted(found.before.largest.items(), key=lambda item: -item[1])[:12]
    for place, value in largest:
        before = Text(f"{value:,.1f}", "red" if value > FP16_LARGEST else "")
        table.add_row(place, before, f"{found.after.largest[place]:,.1f}")
    return table


def tuning_table(tuned: Tuned, path: str) -> Table:
    """Return a table of all timed forms, with the winners marked."""
    title = printable(f"Tuned: {path}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title=title, title_justify="left")
    for heading in ("graph", "upsample", "norm", "last block", "convs", "threads", "median s", "ratio", ""):
        table.add_column(heading, no_wrap=True, justify="right" if heading in ("median s", "ratio") else "left")
    fastest: dict[tuple[str, str], float] = {}
    for trial in tuned.trials:
        race = trial.graph, trial.race
        fastest[race] = min(trial.median, fastest.get(race, trial.median))
    for trial, before in zip(tuned.trials, (None, *tuned.trials), strict=False):
        if before is not None and before.race != trial.race:
            table.add_section()
        table.add_row(
            trial.graph,
            trial.form.upsample if trial.graph == "decoder" else "",
            trial.form.norm,
            trial.form.last_block if trial.graph == "decoder" else "",
            trial.form.convolutions,
            str(trial.threads or "auto"),
            f"{trial.median:.3f}",
            f"{trial.median / fastest[trial.graph, trial.race]:.2f}",
            Text("kept", "green") if trial is tuned.winners[trial.graph] else "",
        )
    return table


def cache_table(directory: Path, plans: Sequence[CachedPlan]) -> Table:
    """Return a table of the cached plans, in the given order."""
    total = sum(plan.size for plan in plans)
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title=printable(f"{len(plans)} plans, {total / 2**20:.0f} MiB in {directory}"),
        title_justify="left",
    )
    for heading in ("plan", "onnx sha256", "built with", "GPU", "MiB", "last used"):
        table.add_column(heading, no_wrap=True, justify="right" if heading == "MiB" else "left")
    for plan in plans:
        made_of = plan.made_of
        table.add_row(
            plan.key[:12],
            printable(made_of.get("onnx"))[:12],
            printable(f"{made_of.get('flavour')} {made_of.get('version')}"),
            printable(" ".join(map(str, made_of.get("gpus", ())))),
            f"{plan.size / 2**20:.1f}",
            datetime.fromtimestamp(plan.used).isoformat(" ", "minutes"),
        )
    return table


def plot_format(path: Path) -> str:
    """Return the format of the plot at `path`. Raises `BundleError` if matplotlib does not support the extension."""
    formats = _pyplot().gcf().canvas.get_supported_filetypes()
    _pyplot().close()
    extension = path.suffix.lower().removeprefix(".")
    if not extension and is_stream(path):
        return "png"
    if extension not in formats:
        raise BundleError(f"cannot write {path}: the name's extension says the format; give .png, .svg or .pdf")
    return extension


def _pyplot() -> Any:
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise NotInstalled("plotting needs matplotlib: pip install 'vae-export[report]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_ranges(found: MeasuredRanges, path: Path, format: str) -> None:
    """Plot the largest activations along the computation, before and after rescaling, and the limit of fp16."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(2, 1, figsize=(11, 7), sharey=True, layout="constrained")
    for side, axis in zip(("encoder", "decoder"), axes, strict=True):
        places = [place for place in found.before.largest if place.startswith(side)]
        blocks = [" ".join(place.split(".")[1:3] if "blocks" in place else place.split(".")[1:2]) for place in places]
        starts = [i for i, block in enumerate(blocks) if "block" in block and (i == 0 or block != blocks[i - 1])]
        for ranges, label, colour in ((found.before, "as it is", "#c0392b"), (found.after, "rescaled", "#2471a3")):
            values = [ranges.largest[place] or float("nan") for place in places]
            axis.plot(values, label=label, color=colour, linewidth=1.3)
        axis.axhline(FP16_LARGEST, color="black", linestyle="--", linewidth=1, label=f"end of fp16, {FP16_LARGEST:.0f}")
        axis.set(yscale="log", title=side, ylabel="largest |activation|", xmargin=0.01)
        axis.set_xticks(starts, [blocks[i] for i in starts], rotation=30, ha="right", fontsize=8)
        axis.grid(alpha=0.3)
    axes[0].legend(loc="lower right", fontsize=8)
    try:
        with written_whole(path) as partial:
            figure.savefig(partial, dpi=110, format=format)
    finally:
        pyplot.close(figure)


PACKAGES = (
    "numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx", "jax", "flax",
    "torch", "onnx", "onnxscript", "safetensors", "huggingface_hub", "diffusers",
)  # fmt: skip


def diagnose() -> dict[str, Any]:
    """Return what is installed, the state of each backend on this machine, and whether exporting works."""
    from runtimes.doctor import check_backend

    packages: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    exporting = all(packages[name] for name in ("torch", "onnx", "onnxscript", "safetensors", "huggingface_hub"))
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "backends": {name: check_backend(name) for name in BACKENDS},
        "targets": list(TARGETS),
        "families": list(FAMILIES),
        "export": "works" if exporting else "needs pip install 'vae-export[export]'",
    }


def doctor_table(found: Mapping[str, Any]) -> Table:
    """Return a table of the result of `diagnose`."""
    table = Table("what", "state", title=f"Python {found['python']} on {found['platform']}", title_justify="left")
    for backend, devices in found["backends"].items():
        for device, state in devices.items():
            table.add_row(f"{backend} on {device}", Text(state, "green" if state.startswith("works") else "yellow"))
    table.add_row("exporting", found["export"])
    table.add_row("targets", ", ".join(found["targets"]))
    table.add_row("families", ", ".join(found["families"]))
    for name, version in found["packages"].items():
        table.add_row(name, version or Text("not installed", "dim"))
    return table
