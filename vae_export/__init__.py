"""vae-export: export the image VAE of a checkpoint to a verified bundle.

The public names are imported on first use, so that `decode` and `inspect` run on machines without PyTorch.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtimes.config import VaeConfig as VaeConfig
    from runtimes.errors import NotInstalled
    from vae_export.checkpoints.hub import Hub as Hub
    from vae_export.checkpoints.load import load_model as load_model
    from vae_export.export import export_bundle as export_bundle
    from vae_export.families.asymmetric import AsymmetricAutoencoderKL as AsymmetricAutoencoderKL
    from vae_export.families.autoencoder_kl import AutoencoderKL as AutoencoderKL
    from vae_export.families.flux2 import AutoencoderKLFlux2 as AutoencoderKLFlux2
    from vae_export.families.taef2 import TAEF2 as TAEF2
    from vae_export.families.tiny import AutoencoderTiny as AutoencoderTiny
    from vae_export.options import ExportOptions as ExportOptions
    from vae_export.rewrites.rescale import measure_ranges as measure_ranges
    from vae_export.tune import tune_bundle as tune_bundle
    from vae_export.validate import validate_bundle as validate_bundle

_HOMES = {
    "TAEF2": "vae_export.families.taef2",
    "AsymmetricAutoencoderKL": "vae_export.families.asymmetric",
    "AutoencoderKL": "vae_export.families.autoencoder_kl",
    "AutoencoderKLFlux2": "vae_export.families.flux2",
    "AutoencoderTiny": "vae_export.families.tiny",
    "ExportOptions": "vae_export.options",
    "Hub": "vae_export.checkpoints.hub",
    "VaeConfig": "runtimes.config",
    "export_bundle": "vae_export.export",
    "load_model": "vae_export.checkpoints.load",
    "measure_ranges": "vae_export.rewrites.rescale",
    "tune_bundle": "vae_export.tune",
    "validate_bundle": "vae_export.validate",
}
__all__ = [
    "TAEF2",
    "AsymmetricAutoencoderKL",
    "AutoencoderKL",
    "AutoencoderKLFlux2",
    "AutoencoderTiny",
    "ExportOptions",
    "Hub",
    "VaeConfig",
    "export_bundle",
    "load_model",
    "measure_ranges",
    "tune_bundle",
    "validate_bundle",
]
__version__ = "0.1.0"


def _check_runtimes() -> None:
    """Raise `ImportError` if `runtimes` is not the package beside this one but another one earlier on the path."""
    ours = Path(__file__).resolve().parent.parent / "runtimes"
    if "runtimes" in sys.modules:
        found = getattr(sys.modules["runtimes"], "__file__", None)
    else:
        spec = importlib.util.find_spec("runtimes")
        found = None if spec is None else spec.origin
    if found is not None and Path(found).resolve().parent == ours:
        return
    is_package = found is not None and Path(found).name.startswith("__init__.")
    where = Path(found).parent if found is not None and is_package else found
    raise ImportError(
        f"vae_export needs its own package 'runtimes', in {ours}, and Python finds "
        + ("none" if where is None else f"another first: {where}. Rename that, or start Python elsewhere, or with -P"),
        name="runtimes",
        path=found,
    )


_check_runtimes()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        raise missing_package(error) from None


def missing_package(error: ModuleNotFoundError) -> NotInstalled:
    """Return the error for a missing package that exporting needs."""
    from runtimes.errors import NotInstalled  # not at the top: `_check_runtimes` must run first

    return NotInstalled(f"exporting needs {error.name}: pip install 'vae-export[export,cpu]'")
