"""Warnings that name the user's line of code, not the line in our packages that raises them."""

from __future__ import annotations

import sys
import warnings

_OURS = ("runtimes", "vae_export")


def warn_caller(message: str) -> None:
    """Give a `UserWarning` for the innermost line of the stack that is outside of our packages."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _OURS:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)
