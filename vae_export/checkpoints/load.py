"""Checkpoint -> reference model: from a directory, the Hugging Face Hub, or a single .safetensors file.

Strict: a model comes out complete and finite, or an error that names what is wrong. Only safetensors is read; a pickle
runs whatever code its author put into it.
"""

from __future__ import annotations

import hashlib
import math
import os
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from runtimes.config import VaeConfig, read_json
from runtimes.errors import BundleError, ConfigError, NumericsError
from runtimes.files import written_whole
from vae_export.checkpoints.architecture import complete_config, find_public_vae, infer_architecture, with_factors
from vae_export.checkpoints.hub import Hub, check_repository, commit_of, first_line, parse_hub_url
from vae_export.checkpoints.keys import is_attention_projection
from vae_export.checkpoints.source import Source
from vae_export.families import DEFAULT, FAMILIES, family_named

if TYPE_CHECKING:
    from vae_export.families.base import Family, ReferenceVae

EMBEDDED = Path(__file__).parents[1] / "assets" / "tiny"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
WEIGHTS_FILES = (WEIGHTS_FILE, "diffusion_pytorch_model.fp16.safetensors")
PICKLED_WEIGHTS_FILE = "diffusion_pytorch_model.bin"
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
SHOWN = 5  #: how many keys an error lists before it counts the rest


class Weights(NamedTuple):
    tensors: dict[str, Tensor]  #: fp32, diffusers names
    sha256: str  #: of the file


# Entry points -----------------------------------------------------------------------------------------------------


def load_model(
    source: str | Path | None = None,
    *,
    subfolder: str | None = None,
    config: VaeConfig | Mapping[str, Any] | str | Path | None = None,
    scaling_factor: float | None = None,
    shift_factor: float | None = None,
    hub: Hub | None = None,
) -> ReferenceVae:
    """Load what the command line's --model names: directory, Hub id, URL or file; None is the embedded model."""
    if source is None:
        model = load_pretrained(EMBEDDED)
        model.source = model.source._replace(given="embedded", kind="embedded", absolute=None)
    elif is_single_file(source):
        if subfolder:
            raise ConfigError(
                f"{source} is a single file, and subfolder={subfolder!r} is for directories; leave it out"
            )
        return load_single_file(
            source, config=config, scaling_factor=scaling_factor, shift_factor=shift_factor, hub=hub or Hub()
        )
    else:
        if config is not None:
            raise ConfigError(f"{source} has a config.json of its own; config= is for single files")
        model = load_pretrained(source, subfolder=subfolder, hub=hub)
    model.config = with_factors(model.config, scaling_factor, shift_factor)
    return model


def load_pretrained(source: str | Path, *, subfolder: str | None = None, hub: Hub | None = None) -> ReferenceVae:
    """`from_pretrained`: a diffusers directory or Hub repository, of any family."""
    hub = hub or Hub()
    if Path(source).is_dir():
        directory = Path(source) / (subfolder or "")
        config_path, weights_path = _find_in_directory(directory)
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
            config_file = hub.download(repo, folder + CONFIG_FILE)  # raises, saying why
            assert config_file is not None
        hub = hub.pinned(config_file)
        weights_file = next((f for n in WEIGHTS_FILES if (f := hub.download(repo, folder + n, optional=True))), None)
        if weights_file is None:
            if hub.offline:
                hub.download(repo, folder + WEIGHTS_FILE)  # raises, saying why
            pickle = folder + PICKLED_WEIGHTS_FILE
            raise ConfigError(
                f"repository {repo} has no {folder}{WEIGHTS_FILE}, and only .safetensors is read. If it has {pickle} "
                f"and you trust it: `hf download {repo} {pickle} --local-dir .`, then convert it: "
                f"{_conversion(Path(pickle))}"
            )
        config_path, weights_path, commit = config_file, weights_file, commit_of(weights_file)

    family, config = read_config(config_path)
    weights = read_weights(weights_path, family)
    kind = "directory" if repo is None else "hub"
    origin = Source(str(source), kind, weights.sha256, repo, commit, subfolder)
    return build_model(family, config, weights.tensors, origin)


def load_single_file(
    source: str | Path,
    *,
    config: VaeConfig | Mapping[str, Any] | str | Path | None = None,
    scaling_factor: float | None = None,
    shift_factor: float | None = None,
    hub: Hub | None = None,
) -> ReferenceVae:
    """`from_single_file`: a local file or the URL of a file on the Hub."""
    hub = hub or Hub()
    located = parse_hub_url(str(source))
    complete = _complete_config_from(config, hub)
    repo, commit, beside = None, None, None
    if located is not None:
        repo, revision, filename = located
        hub = hub._replace(revision=hub.revision or revision)
        refuse_pickle(filename)
        path = hub.download(repo, filename)
        assert path is not None
        commit = commit_of(path)
        beside = _config_of_repository(hub.pinned(path), repo, filename) if complete is None else None
    else:
        path = Path(source)
        beside = _config_beside(path) if complete is None else None
    family = family_named(DEFAULT)
    weights = read_weights(path, family)
    architecture = infer_architecture({name: tuple(tensor.shape) for name, tensor in weights.tensors.items()})

    if complete is None:
        given = dict(config) if isinstance(config, Mapping) else {}
        if beside is not None and _agrees(beside, architecture):
            given = beside.to_dict() | given
        complete = complete_config(architecture, given=given, public=find_public_vae(repo, weights.sha256))
    complete = with_factors(complete, scaling_factor, shift_factor)
    kind = "file" if repo is None else "hub"
    return build_model(family, complete, weights.tensors, Source(str(source), kind, weights.sha256, repo, commit))


def save_pretrained(model: ReferenceVae, directory: Path) -> None:
    """Write config.json and the weights; each file appears whole or not at all."""
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
    """The family that a config.json names, and its config."""
    data = read_json(path)
    name = data.get("_class_name", DEFAULT)
    family = family_named(name if name in FAMILIES else DEFAULT)  # which refuses other classes, and says what they are
    return family, family.config_class.from_dict(data, origin=str(path))


# Weights ----------------------------------------------------------------------------------------------------------


def read_weights(path: Path, family: Family) -> Weights:
    """The VAE's tensors of a .safetensors file, in fp32 under diffusers names. Other tensors are not even read."""
    refuse_pickle(path)
    if not path.is_file():
        raise ConfigError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(key) for name, key in family.tensor_names(file.keys()).items()}
    except (SafetensorError, OSError) as error:
        explanation = _what_it_is_instead(path)
        raise ConfigError(f"{path} is not a complete safetensors file: {explanation or first_line(error)}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ConfigError(f"{path}: tensor {name} is {tensor.dtype}, and weights are floating point")
        if is_attention_projection(name):
            tensor = tensor.reshape(tensor.shape[:2]) if math.prod(tensor.shape[2:]) == 1 else tensor
        tensors[name] = tensor.to(torch.float32)
    return Weights(tensors, _sha256(path))


def build_model(family: Family, config: Any, tensors: Mapping[str, Tensor], source: Source) -> ReferenceVae:
    """The reference model with these weights, in eval mode. Strict: `ConfigError` or `NumericsError` otherwise."""
    layers = getattr(config, "layers_per_block", 1)
    if layers > len(tensors):  # checked here since a network of a billion layers would take for ever to make
        raise ConfigError(
            f"{source.given}: layers_per_block = {layers}, and the file has {len(tensors)} tensors in all"
        )
    try:
        with torch.device("meta"):  # no memory, no random numbers: every tensor is replaced
            model = family.network(config)
    except (RuntimeError, TypeError) as error:  # what torch raises for sizes beyond 64 bits
        raise ConfigError(f"{source.given}: no network has the sizes in this config: {first_line(error)}") from None
    _check_weights({n: tuple(t.shape) for n, t in model.state_dict().items()}, tensors, source.given)
    model.load_state_dict(tensors, strict=True, assign=True)
    local = source.kind in ("directory", "file")
    model.source = source._replace(absolute=os.path.abspath(source.given)) if local else source
    return model.eval().requires_grad_(False)


def _check_weights(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], given: str) -> None:
    problems = []
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    shapes = {name: tuple(tensors[name].shape) for name in expected if name in tensors}
    misshaped = [f"{n} {list(s)}, not {list(expected[n])}" for n, s in shapes.items() if s != expected[n]]
    for title, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshaped)):
        if names:
            problems.append(f"{len(names)} {title}: {_listed(names)}")
    if problems:
        raise ConfigError(f"{given}: the weights do not fit the config. " + "; ".join(problems))
    not_finite = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if not_finite:
        raise NumericsError(
            f"{given}: NaN or infinity in {len(not_finite)} of {len(tensors)} weights: {_listed(not_finite)}"
        )


def refuse_pickle(path: str | Path) -> None:
    """Raise `ConfigError` for a pickle, saying how to convert it."""
    path = Path(path)
    is_pickle = path.suffix.lower() in PICKLES
    if not is_pickle and path.is_file():
        with path.open("rb") as file:
            start = file.read(9)
        # The first 8 bytes of a safetensors file are a length, which may look like anything; then its JSON starts.
        is_pickle = start[8:] != b"{" and (start[:1] == b"\x80" or start[:4] == b"PK\x03\x04")
    if is_pickle:
        raise ConfigError(
            f"{path} is a pickle, and loading one runs whatever code is in it: only .safetensors is read. To convert "
            f"one that you trust: {_conversion(path)}"
        )


def _what_it_is_instead(path: Path) -> str | None:
    """What a file that is not safetensors is by its first bytes, and how to get the real one; None if unknown."""
    with path.open("rb") as file:
        start = file.read(512).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"version https://git-lfs.github.com/"):
        return "it is a Git LFS pointer: run `git lfs pull` in its repository"
    if start.lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "it is a web page: log in where that is needed, and download the file itself again"
    if start.startswith((b"{", b"[")):
        return (
            "it is JSON: give the weights file or its directory, or, if a server answered with an "
            "error, log in and download the file again"
        )
    return None


def _conversion(path: Path) -> str:
    """The shell command that converts a pickle."""
    target = path.with_suffix(".safetensors")
    if target == path:  # a pickle in disguise
        target = path.with_name(f"{path.stem}-converted.safetensors")
    code = (
        "import sys, torch, safetensors.torch as s; "
        # open: torch.load goes by the name, and would not read a pickle in disguise
        "w = torch.load(open(sys.argv[1], 'rb'), weights_only=True, map_location='cpu'); "
        "w = w.get('state_dict', w); "
        # clone: safetensors refuses tensors that share memory
        "s.save_file({k: v.clone().contiguous() for k, v in w.items() if torch.is_tensor(v)}, sys.argv[2])"
    )
    return f'python -c "{code}" {shlex.quote(str(path))} {shlex.quote(str(target))}'


# Configs ----------------------------------------------------------------------------------------------------------


def _complete_config_from(config: VaeConfig | Mapping[str, Any] | str | Path | None, hub: Hub) -> VaeConfig | None:
    """The caller's config where it is a whole one (object, file, directory, Hub id, full dictionary), else None."""
    if config is None or isinstance(config, VaeConfig):
        return config
    if isinstance(config, Mapping):
        return VaeConfig.from_dict(config) if "block_out_channels" in config else None
    path = Path(config)
    if path.exists():
        return VaeConfig.from_json(path / CONFIG_FILE if path.is_dir() else path)
    repo = check_repository(str(config))
    plain = hub._replace(revision=None)
    found = plain.download(repo, CONFIG_FILE, optional=True) or plain.download(repo, f"vae/{CONFIG_FILE}")
    assert found is not None
    return VaeConfig.from_json(found)


def _config_of_repository(hub: Hub, repo: str, filename: str) -> VaeConfig | None:
    """The config beside a file on the Hub, or in the repository's vae folder, where it is one of an AutoencoderKL."""
    folder = filename.rpartition("/")[0]
    names = dict.fromkeys((f"{folder}/{CONFIG_FILE}".lstrip("/"), f"vae/{CONFIG_FILE}"))
    return _first_vae_config(hub.download(repo, name, optional=True) for name in names)


def _config_beside(path: Path) -> VaeConfig | None:
    """The config beside a local file, or in the vae folder there, as for a file at the root of a repository."""
    candidates = (path.parent / CONFIG_FILE, path.parent / "vae" / CONFIG_FILE)
    return _first_vae_config(candidate if candidate.is_file() else None for candidate in candidates)


def _first_vae_config(paths: Iterable[Path | None]) -> VaeConfig | None:
    for path in paths:
        if path is not None:
            try:
                return VaeConfig.from_json(path)
            except ConfigError:
                continue  # another model's config, as at the root of many repositories
    return None


def _agrees(config: VaeConfig, architecture: Mapping[str, Any]) -> bool:
    return all(getattr(config, name) == value for name, value in architecture.items())


# Places -----------------------------------------------------------------------------------------------------------


def is_single_file(source: str | Path) -> bool:
    text = str(source)
    return (
        text.startswith(("http://", "https://")) or text.endswith((".safetensors", *PICKLES)) or Path(source).is_file()
    )


def _find_in_directory(directory: Path) -> tuple[Path, Path]:
    if not directory.is_dir():
        raise ConfigError(f"{directory} does not exist")
    if not (directory / CONFIG_FILE).is_file():
        hint = "it is a whole pipeline: give subfolder='vae'" if (directory / "model_index.json").is_file() else (
            "a diffusers directory holds config.json and " + WEIGHTS_FILE
        )  # fmt: skip
        raise ConfigError(f"{directory} has no {CONFIG_FILE}; {hint}")
    for name in WEIGHTS_FILES:
        if (directory / name).is_file():
            return directory / CONFIG_FILE, directory / name
    for path in sorted(directory.iterdir()):
        if path.suffix in PICKLES:
            refuse_pickle(path)
    raise ConfigError(f"{directory} has no {WEIGHTS_FILE}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
