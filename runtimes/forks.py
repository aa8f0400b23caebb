"""What becomes of an opened bundle in a forked process: nothing.

A fork copies memory, and of the threads only the one that forked. What a backend keeps, threads that wait for work,
locks and the GPU's context, is broken in the copy: a call would wait for ever, and so would the release of it. There,
using a runtime raises, closing it does nothing, and what it holds is kept until the process ends. That has to be by
`os._exit`, as multiprocessing's forks end: ONNX Runtime's and JAX's own handlers of a normal exit hang or crash there.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import Any

from runtimes.errors import VaeError

#: what cannot be used at all in a fork of a process that has used it
_UNFORKABLE = ("openvino", "flax", "tensorrt", "tensorrt-rtx")

_generation = 0  #: how many forks lie between the first process and this one; process ids come again
_opened: weakref.WeakKeyDictionary[Any, tuple[int, int]] = weakref.WeakKeyDictionary()  #: -> generation and process
_used: set[str] = set()  #: backends, here
_inherited: set[str] = set()  #: backends that were used before this process was forked


def watch(runtime: Any) -> None:
    """From now on `runtime` belongs to this process. `VaeError` where its backend does not survive a fork."""
    if runtime.backend in _inherited and runtime.backend in _UNFORKABLE:
        raise VaeError(
            f"{runtime.backend} was used before this process ({os.getpid()}) was forked, and hangs in forks: start "
            "processes by spawn or forkserver"
        )
    _used.add(runtime.backend)
    _opened[runtime] = _generation, os.getpid()


def is_foreign(runtime: Any) -> bool:
    """Whether another process opened it, of which this one is a fork."""
    return _opened.get(runtime, (_generation, 0))[0] != _generation


def opened_here() -> list[Any]:
    """The runtimes that this process opened and that still exist, closed ones as well."""
    return [runtime for runtime in list(_opened) if not is_foreign(runtime)]


def check(runtime: Any) -> None:
    """`VaeError` in a process forked from the one that opened it."""
    if is_foreign(runtime):
        raise VaeError(
            f"this VAE was opened in process {_opened[runtime][1]}, of which this one ({os.getpid()}) is a fork: open "
            "the bundle here, best in a process that was started by spawn or forkserver"
        )


def _after_fork() -> None:
    """One reference more than there are: nothing releases what the parent opened."""
    global _generation
    _generation += 1
    _inherited.update(_used)
    for runtime in list(_opened):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(runtime))


if hasattr(os, "register_at_fork"):  # Windows has no forks
    os.register_at_fork(after_in_child=_after_fork)
