"""Which backends work here, and why the others do not."""

from __future__ import annotations

import importlib

from runtimes import BACKENDS
from runtimes.errors import BackendUnavailable


def check_backend(name: str) -> dict[str, str]:
    """{device: "works", or the reason why not} for one backend."""
    module_name, _, class_name = BACKENDS[name].partition(":")
    try:
        runtime = getattr(importlib.import_module(module_name), class_name)
    except BackendUnavailable as error:
        return {"any device": str(error)}
    states: dict[str, str] = runtime.check_devices()
    return states
