"""Validation: everything that a bundle computes is compared, by the thresholds of what it is.

Tests vae_export/comparison.py.
"""

import hashlib
import json
import shutil

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from runtimes import NumericsError
from runtimes.names import GRAPHS
from vae_export import export_bundle, validate_bundle
from vae_export.comparison import SEAMLESS_PSNR_DB, THRESHOLDS, Case, compare

BATCH = np.linspace(-1, 1, 3 * 8 * 8, dtype=np.float32).reshape(1, 3, 8, 8)


@pytest.fixture(scope="module")
def bundle(two_level_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("tileable") / "b"
    return export_bundle(two_level_model, path, tileable=True)


def off_by(decibels):
    """A candidate whose noise is so far below the range of `BATCH`, which is 2."""
    noise = np.random.default_rng(0).standard_normal(BATCH.shape)
    noise *= 2 * 10 ** (-decibels / 20) / np.sqrt((noise**2).mean())
    return lambda graph, x: (x + noise).astype(np.float32)


def test_a_tileable_bundle_has_its_steps_run_at_export_and_at_validation(bundle, two_level_model):
    recorded = bundle.manifest.validation["measurements"]
    again = [m.to_dict() for m in validate_bundle(bundle.path, two_level_model)]
    assert json.loads(json.dumps(again)) == recorded
    runs = {(m["graph"], m["by"], m["tiling"]) for m in again}
    assert runs == {(graph, "onnxruntime", tiling) for graph in GRAPHS for tiling in (None, "seamless")}
    assert bundle.manifest.validation["thresholds_of_seamless_tiling"]["psnr_db"] == SEAMLESS_PSNR_DB


@pytest.mark.parametrize("graph", GRAPHS)
def test_validation_finds_a_step_with_other_weights(bundle, two_level_model, tmp_path, graph):
    """The whole graphs are as they were: nothing but the steps gives it away."""
    shutil.copytree(bundle.path, tmp_path / "b")
    step = next(step for step in bundle.manifest.tileable[graph] if step.kind == "conv1")
    proto = onnx.load(tmp_path / "b" / step.file)
    weight = max(proto.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.5), weight.name))
    onnx.save(proto, tmp_path / "b" / step.file)
    accept(tmp_path / "b", step.file)
    with pytest.raises(NumericsError, match=f"{graph} by onnxruntime, seamless, on ") as caught:
        validate_bundle(tmp_path / "b", two_level_model)
    assert {m["tiling"] for m in caught.value.measurements} == {"seamless"}


def accept(bundle, name):
    """Put the size and hash of a changed file into the manifest."""
    data = (bundle / name).read_bytes()
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    del manifest["manifest_sha256"]
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def test_thresholds_are_chosen_by_fields_not_by_what_things_are_called():
    """80 dB are enough for what was tiled in fp16, and too few for a graph in fp32."""
    case = Case("encoder", "photo seamless", BATCH, BATCH)
    (measured,) = compare([case], "onnxruntime", off_by(80), "fp32", tiling="seamless")
    assert (measured.by, measured.tiling) == ("onnxruntime", "seamless")
    with pytest.raises(NumericsError, match="at least 100"):
        compare([case], "onnxruntime seamless", off_by(80), "fp32")


def test_photographs_have_a_threshold_of_their_own():
    bars = THRESHOLDS["int8"]
    assert bars.noise_psnr_db < 37 < bars.psnr_db
    case = Case("encoder", "photo by name", BATCH, BATCH)
    assert compare([case], "openvino", off_by(37), "int8")
    with pytest.raises(NumericsError, match=f"at least {bars.psnr_db:g}"):
        compare([case._replace(photo=True, input="a field")], "openvino", off_by(37), "int8")
