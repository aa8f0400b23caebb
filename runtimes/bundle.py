"""A bundle on disk: reading its files without trusting them. Standard library only.

A bundle may come from anyone. Before a native parser sees a byte of it, the manifest has been checked
(`runtimes.manifest`), every path has been opened without following a link out of the bundle (or out of a directory
that the user named), and the bytes that will be parsed have been hashed: those very bytes, not the file, which could
change in between.
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

MANIFEST_LIMIT = 4 << 20  #: bytes; a manifest with long validation tables has some 50 KB
SMALL_FILE = 1 << 20  #: bytes; configs have some 2 KB, and hashing so much takes about a millisecond
LARGE_FILE = 256 << 20  #: bytes; the graphs of Stable Diffusion's size in fp32 have up to 200 MB

_POSIX = os.open in os.supports_dir_fd and hasattr(os, "O_NOFOLLOW")  #: Windows has neither
_HUB_REPOSITORY = re.compile(r"(models|datasets|spaces)--")


class Bundle:
    """A bundle directory, opened and its manifest checked; `read` gives a file's bytes after checking them.

    Files that are links are refused, unless `allow_links` names a directory inside which links may lead: that of a
    Kubernetes volume, for example. For a snapshot in a cache of the Hugging Face Hub, whose files are links to its
    blobs, it is the repository's directory in that cache unless another is given.

    Raises `BundleError` where there is no bundle, `IntegrityError` where it is not what it says, `CompatibilityError`
    for a manifest of another schema.
    """

    def __init__(self, path: str | Path, *, allow_links: str | Path | None = None) -> None:
        self.path = Path(path)
        self.directory = Path(os.path.abspath(path))  #: the same, also after the working directory has changed
        if not self.path.is_dir():
            raise BundleError(f"{path} is not a directory" if self.path.exists() else f"{path} does not exist")
        if allow_links is not None and not Path(allow_links).is_dir():
            raise BundleError(f"allow_links names {allow_links}, which is not a directory")
        given = allow_links or _hub_repository(self.directory)
        self.allow_links = None if given is None else Path(os.path.abspath(given))
        self.manifest = Manifest.from_json(self._read_manifest())

    def _read_manifest(self) -> bytes:
        for _ in range(3):  # an export may replace the directory between opening it and its file
            with suppress(FileNotFoundError):
                descriptor = self._open(MANIFEST_FILE)
                try:
                    return _read_open_file(descriptor, MANIFEST_FILE, limit=MANIFEST_LIMIT)
                finally:
                    os.close(descriptor)
        raise BundleError(f"{self.path} has no {MANIFEST_FILE}: not a bundle of vae-export")

    def _open(self, name: str) -> int:
        """A descriptor of a regular file of the bundle. `FileNotFoundError` where there is none."""
        if self.allow_links is None:
            return _open_regular_file(self.directory, name)
        # Where the links lead is found first; that path is then opened without following any link.
        root, target = (os.path.realpath(path) for path in (self.allow_links, self.directory / name))
        if not Path(target).is_relative_to(root):
            raise IntegrityError(f"{name} is a link to {target}, outside of {root}, the directory where links may lead")
        return _open_regular_file(Path(root), os.path.relpath(target, root))

    def read(self, name: str) -> bytes:
        """The bytes of a file that the manifest lists, checked: parse these, not the file."""
        with self.hold(name) as file:
            return file.read()

    def hold(self, name: str) -> HeldFile:
        """A file that the manifest lists, opened, for what is to be read again later."""
        entry = self.manifest.files.get(name)
        if entry is None:
            raise IntegrityError(f"{name} is not listed in the manifest of {self.path}")
        try:
            return HeldFile(self._open(name), name, entry)
        except FileNotFoundError:
            raise IntegrityError(f"{name} is missing from {self.path}") from None

    def seen_as(self, **changes: Any) -> Bundle:
        """The same files, as another manifest describes them: `changes` are fields of the manifest."""
        other = copy.copy(self)
        other.manifest = replace(self.manifest, **changes)
        return other

    def check_small_files(self) -> None:
        """Check the listed files of at most SMALL_FILE bytes: configs, which no graph's parser would read."""
        for name, entry in self.manifest.files.items():
            if entry.size <= SMALL_FILE:
                self.read(name)

    def verify(self) -> None:
        """Check every listed file."""
        for name in self.manifest.files:
            self.read(name)


def _hub_repository(directory: Path) -> Path | None:
    """REPOSITORY for a directory in REPOSITORY/snapshots/COMMIT of a Hub cache, whose files are links to its blobs."""
    real = Path(os.path.realpath(directory))
    for folder in (real, *real.parents):
        repository = folder.parent.parent
        if folder.parent.name == "snapshots" and _HUB_REPOSITORY.match(repository.name):
            return repository if (repository / "blobs").is_dir() else None
    return None


# Files ------------------------------------------------------------------------------------------------------------


class HeldFile:
    """A file of a bundle, open: each `read` gives its bytes, checked. It stays whole where the bundle is replaced."""

    def __init__(self, descriptor: int, name: str, entry: FileEntry) -> None:
        self._descriptor, self._name, self._entry = descriptor, name, entry
        self._finish = weakref.finalize(self, os.close, descriptor)

    def read(self) -> bytes:
        """`IntegrityError` where they are not those that the manifest lists. For one thread at a time."""
        return _read_open_file(self._descriptor, self._name, limit=self._entry.size, entry=self._entry)

    def close(self) -> None:
        self._finish()

    def __enter__(self) -> HeldFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open_regular_file(root: Path, name: str) -> int:
    """A descriptor of `root/name`, following no link below `root`."""
    descriptor = _open_from(root, name) if _POSIX else _open_by_path(root, name)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        problem = "is not a regular file"
    elif status.st_nlink > 1:  # 0 where an export has just replaced the bundle: the open file stays whole
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
    """All of an open file, from its start: at most `limit` bytes, and those of `entry` where it is given.

    A large file is hashed once more before it is read: one that is not what the manifest says takes no memory.
    """
    size = os.fstat(descriptor).st_size
    if size > limit or (entry is not None and size != entry.size):
        rule = "and the most is" if entry is None else "and the manifest says"
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
    """What to do about a link; None for what is not one."""
    try:
        if not stat.S_ISLNK(os.stat(part, dir_fd=directory, follow_symlinks=False).st_mode):
            return None
    except OSError:
        return None
    return (
        f"{part} is a symbolic link. If you trust where it leads, as on a Kubernetes volume, allow links inside of a "
        "directory with open_vae(..., allow_links=DIRECTORY), or copy the bundle with cp -rL"
    )
