"""Atomic writes of single files, and direct writes to pipes and devices."""

from __future__ import annotations

import errno
import filecmp
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from runtimes.errors import BundleError

STDOUT = Path("/dev/stdout")  #: standard output as a path to write to; it is never opened, so it need not exist

_PARTIAL = ".partial"
# Paths that name open files of this process. Opening such a path would overwrite the file from its first byte.
_OPEN_FILE = re.compile(r"/dev/(stdin|stdout|stderr)|(?:/dev|/proc/(?:self|thread-self|(\d+)))/fd/(\d+)")
_NUMBERS = {"stdin": 0, "stdout": 1, "stderr": 2}
_MAX_LINKS = 40  # symbolic links in one path; the limit of Linux


@contextmanager
def written_whole(path: str | Path, *, advice: str = "try again", unless_equal: bool = False) -> Iterator[Path]:
    """Yield a temporary path, and rename the file written there to `path` when the block succeeds.

    If the block raises, the temporary file is removed and `path` is unchanged. If `path` is a symbolic link, the link
    stays and its target is replaced. Pipes, terminals and character devices receive the bytes after the block.

    With `unless_equal`, a file that already holds the same bytes is left untouched, including its date.

    Raises `BundleError` for a directory, a socket, a block device, or a path that cannot be written; its `__cause__` is
    `BrokenPipeError` if the reader of a pipe has closed it. `advice` tells the user what to do after freeing space on a
    full disk.
    """
    path = Path(path)
    check_writable(path)
    try:
        with _through(path) if is_stream(path) else _beside(path, unless_equal) as temporary:
            yield temporary
    except OSError as error:
        full = f"; make room and {advice}" if error.errno == errno.ENOSPC else ""
        cause = error if isinstance(error, BrokenPipeError) else None
        raise _failed(path, f"{error.strerror or error}{full}") from cause


def check_writable(path: str | Path) -> None:
    """Raise `BundleError` for a path that `written_whole` could not write; call it before long work."""
    number = _open_file(path)
    try:
        if number is None:
            mode = Path(path).stat().st_mode
        else:
            if number == 1 and sys.stdout is None:  # another file may have taken descriptor 1
                raise _failed(path, "standard output is closed")
            mode = os.fstat(number).st_mode
    except FileNotFoundError:
        folder = Path(os.path.realpath(path)).parent
        if not folder.exists():
            raise _failed(path, f"No such file or directory: {folder}") from None
        if not os.access(folder, os.W_OK | os.X_OK):
            raise _failed(path, f"Permission denied: {folder}") from None
        return
    except (OSError, ValueError) as error:  # ValueError: a null byte
        raise _failed(path, getattr(error, "strerror", None) or str(error)) from None
    if stat.S_ISDIR(mode):
        raise _failed(path, "it is a directory; give the name of a file")
    if stat.S_ISBLK(mode):
        raise _failed(path, "it is a block device, whose content would be lost; give the name of a file")
    if stat.S_ISSOCK(mode) and number is None:
        raise _failed(path, "it is a socket; give the name of a file, or - for standard output")


def is_stream(path: str | Path) -> bool:
    """Return whether a path is written directly: an open file such as /dev/stdout, a FIFO, a character device."""
    if _open_file(path) is not None:
        return True
    try:
        mode = Path(path).stat().st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def is_stdout(path: str | Path) -> bool:
    """Return whether a path names standard output."""
    return _open_file(path) == 1


def leftovers(folder: Path, name: str = "*") -> list[Path]:
    """Return temporary files that killed writers of `name` (or of any file) left in this folder."""
    return list(folder.glob(f".{name}.????????{_PARTIAL}"))


def flush(path: Path) -> None:
    """Flush a file or directory to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _beside(path: Path, unless_equal: bool) -> Iterator[Path]:
    """Yield a temporary path beside a regular file, and replace that file in one step."""
    target = Path(os.path.realpath(path))
    # The random part separates processes that write the same file; the last one wins.
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}{_PARTIAL}")
    try:
        yield partial
        if unless_equal and target.exists() and filecmp.cmp(partial, target, shallow=False):
            return
        flush(partial)
        partial.replace(target)
    finally:
        with suppress(OSError):
            partial.unlink()
    with suppress(OSError):  # not every file system can flush a directory
        flush(target.parent)


@contextmanager
def _through(path: Path) -> Iterator[Path]:
    """Yield a path in a temporary directory, and copy its bytes to the stream: many formats need a seekable file."""
    with tempfile.TemporaryDirectory(prefix="vae-export-") as directory:
        made = Path(directory) / path.name
        yield made
        with made.open("rb") as source, _opened_stream(path) as stream:
            shutil.copyfileobj(source, stream)


def _opened_stream(path: Path) -> BinaryIO:
    number = _open_file(path)
    if number is None:
        return os.fdopen(os.open(path, os.O_WRONLY), "wb")
    if number == 1:
        sys.stdout.flush()  # earlier prints come first
    return os.fdopen(os.dup(number), "wb")


def _open_file(path: str | Path) -> int | None:
    """Return the descriptor that a path names, directly or by symbolic links: 1 for /dev/stdout; else None."""
    name = os.path.abspath(path)
    for _ in range(_MAX_LINKS):
        if (match := _OPEN_FILE.fullmatch(name)) and match[2] in (None, str(os.getpid())):
            return _NUMBERS[match[1]] if match[1] else int(match[3])
        try:
            name = os.path.abspath(os.path.join(os.path.dirname(name), os.readlink(name)))
        except (OSError, ValueError):
            return None
    return None


def _failed(path: str | Path, reason: str) -> BundleError:
    return BundleError(f"cannot write {path}: {reason}")


def what_it_is_instead(path: Path) -> str | None:
    """Return what a file of the wrong kind is, from its first bytes, and how to get the real file; None if unknown."""
    with path.open("rb") as file:
        start = file.read(512).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"version https://git-lfs.github.com/"):
        return "it is a Git LFS pointer: run `git lfs pull` in its repository"
    if start.lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "it is a web page: log in where that is needed, and download the file itself again"
    if start.startswith((b"{", b"[")):
        return (
            "it is JSON: give the weights file or its directory, or, if a server answered with an "
            "error, log in and download the file again"
        )
    return None
