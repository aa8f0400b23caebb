"""What becomes of calls that are at work in daemon threads when the interpreter ends: they are ended first.

CPython ends a daemon thread when it comes back from native code into an interpreter that is gone. In the middle of the
C++ of ONNX Runtime or JAX that aborts the whole process, with a core dump and an exit code that is not the program's.
So, before the interpreter is taken down, calls are cancelled where the backend can do that, and waited for. A thread
whose call was cancelled, or that begins another, gets `SystemExit`, by which Python ends a thread without a word.
"""

from __future__ import annotations

import atexit
import threading
import time

from runtimes import forks
from runtimes.cancellation import cancel_calls

PATIENCE = 10.0  #: seconds to wait for a call that cannot be cancelled, JAX's and TensorRT's

_ending_in: int | None = None  #: the thread that takes the interpreter down


def must_stop() -> bool:
    """Whether the interpreter is ending, and the thread that asks is not the one that ends it."""
    return _ending_in is not None and threading.get_ident() != _ending_in


# Functions registered here run last to first: one registered after this import may still stop its threads by itself.
@atexit.register
def _end_calls() -> None:
    global _ending_in
    _ending_in = threading.get_ident()
    deadline = time.monotonic() + PATIENCE
    while any(runtime.is_at_work() for runtime in forks.opened_here()) and time.monotonic() < deadline:
        cancel_calls()
        time.sleep(0.005)
