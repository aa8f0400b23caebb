"""Tables of images: parquet files, and datasets that `datasets.save_to_disk` wrote."""

from __future__ import annotations

import functools
import json
import os
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.errors import ConfigError
from runtimes.latents.dataset import import_pyarrow
from vae_export.dataset.items import Item, Skip, Source, as_config_error, ignore_skipped, read_file

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

    def items(self, skip: Skip = ignore_skipped) -> Iterator[Item]:
        for each in self.skipped:
            skip(each)
        for file in self.files:
            name, path, row = self._relative_name(file), os.fsencode(file), 0
            with as_config_error(file, "a table"):
                for piece in self._columns(file, self.id_column or self.image_column):
                    ids = piece.to_pylist() if self.id_column else [f"{name}:{row + i}" for i in range(len(piece))]
                    for id in ids:
                        yield Item(str(id), path, row, -1)
                        row += 1

    def read(self, item: Item) -> bytes:
        cell = self._cell(item)
        if isinstance(cell, dict):
            if cell.get("bytes") is None and cell.get("path") is not None:
                return read_file(cell["path"])
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


def arrow_files(root: Path) -> tuple[Path, ...]:
    """Return the files of a `datasets` directory. `ConfigError` if it is not one, or has several splits."""
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


def schema_of(file: Path, format: str) -> Any:
    """Return the pyarrow schema of a table. `ConfigError` if the file is not one."""
    with as_config_error(file, f"a file of {format}"):
        if format == "datasets":
            return _open_arrow(os.fsencode(file)).schema
        return _open_parquet(os.fsencode(file))[0].schema_arrow


def image_column_of(schema: Any, wanted: str | None, file: Path) -> str:
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
