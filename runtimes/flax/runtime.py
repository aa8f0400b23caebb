"""JAX: a flax bundle, StableHLO and its parameters, on a CPU, a GPU or a TPU, without any code of the model."""

from __future__ import annotations

from runtimes.flax import params as flax_params  # first: where JAX is missing, it says what to install

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
_ERRORS = (RuntimeError, ValueError, TypeError, NotImplementedError, MemoryError)  #: what JAX and XLA raise
#: An operation that calls code by its name, or waits for someone outside. The one that is allowed checks the sizes that
#: a graph is given; others could call whatever is loaded into the process.
_REACHES_OUT = re.compile(r"custom_call(?! @shape_assertion\()|\b(?:stablehlo|mhlo)\.(?:infeed|outfeed|send|recv)\b")


class FlaxVae(VaeRuntime):
    """A flax bundle in JAX. Safe for threads.

    A graph is compiled for the very shape that it is called with, some seconds each; of each graph the last
    `max_shapes` are kept: tiles of one size have up to four, with those at the edges.

    JAX itself keeps some 30 KB of every opening until `jax.clear_caches()`: a service that opens bundles again and
    again calls that now and then.

    `device` is "cpu", "gpu", "tpu", or one of several as in "gpu:1"; where it is not there, that is
    `BackendUnavailable` and no fall-back. JAX arrays are taken like any other, and answered by NumPy's; to stay on the
    device, use `runtimes.flax.model`.
    """

    backend = "flax"

    def __init__(self, bundle: Bundle, *, device: str = "cpu", max_shapes: int = 4, check_finite: bool = False) -> None:
        super().__init__(bundle, check_finite=check_finite)
        check_count("max_shapes", max_shapes)
        self.device = device_name(device)
        self._place = jax.sharding.SingleDeviceSharding(_find_device(device))
        files = {flax_params.FLAX_FILE, *(self.spec[graph].file for graph in GRAPHS)}
        data = {file: bundle.read(file) for file in files}  # all is sound before any is parsed
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
        """{device: "works", or why not}."""
        states = {}
        for kind in ("cpu", "gpu", "tpu"):
            try:
                states[kind] = "works" if _find_device(kind) else ""
            except BackendUnavailable as error:
                states[kind] = str(error)
        return states

    def _open(self, spec: GraphSpec, data: bytes, params: Mapping[str, Any]) -> tuple[Any, Any]:
        """(the graph as a function, its parameters on the device)."""
        try:
            exported = export.deserialize(bytearray(data))
            text = exported.mlir_module()
            (expected, x), options = jax.tree.unflatten(exported.in_tree, exported.in_avals)
            (y,) = exported.out_avals
        except Exception as error:  # a parser of JAX's own, of which nothing is promised
            raise CompatibilityError(f"JAX {jax.__version__} cannot load {spec.file}: {_reason(error)}") from None
        found = _REACHES_OUT.search(text)
        if found or exported.ordered_effects or exported.unordered_effects:
            raise IntegrityError(f"{spec.file} calls out of its graph ({found[0] if found else 'effects'}): refused")
        for said, has in ((spec.input, x), (spec.output, y)):
            channels = getattr(has, "shape", ())[1:2]
            if (str(getattr(has, "dtype", None)), channels) != (said.dtype, said.shape[1:2]) or options:
                raise CompatibilityError(f"{spec.file} has {has} where the manifest says {said}")
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
        if isinstance(x, jax.Array):  # wherever it is: DLPack would give NumPy those on the CPU alone
            return np.asarray(x.astype(np.float32) if jax.numpy.issubdtype(x.dtype, jax.numpy.floating) else x)
        return x

    def _run(self, graph: Graph, x: Any) -> Any:
        return answer_in_kind(lambda array: self._call(graph, np.ascontiguousarray(array)), x)

    def _call(self, graph: Graph, x: Array) -> Array:
        _, params = self._graphs[graph]
        try:
            compiled = self._compile(graph, x.shape)
            result = compiled(params, jax.device_put(x, self._place))
            return np.array(result)  # a copy: JAX's own is not to be written to
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
            found = kept.pop(shape, None)
            future: Future[Any] = found or Future()
            while len(kept) >= self._max_shapes:
                kept.popitem(last=False)
            kept[shape] = future  # last: the most recent
        if found is None:  # outside of the lock: threads with another shape need not wait
            try:
                function, params = self._graphs[graph]
                x = jax.ShapeDtypeStruct(shape, np.float32, sharding=self._place)  # type: ignore[no-untyped-call]
                future.set_result(jax.jit(function).lower(params, x).compile())
            except BaseException as error:  # whatever it is, those that wait for it are to have it
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
        raise BackendUnavailable(f"JAX runs on 'cpu', 'gpu', 'tpu' or one of several as in 'gpu:1', not {device!r}")
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
