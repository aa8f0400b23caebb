"""How long work reports its progress: one protocol for both packages."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called with what is being done, the steps done, and the steps in all."""

    def __call__(self, what: str, done: int, total: int, /) -> object: ...


def no_progress(what: str, done: int, total: int, /) -> None:
    """Ignore the report: the default wherever progress can be given."""
