"""TensorRT as `runtimes` uses it: a plan is an ONNX graph with a header, and ONNX Runtime does the work.

The classes have the names of the real modules and no others (a test holds them against the lists of names), and keep
the rules of the real ones: the order of calls, answers that say False, shapes inside of profiles, one thread a context.
A plan here is not a plan there: nothing is said of kernels. Graphs named "crash", "killed", "noisy" and "slow" are.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import threading
import time
from enum import IntEnum
from fractions import Fraction
from typing import Any

import numpy as np
from fake_gpu import ALIGNMENT, Answer, gpu

MAGIC = b"FAKEPLAN"
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
ENDS = {"crash": signal.SIGSEGV, "killed": signal.SIGKILL}  # names of graphs -> what ends the process


def install(module: dict[str, Any], name: str, version: str) -> None:
    """Fill the namespace of a module with one of the flavours."""
    rtx = name == "tensorrt_rtx"

    class ILogger:
        class Severity(IntEnum):
            INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    class IProgressMonitor:
        pass

    class BuilderFlag(IntEnum):
        TF32 = 7

    class NetworkDefinitionCreationFlag(IntEnum):
        STRONGLY_TYPED = 1

    class DataType(IntEnum):
        FLOAT, HALF, UINT8, BF16 = 0, 1, 5, 7

    class TensorIOMode(IntEnum):
        NONE, INPUT, OUTPUT = range(3)

    class ExecutionContextAllocationStrategy(IntEnum):
        STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)

    class INetworkDefinition:
        pass

    class ParserError:
        def __init__(self, name: str, operator: str, desc: str) -> None:
            self._said = name, operator, desc

        def node_name(self) -> str:
            return self._said[0]

        def node_operator(self) -> str:
            return self._said[1]

        def desc(self) -> str:
            return self._said[2]

        def node(self) -> int:
            return 0

    class OnnxParser:
        def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
            self._network, self._errors = network, []

        def parse(self, data: bytes) -> Answer:
            import onnx

            self._network._data = data
            try:
                graph = onnx.load_model_from_string(data).graph
            except Exception:
                self._errors.append(ParserError("", "", "Failed to parse the ONNX model"))
                return Answer(False, "parse")
            if graph.name in ENDS:
                os.kill(os.getpid(), ENDS[graph.name])
            if graph.name == "noisy":
                print("5")  # JSON, by chance
                os.write(1, b"a library \xff\n")
            self._network._name = graph.name
            self._errors += [
                ParserError(node.name, node.op_type, f"No importer registered for op: {node.op_type}")
                for node in graph.node
                if node.domain not in ("", "ai.onnx")
            ]
            self._network._input = graph.input[0].name
            return Answer(not self._errors, "parse")

        @property
        def num_errors(self) -> int:
            return len(self._errors)

        def get_error(self, index: int) -> ParserError:
            return self._errors[index]

    class IOptimizationProfile:
        def __init__(self) -> None:
            self._shapes: dict[str, Any] = {}

        def set_shape(self, input: str, min: tuple, opt: tuple, max: tuple) -> None:  # the real one answers nothing
            self._shapes[input] = [list(min), list(opt), list(max)]

    class ITimingCache:
        def __init__(self, data: bytes) -> None:
            self._data = data

        def serialize(self) -> bytes:
            return self._data + b"."

    class IBuilderConfig:
        def __init__(self) -> None:
            self._profiles: list[Any] = []
            self._flags = {BuilderFlag.TF32}
            self.progress_monitor: Any = None
            self._timing: ITimingCache | None = None

        def clear_flag(self, flag: BuilderFlag) -> None:
            self._flags.discard(flag)

        def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
            ordered = all(a <= b <= c for m, o, x in profile._shapes.values() for a, b, c in zip(m, o, x, strict=True))
            if not ordered or not profile._shapes:
                return -1  # and no exception
            self._profiles.append(profile._shapes)
            return len(self._profiles) - 1

        if rtx:
            num_compute_capabilities = 0

            def set_compute_capability(self, capability: Any, index: int) -> Answer:
                return Answer(index < self.num_compute_capabilities, "set_compute_capability")

        def create_timing_cache(self, data: bytes) -> ITimingCache:
            return ITimingCache(data)

        def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> Answer:
            self._timing = cache
            return Answer(True, "set_timing_cache")

        def get_timing_cache(self) -> ITimingCache | None:
            return self._timing

    class Builder:
        def __init__(self, logger: ILogger) -> None:
            self._logger = logger

        def create_network(self, flags: int) -> INetworkDefinition:
            gpu.check(
                flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED, "a network that is not strongly typed"
            )
            return INetworkDefinition()

        def create_builder_config(self) -> IBuilderConfig:
            return IBuilderConfig()

        def create_optimization_profile(self) -> IOptimizationProfile:
            return IOptimizationProfile()

        def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes | None:
            monitor = config.progress_monitor
            if monitor is not None:
                monitor.phase_start("Building Engine", None, 2)
                monitor.phase_start("Tactic Selection", "Building Engine", 3)
                for step in range(3):
                    monitor.step_complete("Tactic Selection", step)
                monitor.phase_finish("Tactic Selection")
                monitor.phase_finish("Building Engine")
            if any(set(shapes) != {network._input} for shapes in config._profiles):
                self._logger.log(ILogger.Severity.ERROR, "[builder.cpp::build::1] a profile lacks an input")
                return None
            if network._name == "slow":
                time.sleep(60)
            shapes = [profile[network._input] for profile in config._profiles]
            header = json.dumps({"flavour": name, "version": version, "profiles": shapes}).encode()
            return MAGIC + len(header).to_bytes(4, "little") + header + network._data

    class IRuntimeCache:
        def __init__(self) -> None:
            self._data = b"kernels"

        def deserialize(self, blob: bytes) -> Answer:
            right = blob.startswith(b"kernels")
            self._data = blob if right else self._data
            return Answer(right, "IRuntimeCache.deserialize")

        def serialize(self) -> bytes:
            return self._data + b"+1"

    class IRuntimeConfig:
        def __init__(self) -> None:
            self._strategy = ExecutionContextAllocationStrategy.STATIC

        def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
            self._strategy = strategy

        if rtx:
            cuda_graph_strategy: Any = None
            dynamic_shapes_kernel_specialization_strategy: Any = None

            def create_runtime_cache(self) -> IRuntimeCache:
                return IRuntimeCache()

            def set_runtime_cache(self, cache: IRuntimeCache) -> Answer:
                self._cache = cache
                return Answer(True, "set_runtime_cache")

    class IExecutionContext:
        """One thread, in the order: profile, shape, infer, memory, addresses, execute."""

        def __init__(self, engine: Any, strategy: Any) -> None:
            self._engine, self._managed = engine, strategy == ExecutionContextAllocationStrategy.USER_MANAGED
            self._profile: int | None = None
            self._shape: tuple[int, ...] | None = None
            self._inferred = False
            self._needed: int | None = None
            self._memory: tuple[int, int] | None = None
            self._addresses: dict[str, int] = {}
            self._thread = 0
            self._ran: tuple[int, ...] | None = None  # the shape of the last run outside of a capture

        def __setattr__(self, name: str, value: Any) -> None:
            if name in ("_profile", "_shape", "_memory", "_addresses") and getattr(self, name, None) != value:
                super().__setattr__("_version", getattr(self, "_version", 0) + 1)  # it was told something else
            super().__setattr__(name, value)

        def _alone(self) -> None:
            """From set_input_shape on, the rest has to come from the same thread."""
            gpu.check(self._thread == threading.get_ident(), "a context is used from two threads at once")

        def set_optimization_profile_async(self, index: int, stream: int) -> Answer:
            gpu.put(stream, lambda: None)
            self._profile = index if index < self._engine.num_optimization_profiles else None
            gpu.contexts.append(index)
            return Answer(self._profile is not None, "set_optimization_profile_async")

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> Answer:
            gpu.check(self._profile is not None, "set_input_shape before a profile was set")
            self._thread = threading.get_ident()
            low, _, high = self._engine._profiles[self._profile]
            inside = all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))
            self._shape, self._inferred, self._needed = (tuple(shape) if inside else None), False, None
            if not inside:
                self._engine._logger.log(ILogger.Severity.ERROR, f"{tuple(shape)} is outside of the profile")
            return Answer(inside, "set_input_shape")

        def infer_shapes(self) -> list[str]:
            self._alone()
            self._inferred = self._shape is not None
            return [] if self._inferred else [self._engine._input.name]

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            gpu.check(self._inferred, "get_tensor_shape before infer_shapes")
            return self._engine._output_shape(self._shape) if name == self._engine._output.name else self._shape

        def update_device_memory_size_for_shapes(self) -> int:
            gpu.check(self._inferred, "update_device_memory_size_for_shapes before infer_shapes")
            gpu.check(self._managed, "memory of a context that manages its own")
            self._needed = 64 * int(np.prod(self._shape))
            return self._needed

        def set_device_memory(self, memory: int, size: int) -> None:
            self._alone()
            gpu.check(self._needed is not None, "set_device_memory before its size was asked for")
            gpu.check(memory % ALIGNMENT == 0, "scratch memory that is not aligned to 256 bytes")
            gpu.check(size >= self._needed, f"scratch memory of {size} bytes where {self._needed} are needed")
            self._memory = memory, size

        def set_tensor_address(self, name: str, memory: int) -> Answer:
            self._addresses = {**self._addresses, name: memory}
            known = name in (self._engine._input.name, self._engine._output.name)
            return Answer(known and memory != 0, "set_tensor_address")

        def execute_async_v3(self, stream_handle: int) -> Answer:
            self._alone()
            gpu.check(self._inferred, "execute before infer_shapes")
            gpu.check(self._memory is not None and self._needed is not None, "execute without scratch memory")
            sides = self._engine._input, self._engine._output
            source, target = (self._addresses.get(side.name) for side in sides)
            gpu.check(bool(source and target), "execute with an address missing")
            gpu.check_device("execute_async_v3")
            shape, memory, version = self._shape, self._memory, self._version
            captured = stream_handle in gpu.captures
            gpu.check(not captured or self._ran == shape, "the first run of a shape is captured")
            self._ran = shape

            def work() -> None:
                gpu.check(
                    not captured or self._version == version,
                    "a graph is launched of a context that was told something else since",
                )
                self._engine._compute(shape, source, target, memory)

            gpu.put(stream_handle, work)
            return Answer(True, "execute_async_v3")

    class ICudaEngine:
        def __init__(self, plan: bytes, logger: ILogger) -> None:
            import onnxruntime

            length = int.from_bytes(plan[8:12], "little")
            self._profiles = json.loads(plan[12 : 12 + length])["profiles"]
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            options.log_severity_level = 4
            self._session = onnxruntime.InferenceSession(
                plan[12 + length :], options, providers=["CPUExecutionProvider"]
            )
            (self._input,), (self._output,) = self._session.get_inputs(), self._session.get_outputs()
            self._logger = logger
            self._scale: Fraction | None = None  # of height and width, from input to output

        num_io_tensors = 2

        @property
        def num_optimization_profiles(self) -> int:
            return len(self._profiles)

        def get_tensor_name(self, index: int) -> str:
            return (self._input, self._output)[index].name

        def get_tensor_mode(self, name: str) -> TensorIOMode:
            return TensorIOMode.INPUT if name == self._input.name else TensorIOMode.OUTPUT

        def get_tensor_dtype(self, name: str) -> DataType:
            side = self._input if name == self._input.name else self._output
            return {"tensor(float)": DataType.FLOAT, "tensor(float16)": DataType.HALF}[side.type]

        def create_execution_context(self, how: Any) -> IExecutionContext:
            return IExecutionContext(self, getattr(how, "_strategy", how))

        def create_runtime_config(self) -> IRuntimeConfig:
            return IRuntimeConfig()

        def _output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
            if self._scale is None:
                smallest = np.zeros(self._profiles[0][0], TYPES[self._input.type])
                found = self._session.run(None, {self._input.name: smallest})[0].shape
                self._scale = Fraction(found[2], smallest.shape[2])
            return shape[0], self._output.shape[1], int(shape[2] * self._scale), int(shape[3] * self._scale)

        def _compute(self, shape: tuple[int, ...], source: int, target: int, scratch: tuple[int, int]) -> None:
            x = np.empty(shape, TYPES[self._input.type])
            gpu.require(source, x.nbytes, "the input")
            gpu.require(*scratch, "the scratch memory")
            ctypes.memmove(x.ctypes.data, source, x.nbytes)
            y = self._session.run(None, {self._input.name: x})[0]
            gpu.require(target, y.nbytes, "the output")
            ctypes.memmove(target, y.ctypes.data, y.nbytes)
            gpu.executed += 1

    class Runtime:
        def __init__(self, logger: ILogger) -> None:
            self._logger = logger

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
            gpu.check_device("deserialize_cuda_engine")
            gpu.deserialized += 1
            try:
                if serialized_engine[:8] != MAGIC:
                    raise ValueError("magic tag does not match")
                return ICudaEngine(serialized_engine, self._logger)
            except Exception as error:
                self._logger.log(ILogger.Severity.ERROR, f"[runtime.cpp::parsePlan::314] {error}")
                return None

    if rtx:

        class ComputeCapability(IntEnum):
            NONE, CURRENT, SM75, SM80, SM86, SM89, SM120, SM121 = 0, 1, 75, 80, 86, 89, 120, 121

        class CudaGraphStrategy(IntEnum):
            DISABLED, WHOLE_GRAPH_CAPTURE = range(2)

        class DynamicShapesKernelSpecializationStrategy(IntEnum):
            LAZY, EAGER, NONE = range(3)

    names = {key: value for key, value in locals().items() if isinstance(value, type)}
    if not rtx:
        del names["IRuntimeCache"]
    module.update(names, __version__=version)
