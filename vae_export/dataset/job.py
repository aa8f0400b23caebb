"""Latents for a whole dataset: plan, encode, write, and go on where a job was interrupted.

    list the source -> plan (which image in which shard) -> for each shard: decode in worker processes, encode in
    batches of one size, write it whole -> index

A shard is its images' and nobody else's: it is complete, or it is not there, or its images are not what they were, and
then they alone are encoded. So whatever happened before, running the same command again ends with the same files.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from runtimes import BACKENDS_OF_TARGET, Bundle, VaeRuntime, open_vae
from runtimes.edge import check_count
from runtimes.latents.dataset import ERRORS_FILE, INDEX_FILE, import_pyarrow, manifest_sha256
from runtimes.latents.shards import SCHEMA_VERSION, Array, Failure, Shard
from vae_export import __version__
from vae_export.dataset.encode import CACHED, MOST_AT_ONCE, Batch, BatchSize, Found, Storage, batches, encode_batch
from vae_export.dataset.images import Broken, Prepared, Size, SizePolicy
from vae_export.dataset.plan import Changes, Plan
from vae_export.dataset.shards import Entry, LatentDirectory, entries_of, write_shard
from vae_export.dataset.sources import Item, Source
from vae_export.dataset.workers import Decoders, Result, Task

Progress = Callable[[str, int, int], None]
_PACKAGES = ("vae-export", "numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "openvino", "jax", "tensorrt")


@dataclass(frozen=True)
class Opening:
    """How the bundle is opened, here or in a worker: as the arguments of `open_vae`."""

    bundle: str
    backend: str | None = None
    device: str | None = None
    tiling: str | None = None
    memory_budget: str | None = None
    threads: int | None = None

    def backend_of(self, bundle: Bundle) -> str:
        return self.backend or BACKENDS_OF_TARGET[bundle.manifest.target][0]

    def is_cpu(self, bundle: Bundle) -> bool:
        """Whether it runs there, which is `open_vae`'s default but for TensorRT."""
        return (self.device or ("cuda" if self.backend_of(bundle).startswith("tensorrt") else "cpu")) == "cpu"

    def open(self) -> VaeRuntime:
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
    """What a job did. Numbers of images, unless they say otherwise."""

    images: int = 0  #: in the source
    encoded: int = 0
    unchanged: int = 0
    removed: int = 0
    failed: int = 0  #: listed in errors.parquet
    shards_written: int = 0
    seconds: float = 0.0  #: from the first image to the last shard
    encoding_seconds: float = 0.0  #: of these, in the backend

    def to_dict(self) -> dict[str, Any]:
        busy = self.encoding_seconds / self.seconds if self.seconds else 0.0
        rate = self.encoded / self.seconds if self.seconds else 0.0
        return {**asdict(self), "images_per_second": round(rate, 3), "backend_busy": round(busy, 4)}


@dataclass
class ShardWork:
    """A shard in the making: its images, what is there of it, and what has come of them so far."""

    number: int
    items: list[Item]
    old: Shard | None
    summary: Summary
    encoded: dict[str, list[Entry]] = field(default_factory=dict)
    broken: dict[str, Failure] = field(default_factory=dict)

    def known(self) -> dict[str, bytes]:
        """id -> sha256 of the images that need not be encoded unless they have changed."""
        if self.old is None:
            return {}
        known = {id: sha256.tobytes() for id, sha256 in zip(self.old.ids, self.old.sha256, strict=True)}
        return known | {failure.id: failure.sha256 for failure in self.old.failures if failure.sha256 is not None}

    def to_encode(self, found: Iterable[tuple[Item, Result]]) -> Iterator[Found]:
        """What is to be encoded; of the others it is noted here what they are."""
        for item, result in found:
            if isinstance(result, Prepared):
                yield item, result
            elif isinstance(result, Broken):
                self.add_broken(item, result)
            else:
                self.summary.unchanged += 1

    def add_broken(self, item: Item, broken: Broken) -> None:
        self.broken[item.id] = Failure(item.id, *broken)

    def add_batch(self, batch: Batch, results: Sequence[list[Array] | Broken]) -> None:
        """What `encode_batch` made of a batch."""
        for (item, image), result in zip(batch, results, strict=True):
            if isinstance(result, Broken):
                self.add_broken(item, result)
                continue
            about = image.sha256, image.original_size, image.resized, image.crop
            self.encoded[item.id] = [Entry(item.id, bool(flip), *about, each) for flip, each in enumerate(result)]
            self.summary.encoded += 1

    def write(self, directory: LatentDirectory, dtype: str) -> None:
        """Write the shard, unless it is there and nothing has changed."""
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


def encode_dataset(
    source: Source,
    out: str | Path,
    opening: Opening,
    *,
    policy: str = "none",
    sizes: tuple[Size, ...] = (),
    storage: Storage | None = None,
    batch_size: int | None = None,
    images_per_shard: int = 2048,
    workers: int | None = None,
    ray: str | None = None,
    ray_workers: int = 1,
    ray_gpus: float = 0.0,
    progress: Progress = lambda what, done, total: None,
) -> Summary:
    """Encode every image of a source into the directory `out`, or do what is left of it.

    `policy` and `sizes` are those of `SizePolicy`. `batch_size` images of one size are encoded at once (default: 8,
    and on a CPU no more than have 256x256 pixels in all). `workers` is the number of processes that decode (default:
    one for each core). With `ray`, an address or "local", the work is done on Ray by `ray_workers` runtimes, with
    `ray_gpus` each. None of this changes what is written, nor does `batch_size` but for rounding.

    Images that cannot be encoded are listed in errors.parquet. Raises `ConfigError` where `out` holds other latents or
    the source has none of its images, `BundleError` where `out` cannot be written.
    """
    pyarrow = import_pyarrow()  # now, not when all is encoded
    storage = storage or Storage()
    for name, value in (
        ("batch_size", batch_size),
        ("images_per_shard", images_per_shard),
        ("ray_workers", ray_workers),
    ):
        check_count(name, value)
    bundle = Bundle(opening.bundle)
    at_once = BatchSize(batch_size or MOST_AT_ONCE, CACHED if batch_size is None and opening.is_cpu(bundle) else None)
    storage.check(bundle.manifest.latent_space)
    size_policy = SizePolicy(policy, sizes, bundle.manifest.latent_space.factor)
    workers = (os.cpu_count() or 1) if workers is None else workers
    contract = make_contract(bundle, opening, size_policy, storage, at_once, images_per_shard)
    summary = Summary()
    with LatentDirectory(Path(out), contract) as directory, Plan(directory.path, images_per_shard) as plan:
        progress("Listing the source", 0, 1)
        changes: Changes = plan.update(source.items())
        summary.images, summary.removed = len(plan), changes.removed
        report = Reporter(summary, progress)

        def work_of(number: int) -> ShardWork:
            return ShardWork(number, plan.items(number), directory.shard(number), summary)

        start = time.perf_counter()
        numbers = list(plan.numbers())
        if ray is None:
            with Decoders(source, size_policy, workers) as decoders, opening.open() as vae:
                start = time.perf_counter()
                _run_here(map(work_of, numbers), decoders, vae, directory, storage, at_once, report)
        else:
            from vae_export.dataset.ray import RayCluster, run_on_ray

            with RayCluster(ray, ray_workers, opening.threads) as cluster:
                start = time.perf_counter()
                run_on_ray(
                    cluster, numbers, work_of, directory, report, source, size_policy, storage, opening,
                    batch_size=at_once, workers=ray_workers, gpus=ray_gpus,
                )  # fmt: skip
        for number in sorted(set(directory.numbers()) - set(numbers)):
            directory.begin_changes()
            directory.remove(directory.shard_path(number))
        summary.seconds = time.perf_counter() - start
        progress("Writing the index", summary.images, summary.images)
        if not (directory.path / INDEX_FILE).exists():
            directory.write_index()
        summary.failed = int(pyarrow.parquet.read_metadata(directory.path / ERRORS_FILE).num_rows)
    return summary


def _run_here(
    works: Iterator[ShardWork],
    decoders: Decoders,
    vae: VaeRuntime,
    directory: LatentDirectory,
    storage: Storage,
    batch_size: BatchSize,
    report: Reporter,
) -> None:
    begun: deque[ShardWork] = deque()  # the decoders are ahead

    def tasks() -> Iterator[Task]:
        for work in works:
            begun.append(work)
            known = work.known()
            yield from (Task(item, known.get(item.id)) for item in work.items)

    results = decoders.map(tasks())
    for first in results:
        work = begun.popleft()
        found = report.counted(itertools.chain([first], itertools.islice(results, len(work.items) - 1)))
        for batch in batches(work.to_encode(found), batch_size):
            start = time.perf_counter()
            encoded = encode_batch(vae, [image for _, image in batch], storage)
            report.summary.encoding_seconds += time.perf_counter() - start
            work.add_batch(batch, encoded)
        work.write(directory, storage.dtype)


class Reporter:
    """What the progress bar says."""

    def __init__(self, summary: Summary, progress: Progress) -> None:
        self.summary, self._progress = summary, progress
        self.done = self.broken = 0
        self._start = self._shown = time.perf_counter()

    def counted(self, found: Iterable[tuple[Item, Result]]) -> Iterator[tuple[Item, Result]]:
        for item, result in found:
            yield item, result
            self.add(1, isinstance(result, Broken))

    def add(self, done: int, broken: int) -> None:
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


def make_contract(
    bundle: Bundle,
    opening: Opening,
    policy: SizePolicy,
    storage: Storage,
    batch_size: BatchSize,
    images_per_shard: int,
) -> dict[str, Any]:
    """What the latents are. All of it must be the same when a job goes on, but for `encoded_with`: with what."""
    manifest, space = bundle.manifest, bundle.manifest.latent_space
    packages = {"vae-export": __version__}
    for name in _PACKAGES[1:]:
        with suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    return {
        "schema_version": SCHEMA_VERSION,
        "vae": {
            "weights_sha256": manifest.source.get("weights_sha256"),
            "manifest_sha256": manifest_sha256(bundle),
            "target": manifest.target,
            "precision": manifest.precision,
            "latent_channels": space.channels,
            "downscale": space.factor,
        },
        "stored": storage.stored,
        "seed": storage.seed if storage.stored == "sample" else None,
        "scaled": storage.scaled,
        "affine": space.affine,  # scaled = (raw - add) * multiply
        "dtype": storage.dtype,
        "preprocessing": {
            "policy": policy.policy,
            "sizes": [list(size) for size in policy.sizes],
            "resample": "lanczos",
            "flips": storage.flips,
        },
        "tiling": {"kind": opening.tiling, "memory_budget": opening.memory_budget},
        "images_per_shard": images_per_shard,
        "encoded_with": [
            {
                "backend": opening.backend_of(bundle),
                "device": opening.device,
                "batch_size": batch_size.most,
                "batch_pixels": batch_size.pixels,
                "packages": packages,
            }
        ],
    }
