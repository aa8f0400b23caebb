"""The promises about time and memory, on a model of Stable Diffusion's size (84 M parameters, random weights)."""

import json
import subprocess
import sys

import pytest

EXPORT = """
import json, resource, sys, time
import torch
from vae_export import AutoencoderKL, export_bundle

torch.manual_seed(0)
model = AutoencoderKL(
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
).eval().requires_grad_(False)
start = time.monotonic()
bundle = export_bundle(model, sys.argv[1], precision=sys.argv[2])
measured = bundle.manifest.validation["measurements"]
print(json.dumps({
    "seconds": round(time.monotonic() - start, 1),
    "gigabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    "worst_psnr_db": {by: min(m["psnr_db"] for m in measured if m["by"] == by) for by in {m["by"] for m in measured}},
    "worst_uint8_steps": max(m["uint8_steps"] or 0 for m in measured),
}))
"""


def export(path, precision):
    """In a process of its own, for its memory is measured."""
    command = [sys.executable, "-c", EXPORT, str(path), precision]
    result = subprocess.run(command, check=True, capture_output=True, text=True, timeout=900)
    found = json.loads(result.stdout.splitlines()[-1])
    print(precision, found)
    return found


@pytest.mark.slow
def test_a_real_model_is_exported_and_validated_within_a_minute_and_4_gb(tmp_path):
    found = export(tmp_path / "sd", "fp32")
    assert found["seconds"] < 60
    assert found["gigabytes"] < 4
    assert found["worst_uint8_steps"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_real_model_is_exported_in_half_precision(precision, tmp_path):
    assert export(tmp_path / "sd", precision)["gigabytes"] < 4
