"""Sources of the images of a dataset: a folder tree, WebDataset tars, parquet files, or a `datasets` directory.

A source lists its images without reading them, and reads the bytes of any image in any process. It is small enough to
be pickled and sent to worker processes.

These rules decide which entries of folders and tars are images. Everything else is reported to the caller, with the
reason:

- A file is an image if it has the suffix of an image format. Other files are counted by suffix.
- Hidden files, and files in hidden folders, are skipped: their names begin with a dot. macOS writes such files beside
  images.
- FIFOs, sockets and devices are skipped: reading one could block for ever.
- A symbolic link to a file is an image under the name of the link, even if other paths lead to the same file. A broken
  link with the suffix of an image is an image that cannot be read, and is listed as an error.
- A symbolic link to a folder is followed, but each folder is read only once: under its own path if that is below the
  root, otherwise under the first link to it in the order of paths. Loops of links therefore end.
- In a tar, links (their targets are members themselves) and sparse files are skipped.
"""

from __future__ import annotations

import functools
import glob
import json
import os
import stat
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from runtimes.errors import ConfigError
from runtimes.latents.dataset import import_pyarrow

FORMATS = ("folder", "webdataset", "parquet", "datasets")
COLUMN_NAMES = (
    "image",
    "img",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "bytes",
    "image_bytes",
)  #: names that decide between several columns of bytes
MAX_OPEN_FILES = 4  #: maximum number of files of each table format that a process keeps open


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


def _ignore(skipped: Skipped) -> None:
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
    def items(self, skip: Skip = _ignore) -> Iterator[Item]:
        """Yield all images without reading them, and pass each skipped entry to `skip`.

        Raises `ConfigError` if a file of the source is not of the expected format.
        """

    @abstractmethod
    def read(self, item: Item) -> bytes:
        """Return the bytes of an image. Any exception means that this one image cannot be read."""

    def _relative_name(self, file: Path) -> str:
        """Return the path relative to the root, as valid Unicode."""
        return _as_text(file.relative_to(self.root).as_posix())


class Folder(Source):
    """Image files at any depth of a folder. The id is the path relative to the root, including the suffix."""

    def items(self, skip: Skip = _ignore) -> Iterator[Item]:
        folders: list[Path] = [self.root]
        links: list[Path] = []
        read: set[tuple[int, int]] = set()  # device and inode
        while folders or links:
            if folders:
                folder = folders.pop()
            else:  # everything that is reachable without this link has been read
                links.sort(reverse=True)
                folder = links.pop()
            with _as_config_error(folder, "a folder"):
                status = os.stat(folder)
                if (status.st_dev, status.st_ino) in read:
                    skip(Skipped(self._relative_name(folder), SAME_FOLDER))
                    continue
                read.add((status.st_dev, status.st_ino))
                with os.scandir(folder) as entries:
                    for entry in entries:
                        path = Path(entry.path)
                        kind = _kind(entry)
                        if entry.name.startswith(".") and (kind != "file" or _is_image(entry.name)):
                            skip(Skipped(self._relative_name(path), HIDDEN))
                        elif kind == "folder":
                            (links if entry.is_symlink() else folders).append(path)
                        elif kind == "other":
                            skip(Skipped(self._relative_name(path), NO_FILE))
                        elif _is_image(entry.name):
                            yield Item(self._relative_name(path), os.fsencode(path), 0, -1)
                        elif kind == "broken link":
                            skip(Skipped(self._relative_name(path), "a broken link"))
                        else:
                            skip(_other_suffix(entry.name))

    def read(self, item: Item) -> bytes:
        return _read_file(item.file)


class Tars(Source):
    """Uncompressed tars in the WebDataset layout. The id joins the names of tar and member: shard-00/000.jpg."""

    def items(self, skip: Skip = _ignore) -> Iterator[Item]:
        for each in self.skipped:
            skip(each)
        for path in self.files:
            name = self._relative_name(path.with_suffix(""))
            with _as_config_error(path, "an uncompressed tar"), tarfile.open(path, "r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every member in memory
                    inner = _as_text(member.name)
                    if member.isdir():
                        continue
                    if any(part.startswith(".") and part not in (".", "..") for part in inner.split("/")):
                        skip(Skipped(f"{name}/{inner}", HIDDEN))
                    elif not _is_image(inner):
                        skip(_other_suffix(inner))
                    elif not member.isreg() or member.issparse():
                        kind = "a link" if member.issym() or member.islnk() else "no regular file"
                        skip(Skipped(f"{name}/{inner}", f"{kind} in a tar"))
                    else:
                        yield Item(f"{name}/{inner}", os.fsencode(path), member.offset_data, member.size)

    def read(self, item: Item) -> bytes:
        with open(item.file, "rb") as file:
            file.seek(item.at)
            data = file.read(item.size)
        if len(data) < item.size:
            raise OSError(f"the tar is truncated: it has {len(data)} of {item.size} bytes of this image")
        return data


@dataclass(frozen=True)
class Table(Source):
    """Tables with images in a column of bytes or of {bytes, path} structs. The id is in a column, or FILE:ROW."""

    image_column: str = ""
    id_column: str | None = None

    @abstractmethod
    def _columns(self, file: Path, column: str) -> Iterator[Any]:
        """Yield the values of a column of a file, in pieces that have a length."""

    @abstractmethod
    def _cell(self, item: Item) -> Any:
        """Return the value of the image column for an image."""

    def items(self, skip: Skip = _ignore) -> Iterator[Item]:
        for each in self.skipped:
            skip(each)
        for file in self.files:
            name, path, row = self._relative_name(file), os.fsencode(file), 0
            with _as_config_error(file, "a table"):
                for piece in self._columns(file, self.id_column or self.image_column):
                    ids = piece.to_pylist() if self.id_column else [f"{name}:{row + i}" for i in range(len(piece))]
                    for id in ids:
                        yield Item(str(id), path, row, -1)
                        row += 1

    def read(self, item: Item) -> bytes:
        cell = self._cell(item)
        if isinstance(cell, dict):
            if cell.get("bytes") is None and cell.get("path") is not None:
                return _read_file(cell["path"])
            cell = cell.get("bytes")
        if cell is None:
            raise OSError("the row has no image")
        return bytes(cell)


class Parquet(Table):
    """Parquet files. Each process keeps one row group of the image column in memory."""

    def _columns(self, file: Path, column: str) -> Iterator[Any]:
        parquet, _ = _open_parquet(os.fsencode(file))
        if self.id_column:
            for batch in parquet.iter_batches(batch_size=10_000, columns=[column]):
                yield batch.column(0)
        else:  # count rows without reading them
            for group in range(parquet.num_row_groups):
                yield range(parquet.metadata.row_group(group).num_rows)

    def _cell(self, item: Item) -> Any:
        _, starts = _open_parquet(item.file)
        group = int(np.searchsorted(starts, item.at, "right")) - 1
        return _row_group(item.file, self.image_column, group)[item.at - int(starts[group])].as_py()


class Arrow(Table):
    """A dataset written by `datasets.save_to_disk`: Arrow streams, mapped into memory."""

    def _columns(self, file: Path, column: str) -> Iterator[Any]:
        yield from _open_arrow(os.fsencode(file)).column(column).chunks

    def _cell(self, item: Item) -> Any:
        return _open_arrow(item.file).column(self.image_column)[item.at].as_py()


def open_source(
    path: str | Path, format: str | None = None, *, image_column: str | None = None, id_column: str | None = None
) -> Source:
    """Open the source at a path.

    `path` is a directory, a file, or a pattern such as "data/*.tar". `format` is one of FORMATS; without it the format
    is detected. Raises `ConfigError` if nothing matches `path` or files of several formats do.
    """
    if format is not None and format not in FORMATS:
        raise ConfigError(f"no format {format!r} of datasets; known are {', '.join(FORMATS)}")
    root, files = _found(Path(path))
    skipped: tuple[Skipped, ...] = ()
    format = format or _format_of(root, files)
    if format == "folder":
        if not root.is_dir() or files:
            raise ConfigError(f"{path} is not a directory: a folder of images is given as its directory")
        return Folder(root)
    if format == "datasets":
        files = _arrow_files(root)
    else:
        suffix = ".tar" if format == "webdataset" else ".parquet"
        if not files:
            files, skipped = _files_of(root, suffix)
        if not files:
            raise ConfigError(f"{path} has no {suffix} files")
    if format == "webdataset":
        return Tars(root, files, skipped)
    schema = _schema(files[0], format)
    columns = {"image_column": _image_column(schema, image_column, files[0]), "id_column": id_column}
    if id_column is not None and id_column not in schema.names:
        raise ConfigError(f"{files[0]} has no column {id_column!r}; it has {', '.join(schema.names)}")
    return (Arrow if format == "datasets" else Parquet)(root, files, skipped, **columns)  # type: ignore[arg-type]


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Return the lower-case suffixes of the formats that Pillow reads, except document, video and data formats."""
    Image.init()
    readable = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
    return frozenset(readable - {".pdf", ".ps", ".eps", ".mpg", ".mpeg", ".wmf", ".emf", ".hdf", ".h5", ".grib"})


def _found(path: Path) -> tuple[Path, tuple[Path, ...]]:
    """Return (root, files) for a path or pattern; `files` is empty for a directory."""
    if path.is_dir():
        return path.absolute(), ()
    if path.is_file():
        return path.absolute().parent, (path.absolute(),)
    matches = tuple(sorted(Path(match).absolute() for match in glob.glob(str(path), recursive=True)))
    if not matches:
        raise ConfigError(f"{path} does not exist; SOURCE is a directory, a file, or a pattern such as 'data/*.tar'")
    for match in matches:
        if not match.is_file():
            raise ConfigError(f"{match} is no regular file; SOURCE is a directory, or .tar or .parquet files")
    return Path(os.path.commonpath([match.parent for match in matches])), matches


def _format_of(root: Path, files: Sequence[Path]) -> str:
    names = (
        [file.name for file in files]
        if files
        else [entry.name for entry in os.scandir(root) if not entry.name.startswith(".")]
    )
    if not files and ("state.json" in names or "dataset_dict.json" in names):
        return "datasets"
    suffixes = {os.path.splitext(name)[1].lower() for name in names}
    found = {".tar": "webdataset", ".parquet": "parquet"}
    kinds = {found[suffix] for suffix in suffixes if suffix in found}
    if files and not kinds:
        what = "a compressed tar; unpack it first" if {".gz", ".tgz", ".zst"} & suffixes else f"{files[0].name}"
        raise ConfigError(f"SOURCE is not a directory, .tar or .parquet, but {what}")
    if not files and kinds and suffixes & image_suffixes():
        kinds.add("folder")
    if len(kinds) > 1:
        raise ConfigError(f"{root} has {' and '.join(sorted(kinds))} side by side; say which with --format")
    return kinds.pop() if kinds else "folder"


def _files_of(root: Path, suffix: str) -> tuple[tuple[Path, ...], tuple[Skipped, ...]]:
    """Return the files of a directory that have the suffix, sorted, and the other entries as skipped."""
    files, skipped = [], []
    for path in sorted(root.iterdir()):
        if not path.name.startswith(".") and path.name.endswith(suffix) and path.is_file():
            files.append(path)
        else:
            reason = HIDDEN if path.name.startswith(".") else f"no {suffix} file"
            skipped.append(Skipped(_as_text(path.name), reason))
    return tuple(files), tuple(skipped)


def _kind(entry: os.DirEntry[str]) -> str:
    """Return the kind of an entry, following links: "file", "folder", "broken link" (also a loop) or "other"."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        return "other" if os.path.exists(entry.path) else "broken link"
    except OSError:
        return "broken link"


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in image_suffixes()


def _other_suffix(name: str) -> Skipped:
    return Skipped(f"*{os.path.splitext(_as_text(name))[1].lower()}", OTHER_SUFFIX)


def _as_text(name: str) -> str:
    r"""Return a file-system name as valid Unicode: bytes that are not UTF-8 become \xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _read_file(path: str | bytes) -> bytes:
    """Return the bytes of a regular file. Raises `OSError` for anything else, without blocking on a FIFO."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(NO_FILE)
        return file.read()


# Tables -----------------------------------------------------------------------------------------------------------


def _arrow_files(root: Path) -> tuple[Path, ...]:
    if (root / "dataset_dict.json").exists():
        splits = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        raise ConfigError(f"{root} holds several splits; give one of them: {', '.join(splits) or 'it has none'}")
    try:
        state = json.loads((root / "state.json").read_bytes())
        names = [str(entry["filename"]) for entry in state["_data_files"]]
        if any(os.path.basename(name) != name for name in names):
            raise ValueError(f"it names files elsewhere: {names[:3]}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{root} is not a datasets directory: state.json: {error}") from None
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise ConfigError(f"{root} is a selection of rows by an index file; flatten it: dataset.flatten_indices()")
    return tuple(root / name for name in names)


def _schema(file: Path, format: str) -> Any:
    with _as_config_error(file, f"a file of {format}"):
        if format == "datasets":
            return _open_arrow(os.fsencode(file)).schema
        return _open_parquet(os.fsencode(file))[0].schema_arrow


def _image_column(schema: Any, wanted: str | None, file: Path) -> str:
    """Return the wanted column, or, without `wanted`, the only column that can hold images."""
    types = import_pyarrow().types

    def holds_bytes(kind: Any) -> bool:
        if types.is_struct(kind):
            names = [field.name for field in kind]
            return "bytes" in names and holds_bytes(kind.field(names.index("bytes")).type)
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    possible = [field.name for field in schema if holds_bytes(field.type)]
    listed = ", ".join(f"{field.name} ({field.type})" for field in schema)
    if wanted is not None:
        if wanted not in possible:
            raise ConfigError(f"{file} has no column {wanted!r} of image bytes; it has {listed}")
        return wanted
    named = [name for name in possible if name.lower() in COLUMN_NAMES]
    if len(possible) != 1 and len(named) != 1:
        raise ConfigError(f"{file}: which column has the images? give it with --image-column; it has {listed}")
    return str((possible if len(possible) == 1 else named)[0])


def _open_parquet(file: bytes) -> tuple[Any, Any]:
    """Return an open parquet file and the number of the first row of each row group."""
    return _opened_parquet(file, _version(file))


def _row_group(file: bytes, column: str, group: int) -> Any:
    return _read_row_group(file, _version(file), column, group)


def _open_arrow(file: bytes) -> Any:
    return _opened_arrow(file, _version(file))


def _version(file: bytes) -> tuple[int, int, int]:
    """Return inode, size and mtime (ns) of a file: once one of them changes, cached content is stale."""
    status = os.stat(file)
    return status.st_ino, status.st_size, status.st_mtime_ns


@functools.lru_cache(MAX_OPEN_FILES)
def _opened_parquet(file: bytes, version: tuple[int, ...]) -> tuple[Any, Any]:
    parquet = import_pyarrow().parquet.ParquetFile(os.fsdecode(file))
    counts = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
    return parquet, np.cumsum([0, *counts])[:-1]


@functools.lru_cache(1)
def _read_row_group(file: bytes, version: tuple[int, ...], column: str, group: int) -> Any:
    return _opened_parquet(file, version)[0].read_row_group(group, columns=[column]).column(0)


@functools.lru_cache(MAX_OPEN_FILES)
def _opened_arrow(file: bytes, version: tuple[int, ...]) -> Any:
    pyarrow = import_pyarrow()
    return pyarrow.ipc.open_stream(pyarrow.memory_map(os.fsdecode(file))).read_all()


class _as_config_error:
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
