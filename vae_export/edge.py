"""Checks at the entry of export and comparison functions: their arguments, and the global settings of PyTorch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from runtimes.errors import ConfigError
from vae_export.families.base import ReferenceVae


def check_model(model: Any) -> None:
    """Raise `ConfigError` unless `model` is a reference model of this package with fp32 weights on the CPU."""
    if not isinstance(model, ReferenceVae):
        kind = f"{type(model).__module__}.{type(model).__qualname__}"
        what = f"{model!r} ({kind})" if model is None or isinstance(model, (str, os.PathLike)) else f"a {kind}"
        if kind.startswith("diffusers."):
            way = "save it with save_pretrained(directory), then load_model(directory)"
        elif isinstance(model, (str, os.PathLike)):
            way = "load it first: load_model(path)"
        else:
            way = "load_model() returns one, and so do AutoencoderKL.from_pretrained and from_single_file"
        raise ConfigError(f"the model is {what}, not a reference model of vae_export; {way}")
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise ConfigError(f"the model is on the meta device and has no weights ({name}): load them first")
        if tensor.device.type != "cpu":
            raise ConfigError(f"{name} is on {tensor.device}; models are exported from the CPU: model.to('cpu')")
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ConfigError(
                f"{name} is {tensor.dtype}; the model is the fp32 reference that bundles of every precision are "
                "compared with. Load it again, which gives fp32, or, if its weights were trained so, model.float()"
            )


def check_path(path: Any, name: str) -> None:
    """Raise `ConfigError` unless `path`, the argument called `name`, is a str or path-like object."""
    if not isinstance(path, (str, os.PathLike)):
        raise ConfigError(f"{name} = {path!r}: a path is a str or pathlib.Path")


@contextmanager
def ordinary_torch() -> Iterator[None]:
    """Return a context, or decorator, in which PyTorch has the default settings that affect results.

    These settings are the default dtype and device, autocast, grad mode, inference mode, and the precision of fp32
    products. They are restored at the end.
    """
    dtype, products = torch.get_default_dtype(), _product_precision()
    onednn: Any = torch.backends.mkldnn
    convolutions = onednn.conv.fp32_precision
    torch.set_default_dtype(torch.float32)
    if products is not None:
        torch.set_float32_matmul_precision("highest")
    onednn.conv.fp32_precision = "ieee"
    try:
        with (
            torch.device("cpu"),
            torch.autocast("cpu", enabled=False),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            yield
    finally:
        onednn.conv.fp32_precision = convolutions
        if products is not None:
            torch.set_float32_matmul_precision(products)
        torch.set_default_dtype(dtype)


def _product_precision() -> str | None:
    """Return the precision of fp32 matrix products, or None if it is set per backend and must not be changed."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None
