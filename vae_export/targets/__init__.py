"""Targets, one module each: how the graphs of a bundle are written for one runtime.

To add one, write a subclass of `vae_export.targets.base.Target` and register it: a line in `TARGETS`, or from elsewhere

    TARGETS.register("name", "module:Class")

and say which backend opens its bundles with `runtimes.register_backend`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtimes.errors import ConfigError
from runtimes.registry import Registry
from vae_export import missing_package

if TYPE_CHECKING:
    from vae_export.targets.base import Target

TARGETS = Registry(
    "target",
    ConfigError,
    {
        "onnx": "vae_export.targets.onnx:OnnxTarget",
        "openvino": "vae_export.targets.openvino:OpenVinoTarget",
        "flax": "vae_export.targets.flax:FlaxTarget",
        "tensorrt": "vae_export.targets.tensorrt:TensorRtTarget",
        "tensorrt-rtx": "vae_export.targets.tensorrt:TensorRtRtxTarget",
    },
)


def target_named(name: str) -> Target:
    """The target of this name. `ConfigError` lists the names that are known; `BackendUnavailable` without PyTorch."""
    try:
        target: Target = TARGETS[name]()
    except ModuleNotFoundError as error:
        raise missing_package(error) from None
    return target
