"""Golden bundles: one of each target that builds without a GPU, for every later version to open.

    python -m tools.make_golden --out tests/data/golden

They are made once for a schema of the manifest, and never again: what matters is that they are old. Each is packed as
TARGET.tar.xz, since 11 MB of a plan are 100 KB then; expected.npz has inputs and the reference's outputs.
"""

from __future__ import annotations

import argparse
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runtimes.names import GRAPHS
from vae_export import AutoencoderKL, export_bundle

TARGETS = ("onnx", "openvino", "flax", "tensorrt-rtx")
SIZES = {"encoder": (2, 3, 16, 24), "decoder": (2, 4, 8, 12)}


def golden_model() -> AutoencoderKL:
    """Two levels, 8 channels, 4 latent channels; random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=32,
            scaling_factor=0.5,
            shift_factor=0.25,
        )
    return model.eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    arguments = parser.parse_args()
    model, rng = golden_model(), np.random.default_rng(0)
    inputs = {graph: rng.uniform(-1, 1, SIZES[graph]).astype(np.float32) for graph in GRAPHS}
    arguments.out.mkdir(parents=True, exist_ok=True)
    for target in arguments.targets:
        with tempfile.TemporaryDirectory() as directory:
            bundle = export_bundle(model, Path(directory) / target, target=target, precision="fp32")
            with tarfile.open(arguments.out / f"{target}.tar.xz", "w:xz") as archive:
                archive.add(bundle.path, target)
            print(target, bundle.manifest.validation["verdict"])
    with torch.no_grad():
        results = {
            "encoder": model.encode_moments(torch.from_numpy(inputs["encoder"])).numpy(),
            "decoder": model.decode_latents(torch.from_numpy(inputs["decoder"])).numpy(),
        }
    arrays: dict[str, Any] = {f"{graph}_input": inputs[graph] for graph in GRAPHS}
    arrays |= {f"{graph}_output": results[graph] for graph in GRAPHS}
    np.savez(arguments.out / "expected.npz", **arrays)


if __name__ == "__main__":
    main()
