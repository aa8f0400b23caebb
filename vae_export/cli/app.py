"""Commands for checkpoints and bundles, and the application, to which all groups of commands are added."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Optional

import typer

import vae_export
from runtimes import Bundle
from vae_export.cli.dataset import dataset
from vae_export.cli.engines import Batch, Gpus, Pixels, Preferred, Profiles, engines, profiles_of
from vae_export.cli.images import images
from vae_export.cli.options import (
    AsJson,
    BundlePath,
    Calibrate,
    Device,
    Io,
    IoPrecision,
    Latents,
    Loading,
    Overwrite,
    alternatives,
    loads_model,
    typed_directory,
    typed_output,
)
from vae_export.cli.printing import (
    bundle_table,
    console_beside,
    diagnose,
    doctor_table,
    err,
    plot_format,
    plot_ranges,
    print_export,
    print_result,
    progress_bar,
    ranges_table,
    say,
    tuning_table,
    validation_table,
)
from vae_export.cli.signing import signing
from vae_export.options import ExportOptions
from vae_export.targets import TARGETS, target_named

app = typer.Typer(
    help="Export the image VAE of latent diffusion models, verified, and run it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

app.add_typer(images)
app.add_typer(engines)
app.add_typer(dataset)
app.add_typer(signing)


@app.callback(invoke_without_command=True)
@loads_model()
def export(
    context: typer.Context,
    to: Annotated[
        Optional[str],
        typer.Option("--to", help=f"What to build: {alternatives(TARGETS)}.", show_default=False),
    ] = None,
    *,
    loading: Loading,
    out_dir: Annotated[
        Optional[Path],
        typer.Option("--out", help="The bundle. (default: vae-TARGET-PRECISION)", parser=typed_directory),
    ] = None,
    precision: Annotated[
        Optional[str],
        typer.Option(
            help="fp32, fp16 or bf16; int8 for OpenVINO. (default: fp32; fp16 for TensorRT)", show_default=False
        ),
    ] = None,
    io_precision: IoPrecision = "fp32",
    io: Io = "float",
    latents: Latents = "raw",
    calibrate: Calibrate = None,
    no_rescale: Annotated[
        bool,
        typer.Option(
            "--no-rescale", help="Do not rescale activations for half precision. Add --no-validate if it overflows."
        ),
    ] = False,
    height: Pixels = None,
    width: Pixels = None,
    batch: Batch = None,
    opt: Preferred = None,
    profile: Profiles = None,
    gpu: Gpus = None,
    tileable: Annotated[
        bool, typer.Option("--tileable", help="Add the graphs of seamless tiling, which doubles the size.")
    ] = False,
    no_validate: Annotated[
        bool, typer.Option("--no-validate", help="Do not compare with the reference. The bundle records this.")
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
        say(vae_export.__version__)
        return
    if context.invoked_subcommand is not None:
        return
    if to is None:
        raise typer.BadParameter(f"give what to build: --to {alternatives(TARGETS)}")
    target = target_named(to)
    options = ExportOptions(
        target=to,
        precision=target.default_precision if precision is None else precision,
        io_precision=io_precision,
        io=io,
        latents=latents,
        rescale=not no_rescale,
        calibrate=calibrate,
        tileable=tileable,
        run_validation=not no_validate,
        overwrite=overwrite,
    )
    path = out_dir or Path(f"vae-{to}-{options.precision}")
    with progress_bar() as progress:
        progress(f"Loading {loading.model or 'the embedded model'}", 0, 1)
        loaded = loading.load()
        from vae_export.export import check_choices  # both import PyTorch: `load` has said how to install it
        from vae_export.normalised import as_written

        check_choices(loaded, target, options)  # before an engine is planned, or its memory estimated, for them
        factor = as_written(loaded, latents).latent_space.factor
        profiles = profiles_of(factor, height, width, batch, opt, profile or [])
        options = replace(options, engine=target.plan(profiles, [gpu.strip() for gpu in (gpu or "").split(",") if gpu]))
        for line in target.notes(loaded, options):
            say(line, err)
        bundle = vae_export.export_bundle(loaded, path, options, progress=progress)
    print_export(path, bundle, as_json)


@app.command()
@loads_model()
def validate(
    bundle: BundlePath,
    *,
    loading: Loading,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Compare a bundle with its model again, on this machine. The default model is that of its recorded source."""
    loading.refuse_without_model(*(field.name for field in dataclasses.fields(loading)))
    with progress_bar() as progress:
        reference = None if loading.model is None else loading.load()
        found = vae_export.validate_bundle(bundle, reference, device=device, progress=progress)
    measurements = [measurement.to_dict() for measurement in found]
    print_result(
        {"bundle": str(bundle), "verdict": "passed", "measurements": measurements},
        validation_table(measurements),
        as_json,
    )


@app.command()
@loads_model(positional=True)
def tune(
    *,
    loading: Loading,
    to: Annotated[
        str, typer.Option("--to", help="What to build: onnx or openvino; tensorrt or tensorrt-rtx on a GPU.")
    ] = "onnx",
    out_dir: Annotated[
        Optional[Path],
        typer.Option("--out", help="The bundle. (default: vae-TARGET-PRECISION-tuned)", parser=typed_directory),
    ] = None,
    precision: Annotated[
        Optional[str], typer.Option(help="fp32, fp16 or bf16. (default: fp32; fp16 for TensorRT)", show_default=False)
    ] = None,
    height: Annotated[int, typer.Option(help="Height in pixels of the timed images.")] = 512,
    width: Annotated[int, typer.Option(help="Width in pixels of the timed images.")] = 512,
    rounds: Annotated[int, typer.Option(min=1, help="Timed calls of each form.")] = 3,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Time the exact forms of the graphs on this machine, and export a verified bundle in the fastest forms."""
    options = ExportOptions(
        target=to, overwrite=overwrite, precision=target_named(to).default_precision if precision is None else precision
    )
    path = out_dir or Path(f"vae-{to}-{options.precision}-tuned")
    with progress_bar() as progress:
        loaded = loading.load()
        tuned = vae_export.tune_bundle(
            loaded, path, options, height=height, width=width, rounds=rounds, progress=progress
        )
    found = {"bundle": str(path), "trials": [trial.to_dict() for trial in tuned.trials]}
    print_result(found, tuning_table(tuned, str(path)), as_json)


@app.command()
def inspect(bundle: BundlePath, as_json: AsJson = False) -> None:
    """Check the files of a bundle against their hashes and show its contents."""
    opened = Bundle(bundle)
    opened.verify()
    print_result(json.loads(opened.manifest.to_json()), bundle_table(str(bundle), opened.manifest), as_json)


@app.command()
@loads_model(positional=True)
def ranges(
    *,
    loading: Loading,
    out_file: Annotated[
        Path, typer.Option("--out", help="The plot; - is standard output.", parser=typed_output)
    ] = Path("ranges.png"),
    calibrate: Calibrate = None,
    as_json: AsJson = False,
) -> None:
    """Measure the largest activations before and after rescaling for half precision, and plot them."""
    console = console_beside(out_file, as_json)
    format = plot_format(out_file)
    with progress_bar() as progress:
        loaded = loading.load()
        found = vae_export.measure_ranges(loaded, calibrate, progress)
    plot_ranges(found, out_file, format)
    print_result(found.to_dict(), ranges_table(found, out_file), as_json, console)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Show what is installed, which backends work here, and why the others do not."""
    found = diagnose()
    print_result(found, doctor_table(found), as_json)
