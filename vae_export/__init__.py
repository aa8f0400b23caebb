"""vae-export: checkpoint in, verified bundle out.

The names below load on first use: the command line runs `decode` and `inspect` on machines without PyTorch.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtimes.config import VaeConfig as VaeConfig
    from vae_export.model import AutoencoderKL as AutoencoderKL

_HOMES = {
    "AutoencoderKL": "vae_export.model",
    "VaeConfig": "runtimes.config",
    "export_bundle": "vae_export.export",
    "validate_bundle": "vae_export.export",
}
__all__ = ["AutoencoderKL", "VaeConfig", "export_bundle", "validate_bundle"]
__version__ = "0.1.0"


def _check_runtimes() -> None:
    """`ImportError` where `runtimes` is not the package beside this one, but another that comes first on the path."""
    ours = os.path.join(os.path.dirname(os.path.dirname(os.path.realpath(__file__))), "runtimes")
    if "runtimes" in sys.modules:
        found = getattr(sys.modules["runtimes"], "__file__", None)
    else:
        spec = importlib.util.find_spec("runtimes")
        found = None if spec is None else spec.origin
    if found is not None and os.path.dirname(os.path.realpath(found)) == ours:
        return
    is_package = found is not None and os.path.basename(found).startswith("__init__.")
    where = os.path.dirname(found) if found is not None and is_package else found
    raise ImportError(
        f"vae_export needs its own package 'runtimes', in {ours}, and Python finds "
        + ("none" if where is None else f"another first: {where}. Rename that, or start Python elsewhere, or with -P"),
        name="runtimes",
        path=found,
    )


_check_runtimes()


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
