"""The edge of the functions that export and compare: the models that they take, and PyTorch in its ordinary state."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from runtimes.errors import ConfigError
from vae_export.families.base import ReferenceVae


def check_model(model: Any) -> None:
    """`ConfigError` for what is not a reference model of this package with its weights in fp32 on the CPU."""
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
        if tensor.dtype != torch.float32:
            raise ConfigError(
                f"{name} is {tensor.dtype}; the model is the fp32 reference that bundles of every precision are "
                "compared with. Load it again, which gives fp32, or, if its weights were trained so, model.float()"
            )


def check_path(path: Any, name: str) -> None:
    """`ConfigError` for what is not a path, before anything of it is made."""
    if not isinstance(path, (str, os.PathLike)):
        raise ConfigError(f"{name} = {path!r}: a path is a str or pathlib.Path")


@contextmanager
def ordinary_torch() -> Iterator[None]:
    """Work as in a fresh process: PyTorch's settings that would change what is computed are set aside meanwhile.

    These are the default type and device, autocast, grad and inference mode, and fp32 products in lower precision. The
    result is also a decorator.
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
    """The precision of fp32 matrix products; None where it was set for backends one by one, and must stay."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None
