"""Writing a single file whole or not at all, and writing through to what is no regular file: pipes and devices."""

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
# Names of files that are open in this process. Opening such a name would begin the file anew, at its first byte.
_OPEN_FILE = re.compile(r"/dev/(stdin|stdout|stderr)|(?:/dev|/proc/(?:self|thread-self|(\d+)))/fd/(\d+)")
_NUMBERS = {"stdin": 0, "stdout": 1, "stderr": 2}
_MOST_LINKS = 40  # as Linux


@contextmanager
def written_whole(path: str | Path, *, advice: str = "try again", unless_equal: bool = False) -> Iterator[Path]:
    """A temporary path to write to; what was written there takes the name `path` when the block ends well.

    Otherwise nothing stays behind, and what was at `path` before is still there. A symbolic link stays, and the file
    that it leads to is replaced. Pipes, terminals and character devices get the bytes when the block has ended.

    With `unless_equal`, a file that holds the same bytes already stays as it is, with its date.

    Raises `BundleError` for a directory, a socket, a block device, and what cannot be written. `advice` is
    what to do after making room on a full disk.
    """
    path = Path(path)
    check_writable(path)
    try:
        with _through(path) if is_stream(path) else _beside(path, unless_equal) as temporary:
            yield temporary
    except OSError as error:
        full = f"; make room and {advice}" if error.errno == errno.ENOSPC else ""
        raise _failed(path, f"{error.strerror or error}{full}") from None


def check_writable(path: str | Path) -> None:
    """Raise `BundleError` at once for a path where `written_whole` would refuse at the end of long work."""
    number = _open_file(path)
    try:
        if number is None:
            mode = os.stat(path).st_mode
        else:
            if number == 1 and sys.stdout is None:  # its number may have gone to another file
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
    """Whether a path is written through to: an open file such as /dev/stdout, a FIFO, a character device."""
    if _open_file(path) is not None:
        return True
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def is_stdout(path: str | Path) -> bool:
    """Whether what is written to a path goes to standard output."""
    return _open_file(path) == 1


def leftovers(folder: Path, name: str = "*") -> list[Path]:
    """What writers of the file `name` in this folder, or of all files there, left when they were killed."""
    return list(folder.glob(f".{name}.????????{_PARTIAL}"))


def flush(path: Path) -> None:
    """Have the system write a file or directory to its disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _beside(path: Path, unless_equal: bool) -> Iterator[Path]:
    """A new path in the directory of a regular file, which it replaces in one step."""
    target = Path(os.path.realpath(path))
    # The random part keeps two processes apart that write the same file: the later one wins.
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}{_PARTIAL}")
    try:
        yield partial
        if unless_equal and target.exists() and filecmp.cmp(partial, target, shallow=False):
            return
        flush(partial)
        os.replace(partial, target)
    finally:
        with suppress(OSError):
            partial.unlink()
    with suppress(OSError):  # not every file system can flush a directory
        flush(target.parent)


@contextmanager
def _through(path: Path) -> Iterator[Path]:
    """A new path in a temporary directory, whose bytes are sent on: many formats need a file that can be sought in."""
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
        sys.stdout.flush()  # what was printed so far comes first
    return os.fdopen(os.dup(number), "wb")


def _open_file(path: str | Path) -> int | None:
    """The number of the open file that a path, or the symbolic links there, name: 1 of /dev/stdout."""
    name = os.path.abspath(path)
    for _ in range(_MOST_LINKS):
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
    """What a file of the wrong kind is, by its first bytes, and how to get the real one; None if unknown."""
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
