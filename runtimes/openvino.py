"""OpenVINO: an IR bundle on a CPU, and on Intel's GPUs and NPUs."""

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
    """Hide `openvino_telemetry` while OpenVINO is imported: each of its modules looks for it once, then, and reports
    nothing to its makers where it is missing. Afterwards the program can import that package as before."""
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

_ERRORS = (RuntimeError, MemoryError)  #: what OpenVINO raises
_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "uint8": "u8"}


_the_core: Any = None
_making_core = threading.Lock()


def shared_core() -> Any:
    """The one `ov.Core` of the process, made at the first call and never destroyed.

    A Core that loads the CPU plugin replaces the main thread's alternate signal stack, and puts back the one that it
    found when it is destroyed. Of two Cores, the second to be destroyed puts back the freed stack of the first, and the
    next signal is a segmentation fault. A Core that stays has nothing to put back, not even while the interpreter ends.
    """
    global _the_core
    with _making_core:
        if _the_core is None:
            core = ov.Core()
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(core))  # one reference too many: nothing destroys it
            _the_core = core
        return _the_core


class OpenVinoVae(VaeRuntime):
    """An OpenVINO bundle. Safe for threads: each call takes an infer request of its own from a pool.

    A graph is compiled for the very shape that it is called with, and the last `max_shapes` of them are kept: with the
    sizes known, OpenVINO keeps one layout throughout and plans its memory, which makes it a sixth faster than the same
    graph with free sizes. A new shape costs a compilation, about a second for a model of Stable Diffusion's size, and
    holds a copy of the weights; `cache_dir` keeps compiled graphs on disk (they are code: keep it to yourself).

    Weights are read, and their hash checked again, when a graph is first called: of one that is never called none are
    held. The files stay open until the runtime is closed, so that a bundle may be replaced meanwhile; one changed in
    place is an `IntegrityError` of that call.

    `device` is "cpu", "gpu", "gpu.N" or "npu"; where it is not there, that is `BackendUnavailable` and no fall-back.
    `threads` bounds the threads of one call (default: one per physical core, or the CPUs that this process may use
    where those are fewer than the machine's).
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
        data = {graph: self._read(graph) for graph in GRAPHS}  # all is sound before any is parsed
        for graph in GRAPHS:
            self._parse(graph, *data.pop(graph))
        # Weights are read again when a graph is first called: of one that is never called nothing is held.
        self._graphs = {
            graph: _Graph(functools.partial(self._load, graph), self._compile, max_shapes) for graph in GRAPHS
        }

    @staticmethod
    def check_devices() -> dict[str, str]:
        """{device: "works", or why not}; compiling for it is left to `open_vae`."""
        found = {name.partition(".")[0] for name in shared_core().available_devices}
        why_not = {"GPU": "no Intel GPU with its drivers was found", "NPU": "no Intel NPU with its drivers was found"}
        return {name.lower(): "works" if name in found else why_not[name] for name in ("CPU", "GPU", "NPU")}

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
        """The structure of a graph, and its weights."""
        file = self.spec[graph].file
        return bundle.hold(file), bundle.hold(str(PurePosixPath(file).with_suffix(".bin")))

    def _read(self, graph: Graph) -> tuple[bytes, bytes]:
        structure, weights = (file.read() for file in self._files[graph])
        check_ir(structure, self.spec[graph].file)
        return structure, weights

    def _load(self, graph: Graph) -> tuple[Any, Array]:
        return self._parse(graph, *self._read(graph))

    def _parse(self, graph: Graph, structure: bytes, data: bytes) -> tuple[Any, Array]:
        """The model, and its weights, which it shares: they must live as long."""
        spec = self.spec[graph]
        # A copy, since OpenVINO shares the memory of writable arrays only; it makes no copy of its own then.
        weights = np.frombuffer(data, np.uint8).copy()
        try:
            model = self._core.read_model(structure, ov.Tensor(weights, shared_memory=True))
        except RuntimeError as error:
            raise CompatibilityError(f"OpenVINO {ov.__version__} cannot load {spec.file}: {_reason(error)}") from None
        for said, found in ((spec.input, model.inputs), (spec.output, model.outputs)):
            names = [(port.get_names(), port.get_element_type().get_type_name()) for port in found]
            if len(names) != 1 or said.name not in names[0][0] or names[0][1] != _TYPES.get(said.dtype):
                raise CompatibilityError(f"{spec.file} has {names} where the manifest says {said.name} of {said.dtype}")
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
                    # The request's own output is overwritten by whoever takes it next: a copy leaves.
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
    """A graph compiled for one shape, when it is first asked for, and the infer requests that are idle."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # held while compiling: two threads with a new shape compile it once
        self.compiled: Any = None
        self.idle: SimpleQueue[Any] = SimpleQueue()


class _Graph:
    """A graph, compiled for the shapes last used, each with its pool of infer requests."""

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
        """An infer request for inputs of this size, from the pool, or a new one where all are at work."""
        with self._lock:
            shape = self._shapes.pop(size, None) or _Shape()
            while len(self._shapes) >= self._max_shapes:
                self._shapes.popitem(last=False)
            self._shapes[size] = shape  # last: the most recent
        with shape.lock:
            if shape.compiled is None:
                try:
                    shape.compiled = self._compile(self.model(), size)
                except VaeError:
                    with self._lock:
                        self._shapes.pop(size, None)  # it takes no place from those that work
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
        """Of free sizes, loaded when it is first asked for."""
        with self._loading:
            if self._loaded is None:
                self._loaded = self._load()
            return self._loaded[0]


def precision_hint(core: Any, device: str, precision: str) -> str:
    """In what type OpenVINO is to compute what a graph of this precision leaves open.

    Said, never left to the plugin: on a CPU with AMX its own choice for an fp32 graph is bf16. A bf16 graph is typed,
    and the hint is for what it keeps in fp32; fp16 is how weights are stored, and what GPUs compute in; in int8 it is
    for all but the convolutions, and bf16 where the CPU has it.
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
    """The last line that OpenVINO says: those before it are places in its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
