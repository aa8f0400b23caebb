"""Safe reading of a bundle's files, which are not trusted. Standard library only.

A bundle may come from anyone. Three checks precede every native parser: the manifest is validated
(`runtimes.manifest`); each path is opened without following a link out of the bundle (or out of a directory that the
user named); and the bytes that the parser receives are hashed in memory, because the file could change between hashing
and parsing.
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
import stat
import weakref
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from runtimes.errors import BundleError, IntegrityError
from runtimes.manifest import MANIFEST_FILE, FileEntry, Manifest

MANIFEST_LIMIT = 4 << 20  #: bytes; a manifest with long validation tables has about 50 KB
SMALL_FILE = 1 << 20  #: bytes; configs have about 2 KB, and hashing 1 MiB takes about a millisecond
LARGE_FILE = 256 << 20  #: bytes; fp32 graphs of Stable Diffusion's size have up to 200 MB

_POSIX = os.open in os.supports_dir_fd and hasattr(os, "O_NOFOLLOW")  #: Windows has neither
_HUB_REPOSITORY = re.compile(r"(models|datasets|spaces)--")


class Bundle:
    """An opened bundle directory with a checked manifest; `read` returns a file's bytes after checking them.

    Symbolic links are refused, unless `allow_links` names a directory that contains their targets, for example a
    Kubernetes volume. For a snapshot in the cache of the Hugging Face Hub, whose files are links to blobs,
    `allow_links` defaults to the repository's directory in that cache.

    Raises `BundleError` if the path holds no bundle, `IntegrityError` if the manifest or a file is malformed or
    changed, `CompatibilityError` if the manifest has another schema.
    """

    def __init__(self, path: str | Path, *, allow_links: str | Path | None = None) -> None:
        self.path = Path(path)
        self.directory = Path(os.path.abspath(path))  #: absolute, so it stays valid when the working directory changes
        if not self.path.is_dir():
            raise BundleError(f"{path} is not a directory" if self.path.exists() else f"{path} does not exist")
        if allow_links is not None and not Path(allow_links).is_dir():
            raise BundleError(f"allow_links names {allow_links}, which is not a directory")
        given = allow_links or _hub_repository(self.directory)
        self.allow_links = None if given is None else Path(os.path.abspath(given))
        self.manifest = Manifest.from_json(self._read_manifest())

    def _read_manifest(self) -> bytes:
        for _ in range(3):  # an export may replace the directory between opening it and opening its file
            with suppress(FileNotFoundError):
                descriptor = self._open(MANIFEST_FILE)
                try:
                    return _read_open_file(descriptor, MANIFEST_FILE, limit=MANIFEST_LIMIT)
                finally:
                    os.close(descriptor)
        raise BundleError(f"{self.path} has no {MANIFEST_FILE}: not a bundle of vae-export")

    def _open(self, name: str) -> int:
        """Return a descriptor of a regular file of the bundle. Raises `FileNotFoundError` if it does not exist."""
        if self.allow_links is None:
            return _open_regular_file(self.directory, name)
        # Resolve the links first, then open the resolved path without following any link.
        root, target = (os.path.realpath(path) for path in (self.allow_links, self.directory / name))
        if not Path(target).is_relative_to(root):
            raise IntegrityError(f"{name} is a link to {target}, outside of {root}, the directory where links may lead")
        return _open_regular_file(Path(root), os.path.relpath(target, root))

    def read(self, name: str) -> bytes:
        """Return the checked bytes of a file that the manifest lists. Parse these bytes, not the file."""
        with self.hold(name) as file:
            return file.read()

    def hold(self, name: str) -> HeldFile:
        """Open a file that the manifest lists, to be read once or several times."""
        entry = self.manifest.files.get(name)
        if entry is None:
            raise IntegrityError(f"{name} is not listed in the manifest of {self.path}")
        try:
            return HeldFile(self._open(name), name, entry)
        except FileNotFoundError:
            raise IntegrityError(f"{name} is missing from {self.path}") from None

    def seen_as(self, **changes: Any) -> Bundle:
        """Return a bundle of the same files whose manifest has other values in the fields `changes`."""
        other = copy.copy(self)
        other.manifest = replace(self.manifest, **changes)
        return other

    def check_small_files(self) -> None:
        """Check the hash of each listed file of at most SMALL_FILE bytes: configs, which graph parsers never read."""
        for name, entry in self.manifest.files.items():
            if entry.size <= SMALL_FILE:
                self.read(name)

    def verify(self) -> None:
        """Check the hash of every listed file."""
        for name in self.manifest.files:
            self.read(name)


def _hub_repository(directory: Path) -> Path | None:
    """Return REPOSITORY for a directory inside REPOSITORY/snapshots/COMMIT of a Hub cache, else None.

    The files of a snapshot are links to REPOSITORY/blobs.
    """
    real = Path(os.path.realpath(directory))
    for folder in (real, *real.parents):
        repository = folder.parent.parent
        if folder.parent.name == "snapshots" and _HUB_REPOSITORY.match(repository.name):
            return repository if (repository / "blobs").is_dir() else None
    return None


# Files ------------------------------------------------------------------------------------------------------------


class HeldFile:
    """An open file of a bundle. Each `read` checks the bytes. The file stays readable if the bundle is replaced."""

    def __init__(self, descriptor: int, name: str, entry: FileEntry) -> None:
        self._descriptor, self._name, self._entry = descriptor, name, entry
        self._finish = weakref.finalize(self, os.close, descriptor)

    def read(self) -> bytes:
        """Return the file's bytes; raises `IntegrityError` if they differ from the manifest. Not thread-safe."""
        return _read_open_file(self._descriptor, self._name, limit=self._entry.size, entry=self._entry)

    def close(self) -> None:
        self._finish()

    def __enter__(self) -> HeldFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open_regular_file(root: Path, name: str) -> int:
    """Return a descriptor of `root/name`, without following any link below `root`."""
    descriptor = _open_from(root, name) if _POSIX else _open_by_path(root, name)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        problem = "is not a regular file"
    elif status.st_nlink > 1:  # 0 if an export has just replaced the bundle: the open file stays readable
        problem = "is a hard link: a bundle's files belong to it alone; copy it with cp -r"
    else:
        return descriptor
    os.close(descriptor)
    raise IntegrityError(f"{name} {problem}")


def _open_from(root: Path, name: str) -> int:
    """Open a file folder by folder: no name is looked up twice, so nothing can be exchanged in between."""
    *folders, last = name.split("/")
    directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for folder in folders:
            inner = _open_inside(directory, folder, os.O_RDONLY | os.O_DIRECTORY, name)
            os.close(directory)
            directory = inner
        # Non-blocking: opening a FIFO must not wait for a writer.
        return _open_inside(directory, last, os.O_RDONLY | os.O_NONBLOCK, name)
    finally:
        os.close(directory)


def _open_by_path(root: Path, name: str) -> int:
    """Open a file where the system cannot open relative to a folder, as on Windows.

    Links are refused, but one that is put there between the check and the opening would be followed.
    """
    path = root
    for part in name.split("/"):
        path = path / part
        if path.is_symlink():
            raise IntegrityError(f"{name} cannot be opened as a plain file of the bundle: {part} is a symbolic link")
    if path.exists() and not path.is_file():
        raise IntegrityError(f"{name} is not a regular file")
    return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))


def _read_open_file(descriptor: int, name: str, *, limit: int, entry: FileEntry | None = None) -> bytes:
    """Return all bytes of an open file; raises `IntegrityError` beyond `limit` bytes or if they differ from `entry`.

    A file above LARGE_FILE bytes is hashed before it is read, so that a file that differs from the manifest takes no
    memory.
    """
    size = os.fstat(descriptor).st_size
    if size > limit or (entry is not None and size != entry.size):
        rule = "more than the limit of" if entry is None else "and the manifest says"
        raise IntegrityError(f"{name} has {size} bytes, {rule} {limit}")
    with os.fdopen(descriptor, "rb", closefd=False) as file:
        file.seek(0)
        if entry is not None and entry.size > LARGE_FILE:
            _check_digest(name, hashlib.file_digest(file, "sha256").hexdigest(), entry)
            file.seek(0)
        data = file.read(size)
        if len(data) != size or file.read(1):
            raise IntegrityError(f"{name} changed while it was read")
    if entry is not None:
        _check_digest(name, hashlib.sha256(data).hexdigest(), entry)
    return data


def _check_digest(name: str, found: str, entry: FileEntry) -> None:
    if found != entry.sha256:
        raise IntegrityError(f"{name} was changed: sha256 is {found}, and the manifest says {entry.sha256}")


def _open_inside(directory: int, part: str, flags: int, name: str) -> int:
    try:
        return os.open(part, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        raise
    except OSError as error:
        # ELOOP or ENOTDIR: a link, or a file where a directory belongs.
        raise IntegrityError(
            f"{name} cannot be opened as a plain file of the bundle: {_link_advice(directory, part) or error.strerror}"
        ) from None


def _link_advice(directory: int, part: str) -> str | None:
    """Return advice if `part` is a symbolic link, else None."""
    try:
        if not stat.S_ISLNK(os.stat(part, dir_fd=directory, follow_symlinks=False).st_mode):
            return None
    except OSError:
        return None
    return (
        f"{part} is a symbolic link. If you trust where it leads, as on a Kubernetes volume, allow links inside of a "
        "directory with open_vae(..., allow_links=DIRECTORY), or copy the bundle with cp -rL"
    )
