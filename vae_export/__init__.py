"""vae-export: checkpoint in, verified bundle out.

The names below load on first use: the command line runs `decode` and `inspect` on machines without PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtimes.config import VaeConfig as VaeConfig
    from vae_export.families.autoencoder_kl import AutoencoderKL as AutoencoderKL

_HOMES = {
    "AutoencoderKL": "vae_export.families.autoencoder_kl",
    "VaeConfig": "runtimes.config",
    "export_bundle": "vae_export.export",
    "validate_bundle": "vae_export.export",
}
__all__ = ["AutoencoderKL", "VaeConfig", "export_bundle", "validate_bundle"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
