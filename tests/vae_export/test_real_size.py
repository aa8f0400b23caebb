"""The promises about time and memory, on a model of Stable Diffusion's size (84 M parameters, random weights)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# The peak is the kernel's VmHWM: ru_maxrss of a child begins at what its parent had.
PEAK = """
import re
from pathlib import Path

def peak_gb():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9
"""
EXPORT = """
import json, sys, time
from benchmarks.models import stable_diffusion_sized
from vae_export import export_bundle

model = stable_diffusion_sized()
start = time.monotonic()
bundle = export_bundle(model, sys.argv[1], target=sys.argv[2], precision=sys.argv[3])
measured = bundle.manifest.validation["measurements"]
print(json.dumps({
    "seconds": round(time.monotonic() - start, 1),
    "gigabytes": round(peak_gb(), 2),
    "worst_psnr_db": {by: min(m["psnr_db"] for m in measured if m["by"] == by) for by in {m["by"] for m in measured}},
    "worst_uint8_steps": max(m["uint8_steps"] or 0 for m in measured),
}))
"""
BUILD = """
import json, sys, time
from pathlib import Path
from runtimes.tensorrt.builder import BuildJob, build

onnx, name, shapes = Path(sys.argv[1]).read_bytes(), sys.argv[2], json.loads(sys.argv[3])
start = time.monotonic()
plan = build(onnx, BuildJob("tensorrt-rtx", name, (tuple(map(tuple, shapes)),), ("sm89",)), lambda *_: None)
print(json.dumps({
    "seconds": round(time.monotonic() - start, 1), "gigabytes": round(peak_gb(), 2), "plan_mb": round(len(plan) / 1e6)
}))
"""


def run_alone(program, *arguments):
    """What a program prints, in a process of its own, for its memory is measured."""
    command = [sys.executable, "-c", PEAK + program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(*arguments[1:3], found)
    return found


@pytest.mark.slow
def test_a_real_model_is_exported_and_validated_within_a_minute_and_4_gb(tmp_path):
    found = run_alone(EXPORT, tmp_path / "sd", "onnx", "fp32")
    assert found["seconds"] < 60
    assert found["gigabytes"] < 4
    assert found["worst_uint8_steps"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "precision"),
    [("onnx", "fp16"), ("onnx", "bf16"), ("openvino", "fp32"), ("openvino", "bf16"), ("tensorrt-rtx", "fp16")],
)
def test_a_real_model_is_exported_to_every_target(target, precision, tmp_path):
    if target == "openvino":
        pytest.importorskip("openvino")
    if target == "tensorrt-rtx":
        pytest.importorskip("tensorrt_rtx")
    assert run_alone(EXPORT, tmp_path / "sd", target, precision)["gigabytes"] < 5


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("graph", ["decoder", "encoder"])
def test_an_engine_of_a_real_model_builds_in_15_seconds_and_2_gb(graph, precision, tmp_path):
    """For one RTX target, with two cores and no GPU."""
    pytest.importorskip("tensorrt_rtx")
    from benchmarks.models import stable_diffusion_sized
    from tests.helpers.forms import FORMS
    from vae_export.targets.onnx_graphs import export_onnx

    model, path = stable_diffusion_sized(), tmp_path / "m.onnx"
    spec = export_onnx(model, graph, path, precision=precision, form=FORMS["tensorrt-rtx", precision])
    channels, factor = (3, 1) if graph == "encoder" else (4, 8)
    shapes = [[b, channels, side // factor, side // factor] for b, side in ((1, 256), (1, 1024), (4, 1024))]
    found = run_alone(BUILD, path, spec.input.name, json.dumps(shapes))
    assert found["seconds"] < 15
    assert found["gigabytes"] < 2
