"""Which form of the folded upsampling is the fastest in ONNX Runtime on this machine's CPU?

    python -m benchmarks.upsample --size 256 --rounds 5

Decodes with a model of Stable Diffusion's size (random weights), each form in turn, round after round, so that a slow
minute of the machine hits all of them alike. Prints medians, and ratios to the plain form.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime

from benchmarks.models import stable_diffusion_sized
from vae_export.onnx_graphs import export_onnx
from vae_export.rewrite import UPSAMPLE_FORMS, fold_upsample


def main(size: int, rounds: int) -> None:
    model = stable_diffusion_sized()
    z = np.random.default_rng(0).standard_normal((1, 4, size // 8, size // 8)).astype(np.float32)
    with tempfile.TemporaryDirectory() as directory:
        sessions = {}
        for form in UPSAMPLE_FORMS:
            path = Path(directory) / f"{form}.onnx"
            export_onnx(fold_upsample(model, form), "decoder", path)
            sessions[form] = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        seconds: dict[str, list[float]] = {form: [] for form in sessions}
        for turn in range(rounds + 1):
            for form, session in sessions.items():
                start = time.perf_counter()
                session.run(None, {"latent_sample": z})
                if turn:  # the first warms up
                    seconds[form].append(time.perf_counter() - start)
    plain = seconds["none"]
    for form, times in seconds.items():
        ratio = statistics.median(mine / theirs for mine, theirs in zip(times, plain, strict=True))
        print(f"{form:7} {statistics.median(times):6.2f} s  {ratio:5.2f} of plain")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="pixels a side")
    parser.add_argument("--rounds", type=int, default=5)
    main(**vars(parser.parse_args()))
