"""The command line: parses, calls, prints. Everything it does is in the library.

Exit codes: 0 success, 1 a bug in this program, 2 wrong usage, 4 and up the error classes (see `runtimes.errors`),
130 and 143 interrupted (Ctrl-C, SIGTERM).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn, Optional

import typer

from runtimes import Bundle
from runtimes.bundle import ENGINE_TARGETS
from runtimes.cancellation import cancel_calls
from runtimes.cpus import available_cpus
from runtimes.errors import BackendUnavailable, NumericsError, VaeError
from vae_export import __version__
from vae_export.cli_dataset import dataset
from vae_export.cli_engines import Batch, Gpus, Pixels, Preferred, Profiles, engines, profiles_of
from vae_export.cli_images import images
from vae_export.cli_options import AsJson, BundlePath, Calibrate, Device, Model, Overwrite, Subfolder
from vae_export.cli_signing import signing
from vae_export.printing import (
    bundle_table,
    diagnose,
    doctor_table,
    err,
    plot_ranges,
    print_export,
    print_result,
    progress_bar,
    ranges_table,
    say,
    tuning_table,
    validation_table,
)

app = typer.Typer(
    help="Export the image VAE of latent diffusion models, verified, and run it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(images)
app.add_typer(engines)
app.add_typer(dataset)
app.add_typer(signing)

_stopped_by: list[int] = []  #: signals that asked this process to end


@app.callback(invoke_without_command=True)
def export(
    context: typer.Context,
    to: Annotated[
        Optional[str],
        typer.Option("--to", help="What to build: onnx, openvino, flax, tensorrt or tensorrt-rtx.", show_default=False),
    ] = None,
    model: Model = None,
    out_dir: Annotated[
        Optional[Path], typer.Option("--out", help="The bundle. (default: vae-TARGET-PRECISION)")
    ] = None,
    precision: Annotated[
        Optional[str],
        typer.Option(
            help="fp32, fp16 or bf16; int8 for OpenVINO. (default: fp32; fp16 for TensorRT)", show_default=False
        ),
    ] = None,
    io_precision: Annotated[str, typer.Option(help="Of inputs and outputs: fp32, or same as the precision.")] = "fp32",
    io: Annotated[
        str, typer.Option("--io", help="Of images: float [B, 3, H, W] in [-1, 1], or uint8 [B, H, W, 3].")
    ] = "float",
    calibrate: Calibrate = None,
    no_rescale: Annotated[
        bool,
        typer.Option("--no-rescale", help="Half precision as it is, to compare; add --no-validate if it overflows."),
    ] = False,
    subfolder: Subfolder = None,
    revision: Annotated[Optional[str], typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    config: Annotated[
        Optional[str], typer.Option(help="For a single file: its config.json, or a Hub id that has one.")
    ] = None,
    scaling_factor: Annotated[Optional[float], typer.Option(help="Where the checkpoint does not say it.")] = None,
    shift_factor: Annotated[Optional[float], typer.Option(help="Where the checkpoint does not say it.")] = None,
    height: Pixels = None,
    width: Pixels = None,
    batch: Batch = None,
    opt: Preferred = None,
    profile: Profiles = None,
    gpu: Gpus = None,
    tileable: Annotated[
        bool, typer.Option("--tileable", help="Add what seamless tiling needs; twice the size.")
    ] = False,
    no_validate: Annotated[
        bool, typer.Option("--no-validate", help="Do not compare with the reference; recorded.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Export the image VAE of latent diffusion models, verified, and run it.

    vae-export --to onnx            exports the embedded model

    vae-export --to onnx --model stabilityai/sdxl-vae --out sdxl
    """
    if version:
        say(__version__)
        return
    if context.invoked_subcommand is not None:
        return
    if to is None:
        raise typer.BadParameter("give what to build: --to onnx, openvino, flax, tensorrt or tensorrt-rtx")
    exporter = _import_exporter()
    with progress_bar() as progress:
        progress(f"Loading {model or 'the embedded model'}", 0, 1)
        loaded = exporter.load_model(
            model,
            subfolder=subfolder,
            config=config,
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
            hub=exporter.Hub(revision=revision),
        )
        precision = exporter.DEFAULT_PRECISION.get(to, "fp32") if precision is None else precision
        path = out_dir or Path(f"vae-{to}-{precision}")
        engine = None
        if to in ENGINE_TARGETS or any((height, width, batch, opt, profile, gpu)):
            exporter.check_choices(loaded, to, precision, io_precision, io)
            profiles = profiles_of(loaded.config.downscale, height, width, batch, opt, profile or [])
            engine = exporter.plan_engine(to, profiles, [part.strip() for part in gpu.split(",")] if gpu else [])
            for line in exporter.memory_lines(exporter.check_engine_memory(loaded, engine, precision)):
                say(line, err)
        bundle = exporter.export_bundle(
            loaded,
            path,
            target=to,
            precision=precision,
            io_precision=io_precision,
            io=io,
            rescale=not no_rescale,
            calibrate=calibrate,
            engine=engine,
            tileable=tileable,
            run_validation=not no_validate,
            overwrite=overwrite,
            progress=progress,
        )
    print_export(path, bundle, as_json)


@app.command()
def validate(
    bundle: BundlePath,
    model: Model = None,
    subfolder: Subfolder = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Compare a bundle with its model again, here and now; the model is loaded from where it came from."""
    exporter = _import_exporter()
    with progress_bar() as progress:
        reference = None if model is None else exporter.load_model(model, subfolder=subfolder)
        measurements = [
            m.to_dict() for m in exporter.validate_bundle(bundle, reference, device=device, progress=progress)
        ]
    print_result(
        {"bundle": str(bundle), "verdict": "passed", "measurements": measurements},
        validation_table(measurements),
        as_json,
    )


@app.command()
def tune(
    model: Annotated[Optional[str], typer.Argument(help="As --model of the export.", show_default=False)] = None,
    to: Annotated[
        str, typer.Option("--to", help="What to build: onnx or openvino; tensorrt or tensorrt-rtx on a GPU.")
    ] = "onnx",
    out_dir: Annotated[
        Optional[Path], typer.Option("--out", help="The bundle. (default: vae-TARGET-PRECISION-tuned)")
    ] = None,
    precision: Annotated[
        Optional[str], typer.Option(help="fp32, fp16 or bf16. (default: fp32; fp16 for TensorRT)", show_default=False)
    ] = None,
    height: Annotated[int, typer.Option(help="Pixels of the images that are timed.")] = 512,
    width: Annotated[int, typer.Option(help="Pixels of the images that are timed.")] = 512,
    rounds: Annotated[int, typer.Option(min=1, help="Timed calls of each form.")] = 3,
    subfolder: Subfolder = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Time the exact forms of the graphs on this machine, and export a verified bundle in the fastest."""
    exporter = _import_exporter()
    from vae_export.tune import tune_bundle

    precision = exporter.DEFAULT_PRECISION.get(to, "fp32") if precision is None else precision
    path = out_dir or Path(f"vae-{to}-{precision}-tuned")
    with progress_bar() as progress:
        loaded = exporter.load_model(model, subfolder=subfolder)
        tuned = tune_bundle(
            loaded,
            path,
            target=to,
            precision=precision,
            height=height,
            width=width,
            rounds=rounds,
            overwrite=overwrite,
            progress=progress,
        )
    found = {"bundle": str(path), "trials": [trial.to_dict() for trial in tuned.trials]}
    print_result(found, tuning_table(tuned, str(path)), as_json)


@app.command()
def inspect(bundle: BundlePath, as_json: AsJson = False) -> None:
    """Check a bundle's files against their hashes and show what is in it."""
    opened = Bundle(bundle)
    opened.verify()
    print_result(json.loads(opened.manifest.to_json()), bundle_table(str(bundle), opened.manifest), as_json)


@app.command()
def ranges(
    model: Annotated[Optional[str], typer.Argument(help="As --model of the export.", show_default=False)] = None,
    out_file: Annotated[Path, typer.Option("--out", help="The plot.")] = Path("ranges.png"),
    calibrate: Calibrate = None,
    subfolder: Subfolder = None,
    as_json: AsJson = False,
) -> None:
    """Measure how large activations get, before and after rescaling for half precision, and plot them."""
    exporter = _import_exporter()
    with progress_bar() as progress:
        loaded = exporter.load_model(model, subfolder=subfolder)
        found = exporter.measure_ranges(loaded, calibrate, progress)
    plot_ranges(found, out_file)
    print_result(found.to_dict(), ranges_table(found, out_file), as_json)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Show what is installed, which backends work here, and why the others do not."""
    found = diagnose()
    print_result(found, doctor_table(found), as_json)


# Helpers ----------------------------------------------------------------------------------------------------------


def _import_exporter() -> Any:
    """The exporting half of the program, which needs PyTorch; running bundles does not."""
    try:
        import torch

        from vae_export import export
    except ModuleNotFoundError as error:
        raise BackendUnavailable(f"exporting needs {error.name}: pip install 'vae-export[export,cpu]'") from None
    torch.set_num_threads(min(torch.get_num_threads(), available_cpus()))  # PyTorch does not know of quotas
    return export


def main() -> NoReturn:
    """Entry point: runs the command and turns every error into one line and an exit code."""
    try:
        with _heeding_signals():
            app(prog_name="vae-export")
    except VaeError as error:
        _exit_if_stopped()  # a call that was ended says so
        if isinstance(error, NumericsError) and error.measurements:
            err.print(validation_table(error.measurements))
        _complain("error", error)
        sys.exit(error.exit_code)
    except SystemExit:
        _exit_if_stopped()
        raise
    except Exception as error:
        _exit_if_stopped()  # a library may have made another exception of it
        if os.environ.get("VAE_EXPORT_DEBUG"):
            raise
        _complain("internal error", error)
        say("This is a bug; VAE_EXPORT_DEBUG=1 shows where.", err)
        sys.exit(1)
    sys.exit(0)


def _complain(what: str, error: Exception) -> None:
    err.print(what, style="bold red", end="")
    say(f" ({type(error).__name__}): {str(error) or 'no message'}", err)


@contextmanager
def _heeding_signals() -> Iterator[None]:
    """SIGINT and SIGTERM call `_stop`, and end what may keep it waiting: a call at work in native code."""
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN]
    reading, writing = os.pipe()  # Python writes each signal to it, whatever the main thread is at
    os.set_blocking(writing, False)
    left = threading.Event()

    def watch() -> None:
        while said := os.read(reading, 1):
            while said[0] in numbers and not left.wait(0.1):
                cancel_calls()  # again and again: the main thread may be just about to call
        os.close(reading)

    for number in numbers:  # SIG_IGN stays, as under nohup
        signal.signal(number, _stop)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        left.set()
        signal.set_wakeup_fd(before)
        os.close(writing)


def _stop(number: int, _: object) -> NoReturn:
    """On Ctrl-C and SIGTERM alike: unwind, so that nothing half-written stays behind.

    SystemExit, since versions of typer differ in what they make of KeyboardInterrupt.
    """
    _stopped_by.append(number)
    raise SystemExit(128 + number)


def _exit_if_stopped() -> None:
    if _stopped_by:
        say("interrupted; nothing was left half-written", err)
        sys.exit(128 + _stopped_by[0])
