"""The two TensorRT: `tensorrt` for all NVIDIA GPUs, `tensorrt_rtx` for GeForce and RTX; one API but for a few names."""

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
    """One of the two, imported; `log` holds what it last complained of."""

    name: str
    trt: Any  #: the module
    logger: Any  #: the one logger of the process: TensorRT keeps the first that it is given
    log: deque[str]

    @property
    def version(self) -> str:
        return str(self.trt.__version__)

    @property
    def is_rtx(self) -> bool:
        return hasattr(self.trt, "ComputeCapability")

    def complaints(self) -> str:
        """Errors since the last call, on one line; a sentence where there were none."""
        lines = []
        with suppress(IndexError):  # empty, perhaps since another thread took the last one
            while True:
                lines.append(self.log.popleft())
        return "; ".join(dict.fromkeys(lines)) or "it gave no reason"


def load_flavour(name: str) -> Flavour:
    """`BackendUnavailable` where it is not installed, does not load, or is too old."""
    with _lock:
        if name not in _loaded:
            _loaded[name] = _load(name)
        return _loaded[name]


def _load(name: str) -> Flavour:
    if name not in MODULES:
        raise ConfigError(f"no TensorRT flavour {name!r}; known are {', '.join(MODULES)}")
    try:
        trt = importlib.import_module(MODULES[name])
    except Exception as error:  # its libraries may be missing or of another CUDA: any exception means the same
        found = "is not installed" if isinstance(error, ModuleNotFoundError) else f"does not load ({error})"
        raise NotInstalled(f"{MODULES[name]} {found}: pip install '{_INSTALL[name]}'") from None
    version = tuple(int(part) for part in re.findall(r"\d+", str(trt.__version__))[:2])
    if version < _OLDEST[name]:
        oldest = ".".join(map(str, _OLDEST[name]))
        raise BackendUnavailable(
            f"{MODULES[name]} {trt.__version__} is too old: {oldest} or later, pip install -U '{_INSTALL[name]}'"
        )
    log: deque[str] = deque(maxlen=20)

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        """Keeps errors for messages; TensorRT's own logger would print them."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                log.append(_tidy(message))

    return Flavour(name, trt, Logger(), log)


def system() -> str:
    """Operating system and processor, which a plan is tied to: linux-x86_64."""
    return f"{sys.platform}-{platform.machine()}"


def _tidy(message: str) -> str:
    """On one line, without the function and place in its source."""
    text = " ".join(message.split())
    places = r"\[\w+\.cpp::[^\]]*\]\s*|\b\w+\.cpp:\d+:? |In function \w+:? |\s*\bIn \w+ at /[^\s:)]+:\d+"
    return re.sub(places, "", text).strip()[:1000]
