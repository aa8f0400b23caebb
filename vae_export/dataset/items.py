"""Items: the images of a source, and the contract of every source."""

from __future__ import annotations

import os
import stat
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from runtimes.errors import ConfigError


class Item(NamedTuple):
    """An image of a source: its id and the location of its bytes."""

    id: str
    file: bytes  #: path of the image, tar or table, encoded by `os.fsencode`
    at: int  #: offset in a tar, row in a table, 0 in a folder
    size: int  #: number of bytes in a tar; -1 in other sources, which do not need it


class Skipped(NamedTuple):
    """An entry that is not an image: `path` is relative to the root, or "*.txt" for all files of that suffix."""

    path: str
    reason: str


Skip = Callable[[Skipped], object]  #: called for each entry that a listing skips

HIDDEN = "hidden: its name begins with a dot"
NO_FILE = "a FIFO, socket or device, not a regular file"
OTHER_SUFFIX = "not the suffix of an image"
SAME_FOLDER = "a folder that is read under another path"


def ignore_skipped(skipped: Skipped) -> None:
    """Ignore a skipped entry: the default of `Source.items`."""


@dataclass(frozen=True)
class Source(ABC):
    """A source of images.

    Ids are relative to `root`. `files` are the tars or tables to read, and `skipped` the other entries beside them.
    """

    root: Path
    files: tuple[Path, ...] = ()
    skipped: tuple[Skipped, ...] = ()

    @abstractmethod
    def items(self, skip: Skip = ignore_skipped) -> Iterator[Item]:
        """Yield all images without reading them, and pass each skipped entry to `skip`.

        Raises `ConfigError` if a file of the source is not of the expected format.
        """

    @abstractmethod
    def read(self, item: Item) -> bytes:
        """Return the bytes of an image. Any exception means that this one image cannot be read."""

    def _relative_name(self, file: Path) -> str:
        """Return the path relative to the root, as valid Unicode."""
        return as_text(file.relative_to(self.root).as_posix())


def as_text(name: str) -> str:
    r"""Return a file-system name as valid Unicode: bytes that are not UTF-8 become \xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def read_file(path: str | bytes) -> bytes:
    """Return the bytes of a regular file. Raises `OSError` for anything else, without blocking on a FIFO."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(NO_FILE)
        return file.read()


class as_config_error:
    """Turn errors while listing a source into a `ConfigError` that names the file."""

    def __init__(self, file: Path, what: str) -> None:
        self.file, self.what = file, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, (OSError, tarfile.TarError, EOFError, KeyError)) or type(error).__module__.startswith(
            "pyarrow"
        ):
            message = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise ConfigError(f"{self.file} cannot be read as {self.what}: {message}") from None
