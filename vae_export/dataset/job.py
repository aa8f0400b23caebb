"""Encode a whole dataset into latents; resume an interrupted job.

    list the source -> plan (assign each image to a shard) -> for each shard: decode in worker processes, encode in
    batches of one image size, write the shard atomically -> write the index

The content of a shard depends only on the images of that shard. On each run:

- a complete shard whose images are unchanged is kept;
- in a shard with some changed images, only the changed images are encoded again;
- in a missing or damaged shard, all images are encoded again.

Running the same command again therefore always ends with the same files.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from runtimes import Bundle
from runtimes.cpus import available_cpus
from runtimes.edge import check_count
from runtimes.latents.dataset import ERRORS_FILE, INDEX_FILE, import_pyarrow, manifest_sha256
from runtimes.latents.shards import SCHEMA_VERSION
from runtimes.progress import Progress, no_progress
from vae_export import __version__
from vae_export.dataset.encode import CPU_BATCH_PIXELS, DEFAULT_BATCH_SIZE, BatchSize, Storage, batches, encode_batch
from vae_export.dataset.images import Size, SizePolicy
from vae_export.dataset.items import Source
from vae_export.dataset.plan import Plan
from vae_export.dataset.ray import RayCluster, run_on_ray
from vae_export.dataset.shard_work import Opening, Reporter, ShardWork, Summary
from vae_export.dataset.shards import LatentDirectory
from vae_export.dataset.verify import tables_are_current
from vae_export.dataset.workers import Decoders, Task

__all__ = ["Opening", "Summary", "encode_dataset", "make_contract"]

_PACKAGES = ("vae-export", "numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "openvino", "jax", "tensorrt")


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
    max_pixels: int | None = None,
    progress: Progress = no_progress,
) -> Summary:
    """Encode every image of a source into the directory `out`.

    Images that already have valid latents in `out` are skipped; missing, changed and damaged ones are encoded.

    `policy` and `sizes` are the arguments of `SizePolicy`. `batch_size` is the number of images of one size per encoder
    call (default: 8, on a CPU limited to 256x256 pixels in total). `workers` is the number of decoder processes
    (default: one per CPU that this process may use). If `ray` is given, an address or "local", the job runs on Ray
    with `ray_workers` runtimes and `ray_gpus` GPUs per runtime. `max_pixels` limits the pixels of an image
    (default: Pillow's limit, 89 million). None of these options changes the files that are written, except that
    `batch_size` may change the rounding of latents.

    Images that cannot be encoded are listed in errors.parquet.

    Raises `ConfigError` if `out` holds latents of another job or the source contains none of the images of `out`, and
    `BundleError` if `out` cannot be written.
    """
    import_pyarrow()  # first, so that a missing package fails before any work
    counts = {"batch_size": batch_size, "images_per_shard": images_per_shard, "ray_workers": ray_workers}
    for name, value in {**counts, "max_pixels": max_pixels}.items():
        check_count(name, value)
    bundle, storage = Bundle(opening.bundle), storage or Storage()
    size_policy = _size_policy(bundle, storage, policy, sizes, max_pixels)
    limits = _batch_limits(bundle, opening, batch_size)
    contract = make_contract(bundle, opening, size_policy, storage, limits, images_per_shard)
    summary = Summary()
    with LatentDirectory(Path(out), contract) as directory, Plan(directory.path, images_per_shard) as plan:
        _list_source(source, plan, directory, summary, progress)
        shards = _Shards(plan, directory, summary)
        report = Reporter(summary, progress)
        if ray is None:
            _run_here(shards, source, size_policy, storage, opening, report, limits, workers)
        else:
            with RayCluster(ray, ray_workers, opening.threads) as cluster, _timed(summary):
                run_on_ray(
                    cluster, shards.numbers, shards.work, directory, report, source, size_policy, storage, opening,
                    batch_size=limits, workers=ray_workers, gpus=ray_gpus,
                )  # fmt: skip
        progress("Writing the index", summary.images, summary.images)
        shards.finish()
    return summary


def _size_policy(
    bundle: Bundle, storage: Storage, policy: str, sizes: tuple[Size, ...], max_pixels: int | None
) -> SizePolicy:
    manifest = bundle.manifest
    storage.check(manifest)
    factor = max(storage.factor(manifest.latent_space), manifest.graph_space.factor)
    return SizePolicy(policy, sizes, factor, manifest.graphs["encoder"].input.channels, max_pixels)


def _batch_limits(bundle: Bundle, opening: Opening, batch_size: int | None) -> BatchSize:
    limited = batch_size is None and opening.is_cpu(bundle)
    return BatchSize(batch_size or DEFAULT_BATCH_SIZE, CPU_BATCH_PIXELS if limited else None)


def _list_source(source: Source, plan: Plan, directory: LatentDirectory, summary: Summary, progress: Progress) -> None:
    """Assign the images of the source to shards, and write the table of skipped files."""
    progress("Listing the source", 0, 1)
    summary.removed = plan.update(source).removed
    summary.images = len(plan)
    summary.skipped = directory.write_skipped(plan.skipped())


@contextmanager
def _timed(summary: Summary) -> Iterator[None]:
    """Set `summary.seconds` to the duration of the block."""
    start = time.perf_counter()
    yield
    summary.seconds = time.perf_counter() - start


class _Shards:
    """The shards of a plan in a directory."""

    def __init__(self, plan: Plan, directory: LatentDirectory, summary: Summary) -> None:
        self.numbers = list(plan.numbers())
        self.directory = directory
        self._plan, self._summary = plan, summary

    def work(self, number: int) -> ShardWork:
        """Return the work on one shard."""
        return ShardWork(number, self._plan.items(number), self.directory.shard(number), self._summary)

    def finish(self) -> None:
        """Remove shards without images, and write the index unless it is current."""
        directory, summary = self.directory, self._summary
        for number in sorted(set(directory.numbers()) - set(self.numbers)):
            directory.begin_changes()
            directory.remove(directory.shard_path(number))
        summary.shards_damaged = len(directory.damaged)
        if not (directory.path / INDEX_FILE).exists() or not tables_are_current(directory.path):
            directory.begin_changes()
            directory.write_index()
        errors = import_pyarrow().parquet.read_metadata(directory.path / ERRORS_FILE)
        summary.failed = int(errors.num_rows)


def _run_here(
    shards: _Shards,
    source: Source,
    size_policy: SizePolicy,
    storage: Storage,
    opening: Opening,
    report: Reporter,
    batch_size: BatchSize,
    workers: int | None,
) -> None:
    """Encode all shards in this process, with images decoded in worker processes."""
    begun: deque[ShardWork] = deque()  # shards whose images have been submitted to the decoders

    def tasks() -> Iterator[Task]:
        for work in map(shards.work, shards.numbers):
            begun.append(work)
            known = work.known()
            yield from (Task(item, known.get(item.id)) for item in work.items)

    count = available_cpus() if workers is None else workers
    with Decoders(source, size_policy, count) as decoders, opening.open() as vae, _timed(report.summary):
        results = decoders.map(tasks())
        for first in results:
            work = begun.popleft()
            found = report.counted(itertools.chain([first], itertools.islice(results, len(work.items) - 1)))
            for batch in batches(work.to_encode(found), batch_size):
                start = time.perf_counter()
                encoded = encode_batch(vae, [image for _, image in batch], storage)
                report.summary.encoding_seconds += time.perf_counter() - start
                work.add_batch(batch, encoded)
            work.write(shards.directory, storage.dtype)


def make_contract(
    bundle: Bundle,
    opening: Opening,
    policy: SizePolicy,
    storage: Storage,
    batch_size: BatchSize,
    images_per_shard: int,
) -> dict[str, Any]:
    """Return the contract: the JSON-serialisable description of the latents.

    A job resumes only with the same contract, except for `encoded_with` (backend, device, package versions).
    """
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
            "latent_channels": space.normalised_channels if storage.scaled else space.channels,
            "downscale": storage.factor(space),
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
            "colours": "sRGB",
            "flips": storage.flips,
        },
        "tiling": {"kind": opening.tiling, "memory_budget": opening.memory_budget},
        "images_per_shard": images_per_shard,
        "encoded_with": [
            {
                "backend": opening.backend_of(bundle),
                "device": opening.device,
                "batch_size": batch_size.images,
                "batch_pixels": batch_size.pixels,
                "packages": packages,
            }
        ],
    }
