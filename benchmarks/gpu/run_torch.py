"""Stage torch: the reference model in PyTorch, as its users run it: the peers of all other stages, and the floor.

Eager, channels-last, and compiled (channels-last too); fp32 without TF32, TF32, bf16, fp16; decode and encode; the
architectures of Stable Diffusion and FLUX.1; 512, 1024 and 2048; one image and four. Tensors stay on the card.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from benchmarks.gpu.made import model_of, without_tf32
from benchmarks.gpu.stage import Clock, CudaClock, HostClock, Lacks, Stage, Way, error_of, require, timed
from benchmarks.peak import matmul_on_gpu
from benchmarks.peers import Case

PRECISIONS = {"fp32": "float32", "tf32": "float32", "bf16": "bfloat16", "fp16": "float16"}
#: how -> options of torch.compile, or None; all but "eager" are channels-last
COMPILED: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "channels-last": None,
    "channels-last, cudnn.benchmark": None,
    "compile": {},
    "compile, reduce-overhead": {"mode": "reduce-overhead"},
    "compile, max-autotune": {"mode": "max-autotune-no-cudagraphs"},
}
CROSSED = ("eager", "channels-last", "compile")  #: measured with everything; the others with a few cases only


def ways(rehearsal: bool) -> list[Way]:
    """All that is measured, the most telling first."""
    if rehearsal:
        few = [("sd", Case("decode", 64, 1)), ("flux", Case("encode", 64, 2))]
        ways = [Way(model, case, "fp32", how) for model, case in few for how in COMPILED]
        # Compiling takes ten seconds each on two cores, and max-autotune has nothing to tune there.
        slow = ("compile, reduce-overhead", "compile, max-autotune")
        ways = [way for way in ways if way.how not in slow and (way.how != "compile" or way.model == "sd")]
        return ways + [Way("sd", few[0][1], precision, "channels-last") for precision in ("tf32", "bf16")]
    crossed = [
        Way(model, Case(graph, size, batch), precision, how)
        for model, graph, size, batch, precision, how in itertools.product(
            ("sd", "flux"), ("decode", "encode"), (1024, 512, 2048), (1, 4), PRECISIONS, CROSSED
        )
    ]
    others = [
        Way("sd", Case(graph, 1024, 1), precision, how)
        for graph, precision, how in itertools.product(("decode", "encode"), ("fp16", "bf16"), COMPILED)
        if how not in CROSSED
    ]
    return sorted([*crossed, *others], key=rank)


def rank(way: Way) -> int:
    """Small for what tells the most: the sum of how far each choice is from the one that matters most."""
    how = {"channels-last": 0, "compile": 0, "eager": 1, "channels-last, cudnn.benchmark": 2}
    compiled_fp32 = way.how.startswith("compile") and way.precision in ("fp32", "tf32")
    return (
        {"sd": 0, "flux": 3}[way.model]
        + {"decode": 0, "encode": 1}[way.case.graph]
        + {1024: 0, 512: 1, 2048: 4}[way.case.size]
        + {1: 0, 4: 3}[way.case.batch]
        + {"fp16": 0, "bf16": 1, "tf32": 2, "fp32": 2}[way.precision]
        + how.get(way.how, 5)
        + 4 * compiled_fp32
    )


def run(stage: Stage) -> None:
    torch = require("torch", "it is what is measured")
    stage.made.here = True
    if not stage.rehearsal and not torch.cuda.is_available():
        raise Lacks(f"a GPU: PyTorch {torch.__version__} finds none")
    bench = Bench(stage, torch)
    stage.note(f"PyTorch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    for precision in () if stage.rehearsal else PRECISIONS:
        facts = {"precision": precision, "how": "the best of products of 4096 and 8192 a side"}
        stage.measure(f"peak {precision}", facts, lambda precision=precision: bench.peak(precision))  # type: ignore[misc]
    stage.measure("copy", {"how": "1 GiB on the device, bytes read and written"}, bench.copy)
    for way in ways(stage.rehearsal):
        stage.measure(way.name, way.facts, lambda way=way: bench.measure(way))  # type: ignore[misc]


class Bench:
    def __init__(self, stage: Stage, torch: Any) -> None:
        self.stage, self.torch = stage, torch
        self.device = stage.device

    @property
    def clock(self) -> Clock:
        return HostClock() if self.device == "cpu" else CudaClock(self.torch)

    def peak(self, precision: str) -> dict[str, Any]:
        with without_tf32(allowed=precision == "tf32"):
            return {"tflops": max(matmul_on_gpu(side, precision.replace("tf", "fp")) for side in (4096, 8192)) / 1e3}

    def copy(self) -> dict[str, Any]:
        size = (1 << 20) if self.stage.rehearsal else (1 << 30)
        x = self.torch.randint(256, (size,), dtype=self.torch.uint8, device=self.device)
        y = self.torch.empty_like(x)
        found = timed(lambda: y.copy_(x), self.clock, self.stage)
        seconds = found.get("device_ms", found["host_ms"]) / 1e3
        return {"gigabytes_per_second": 2 * size / seconds / 1e9}

    def measure(self, way: Way) -> dict[str, Any]:
        torch = self.torch
        try:
            return self._measured(way)
        except torch.OutOfMemoryError as error:
            message = " ".join(str(error).split())
        finally:
            torch._dynamo.reset()  # what was compiled for one row is neither to stay nor to count for the next
            if self.device == "cuda":
                torch.cuda.empty_cache()
        raise RuntimeError(f"the card has too little memory: {message}")

    def _measured(self, way: Way) -> dict[str, Any]:
        torch, cuda = self.torch, self.device == "cuda"
        layout = torch.contiguous_format if way.how == "eager" else torch.channels_last
        dtype = getattr(torch, PRECISIONS[way.precision])
        model = self._placed(way.model, dtype, layout)
        x = torch.from_numpy(self.stage.made.input(way.model, way.case)).to(self.device, dtype, memory_format=layout)
        function: Callable[[Any], Any]
        function = model.encode_moments if way.case.graph == "encode" else model.decode_latents
        options = COMPILED[way.how]
        if options is not None:
            # Whole, and for this shape: where it could not be compiled so, that is said, and nothing else is timed.
            function = torch.compile(function, fullgraph=True, dynamic=False, **options)
        answers: list[Any] = []

        def call() -> None:
            answers.clear()  # what a CUDA graph gave is overwritten by the next replay
            answers.append(function(x))

        if cuda:
            torch.cuda.reset_peak_memory_stats()
        benchmark = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = way.how.endswith("cudnn.benchmark")
        try:
            with torch.no_grad(), without_tf32(allowed=way.precision == "tf32"):
                found = timed(call, self.clock, self.stage)
        finally:
            torch.backends.cudnn.benchmark = benchmark
        if cuda:
            found["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
            found["reserved_memory_gb"] = torch.cuda.max_memory_reserved() / 1e9
        output = answers.pop()[:1].float().cpu().numpy()
        found["flop"] = self.stage.made.flop(way.model, way.case)
        return found | error_of(np.ascontiguousarray(output), self.stage, way.model, way.case)

    def _placed(self, name: str, dtype: Any, layout: Any) -> Any:
        """The model on the device; the last one is kept."""
        return _placed(name, self.stage.made.small, self.device, dtype, layout)


@lru_cache(maxsize=1)
def _placed(name: str, small: bool, device: str, dtype: Any, layout: Any) -> Any:
    model: Any = copy.deepcopy(model_of(name, small))  # PyTorch's types have no memory_format for modules
    return model.to(device, dtype, memory_format=layout)
