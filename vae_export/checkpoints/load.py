"""Load a reference model from a directory, the Hugging Face Hub, or a single .safetensors file.

Loading is strict: the model is complete and finite, or an error names the problem. Only safetensors is read, because
loading a pickle runs whatever code its author put into it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import save_file

from runtimes.config import ConfigFile, is_vae_config, read_json
from runtimes.errors import BundleError, ConfigError
from runtimes.files import written_whole
from vae_export.checkpoints.architecture import find_public_vae, with_factors
from vae_export.checkpoints.files import (
    WEIGHTS_FILE,
    WeightsFiles,
    choose,
    is_index,
    names_of,
    read_index,
    variant_of,
)
from vae_export.checkpoints.hub import Hub, check_repository, commit_of, parse_hub_url
from vae_export.checkpoints.source import Source
from vae_export.checkpoints.weights import DECODER, PICKLES, build_model, conversion, read_weights, refuse_pickle
from vae_export.families import DEFAULT, family_named, family_of_config

if TYPE_CHECKING:
    from vae_export.families.base import Family, ReferenceVae

EMBEDDED = Path(__file__).parents[1] / "assets" / "tiny"
CONFIG_FILE = "config.json"
PICKLED_WEIGHTS_FILE = "diffusion_pytorch_model.bin"


# Entry points -----------------------------------------------------------------------------------------------------


def load_model(
    source: str | Path | None = None,
    *,
    subfolder: str | None = None,
    variant: str | None = None,
    config: Any = None,
    scaling_factor: float | None = None,
    shift_factor: float | None = None,
    decoder: str | Path | None = None,
    hub: Hub | None = None,
) -> ReferenceVae:
    """Load what the command line's --model names: directory, Hub id, URL or file; None is the embedded model.

    `decoder` names a single file with another decoder for the same encoder, as FLUX.2's small decoder is, or with the
    decoder of a file that has the encoder alone, as the original TAESD is published.
    """
    if source is None:
        if decoder is not None:
            raise ConfigError("decoder= (--decoder) needs the file of the model that it belongs to (--model)")
        model = load_pretrained(EMBEDDED)
        model.source = model.source._replace(given="embedded", kind="embedded", absolute=None)
    elif is_single_file(source):
        for name, value in (("subfolder", subfolder), ("variant", variant)):
            if value:
                raise ConfigError(f"{source} is a single file, and {name}={value!r} is for directories; leave it out")
        return load_single_file(
            source,
            config=config,
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
            decoder=decoder,
            hub=hub or Hub(),
        )
    else:
        if decoder is not None:
            raise ConfigError(f"decoder={str(decoder)!r} is for a model that is a single file, and {source} is none")
        if config is not None:
            raise ConfigError(f"{source} has a config.json of its own; config= is for single files")
        model = load_pretrained(source, subfolder=subfolder, variant=variant, hub=hub)
    model.config = with_factors(model.config, scaling_factor, shift_factor)
    return model


def load_pretrained(
    source: str | Path, *, subfolder: str | None = None, variant: str | None = None, hub: Hub | None = None
) -> ReferenceVae:
    """Load a diffusers directory or Hub repository of any family: see `ReferenceVae.from_pretrained`."""
    hub = hub or Hub()
    if Path(source).is_dir():
        directory = Path(source) / (subfolder or "")
        config_path, files = _find_in_directory(directory, variant)
        repo, commit = None, None
    elif is_single_file(source):
        raise ConfigError(f"{source} is a single file: load it with from_single_file")
    else:
        repo = check_repository(str(source))
        folder = f"{subfolder}/" if subfolder else ""
        config_file = hub.download(repo, folder + CONFIG_FILE, optional=True)
        if config_file is None:
            if hub.download(repo, "model_index.json", optional=True) is not None:
                raise ConfigError(f"repository {repo} is a whole pipeline: give subfolder='vae'")
            config_file = hub.download(repo, folder + CONFIG_FILE)  # raises an error with the reason
            assert config_file is not None
        hub = hub.pinned(config_file)
        config_path, commit = config_file, commit_of(config_file)
        files = _find_in_repository(hub, repo, folder, variant, near=config_file)

    family, config = read_config(config_path)
    weights = read_weights(files, family)
    kind = "directory" if repo is None else "hub"
    found = variant_of(files.path.name)
    origin = Source(str(source), kind, weights.sha256, repo, commit, subfolder, found)
    return build_model(family, config, weights.tensors, origin)


def load_single_file(
    source: str | Path,
    *,
    config: Any = None,
    scaling_factor: float | None = None,
    shift_factor: float | None = None,
    decoder: str | Path | None = None,
    hub: Hub | None = None,
) -> ReferenceVae:
    """Load a local file or the URL of a file on the Hub, of any family: see `ReferenceVae.from_single_file`.

    `decoder`: see `load_model`.
    """
    hub = hub or Hub()
    complete = _complete_config_from(config, hub)
    expected = None if complete is None else family_named(complete.class_names[0])
    file = _located(source, hub)
    weights = read_weights(file.path, expected, half=None if decoder is None else "encoder")
    family, tensors = weights.family, weights.tensors
    other = None
    if decoder is not None:
        other = _located(decoder, hub)
        parts = read_weights(other.path, family, half="decoder").tensors
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(DECODER)}
        tensors |= {name: tensor for name, tensor in parts.items() if name.startswith(DECODER)}

    if family.architecture is None or family.complete_config is None:
        raise ConfigError(f"{source}: an {family.name} is not read from a single file; give a diffusers directory")
    architecture = family.architecture({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    if complete is None:
        beside = file.config_beside(family) if decoder is None else None
        given = dict(config) if isinstance(config, Mapping) else {}
        given = _agreed(beside, architecture) | given
        public = find_public_vae(file.repo, weights.sha256)
        complete = family.complete_config(architecture, given=given, public=public)
    complete = with_factors(complete, scaling_factor, shift_factor)
    kind = "file" if file.repo is None else "hub"
    origin = Source(str(source), kind, weights.sha256, file.repo, file.commit)
    if other is not None:
        place = str(decoder) if other.repo else os.path.abspath(other.path)
        origin = origin._replace(decoder=place)
    return build_model(family, complete, tensors, origin)


def save_pretrained(model: ReferenceVae, directory: Path) -> None:
    """Write config.json and the weights, each file atomically. Raises `BundleError` if they cannot be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        with written_whole(directory / WEIGHTS_FILE) as partial:
            save_file(tensors, partial, metadata={"format": "pt"})
        with written_whole(directory / CONFIG_FILE) as partial:
            partial.write_text(model.config.to_json(), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise BundleError(f"could not save the model to {directory}: {error}") from None


def read_config(path: Path) -> tuple[Family, Any]:
    """Read a config.json; return its family and its config. Raises `ConfigError` for unknown classes."""
    data = read_json(path)
    return family_of_config(data, str(path)), _read_as_its_family(data, str(path))


def _read_as_its_family(data: Any, origin: str) -> Any:
    """Return the config that a dictionary describes, of the class of its family."""
    return family_of_config(data, origin).config_class.from_dict(data, origin=origin)


# Configs ----------------------------------------------------------------------------------------------------------


def _complete_config_from(config: Any, hub: Hub) -> Any:
    """Return the caller's config if it is complete (object, file, directory, Hub id, full dictionary), else None."""
    if config is None or isinstance(config, ConfigFile):
        return config
    if isinstance(config, Mapping):
        return _read_as_its_family(config, "config") if "_class_name" in config or is_vae_config(config) else None
    path = Path(config)
    if path.exists():
        return read_config(path / CONFIG_FILE if path.is_dir() else path)[1]
    repo = check_repository(str(config))
    plain = hub._replace(revision=None)
    found = plain.download(repo, CONFIG_FILE, optional=True) or plain.download(repo, f"vae/{CONFIG_FILE}")
    assert found is not None
    return read_config(found)[1]


class _Located(NamedTuple):
    """A single file on this machine, and the repository that it was downloaded from."""

    path: Path
    hub: Hub
    repo: str | None = None
    filename: str = ""
    commit: str | None = None

    def config_beside(self, family: Family) -> tuple[Any, Path] | None:
        """Find the config of this family beside the file, or in the folder `vae` there."""
        if self.repo is None:
            folder = self.path.parent
            candidates: Iterable[Path | None] = (folder / CONFIG_FILE, folder / "vae" / CONFIG_FILE)
            return _first_config(family, (path if path is not None and path.is_file() else None for path in candidates))
        folder_name, pinned, repo = self.filename.rpartition("/")[0], self.hub.pinned(self.path), self.repo
        names = dict.fromkeys((f"{folder_name}/{CONFIG_FILE}".lstrip("/"), f"vae/{CONFIG_FILE}"))
        return _first_config(family, (pinned.download(repo, name, optional=True) for name in names))


def _located(source: str | Path, hub: Hub) -> _Located:
    """Return a local file, or download the file of a URL on the Hub."""
    found = parse_hub_url(str(source))
    if found is None:
        return _Located(Path(source), hub)
    repo, revision, filename = found
    hub = hub._replace(revision=hub.revision or revision)
    refuse_pickle(filename)
    path = hub.download(repo, filename)
    assert path is not None
    return _Located(path, hub, repo, filename, commit_of(path))


def _first_config(family: Family, paths: Iterable[Path | None]) -> tuple[Any, Path] | None:
    """Return the first config of this family and its path; warn of a config that cannot be read."""
    for path in paths:
        if path is not None:
            try:
                data = read_json(path)
                default = family.name == DEFAULT and is_vae_config(data)
                if default or (isinstance(data, Mapping) and data.get("_class_name") == family.name):
                    return family.config_class.from_dict(data, origin=str(path)), path
            except ConfigError as error:
                warnings.warn(f"the config beside the weights is left out: {error}", UserWarning, stacklevel=2)
    return None


def _agreed(found: tuple[Any, Path] | None, architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the config beside the weights; if it does not match the weights, warn and return none."""
    if found is None:
        return {}
    config, path = found
    other = [
        f"{name} = {getattr(config, name)!r}, not {value!r}"
        for name, value in architecture.items()
        if getattr(config, name) != value
    ]
    if not other:
        return dict(config.to_dict())
    warnings.warn(
        f"{path} is not the config of these weights and is left out: {'; '.join(other)}; give the right one with "
        "config= (--config)",
        UserWarning,
        stacklevel=2,
    )
    return {}


# Places -----------------------------------------------------------------------------------------------------------


def is_single_file(source: str | Path) -> bool:
    """Return whether `source` names one weights file: a URL, a weights extension, or an existing file."""
    text = str(source)
    return (
        text.startswith(("http://", "https://")) or text.endswith((".safetensors", *PICKLES)) or Path(source).is_file()
    )


def _find_in_directory(directory: Path, variant: str | None) -> tuple[Path, WeightsFiles]:
    """Return the paths of the config and of the weights in a local directory."""
    if not directory.is_dir():
        raise ConfigError(f"{directory} does not exist")
    if not (directory / CONFIG_FILE).is_file():
        hint = "it is a whole pipeline: give subfolder='vae'" if (directory / "model_index.json").is_file() else (
            "a diffusers directory holds config.json and " + WEIGHTS_FILE
        )  # fmt: skip
        raise ConfigError(f"{directory} has no {CONFIG_FILE}; {hint}")
    names = [path.name for path in directory.iterdir() if path.is_file()]
    try:
        name = choose(names, variant, str(directory))
    except ConfigError:
        if not any(name.endswith(".safetensors") for name in names):
            for pickle in sorted(directory / name for name in names if name.endswith(PICKLES)):
                refuse_pickle(pickle)
        raise
    return directory / CONFIG_FILE, WeightsFiles.at(directory / name)


def _find_in_repository(hub: Hub, repo: str, folder: str, variant: str | None, near: Path) -> WeightsFiles:
    """Download the weights of a Hub repository; `near` is an already downloaded file of the same folder."""
    path = next((f for n in names_of(variant) if (f := hub.download(repo, folder + n, optional=True))), None)
    if path is None:
        names = hub.names_in(repo, folder, near)
        if hub.offline and not any(variant_of(name) is not None for name in names):
            hub.download(repo, folder + names_of(variant)[0])  # raises an error with the reason
        pickle = folder + PICKLED_WEIGHTS_FILE
        if PICKLED_WEIGHTS_FILE in names and not any(name.endswith(".safetensors") for name in names):
            raise ConfigError(
                f"repository {repo} has no {folder}{WEIGHTS_FILE}, and only .safetensors is read. It has {pickle}; if "
                f"you trust it: `hf download {repo} {pickle} --local-dir .`, then convert it: "
                f"{conversion(Path(pickle))}"
            )
        where = f"repository {repo}" + (f", folder {folder}" if folder else "")
        path = hub.download(repo, folder + choose(names, variant, where))
    assert path is not None
    if not is_index(path.name):
        return WeightsFiles(path, {path.name: path})
    listed = read_index(path)
    parts = {name: part for name in sorted(set(listed.values())) if (part := hub.download(repo, folder + name))}
    return WeightsFiles(path, parts, listed)
