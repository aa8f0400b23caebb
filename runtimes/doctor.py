"""Diagnosis of the installed backends: which ones work on this machine, and why others do not."""

from __future__ import annotations

from runtimes.backends import BACKENDS
from runtimes.errors import BackendUnavailable


def check_backend(name: str) -> dict[str, str]:
    """Return {device: "works" or the reason why it does not work} for one backend."""
    try:
        runtime = BACKENDS[name]
    except BackendUnavailable as error:
        return {"any device": str(error)}
    states: dict[str, str] = runtime.check_devices()
    return states
