"""Encode a dataset on a Ray cluster. Requires `pip install 'vae-export[ray]'`.

    shard -> tasks prepare its images and group them into batches
          -> a pool of actors, each with an open bundle, encodes the batches
          -> the driver writes the shard atomically once all of its batches have returned

Batches are formed by the same code as on one machine, so the shards do not depend on the number of workers. Ray Data
throttles the tasks when the actors do not keep up, and repeats work that is lost with a worker or a node. The source
and the bundle must be at the same paths on all nodes; `out` is needed only on the node that runs the command.
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
from vae_export.dataset.items import Item, Source
from vae_export.dataset.shard_work import Opening, Reporter, ShardWork
from vae_export.dataset.shards import LatentDirectory

TASK_CPUS = 0.25  #: CPUs per preparing task; each actor requests this much less, which leaves CPUs for the tasks
Row = dict[str, Any]


class RayCluster:
    """A connection to the Ray cluster at an address, or, for "local", a cluster on this machine.

    A local cluster is shut down when the context exits.
    """

    def __init__(self, address: str, workers: int, threads: int | None) -> None:
        """Connect to a cluster that will run `workers` runtimes of `threads` threads each.

        Raises `BackendUnavailable` if no cluster answers, and `ConfigError` if this machine has too few CPUs for a
        "local" cluster.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the announced default of future Ray versions
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
        job._py_driver_sys_path = _SubsetOfSysPath()
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


class _SubsetOfSysPath(list[str]):
    """The directories that Ray prepends to `sys.path` of its workers, restricted to `sys.path` of this process.

    Without the restriction Ray would add the working directory, whatever it contains.
    """

    def extend(self, directories: Iterable[str]) -> None:
        super().extend(directory for directory in directories if directory in sys.path)


class Preparer:
    """The preparing task: turns the row of a shard into a row per batch, and a last row with the number of batches."""

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
    """The encoding actor: holds an open bundle and turns rows of batches into rows of latents."""

    def __init__(self, opening: Opening, storage: Storage, sha256: str, version: str) -> None:
        found = manifest_sha256(Bundle(opening.bundle))
        if found != sha256 or version != __version__:
            raise CompatibilityError(
                f"this node has vae-export {__version__} and a bundle with manifest {found}, but the node that runs "
                f"the job has {version} and {sha256}: install the same version and bundle on all nodes"
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
    """Encode shards on a cluster, and write each shard as soon as all of its batches have returned.

    Raises `VaeError`, or the subclass that was raised on a node, if the job fails.
    """
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
    whole: dict[int, int] = {}  # shard -> number of its parts, once known
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
        raise VaeError(f"Ray returned {len(begun)} incomplete shards; run the same command again to continue")


def _check_reachable(address: str) -> None:
    """Raise `ConnectionError` if nothing listens at HOST:PORT: Ray itself would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise ConnectionError(error.strerror or str(error)) from None


def _row(number: int, part: int, work: Any) -> Row:
    return {"shard": np.array([number]), "part": np.array([part]), "work": np.array([pickle.dumps(work)], object)}


def _as_vae_error(error: Any) -> VaeError:
    """Return the `VaeError` that was raised on a node; for other errors, one with the last line of Ray's message."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, VaeError):
            return type(cause)(str(cause))
        cause = getattr(cause, "cause", None) or cause.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return VaeError(f"Ray: {lines[-1]}; run the same command again to continue")
