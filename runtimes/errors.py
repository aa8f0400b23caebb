"""Every error that leaves the public API of `runtimes` and `vae_export`.

VaeError
├── ConfigError             a config or checkpoint is not an AutoencoderKL; missing or unexpected keys
├── BundleError             a bundle cannot be read or written
│   ├── IntegrityError      a file differs from the manifest in hash or size, or leads out of the bundle
│   └── CompatibilityError  another schema, another backend version, another GPU
├── ShapeError              shape, dtype or size of an array or image is wrong; names the value and the rule
├── NumericsError           NaN or infinity, or a missed validation threshold; carries the numbers
├── OutOfMemoryError        names the request and what would fit
└── BackendUnavailable      a backend or device is not available; names the install command
    └── NotInstalled        a package is missing; also an ImportError

Each class has an exit code, which the command line returns. Codes 0 (success), 1 (a bug in this program),
2 (wrong usage) and 130 (interrupted) are taken.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar


class VaeError(Exception):
    """Base of every error of this project; catch it to catch them all."""

    exit_code: ClassVar[int] = 3


class ConfigError(VaeError):
    """A config or checkpoint that is not an `AutoencoderKL`, or that lacks something only the caller can give."""

    exit_code = 4


class BundleError(VaeError):
    """A bundle that cannot be read or written: not a bundle, directory exists, not writable, disk full."""

    exit_code = 5


class IntegrityError(BundleError):
    """A file of a bundle that differs from the manifest. Its content was not parsed."""

    exit_code = 6


class CompatibilityError(BundleError):
    """A sound bundle that this version, backend or device cannot run."""

    exit_code = 7


class ShapeError(VaeError):
    """An input with a wrong shape, dtype, size or value range; the message names the value and the rule."""

    exit_code = 8


class NumericsError(VaeError):
    """NaN or infinity, or a missed validation threshold. `measurements` holds the numbers."""

    exit_code = 9

    def __init__(self, message: str, measurements: list[dict[str, Any]] | None = None) -> None:
        super().__init__(message)
        self.measurements = measurements or []


class OutOfMemoryError(VaeError):
    """The device or host ran out of memory; the message names the request and what would fit."""

    exit_code = 10


class BackendUnavailable(VaeError):
    """A backend, provider or device that is not installed or not present; the message says how to get it."""

    exit_code = 11


class NotInstalled(BackendUnavailable, ImportError):
    """A Python package that is missing or does not load; the message says how to install it.

    It is also an `ImportError`, because our modules raise it while they are imported.
    """


# Messages of the backends. "Resource unavailable": a thread's stack could not be allocated.
_NO_MEMORY = re.compile(r"alloc|out of memory|resource temporarily unavailable", re.IGNORECASE)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error of a backend reports that memory ran out."""
    return isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)) is not None
