"""Write a directory of latents. Each file is written atomically.

    contract.json           description of the latents: VAE, stored values, image preparation
    shards/K.safetensors    the latents, see `runtimes.latents.shards`
    index.parquet           shard and entry of each id; exists if and only if the job has finished
    errors.parquet          images that could not be encoded, and the reasons
    skipped.parquet         entries of the source that were not treated as images, and the reasons
    plan.sqlite             assignment of images to shards
    .lock                   held by the running job

A file is written under a temporary name, flushed to disk, and renamed: after a crash, either the old or the new file
is there.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from runtimes.errors import BundleError, CompatibilityError, ConfigError, IntegrityError, NotInstalled
from runtimes.files import flush, leftovers, written_whole
from runtimes.latents.dataset import (
    CONTRACT_FILE,
    ERRORS_FILE,
    INDEX_FILE,
    SHARDS,
    SKIPPED_FILE,
    contract_digest,
    errors_schema,
    import_pyarrow,
    index_schema,
    read_contract,
    shard_name,
)
from runtimes.latents.shards import (
    DTYPES,
    HEADER_START,
    NO_HASH,
    SCHEMA_VERSION,
    Array,
    Failure,
    Shard,
    check_hash,
    latents_digest,
    open_shard,
)

_SHARD = re.compile(r"(\d{8,})\.safetensors")
_RESUME = "run the same command again to continue"
_ROWS = 10_000  #: rows per write


class Entry(NamedTuple):
    """An entry of a shard; `runtimes.latents.shards` describes the fields."""

    id: str
    flipped: bool
    sha256: bytes
    original_size: tuple[int, int]
    resized: tuple[int, int]
    crop: tuple[int, int]
    latents: Array  #: [C, h, w], as stored


def entries_of(shard: Shard) -> Iterator[Entry]:
    """Yield the entries of an open shard, in the order of the shard."""
    for number, id in enumerate(shard.ids):
        original, resized, crop = (
            (int(column[number, 0]), int(column[number, 1]))
            for column in (shard.original_size, shard.resized, shard.crop)
        )
        flipped, sha256 = bool(shard.flipped[number]), shard.sha256[number].tobytes()
        yield Entry(id, flipped, sha256, original, resized, crop, shard.latents(number))


def write_shard(path: Path, entries: Sequence[Entry], failures: Sequence[Failure], dtype: str) -> None:
    """Write a shard. `entries` are in the order of the source; the shard groups them by latent size.

    Raises `BundleError` if the file cannot be written.
    """
    entries = sorted(entries, key=lambda entry: entry.latents.shape[1:])  # stable: keeps the order within a size
    groups: dict[tuple[int, ...], list[Array]] = {}
    for entry in entries:
        groups.setdefault(entry.latents.shape, []).append(np.ascontiguousarray(entry.latents))
    ids = [entry.id.encode() for entry in entries]
    pair = ("I32", (len(entries), 2))
    # Tensors with the widest items come first, so that each begins at a multiple of its item size.
    tensors: list[tuple[str, str, tuple[int, ...], Sequence[Any]]] = [
        ("id_ends", "I64", (len(ids),), [np.cumsum([len(id) for id in ids], dtype=np.int64)]),
        ("original_size", *pair, [np.array([entry.original_size for entry in entries], np.int32)]),
        ("resized", *pair, [np.array([entry.resized for entry in entries], np.int32)]),
        ("crop", *pair, [np.array([entry.crop for entry in entries], np.int32)]),
        *(
            (f"latents.{shape[1]}x{shape[2]}", DTYPES[dtype], (len(group), *shape), group)
            for shape, group in groups.items()
        ),
        ("flipped", "BOOL", (len(ids),), [np.array([entry.flipped for entry in entries], np.bool_)]),
        ("sha256", "U8", (len(ids), 32), [entry.sha256 for entry in entries]),
        ("latents_sha256", "U8", (len(ids), 32), [latents_digest(entry.latents, dtype) for entry in entries]),
        ("ids", "U8", (sum(map(len, ids)),), ids),
    ]
    listed = [[id, None if sha256 is None else sha256.hex(), reason] for id, sha256, reason in failures]
    metadata = {"schema_version": str(SCHEMA_VERSION), "dtype": dtype, "failures": json.dumps(listed)}
    header: dict[str, Any] = {
        "__metadata__": {"file_sha256": NO_HASH, **metadata}
    }  # the hash must come first: see HEADER_START
    offset = 0
    for name, spelt, shape, parts in tensors:
        size = sum(part.nbytes if isinstance(part, np.ndarray) else len(part) for part in parts)
        header[name] = {"dtype": spelt, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with written_whole(path, advice=_RESUME) as partial, partial.open("wb") as file:
        digest = hashlib.sha256()
        data = (part.tobytes() if isinstance(part, np.ndarray) else part for *_, parts in tensors for part in parts)
        for part in itertools.chain([len(text).to_bytes(8, "little") + text], data):
            digest.update(part)
            file.write(part)
        file.seek(8 + len(HEADER_START))
        file.write(digest.hexdigest().encode())


def shard_numbers(directory: Path) -> list[int]:
    """Return the numbers of the shards in a directory of latents, in ascending order."""
    names = (_SHARD.fullmatch(entry.name) for entry in os.scandir(directory / SHARDS))
    return sorted(int(match[1]) for match in names if match is not None)


def index_rows(number: int, shard: Shard) -> Any:
    """Return the pyarrow table of the index.parquet rows of a shard."""
    pyarrow = import_pyarrow()
    columns = {
        "id": shard.ids,
        "flipped": shard.flipped,
        "shard": np.full(len(shard), number, np.int32),
        "entry": np.arange(len(shard), dtype=np.int32),
        "latent_size": _pairs(pyarrow, shard.latent_sizes()),
        **{name: _pairs(pyarrow, getattr(shard, name)) for name in ("original_size", "resized", "crop")},
        "sha256": pyarrow.array([row.tobytes() for row in shard.sha256], pyarrow.binary(32)),
    }
    return pyarrow.table(columns, schema=index_schema())


def errors_rows(failures: Sequence[Failure]) -> Any:
    """Return the pyarrow table of the errors.parquet rows of failed images."""
    pyarrow = import_pyarrow()
    columns = {
        "id": [failure.id for failure in failures],
        "reason": [failure.reason for failure in failures],
        "sha256": pyarrow.array([failure.sha256 for failure in failures], pyarrow.binary(32)),
    }
    return pyarrow.table(columns, schema=errors_schema())


class LatentDirectory:
    """A directory of latents, opened or created, and locked by this job.

    Raises `ConfigError`, which lists the differences, if the directory has another contract. Raises `BundleError` if
    the directory holds anything else than latents, cannot be written, or is locked by another job.
    """

    def __init__(self, path: Path, contract: Mapping[str, Any]) -> None:
        self.path = path
        self.damaged: set[int] = set()  #: numbers of the damaged shards
        self._checked: set[int] = set()  #: numbers of the shards whose hash has been verified
        try:
            if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not self._is_mine())):
                raise BundleError(f"{path} exists and holds no latents; it was not changed, choose another --out")
            (path / SHARDS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BundleError(f"cannot write to {path}: {error.strerror}; choose another --out") from None
        self._lock = _acquire_lock(path)
        try:
            for leftover in (*leftovers(path), *leftovers(path / SHARDS)):
                leftover.unlink(missing_ok=True)
            self._write_contract(contract)
        except BaseException:
            self.close()
            raise

    def _is_mine(self) -> bool:
        # A job takes the lock before it writes the contract, and may be killed in between.
        before = {self.path / SHARDS, self.path / ".lock", *leftovers(self.path, CONTRACT_FILE)}
        return (self.path / CONTRACT_FILE).exists() or set(self.path.iterdir()) <= before

    def _write_contract(self, contract: Mapping[str, Any]) -> None:
        """Write the contract, or append this job's `encoded_with` to an existing one that otherwise agrees."""
        contract = dict(contract)
        now = contract["encoded_with"]
        if (self.path / CONTRACT_FILE).exists():
            there = read_contract(self.path)
            before = there.pop("encoded_with")
            differing = list(differences(there, {name: value for name, value in contract.items() if name in there}))
            if differing:
                raise ConfigError(
                    f"{self.path} holds other latents: {'; '.join(differing)}. Run the command as it was, or choose "
                    "another --out"
                )
            contract["encoded_with"] = before + [each for each in now if each not in before]
            if contract["encoded_with"] == before:
                return
        contract["sha256"] = contract_digest(contract)
        with written_whole(self.path / CONTRACT_FILE, advice=_RESUME) as partial:
            partial.write_text(json.dumps(contract, indent=2) + "\n", encoding="utf-8")

    def shard_path(self, number: int) -> Path:
        """Return the path of a shard, whether or not it exists."""
        return self.path / SHARDS / shard_name(number)

    def shard(self, number: int) -> Shard | None:
        """Return an open shard, or None if it is missing or damaged, so that all of its images are encoded again.

        The first call for a shard compares the whole file with its hash. The cost is negligible: a resumed job reads
        and hashes every image of the source, many times the bytes of the latents.
        """
        path = self.shard_path(number)
        if number in self.damaged or not path.exists():
            return None
        try:
            if number not in self._checked:
                check_hash(path)
            shard = open_shard(path)
        except (IntegrityError, CompatibilityError):
            self.begin_changes()  # if this job is killed now, the latents must not look finished
            self.damaged.add(number)
            return None
        self._checked.add(number)
        return shard

    def numbers(self) -> list[int]:
        """Return the numbers of the existing shards, in ascending order."""
        return shard_numbers(self.path)

    def begin_changes(self) -> None:
        """Delete the index, which is about to become stale. `write_index` writes it again at the end of the job."""
        self.remove(self.path / INDEX_FILE)

    def remove(self, path: Path) -> None:
        """Delete a file if it exists, and flush its directory."""
        if path.exists():
            path.unlink()
            flush(path.parent)

    def write_index(self) -> None:
        """Write index.parquet and errors.parquet from the content of the shards."""
        pyarrow = import_pyarrow()
        options = {"write_page_checksum": True}
        with (
            written_whole(self.path / INDEX_FILE, advice=_RESUME) as partial_index,  # renamed last, when all is written
            written_whole(self.path / ERRORS_FILE, advice=_RESUME) as partial_errors,
            pyarrow.parquet.ParquetWriter(partial_errors, errors_schema(), **options) as to_errors,
            pyarrow.parquet.ParquetWriter(partial_index, index_schema(), **options) as to_index,
        ):
            for number in self.numbers():
                shard = open_shard(self.shard_path(number))
                if len(shard):
                    to_index.write_table(index_rows(number, shard))
                if shard.failures:
                    to_errors.write_table(errors_rows(shard.failures))

    def write_skipped(self, rows: Iterator[tuple[str, str, int]]) -> int:
        """Write skipped.parquet from (path, reason, count) rows, unless its content is unchanged.

        Returns the sum of the counts.
        """
        pyarrow = import_pyarrow()
        schema = pyarrow.schema({"path": pyarrow.string(), "reason": pyarrow.string(), "count": pyarrow.int64()})
        path, total = self.path / SKIPPED_FILE, 0
        with (
            written_whole(path, advice=_RESUME, unless_equal=True) as partial,
            pyarrow.parquet.ParquetWriter(partial, schema, write_page_checksum=True) as writer,
        ):
            while batch := list(itertools.islice(rows, _ROWS)):
                columns = dict(zip(schema.names, zip(*batch, strict=True), strict=True))
                writer.write_table(pyarrow.table(columns, schema=schema))
                total += sum(columns["count"])
        return total

    def close(self) -> None:
        """Release the lock."""
        self._lock.release()

    def __enter__(self) -> LatentDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def differences(there: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield one sentence for each difference between an existing contract and the current one."""
    for name in sorted(there.keys() | now.keys()):
        old, new = there.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from differences(old, new, f"{prefix}{name}.")
        elif old != new:
            yield f"{prefix}{name} is {_short(old)} there and {_short(new)} now"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _pairs(pyarrow: Any, values: Array) -> Any:
    return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values.reshape(-1).astype(np.int32)), 2)


def _acquire_lock(directory: Path) -> Any:
    try:
        from filelock import FileLock, Timeout
    except ModuleNotFoundError:
        raise NotInstalled("datasets of latents need filelock: pip install 'vae-export[dataset]'") from None
    lock = FileLock(directory / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BundleError(f"another job is at work on {directory}; wait for it, or choose another --out") from None
    except OSError as error:
        raise BundleError(f"cannot write to {directory}: {error.strerror}; choose another --out") from None
    return lock
