"""Encoding a dataset on a Ray cluster: `pip install 'vae-export[ray]'`.

    shard -> its images, prepared and grouped into batches (tasks)
          -> the batches' latents (a pool of actors, each with an opened bundle)
          -> here: the shard, written whole when all of its batches are back

The code that forms batches is the same as on one machine, so the shards are the same, however many workers there are.
Ray Data holds back tasks when the actors do not keep up, and repeats the work that was lost with a worker or a node.
Source and bundle must be at the same paths on all nodes; `out` is needed only on the node that runs the command.
"""

from __future__ import annotations

import importlib
import logging
import os
import pickle
import socket
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any

import numpy as np

from runtimes import Bundle, children
from runtimes.cpus import available_cpus
from runtimes.errors import BackendUnavailable, CompatibilityError, ConfigError, NotInstalled, VaeError
from runtimes.latents.dataset import manifest_sha256
from vae_export import __version__
from vae_export.dataset.encode import BatchSize, Storage, batches, encode_batch
from vae_export.dataset.images import Broken, Prepared, SizePolicy, Unchanged, prepare
from vae_export.dataset.shard_work import Opening, Reporter, ShardWork
from vae_export.dataset.shards import LatentDirectory
from vae_export.dataset.sources import Item, Source

TASK_CPUS = 0.25  #: CPUs of a preparing task; each actor asks for that much less, which leaves room for the tasks
Row = dict[str, Any]


class RayCluster:
    """A connection to Ray at an address, or, for "local", a cluster of this machine alone that ends with it."""

    def __init__(self, address: str, workers: int, threads: int | None) -> None:
        """Connect for `workers` runtimes of `threads` threads each. Raises `BackendUnavailable` where no cluster is
        found, and `ConfigError` where "local" has too few CPUs for them."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # as Ray is going to have it
        try:
            self.ray: Any = importlib.import_module("ray")
            self.data: Any = importlib.import_module("ray.data")
        except ModuleNotFoundError as error:
            raise NotInstalled(f"--ray needs {error.name}: pip install 'vae-export[ray]'") from None
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        cores = available_cpus()
        if address == "local" and workers * (threads or 1) > cores:
            raise ConfigError(
                f"{workers} runtimes of {threads or 1} CPUs each do not fit "
                f"the {cores} CPUs that this process may use: fewer --ray-workers or --threads"
            )
        self._ours = not self.ray.is_initialized()
        if not self._ours:
            return
        job = self.ray.job_config.JobConfig()
        job._py_driver_sys_path = _OfOurPath()
        try:
            local = {"num_cpus": cores, "include_dashboard": False} if address == "local" else {}
            if address != "local":
                _check_reachable(address)
            with children.safe_path():
                self.ray.init(address=address, job_config=job, **quiet, **local)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise BackendUnavailable(f"no Ray cluster at {address!r}: {str(error).splitlines()[0]}") from None

    def __enter__(self) -> RayCluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._ours:
            self.ray.shutdown()


class _OfOurPath(list[str]):
    """Directories that Ray puts first on the path of its workers: only those that are on the path of this process.

    Ray would add the working directory, whatever lies there.
    """

    def extend(self, directories: Iterable[str]) -> None:
        super().extend(directory for directory in directories if directory in sys.path)


class Preparer:
    """The task: a shard's row -> rows of batches, and at the end one that says how many there were."""

    def __init__(self, source: Source, policy: SizePolicy, batch_size: BatchSize) -> None:
        self.source, self.policy, self.batch_size = source, policy, batch_size

    def __call__(self, rows: Row) -> Iterator[Row]:
        for number, packed in zip(rows["shard"].tolist(), rows["work"], strict=True):
            items, known = pickle.loads(zlib.decompress(packed))
            others: list[tuple[Item, Broken | Unchanged]] = []
            parts = 0
            for batch in batches(self._to_encode(items, known, others), self.batch_size):
                yield _row(number, parts, batch)
                parts += 1
            yield _row(number, -1, (parts, others))

    def _to_encode(
        self, items: Sequence[Item], known: dict[str, bytes], others: list[tuple[Item, Broken | Unchanged]]
    ) -> Iterator[tuple[Item, Prepared]]:
        for item in items:
            result = prepare(self.source, item, known.get(item.id), self.policy)
            if isinstance(result, Prepared):
                yield item, result
            else:
                others.append((item, result))


class Encoder:
    """The actor: an opened bundle, that turns the rows of batches into rows of latents."""

    def __init__(self, opening: Opening, storage: Storage, sha256: str, version: str) -> None:
        found = manifest_sha256(Bundle(opening.bundle))
        if found != sha256 or version != __version__:
            raise CompatibilityError(
                f"this node has vae-export {__version__} and a bundle of manifest {found}, the one that runs the job "
                f"{version} and {sha256}: give all nodes the same"
            )
        self.vae, self.storage = opening.open(), storage

    def __call__(self, rows: Row) -> Iterator[Row]:
        for number, part, packed in zip(rows["shard"].tolist(), rows["part"].tolist(), rows["work"], strict=True):
            if part < 0:
                yield _row(number, part, pickle.loads(packed))
                continue
            start = time.perf_counter()
            batch = pickle.loads(packed)
            results = encode_batch(self.vae, [image for _, image in batch], self.storage)
            about = [(item, image._replace(pixels=np.zeros((0, 0, 3), np.uint8))) for item, image in batch]
            yield _row(number, part, (about, results, time.perf_counter() - start))


def run_on_ray(
    cluster: RayCluster,
    numbers: Sequence[int],
    work_of: Callable[[int], ShardWork],
    directory: LatentDirectory,
    report: Reporter,
    source: Source,
    policy: SizePolicy,
    storage: Storage,
    opening: Opening,
    *,
    batch_size: BatchSize,
    workers: int,
    gpus: float,
) -> None:
    """Encode shards on a cluster, and write each as soon as all of it is back."""
    context = cluster.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    rows = []
    for number in numbers:
        work = work_of(number)
        rows.append({"shard": number, "work": zlib.compress(pickle.dumps((work.items, work.known())), 1)})
    sha256 = manifest_sha256(Bundle(opening.bundle))
    encoded = (
        cluster.data.from_items(rows, override_num_blocks=len(rows))
        .map_batches(Preparer(source, policy, batch_size).__call__, batch_size=1, num_cpus=TASK_CPUS)
        .map_batches(
            Encoder,
            batch_size=1,
            concurrency=workers,
            num_cpus=(opening.threads or 1) - TASK_CPUS,
            num_gpus=gpus or None,
            fn_constructor_args=(opening, storage, sha256, __version__),
        )
    )
    try:
        _collect(encoded.iter_rows(), work_of, directory, storage, report)
    except cluster.ray.exceptions.RayError as error:
        raise _as_vae_error(error) from None


def _collect(
    rows: Iterator[Row],
    work_of: Callable[[int], ShardWork],
    directory: LatentDirectory,
    storage: Storage,
    report: Reporter,
) -> None:
    begun: dict[int, tuple[ShardWork, set[int]]] = {}
    whole: dict[int, int] = {}  # number of parts of a shard, as soon as it is known
    for row in rows:
        number, part = int(row["shard"]), int(row["part"])
        work, parts = begun.setdefault(number, None) or (work_of(number), set())  # type: ignore[arg-type]
        begun[number] = work, parts
        if part < 0:
            whole[number], others = pickle.loads(row["work"])
            list(work.to_encode(others))
            report.add(len(others), sum(isinstance(result, Broken) for _, result in others))
        elif part not in parts:
            batch, results, seconds = pickle.loads(row["work"])
            work.add_batch(batch, results)
            parts.add(part)
            report.summary.encoding_seconds += seconds
            report.add(len(batch), sum(isinstance(result, Broken) for result in results))
        if whole.get(number) == len(parts):
            work.write(directory, storage.dtype)
            del begun[number], whole[number]
    if begun:
        raise VaeError(f"Ray gave back {len(begun)} shards in part; run the same command again, it goes on")


def _check_reachable(address: str) -> None:
    """`ConnectionError` where nothing listens at HOST:PORT: Ray itself would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise ConnectionError(error.strerror or str(error)) from None


def _row(number: int, part: int, work: Any) -> Row:
    return {"shard": np.array([number]), "part": np.array([part]), "work": np.array([pickle.dumps(work)], object)}


def _as_vae_error(error: Any) -> VaeError:
    """The `VaeError` that was raised on a node; for other errors, the last line of Ray's message."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, VaeError):
            return type(cause)(str(cause))
        cause = getattr(cause, "cause", None) or cause.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return VaeError(f"Ray: {lines[-1]}; run the same command again, it goes on")
