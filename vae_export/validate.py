"""Validate an existing bundle: compare it with its model again."""

from __future__ import annotations

from pathlib import Path

from runtimes import Bundle
from runtimes.errors import ConfigError
from runtimes.manifest import Manifest
from runtimes.progress import Progress, no_progress
from vae_export.checkpoints.hub import Hub
from vae_export.checkpoints.load import is_single_file, load_model
from vae_export.checkpoints.source import tensors_sha256
from vae_export.comparison import Measurement, check, reference_cases
from vae_export.edge import check_model, ordinary_torch
from vae_export.export import shapes_of
from vae_export.families.base import ReferenceVae
from vae_export.normalised import as_written
from vae_export.targets import target_named


@ordinary_torch()
def validate_bundle(
    path: str | Path,
    model: ReferenceVae | None = None,
    *,
    device: str | None = None,
    progress: Progress = no_progress,
) -> list[Measurement]:
    """Compare the graphs of a bundle, and its steps if it is tileable, with its model on this machine.

    Without `model`, the model is loaded from the source that the manifest records. Returns the measurements. Raises
    `ConfigError` if the weights of the model do not have the recorded hash, and `NumericsError` if a threshold is
    missed.
    """
    bundle = Bundle(path)
    bundle.verify()
    manifest = bundle.manifest
    if model is None:
        model = load_recorded(manifest)
    check_model(model)
    check_weights(model, manifest)
    io = "uint8" if manifest.graphs["encoder"].input.dtype == "uint8" else "float"
    written = as_written(model, manifest.latents)
    cases = reference_cases(written, progress, shapes_of(manifest.engine, written), io)
    measurements = []
    for validator in target_named(manifest.target).validators(bundle, device):
        measurements += check(cases, validator, manifest.precision, progress)
    return measurements


def check_weights(model: ReferenceVae, manifest: Manifest) -> None:
    """Raise `ConfigError` unless the model has the weights from which the bundle was made."""
    source = manifest.source
    recorded = source.get("tensors_sha256")
    has = tensors_sha256(model.state_dict())
    if recorded is None:  # bundles of earlier versions have a hash of the file, or none
        recorded, has = source.get("weights_sha256"), str(model.source.weights_sha256)
    if recorded is not None and has != recorded:
        name = "the model in memory" if model.source.kind == "memory" else model.source.given
        raise ConfigError(
            f"{name} has weights {has}, and the bundle was made from {recorded}; name the right model with --model"
        )


def load_recorded(manifest: Manifest) -> ReferenceVae:
    """Load the model from the source that the manifest records. Raises `ConfigError` if it is unavailable."""
    source = manifest.source
    kind, given = source.get("kind"), source.get("given")
    if kind == "embedded":
        return load_model()
    if kind == "memory" or not isinstance(given, str):
        raise ConfigError("the bundle was made from a model in memory; name the model to compare with (--model)")
    if source.get("changed_in_memory"):
        raise ConfigError(
            f"the bundle was made from a model that was loaded from {given} and then changed in memory; give the model "
            "itself to validate_bundle, or one saved with save_pretrained to --model"
        )
    if kind in ("directory", "file"):
        place = source.get("absolute") or given  # bundles of earlier versions record only `given`
        if not Path(place).exists():
            raise ConfigError(
                f"the bundle was made from {given}{'' if place == given else f', then {place},'} and nothing is there "
                "now; give --model"
            )
        given = place
    hub = Hub(revision=source.get("commit"))
    if is_single_file(given):
        return load_model(given, config=manifest.config.to_dict(), decoder=source.get("decoder"), hub=hub)
    return load_model(given, subfolder=source.get("subfolder"), variant=source.get("variant"), hub=hub)
