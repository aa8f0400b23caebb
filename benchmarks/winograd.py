"""Wide convolutions, direct and by Winograd's filtering: python -m benchmarks.winograd --targets openvino onnx

A model of Stable Diffusion's size with random weights in fp32; both forms in turn, in one process. Prints the median
seconds of each, their ratio, and how far each is from PyTorch.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from benchmarks.models import stable_diffusion_sized
from runtimes import open_vae
from runtimes.names import GRAPHS
from vae_export.export import export_bundle
from vae_export.rewrites.form import CONVOLUTIONS
from vae_export.targets import target_named


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=("openvino", "onnx"), default=["openvino"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[256, 512], help="pixels a side; %(default)s")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    model, rng = stable_diffusion_sized(), np.random.default_rng(0)
    for target in arguments.targets:
        with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
            opened = {}
            for kind in CONVOLUTIONS:
                path = Path(directory) / kind
                forms = dict.fromkeys(GRAPHS, target_named(target).forms["fp32"]._replace(convolutions=kind))
                export_bundle(model, path, target=target, forms=forms, run_validation=False)
                opened[kind] = stack.enter_context(open_vae(path))
            for side in arguments.sizes:
                x = rng.uniform(-1, 1, (1, 3, side, side)).astype(np.float32)
                z = rng.standard_normal((1, 4, side // 8, side // 8)).astype(np.float32)
                for graph, given in (("encoder", x), ("decoder", z)):
                    with torch.inference_mode():
                        reference = model.encode_moments if graph == "encoder" else model.decode_latents
                        expected = reference(torch.from_numpy(given)).numpy()
                    seconds: dict[str, list[float]] = {kind: [] for kind in CONVOLUTIONS}
                    far = {}
                    for turn in range(arguments.rounds + 1):
                        for kind, vae in opened.items():
                            start = time.perf_counter()
                            found = vae.encode(given)[0].parameters if graph == "encoder" else vae.decode(given)[0]
                            if turn:  # the first compiles
                                seconds[kind].append(time.perf_counter() - start)
                            far[kind] = 10 * np.log10(np.ptp(expected) ** 2 / np.square(found - expected).mean())
                    direct, winograd = (statistics.median(seconds[kind]) for kind in CONVOLUTIONS)
                    print(
                        f"{target:8} {graph} {side:>4}: direct {direct:.3f} s, {far['direct']:.1f} dB; "
                        f"winograd {winograd:.3f} s, {far['winograd']:.1f} dB: {winograd / direct:.2f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
