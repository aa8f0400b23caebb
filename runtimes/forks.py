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

_opened: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  #: runtime -> the process that opened it


def watch(runtime: Any) -> None:
    """From now on `runtime` belongs to this process."""
    _opened[runtime] = os.getpid()


def is_foreign(runtime: Any) -> bool:
    """Whether another process opened it, of which this one is a fork."""
    return _opened.get(runtime) != os.getpid()


def check(runtime: Any) -> None:
    """`VaeError` in a process forked from the one that opened it."""
    if is_foreign(runtime):
        raise VaeError(
            f"this VAE was opened in process {_opened.get(runtime)}, of which this one ({os.getpid()}) is a fork: open "
            "the bundle here, best in a process that was started by spawn or forkserver"
        )


def _keep_all() -> None:
    """One reference more than there are: nothing releases what the parent opened."""
    for runtime in list(_opened):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(runtime))


os.register_at_fork(after_in_child=_keep_all)
