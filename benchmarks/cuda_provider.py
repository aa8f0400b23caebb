"""How ONNX Runtime's CUDA provider is best asked: its settings and our forms of the decoder, on an NVIDIA GPU.

    python -m benchmarks.cuda_provider [--precisions fp16 fp32] [--sizes 512 1024]

Each is a process of its own, with a model of Stable Diffusion's size (random weights): seconds of the first call at a
size, the median of ten behind it (from host memory and back), and the GPU's memory that the process then holds.
docs/speed.md has what was found.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import gpu_memory

ROOT = Path(__file__).parents[1]
CALLS = 10
FORMS: dict[str, dict[str, Any]] = {
    "ours": {"upsample": "conv", "norm": "rows", "attention_blocks": 16},
    "upsampling not folded": {"norm": "rows", "attention_blocks": 16},
    "transposed convolutions": {"upsample": "deconv", "norm": "rows", "attention_blocks": 16},
    "plain": {},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "heuristic": {"cudnn_conv_algo_search": "HEURISTIC"},
    "heuristic, NHWC": {"cudnn_conv_algo_search": "HEURISTIC", "prefer_nhwc": 1},
    "NHWC": {"prefer_nhwc": 1},
}


def export(directory: Path, precisions: list[str]) -> None:
    from benchmarks.models import stable_diffusion_sized
    from vae_export.rewrites.form import Form
    from vae_export.targets.onnx_graphs import export_onnx

    model = stable_diffusion_sized()
    for precision in precisions:
        for name, form in FORMS.items():
            export_onnx(
                model, "decoder", directory / f"{precision} {name}.onnx", precision=precision, form=Form(**form)
            )


def measure(path: str, sizes: list[int], settings: dict[str, Any]) -> None:
    import onnxruntime

    onnxruntime.preload_dlls()
    onnxruntime.set_default_logger_severity(4)
    options = onnxruntime.SessionOptions()
    options.enable_mem_pattern = False
    provider = ("CUDAExecutionProvider", {"use_tf32": 0, **settings})
    session = onnxruntime.InferenceSession(path, options, providers=[provider])
    if session.get_providers()[0] != provider[0]:
        sys.exit(f"{provider[0]} did not load")
    for size in sizes:
        z = np.random.default_rng(0).standard_normal((1, 4, size // 8, size // 8)).astype(np.float32)
        seconds = []
        for _ in range(1 + CALLS):
            start = time.perf_counter()
            session.run(None, {session.get_inputs()[0].name: z})
            seconds.append(time.perf_counter() - start)
        first, median, memory = seconds[0], statistics.median(seconds[1:]), gpu_memory()
        held = "an unknown amount" if memory is None else f"{memory:.1f} GB"
        print(f"{size}: first {first:.2f} s, then {1e3 * median:.1f} ms, holds {held}", end="; ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precisions", nargs="+", choices=["fp16", "fp32"], default=["fp16", "fp32"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[512, 1024])
    parser.add_argument("--one", nargs=2, metavar=("PATH", "SETTINGS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        measure(arguments.one[0], arguments.sizes, json.loads(arguments.one[1]))
        return
    with tempfile.TemporaryDirectory() as directory:
        export(Path(directory), arguments.precisions)
        for path in sorted(Path(directory).iterdir()):
            for name, settings in SETTINGS.items():
                sizes = list(map(str, arguments.sizes))
                command = [sys.executable, "-m", "benchmarks.cuda_provider", "--sizes", *sizes, "--one", str(path)]
                done = subprocess.run([*command, json.dumps(settings)], cwd=ROOT, capture_output=True, text=True)
                print(f"{path.stem}, {name}: {done.stdout or done.stderr.strip().splitlines()[-1]}", flush=True)


if __name__ == "__main__":
    main()
