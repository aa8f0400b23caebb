"""The CUDA calls that the TensorRT runtime needs, through NVIDIA's cuda-python, without PyTorch."""

from __future__ import annotations

import importlib
from typing import Any

from runtimes.errors import BackendUnavailable, NotInstalled, OutOfMemoryError, VaeError

ALIGNMENT = 256  #: bytes; TensorRT requires it, and cudaMalloc guarantees it


def load_cuda() -> Any:
    """Import the module of CUDA's runtime API. Raises `NotInstalled` if cuda-python is missing."""
    for name in ("cuda.bindings.runtime", "cuda.cudart"):  # cuda.cudart is the name before version 12.6
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise NotInstalled(
        "cuda-python is not installed: pip install 'vae-export[tensorrt]', or 'vae-export[rtx]' for TensorRT-RTX"
    )


class Cuda:
    """CUDA's runtime API on one device.

    Every call checks its status and raises `OutOfMemoryError` or `VaeError`. Raises `BackendUnavailable` if there is no
    such device.
    """

    def __init__(self, index: int = 0) -> None:
        self._api = load_cuda()
        self.index = index
        count = self._count()
        if index >= count:
            raise BackendUnavailable(f"there is no cuda:{index}: this machine has {count} NVIDIA GPU(s)")

    def _count(self) -> int:
        try:
            return int(self.call("cudaGetDeviceCount"))
        except VaeError as error:  # the driver is missing or too old
            raise BackendUnavailable(f"no NVIDIA GPU can be used here: {error}") from None

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the API and return its result. Raises `VaeError` with CUDA's description of the error."""
        status, *results = getattr(self._api, name)(*arguments)
        if int(status) != 0:
            if int(status) == int(self._api.cudaError_t.cudaErrorMemoryAllocation):
                raise OutOfMemoryError(f"CUDA has no memory left on cuda:{self.index} ({name})")
            raise VaeError(f"CUDA: {name} failed with {self._description(status)}")
        return results[0] if results else None

    def _description(self, status: Any) -> str:
        _, text = self._api.cudaGetErrorString(status)
        return f"{int(status)} ({text.decode() if isinstance(text, bytes) else text})"

    def use(self) -> None:
        """Make this the current device of the calling thread; each thread must call it."""
        self.call("cudaSetDevice", self.index)

    def compute_capability(self) -> str:
        """Return the device's compute capability, such as "sm89"."""
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
        """Return the free and the total memory of the device, in bytes."""
        self.use()
        status, free, total = self._api.cudaMemGetInfo()
        if int(status) != 0:
            raise VaeError(f"CUDA: cudaMemGetInfo failed with {self._description(status)}")
        return int(free), int(total)

    # Memory and streams; sizes in bytes ------------------------------------------------------------------------------

    def allocate(self, size: int, what: str) -> int:
        """Allocate `size` bytes for `what` and return the address. `OutOfMemoryError` names both and the free bytes."""
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
        """Create a stream that does not wait for the default stream."""
        return int(self.call("cudaStreamCreateWithFlags", self._api.cudaStreamNonBlocking))

    def destroy_stream(self, stream: int) -> None:
        self.call("cudaStreamDestroy", stream)

    def wait(self, stream: int) -> None:
        """Wait until all work on a stream is done."""
        self.call("cudaStreamSynchronize", stream)

    def to_device(self, address: int, host: int, size: int, stream: int) -> None:
        kind = self._api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", address, host, size, kind, stream)

    def to_host(self, host: int, address: int, size: int, stream: int) -> None:
        kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", host, address, size, kind, stream)

    # Graphs ----------------------------------------------------------------------------------------------------------

    def begin_capture(self, stream: int) -> None:
        """Start to capture the work of a stream. Other threads may use their streams meanwhile."""
        self.call("cudaStreamBeginCapture", stream, self._api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)

    def end_capture(self, stream: int) -> Any:
        """End the capture, and return the captured work as an executable graph."""
        graph = self.call("cudaStreamEndCapture", stream)
        try:
            return self.call("cudaGraphInstantiate", graph, 0)
        finally:
            self.call("cudaGraphDestroy", graph)

    def launch(self, graph: Any, stream: int) -> None:
        self.call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: Any) -> None:
        self.call("cudaGraphExecDestroy", graph)
