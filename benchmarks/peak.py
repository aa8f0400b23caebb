"""The fastest matrix products of this machine, which benchmarks.compare holds the backends against."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np


def measure_peak(precision: str, device: str) -> float | str:
    """GFLOP/s of the best of some large matrix products; or why there is no such number."""
    if (precision, device) == ("fp16", "cpu"):
        return "nothing is computed in fp16 on the CPU"
    if (precision, device) == ("int8", "cuda"):
        return "no row is of int8 on a GPU"
    try:
        if device == "cuda":
            return max(matmul_on_gpu(side, precision) for side in (4096, 8192))
        if precision == "int8":
            return max(matmuls_int8(side) for side in (1024, 2048))
        return max(matmul(side, precision) for side in (1024, 2048, 3072))
    except Exception as error:  # no package, no such kernel: the share is left out, and the reason said
        return f"{type(error).__name__}: {error}".splitlines()[0]


def matmul(side: int, precision: str) -> float:
    import torch

    a = torch.randn(side, side).to({"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    return 2 * side**3 / fastest(lambda: a @ a) / 1e9


def matmul_on_gpu(side: int, precision: str, times: int = 10) -> float:
    """fp32 without TF32, as PyTorch has it for products of matrices."""
    import torch

    types = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    a = torch.randn(side, side, device="cuda").to(types[precision])

    def products() -> None:
        for _ in range(times):
            a @ a
        torch.cuda.synchronize()

    return times * 2 * side**3 / fastest(products) / 1e9


def matmuls_int8(side: int, depth: int = 8) -> float:
    """In OpenVINO, one behind the other, so that what is between them is int8: torch._int_mm is slower than bf16."""
    import openvino
    from openvino import opset13 as op

    one, rng = np.float32(1), np.random.default_rng(0)
    start = y = op.parameter([side, side], np.float32)
    for _ in range(depth):
        weights = op.constant(rng.uniform(-1, 1, (side, side)).astype(np.float32))
        weights = op.fake_quantize(weights, -one, one, -one, one, 255)
        y = op.matmul(op.fake_quantize(y, -one, one, -one, one, 256), weights, False, True)
    model = openvino.Model([op.reduce_max(y, op.constant(np.array([0, 1])))], [start])
    request = openvino.Core().compile_model(model, "CPU").create_infer_request()
    x = rng.uniform(-1, 1, (side, side)).astype(np.float32)
    return depth * 2 * side**3 / fastest(lambda: request.infer([x])) / 1e9


def fastest(function: Callable[[], Any], times: int = 4) -> float:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
