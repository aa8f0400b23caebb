"""The parts of a job that local and Ray execution share: opening the bundle, collecting a shard, reporting progress."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from runtimes import Bundle, VaeRuntime, open_vae
from runtimes.backends import BACKENDS, backend_for
from runtimes.edge import device_name
from runtimes.latents.shards import Array, Failure, Shard
from runtimes.progress import Progress
from vae_export.dataset.encode import Batch, PreparedItem
from vae_export.dataset.images import Broken, Prepared
from vae_export.dataset.items import Item
from vae_export.dataset.shards import Entry, LatentDirectory, entries_of, write_shard
from vae_export.dataset.workers import Result


@dataclass(frozen=True)
class Opening:
    """The arguments of `open_vae`, for this process or a worker process."""

    bundle: str
    backend: str | None = None
    device: str | None = None
    tiling: str | None = None
    memory_budget: str | None = None
    threads: int | None = None

    def backend_of(self, bundle: Bundle) -> str:
        """Return the name of the backend that opens the bundle."""
        return backend_for(bundle.manifest.target, self.backend)

    def is_cpu(self, bundle: Bundle) -> bool:
        """Return whether the bundle runs on the CPU."""
        return device_name(self.device or BACKENDS[self.backend_of(bundle)].default_device) == "cpu"

    def open(self) -> VaeRuntime:
        """Open the bundle with these arguments."""
        options: dict[str, Any] = {} if self.threads is None else {"threads": self.threads}
        return open_vae(
            self.bundle,
            backend=self.backend,
            device=self.device,
            tiling=self.tiling,
            memory_budget=self.memory_budget,
            **options,
        )


@dataclass
class Summary:
    """The outcome of a job. Fields count images unless their comment says otherwise."""

    images: int = 0  #: in the source
    encoded: int = 0
    unchanged: int = 0
    removed: int = 0
    failed: int = 0  #: listed in errors.parquet
    skipped: int = 0  #: files, folders and links of the source that are not images, listed in skipped.parquet
    shards_written: int = 0
    shards_damaged: int = 0  #: shards that did not match their hash and were rewritten
    seconds: float = 0.0  #: duration from the first image to the last shard
    encoding_seconds: float = 0.0  #: time in the backend; on Ray, summed over all workers

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the rates derived from them as a JSON-serialisable dictionary."""
        busy = self.encoding_seconds / self.seconds if self.seconds else 0.0
        rate = self.encoded / self.seconds if self.seconds else 0.0
        return {**asdict(self), "images_per_second": round(rate, 3), "backend_busy": round(busy, 4)}


@dataclass
class ShardWork:
    """An unfinished shard: its images, the existing shard of an earlier job if there is one, and the results so far."""

    number: int
    items: list[Item]
    old: Shard | None
    summary: Summary
    encoded: dict[str, list[Entry]] = field(default_factory=dict)
    broken: dict[str, Failure] = field(default_factory=dict)

    def known(self) -> dict[str, bytes]:
        """Return {id: sha256} of the images that an earlier job encoded or found broken.

        All other images of the shard must be encoded.
        """
        if self.old is None:
            return {}
        known = {id: sha256.tobytes() for id, sha256 in zip(self.old.ids, self.old.sha256, strict=True)}
        return known | {failure.id: failure.sha256 for failure in self.old.failures if failure.sha256 is not None}

    def to_encode(self, found: Iterable[tuple[Item, Result]]) -> Iterator[PreparedItem]:
        """Yield the images that must be encoded; record those that are broken or unchanged."""
        for item, result in found:
            if isinstance(result, Prepared):
                yield item, result
            elif isinstance(result, Broken):
                self.add_broken(item, result)
            else:
                self.summary.unchanged += 1

    def add_broken(self, item: Item, broken: Broken) -> None:
        """Record an image that cannot be encoded."""
        self.broken[item.id] = Failure(item.id, *broken)

    def add_batch(self, batch: Batch, results: Sequence[list[Array] | Broken]) -> None:
        """Record the results of `encode_batch` for a batch."""
        for (item, image), result in zip(batch, results, strict=True):
            if isinstance(result, Broken):
                self.add_broken(item, result)
                continue
            about = image.sha256, image.original_size, image.resized, image.crop
            self.encoded[item.id] = [Entry(item.id, bool(flip), *about, each) for flip, each in enumerate(result)]
            self.summary.encoded += 1

    def write(self, directory: LatentDirectory, dtype: str) -> None:
        """Write the shard, unless the existing one has the same content."""
        old: dict[str, list[Entry]] = {}
        for entry in entries_of(self.old) if self.old is not None else ():
            old.setdefault(entry.id, []).append(entry)
        old_failures = {failure.id: failure for failure in (self.old.failures if self.old is not None else ())}
        entries, failures = [], []
        for item in self.items:
            broken = self.broken.get(item.id)
            if broken is None and item.id not in self.encoded:
                broken = old_failures.get(item.id)
            if broken is not None:
                failures.append(broken)
            else:
                entries += self.encoded[item.id] if item.id in self.encoded else old[item.id]
        ids = {entry.id for entry in entries}
        if self.old is not None and not self.encoded and failures == self.old.failures and ids == old.keys():
            return
        directory.begin_changes()
        write_shard(directory.shard_path(self.number), entries, failures, dtype)
        self.summary.shards_written += 1


class Reporter:
    """Count finished images and report speed and remaining time, at most five times a second."""

    def __init__(self, summary: Summary, progress: Progress) -> None:
        self.summary, self._progress = summary, progress
        self.done = self.broken = 0
        self._start = self._shown = time.perf_counter()

    def counted(self, found: Iterable[tuple[Item, Result]]) -> Iterator[tuple[Item, Result]]:
        """Yield the prepared images and count each one once the consumer asks for the next."""
        for item, result in found:
            yield item, result
            self.add(1, isinstance(result, Broken))

    def add(self, done: int, broken: int) -> None:
        """Count `done` finished images, of which `broken` failed, and report progress if a report is due."""
        self.done, self.broken = self.done + done, self.broken + broken
        now = time.perf_counter()
        if now - self._shown < 0.2:
            return
        self._shown = now
        rate = self.done / (now - self._start)
        left = time.strftime("%H:%M:%S", time.gmtime((self.summary.images - self.done) / rate))
        days = int((self.summary.images - self.done) / rate // 86400)
        self._progress(
            f"{self.done:,} of {self.summary.images:,} images, {rate:.1f} images/s, "
            f"{f'{days} days ' if days else ''}{left} left, {self.broken:,} errors",
            self.done,
            self.summary.images,
        )
