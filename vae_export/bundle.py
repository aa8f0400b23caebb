"""Writing a bundle: whole or not at all.

Everything goes to a temporary directory beside the final one, is flushed to disk, and takes the final name last. An
existing bundle is exchanged for the new one in a single step of the file system: at every moment there is either the
old one or the new one, also if the process is killed. What a killed export left behind is removed by the next.
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

_PARTIAL, _ASIDE = ".partial-", ".previous-"  #: .NAME.partial-XXXXXXXX, a bundle NAME in the making
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


class BundleWriter:
    """A bundle in the making: put files into `directory`, then `finish` with the manifest."""

    def __init__(self, out: Path, directory: Path, overwrite: bool) -> None:
        self.out = out
        self.directory = directory
        self.overwrite = overwrite
        self.finished = False

    def entries(self) -> dict[str, FileEntry]:
        """Size and sha256 of every file written so far, by name relative to the bundle."""
        files = sorted(path for path in self.directory.rglob("*") if path.is_file() and path.name != MANIFEST_FILE)
        return {path.relative_to(self.directory).as_posix(): _entry(path) for path in files}

    def write_manifest(self, manifest: Manifest) -> None:
        (self.directory / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")

    def finish(self) -> Bundle:
        """Flush everything to disk and give the bundle its name."""
        Bundle(self.directory)  # what cannot be opened must not replace what can
        for path in (*self.directory.rglob("*"), self.directory):
            flush(path)
        _check_free(self.out, self.overwrite)  # again: exporting takes long, and another export may have been faster
        if self.overwrite and self.out.exists():
            _exchange(self.directory, self.out)
            shutil.rmtree(self.directory, ignore_errors=True)  # now the old bundle
        else:
            os.rename(self.directory, self.out)  # refused by the system where anything but an empty directory is
        flush(self.out.parent)
        self.finished = True
        return Bundle(self.out)


@contextmanager
def write_bundle(out: str | Path, *, overwrite: bool = False) -> Iterator[BundleWriter]:
    """A `BundleWriter` for the directory `out`; unless `finish` is called, nothing stays behind.

    Raises `BundleError` where `out` exists (and `overwrite` is not given, or it is no bundle), its parent is not
    writable, or the disk is full.
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
            with suppress(OSError):  # not empty: someone else uses it by now
                for folder in new_parents:
                    folder.rmdir()
        os.close(lock)


def check_output(out: str | Path, overwrite: bool) -> None:
    """Raise `BundleError` at once for a place where `write_bundle` would refuse at the end of a long export."""
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
        names = os.listdir(out)
    except OSError as error:
        raise BundleError(f"{out} exists and cannot be read: {error.strerror}; choose another --out") from None
    if not names:
        return
    if not _is_bundle(out):
        raise BundleError(f"{out} exists and is not a bundle; it stays as it is, choose another --out")
    if not overwrite:
        raise BundleError(f"{out} exists; give --overwrite to replace it, or another --out")


def _is_bundle(directory: Path) -> bool:
    """Whether this was written here, sound or not: other programs have a manifest.json too, and are not to be lost."""
    try:
        manifest = json.loads((directory / MANIFEST_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and manifest.keys() >= {"schema_version", "graphs", "files"}


def _make_locked_directory(out: Path) -> tuple[Path, int]:
    """A new directory beside `out`, and the open lock on it that tells other exports that this one is alive."""
    while True:
        directory = Path(tempfile.mkdtemp(prefix=f".{out.name}{_PARTIAL}", dir=out.parent))
        # Until it is locked, another export may take it for a leftover and remove it: then once more.
        with suppress(FileNotFoundError):
            directory.chmod(0o755)  # mkdtemp's 0o700 would stay with the bundle
            lock = os.open(directory, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if directory.exists():
                return directory, lock
            os.close(lock)


def _remove_leftovers(out: Path) -> None:
    """Remove what killed exports of the same bundle left: directories that no living process holds locked."""
    for path in _named(out, _PARTIAL):
        with _unless_at_work(path) as free:
            if free:
                shutil.rmtree(path, ignore_errors=True)


def _restore(out: Path) -> None:
    """Give a bundle its name back that an export had just moved aside when it was killed: see `_exchange`."""
    for aside in _named(out, _ASIDE):
        with _unless_at_work(aside) as free, suppress(OSError):
            if free and _is_bundle(aside):
                if _is_bundle(out):  # the new one had taken its place
                    shutil.rmtree(aside, ignore_errors=True)
                else:
                    os.rename(aside, out)  # refused by the system where anything but an empty directory is


def _named(out: Path, kind: str) -> list[Path]:
    """What `_make_locked_directory` named for this bundle, or `_exchange` after it, and nothing that is alike."""
    pattern = re.compile(rf"\.{re.escape(out.name)}{re.escape(kind)}[a-z0-9_]{{8}}")
    try:
        return [path for path in out.parent.iterdir() if pattern.fullmatch(path.name)]
    except OSError:
        return []


@contextmanager
def _unless_at_work(directory: Path) -> Iterator[bool]:
    """Whether no living export holds this directory; while it is asked, none can."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # one is, or this file system has no locks
        yield False
    else:
        yield True
    finally:
        os.close(descriptor)


def _exchange(new: Path, old: Path) -> None:
    """Swap two directories in one step (Linux's renameat2); elsewhere in three, the old one never being removed."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    paths = (_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old))
    if renameat2 is not None and renameat2(*paths, _RENAME_EXCHANGE) == 0:
        return
    # Should this be killed now, the next export restores it; while this lives, its lock says so.
    aside = new.with_name(_ASIDE.join(new.name.rsplit(_PARTIAL, 1)))
    lock = os.open(old, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.rename(old, aside)
        try:
            os.rename(new, old)
        except BaseException:
            if not old.exists():
                os.rename(aside, old)
            raise
        os.rename(aside, new)
    finally:
        os.close(lock)


def _entry(path: Path) -> FileEntry:
    with path.open("rb") as file:
        return FileEntry(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
