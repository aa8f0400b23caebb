"""Write a bundle atomically.

All files go to a temporary directory beside the final one, which is flushed to disk and then renamed. An existing
bundle is exchanged for the new one in a single file-system operation: at every moment either the old or the new bundle
exists, even if the process is killed. The next export removes the leftovers of a killed one.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from runtimes.bundle import Bundle
from runtimes.errors import BundleError
from runtimes.files import flush
from runtimes.manifest import MANIFEST_FILE, FileEntry, Manifest

_PARTIAL, _ASIDE = ".partial-", ".previous-"  #: .NAME.partial-XXXXXXXX is an unfinished bundle NAME
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


class BundleWriter:
    """An unfinished bundle: put files into `directory`, call `write_manifest`, then `finish`."""

    def __init__(self, out: Path, directory: Path, overwrite: bool) -> None:
        self.out = out
        self.directory = directory
        self.overwrite = overwrite
        self.finished = False

    def entries(self) -> dict[str, FileEntry]:
        """Return {name relative to the bundle: size and sha256} of every file written so far, except the manifest."""
        files = sorted(path for path in self.directory.rglob("*") if path.is_file() and path.name != MANIFEST_FILE)
        return {path.relative_to(self.directory).as_posix(): _entry(path) for path in files}

    def write_manifest(self, manifest: Manifest) -> None:
        """Write the manifest."""
        (self.directory / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")

    def finish(self) -> Bundle:
        """Flush all files to disk, rename the directory to its final name, and return the bundle.

        Raises `BundleError` if the new bundle cannot be opened or its name has been taken in the meantime.
        """
        Bundle(self.directory)  # a bundle that cannot be opened must not replace another
        for path in (*self.directory.rglob("*"), self.directory):
            flush(path)
        _check_free(self.out, self.overwrite)  # again: another export may have finished in the meantime
        if self.overwrite and self.out.exists():
            _exchange(self.directory, self.out)
            shutil.rmtree(self.directory, ignore_errors=True)  # holds the old bundle now
        else:
            self.directory.rename(self.out)  # refused by the system where anything but an empty directory is
        flush(self.out.parent)
        self.finished = True
        return Bundle(self.out)


@contextmanager
def write_bundle(out: str | Path, *, overwrite: bool = False) -> Iterator[BundleWriter]:
    """Return a context with a `BundleWriter` for the directory `out`. Unless `finish` is called, all files are removed.

    Raises `BundleError` if `out` is a bundle and `overwrite` is false, if `out` is anything else than a bundle or an
    empty directory, if its parent is not writable, or if the disk is full.
    """
    out = Path(os.path.abspath(out))
    _restore(out)
    _check_free(out, overwrite)
    try:
        new_parents = [folder for folder in out.parents if not folder.exists()]
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out)
        directory, lock = _make_locked_directory(out)
    except OSError as error:
        raise BundleError(f"cannot write to {out.parent}: {error.strerror}; choose another place with --out") from None
    writer = BundleWriter(out, directory, overwrite)
    try:
        yield writer
    except OSError as error:
        if error.filename is not None and not str(error.filename).startswith(str(out.parent)):
            raise
        raise BundleError(f"writing {out} failed: {error.strerror or error}; nothing was left behind") from None
    finally:
        if not writer.finished:
            shutil.rmtree(directory, ignore_errors=True)
            with suppress(OSError):  # not empty: another process uses it by now
                for folder in new_parents:
                    folder.rmdir()
        os.close(lock)


def check_output(out: str | Path, overwrite: bool) -> None:
    """Raise `BundleError` for an `out` that `write_bundle` would reject: a check before a long export."""
    path = Path(os.path.abspath(out))
    if path == Path.cwd():
        raise BundleError(f"{path} is the current directory, which the bundle would replace; choose another --out")
    _check_free(path, overwrite)
    parent = next(folder for folder in path.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise BundleError(f"cannot write to {parent}; choose another place with --out")


def _check_free(out: Path, overwrite: bool) -> None:
    if not os.path.lexists(out):
        return
    if not out.is_dir() or out.is_symlink():
        raise BundleError(f"{out} exists and is not a directory; choose another --out")
    try:
        empty = not any(out.iterdir())
    except OSError as error:
        raise BundleError(f"{out} exists and cannot be read: {error.strerror}; choose another --out") from None
    if empty:
        return
    if not _is_bundle(out):
        raise BundleError(f"{out} exists and is not a bundle; it stays as it is, choose another --out")
    if not overwrite:
        raise BundleError(f"{out} exists; give --overwrite to replace it, or another --out")


def _is_bundle(directory: Path) -> bool:
    """Return whether vae-export wrote this directory, damaged or not.

    Directories of other programs with a manifest.json must not be replaced.
    """
    try:
        manifest = json.loads((directory / MANIFEST_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and manifest.keys() >= {"schema_version", "graphs", "files"}


def _make_locked_directory(out: Path) -> tuple[Path, int]:
    """Return a new directory beside `out`, and the file descriptor of its lock, which marks this export as running."""
    while True:
        directory = Path(tempfile.mkdtemp(prefix=f".{out.name}{_PARTIAL}", dir=out.parent))
        # Until the directory is locked, another export may remove it as a leftover; then try again.
        with suppress(FileNotFoundError):
            directory.chmod(0o755)  # mkdtemp's 0o700 would stay with the bundle
            lock = os.open(directory, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if directory.exists():
                return directory, lock
            os.close(lock)


def _remove_leftovers(out: Path) -> None:
    """Remove the directories that killed exports of the same bundle left: those that no process holds locked."""
    for path in _siblings(out, _PARTIAL):
        with _unused(path) as free:
            if free:
                shutil.rmtree(path, ignore_errors=True)


def _restore(out: Path) -> None:
    """Rename a bundle back that `_exchange` had moved aside when its process was killed."""
    for aside in _siblings(out, _ASIDE):
        with _unused(aside) as free, suppress(OSError):
            if free and _is_bundle(aside):
                if _is_bundle(out):  # the new bundle had already taken its place
                    shutil.rmtree(aside, ignore_errors=True)
                else:
                    aside.rename(out)  # refused by the system where anything but an empty directory is


def _siblings(out: Path, kind: str) -> list[Path]:
    """Return the directories that `_make_locked_directory` and `_exchange` name after this bundle."""
    pattern = re.compile(rf"\.{re.escape(out.name)}{re.escape(kind)}[a-z0-9_]{{8}}")
    try:
        return [path for path in out.parent.iterdir() if pattern.fullmatch(path.name)]
    except OSError:
        return []


@contextmanager
def _unused(directory: Path) -> Iterator[bool]:
    """Return a context with whether no running export holds this directory; none can take it inside the context."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # a running export holds it, or this file system has no locks
        yield False
    else:
        yield True
    finally:
        os.close(descriptor)


def _exchange(new: Path, old: Path) -> None:
    """Swap two directories, with one renameat2 on Linux and three renames elsewhere. The old one is never deleted."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    paths = (_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old))
    if renameat2 is not None and renameat2(*paths, _RENAME_EXCHANGE) == 0:
        return
    # If this process is killed from here on, the next export restores the old bundle. The lock marks it as running.
    aside = new.with_name(_ASIDE.join(new.name.rsplit(_PARTIAL, 1)))
    lock = os.open(old, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        old.rename(aside)
        try:
            new.rename(old)
        except BaseException:
            if not old.exists():
                aside.rename(old)
            raise
        aside.rename(new)
    finally:
        os.close(lock)


def _entry(path: Path) -> FileEntry:
    with path.open("rb") as file:
        return FileEntry(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
