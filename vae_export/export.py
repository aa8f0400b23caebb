"""Export a model to a verified bundle.

The code of each target is in `vae_export.targets`, that of each family in `vae_export.families`.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from runtimes import Bundle
from runtimes.errors import ConfigError
from runtimes.manifest import LATENTS, Engine, Manifest
from runtimes.names import GRAPHS, Graph
from runtimes.progress import Progress, no_progress
from vae_export import __version__
from vae_export.bundle import BundleWriter, check_output, write_bundle
from vae_export.checkpoints.load import CONFIG_FILE
from vae_export.checkpoints.source import exported_source
from vae_export.comparison import (
    THRESHOLDS,
    Measurement,
    check,
    compare,
    reference_cases,
    simulated,
    thresholds_of,
    through_pixels,
)
from vae_export.edge import check_model, check_path, ordinary_torch
from vae_export.families import family_of
from vae_export.families.base import ReferenceVae
from vae_export.normalised import as_written
from vae_export.options import ExportOptions
from vae_export.rewrites.apply import fitted, rewrite
from vae_export.rewrites.form import Form
from vae_export.rewrites.ranges import HALVES
from vae_export.rewrites.rescale import rescaled
from vae_export.targets import TARGETS, target_named
from vae_export.targets.base import Export, Target
from vae_export.targets.onnx_graphs import tool_versions

IO_PRECISIONS = ("fp32", "same")
IOS = ("float", "uint8")


@ordinary_torch()
def export_bundle(
    model: ReferenceVae,
    out: str | Path,
    options: ExportOptions | None = None,
    *,
    progress: Progress = no_progress,
    **choices: Any,
) -> Bundle:
    """Export the model's encoder and decoder to the directory `out`, compare them with the model, and open the bundle.

    `choices` are fields of `ExportOptions`, by name, and override those of `options`:
    `export_bundle(model, "out", target="onnx", precision="fp16")`.

    In fp16 and bf16 the activations are first rescaled by powers of two, which is exact, so that they do not overflow
    (see `rescale_activations`). Their largest values are measured on photographs.

    The bundle is written atomically; with `overwrite` it replaces an existing bundle in one step. Without
    `run_validation` the graphs are not compared, and the manifest records this.

    The settings of PyTorch in this process (autocast, default dtype and device, grad mode) do not affect the export.

    Raises `ConfigError` for a model that cannot be exported, `NumericsError` (with the measurements) if the graphs
    deviate too far from the model or overflow, `BundleError` if `out` exists or cannot be written.
    """
    target, options = complete_options(model, replace(options or ExportOptions(), **choices))
    check_path(out, "out")
    check_output(out, options.overwrite)
    export, records = prepare(model, target, options, progress)
    measurements = simulate_half(export)
    with write_bundle(out, overwrite=options.overwrite) as writer:
        graphs = {}
        for done, graph in enumerate(GRAPHS):
            progress(f"Exporting {graph}", done, len(GRAPHS))
            path = writer.directory / f"vae_{graph}" / target.graph_file
            written = target.write(export, graph, path)
            graphs[graph] = replace(written.spec, file=f"{path.parent.name}/{written.spec.file}")
            records += written.records
            (path.parent / CONFIG_FILE).write_text(graph_config(model, graph), encoding="utf-8")
        steps = target.write_steps(export, for_steps(export), writer.directory) if options.tileable else None
        target.finish(export, writer)
        (writer.directory / CONFIG_FILE).write_text(model.config.to_json(), encoding="utf-8")
        manifest = Manifest(
            version=__version__,
            target=target.name,
            precision=export.precision,
            config=model.config,
            latent_space=model.latent_space,
            latents=options.latents,
            family=model.family,
            files=writer.entries(),
            graphs=graphs,
            source=exported_source(model.source, model.state_dict()),
            rewrites=tuple(records),
            tools={"python": platform.python_version(), **tool_versions(), **target.tool_versions(options)},
            engine=options.engine,
            tileable=steps,
            halo=halo_of(model),
            validation={"verdict": "skipped", "reason": "--no-validate was given"},
        )
        writer.write_manifest(manifest)
        if export.cases:
            validation = validate_written(export, target, writer, measurements)
            writer.write_manifest(replace(manifest, validation=validation))
        return writer.finish()


def graph_config(model: ReferenceVae, graph: Graph) -> str:
    """The text of the config.json beside a graph, in which other programs find what they expect."""
    if graph == "encoder":
        return str(model.config.to_json())
    return json.dumps(model.config.to_dict() | dict(family_of(model).decoder_fields(model)), indent=2) + "\n"


def halo_of(model: ReferenceVae) -> Mapping[Graph, int] | None:
    """How far in latents results depend on their surroundings, for each graph; None where on the whole image."""
    family = family_of(model)
    halos = {graph: None if family.halo is None else family.halo(model, graph) for graph in GRAPHS}
    return None if None in halos.values() else {graph: int(halo or 0) for graph, halo in halos.items()}


def complete_options(model: ReferenceVae, options: ExportOptions) -> tuple[Target, ExportOptions]:
    """Return the target, and the options with precision, engine and forms filled in.

    Raises `ConfigError` for unsupported options and `BackendUnavailable` for a missing tool, before any work.
    """
    target = target_named(options.target)
    options = replace(options, precision=target.default_precision if options.precision is None else options.precision)
    check_choices(model, target, options)
    if options.engine is None:
        options = replace(options, engine=target.plan())
    elif options.engine.flavour != target.name:
        raise ConfigError(f"the engine was planned for {options.engine.flavour}, and the target is {target.name}")
    forms = options.forms or dict.fromkeys(GRAPHS, target.forms[str(options.precision)])
    options = replace(options, forms={graph: fitted(form, model) for graph, form in forms.items()})
    target.check(model, options)
    return target, options


def check_choices(model: ReferenceVae, target: Target, options: ExportOptions) -> None:
    """Raise `ConfigError` for a model that cannot be exported, and for options that the target does not support."""
    check_model(model)
    if options.calibrate is not None:
        check_path(options.calibrate, "calibrate")
    for name, value, known in (
        ("precision", options.precision, tuple(THRESHOLDS)),
        ("io precision", options.io_precision, IO_PRECISIONS),
        ("io", options.io, IOS),
        ("latents", options.latents, LATENTS),
    ):
        if value not in known:
            raise ConfigError(f"{name} {value!r} is not known; known are {', '.join(known)}")
    if target.families is not None and model.family not in target.families:
        raise ConfigError(f"{target.name} bundles are of {' and '.join(target.families)}, not of {model.family}")
    if options.precision not in target.forms:
        raise ConfigError(f"{target.name} bundles are made in {', '.join(target.forms)}, not in {options.precision}")
    if options.io_precision not in target.io_precisions:
        raise ConfigError(
            f"{target.name} bundles take and give float32 (--io-precision fp32), not {options.io_precision!r}"
        )
    if options.precision == "bf16" and options.io_precision == "same":
        raise ConfigError("NumPy has no bfloat16: a bf16 bundle takes and gives float32 (--io-precision fp32)")
    if options.io not in target.ios:
        raise ConfigError(f"{target.name} bundles take and give floats (--io float)")
    if options.tileable and not target.tileable:
        able = " and ".join(name for name in TARGETS if TARGETS[name].tileable)
        raise ConfigError(f"bundles for seamless tiling (--tileable) are {able}, not {target.name}")
    if options.tileable and halo_of(model) is not None:
        raise ConfigError(f"every bundle of an {model.family} tiles without seams: leave --tileable out")
    if options.tileable and "tileable" not in family_of(model).rewrites:
        raise ConfigError(f"an {model.family} cannot be cut into steps for seamless tiling (--tileable)")
    if not model.latent_space.is_known:
        raise ConfigError(
            "the checkpoint does not say its scaling_factor, and a bundle without one could not turn latents into "
            "images; give scaling_factor (--scaling-factor) and, if the model has one, shift_factor (--shift-factor)"
        )


def prepare(
    model: ReferenceVae, target: Target, options: ExportOptions, progress: Progress
) -> tuple[Export, list[Mapping[str, Any]]]:
    """Prepare an export: rescale the model if needed, and compute the reference. Returns also the rewrites' records."""
    exact, records = model, []
    rescalable = "rescale" in family_of(model).rewrites
    if options.precision in HALVES and options.rescale and target.rescales and rescalable:
        exact, record = rescaled(model, options.calibrate, progress)
        records.append(record)
    assert options.forms is not None
    records += form_records(options.forms)
    records += [options.tuning] if options.tuning else []
    written = as_written(model, options.latents)
    shapes = shapes_of(options.engine, written)
    cases = reference_cases(written, progress, shapes, options.io) if options.run_validation else []
    return Export(model, options, exact, cases, progress), records


def simulate_half(export: Export) -> list[Measurement]:
    """Compare the model in simulated half precision with the reference; returns no measurements in other precisions.

    It runs before the graphs are written, because it is cheaper, and its message names the layer that overflows.
    """
    if not export.cases or export.precision not in HALVES:
        return []
    form = export.form("decoder")._replace(attention_blocks=1)
    half = simulated(export.written(rewrite(export.exact, form)), export.precision)
    io = export.options.io
    half = through_pixels(half) if io == "uint8" else half
    # An engine may not take small images, and simulating a large image takes minutes: use the default shapes.
    engine = export.options.engine
    cases = export.cases if engine is None else reference_cases(export.written(export.model), export.progress, io=io)
    return compare(cases, f"simulated {export.precision}", half, export.precision, export.progress)


def for_steps(export: Export) -> ReferenceVae:
    """Return the rescaled model, in fp32 too, since seamless tiling keeps activations between its steps in fp16."""
    if export.precision in HALVES and export.options.rescale:
        return export.exact
    return rescaled(export.model, export.options.calibrate, export.progress)[0]


def validate_written(
    export: Export, target: Target, writer: BundleWriter, measurements: list[Measurement]
) -> dict[str, Any]:
    """Compare the unfinished bundle with the reference; return the manifest's record of the validation."""
    bundle = Bundle(writer.directory)
    reason = target.reason_not_run(export.precision)
    for validator in target.stand_ins(bundle):
        measurements += check(export.cases, validator, export.precision, export.progress)
    for validator in target.validators(bundle) if reason is None else ():
        measurements += check(export.cases, validator, export.precision, export.progress)
    record: dict[str, Any] = {"verdict": "passed", "reference": f"{export.model.family} of vae-export in PyTorch, fp32"}
    if reason is not None:
        record["not_run"] = reason
    record["thresholds"] = THRESHOLDS[export.precision]._asdict()
    if export.options.io == "uint8":
        record["thresholds_of_pixels"] = thresholds_of(export.precision, pixels=True)._asdict()
    if export.options.tileable:
        seamless = thresholds_of(export.precision, pixels=export.options.io == "uint8", seamless=True)
        record["thresholds_of_seamless_tiling"] = seamless._asdict()
    record["measurements"] = [measurement.to_dict() for measurement in measurements]
    return record


def form_records(forms: Mapping[str, Form]) -> list[Mapping[str, Any]]:
    """Return the manifest's records of the forms; they name their graph if the two graphs have different forms."""
    encoder, decoder = forms["encoder"].records(), forms["decoder"].records()
    if encoder == decoder:
        return list(decoder)
    return [{**record, "graph": graph} for graph in GRAPHS for record in forms[graph].records()]


def shapes_of(engine: Engine | None, model: ReferenceVae) -> Sequence[tuple[int, int, int]] | None:
    """Return the shapes on which an engine is validated, (batch, height, width) in latents; None without an engine.

    For each profile these are the smallest size with the smallest and the largest batch, and a medium size. Photographs
    are cropped to the first shape.
    """
    if engine is None:
        return None
    factor, shapes = model.latent_space.factor, []
    for profile in engine.profiles:
        b, h, w = profile.batch, profile.height, profile.width
        high, wide = ((size.min + min(size.max, 2 * size.min)) // 2 // factor for size in (h, w))
        smallest = h.min // factor, w.min // factor
        shapes += [*((count, *smallest) for count in sorted({b.min, b.max})), (b.min, high, wide)]
    return shapes
