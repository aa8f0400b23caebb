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
from contextlib import suppress
from pathlib import Path
from typing import Any

from runtimes import Bundle, VaeRuntime
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
    pyarrow = import_pyarrow()  # first, so that a missing package fails before any work
    storage = storage or Storage()
    for name, value in (
        ("batch_size", batch_size),
        ("images_per_shard", images_per_shard),
        ("ray_workers", ray_workers),
        ("max_pixels", max_pixels),
    ):
        check_count(name, value)
    bundle = Bundle(opening.bundle)
    at_once = BatchSize(
        batch_size or DEFAULT_BATCH_SIZE, CPU_BATCH_PIXELS if batch_size is None and opening.is_cpu(bundle) else None
    )
    manifest = bundle.manifest
    storage.check(manifest)
    channels = manifest.graphs["encoder"].input.channels
    factor = max(storage.factor(manifest.latent_space), manifest.graph_space.factor)
    size_policy = SizePolicy(policy, sizes, factor, channels, max_pixels)
    workers = available_cpus() if workers is None else workers
    contract = make_contract(bundle, opening, size_policy, storage, at_once, images_per_shard)
    summary = Summary()
    with LatentDirectory(Path(out), contract) as directory, Plan(directory.path, images_per_shard) as plan:
        progress("Listing the source", 0, 1)
        summary.removed = plan.update(source).removed
        summary.images = len(plan)
        summary.skipped = directory.write_skipped(plan.skipped())
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
        summary.shards_damaged = len(directory.damaged)
        if not (directory.path / INDEX_FILE).exists() or not tables_are_current(directory.path):
            directory.begin_changes()
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
    begun: deque[ShardWork] = deque()  # shards whose images have been submitted to the decoders

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
