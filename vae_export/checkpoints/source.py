"""Where a model's weights came from."""

from __future__ import annotations

from typing import NamedTuple


class Source(NamedTuple):
    """Where a model's weights came from; recorded in the manifest of every bundle made from it."""

    given: str  #: what the caller named: a path, a Hub id, a URL, or "memory"
    kind: str  #: directory | file | hub | memory | embedded
    weights_sha256: str | None = None  #: of the weights file
    repo: str | None = None
    commit: str | None = None  #: 40 hex digits
    subfolder: str | None = None
    absolute: str | None = None  #: `given` as an absolute path, where it is a path
