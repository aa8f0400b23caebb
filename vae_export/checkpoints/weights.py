"""Read weights from safetensors files, check them, and load them into the family's network.

Loading is strict: the model is complete and finite, or an error names the problem. Only safetensors is read, because
loading a pickle runs whatever code its author put into it.
"""

from __future__ import annotations

import math
import os
import shlex
import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from runtimes.errors import ConfigError, NumericsError
from runtimes.files import what_it_is_instead
from runtimes.names import Graph
from vae_export.checkpoints.files import WeightsFiles, shortened
from vae_export.checkpoints.hub import first_line
from vae_export.checkpoints.keys import bare_names, half_of, is_attention_projection, is_fused_projection
from vae_export.checkpoints.source import Source, tensors_sha256
from vae_export.families import DEFAULT, family_named, recognised_family

if TYPE_CHECKING:
    from vae_export.families.base import Family, ReferenceVae

DECODER = ("decoder.", "post_quant_conv.")  #: beginnings of the names of a decoder's tensors in diffusers

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")


class Weights(NamedTuple):
    """The tensors of a weights file, and the hash of the file."""

    tensors: dict[str, Tensor]  #: fp32, diffusers names
    sha256: str  #: see `WeightsFiles.sha256`
    family: Family  #: of the config if there is one, else of the names


def read_weights(source: Path | WeightsFiles, family: Family | None = None, *, half: Graph | None = None) -> Weights:
    """Read the VAE's tensors from a .safetensors file, or from parts with an index: fp32, with diffusers' names.

    `family` is the family of the config. If it is None, the names of the tensors determine the family; AutoencoderKL is
    the default. `half` is the half of a VAE that the file may contain alone. Tensors of other models in the file are
    not read.

    Raises `ConfigError` for a file that is not readable, for the weights of another family, and for half a VAE where a
    whole one is needed.
    """
    refuse_pickle(source if isinstance(source, Path) else source.path)
    files = WeightsFiles.at(source) if isinstance(source, Path) else source
    with ExitStack() as stack:
        opened = {name: stack.enter_context(_opened(path)) for name, path in files.parts.items()}
        held = {name: list(part.keys()) for name, part in opened.items()}
        files.check(held)
        part_of = {key: part for part, keys in held.items() for key in keys}
        try:
            keys = _whole_names(part_of, half)
            family = _family_of(keys, family)
            names = {name: keys[key] for name, key in family.tensor_names(keys).items()}
        except ConfigError as error:
            raise ConfigError(f"{files.path}: {error}") from None
        try:
            tensors = {name: opened[part_of[key]].get_tensor(key) for name, key in names.items()}
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{files.path} could not be read: {first_line(error)}") from None
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() and not name.endswith(".num_batches_tracked"):
            raise ConfigError(f"{files.path}: tensor {name} is {tensor.dtype}, and weights are floating point")
        if is_attention_projection(name):
            tensor = tensor.reshape(tensor.shape[:2]) if math.prod(tensor.shape[2:]) == 1 else tensor
        tensors[name] = tensor.to(torch.float32)
    return Weights(_without_fused(tensors, files.path), files.sha256(), family)


def _whole_names(keys: Iterable[str], half: Graph | None) -> dict[str, str]:
    """Return {name in a file of a whole VAE: name in this file}.

    The names in a file of half a VAE lack "encoder." or "decoder.". Raises `ConfigError` for such a file, unless it
    contains the `half` that is asked for.
    """
    keys = list(keys)
    bare = bare_names(keys)
    held = half_of(bare)
    if held is None:
        return {key: key for key in keys}
    if held != half:
        asked = f"its {half} is asked for" if half else "a whole VAE is needed"
        way = {
            "decoder": "give the VAE that it belongs to as the model, and this file as decoder= (--decoder)",
            "encoder": "give the file of its decoder as well, with decoder= (--decoder)",
        }
        raise ConfigError(f"it holds {'an' if held == 'encoder' else 'a'} {held} alone, and {asked}; {way[held]}")
    return {name if name.startswith(("quant_conv.", "post_quant_conv.")) else f"{held}.{name}": key
            for name, key in bare.items()}  # fmt: skip


def _family_of(keys: Iterable[str], expected: Family | None) -> Family:
    """Return the family whose tensors have these names. Raises `ConfigError` if the config's family is another."""
    recognised = recognised_family(bare_names(keys))
    if recognised is None:
        return expected or family_named(DEFAULT)
    if expected is not None and expected.name != recognised.name:
        raise ConfigError(
            f"its weights are of an {recognised.name}, and the config describes an {expected.name}: put the config and "
            "the weights of one model together"
        )
    return recognised


def _without_fused(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Drop the fused copies of q, k and v that diffusers' fuse_qkv_projections adds, and warn.

    Raises `ConfigError` if a copy differs from its separate tensors: then it is unknown which values are right.
    """
    kept = dict(tensors)
    for name in [name for name in tensors if is_fused_projection(name)]:
        parts = [tensors.get(name.replace(".to_qkv.", f".to_{letter}.")) for letter in "qkv"]
        separate = [part for part in parts if part is not None]
        if not separate:
            continue  # `_check_weights` names the missing tensors
        fused = kept.pop(name)
        if len(separate) != 3 or not torch.equal(torch.cat(separate), fused.reshape(fused.shape[: separate[0].ndim])):
            raise ConfigError(
                f"{path}: {name} is not its to_q, to_k and to_v put together; the file was changed after "
                "fuse_qkv_projections(). Call unfuse_qkv_projections() and save the model again, or remove the tensors "
                "that are not meant"
            )
    if len(kept) < len(tensors):
        warnings.warn(
            f"{path} was saved after fuse_qkv_projections(): {len(tensors) - len(kept)} fused tensors are left out, "
            "because they are copies of other tensors in the file",
            UserWarning,
            stacklevel=2,
        )
    return kept


def _opened(path: Path) -> Any:
    """Open a .safetensors file; `ConfigError` says what another file is instead."""
    refuse_pickle(path)
    if not path.is_file():
        raise ConfigError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        explanation = what_it_is_instead(path)
        raise ConfigError(f"{path} is not a complete safetensors file: {explanation or first_line(error)}") from None


def build_model(family: Family, config: Any, tensors: Mapping[str, Tensor], source: Source) -> ReferenceVae:
    """Build the reference model with these weights, in eval mode and without gradients.

    Raises `ConfigError` if names or shapes do not match the config, `NumericsError` if a weight is not finite.
    """
    tensors = family.checked_tensors(tensors, source.given)
    layers = getattr(config, "layers_per_block", 1)
    if layers > len(tensors):  # before the network is made: a billion layers would never finish
        raise ConfigError(f"{source.given}: {layers} layers a block, and the file has {len(tensors)} tensors in all")
    try:
        with torch.device("meta"):  # no memory, no random numbers: every tensor is replaced
            model = family.network(config)
    except (RuntimeError, TypeError) as error:  # torch raises these for sizes beyond 64 bits
        raise ConfigError(f"{source.given}: no network has the sizes in this config: {first_line(error)}") from None
    _check_weights({n: tuple(t.shape) for n, t in model.state_dict().items()}, tensors, source.given)
    model.load_state_dict(tensors, strict=True, assign=True)
    absolute = os.path.abspath(source.given) if source.kind in ("directory", "file") else None
    model.source = source._replace(absolute=absolute, tensors_sha256=tensors_sha256(model.state_dict()))
    return model.eval().requires_grad_(False)


def _check_weights(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], given: str) -> None:
    problems = []
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    shapes = {name: tuple(tensors[name].shape) for name in expected if name in tensors}
    misshaped = [f"{n} {list(s)}, not {list(expected[n])}" for n, s in shapes.items() if s != expected[n]]
    for title, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshaped)):
        if names:
            problems.append(f"{len(names)} {title}: {shortened(names)}")
    if problems:
        raise ConfigError(f"{given}: the weights do not fit the config. " + "; ".join(problems))
    not_finite = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if not_finite:
        raise NumericsError(
            f"{given}: NaN or infinity in {len(not_finite)} of {len(tensors)} weights: {shortened(not_finite)}"
        )


def refuse_pickle(path: str | Path) -> None:
    """Raise `ConfigError` for a pickle, with the command that converts it."""
    path = Path(path)
    is_pickle = path.suffix.lower() in PICKLES
    if not is_pickle and path.is_file():
        with path.open("rb") as file:
            start = file.read(9)
        # A safetensors file starts with 8 arbitrary bytes (a length) and then JSON, so byte 8 is "{".
        is_pickle = start[8:] != b"{" and (start[:1] == b"\x80" or start[:4] == b"PK\x03\x04")
    if is_pickle:
        raise ConfigError(
            f"{path} is a pickle, and loading one runs whatever code is in it: only .safetensors is read. To convert "
            f"one that you trust: {conversion(path)}"
        )


def conversion(path: Path) -> str:
    """Return the shell command that converts a pickle to safetensors."""
    target = path.with_suffix(".safetensors")
    if target == path:  # a pickle with the extension .safetensors
        target = path.with_name(f"{path.stem}-converted.safetensors")
    code = (
        "import sys, torch, safetensors.torch as s; "
        # open: torch.load decides by the extension, and refuses a pickle that is named .safetensors
        "w = torch.load(open(sys.argv[1], 'rb'), weights_only=True, map_location='cpu'); "
        "w = w.get('state_dict', w); "
        # clone: safetensors refuses tensors that share memory
        "s.save_file({k: v.clone().contiguous() for k, v in w.items() if torch.is_tensor(v)}, sys.argv[2])"
    )
    return f'python -c "{code}" {shlex.quote(str(path))} {shlex.quote(str(target))}'
