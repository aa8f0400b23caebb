"""Clean end of calls that run in daemon threads while the interpreter shuts down.

CPython kills a daemon thread that returns from native code into an interpreter that has been finalized. Inside the C++
code of ONNX Runtime or JAX, that aborts the whole process with a core dump and the wrong exit code. Therefore, before
the interpreter shuts down, this module cancels running calls (where the backend supports that) and waits for them. A
thread whose call was cancelled, or that starts another call, receives `SystemExit`, which ends a thread silently.
"""

from __future__ import annotations

import atexit
import threading
import time

from runtimes import forks
from runtimes.cancellation import cancel_calls

PATIENCE = 10.0  #: seconds to wait for a call that cannot be cancelled (JAX, TensorRT)

_ending_in: int | None = None  #: the thread that shuts the interpreter down


def must_stop() -> bool:
    """Return whether the interpreter is shutting down and the calling thread is not the one that does so."""
    return _ending_in is not None and threading.get_ident() != _ending_in


# atexit functions run in reverse order: a program that registers one after this import can still stop its own threads.
@atexit.register
def _end_calls() -> None:
    global _ending_in
    _ending_in = threading.get_ident()
    deadline = time.monotonic() + PATIENCE
    while any(runtime.is_at_work() for runtime in forks.opened_here()) and time.monotonic() < deadline:
        cancel_calls()
        time.sleep(0.005)
