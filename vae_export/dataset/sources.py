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
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from runtimes.errors import ConfigError
from vae_export.dataset.items import (
    HIDDEN,
    NO_FILE,
    OTHER_SUFFIX,
    SAME_FOLDER,
    Item,
    Skip,
    Skipped,
    Source,
    as_config_error,
    as_text,
    ignore_skipped,
    read_file,
)
from vae_export.dataset.tables import Arrow, Parquet, arrow_files, image_column_of, schema_of

FORMATS = ("folder", "webdataset", "parquet", "datasets")


class Folder(Source):
    """Image files at any depth of a folder. The id is the path relative to the root, including the suffix."""

    def items(self, skip: Skip = ignore_skipped) -> Iterator[Item]:
        folders: list[Path] = [self.root]
        links: list[Path] = []
        read: set[tuple[int, int]] = set()  # device and inode
        while folders or links:
            if folders:
                folder = folders.pop()
            else:  # everything that is reachable without this link has been read
                links.sort(reverse=True)
                folder = links.pop()
            with as_config_error(folder, "a folder"):
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
        return read_file(item.file)


class Tars(Source):
    """Uncompressed tars in the WebDataset layout. The id joins the names of tar and member: shard-00/000.jpg."""

    def items(self, skip: Skip = ignore_skipped) -> Iterator[Item]:
        for each in self.skipped:
            skip(each)
        for path in self.files:
            name = self._relative_name(path.with_suffix(""))
            with as_config_error(path, "an uncompressed tar"), tarfile.open(path, "r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every member in memory
                    inner = as_text(member.name)
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
        files = arrow_files(root)
    else:
        suffix = ".tar" if format == "webdataset" else ".parquet"
        if not files:
            files, skipped = _files_of(root, suffix)
        if not files:
            raise ConfigError(f"{path} has no {suffix} files")
    if format == "webdataset":
        return Tars(root, files, skipped)
    schema = schema_of(files[0], format)
    columns = {"image_column": image_column_of(schema, image_column, files[0]), "id_column": id_column}
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
            skipped.append(Skipped(as_text(path.name), reason))
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
    return Skipped(f"*{os.path.splitext(as_text(name))[1].lower()}", OTHER_SUFFIX)
