"""The OpenVINO backend: runs IR bundles on CPUs and on Intel's GPUs and NPUs."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from runtimes.arrays import Array, answer_in_kind
from runtimes.base import VaeRuntime
from runtimes.bundle import Bundle, HeldFile
from runtimes.cancellation import cancellable
from runtimes.cpus import thread_limit
from runtimes.edge import check_count, device_name
from runtimes.errors import (
    BackendUnavailable,
    CompatibilityError,
    ConfigError,
    NotInstalled,
    OutOfMemoryError,
    VaeError,
    is_out_of_memory,
)
from runtimes.ir_scan import check_ir
from runtimes.names import GRAPHS, Graph


@contextmanager
def _without_telemetry() -> Iterator[None]:
    """Hide `openvino_telemetry` while OpenVINO is imported.

    Each module of OpenVINO looks for that package once, at import, and sends no usage reports if it is missing.
    Afterwards the program can import the package as before.
    """
    hidden = "openvino_telemetry" not in sys.modules
    if hidden:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hidden:
            sys.modules.pop("openvino_telemetry", None)


try:
    with _without_telemetry():
        import openvino as ov
except ImportError:
    raise NotInstalled("OpenVINO is not installed: pip install 'vae-export[openvino]'") from None

_ERRORS = (RuntimeError, MemoryError)  #: errors that OpenVINO raises
_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "uint8": "u8"}


_the_core: Any = None
_making_core = threading.Lock()


def shared_core() -> Any:
    """Return the one `ov.Core` of the process, which is created at the first call and never destroyed.

    A Core that loads the CPU plugin replaces the main thread's alternate signal stack, and restores the previous one
    when it is destroyed. If two Cores are destroyed, the second one restores the freed stack of the first, and the next
    signal is a segmentation fault. A Core that is never destroyed restores nothing, not even at interpreter shutdown.
    """
    global _the_core
    with _making_core:
        if _the_core is None:
            core = ov.Core()
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(core))  # leak one reference, so that nothing destroys it
            _the_core = core
        return _the_core


class OpenVinoVae(VaeRuntime):
    """An OpenVINO bundle. Thread-safe: each call takes its own infer request from a pool.

    A graph is compiled for each exact input shape, and the `max_shapes` most recently used shapes are kept. With fixed
    sizes OpenVINO keeps one layout throughout and plans its memory, which is a sixth faster than the same graph with
    dynamic sizes. A new shape costs a compilation (about a second for a model of Stable Diffusion's size) and a copy
    of the weights. `cache_dir` keeps compiled graphs on disk; they are code, so protect the directory from other users.

    The weights of a graph are read, and their hash is checked again, at its first call; a graph that is never called
    holds no weights. The files stay open until the runtime is closed, so the bundle may be replaced in the meantime. A
    file that was modified in place raises `IntegrityError` at that first call.

    `device` is "cpu", "gpu", "gpu.N" or "npu". If it is not present, `BackendUnavailable` is raised; there is no
    fallback. `threads` limits the threads of one call (default: one per physical core, or the number of CPUs that this
    process may use if that is less than the machine has).
    """

    backend = "openvino"

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str = "cpu",
        threads: int | None = None,
        max_shapes: int = 4,
        cache_dir: str | Path | None = None,
        check_finite: bool = False,
    ) -> None:
        super().__init__(bundle, check_finite=check_finite)
        check_count("threads", threads)
        check_count("max_shapes", max_shapes)
        self.device = device_name(device)
        self._core = shared_core()
        self._device = _find_device(self._core, device)
        self._settings = self._choose_settings(threads, cache_dir)
        self._files = {graph: self._hold(bundle, graph) for graph in GRAPHS}
        data = {graph: self._read(graph) for graph in GRAPHS}  # check every file before parsing any
        for graph in GRAPHS:
            self._parse(graph, *data.pop(graph))
        # Weights are read again at a graph's first call, so a graph that is never called holds none.
        self._graphs = {
            graph: _Graph(functools.partial(self._load, graph), self._compile, max_shapes) for graph in GRAPHS
        }

    @staticmethod
    def check_devices() -> dict[str, str]:
        """Return {device: "works" or the reason why not}; `open_vae` is what compiles for the device."""
        available = {name.partition(".")[0] for name in shared_core().available_devices}
        why_not = {"GPU": "no Intel GPU with its drivers was found", "NPU": "no Intel NPU with its drivers was found"}
        return {name.lower(): "works" if name in available else why_not[name] for name in ("CPU", "GPU", "NPU")}

    def _choose_settings(self, threads: int | None, cache_dir: str | Path | None) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": precision_hint(self._core, self._device, self.precision),
            "PERFORMANCE_HINT": "LATENCY",
        }
        if threads is None and self._device == "CPU":
            threads = thread_limit()
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        if cache_dir is not None:
            settings["CACHE_DIR"] = str(_made(Path(cache_dir)))
        return settings

    def _hold(self, bundle: Bundle, graph: Graph) -> tuple[HeldFile, HeldFile]:
        """Open the files of a graph's structure and weights."""
        file = self.spec[graph].file
        return bundle.hold(file), bundle.hold(str(PurePosixPath(file).with_suffix(".bin")))

    def _read(self, graph: Graph) -> tuple[bytes, bytes]:
        structure, weights = (file.read() for file in self._files[graph])
        check_ir(structure, self.spec[graph].file)
        return structure, weights

    def _load(self, graph: Graph) -> tuple[Any, Array]:
        return self._parse(graph, *self._read(graph))

    def _parse(self, graph: Graph, structure: bytes, data: bytes) -> tuple[Any, Array]:
        """Return the model and the weights array, which the model shares: keep it alive as long as the model."""
        spec = self.spec[graph]
        # OpenVINO shares the memory of writable arrays only, hence this copy; OpenVINO then makes none itself.
        weights = np.frombuffer(data, np.uint8).copy()
        try:
            model = self._core.read_model(structure, ov.Tensor(weights, shared_memory=True))
        except RuntimeError as error:
            raise CompatibilityError(f"OpenVINO {ov.__version__} cannot load {spec.file}: {_reason(error)}") from None
        for expected, ports in ((spec.input, model.inputs), (spec.output, model.outputs)):
            actual = [(port.get_names(), port.get_element_type().get_type_name()) for port in ports]
            if len(actual) != 1 or expected.name not in actual[0][0] or actual[0][1] != _TYPES.get(expected.dtype):
                raise CompatibilityError(
                    f"{spec.file} has {actual} where the manifest says {expected.name} of {expected.dtype}"
                )
        return model, weights

    def _compile(self, model: Any, shape: tuple[int, ...]) -> Any:
        fixed = model.clone()
        try:
            fixed.reshape(list(shape))
            return self._core.compile_model(fixed, self._device, self._settings)
        except _ERRORS as error:
            _raise_out_of_memory(error, self.device, shape)
            raise CompatibilityError(f"OpenVINO {ov.__version__} cannot compile it: {_reason(error)}") from None

    def _run(self, graph: Graph, x: Any) -> Any:
        return answer_in_kind(lambda array: self._infer(graph, array), x)

    def _infer(self, graph: Graph, x: Array) -> Array:
        x = np.ascontiguousarray(x)
        with self._graphs[graph].request(x.shape) as request:
            try:
                with cancellable(request.cancel):
                    # The next user of the request overwrites its output, so return a copy.
                    result: Array = request.infer([x], share_inputs=True, share_outputs=True)[0].copy()
            except _ERRORS as error:
                _raise_out_of_memory(error, self.device, x.shape)
                raise VaeError(f"OpenVINO failed in the {graph} of {list(x.shape)}: {_reason(error)}") from None
        return result

    def _close(self) -> None:
        self._graphs.clear()
        for files in self._files.values():
            for file in files:
                file.close()


class _Shape:
    """A graph compiled for one shape at first use, and its idle infer requests."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # held while compiling, so that two threads with a new shape compile it once
        self.compiled: Any = None
        self.idle: SimpleQueue[Any] = SimpleQueue()


class _Graph:
    """A graph compiled for the most recently used shapes, each with a pool of infer requests."""

    def __init__(
        self, load: Callable[[], tuple[Any, Array]], compile_model: Callable[..., Any], max_shapes: int
    ) -> None:
        self._load, self._compile = load, compile_model
        self._loaded: tuple[Any, Array] | None = None
        self._loading = threading.Lock()
        self._max_shapes = max(1, max_shapes)
        self._shapes: OrderedDict[tuple[int, ...], _Shape] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def request(self, size: tuple[int, ...]) -> Iterator[Any]:
        """Yield an idle infer request for inputs of this shape, or a new one if all are in use."""
        with self._lock:
            shape = self._shapes.pop(size, None) or _Shape()
            while len(self._shapes) >= self._max_shapes:
                self._shapes.popitem(last=False)
            self._shapes[size] = shape  # most recently used last
        with shape.lock:
            if shape.compiled is None:
                try:
                    shape.compiled = self._compile(self.model(), size)
                except VaeError:
                    with self._lock:
                        self._shapes.pop(size, None)  # a shape that fails must not occupy a place
                    raise
        try:
            request = shape.idle.get_nowait()
        except Empty:
            request = shape.compiled.create_infer_request()
        try:
            yield request
        finally:
            shape.idle.put(request)

    def model(self) -> Any:
        """Return the model with dynamic sizes, loaded at first use."""
        with self._loading:
            if self._loaded is None:
                self._loaded = self._load()
            return self._loaded[0]


def precision_hint(core: Any, device: str, precision: str) -> str:
    """Return the inference precision that OpenVINO is told to use: "f32", "f16" or "bf16".

    It is always set explicitly, because the CPU plugin would compute an fp32 graph in bf16 if the CPU has AMX.

    fp32: f32. bf16: the graph carries its types, and f32 applies to the parts that it keeps in fp32. fp16: weights are
    stored in fp16; GPUs and NPUs compute in f16, CPUs in f32. int8: applies to everything but the quantized
    convolutions; bf16 if the CPU supports it.
    """
    if precision == "fp16" and not device.startswith("CPU"):
        return "f16"
    if precision == "int8" and "BF16" in core.get_property(device, "OPTIMIZATION_CAPABILITIES"):
        return "bf16"
    return "f32"


def _made(directory: Path) -> Path:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cache_dir {directory} cannot be used: {error.strerror}") from None
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ConfigError(f"cache_dir {directory} cannot be used: it cannot be written to")
    return directory


def _find_device(core: Any, device: str) -> str:
    if not re.fullmatch(r"cpu|gpu(\.\d+)?|npu", device_name(device)):
        raise BackendUnavailable(f"OpenVINO runs on 'cpu', 'gpu', 'gpu.N' or 'npu', not {device!r}")
    name, available = device_name(device).upper(), core.available_devices
    if name not in available and f"{name}.0" not in available:
        raise BackendUnavailable(
            f"OpenVINO {ov.__version__} finds no device {device!r} with its drivers, only {', '.join(available)}"
        )
    return name


def _raise_out_of_memory(error: Exception, device: str, shape: tuple[int, ...]) -> None:
    if is_out_of_memory(error):
        raise OutOfMemoryError(
            f"a graph of {list(shape)} does not fit the memory of {device}: {_reason(error)}. "
            "enable_tiling() or enable_slicing() need less"
        ) from None


def _reason(error: Exception) -> str:
    """Return the last line of OpenVINO's message; the lines before it are locations in its source code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
