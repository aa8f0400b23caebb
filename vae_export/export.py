"""The main job, top to bottom: a model in, a verified bundle out."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from runtimes import Bundle, open_vae
from runtimes.bundle import ENGINE_TARGETS, GRAPHS, Engine, GraphSpec, Manifest
from runtimes.errors import ConfigError
from runtimes.profiles import checked
from runtimes.progress import Progress
from vae_export import __version__, flax_export, onnx_graphs, openvino_ir, tensorrt_engines
from vae_export.bundle import check_output, write_bundle
from vae_export.checkpoint import CONFIG_FILE, is_single_file, load_model
from vae_export.hub import Hub
from vae_export.model import AutoencoderKL
from vae_export.photos import HELD_OUT, crops, photographs
from vae_export.ranges import HALVES, Ranges, calibration_inputs, probe
from vae_export.rescale import HEADROOM, rescale_activations
from vae_export.rewrite import Form, fitted, rewrite
from vae_export.tensorrt_engines import memory_lines, plan_engine, rebuild_bundle
from vae_export.tileable import TileableExport
from vae_export.validate import (
    THRESHOLDS,
    Case,
    Measurement,
    compare,
    opened_bundle,
    reference_cases,
    seamless_bundle,
    simulated,
    thresholds_of,
    through_pixels,
    worst_photo,
)

__all__ = [
    "Hub",
    "export_bundle",
    "load_model",
    "measure_ranges",
    "memory_lines",
    "plan_engine",
    "rebuild_bundle",
    "validate_bundle",
]

#: target -> the file that a graph is written to; TensorRT's plan is built from it, beside it
TARGETS = {
    "onnx": "model.onnx",
    "openvino": "openvino_model.xml",
    "flax": "model.stablehlo",
    "tensorrt": tensorrt_engines.ONNX_FILE,
    "tensorrt-rtx": tensorrt_engines.ONNX_FILE,
}
PRECISIONS = tuple(THRESHOLDS)
IO_PRECISIONS = ("fp32", "same")
TILEABLE = ("onnx",)  #: targets that have bundles for seamless tiling
WRITERS = {"openvino": openvino_ir.export_ir, "flax": flax_export.export_stablehlo}  #: the others write ONNX
IOS = ("float", "uint8")

#: (target, precision) -> the form of its graphs: the fastest on the CPU that it was measured on; see docs/speed.md.
FORMS = {
    ("onnx", "fp32"): Form(upsample="conv", norm="rows", last_block="lean", attention_blocks=16),
    # By rows: ONNX Runtime's GroupNormalization subtracts squares, and gives NaN for a picture of one colour in fp16.
    ("onnx", "fp16"): Form(upsample="conv", norm="rows", attention_blocks=16),
    ("onnx", "bf16"): Form(upsample="conv", norm="rows", attention_blocks=16),
    # OpenVINO computes attention in blocks of its own.
    ("openvino", "fp32"): Form(upsample="deconv", norm="rows", last_block="lean", convolutions="winograd"),
    ("openvino", "fp16"): Form(upsample="deconv"),
    ("openvino", "bf16"): Form(upsample="deconv", norm="rows", last_block="lean"),
    ("openvino", "int8"): Form(upsample="deconv", norm="rows", last_block="lean"),
    **dict.fromkeys((("flax", "fp32"), ("flax", "bf16")), flax_export.FORM),
    # Not timed, for want of a GPU: four convolutions of a quarter each build in all precisions, and norms by rows say
    # which digits they keep, whatever runs them; `tune` on a GPU finds out what is the fastest there.
    **{
        (target, precision): Form(upsample="conv", norm="rows", attention_blocks=16)
        for target in ENGINE_TARGETS
        for precision in ("fp16", "fp32", "bf16")
    },
}
#: where none is given: engines are built for half precision
DEFAULT_PRECISION = dict.fromkeys(TARGETS, "fp32") | dict.fromkeys(ENGINE_TARGETS, "fp16")

INT8_SIDE, INT8_COUNT = 256, 15  #: pixels a side, and number, of the squares that int8 is calibrated on


def export_bundle(
    model: AutoencoderKL,
    out: str | Path,
    *,
    target: str = "onnx",
    precision: str | None = None,
    io_precision: str = "fp32",
    io: str = "float",
    rescale: bool = True,
    calibrate: Path | None = None,
    forms: Mapping[str, Form] | None = None,
    tuning: Mapping[str, Any] | None = None,
    engine: Engine | None = None,
    tileable: bool = False,
    run_validation: bool = True,
    overwrite: bool = False,
    progress: Progress = lambda *_: None,
) -> Bundle:
    """Export the model's encoder and decoder to the directory `out`, compare them with the model, and open the bundle.

    In fp16 and bf16 the activations are first rescaled by powers of two, exactly, so that they cannot overflow
    (`rescale_activations`); how large they get is measured on the photographs in `calibrate`, or on the embedded ones.
    Not so for flax: bf16 has the range of fp32, and its parameters stay those of the checkpoint, for JAX to train on.
    The precision is fp32 unless given, and fp16 for TensorRT. Inputs and outputs stay float32 unless `io_precision` is
    "same"; with `io="uint8"` images are pixels, uint8 [B, H, W, 3], converted inside of the graphs (latents are as
    before). `forms` chooses, for each graph, among its exact rewrites; without it, `FORMS` has what was the fastest
    where it was measured. `tuning` is a record of how they were chosen, for the manifest. `engine` says for which GPUs
    and shapes TensorRT builds (`plan_engine`). With `tileable` the bundle also holds both graphs cut into steps, for
    seamless tiling (`runtimes.seamless`); it takes twice the space.

    The bundle appears whole or not at all; with `overwrite` an existing bundle is replaced in one step. Without
    `run_validation` the manifest says that nothing was compared.

    Raises `ConfigError` for a model that cannot be exported, `NumericsError` (with the numbers) where the graphs are
    too far from the model or overflow, `BundleError` where `out` exists or cannot be written.
    """
    precision = DEFAULT_PRECISION.get(target, "fp32") if precision is None else precision
    check_choices(model, target, precision, io_precision, io)
    if tileable and target not in TILEABLE:
        raise ConfigError(f"bundles for seamless tiling (--tileable) are {' and '.join(TILEABLE)}, not {target}")
    check_output(out, overwrite)
    if target in ENGINE_TARGETS:
        engine = engine or tensorrt_engines.plan_engine(target)
        check_engine_memory(model, engine, precision)
    elif engine is not None:
        raise ConfigError(f"profiles and GPUs are for TensorRT, and {target} bundles take any shape")
    forms = forms or dict.fromkeys(GRAPHS, FORMS[target, precision])
    forms = {graph: fitted(form, model) for graph, form in forms.items()}
    exact: AutoencoderKL = model
    rewrites: list[Mapping[str, Any]] = []
    if precision in HALVES and rescale and target != "flax":
        exact, record = rescaled(model, calibrate, progress)
        rewrites.append(record)
    rewrites += _form_records(forms)
    rewrites += [tuning] if tuning else []
    cases = reference_cases(model, progress, shapes_of(engine, model), io) if run_validation else []
    measurements: list[Measurement] = []
    if cases and precision in HALVES:
        # Before the graphs: cheaper, and its message names the layer that overflows.
        rewritten = rewrite(exact, forms["decoder"]._replace(attention_blocks=1))
        half = simulated(rewritten, precision)
        half = through_pixels(half) if io == "uint8" else half
        measurements += compare(cases, f"simulated {precision}", half, precision, progress)
    calibration = int8_calibration(model, calibrate, progress) if precision == "int8" else {}
    with write_bundle(out, overwrite=overwrite) as writer:
        graphs = {}
        for done, graph in enumerate(GRAPHS):
            progress(f"Exporting {graph}", done, len(GRAPHS))
            path = writer.directory / f"vae_{graph}" / TARGETS[target]
            if precision == "int8":
                spec, record = _write_int8(model, graph, path, forms[graph], calibration[graph], cases)
                rewrites.append(record)
            else:
                write = WRITERS.get(target, onnx_graphs.export_onnx)
                options: dict[str, Any] = {"precision": precision, "io_precision": io_precision, "form": forms[graph]}
                if target != "flax":
                    options["io"] = io
                spec = write(exact, graph, path, **options)
            if engine is not None:
                factor = model.config.downscale
                spec = tensorrt_engines.build_graph(engine, graph, spec, path, factor, progress)
            graphs[graph] = replace(spec, file=f"{path.parent.name}/{spec.file}")
            (path.parent / CONFIG_FILE).write_text(model.config.to_json(), encoding="utf-8")
        steps = None
        if tileable:
            # Rescaled also in fp32: between the steps activations are kept in fp16.
            divided = exact if precision in HALVES and rescale else rescaled(model, calibrate, progress)[0]
            cutter = TileableExport(divided, writer.directory, precision, forms["decoder"])
            steps = {graph: cutter.steps(graph) for graph in GRAPHS}
        if target == "flax":
            flax_export.write_params(model, writer.directory, precision)
        (writer.directory / CONFIG_FILE).write_text(model.config.to_json(), encoding="utf-8")
        manifest = Manifest(
            version=__version__,
            target=target,
            precision=precision,
            config=model.config,
            files=writer.entries(),
            graphs=graphs,
            source=model.source._asdict(),
            rewrites=tuple(rewrites),
            tools=_tool_versions(target, engine),
            engine=engine,
            tileable=steps,
            validation={"verdict": "skipped", "reason": "--no-validate was given"},
        )
        writer.write_manifest(manifest)
        if cases and engine is not None and precision != "bf16":
            # The graph that the plan is made of, by a runtime that is here: where a GPU is not, all that can be run.
            as_onnx = {graph: replace(spec, file=f"vae_{graph}/{TARGETS[target]}") for graph, spec in graphs.items()}
            writer.write_manifest(replace(manifest, target="onnx", graphs=as_onnx, engine=None))
            with open_vae(writer.directory, backend="onnxruntime") as vae:
                measurements += compare(cases, vae.backend, opened_bundle(vae), precision, progress)
            writer.write_manifest(manifest)
        if cases:
            why_not = not_runnable_here(target, precision)
            if why_not is None:
                with open_vae(writer.directory) as vae:
                    measurements += compare(cases, vae.backend, opened_bundle(vae), precision, progress)
                    if tileable:
                        measurements += compare(cases, *seamless_bundle(vae), precision, progress)
            writer.write_manifest(replace(manifest, validation=_record(why_not, precision, io, measurements)))
        return writer.finish()


def rescaled(
    model: AutoencoderKL, calibrate: Path | None, progress: Progress
) -> tuple[AutoencoderKL, Mapping[str, Any]]:
    """The model with its activations rescaled to what was measured, and the record for the manifest."""
    ranges = probe(model, calibration_inputs(model, calibrate, progress))
    form, exponents = rescale_activations(model, ranges)
    record = {
        "name": "rescale_activations",
        "calibration": "embedded photographs" if calibrate is None else "photographs of the user",
        "largest_activation": max(ranges.largest.values()),
        "headroom": HEADROOM,
        "divided_by_power_of_two": exponents,
    }
    return form, record


@dataclass(frozen=True)
class MeasuredRanges:
    """Activation maxima of a model before and after rescaling, and by which powers of two it was divided where."""

    before: Ranges
    after: Ranges
    exponents: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        return {
            "before": dict(self.before.largest),
            "after": dict(self.after.largest),
            "divided_by_power_of_two": dict(self.exponents),
        }


def measure_ranges(
    model: AutoencoderKL, calibrate: Path | None = None, progress: Progress = lambda *_: None
) -> MeasuredRanges:
    """Probe the model on photographs and noise, rescale it, and probe it again."""
    before = probe(model, calibration_inputs(model, calibrate, progress))
    form, exponents = rescale_activations(model, before)
    return MeasuredRanges(before, probe(form, calibration_inputs(model, calibrate, progress)), exponents)


@torch.no_grad()
def int8_calibration(model: AutoencoderKL, calibrate: Path | None, progress: Progress) -> Mapping[str, list[Any]]:
    """{graph: inputs to calibrate int8 on}: squares from photographs, and their latents.

    From the user's photographs, or from the embedded ones but for the one that is held out to measure the result.
    """
    paths = [path for path in photographs(calibrate) if calibrate is not None or path.stem != HELD_OUT]
    side = INT8_SIDE - INT8_SIDE % model.config.downscale
    images: list[Any] = []
    latents: list[Any] = []
    for image in crops(paths, side, INT8_COUNT, model.config.in_channels):
        progress("Encoding photographs to calibrate on", len(images), INT8_COUNT)
        images.append(image.numpy())
        latents.append(model.encode_moments(image)[:, : model.config.latent_channels].numpy())
    return {"encoder": images, "decoder": latents}


def validate_bundle(
    path: str | Path,
    model: AutoencoderKL | None = None,
    *,
    device: str | None = None,
    progress: Progress = lambda *_: None,
) -> list[Measurement]:
    """Compare a bundle, as it stands on disk, with its model again, here and now.

    The model is loaded from where the manifest says it came from, unless given; its weights must have the recorded hash
    (`ConfigError` otherwise). Raises `NumericsError` where a threshold is missed.
    """
    bundle = Bundle(path)
    bundle.verify()
    manifest = bundle.manifest
    if model is None:
        model = _model_of(manifest)
    recorded = manifest.source.get("weights_sha256")
    if recorded is not None and model.source.weights_sha256 != recorded:
        raise ConfigError(
            f"{model.source.given} has weights {model.source.weights_sha256}, and the bundle was made from {recorded}; "
            "name the right model with --model"
        )
    with open_vae(path, device=device) as vae:
        io = "uint8" if manifest.graphs["encoder"].input.dtype == "uint8" else "float"
        cases = reference_cases(model, progress, shapes_of(manifest.engine, model), io)
        return compare(cases, vae.backend, opened_bundle(vae), manifest.precision, progress)


def check_engine_memory(model: AutoencoderKL, engine: Engine, precision: str) -> list[tensorrt_engines.Estimate]:
    """Device memory for each graph and profile; `OutOfMemoryError` for one that cannot fit the GPU present."""
    for profile in engine.profiles:
        checked(profile, model.config.downscale)
    form = FORMS[engine.flavour, precision]
    estimates = tensorrt_engines.estimate_memory(engine, model.config, form, precision)
    fitting = tensorrt_engines.largest_fitting(model.config, form, precision)
    tensorrt_engines.check_memory(estimates, fitting, tensorrt_engines.present_gpu())
    return estimates


def check_choices(model: AutoencoderKL, target: str, precision: str, io_precision: str, io: str = "float") -> None:
    """`ConfigError` for what cannot be exported, before any work."""
    for name, value, known in (
        ("target", target, TARGETS),
        ("precision", precision, PRECISIONS),
        ("io precision", io_precision, IO_PRECISIONS),
        ("io", io, IOS),
    ):
        if value not in known:
            raise ConfigError(f"{name} {value!r} is not known; known are {', '.join(known)}")
    if (target, precision) not in FORMS:
        made = [of for made_by, of in FORMS if made_by == target]
        raise ConfigError(f"{target} bundles are made in {', '.join(made)}, not in {precision}")
    if precision == "bf16" and io_precision == "same":
        raise ConfigError("NumPy has no bfloat16: a bf16 bundle takes and gives float32 (--io-precision fp32)")
    if io == "uint8" and target == "flax":
        raise ConfigError("flax bundles take and give floats (--io float)")
    if io == "uint8" and precision == "int8":
        raise ConfigError(
            "int8 bundles take and give float32 images (--io float): their ranges are calibrated on those"
        )
    if io == "uint8" and (model.config.in_channels, model.config.out_channels) != (3, 3):
        channels = f"{model.config.in_channels} channels in and {model.config.out_channels} out"
        raise ConfigError(f"pixels have 3 channels (--io uint8), and the model has {channels}")
    if target == "openvino":
        openvino_ir.check_available(precision, io_precision)
    if target == "flax":
        flax_export.check_available(io_precision)
    if model.config.scaling_factor is None:
        raise ConfigError(
            "the checkpoint does not say its scaling_factor, and a bundle without one could not turn latents into "
            "images; give scaling_factor (--scaling-factor) and, if the model has one, shift_factor (--shift-factor)"
        )


def _write_int8(
    model: AutoencoderKL, graph: str, path: Path, form: Form, calibration: Sequence[Any], cases: Sequence[Case]
) -> tuple[GraphSpec, Mapping[str, Any]]:
    spec, kept = openvino_ir.export_int8(
        model,
        graph,
        path,
        form=form,
        calibration=calibration,
        measure=worst_photo(cases, graph, "int8") if cases else None,
        bar=THRESHOLDS["int8"].psnr_db,
    )
    return spec, {"name": "quantize", "graph": graph, "kept_in_higher_precision": kept}


def _form_records(forms: Mapping[str, Form]) -> list[Mapping[str, Any]]:
    """What the manifest says of the rewrites: once where both graphs have them, else with the graph's name."""
    encoder, decoder = forms["encoder"].records(), forms["decoder"].records()
    if encoder == decoder:
        return list(decoder)
    return [{**record, "graph": graph} for graph in GRAPHS for record in forms[graph].records()]


def _tool_versions(target: str, engine: Engine | None) -> dict[str, str]:
    tools = {"python": platform.python_version(), **onnx_graphs.tool_versions()}
    if engine is not None:
        tools |= tensorrt_engines.tool_versions(engine)
    own = {"openvino": openvino_ir.tool_versions, "flax": flax_export.tool_versions}.get(target, dict)
    return tools | own()


def not_runnable_here(target: str, precision: str) -> str | None:
    """Why a bundle cannot be run where it is made, or None."""
    if (target, precision) == ("onnx", "bf16"):
        return "ONNX Runtime has no bfloat16 kernels on the CPU; run `vae-export validate` on a GPU"
    if target in ENGINE_TARGETS and tensorrt_engines.present_gpu() is None:
        return tensorrt_engines.NO_GPU
    return None


def shapes_of(engine: Engine | None, model: AutoencoderKL) -> Sequence[tuple[int, int, int]] | None:
    """Batch, height and width in latents of what an engine is validated on: the ends of each profile, and between."""
    if engine is None:
        return None
    factor, shapes = model.config.downscale, []
    for profile in engine.profiles:
        b, h, w = profile.batch, profile.height, profile.width
        high, wide = ((size.min + min(size.max, 2 * size.min)) // 2 // factor for size in (h, w))
        shapes += [(b.max, h.min // factor, w.min // factor), (b.min, high, wide)]
    return shapes


def _record(why_not: str | None, precision: str, io: str, measurements: list[Measurement]) -> dict[str, Any]:
    """What the manifest says of the validation."""
    record: dict[str, Any] = {"verdict": "passed", "reference": "AutoencoderKL of vae-export in PyTorch, fp32"}
    if why_not is not None:
        record["not_run"] = why_not
    record["thresholds"] = THRESHOLDS[precision]._asdict()
    if io == "uint8":
        record["thresholds_of_pixels"] = thresholds_of(precision, pixels=True)._asdict()
    record["measurements"] = [measurement.to_dict() for measurement in measurements]
    return record


def _model_of(manifest: Manifest) -> AutoencoderKL:
    """Load the model again from what the manifest recorded."""
    source = manifest.source
    kind, given = source.get("kind"), source.get("given")
    if kind == "embedded":
        return load_model()
    if kind == "memory" or not isinstance(given, str):
        raise ConfigError("the bundle was made from a model in memory; name the model to compare with (--model)")
    hub = Hub(revision=source.get("commit"))
    if is_single_file(given):
        return load_model(given, config=manifest.config, hub=hub)
    return load_model(given, subfolder=source.get("subfolder"), hub=hub)
