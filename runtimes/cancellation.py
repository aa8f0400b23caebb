"""Cancel calls that are running in native code, from another thread.

Python runs a signal handler only after the main thread returns from native code, which takes minutes for a large image.
Therefore another thread cancels the call that the main thread waits for: see `vae_export.cli.main`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Has no lock, since a signal handler could interrupt the thread that holds it; each change is atomic.
_at_work: set[Callable[[], object]] = set()


@contextmanager
def cancellable(cancel: Callable[[], object]) -> Iterator[None]:
    """Register, for the duration of a call, the function `cancel` that makes the call raise soon, from any thread."""
    _at_work.add(cancel)
    try:
        yield
    finally:
        _at_work.discard(cancel)


def cancel_calls() -> None:
    """Cancel all running calls of ONNX Runtime and OpenVINO in this process: each raises a `VaeError`.

    A call ends after its current operation. In OpenVINO, a whole attention is one operation; in ONNX bundles, each
    block of queries is one.
    """
    for cancel in list(_at_work):
        cancel()
