"""The protocol by which long-running work of both packages reports progress."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """A callback that receives a description of the work, the finished steps, and the total number of steps."""

    def __call__(self, what: str, done: int, total: int, /) -> object: ...


def no_progress(what: str, done: int, total: int, /) -> None:
    """Ignore the report. This is the default progress callback."""
