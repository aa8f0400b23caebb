"""Worker processes that read, decode and resize images ahead of the backend, and return them in order."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import NamedTuple

from runtimes import children
from vae_export.dataset.images import Broken, Prepared, SizePolicy, Unchanged, prepare
from vae_export.dataset.items import Item, Source

CHUNK_BYTES = 8 << 20  #: approximate bytes of pixels per chunk, the unit of work of a process
MAX_CHUNK_IMAGES = 64  #: maximum number of images in a chunk

Result = Unchanged | Broken | Prepared


class Task(NamedTuple):
    """An image to prepare. `known` is the sha256 of the file for which latents already exist, or None."""

    item: Item
    known: bytes | None


class Decoders:
    """A pool of `workers` processes that prepare images. With 0 workers, this process prepares them itself.

    An image whose decoding kills its process becomes `Broken`; the other images of its chunk are decoded again.
    """

    def __init__(self, source: Source, policy: SizePolicy, workers: int) -> None:
        self._given = source, policy
        self._workers = workers
        self._pool = self._start(workers) if workers else None
        self._chunk = 4

    def map(self, tasks: Iterable[Task]) -> Iterator[tuple[Item, Result]]:
        """Yield (item, result) for every task, in order. At most 2 * `workers` + 2 chunks are submitted ahead."""
        if self._pool is None:
            yield from ((item, prepare(self._given[0], item, known, self._given[1])) for item, known in tasks)
            return
        tasks = iter(tasks)
        ahead: deque[tuple[list[Task], Future[list[Result]]]] = deque()
        while True:
            while len(ahead) < 2 * self._workers + 2:
                chunk = list(itertools.islice(tasks, self._chunk))
                if not chunk:
                    break
                ahead.append((chunk, self._pool.submit(_prepare, chunk)))
            if not ahead:
                return
            chunk, future = ahead.popleft()
            try:
                results = future.result()
            except BrokenProcessPool:
                self._pool.shutdown()
                results = [self._prepare_alone(task) for task in chunk]
                self._pool = self._start(self._workers)
                ahead = deque((after, self._pool.submit(_prepare, after)) for after, _ in ahead)
            size = sum(result.pixels.nbytes for result in results if isinstance(result, Prepared)) // len(results)
            self._chunk = min(max(CHUNK_BYTES // (size + 1), 1), MAX_CHUNK_IMAGES)
            yield from zip((item for item, _ in chunk), results, strict=True)

    def _prepare_alone(self, task: Task) -> Result:
        with self._start(1) as pool:
            try:
                return pool.submit(_prepare, [task]).result()[0]
            except BrokenProcessPool:
                return Broken(None, "the process that decoded it died")

    def _start(self, workers: int) -> ProcessPoolExecutor:
        context = children.spawn_context()  # not fork: the threads of a backend do not survive it
        return ProcessPoolExecutor(workers, mp_context=context, initializer=_initialize, initargs=self._given)

    def __enter__(self) -> Decoders:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


_given: list[tuple[Source, SizePolicy]] = []  #: set by `_initialize` in each worker process


def _initialize(source: Source, policy: SizePolicy) -> None:
    _given.append((source, policy))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C and ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when the main process ends: after a kill of the main process, nothing else would end it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _prepare(tasks: list[Task]) -> list[Result]:
    source, policy = _given[0]
    return [prepare(source, item, known, policy) for item, known in tasks]
