"""The parameters of an `AutoencoderKL` for Flax: reading and writing files, converting names, checking completeness.

The parameters are a tree of dictionaries, as in diffusers' FlaxAutoencoderKL:
`params["encoder"]["mid_block"]["resnets_0"]["conv1"]["kernel"]`. Kernels are [height, width, in, out], or [in, out] in
attentions. Files are not trusted: a malformed one raises a `ConfigError` that names it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from runtimes.errors import ConfigError, NotInstalled, NumericsError

try:
    import jax.numpy as jnp
    from flax import serialization
except ImportError:
    raise NotInstalled("JAX and Flax are not installed: pip install 'vae-export[flax]'") from None

Array = npt.NDArray[Any]
Params = dict[str, Any]  #: name -> array or another such dictionary

FLAX_FILE = "diffusion_flax_model.msgpack"
TORCH_FILE = "diffusion_pytorch_model.safetensors"
SHOWN = 5  #: number of names that an error lists before it counts the rest
#: safetensors' name of a dtype -> the dtype
FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
_TO_FLAX = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out_0": "proj_attn"}
_TO_TORCH = {flax: torch.replace("_0", ".0") for torch, flax in _TO_FLAX.items()}


# msgpack ----------------------------------------------------------------------------------------------------------


def read_msgpack(data: bytes, origin: str) -> Params:
    """Parse the bytes of a diffusion_flax_model.msgpack into a tree, whose arrays are views of the bytes.

    Raises `ConfigError`, which names `origin`, for anything else.
    """
    try:
        tree = serialization.msgpack_restore(data)
    except Exception as error:  # the only common base of the errors of msgpack and NumPy
        raise ConfigError(f"{origin} is not complete msgpack as Flax writes it: {_reason(error)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{origin} holds no parameters by name but a {type(tree).__name__}")
    try:
        strange = [f"{name} ({_kind(leaf)})" for name, leaf in leaves(tree) if not _is_float_array(leaf)]
    except RecursionError:
        raise ConfigError(f"{origin} is nested too deep to be the parameters of a network") from None
    if strange:
        raise ConfigError(f"{origin}: parameters are arrays of floating point, and these are not: {listed(strange)}")
    return tree


def write_msgpack(params: Mapping[str, Any]) -> bytes:
    """Return the bytes of a diffusion_flax_model.msgpack, in the format of diffusers' Flax classes."""
    return serialization.msgpack_serialize(dict(params))


# safetensors ------------------------------------------------------------------------------------------------------


def read_safetensors(data: bytes, origin: str) -> Params:
    """Parse the bytes of a diffusion_pytorch_model.safetensors, with old or new names of diffusers, into a tree."""
    safetensors = import_safetensors()
    try:
        tensors = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        raise ConfigError(f"{origin} is not a complete safetensors file: {_reason(error)}") from None
    strange = [f"{name} ({tensor['dtype']})" for name, tensor in tensors if tensor["dtype"] not in FLOATS]
    if strange:
        raise ConfigError(f"{origin}: weights are floating point, and these are not: {listed(strange)}")
    return from_torch(
        {name: np.frombuffer(t["data"], FLOATS[t["dtype"]]).reshape(t["shape"]) for name, t in tensors}, origin
    )


def import_safetensors() -> Any:
    """Import safetensors, without PyTorch; raises `NotInstalled` if it is missing."""
    try:
        import safetensors
        import safetensors.numpy  # does not import PyTorch
    except ImportError:
        raise NotInstalled("safetensors is not installed: pip install 'vae-export[flax]'") from None
    return safetensors


# Names ------------------------------------------------------------------------------------------------------------


def from_torch(tensors: Mapping[str, Array], origin: str) -> Params:
    """Convert PyTorch tensors with diffusers' names to the Flax tree: list indices become suffixes, kernels transpose.

    Attentions of old files (query, key, value, proj_attn, stored as 1x1 convolutions) are converted as well.
    """
    params: Params = {}
    for name, tensor in tensors.items():
        *path, leaf = re.sub(r"\.(\d+)(?=\.|$)", r"_\1", name).split(".")
        attention = len(path) > 1 and path[-2].startswith("attentions_")
        if attention:
            path[-1] = _TO_FLAX.get(path[-1], path[-1])
        if leaf == "weight" and path and "norm" in path[-1]:
            leaf = "scale"
        elif leaf == "weight":
            leaf = "kernel"
            if attention and tensor.shape[2:] in ((1,), (1, 1)):
                tensor = tensor.reshape(tensor.shape[:2])
            tensor = tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T
        node = params
        for part in path:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{origin}: {name!r} is below another tensor")
        if leaf in node:
            raise ConfigError(f"{origin}: {'/'.join((*path, leaf))} is there twice, under its old and its new name")
        node[leaf] = tensor
    return params


def to_torch(params: Mapping[str, Any]) -> dict[str, Array]:
    """Convert the Flax tree to PyTorch tensors with diffusers' current names: the inverse of `from_torch`."""
    tensors = {}
    for name, leaf in leaves(params):
        *path, kind = name.split("/")
        path = [re.sub(r"_(\d+)$", r".\1", part) for part in path]
        if len(path) > 1 and path[-2].startswith("attentions."):
            path[-1] = _TO_TORCH.get(path[-1], path[-1])
        array = np.asarray(leaf)
        if kind == "kernel":
            array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        torch_kind = "bias" if kind == "bias" else "weight"
        tensors[".".join((*path, torch_kind))] = np.ascontiguousarray(array)
    return tensors


# Completeness -----------------------------------------------------------------------------------------------------


def leaves(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path joined by slashes, leaf) of a tree of dictionaries."""
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def check_params(params: Mapping[str, Any], expected: Mapping[str, Any], origin: str) -> None:
    """Check a tree of parameters against the expected tree.

    Raises `ConfigError` that lists missing, unexpected and wrongly shaped parameters, `NumericsError` for NaN and
    infinity.
    """
    actual, wanted = dict(leaves(params)), dict(leaves(expected))
    shapes = {name: (tuple(leaf.shape), tuple(wanted[name].shape)) for name, leaf in actual.items() if name in wanted}
    problems = {
        "missing": [name for name in wanted if name not in actual],
        "unexpected": [name for name in actual if name not in wanted],
        "of another shape": [f"{name} {list(has)}, not {list(want)}" for name, (has, want) in shapes.items()
                             if has != want],
    }  # fmt: skip
    complaints = [f"{len(names)} {title}: {listed(names)}" for title, names in problems.items() if names]
    if complaints:
        raise ConfigError(f"{origin}: the parameters do not fit the model. {'; '.join(complaints)}")
    not_finite = [name for name, leaf in actual.items() if not np.isfinite(np.asarray(leaf, np.float32)).all()]
    if not_finite:
        raise NumericsError(f"{origin}: NaN or infinity in {len(not_finite)} parameters: {listed(not_finite)}")


def listed(names: Sequence[str]) -> str:
    """Join the first SHOWN names by commas, and count the rest."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _is_float_array(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray) and bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def _kind(leaf: Any) -> str:
    return str(leaf.dtype) if isinstance(leaf, np.ndarray) else type(leaf).__name__


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
