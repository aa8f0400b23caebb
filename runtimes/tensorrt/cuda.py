"""The few CUDA calls that a TensorRT runtime needs, through NVIDIA's cuda-python: no PyTorch."""

from __future__ import annotations

import importlib
from typing import Any

from runtimes.errors import BackendUnavailable, NotInstalled, OutOfMemoryError, VaeError

ALIGNMENT = 256  #: bytes; cudaMalloc keeps to it, and TensorRT asks for it


def load_cuda() -> Any:
    """The module of CUDA's runtime API; `BackendUnavailable` where it or the driver is missing."""
    for name in ("cuda.bindings.runtime", "cuda.cudart"):  # the second is what it was called before 12.6
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise NotInstalled(
        "cuda-python is not installed: pip install 'vae-export[tensorrt]', or 'vae-export[rtx]' for TensorRT-RTX"
    )


class Cuda:
    """CUDA's runtime on one device. Every call checks its status; memory that is not there is `OutOfMemoryError`."""

    def __init__(self, index: int = 0) -> None:
        self._api = load_cuda()
        self.index = index
        count = self._count()
        if index >= count:
            raise BackendUnavailable(f"there is no cuda:{index}: this machine has {count} NVIDIA GPU(s)")

    def _count(self) -> int:
        try:
            return int(self.call("cudaGetDeviceCount"))
        except VaeError as error:  # no driver, or one that is too old
            raise BackendUnavailable(f"no NVIDIA GPU can be used here: {error}") from None

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the API -> its result, or `VaeError` with CUDA's own words."""
        status, *results = getattr(self._api, name)(*arguments)
        if int(status) != 0:
            if int(status) == int(self._api.cudaError_t.cudaErrorMemoryAllocation):
                raise OutOfMemoryError(f"CUDA has no memory left on cuda:{self.index} ({name})")
            raise VaeError(f"CUDA: {name} failed with {self._words(status)}")
        return results[0] if results else None

    def _words(self, status: Any) -> str:
        _, words = self._api.cudaGetErrorString(status)
        return f"{int(status)} ({words.decode() if isinstance(words, bytes) else words})"

    def use(self) -> None:
        """Make this the device of the calling thread; every thread has to."""
        self.call("cudaSetDevice", self.index)

    def compute_capability(self) -> str:
        """As in "sm89"."""
        attributes = self._api.cudaDeviceAttr
        major, minor = (
            self.call("cudaDeviceGetAttribute", attribute, self.index)
            for attribute in (
                attributes.cudaDevAttrComputeCapabilityMajor,
                attributes.cudaDevAttrComputeCapabilityMinor,
            )
        )
        return f"sm{major}{minor}"

    def free_memory(self) -> tuple[int, int]:
        """Bytes that are free, and that there are."""
        self.use()
        status, free, total = self._api.cudaMemGetInfo()
        if int(status) != 0:
            raise VaeError(f"CUDA: cudaMemGetInfo failed with {self._words(status)}")
        return int(free), int(total)

    # Memory and streams; sizes in bytes ------------------------------------------------------------------------------

    def allocate(self, size: int, what: str) -> int:
        """An address on the device; `OutOfMemoryError` says what was asked for and what is free."""
        try:
            return int(self.call("cudaMalloc", max(size, 1)))
        except OutOfMemoryError:
            free, total = self.free_memory()
            raise OutOfMemoryError(
                f"{what} needs {size / 2**20:,.0f} MiB on cuda:{self.index}, which has {free / 2**20:,.0f} of "
                f"{total / 2**20:,.0f} MiB free; enable_tiling() or enable_slicing() need less"
            ) from None

    def release(self, address: int) -> None:
        self.call("cudaFree", address)

    def stream(self) -> int:
        """A stream that does not wait for the default one."""
        return int(self.call("cudaStreamCreateWithFlags", self._api.cudaStreamNonBlocking))

    def destroy_stream(self, stream: int) -> None:
        self.call("cudaStreamDestroy", stream)

    def wait(self, stream: int) -> None:
        """Until all work on a stream is done."""
        self.call("cudaStreamSynchronize", stream)

    def to_device(self, address: int, host: int, size: int, stream: int) -> None:
        kind = self._api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", address, host, size, kind, stream)

    def to_host(self, host: int, address: int, size: int, stream: int) -> None:
        kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", host, address, size, kind, stream)

    # Graphs ----------------------------------------------------------------------------------------------------------

    def begin_capture(self, stream: int) -> None:
        """Only what this thread does may be captured: others go on with their streams."""
        self.call("cudaStreamBeginCapture", stream, self._api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)

    def end_capture(self, stream: int) -> Any:
        """What was captured, ready to launch."""
        graph = self.call("cudaStreamEndCapture", stream)
        try:
            return self.call("cudaGraphInstantiate", graph, 0)
        finally:
            self.call("cudaGraphDestroy", graph)

    def launch(self, graph: Any, stream: int) -> None:
        self.call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: Any) -> None:
        self.call("cudaGraphExecDestroy", graph)
