"""How fast an AutoencoderTiny decodes: bundles against diffusers' own class, on this CPU.

    python -m benchmarks.previews [--size 512] [--rounds 7] [--threads 2]

The model has the real widths of taesd (1.2 million parameters in the decoder) and random weights. Calls alternate round
by round, so that a slow phase of the machine affects all alike; each ratio is the median over the rounds of a call's
time divided by diffusers' in the same round.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny

from runtimes import open_vae
from vae_export import export_bundle, load_model

BUNDLES = (("onnx", "fp32"), ("openvino", "fp32"), ("openvino", "bf16"))
LIMIT = 0.6  #: what the ratio of the best fp32 bundle must not exceed


def main() -> None:
    """Time and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="side of the image in pixels")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(chosen.threads)
    peer = AutoencoderTiny().eval()
    latents = np.random.default_rng(0).standard_normal((1, 4, chosen.size // 8, chosen.size // 8)).astype(np.float32)
    calls: dict[str, Callable[[], object]] = {"diffusers, fp32": diffusers_call(peer, latents)}
    with tempfile.TemporaryDirectory() as directory:
        peer.save_pretrained(f"{directory}/model")
        model = load_model(f"{directory}/model")
        for target, precision in BUNDLES:
            path = Path(directory) / f"{target}-{precision}"
            export_bundle(model, path, target=target, precision=precision, run_validation=False)
            vae = open_vae(path, threads=chosen.threads)
            calls[f"{target}, {precision}"] = partial(vae.decode, latents)
        report(times_of(calls, chosen.rounds), chosen.size)


def diffusers_call(peer: AutoencoderTiny, latents: np.ndarray) -> Callable[[], object]:
    """A call of diffusers' decoder."""
    z = torch.from_numpy(latents)

    def call() -> object:
        with torch.no_grad():
            return peer.decode(z).sample

    return call


def times_of(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if number:
                times[name].append(time.perf_counter() - begin)
    return times


def report(times: dict[str, list[float]], size: int) -> None:
    """Print the medians and the ratios to the first of them."""
    first = next(iter(times.values()))
    print(f"decode of {size}x{size} pixels, batch 1")
    ratios = {}
    for name, seconds in times.items():
        ratios[name] = statistics.median(one / other for one, other in zip(seconds, first, strict=True))
        print(f"  {name:16} {statistics.median(seconds) * 1000:7.0f} ms   {ratios[name]:.2f} of diffusers")
    best = min(ratio for name, ratio in ratios.items() if name.endswith("fp32") and not name.startswith("diffusers"))
    print(f"the best bundle in fp32 takes {best:.2f} of diffusers' time (at most {LIMIT} is wanted)")


if __name__ == "__main__":
    main()
