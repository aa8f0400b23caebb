"""A GPU of host memory, for tests of the TensorRT runtime where there is none.

What is put on a stream is done when someone waits for the stream, and not before: who forgets to wait reads nothing.
Memory that was never allocated, is freed, too small or not aligned is found when it is used. Rules that were broken are
kept in `gpu.violations`, since an exception in another thread may go unseen; each also raises `Violation`.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from typing import Any

ALIGNMENT = 256
POISON = 0xFF  # what memory holds that nobody has written to: NaN, as a float of any size


class Violation(AssertionError):
    """What a real GPU would answer with a crash or with garbage."""


class Answer:
    """A bool that must be looked at: TensorRT says False, and goes on, where something is wrong."""

    def __init__(self, value: bool, call: str) -> None:
        self._value, self._call, self._seen = value, call, False

    def __bool__(self) -> bool:
        self._seen = True
        return self._value

    def __del__(self) -> None:
        if not self._seen and gpu is not None:  # None when the interpreter ends
            gpu.violate(f"the answer of {self._call} was not looked at")


class Gpu:
    """One device. `total` bytes of memory; what it is asked for beyond that is refused."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.count = int(os.environ.get("FAKE_GPU_COUNT", "1"))
        self.capability = tuple(map(int, os.environ.get("FAKE_GPU_CAPABILITY", "8.9").split(".")))
        self.total = 8 << 30
        self.largest_total = 0  # bytes that were in use at once
        self.blocks: dict[int, tuple[Any, int]] = {}  # address -> (its memory, its size)
        self.streams: dict[int, list[Callable[[], None]]] = {}
        self.captures: dict[int, list[Callable[[], None]]] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.deserialized = 0  # plans
        self.contexts: list[int] = []  # the profile of each that was made
        self.launched = 0  # graphs
        self.executed = 0  # contexts
        self.copied = {"to device": 0, "to host": 0}  # bytes
        self.refused_graphs = False  # end of a capture fails
        self.violations: list[str] = []
        self.devices: set[int] = set()  # that were chosen
        self._thread = threading.local()
        self.lock = threading.RLock()
        self._next = 1

    def check(self, holds: bool, rule: str) -> None:
        if not holds:
            self.violate(rule)
            raise Violation(rule)

    def violate(self, rule: str) -> None:
        self.violations.append(rule)
        if "FAKE_GPU_VIOLATIONS" in os.environ:  # a file, for processes of their own
            with open(os.environ["FAKE_GPU_VIOLATIONS"], "a") as file:
                file.write(f"{rule}\n")

    def use(self, index: int) -> None:
        self._thread.device = index
        self.devices.add(index)

    def check_device(self, call: str) -> None:
        """Without cudaSetDevice a thread is at work on device 0, whatever was meant."""
        self.check(hasattr(self._thread, "device"), f"{call} in a thread that has not said which device it means")

    def new(self) -> int:
        with self.lock:
            self._next += 1
            return self._next

    # Memory

    @property
    def used(self) -> int:
        return sum(size for _, size in self.blocks.values())

    def allocate(self, size: int) -> int | None:
        with self.lock:
            if self.used + size > self.total:
                return None
            memory = ctypes.create_string_buffer(size + ALIGNMENT)
            address = -(-ctypes.addressof(memory) // ALIGNMENT) * ALIGNMENT
            ctypes.memset(address, POISON, size)
            self.blocks[address] = (memory, size)
            self.largest_total = max(self.largest_total, self.used)
            return address

    def free(self, address: int) -> None:
        with self.lock:
            self.check(address in self.blocks, f"cudaFree of {address:#x}, which is not allocated")
            del self.blocks[address]

    def require(self, address: int, size: int, what: str) -> None:
        """`size` bytes from `address` on are allocated."""
        with self.lock:
            inside = any(a <= address and address + size <= a + n for a, (_, n) in self.blocks.items())
        self.check(inside, f"{what} of {size} bytes at {address:#x} is not in allocated memory")

    # Streams

    def put(self, stream: int, work: Callable[[], None]) -> None:
        with self.lock:
            self.check(stream in self.streams, f"stream {stream} is the default one, or does not exist")
            (self.captures.get(stream) if stream in self.captures else self.streams[stream]).append(work)

    def wait(self, stream: int) -> None:
        with self.lock:
            self.check(stream in self.streams, f"stream {stream} does not exist")
            self.check(stream not in self.captures, "waiting for a stream while it is captured")
            work, self.streams[stream] = self.streams[stream], []
        for step in work:
            step()


gpu = Gpu()
