"""Warnings that point at the caller's line, wherever inside of our packages they arise."""

from __future__ import annotations

import sys
import warnings

_OURS = ("runtimes", "vae_export")


def warn_caller(message: str) -> None:
    """A `UserWarning` at the first line of the stack that is not in our packages."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _OURS:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)
