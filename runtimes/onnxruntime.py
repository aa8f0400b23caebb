"""The ONNX Runtime backend: runs ONNX bundles on the CPU or on an NVIDIA GPU."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from runtimes.arrays import Array, answer_in_kind, array_module
from runtimes.base import VaeRuntime
from runtimes.bundle import Bundle
from runtimes.cancellation import cancellable
from runtimes.cpus import thread_limit
from runtimes.edge import check_count, device_name
from runtimes.errors import (
    BackendUnavailable,
    CompatibilityError,
    ConfigError,
    NotInstalled,
    OutOfMemoryError,
    ShapeError,
    VaeError,
    is_out_of_memory,
)
from runtimes.manifest import Step
from runtimes.names import GRAPHS, Graph
from runtimes.onnx_scan import check_onnx

try:
    import onnxruntime as ort
except ImportError:
    raise NotInstalled(
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
#: errors of a running session; their only common base is Exception. The arena reports missing memory as Fail.
_RUN_ERRORS = (_STATE.Fail, _STATE.RuntimeException, _STATE.InvalidArgument, _STATE.EPFail, _STATE.NotImplemented)


class OnnxRuntimeVae(VaeRuntime):
    """An ONNX bundle in ONNX Runtime. Thread-safe: sessions keep no state between calls.

    `device` is "cpu", "cuda" or "cuda:N". If its provider does not load, `BackendUnavailable` is raised; there is no
    fallback. `threads` limits the threads of one call (default: one per physical core, or the number of CPUs that this
    process may use if that is less than the machine has). torch tensors on a GPU are read in place, and the result is
    a tensor on the same GPU.

    `allow_tf32` computes fp32 graphs in TF32 on a GPU, with the 10 mantissa bits of fp16: about 77 dB to the reference
    instead of 137, and many times faster (docs/speed.md). The validation results in the manifest do not cover TF32.
    """

    backend = "onnxruntime"
    runs_steps = True

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str = "cpu",
        threads: int | None = None,
        allow_tf32: bool = False,
        check_finite: bool = False,
    ) -> None:
        super().__init__(bundle, check_finite=check_finite)
        check_count("threads", threads)
        self.device = device_name(device)
        self._kind, self._index = _parse_device(device)
        if allow_tf32 and (self._kind, self.precision) != ("cuda", "fp32"):
            raise ConfigError(f"allow_tf32 is for fp32 bundles on cuda, not for {self.precision} on {device}")
        self._threads = thread_limit() if threads is None else threads
        self._allow_tf32 = allow_tf32
        data = {graph: bundle.read(self.spec[graph].file) for graph in GRAPHS}  # check every file before parsing any
        self._sessions = {graph: self._open(graph, data.pop(graph)) for graph in GRAPHS}
        self._steps: dict[str, Any] = {}

    @staticmethod
    def check_devices() -> dict[str, str]:
        """Return {device: "works" or the reason why not}; `open_vae` is what loads a provider's libraries."""
        available = ort.get_available_providers()
        gpu = "needs pip install 'vae-export[gpu]' in place of onnxruntime"
        return {device: "works" if name in available else gpu for device, name in _PROVIDERS.items()}

    def _open(self, graph: Graph, data: bytes) -> Any:
        spec = self.spec[graph]
        session = self._load(data, spec.file)
        for expected, actual in ((spec.input, session.get_inputs()), (spec.output, session.get_outputs())):
            if [(tensor.name, tensor.type) for tensor in actual] != [(expected.name, _TYPES.get(expected.dtype))]:
                raise CompatibilityError(
                    f"{spec.file} has {', '.join(f'{t.name} of {t.type}' for t in actual)} where the manifest says "
                    f"{expected.name} of {expected.dtype}"
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
        # ONNX Runtime would detect its own format by four bytes, but the check covered ONNX only.
        options.add_session_config_entry("session.load_model_format", "ONNX")
        options.log_severity_level = 4  # errors arrive as exceptions; do not repeat them on stderr
        check_onnx(data, file)
        # Second line of defence against external data, which a graph from bytes would read from the working directory:
        # the path given here holds no files.
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
        # When a size repeats, the memory pattern allocates one block for all tensors of a call, in addition to the
        # arena, which keeps the memory of the first call: 1.5 times the memory, without a gain in time.
        options.enable_mem_pattern = False
        options.enable_cpu_mem_arena = arena
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        if self._kind == "cuda":
            _preload_cuda()
        try:
            session = ort.InferenceSession(data, options, providers=[(provider, self._provider_options())])
        except Exception as error:  # the only common base of onnxruntime's exceptions
            message = f"ONNX Runtime {ort.__version__} cannot load {file}: {_reason(error)}"
            raise CompatibilityError(message) from None
        if session.get_providers()[0] != provider:
            # If the provider's libraries do not load, ONNX Runtime warns and continues on the CPU.
            raise BackendUnavailable(
                f"{provider} did not load for device {self.device!r}: its CUDA or cuDNN libraries are missing or of "
                "another version; `vae-export doctor` says more"
            )
        return session

    def _provider_options(self) -> dict[str, Any]:
        if self._kind == "cpu":
            return {}
        # Compute fp32 in fp32 unless the user asked for TF32, which the provider would use by default.
        options: dict[str, Any] = {"device_id": self._index, "use_tf32": int(self._allow_tf32)}
        if self.precision == "fp16":
            # The default, an exhaustive search, selects kernels that are 13 to 17 times slower than those of the
            # heuristic. In fp32 the search is better: 0.79 of the heuristic's time (docs/speed.md, both measured with a
            # decoder on an H200).
            options["cudnn_conv_algo_search"] = "HEURISTIC"
        return options

    def open_steps(self, steps: Sequence[Step]) -> None:
        for step in steps:
            # Tiles are few and large: without an arena they are as fast, and no memory is kept when the next step runs
            # in its own session. Steps on the whole image are slower without an arena; they use one and free it.
            arena = step.kind == "whole"
            self._steps[step.file] = self._load(self._bundle.read(step.file), step.file, arena=arena)

    def run_step(self, step: Step, inputs: Mapping[str, Array]) -> Sequence[Array]:
        try:
            with _run_options() as options:
                if self._kind == "cpu" and step.kind == "whole":
                    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
                result: Sequence[Array] = self._steps[step.file].run(None, dict(inputs), options)
            return result
        except (*_RUN_ERRORS, MemoryError) as error:
            shape = list(next(iter(inputs.values())).shape)
            if is_out_of_memory(error):
                raise OutOfMemoryError(f"a tile of {shape} does not fit the memory of {self.device}") from None
            raise VaeError(f"ONNX Runtime failed in {step.file} of {shape}: {_reason(error)}") from None

    def _run(self, graph: Graph, x: Any) -> Any:
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

    def _run_on_host(self, graph: Graph, x: Array) -> Array:
        spec, feeds = self.spec[graph], {self.spec[graph].input.name: np.ascontiguousarray(x)}
        with _run_options() as options:
            result: Array = self._sessions[graph].run([spec.output.name], feeds, options)[0]
        return result

    def _run_on_device(self, graph: Graph, x: Any) -> Any:
        """Run on a torch tensor on the GPU: bind it in place, and allocate the result on the same GPU."""
        torch, spec = array_module(x), self.spec[graph]
        if x.is_cuda and x.device.index != self._index:
            raise ShapeError(f"the array is on {x.device}, and this VAE on cuda:{self._index}")
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
            torch.cuda.current_stream(x.device).synchronize()  # ONNX Runtime uses its own stream
        with _run_options() as options:
            self._sessions[graph].run_with_iobinding(binding, options)
        return result

    def _close(self) -> None:
        self._sessions.clear()
        self._steps.clear()


@contextlib.contextmanager
def _run_options() -> Iterator[Any]:
    """Yield options for one run, through which another thread can cancel it."""
    options = ort.RunOptions()
    with cancellable(functools.partial(setattr, options, "terminate", True)):
        yield options


@functools.cache
def _preload_cuda() -> None:
    """Load CUDA's libraries from NVIDIA's pip packages, which the dynamic loader does not search."""
    with contextlib.redirect_stdout(sys.stderr):  # it prints missing libraries, which the provider may still find
        ort.preload_dlls()
    # The provider logs an error for each plan without cuDNN kernels and continues with the next plan.
    ort.set_default_logger_severity(4)


def _parse_device(device: str) -> tuple[str, int]:
    match = re.fullmatch(r"(cpu|cuda)(?::(\d+))?", device_name(device))
    if match is None:
        raise BackendUnavailable(f"ONNX Runtime runs on 'cpu', 'cuda' or 'cuda:N', not {device!r}")
    return match[1], int(match[2] or 0)


def _reason(error: Exception) -> str:
    """Return ONNX Runtime's message without the location in its source code."""
    lines = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__
