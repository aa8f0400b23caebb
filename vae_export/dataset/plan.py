"""The plan of a job: a SQLite file that assigns each image to a shard.

The plan is on disk, so memory use does not grow with the number of images. An image keeps its position while it is in
the source; new images get the next positions, in the order of the files. With n images per shard, shard k holds the
positions from k * n to (k + 1) * n - 1. Adding or removing images therefore leaves most shards unchanged.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from runtimes.errors import BundleError, ConfigError
from vae_export.dataset.items import Item, Skipped, Source

PLAN_FILE = "plan.sqlite"

_SCHEMA = """
CREATE TABLE IF NOT EXISTS items(
    id TEXT PRIMARY KEY, position INTEGER UNIQUE, file BLOB, at INTEGER, size INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS next(position INTEGER);
CREATE TEMP TABLE listed(id TEXT PRIMARY KEY, file BLOB, at INTEGER, size INTEGER) WITHOUT ROWID;
CREATE TEMP TABLE skipped(path TEXT, reason TEXT, count INTEGER, PRIMARY KEY(path, reason)) WITHOUT ROWID;
"""


class Changes(NamedTuple):
    """Numbers of images that an update of the plan added, removed and kept."""

    added: int
    removed: int
    kept: int


class Plan:
    """An open plan of a directory of latents. Only one job may open it at a time."""

    def __init__(self, directory: Path, images_per_shard: int) -> None:
        self.images_per_shard = images_per_shard
        try:
            self._database = sqlite3.connect(directory / PLAN_FILE, isolation_level=None)
            self._database.executescript(f"PRAGMA temp_store = FILE; PRAGMA synchronous = FULL; {_SCHEMA}")
        except sqlite3.Error as error:
            raise BundleError(f"{directory / PLAN_FILE} cannot be used: {error}") from None

    def update(self, source: Source) -> Changes:
        """Replace the images of the plan by those of the source, in one transaction.

        An interrupted update leaves the plan unchanged. Raises `ConfigError` if the source is empty, contains an id
        twice, or contains none of the images of the plan, and `BundleError` if the plan cannot be written.
        """
        run = self._database.execute
        current: Item | None = None

        def following() -> Iterator[tuple[str, bytes, int, int]]:
            nonlocal current
            for item in source.items(self._skip):
                current = item
                yield item

        try:
            run("BEGIN")
            run("DELETE FROM skipped")
            self._database.executemany("INSERT INTO listed VALUES (?, ?, ?, ?)", following())
            before, (listed,) = len(self), run("SELECT count(*) FROM listed").fetchone()
            if not listed:
                raise ConfigError(f"the source has no images{self._skipped_in_words()}")
            run("DELETE FROM items WHERE id NOT IN (SELECT id FROM listed)")
            kept = len(self)
            if before and not kept:
                raise ConfigError(
                    f"none of the {before} images whose latents are here is in the source: another source? Its "
                    "latents need another --out"
                )
            run(
                "UPDATE items SET file = listed.file, at = listed.at, size = listed.size FROM listed "
                "WHERE listed.id = items.id AND (listed.file, listed.at, listed.size) != "
                "(items.file, items.at, items.size)"
            )
            following_position = (run("SELECT position FROM next").fetchone() or (0,))[0]
            run(
                "INSERT INTO items SELECT id, ? + row_number() OVER (ORDER BY file, at, id) - 1, file, at, size "
                "FROM listed WHERE id NOT IN (SELECT id FROM items)",
                (following_position,),
            )
            added = len(self) - kept
            run("DELETE FROM next")
            run("INSERT INTO next VALUES (?)", (following_position + added,))
            run("DELETE FROM listed")
            run("COMMIT")
        except sqlite3.IntegrityError:
            run("ROLLBACK")
            assert current is not None
            raise ConfigError(f"the id {current.id!r} is in the source twice; ids must be unique") from None
        except sqlite3.Error as error:  # SQLite has already rolled back, for instance because the disk is full
            raise BundleError(f"the plan cannot be written: {error}") from None
        except BaseException:
            run("ROLLBACK")
            raise
        return Changes(added, before - kept, kept)

    def _skip(self, skipped: Skipped) -> None:
        self._database.execute(
            "INSERT INTO skipped VALUES (?, ?, 1) ON CONFLICT DO UPDATE SET count = count + 1", skipped
        )

    def skipped(self) -> Iterator[tuple[str, str, int]]:
        """Return (path, reason, count) of everything the last update skipped, sorted by path and reason."""
        return iter(self._database.execute("SELECT path, reason, count FROM skipped ORDER BY path, reason"))

    def _skipped_in_words(self) -> str:
        query = "SELECT sum(count), reason FROM skipped GROUP BY reason ORDER BY reason"
        found = "; ".join(f"{count} skipped ({reason})" for count, reason in self._database.execute(query))
        return f": {found}" if found else ""

    def __len__(self) -> int:
        return int(self._database.execute("SELECT count(*) FROM items").fetchone()[0])

    def numbers(self) -> Iterator[int]:
        """Yield the numbers of the shards that have images, in ascending order."""
        start = 0
        while True:
            query = "SELECT min(position) FROM items WHERE position >= ?"
            found = self._database.execute(query, (start,)).fetchone()[0]
            if found is None:
                return
            yield (number := found // self.images_per_shard)
            start = (number + 1) * self.images_per_shard

    def items(self, number: int) -> list[Item]:
        """Return the images of a shard, in order of position."""
        bounds = number * self.images_per_shard, (number + 1) * self.images_per_shard
        query = "SELECT id, file, at, size FROM items WHERE position >= ? AND position < ? ORDER BY position"
        return [Item(*row) for row in self._database.execute(query, bounds)]

    def __enter__(self) -> Plan:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._database.close()
