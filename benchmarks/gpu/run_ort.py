"""Stage ort: ONNX Runtime's CUDA provider over each form of the graphs, against the rows of stage torch.

Inputs and outputs stay on the card (bound), but for the rows "as users have it", which go through `runtimes` with NumPy
arrays. fp32 is computed without TF32 unless the row says so. The provider's own default for convolutions is a search,
EXHAUSTIVE.
"""

from __future__ import annotations

import contextlib
import itertools
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.cuda_provider import SETTINGS
from benchmarks.gpu.stage import HostClock, Lacks, Stage, Way, error_of, require, timed
from benchmarks.peers import Case, gpu_memory

PROVIDER = "CUDAExecutionProvider"
GRAPH = {"enable_cuda_graph": 1}
HEURISTIC = SETTINGS["heuristic"]
#: name -> (options of the provider, whether the sizes are fixed in the graph)
WAYS: dict[str, tuple[dict[str, Any], bool]] = {
    **{name: (options, False) for name, options in SETTINGS.items()},
    "heuristic, fixed sizes": (HEURISTIC, True),
    "heuristic, fixed sizes, CUDA graph": ({**HEURISTIC, **GRAPH}, True),
    "fixed sizes, CUDA graph": (GRAPH, True),
    "heuristic, TF32": ({**HEURISTIC, "use_tf32": 1}, False),
    "TF32": ({"use_tf32": 1}, False),
}
RUNTIME = "as users have it"


class FormWay(NamedTuple):
    """A form of the graph, and the settings of the session that runs it."""

    model: str
    case: Case
    precision: str
    form: str  #: of cuda_provider.FORMS; "" for RUNTIME
    setting: str  #: of WAYS, or RUNTIME

    @property
    def how(self) -> str:
        return self.setting if self.setting == RUNTIME else f"{self.form}; {self.setting}"

    @property
    def row(self) -> Way:
        return Way(self.model, self.case, self.precision, self.how)


def ways(rehearsal: bool) -> list[FormWay]:
    """All that is measured, the most telling first; those of one session beside one another."""
    sizes = (64,) if rehearsal else (512, 1024)
    found: list[FormWay] = []

    def add(model: str, graph: str, precision: str, form: str, *settings: str, sizes: tuple[int, ...] = sizes) -> None:
        for setting in settings:
            found.extend(FormWay(model, Case(graph, size, 1), precision, form, setting) for size in sizes)

    if rehearsal:
        add("sd", "decode", "fp32", "ours", "default", "heuristic, fixed sizes, CUDA graph", RUNTIME)
        add("flux", "encode", "fp16", "plain", "heuristic")
        return found
    for graph in ("decode", "encode"):
        add("sd", graph, "fp16", "ours", "heuristic", "heuristic, fixed sizes, CUDA graph", RUNTIME)
    for graph in ("decode", "encode"):
        add("sd", graph, "fp16", "ours", "heuristic, NHWC", "heuristic, fixed sizes", "default")
        add("sd", graph, "fp16", "plain", "heuristic", "heuristic, NHWC")
    for graph in ("decode", "encode"):
        add("sd", graph, "fp32", "ours", "heuristic", "heuristic, TF32", "TF32", "default")
        add("sd", graph, "fp32", "plain", "heuristic", "heuristic, TF32")
    for form in ("transposed convolutions", "upsampling not folded"):
        add("sd", "decode", "fp16", form, "heuristic", "heuristic, NHWC")
        add("sd", "decode", "fp32", form, "heuristic", "heuristic, TF32")
    for graph, precision in itertools.product(("decode", "encode"), ("fp16",)):
        add("sd", graph, precision, "ours", "heuristic", sizes=(2048,))
        add("flux", graph, precision, "ours", "heuristic")
        found.append(FormWay("sd", Case(graph, 512, 4), precision, "ours", "heuristic"))
        add("sd", graph, precision, "plain", "default", "NHWC")
        add("sd", graph, precision, "ours", "NHWC", "fixed sizes, CUDA graph")
    return found


def run(stage: Stage) -> None:
    ort = require("onnxruntime", "it is what is measured")
    load_provider(ort, stage.rehearsal)
    stage.note(f"ONNX Runtime {ort.__version__}, {getattr(ort.capi, '__file__', '')}: {ort.get_available_providers()}")
    for way in ways(stage.rehearsal):
        facts = way.row.facts
        if way.setting.endswith("TF32"):
            facts["precision"] = "tf32"  # the peers that it is compared with
        stage.measure(way.row.name, facts, lambda way=way: measure(stage, ort, way))  # type: ignore[misc]


def load_provider(ort: Any, rehearsal: bool) -> None:
    """Load the CUDA provider, or `Lacks`. CUDA's libraries may be those of PyTorch, which alone finds them."""
    if not rehearsal:
        if PROVIDER not in ort.get_available_providers():
            raise Lacks(
                f"onnxruntime-gpu: this ONNX Runtime {ort.__version__} has {', '.join(ort.get_available_providers())}; "
                "python -m tools.offline_wheels ort brings it here"
            )
        with contextlib.suppress(ImportError):
            import torch  # noqa: F401
        ort.preload_dlls()
    wanted = "CPUExecutionProvider" if rehearsal else PROVIDER
    session = ort.InferenceSession(least_model(), providers=[wanted])
    if session.get_providers()[0] != wanted:
        raise Lacks(f"what {PROVIDER} needs: it did not load, and the reason is at the end of `stderr` in the result")
    ort.set_default_logger_severity(4)  # from here on each plan that cuDNN has no kernels for would be an error


def least_model() -> bytes:
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "least", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    found: bytes = model.SerializeToString()
    return found


def measure(stage: Stage, ort: Any, way: FormWay) -> dict[str, Any]:
    x = stage.made.input(way.model, way.case)
    if way.setting == RUNTIME:
        found, y = as_users_have_it(stage, way, x)
    else:
        found, y = bound(stage, ort, way, x)
    found["flop"] = stage.made.flop(way.model, way.case)
    if not stage.rehearsal:
        found["peak_memory_gb"] = gpu_memory()
    return found | error_of(y, stage, way.model, way.case)


def bound(stage: Stage, ort: Any, way: FormWay, x: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    path, _ = stage.made.onnx(way.model, way.case.graph, way.precision, way.form)
    options, fixed = WAYS[way.setting]
    sizes = tuple(sorted(sizes_of(way.case, x).items())) if fixed else ()
    session = open_session(ort, path, stage.device, tuple(sorted(options.items())), sizes)
    given = ort.OrtValue.ortvalue_from_numpy(x, stage.device, 0)
    answer = ort.OrtValue.ortvalue_from_shape_and_type(output_shape(stage, way), np.float32, stage.device, 0)
    binding = session.io_binding()
    binding.bind_ortvalue_input(session.get_inputs()[0].name, given)
    binding.bind_ortvalue_output(session.get_outputs()[0].name, answer)
    # A run ends when the provider's stream is done, but for what a CUDA graph replays: waited for here as well.
    found = timed(lambda: session.run_with_iobinding(binding), HostClock(binding.synchronize_outputs), stage)
    return found, np.array(answer.numpy())  # a copy: on the CPU it is the memory of `answer`


def sizes_of(case: Case, x: np.ndarray) -> dict[str, int]:
    """Free dimensions of the graph's input, as `vae_export.targets.onnx_graphs` names them."""
    names = (
        ("batch", "", "latent_height", "latent_width") if case.graph == "decode" else ("batch", "", "height", "width")
    )
    return {name: size for name, size in zip(names, x.shape, strict=True) if name}


def output_shape(stage: Stage, way: FormWay) -> tuple[int, int, int, int]:
    config, side = stage.made.config(way.model), way.case.size
    if way.case.graph == "decode":
        return way.case.batch, config.out_channels, side, side
    return way.case.batch, 2 * config.latent_channels, side // config.downscale, side // config.downscale


@lru_cache(maxsize=1)
def open_session(
    ort: Any, path: Path, device: str, options: tuple[tuple[str, Any], ...], sizes: tuple[tuple[str, int], ...]
) -> Any:
    """The last one is kept: each holds memory of the card."""
    settings = ort.SessionOptions()
    settings.enable_mem_pattern = False  # as `runtimes.onnxruntime` has it
    for name, size in sizes:
        settings.add_free_dimension_override_by_name(name, size)
    if device == "cpu":
        return ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    provider = (PROVIDER, {"device_id": 0, "use_tf32": 0, **dict(options)})
    session = ort.InferenceSession(path, settings, providers=[provider])
    if session.get_providers()[0] != PROVIDER:
        raise RuntimeError(f"{PROVIDER} did not load; what it printed is under `stderr` in the result")
    return session


def as_users_have_it(stage: Stage, way: FormWay, x: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    """A bundle in `runtimes`, NumPy in and out."""
    from runtimes import open_vae

    open_session.cache_clear()
    with open_vae(stage.made.bundle(way.model, "onnx", way.precision), device=stage.device) as vae:

        def call() -> np.ndarray:
            found: np.ndarray = vae.decode(x)[0] if way.case.graph == "decode" else vae.encode(x)[0].parameters
            return found

        found = timed(call, HostClock(), stage)
        return found, call()
