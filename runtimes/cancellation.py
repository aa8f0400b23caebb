"""Ending calls that are at work in native code, from another thread.

Python runs a signal's handler when the main thread comes back from native code, which for one large image takes
minutes. A thread beside it ends what it waits for: see `vae_export.cli.main`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_at_work: set[Callable[[], object]] = set()  # each change is one bytecode: no lock, which a signal could find held


@contextmanager
def cancellable(cancel: Callable[[], object]) -> Iterator[None]:
    """For the time of a call: `cancel`, called from any thread, makes it raise soon."""
    _at_work.add(cancel)
    try:
        yield
    finally:
        _at_work.discard(cancel)


def cancel_calls() -> None:
    """End all calls that are at work in this process, of ONNX Runtime and OpenVINO: each raises a `VaeError`.

    They end behind the operation that they are at. In OpenVINO a whole attention is one, in ONNX bundles a block of it.
    """
    for cancel in list(_at_work):
        cancel()
