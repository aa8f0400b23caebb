"""Writing a single file whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from runtimes.errors import BundleError


def partial_name(path: Path) -> Path:
    """Where a file is written before it takes the name `path`."""
    return path.with_name(f".{path.name}.partial{path.suffix}")


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A path beside `path`, of the same suffix, to write to: it takes the name when the block ends well.

    Otherwise nothing stays behind, and what was at `path` before is still there. Raises `BundleError` for a path that
    is a directory or cannot be written.
    """
    path = Path(path)
    if not path.name or path.is_dir():
        raise BundleError(f"cannot write {path}: it is a directory; give the name of a file")
    partial = partial_name(path)
    try:
        yield partial
        os.replace(partial, path)
    except (OSError, ValueError) as error:
        raise BundleError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None
    finally:
        with suppress(OSError):
            partial.unlink()
