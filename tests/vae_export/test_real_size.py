"""The promises about time and memory, on a model of Stable Diffusion's size (84 M parameters, random weights)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXPORT = """
import json, resource, sys, time
from benchmarks.models import stable_diffusion_sized
from vae_export import export_bundle

model = stable_diffusion_sized()
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
    result = subprocess.run(command, check=True, capture_output=True, text=True, timeout=900, cwd=ROOT)
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
