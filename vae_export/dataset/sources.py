"""Where the images of a dataset come from: a folder tree, WebDataset tars, parquet, or a datasets directory on disk.

A source lists its images without reading them, in a fixed order, and reads the bytes of any of them in any process. It
is small, and goes to worker processes as it is.
"""

from __future__ import annotations

import functools
import glob
import json
import os
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from runtimes.errors import ConfigError
from runtimes.latents.dataset import import_pyarrow

FORMATS = ("folder", "webdataset", "parquet", "datasets")
COLUMN_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes")  #: where several could be meant
MOST_OPEN = 4  #: parquet and Arrow files that a process keeps open


class Item(NamedTuple):
    """An image of a source: its id there, and where its bytes are."""

    id: str
    file: bytes  #: path, as the system spells it
    at: int  #: offset in a tar, row in a table; 0 for a file of its own
    size: int  #: bytes in a tar; -1 where the source knows better


@dataclass(frozen=True)
class Source(ABC):
    """`root` is what ids are relative to, `files` what is read, where that is not all below it."""

    root: Path
    files: tuple[Path, ...] = ()

    @abstractmethod
    def items(self) -> Iterator[Item]:
        """All images, none read. `ConfigError` for a file that is not what the source is made of."""

    @abstractmethod
    def read(self, item: Item) -> bytes:
        """The bytes of one. Whatever it raises is about that image alone."""

    def _named(self, file: Path) -> str:
        """A path below the root as text; bytes that are not UTF-8 are spelt out."""
        name = os.fsencode(file.relative_to(self.root).as_posix())
        return name.decode("utf-8", "backslashreplace")


class Folder(Source):
    """Files with the suffix of an image, at any depth; the id is the path below the root, suffix and all."""

    def items(self) -> Iterator[Item]:
        suffixes = image_suffixes()
        folders = [self.root]
        while folders:
            with _as_config_error(folders[-1], "a folder"), os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(Path(entry.path))
                    elif os.path.splitext(entry.name)[1].lower() in suffixes and not entry.name.startswith("."):
                        path = Path(entry.path)
                        yield Item(self._named(path), os.fsencode(path), 0, -1)

    def read(self, item: Item) -> bytes:
        with open(item.file, "rb") as file:
            return file.read()


class Tars(Source):
    """Uncompressed tars, as WebDataset has them; the id is the tar's name and the member's: shard-00/000.jpg."""

    def items(self) -> Iterator[Item]:
        suffixes = image_suffixes()
        for path in self.files:
            name = self._named(path.with_suffix(""))
            with _as_config_error(path, "an uncompressed tar"), tarfile.open(path, "r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # which it would keep, all of them
                    if member.isreg() and os.path.splitext(member.name)[1].lower() in suffixes:
                        inner = os.fsencode(member.name).decode("utf-8", "backslashreplace")
                        yield Item(f"{name}/{inner}", os.fsencode(path), member.offset_data, member.size)

    def read(self, item: Item) -> bytes:
        with open(item.file, "rb") as file:
            file.seek(item.at)
            data = file.read(item.size)
        if len(data) < item.size:
            raise OSError(f"the tar ends in the middle of it: {len(data)} of {item.size} bytes")
        return data


@dataclass(frozen=True)
class Table(Source):
    """Tables with images in a column, of bytes or of {bytes, path}; the id is in a column, or FILE:ROW."""

    image_column: str = ""
    id_column: str | None = None

    @abstractmethod
    def _columns(self, file: Path, column: str) -> Iterator[Any]:
        """A column of a file, in pieces."""

    @abstractmethod
    def _cell(self, item: Item) -> Any:
        """The image column's value."""

    def items(self) -> Iterator[Item]:
        for file in self.files:
            name, path, row = self._named(file), os.fsencode(file), 0
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
                return Path(cell["path"]).read_bytes()
            cell = cell.get("bytes")
        if cell is None:
            raise OSError("the row has no image")
        return bytes(cell)


class Parquet(Table):
    """Parquet files. A process keeps one row group of the column at a time in memory."""

    def _columns(self, file: Path, column: str) -> Iterator[Any]:
        parquet, _ = _open_parquet(os.fsencode(file))
        if self.id_column:
            for batch in parquet.iter_batches(batch_size=10_000, columns=[column]):
                yield batch.column(0)
        else:  # rows are counted, not read
            for group in range(parquet.num_row_groups):
                yield range(parquet.metadata.row_group(group).num_rows)

    def _cell(self, item: Item) -> Any:
        _, starts = _open_parquet(item.file)
        group = int(np.searchsorted(starts, item.at, "right")) - 1
        return _row_group(item.file, self.image_column, group)[item.at - int(starts[group])].as_py()


class Arrow(Table):
    """A dataset that `datasets.save_to_disk` wrote: Arrow streams, mapped into memory."""

    def _columns(self, file: Path, column: str) -> Iterator[Any]:
        yield from _open_arrow(os.fsencode(file)).column(column).chunks

    def _cell(self, item: Item) -> Any:
        return _open_arrow(item.file).column(self.image_column)[item.at].as_py()


def open_source(
    path: str | Path, format: str | None = None, *, image_column: str | None = None, id_column: str | None = None
) -> Source:
    """The source at a path, of the format that is found there unless it is said.

    `path` is a directory, a file, or a pattern such as "data/*.tar". Raises `ConfigError` where there is nothing, or
    more than one kind of thing.
    """
    if format is not None and format not in FORMATS:
        raise ConfigError(f"no format {format!r} of datasets; known are {', '.join(FORMATS)}")
    root, files = _found(Path(path))
    format = format or _format_of(root, files)
    if format == "folder":
        if not root.is_dir() or files:
            raise ConfigError(f"{path} is not a directory: a folder of images is given as its directory")
        return Folder(root)
    if format == "datasets":
        files = _arrow_files(root)
    else:
        suffix = ".tar" if format == "webdataset" else ".parquet"
        files = files or tuple(sorted(p for p in root.iterdir() if p.name.endswith(suffix)))
        if not files:
            raise ConfigError(f"{path} has no {suffix} files")
    if format == "webdataset":
        return Tars(root, files)
    schema = _schema(files[0], format)
    columns = {"image_column": _image_column(schema, image_column, files[0]), "id_column": id_column}
    if id_column is not None and id_column not in schema.names:
        raise ConfigError(f"{files[0]} has no column {id_column!r}; it has {', '.join(schema.names)}")
    return (Arrow if format == "datasets" else Parquet)(root, files, **columns)  # type: ignore[arg-type]


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Lower-case suffixes of the formats that Pillow reads, but those of documents."""
    Image.init()
    readable = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
    return frozenset(readable - {".pdf", ".ps", ".eps", ".mpg", ".mpeg", ".wmf", ".emf", ".hdf", ".h5", ".grib"})


def _found(path: Path) -> tuple[Path, tuple[Path, ...]]:
    """(root, files); no files for a directory."""
    if path.is_dir():
        return path.absolute(), ()
    if path.is_file():
        return path.absolute().parent, (path.absolute(),)
    matches = tuple(sorted(Path(match).absolute() for match in glob.glob(str(path), recursive=True)))
    if not matches:
        raise ConfigError(f"{path} does not exist; SOURCE is a directory, a file, or a pattern such as 'data/*.tar'")
    return Path(os.path.commonpath([match.parent for match in matches])), matches


def _format_of(root: Path, files: Sequence[Path]) -> str:
    names = [file.name for file in files] if files else [entry.name for entry in os.scandir(root)]
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
    """The column that is named, or the only one that could be meant."""
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
        raise ConfigError(f"{file}: which column has the images? say it with --image-column; it has {listed}")
    return str((possible if len(possible) == 1 else named)[0])


def _open_parquet(file: bytes) -> tuple[Any, Any]:
    """A parquet file, and the row with which each of its groups begins."""
    return _opened_parquet(file, _version(file))


def _row_group(file: bytes, column: str, group: int) -> Any:
    return _read_row_group(file, _version(file), column, group)


def _open_arrow(file: bytes) -> Any:
    return _opened_arrow(file, _version(file))


def _version(file: bytes) -> tuple[int, int, int]:
    """What changes when a file is replaced: then what is kept of it is not what it holds."""
    status = os.stat(file)
    return status.st_ino, status.st_size, status.st_mtime_ns


@functools.lru_cache(MOST_OPEN)
def _opened_parquet(file: bytes, version: tuple[int, ...]) -> tuple[Any, Any]:
    parquet = import_pyarrow().parquet.ParquetFile(os.fsdecode(file))
    counts = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
    return parquet, np.cumsum([0, *counts])[:-1]


@functools.lru_cache(1)
def _read_row_group(file: bytes, version: tuple[int, ...], column: str, group: int) -> Any:
    return _opened_parquet(file, version)[0].read_row_group(group, columns=[column]).column(0)


@functools.lru_cache(MOST_OPEN)
def _opened_arrow(file: bytes, version: tuple[int, ...]) -> Any:
    pyarrow = import_pyarrow()
    return pyarrow.ipc.open_stream(pyarrow.memory_map(os.fsdecode(file))).read_all()


class _as_config_error:
    """What a listing raises, as a `ConfigError` that names the file."""

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
