"""Stage trt: TensorRT, where it is installed: plans built on the card, run, compared and timed."""

from __future__ import annotations

from benchmarks.gpu.engines import Engines
from benchmarks.gpu.stage import Stage


def run(stage: Stage) -> None:
    engines = Engines(stage, "tensorrt")
    for precision in ("fp32",) if stage.rehearsal else ("fp16", "bf16", "fp32"):
        for graph in ("decode", "encode"):
            engines.measure_build(graph, precision, "for this card")
            engines.measure_run(graph, precision, "for this card", "launches")
            engines.measure_run(graph, precision, "for this card", "CUDA graph", cuda_graphs=True)
    engines.measure_as_users_have_it("fp32" if stage.rehearsal else "fp16")
