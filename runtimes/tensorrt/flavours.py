"""The two flavours of TensorRT: `tensorrt` for all NVIDIA GPUs, `tensorrt_rtx` for GeForce and RTX.

Their APIs are the same but for a few names.
"""

from __future__ import annotations

import importlib
import platform
import re
import sys
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from runtimes.errors import BackendUnavailable, ConfigError, NotInstalled

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}  #: flavour -> module
_INSTALL = {"tensorrt": "vae-export[tensorrt]", "tensorrt-rtx": "vae-export[rtx]"}
_OLDEST = {"tensorrt": (10, 13), "tensorrt-rtx": (1, 3)}

_loaded: dict[str, Flavour] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class Flavour:
    """An imported flavour."""

    name: str
    trt: Any  #: the module
    logger: Any  #: one for the whole process, since TensorRT keeps the first logger that it is given
    log: deque[str]  #: the last errors that the logger received

    @property
    def version(self) -> str:
        return str(self.trt.__version__)

    @property
    def is_rtx(self) -> bool:
        return hasattr(self.trt, "ComputeCapability")

    def complaints(self) -> str:
        """Take the logged errors and return them on one line; "it gave no reason" if there are none."""
        lines = []
        with suppress(IndexError):  # the log is empty; another thread may have taken the last error
            while True:
                lines.append(self.log.popleft())
        return "; ".join(dict.fromkeys(lines)) or "it gave no reason"


def load_flavour(name: str) -> Flavour:
    """Import a flavour. Raises `BackendUnavailable` if it is not installed, does not load, or is too old."""
    with _lock:
        if name not in _loaded:
            _loaded[name] = _load(name)
        return _loaded[name]


def _load(name: str) -> Flavour:
    if name not in MODULES:
        raise ConfigError(f"no TensorRT flavour {name!r}; known are {', '.join(MODULES)}")
    try:
        trt = importlib.import_module(MODULES[name])
    except Exception as error:  # missing libraries or another CUDA raise exceptions of many types
        problem = "is not installed" if isinstance(error, ModuleNotFoundError) else f"does not load ({error})"
        raise NotInstalled(f"{MODULES[name]} {problem}: pip install '{_INSTALL[name]}'") from None
    version = tuple(int(part) for part in re.findall(r"\d+", str(trt.__version__))[:2])
    if version < _OLDEST[name]:
        oldest = ".".join(map(str, _OLDEST[name]))
        raise BackendUnavailable(
            f"{MODULES[name]} {trt.__version__} is too old: {oldest} or later, pip install -U '{_INSTALL[name]}'"
        )
    log: deque[str] = deque(maxlen=20)

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        """Stores errors for our messages; TensorRT's own logger would print them."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                log.append(_tidy(message))

    return Flavour(name, trt, Logger(), log)


def system() -> str:
    """Return the operating system and processor that a plan is tied to, such as linux-x86_64."""
    return f"{sys.platform}-{platform.machine()}"


def _tidy(message: str) -> str:
    """Return a message of TensorRT on one line, without the function and source line that raised it."""
    text = " ".join(message.split())
    places = r"\[\w+\.cpp::[^\]]*\]\s*|\b\w+\.cpp:\d+:? |In function \w+:? |\s*\bIn \w+ at /[^\s:)]+:\d+"
    return re.sub(places, "", text).strip()[:1000]
