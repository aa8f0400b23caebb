"""Progress of long work: how it is reported."""

from __future__ import annotations

from collections.abc import Callable

#: called with (what is being done, steps done, steps in all)
Progress = Callable[[str, int, int], None]


def no_progress(what: str, done: int, total: int) -> None:
    """Report to nobody."""
