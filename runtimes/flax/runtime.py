"""The JAX backend: runs flax bundles (StableHLO and parameters) on a CPU, GPU or TPU, without model code."""

from __future__ import annotations

from runtimes.flax import params as flax_params  # first: its error names the package to install if JAX is missing

# isort: split
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np
from jax import export

from runtimes.arrays import Array, answer_in_kind
from runtimes.base import VaeRuntime
from runtimes.bundle import Bundle
from runtimes.edge import check_count, device_name
from runtimes.errors import (
    BackendUnavailable,
    CompatibilityError,
    ConfigError,
    IntegrityError,
    NotInstalled,
    NumericsError,
    OutOfMemoryError,
    VaeError,
    is_out_of_memory,
)
from runtimes.manifest import GraphSpec
from runtimes.names import GRAPHS, Graph

try:
    import flatbuffers  # noqa: F401  (jax.export reads and writes its files with it, but does not require it)
except ImportError:
    raise NotInstalled("flatbuffers is not installed: pip install 'vae-export[flax]'") from None

_DEVICE = re.compile(r"(cpu|gpu|tpu)(?::(\d+))?")
_ERRORS = (RuntimeError, ValueError, TypeError, NotImplementedError, MemoryError)  #: errors of JAX and XLA
#: Operations that call code by name or wait for an outside event. The exception in the pattern checks the sizes of a
#: graph's inputs; all others could call any code that is loaded into the process.
_REACHES_OUT = re.compile(r"custom_call(?! @shape_assertion\()|\b(?:stablehlo|mhlo)\.(?:infeed|outfeed|send|recv)\b")


class FlaxVae(VaeRuntime):
    """A flax bundle in JAX. Thread-safe.

    A graph is compiled for each exact input shape, which takes some seconds, and the `max_shapes` most recently used
    shapes of each graph are kept. Tiling needs up to four shapes, because tiles at the edges are smaller.

    JAX keeps about 30 KB for each opened bundle until `jax.clear_caches()`; a service that opens bundles repeatedly
    should call it from time to time.

    `device` is "cpu", "gpu", "tpu", or a numbered device such as "gpu:1". If it is not present, `BackendUnavailable` is
    raised; there is no fallback. JAX arrays are accepted, and the results are NumPy arrays; to keep data on the device,
    use `runtimes.flax.model`.
    """

    backend = "flax"

    def __init__(self, bundle: Bundle, *, device: str = "cpu", max_shapes: int = 4, check_finite: bool = False) -> None:
        super().__init__(bundle, check_finite=check_finite)
        check_count("max_shapes", max_shapes)
        self.device = device_name(device)
        self._place = jax.sharding.SingleDeviceSharding(_find_device(device))
        files = {flax_params.FLAX_FILE, *(self.spec[graph].file for graph in GRAPHS)}
        data = {file: bundle.read(file) for file in files}  # check every file before parsing any
        try:
            params = flax_params.read_msgpack(data[flax_params.FLAX_FILE], flax_params.FLAX_FILE)
        except ConfigError as error:
            raise CompatibilityError(str(error)) from None
        self._max_shapes = max_shapes
        self._lock = threading.Lock()
        self._compiled: dict[str, OrderedDict[tuple[int, ...], Future[Any]]] = {
            graph: OrderedDict() for graph in GRAPHS
        }
        self._graphs = {graph: self._open(self.spec[graph], data[self.spec[graph].file], params) for graph in GRAPHS}

    @staticmethod
    def check_devices() -> dict[str, str]:
        """Return {device: "works" or the reason why not}."""
        states = {}
        for kind in ("cpu", "gpu", "tpu"):
            try:
                states[kind] = "works" if _find_device(kind) else ""
            except BackendUnavailable as error:
                states[kind] = str(error)
        return states

    def _open(self, spec: GraphSpec, data: bytes, params: Mapping[str, Any]) -> tuple[Any, Any]:
        """Return (the graph as a function, its parameters on the device)."""
        try:
            exported = export.deserialize(bytearray(data))
            text = exported.mlir_module()
            (expected, x), options = jax.tree.unflatten(exported.in_tree, exported.in_avals)
            (y,) = exported.out_avals
        except Exception as error:  # JAX does not document which errors its parser raises
            raise CompatibilityError(f"JAX {jax.__version__} cannot load {spec.file}: {_reason(error)}") from None
        forbidden = _REACHES_OUT.search(text)
        if forbidden or exported.ordered_effects or exported.unordered_effects:
            raise IntegrityError(
                f"{spec.file} calls out of its graph ({forbidden[0] if forbidden else 'effects'}): refused"
            )
        for wanted, actual in ((spec.input, x), (spec.output, y)):
            channels = getattr(actual, "shape", ())[1:2]
            if (str(getattr(actual, "dtype", None)), channels) != (wanted.dtype, wanted.shape[1:2]) or options:
                raise CompatibilityError(f"{spec.file} has {actual} where the manifest says {wanted}")
        if not isinstance(expected, dict):
            raise CompatibilityError(f"{spec.file} takes its parameters as a {type(expected).__name__}, not by name")
        own = {name: tree for name, tree in params.items() if name in expected}
        try:
            flax_params.check_params(own, expected, flax_params.FLAX_FILE)
        except (ConfigError, NumericsError, AttributeError) as error:
            raise CompatibilityError(f"{spec.file}: {error}") from None
        own = jax.tree.map(lambda leaf, like: np.asarray(leaf, like.dtype), own, expected)
        return exported.call, jax.device_put(own, self._place)

    def _taken(self, x: Any) -> Any:
        if isinstance(x, jax.Array):  # on any device: DLPack would convert arrays on the CPU only
            return np.asarray(x.astype(np.float32) if jax.numpy.issubdtype(x.dtype, jax.numpy.floating) else x)
        return x

    def _run(self, graph: Graph, x: Any) -> Any:
        return answer_in_kind(lambda array: self._call(graph, np.ascontiguousarray(array)), x)

    def _call(self, graph: Graph, x: Array) -> Array:
        _, params = self._graphs[graph]
        try:
            compiled = self._compile(graph, x.shape)
            result = compiled(params, jax.device_put(x, self._place))
            return np.array(result)  # a copy, because JAX's array is read-only
        except _ERRORS as error:
            if is_out_of_memory(error):
                raise OutOfMemoryError(
                    f"the {graph} of {list(x.shape)} does not fit the memory of {self.device}: {_reason(error)}. "
                    "enable_tiling() or enable_slicing() need less"
                ) from None
            raise VaeError(f"JAX failed in the {graph} of {list(x.shape)}: {_reason(error)}") from None

    def _compile(self, graph: Graph, shape: tuple[int, ...]) -> Any:
        kept = self._compiled[graph]
        with self._lock:
            existing = kept.pop(shape, None)
            future: Future[Any] = existing or Future()
            while len(kept) >= self._max_shapes:
                kept.popitem(last=False)
            kept[shape] = future  # most recently used last
        if existing is None:  # outside of the lock, so that threads with another shape need not wait
            try:
                function, params = self._graphs[graph]
                x = jax.ShapeDtypeStruct(shape, np.float32, sharding=self._place)  # type: ignore[no-untyped-call]
                future.set_result(jax.jit(function).lower(params, x).compile())
            except BaseException as error:  # threads that wait for this future must receive any error
                with self._lock:
                    kept.pop(shape, None)
                future.set_exception(error)
        return future.result()

    def _close(self) -> None:
        self._graphs.clear()
        self._compiled.clear()


def _find_device(device: str) -> Any:
    match = _DEVICE.fullmatch(device_name(device))
    if match is None:
        raise BackendUnavailable(
            f"JAX runs on 'cpu', 'gpu', 'tpu' or a numbered device such as 'gpu:1', not {device!r}"
        )
    kind, index = match[1], int(match[2] or 0)
    try:
        devices = jax.devices(kind)
    except RuntimeError:
        how = {"gpu": ": pip install 'jax[cuda13]'", "tpu": ": pip install 'jax[tpu]'"}.get(kind, "")
        raise BackendUnavailable(f"JAX {jax.__version__} finds no {kind} with what it needs{how}") from None
    if index >= len(devices):
        raise BackendUnavailable(f"JAX {jax.__version__} finds {len(devices)} {kind}, and no {device!r}")
    return devices[index]


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
