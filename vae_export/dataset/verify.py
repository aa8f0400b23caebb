"""Finding damage in a directory of latents: every shard against its hash, the tables against the shards."""

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

_MOST_NAMED = 10  #: damaged files that a message names


@dataclass(frozen=True)
class Verified:
    """What was read and found as it was written."""

    shards: int
    entries: int
    failures: int  #: rows of errors.parquet
    bytes: int  #: of the shards

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


def verify_latents(directory: str | Path, progress: Progress = no_progress) -> Verified:
    """Read a finished directory of latents as a whole, and compare all of it with its hashes.

    Raises `IntegrityError` that names the damaged files; `BundleError` where there are no finished latents.
    """
    directory = Path(directory)
    read_contract(directory)
    read_index(directory)  # a job that has not finished is said before all is read
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
        more = f", and {len(damaged) - _MOST_NAMED} more" if len(damaged) > _MOST_NAMED else ""
        raise IntegrityError(
            f"{directory}: damaged or missing: {', '.join(damaged[:_MOST_NAMED])}{more}. Run the encode-dataset "
            "command again: it makes them anew, and keeps the rest"
        )
    failures = len(read_parquet(directory / ERRORS_FILE, errors_schema()))
    return Verified(len(numbers), len(read_index(directory)), failures, size)


def tables_are_current(directory: Path) -> bool:
    """Whether index.parquet and errors.parquet say what the shards hold. The shards themselves are trusted."""
    try:
        return not any(_wrong_tables(directory, shard_numbers(directory)))
    except VaeError:
        return False


def _wrong_tables(directory: Path, numbers: Sequence[int]) -> Iterator[str]:
    """What is wrong in the tables, as names of files. `IntegrityError` where a file cannot be parsed."""
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
