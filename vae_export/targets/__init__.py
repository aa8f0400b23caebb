"""Targets, one module each. A target writes the graphs of a bundle for one runtime.

To add a target, write a subclass of `vae_export.targets.base.Target` and register it, with a line in `TARGETS` or from
another package with

    TARGETS.register("name", "module:Class")

Then register the backend that opens its bundles with `runtimes.register_backend`.
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
    """Return the target with this name.

    Raises `ConfigError`, which lists the known names, for an unknown name, and `NotInstalled` if a package that the
    target needs is missing.
    """
    try:
        target: Target = TARGETS[name]()
    except ModuleNotFoundError as error:
        raise missing_package(error) from None
    return target
