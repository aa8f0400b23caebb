"""Run a TensorRT plan from several threads at once: contexts, streams, device memory and CUDA graphs."""

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
from runtimes.tensorrt.device_arrays import address_of, device_index, empty_like, wait_for_producer
from runtimes.tensorrt.flavours import Flavour
from runtimes.tensorrt.profiles import Profile, nearest


@dataclass(frozen=True)
class Settings:
    """How a plan is run; see the arguments of `TensorRtVae`."""

    contexts: int  #: calls of a graph that may run at once
    cuda_graphs: bool
    max_graphs: int  #: CUDA graphs that are kept for each context
    runtime_cache: str | Path | None
    kernel_specialization: str | None


class LoadedPlan:
    """A loaded plan, and the slots in which its calls run."""

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
        self._pixels = pixels  #: image pixels for each unit of the input's height and width
        self._make_room = make_room  #: frees the memory of idle slots, those of other graphs included
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
        """Raise `CompatibilityError` unless the plan has the manifest's input, output and number of profiles."""
        trt, engine = self.flavour.trt, self.engine
        types = {"float32": trt.DataType.FLOAT, "float16": trt.DataType.HALF, "uint8": trt.DataType.UINT8}
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        expected = ((self.spec.input, trt.TensorIOMode.INPUT), (self.spec.output, trt.TensorIOMode.OUTPUT))
        as_expected = set(names) == {spec.name for spec, _ in expected} and all(
            engine.get_tensor_mode(spec.name) == mode and engine.get_tensor_dtype(spec.name) == types.get(spec.dtype)
            for spec, mode in expected
        )
        if not as_expected:
            raise CompatibilityError(
                f"the plan of the {self.graph} has the tensors {', '.join(names)}, and not what the manifest says: "
                f"{self.spec.input.name} and {self.spec.output.name} of {self.spec.input.dtype}"
            )
        if engine.num_optimization_profiles != len(self.profiles):
            raise CompatibilityError(
                f"the plan of the {self.graph} has {engine.num_optimization_profiles} profiles, and the manifest says "
                f"{len(self.profiles)}"
            )

    def _runtime_config(self) -> Any:
        """Return TensorRT-RTX's settings for compiling kernels; None for TensorRT: its plans hold compiled kernels."""
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
            path = self._cache_file(settings.runtime_cache)
            try:
                accepted = self._runtime_cache.deserialize(path.read_bytes())
            except FileNotFoundError:  # the first use
                accepted = True
            except OSError as error:
                raise ConfigError(f"runtime_cache {path} cannot be read: {error.strerror}") from None
            if not accepted:  # another version wrote it: TensorRT-RTX compiles as without a cache; clear its log
                self.flavour.complaints()
            if not config.set_runtime_cache(self._runtime_cache):
                raise VaeError(f"{self._named} does not take a runtime cache: {self.flavour.complaints()}")
        return config

    def _cache_file(self, path: str | Path) -> Path:
        return Path(path).with_name(f"{Path(path).name}-{self.graph}")

    @contextmanager
    def _slot(self) -> Iterator[_Slot]:
        """Reserve a slot for this thread; waits while all slots are in use."""
        slot = self._take()
        try:
            self.cuda.use()  # CUDA's current device belongs to the thread
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
        """Run the graph on an array in host memory; returns one in host memory."""
        result: Array = self._with_room(self._run, np.ascontiguousarray(x))
        return result

    def run_on_device(self, x: Any) -> Any:
        """Run the graph on a torch tensor or CuPy array on the GPU; returns one of the same kind on the same GPU."""
        if device_index(x) != self.cuda.index:
            raise ShapeError(f"the array is on cuda:{device_index(x)}, and this VAE on cuda:{self.cuda.index}")
        x = x.contiguous() if hasattr(x, "contiguous") else array_module(x).ascontiguousarray(x)
        return self._with_room(self._run_on_device, x)

    def _with_room(self, run: Callable[[Any], Any], x: Any) -> Any:
        """Call `run(x)`; if memory runs out, free what idle slots keep for later calls, and try once more."""
        try:
            return run(x)
        except OutOfMemoryError:
            self._make_room()
            return run(x)

    def free_idle(self) -> None:
        """Free the device memory of all idle slots."""
        idle: list[_Slot] = []
        with suppress(Empty):
            while True:
                idle.append(self._idle.get_nowait())
        try:
            for slot in idle:
                slot.free()
        finally:  # other threads may wait for these slots
            for slot in idle:
                self._idle.put(slot)

    def _run(self, x: Array) -> Array:
        with self._slot() as slot, slot.finished():
            prepared = slot.prepare(self._profile(x.shape), x.shape)
            result: Array = np.empty(prepared.output_shape, self.spec.output.dtype)
            source = slot.input.at_least(x.nbytes, self._described(x))
            target = slot.output.at_least(result.nbytes, self._described(x))
            self.cuda.to_device(source, x.ctypes.data, x.nbytes, slot.stream)
            slot.execute(prepared, source, target)
            self.cuda.to_host(result.ctypes.data, target, result.nbytes, slot.stream)
        return result

    def _run_on_device(self, x: Any) -> Any:
        with self._slot() as slot, slot.finished():
            prepared = slot.prepare(self._profile(x.shape), tuple(x.shape))
            result = empty_like(x, prepared.output_shape, self.spec.output.dtype)
            wait_for_producer(x)  # another stream than the slot's computes it
            slot.execute(prepared, address_of(x), address_of(result))
        return result

    def _profile(self, shape: Sequence[int]) -> int:
        height, width = (shape[axis] for axis in self.spec.input.axes[1:])
        return nearest(self.profiles, shape[0], height * self._pixels, width * self._pixels)

    def _described(self, x: Array) -> str:
        return f"the {self.graph} of {list(x.shape)}"

    def complain(self, call: str, shape: Sequence[int]) -> VaeError:
        """Return the error for a failed TensorRT call. The call only returns False; the reason is in TensorRT's log."""
        error = VaeError(
            f"{self._named}: {call} failed in the {self.graph} of {list(shape)}: {self.flavour.complaints()}"
        )
        return (
            OutOfMemoryError(f"{error}; enable_tiling() or enable_slicing() need less")
            if is_out_of_memory(error)
            else error
        )

    def close(self) -> None:
        """Free everything, and write the runtime cache if there is one. No call may be running."""
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
    """A context with its shapes and its scratch memory set."""

    profile: int
    context: Any
    shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    scratch: int  #: address of the scratch memory


class _Captured(NamedTuple):
    """A CUDA graph of captured launches, and the context that it uses."""

    graph: Any
    context: Any


class _Slot:
    """The resources of one call at a time: a stream, a context for each profile, memory, and captured CUDA graphs."""

    def __init__(self, engine: LoadedPlan) -> None:
        self._engine, self._cuda = engine, engine.cuda
        self._cuda.use()
        self.stream = self._cuda.stream()
        self._contexts: dict[int, Any] = {}
        self.input, self.output, self._scratch = (_Memory(self._cuda, self._forget_graphs) for _ in range(3))
        self._graphs: OrderedDict[tuple[Any, ...], _Captured] = OrderedDict()

    @contextmanager
    def finished(self) -> Iterator[None]:
        """Wait at the end of the block, also after an exception, until its work on the GPU is done."""
        try:
            yield
        except BaseException:
            with suppress(VaeError):
                self._cuda.wait(self.stream)
            raise
        self._cuda.wait(self.stream)

    def prepare(self, profile: int, shape: tuple[int, ...]) -> _Prepared:
        """Return the profile's context, prepared for an input of this shape."""
        if profile not in self._contexts:
            # One context for each profile: a context that switches profiles loses its setup.
            self._contexts[profile] = self._new_context(profile, shape)
        return self._with_shape(self._contexts[profile], profile, shape)

    def _with_shape(self, context: Any, profile: int, shape: tuple[int, ...]) -> _Prepared:
        """Set the context's input shape and scratch memory, and infer the output shape, in TensorRT's order."""
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
        scratch = self._scratch.at_least(needed, f"the {engine.graph} of {list(shape)}")
        context.set_device_memory(scratch, needed)
        return _Prepared(profile, context, tuple(shape), output_shape, scratch)

    def execute(self, prepared: _Prepared, source: int, target: int) -> None:
        """Enqueue the work on the stream: replay a captured CUDA graph if there is one, else launch the kernels."""
        key = (prepared.profile, prepared.shape, source, target, prepared.scratch)
        captured = self._graphs.get(key)
        if captured is not None:
            self._graphs.move_to_end(key)
            self._cuda.launch(captured.graph, self.stream)
            return
        engine = self._engine
        capture = engine.settings.cuda_graphs and not engine.flavour.is_rtx  # RTX captures by itself
        if capture:
            # Each CUDA graph needs a context of its own: a new shape or address in its context would invalidate it.
            context = self._new_context(prepared.profile, prepared.shape)
            prepared = self._with_shape(context, prepared.profile, prepared.shape)
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
        """Launch again with capture, for later calls; TensorRT forbids capturing the first run of a shape."""
        self._cuda.wait(self.stream)
        self._cuda.begin_capture(self.stream)
        try:
            self._launch(prepared)
        except VaeError:
            with suppress(VaeError):  # capture has to end; the first error has the better reason
                self._cuda.destroy_graph(self._cuda.end_capture(self.stream))
            raise
        self._graphs[key] = _Captured(self._cuda.end_capture(self.stream), prepared.context)
        while len(self._graphs) > self._engine.settings.max_graphs:
            self._cuda.destroy_graph(self._graphs.popitem(last=False)[1].graph)

    def _new_context(self, profile: int, shape: Sequence[int]) -> Any:
        engine, trt = self._engine, self._engine.flavour.trt
        # The strategy STATIC would at once allocate memory for the largest shape of all profiles.
        config_or_strategy = engine.config or trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = engine.engine.create_execution_context(config_or_strategy)
        if context is None:
            raise engine.complain("create_execution_context", shape)
        if not context.set_optimization_profile_async(profile, self.stream):
            raise engine.complain(f"set_optimization_profile_async({profile})", shape)
        self._cuda.wait(self.stream)
        return context

    def _forget_graphs(self) -> None:
        """Destroy the captured CUDA graphs; called before memory is freed whose addresses they contain."""
        while self._graphs:
            self._cuda.destroy_graph(self._graphs.popitem()[1].graph)

    def free(self) -> None:
        """Free the memory; the next call allocates it again."""
        for memory in (self.input, self.output, self._scratch):
            memory.free()

    def close(self) -> None:
        """Wait for the stream, then free everything."""
        self._cuda.use()
        self._cuda.wait(self.stream)
        self._forget_graphs()
        self._contexts.clear()
        self.free()
        self._cuda.destroy_stream(self.stream)


class _Memory:
    """Device memory for one purpose; replaced if a call needs more, or less than an eighth of it."""

    def __init__(self, cuda: Cuda, before_release: Callable[[], None]) -> None:
        self._cuda, self._before_release = cuda, before_release
        self._address = self._size = 0

    def at_least(self, size: int, purpose: str) -> int:
        """Return the address of at least `size` bytes; `purpose` is for the message of `OutOfMemoryError`."""
        if not size <= self._size <= 8 * size:
            self.free()  # before the allocation, so that old and new memory are never needed together
            self._address, self._size = self._cuda.allocate(size, purpose), size
        return self._address

    def free(self) -> None:
        if self._address:
            self._before_release()
            address, self._address, self._size = self._address, 0, 0
            self._cuda.release(address)
