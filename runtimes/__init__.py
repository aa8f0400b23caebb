"""Open a bundle and encode and decode with it: the same API on every backend, without PyTorch.

from runtimes import open_vae

with open_vae("out/sdxl") as vae:
    latents = vae.images_to_latents(images)      # uint8 [B, H, W, 3] -> scaled latents
    images = vae.latents_to_images(latents)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runtimes.backends import BACKENDS, backend_for, register_backend
from runtimes.base import VaeRuntime
from runtimes.bundle import Bundle
from runtimes.config import VaeConfig
from runtimes.errors import (
    BackendUnavailable,
    BundleError,
    CompatibilityError,
    ConfigError,
    IntegrityError,
    NotInstalled,
    NumericsError,
    OutOfMemoryError,
    ShapeError,
    VaeError,
)
from runtimes.outputs import AutoencoderKLOutput, DecoderOutput
from runtimes.posterior import DiagonalGaussianDistribution

__all__ = [
    "AutoencoderKLOutput",
    "BackendUnavailable",
    "Bundle",
    "BundleError",
    "CompatibilityError",
    "ConfigError",
    "DecoderOutput",
    "DiagonalGaussianDistribution",
    "IntegrityError",
    "NotInstalled",
    "NumericsError",
    "OutOfMemoryError",
    "ShapeError",
    "VaeConfig",
    "VaeError",
    "VaeRuntime",
    "open_vae",
    "register_backend",
]


def open_vae(
    path: str | Path | Bundle,
    *,
    backend: str | None = None,
    device: str | None = None,
    tiling: str | None = None,
    memory_budget: int | str | None = None,
    allow_links: str | Path | None = None,
    **options: Any,
) -> VaeRuntime:
    """Open a bundle and return its runtime.

    The bundle's target determines the default backend; `backend` selects another one that can open the target.

    `device` defaults to "cpu"; for TensorRT, which runs on NVIDIA GPUs alone, it defaults to "cuda".

    `tiling` ("blended" or "seamless") enables tiling, see `VaeRuntime.enable_tiling`. `memory_budget`, such as "2GiB",
    sets `VaeRuntime.memory_budget`.

    `allow_links` names a directory. Files of the bundle may be symbolic links to files inside that directory, as on a
    Kubernetes volume. A snapshot in the cache of the Hugging Face Hub does not need this argument, see `Bundle`.

    `options` are passed to the backend's class. Every backend accepts `check_finite=True`, which raises
    `NumericsError` for NaN or infinity in a result.

    Raises `BundleError` if the path holds no bundle, `IntegrityError` if a file differs from the manifest,
    `CompatibilityError` if the backend cannot load the bundle, `BackendUnavailable` if the backend is not installed or
    the device is not present.
    """
    bundle = path if isinstance(path, Bundle) else Bundle(path, allow_links=allow_links)
    kind = BACKENDS[backend_for(bundle.manifest.target, backend)]
    if device is not None:
        options["device"] = device
    runtime = kind(bundle, **options)
    assert isinstance(runtime, VaeRuntime)
    try:
        if tiling is not None:
            runtime.enable_tiling(tiling)
        runtime.memory_budget = memory_budget
    except VaeError:
        runtime.close()
        raise
    return runtime
