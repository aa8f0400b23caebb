"""Verify a directory of latents: compare each shard with its hash, and the tables with the shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.errors import CompatibilityError, IntegrityError, VaeError
from runtimes.latents.dataset import (
    ERRORS_FILE,
    INDEX_FILE,
    SHARDS,
    errors_schema,
    read_contract,
    read_index,
    read_parquet,
    shard_name,
)
from runtimes.latents.shards import Failure, check_hash, open_shard
from runtimes.progress import Progress, no_progress
from vae_export.dataset.shards import errors_rows, index_rows, shard_numbers

_MAX_LISTED = 10  #: maximum number of damaged files listed in an error message


@dataclass(frozen=True)
class Verified:
    """Counts of what was verified and found undamaged."""

    shards: int
    entries: int
    failures: int  #: rows of errors.parquet
    bytes: int  #: total size of the shards

    def to_dict(self) -> dict[str, int]:
        """Return the fields as a JSON-serialisable dictionary."""
        return asdict(self)


def verify_latents(directory: str | Path, progress: Progress = no_progress) -> Verified:
    """Read every file of a finished directory of latents and compare it with its hash.

    Raises `IntegrityError`, which lists the damaged files, and `BundleError` if there are no finished latents.
    """
    directory = Path(directory)
    read_contract(directory)
    read_index(directory)  # fails at once for an unfinished job, before all shards are read
    damaged: list[str] = []
    numbers, size = shard_numbers(directory), 0
    for done, number in enumerate(numbers):
        progress("Verifying", done, len(numbers))
        path = directory / SHARDS / shard_name(number)
        try:
            check_hash(path)
        except VaeError:
            damaged.append(f"{SHARDS}/{path.name}")
        else:
            size += path.stat().st_size
    try:
        damaged += _wrong_tables(directory, numbers) if not damaged else ()
    except (IntegrityError, CompatibilityError) as error:
        damaged.append(str(error))
    if damaged:
        more = f", and {len(damaged) - _MAX_LISTED} more" if len(damaged) > _MAX_LISTED else ""
        raise IntegrityError(
            f"{directory}: damaged or missing: {', '.join(damaged[:_MAX_LISTED])}{more}. Run the encode-dataset "
            "command again: it rewrites the damaged files and keeps the rest"
        )
    failures = len(read_parquet(directory / ERRORS_FILE, errors_schema()))
    return Verified(len(numbers), len(read_index(directory)), failures, size)


def tables_are_current(directory: Path) -> bool:
    """Return whether index.parquet and errors.parquet match the shards. The shards are assumed to be undamaged."""
    try:
        return not any(_wrong_tables(directory, shard_numbers(directory)))
    except VaeError:
        return False


def _wrong_tables(directory: Path, numbers: Sequence[int]) -> Iterator[str]:
    """Yield the names of missing shards and of tables that differ from the shards.

    Raises `IntegrityError` if a file cannot be parsed.
    """
    index, errors = read_index(directory), read_parquet(directory / ERRORS_FILE, errors_schema())
    missing = sorted(set(np.unique(index.column("shard").to_numpy()).tolist()) - set(numbers))
    yield from (f"{SHARDS}/{shard_name(number)}" for number in missing)
    if missing:
        return
    row = 0
    failures: list[Failure] = []
    for number in numbers:
        shard = open_shard(directory / SHARDS / shard_name(number))
        if not _equal(index.slice(row, len(shard)), index_rows(number, shard)):
            yield INDEX_FILE
            return
        row += len(shard)
        failures += shard.failures
    if row != len(index):
        yield INDEX_FILE
    if not _equal(errors, errors_rows(failures)):
        yield ERRORS_FILE


def _equal(table: Any, expected: Any) -> bool:
    return bool(table.equals(expected))
