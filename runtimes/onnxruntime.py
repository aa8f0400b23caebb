"""ONNX Runtime: an ONNX bundle on the CPU or on an NVIDIA GPU."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtimes.base import Array, GraphName, VaeRuntime, answer_in_kind, check_count
from runtimes.bundle import GRAPHS, Bundle, Step
from runtimes.errors import BackendUnavailable, CompatibilityError, OutOfMemoryError, VaeError, is_out_of_memory
from runtimes.onnx_scan import check_onnx
from runtimes.posterior import array_module

try:
    import onnxruntime as ort
except ImportError:
    raise BackendUnavailable(
        "ONNX Runtime is not installed: pip install 'vae-export[cpu]', or 'vae-export[gpu]' for NVIDIA GPUs"
    ) from None

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_TYPES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "bfloat16": "tensor(bfloat16)",
    "uint8": "tensor(uint8)",
}
_STATE = ort.capi.onnxruntime_pybind11_state
#: what a session raises while it runs: they have no common base but Exception. The arena's lack of memory is a Fail.
_RUN_ERRORS = (_STATE.Fail, _STATE.RuntimeException, _STATE.InvalidArgument, _STATE.EPFail, _STATE.NotImplemented)


class OnnxRuntimeVae(VaeRuntime):
    """An ONNX bundle in ONNX Runtime. Safe for threads: sessions keep no state between calls.

    `device` is "cpu", "cuda" or "cuda:N"; where its provider does not load, that is `BackendUnavailable` and no
    fall-back. `threads` bounds the threads of one call (default: one per core). torch tensors on a GPU are read and
    answered there.
    """

    backend = "onnxruntime"
    runs_steps = True

    def __init__(
        self, bundle: Bundle, *, device: str = "cpu", threads: int | None = None, check_finite: bool = False
    ) -> None:
        super().__init__(bundle, check_finite=check_finite)
        check_count("threads", threads)
        self.device = device
        self._kind, self._index = _parse_device(device)
        self._threads = threads
        data = {graph: bundle.read(self.spec[graph].file) for graph in GRAPHS}  # all is sound before any is parsed
        self._sessions = {graph: self._open(graph, data.pop(graph)) for graph in GRAPHS}
        self._steps: dict[str, Any] = {}

    @staticmethod
    def check_devices() -> dict[str, str]:
        """{device: "works", or why not}; loading a provider's libraries is left to `open_vae`."""
        available = ort.get_available_providers()
        gpu = "needs pip install 'vae-export[gpu]' in place of onnxruntime"
        return {device: "works" if name in available else gpu for device, name in _PROVIDERS.items()}

    def _open(self, graph: str, data: bytes) -> Any:
        spec = self.spec[graph]
        session = self._load(data, spec.file)
        for said, found in ((spec.input, session.get_inputs()), (spec.output, session.get_outputs())):
            if [(tensor.name, tensor.type) for tensor in found] != [(said.name, _TYPES.get(said.dtype))]:
                raise CompatibilityError(
                    f"{spec.file} has {', '.join(f'{t.name} of {t.type}' for t in found)} where the manifest says "
                    f"{said.name} of {said.dtype}"
                )
        return session

    def _load(self, data: bytes, file: str, *, arena: bool = True) -> Any:
        provider = _PROVIDERS[self._kind]
        if provider not in ort.get_available_providers():
            raise BackendUnavailable(
                f"device {self.device!r} needs {provider}, which this ONNX Runtime {ort.__version__} lacks: "
                "pip uninstall onnxruntime && pip install 'vae-export[gpu]'"
            )
        options = ort.SessionOptions()
        # Its own format, which it would tell by four bytes, is not what was checked.
        options.add_session_config_entry("session.load_model_format", "ONNX")
        options.log_severity_level = 4  # errors come as exceptions: no second time on stderr
        check_onnx(data, file)
        # Once more for external data, which a graph from bytes would read from the working directory: nothing is here.
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
        # It would plan one block for all of a call's tensors when a size comes again, and allocate that beside the
        # arena, which keeps what the first call took: 1.5 times the memory, for nothing gained in time.
        options.enable_mem_pattern = False
        options.enable_cpu_mem_arena = arena
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        settings = {"device_id": self._index} if self._kind == "cuda" else {}
        try:
            session = ort.InferenceSession(data, options, providers=[(provider, settings)])
        except Exception as error:  # onnxruntime's exceptions have no common base but Exception
            message = f"ONNX Runtime {ort.__version__} cannot load {file}: {_reason(error)}"
            raise CompatibilityError(message) from None
        if session.get_providers()[0] != provider:
            # ONNX Runtime only warns, and goes on with the CPU, where the provider's libraries do not load.
            raise BackendUnavailable(
                f"{provider} did not load for device {self.device!r}: its CUDA or cuDNN libraries are missing or of "
                "another version; `vae-export doctor` says more"
            )
        return session

    def _open_steps(self, steps: Sequence[Step]) -> None:
        for step in steps:
            # Tiles are few and large: without an arena they are as fast, and nothing is kept for the next step, which
            # has a session of its own. What runs on the whole is slower without, and its arena is given back.
            arena = step.kind == "whole"
            self._steps[step.file] = self._load(self._bundle.read(step.file), step.file, arena=arena)

    def _run_step(self, step: Step, inputs: Mapping[str, Array]) -> Sequence[Array]:
        options = ort.RunOptions()
        if self._kind == "cpu" and step.kind == "whole":
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        try:
            result: Sequence[Array] = self._steps[step.file].run(None, dict(inputs), options)
            return result
        except (*_RUN_ERRORS, MemoryError) as error:
            shape = list(next(iter(inputs.values())).shape)
            if is_out_of_memory(error):
                raise OutOfMemoryError(f"a tile of {shape} does not fit the memory of {self.device}") from None
            raise VaeError(f"ONNX Runtime failed in {step.file} of {shape}: {_reason(error)}") from None

    def _run(self, graph: GraphName, x: Any) -> Any:
        try:
            if self._kind == "cuda" and array_module(x) is not np and x.is_cuda:
                return self._run_on_device(graph, x)
            return answer_in_kind(lambda array: self._run_on_host(graph, array), x)
        except (*_RUN_ERRORS, MemoryError) as error:
            if is_out_of_memory(error):
                raise OutOfMemoryError(
                    f"the {graph} of {list(x.shape)} does not fit the memory of {self.device}: {_reason(error)}. "
                    "enable_tiling() or enable_slicing() need less"
                ) from None
            raise VaeError(f"ONNX Runtime failed in the {graph} of {list(x.shape)}: {_reason(error)}") from None

    def _run_on_host(self, graph: GraphName, x: Array) -> Array:
        spec = self.spec[graph]
        result: Array = self._sessions[graph].run([spec.output.name], {spec.input.name: np.ascontiguousarray(x)})[0]
        return result

    def _run_on_device(self, graph: GraphName, x: Any) -> Any:
        """A torch tensor on the GPU: bound where it is, the answer allocated beside it."""
        torch, spec = array_module(x), self.spec[graph]
        x = x.contiguous()
        shape = self._output_shape(graph, x.shape)
        result = torch.empty(shape, dtype=getattr(torch, spec.output.dtype), device=x.device)
        binding = self._sessions[graph].io_binding()
        for bind, tensor, info in (
            (binding.bind_input, x, spec.input),
            (binding.bind_output, result, spec.output),
        ):
            bind(
                info.name,
                x.device.type,
                x.device.index or 0,
                np.dtype(info.dtype),
                tuple(tensor.shape),
                tensor.data_ptr(),
            )
        if x.is_cuda:
            torch.cuda.current_stream(x.device).synchronize()  # ONNX Runtime works on a stream of its own
        self._sessions[graph].run_with_iobinding(binding)
        return result

    def _close(self) -> None:
        self._sessions.clear()
        self._steps.clear()


def _parse_device(device: str) -> tuple[str, int]:
    match = re.fullmatch(r"(cpu|cuda)(?::(\d+))?", device)
    if match is None:
        raise BackendUnavailable(f"ONNX Runtime runs on 'cpu', 'cuda' or 'cuda:N', not {device!r}")
    return match[1], int(match[2] or 0)


def _reason(error: Exception) -> str:
    """ONNX Runtime's message without the place in its source."""
    lines = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__
