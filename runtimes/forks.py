"""Protection of opened bundles in forked processes: a runtime can be neither used nor released there.

A fork copies the memory, but only the thread that forked. The state of a backend (worker threads, locks, the GPU
context) is broken in the copy: a call, or the release of that state, would wait for ever. In a fork, using an inherited
runtime raises `VaeError`, closing it does nothing, and its memory is kept until the process ends. The process must end
by `os._exit`, as forks of multiprocessing do: the exit handlers of ONNX Runtime and JAX hang or crash there.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import Any

from runtimes.errors import VaeError

#: backends that a fork cannot use at all if its parent has used them
_UNFORKABLE = ("openvino", "flax", "tensorrt", "tensorrt-rtx")

_generation = 0  #: number of forks between the first process and this one; process ids are reused
_opened: weakref.WeakKeyDictionary[Any, tuple[int, int]] = weakref.WeakKeyDictionary()  #: -> generation and process
_used: set[str] = set()  #: backends that this process has used
_inherited: set[str] = set()  #: backends that were used before this process was forked


def watch(runtime: Any) -> None:
    """Record that `runtime` belongs to this process; raises `VaeError` if its backend cannot be used in this fork."""
    if runtime.backend in _inherited and runtime.backend in _UNFORKABLE:
        raise VaeError(
            f"{runtime.backend} was used before this process ({os.getpid()}) was forked, and hangs in forks: start "
            "processes by spawn or forkserver"
        )
    _used.add(runtime.backend)
    _opened[runtime] = _generation, os.getpid()


def is_foreign(runtime: Any) -> bool:
    """Return whether a parent of this forked process opened the runtime."""
    return _opened.get(runtime, (_generation, 0))[0] != _generation


def opened_here() -> list[Any]:
    """Return the runtimes that this process opened and that still exist, including closed ones."""
    return [runtime for runtime in list(_opened) if not is_foreign(runtime)]


def check(runtime: Any) -> None:
    """Raise `VaeError` if a parent of this forked process opened the runtime."""
    if is_foreign(runtime):
        raise VaeError(
            f"this VAE was opened in process {_opened[runtime][1]}, and this process ({os.getpid()}) is a fork of it: "
            "open the bundle here, best in a process that was started by spawn or forkserver"
        )


def _after_fork() -> None:
    """Leak one reference to each inherited runtime, so that nothing releases what the parent opened."""
    global _generation
    _generation += 1
    _inherited.update(_used)
    for runtime in list(_opened):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(runtime))


if hasattr(os, "register_at_fork"):  # Windows has no forks
    os.register_at_fork(after_in_child=_after_fork)
