"""Running a TensorRT plan: contexts, streams, memory and captured launches, for several threads at once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import numpy as np

from runtimes.arrays import Array, array_module
from runtimes.errors import CompatibilityError, ConfigError, OutOfMemoryError, ShapeError, VaeError, is_out_of_memory
from runtimes.files import written_whole
from runtimes.manifest import GraphSpec
from runtimes.tensorrt.cuda import Cuda
from runtimes.tensorrt.flavours import Flavour
from runtimes.tensorrt.profiles import Profile, nearest


@dataclass(frozen=True)
class Settings:
    contexts: int
    cuda_graphs: bool
    max_graphs: int
    runtime_cache: str | Path | None
    kernel_specialization: str | None


class LoadedPlan:
    """A plan that was loaded, and the slots in which calls run."""

    def __init__(
        self,
        flavour: Flavour,
        cuda: Cuda,
        graph: str,
        plan: bytes,
        spec: GraphSpec,
        profiles: tuple[Profile, ...],
        settings: Settings,
        pixels: int,
        make_room: Callable[[], None],
    ) -> None:
        self.flavour, self.cuda, self.graph, self.spec, self.settings = flavour, cuda, graph, spec, settings
        self.profiles = profiles
        self._pixels = pixels  #: for each unit of the input's height and width
        self._make_room = make_room  #: free what idles, of other graphs too
        cuda.use()
        self._runtime = flavour.trt.Runtime(flavour.logger)
        self.engine = self._runtime.deserialize_cuda_engine(plan)
        if self.engine is None:
            error = VaeError(f"{self._named} cannot load the plan of the {graph}: {flavour.complaints()}")
            raise (OutOfMemoryError if is_out_of_memory(error) else CompatibilityError)(str(error))
        self._check()
        self.config = self._runtime_config()
        self._idle: SimpleQueue[_Slot] = SimpleQueue()
        self._slots: list[_Slot] = []
        self._lock = threading.Lock()

    @property
    def _named(self) -> str:
        return f"{self.flavour.trt.__name__} {self.flavour.version}"

    def _check(self) -> None:
        """The plan has the input, the output and the profiles that the manifest says."""
        trt, engine = self.flavour.trt, self.engine
        types = {"float32": trt.DataType.FLOAT, "float16": trt.DataType.HALF, "uint8": trt.DataType.UINT8}
        found = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        sides = ((self.spec.input, trt.TensorIOMode.INPUT), (self.spec.output, trt.TensorIOMode.OUTPUT))
        right = set(found) == {said.name for said, _ in sides} and all(
            engine.get_tensor_mode(said.name) == mode and engine.get_tensor_dtype(said.name) == types.get(said.dtype)
            for said, mode in sides
        )
        if not right:
            raise CompatibilityError(
                f"the plan of the {self.graph} has the tensors {', '.join(found)}, and not what the manifest says: "
                f"{self.spec.input.name} and {self.spec.output.name} of {self.spec.input.dtype}"
            )
        if engine.num_optimization_profiles != len(self.profiles):
            raise CompatibilityError(
                f"the plan of the {self.graph} has {engine.num_optimization_profiles} profiles, and the manifest says "
                f"{len(self.profiles)}"
            )

    def _runtime_config(self) -> Any:
        """What TensorRT-RTX is told of its kernels; None for the other, which has compiled them all."""
        if not self.flavour.is_rtx:
            return None
        trt, settings = self.flavour.trt, self.settings
        config = self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if settings.kernel_specialization is not None:
            strategies = trt.DynamicShapesKernelSpecializationStrategy
            wanted = getattr(strategies, settings.kernel_specialization.upper())
            config.dynamic_shapes_kernel_specialization_strategy = wanted
        if settings.cuda_graphs:
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if settings.runtime_cache is not None:
            self._runtime_cache = config.create_runtime_cache()
            kept = self._cache_file(settings.runtime_cache)
            try:
                taken = self._runtime_cache.deserialize(kept.read_bytes())
            except FileNotFoundError:  # the first time
                taken = True
            except OSError as error:
                raise ConfigError(f"runtime_cache {kept} cannot be read: {error.strerror}") from None
            if not taken:  # of another version: kernels are compiled anew, as without a cache
                self.flavour.complaints()
            if not config.set_runtime_cache(self._runtime_cache):
                raise VaeError(f"{self._named} does not take a runtime cache: {self.flavour.complaints()}")
        return config

    def _cache_file(self, path: str | Path) -> Path:
        return Path(path).with_name(f"{Path(path).name}-{self.graph}")

    @contextmanager
    def _slot(self) -> Iterator[_Slot]:
        """A slot for this thread alone; waits where all are at work."""
        slot = self._take()
        try:
            self.cuda.use()  # of this thread
            yield slot
        finally:
            self._idle.put(slot)

    def _take(self) -> _Slot:
        with suppress(Empty):
            return self._idle.get_nowait()
        with self._lock:
            if len(self._slots) < self.settings.contexts:
                self._slots.append(_Slot(self))
                return self._slots[-1]
        return self._idle.get()

    def run(self, x: Array) -> Array:
        """An array in host memory -> one in host memory."""
        result: Array = self._with_room(self._run, np.ascontiguousarray(x))
        return result

    def run_on_device(self, x: Any) -> Any:
        """A torch tensor or CuPy array on the GPU -> one of its kind, there."""
        if _device_index(x) != self.cuda.index:
            raise ShapeError(f"the array is on cuda:{_device_index(x)}, and this VAE on cuda:{self.cuda.index}")
        x = x.contiguous() if hasattr(x, "contiguous") else array_module(x).ascontiguousarray(x)
        return self._with_room(self._run_on_device, x)

    def _with_room(self, run: Callable[[Any], Any], x: Any) -> Any:
        """`run`, and once more where memory is out while some of ours lies idle: it is kept for the next call only."""
        try:
            return run(x)
        except OutOfMemoryError:
            self._make_room()
            return run(x)

    def free_idle(self) -> None:
        """Give back the device memory of all slots that are not at work."""
        idle: list[_Slot] = []
        with suppress(Empty):
            while True:
                idle.append(self._idle.get_nowait())
        try:
            for slot in idle:
                slot.free()
        finally:  # other threads wait for them
            for slot in idle:
                self._idle.put(slot)

    def _run(self, x: Array) -> Array:
        with self._slot() as slot, slot.finished():
            prepared = slot.prepare(self._profile(x.shape), x.shape)
            result: Array = np.empty(prepared.output_shape, self.spec.output.dtype)
            source, target = slot.input.of(x.nbytes, self._what(x)), slot.output.of(result.nbytes, self._what(x))
            self.cuda.to_device(source, x.ctypes.data, x.nbytes, slot.stream)
            slot.execute(prepared, source, target)
            self.cuda.to_host(result.ctypes.data, target, result.nbytes, slot.stream)
        return result

    def _run_on_device(self, x: Any) -> Any:
        with self._slot() as slot, slot.finished():
            prepared = slot.prepare(self._profile(x.shape), tuple(x.shape))
            result = _empty_like(x, prepared.output_shape, self.spec.output.dtype)
            _wait_for_producer(x)  # it was made on another stream than ours
            slot.execute(prepared, _address(x), _address(result))
        return result

    def _profile(self, shape: Sequence[int]) -> int:
        height, width = (shape[axis] for axis in self.spec.input.axes[1:])
        return nearest(self.profiles, shape[0], height * self._pixels, width * self._pixels)

    def _what(self, x: Array) -> str:
        return f"the {self.graph} of {list(x.shape)}"

    def complain(self, call: str, shape: Sequence[int]) -> VaeError:
        """TensorRT answers False and says why in its log."""
        error = VaeError(
            f"{self._named}: {call} failed in the {self.graph} of {list(shape)}: {self.flavour.complaints()}"
        )
        return (
            OutOfMemoryError(f"{error}; enable_tiling() or enable_slicing() need less")
            if is_out_of_memory(error)
            else error
        )

    def close(self) -> None:
        """To be called when no call is at work."""
        for slot in self._slots:
            slot.close()
        self._slots.clear()
        try:
            if self.config is not None and self.settings.runtime_cache is not None:
                with written_whole(self._cache_file(self.settings.runtime_cache)) as path:
                    path.write_bytes(bytes(self._runtime_cache.serialize()))
        finally:
            del self.config, self.engine, self._runtime


@dataclass(frozen=True)
class _Prepared:
    """A context that was told its shapes and given its memory."""

    profile: int
    context: Any
    shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    scratch: int  #: its address


class _Captured(NamedTuple):
    """Launches that were captured, and the context that they are of."""

    graph: Any
    context: Any


class _Slot:
    """What one call at a time works with: a stream, a context for each profile, memory, and captured launches."""

    def __init__(self, engine: LoadedPlan) -> None:
        self._engine, self._cuda = engine, engine.cuda
        self._cuda.use()
        self.stream = self._cuda.stream()
        self._contexts: dict[int, Any] = {}
        self.input, self.output, self._scratch = (_Memory(self._cuda, self._forget_graphs) for _ in range(3))
        self._graphs: OrderedDict[tuple[Any, ...], _Captured] = OrderedDict()

    @contextmanager
    def finished(self) -> Iterator[None]:
        """When the block ends, well or not, nothing of it runs on the GPU any more."""
        try:
            yield
        except BaseException:
            with suppress(VaeError):
                self._cuda.wait(self.stream)
            raise
        self._cuda.wait(self.stream)

    def prepare(self, profile: int, shape: tuple[int, ...]) -> _Prepared:
        """The profile's context, for a shape."""
        if profile not in self._contexts:
            # One for each profile: switching a context between profiles would throw away what it has set up.
            self._contexts[profile] = self._new_context(profile, shape)
        return self._told(self._contexts[profile], profile, shape)

    def _told(self, context: Any, profile: int, shape: tuple[int, ...]) -> _Prepared:
        """Shapes in, shapes out, and the memory that these shapes need; in the order that TensorRT wants."""
        engine = self._engine
        if not context.set_input_shape(engine.spec.input.name, shape):
            raise engine.complain(f"set_input_shape{tuple(shape)}", shape)
        unknown = context.infer_shapes()
        if unknown:
            raise engine.complain(f"infer_shapes, which lacks {', '.join(unknown)},", shape)
        output_shape = tuple(context.get_tensor_shape(engine.spec.output.name))
        needed = context.update_device_memory_size_for_shapes()
        if needed == 0:
            raise engine.complain("update_device_memory_size_for_shapes", shape)
        scratch = self._scratch.of(needed, f"the {engine.graph} of {list(shape)}")
        context.set_device_memory(scratch, needed)
        return _Prepared(profile, context, tuple(shape), output_shape, scratch)

    def execute(self, prepared: _Prepared, source: int, target: int) -> None:
        """Put the work on the stream, as launches or as a captured graph of them."""
        key = (prepared.profile, prepared.shape, source, target, prepared.scratch)
        captured = self._graphs.get(key)
        if captured is not None:
            self._graphs.move_to_end(key)
            self._cuda.launch(captured.graph, self.stream)
            return
        engine = self._engine
        capture = engine.settings.cuda_graphs and not engine.flavour.is_rtx  # RTX captures by itself
        if capture:
            # A graph is of its context as it was: to tell that context another shape or address would void the graph.
            prepared = self._told(self._new_context(prepared.profile, prepared.shape), prepared.profile, prepared.shape)
        context = prepared.context
        for spec, address in ((engine.spec.input, source), (engine.spec.output, target)):
            if not context.set_tensor_address(spec.name, address):
                raise engine.complain(f"set_tensor_address of {spec.name}", prepared.shape)
        self._launch(prepared)
        if capture:
            self._capture(key, prepared)

    def _launch(self, prepared: _Prepared) -> None:
        if not prepared.context.execute_async_v3(self.stream):
            raise self._engine.complain("execute_async_v3", prepared.shape)

    def _capture(self, key: tuple[Any, ...], prepared: _Prepared) -> None:
        """Capture the same launches for the next time; the first run of a shape must not be captured, and was not."""
        self._cuda.wait(self.stream)
        self._cuda.begin_capture(self.stream)
        try:
            self._launch(prepared)
        except VaeError:
            with suppress(VaeError):  # the stream has to come out of it, and says less of why
                self._cuda.destroy_graph(self._cuda.end_capture(self.stream))
            raise
        self._graphs[key] = _Captured(self._cuda.end_capture(self.stream), prepared.context)
        while len(self._graphs) > self._engine.settings.max_graphs:
            self._cuda.destroy_graph(self._graphs.popitem(last=False)[1].graph)

    def _new_context(self, profile: int, shape: Sequence[int]) -> Any:
        engine, trt = self._engine, self._engine.flavour.trt
        # STATIC memory would be that of the largest shape of all profiles, from the beginning.
        how = engine.config or trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = engine.engine.create_execution_context(how)
        if context is None:
            raise engine.complain("create_execution_context", shape)
        if not context.set_optimization_profile_async(profile, self.stream):
            raise engine.complain(f"set_optimization_profile_async({profile})", shape)
        self._cuda.wait(self.stream)
        return context

    def _forget_graphs(self) -> None:
        """They hold addresses of memory that is gone."""
        while self._graphs:
            self._cuda.destroy_graph(self._graphs.popitem()[1].graph)

    def free(self) -> None:
        """Give the memory back; the next call takes it anew."""
        for memory in (self.input, self.output, self._scratch):
            memory.free()

    def close(self) -> None:
        self._cuda.use()
        self._cuda.wait(self.stream)
        self._forget_graphs()
        self._contexts.clear()
        self.free()
        self._cuda.destroy_stream(self.stream)


class _Memory:
    """Device memory that grows with what is asked of it, and shrinks where that is much less."""

    def __init__(self, cuda: Cuda, before_release: Callable[[], None]) -> None:
        self._cuda, self._before_release = cuda, before_release
        self._address = self._size = 0

    def of(self, size: int, what: str) -> int:
        """The address of at least `size` bytes."""
        if not size <= self._size <= 8 * size:
            self.free()  # first, so that old and new need not fit together
            self._address, self._size = self._cuda.allocate(size, what), size
        return self._address

    def free(self) -> None:
        if self._address:
            self._before_release()
            address, self._address, self._size = self._address, 0, 0
            self._cuda.release(address)


# Arrays on the GPU ------------------------------------------------------------------------------------------------


def on_device(x: Any) -> bool:
    """A torch tensor on the GPU, or a CuPy array, which is nowhere else."""
    return bool(getattr(x, "is_cuda", True))


def _device_index(x: Any) -> int:
    return int(x.device.index if hasattr(x, "data_ptr") else x.device.id)


def _address(x: Any) -> int:
    return int(x.data_ptr() if hasattr(x, "data_ptr") else x.data.ptr)


def _empty_like(x: Any, shape: tuple[int, ...], dtype: str) -> Any:
    xp = array_module(x)
    if hasattr(x, "data_ptr"):
        return xp.empty(shape, dtype=getattr(xp, dtype), device=x.device)
    return xp.empty(shape, dtype=dtype)


def _wait_for_producer(x: Any) -> None:
    xp = array_module(x)
    stream = xp.cuda.current_stream(x.device) if hasattr(x, "data_ptr") else xp.cuda.get_current_stream()
    stream.synchronize()
