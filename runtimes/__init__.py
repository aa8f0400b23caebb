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
    """Open a bundle. The backend follows from the bundle's target; `backend` chooses another that can open it.

    `device` is "cpu" unless given, and "cuda" for TensorRT, which runs nowhere else.

    `tiling`, "blended" or "seamless", is that of `VaeRuntime.enable_tiling`; `memory_budget`, such as "2GiB", that of
    `VaeRuntime.memory_budget`.

    `allow_links` is a directory inside of which files of the bundle may be links, as on a Kubernetes volume. A snapshot
    in a cache of the Hugging Face Hub needs none: see `Bundle`.

    `options` are those of the backend's class; all take `check_finite=True`, which turns NaN and infinity in a result
    into `NumericsError`.

    Raises `BundleError` where there is no bundle, `IntegrityError` where a file is not what the manifest says,
    `CompatibilityError` where the backend cannot load it, `BackendUnavailable` where backend or device is not here.
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
