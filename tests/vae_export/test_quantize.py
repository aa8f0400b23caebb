"""int8: good enough on a photograph that nothing was fitted to, or refused with the numbers.

Tests vae_export/targets/int8.py.
"""

import sys

import numpy as np
import openvino
import pytest
import torch

from runtimes import BackendUnavailable, Bundle, ConfigError, NumericsError, open_vae
from runtimes.images import psnr
from vae_export import export_bundle
from vae_export.checkpoints.load import load_model
from vae_export.comparison import THRESHOLDS, Thresholds
from vae_export.photos import EMBEDDED, HELD_OUT, crops, middle_of, photographs
from vae_export.rewrites.form import Form
from vae_export.targets import int8 as quantize
from vae_export.targets import openvino as target
from vae_export.targets.openvino import read_graph, statistics

FORM = Form(upsample="deconv", norm="rows", last_block="lean")


@pytest.fixture(scope="module")
def int8_bundle(tmp_path_factory):
    path = tmp_path_factory.mktemp("int8") / "bundle"
    export_bundle(load_model(), path, target="openvino", precision="int8")
    return path


@pytest.fixture
def graph(two_level_model):
    """(decoder in OpenVINO, latents to calibrate on)"""
    latents = [np.random.default_rng(i).standard_normal((1, 4, 12, 16)).astype(np.float32) for i in range(2)]
    return read_graph(two_level_model, "decoder", "int8", FORM)[0], latents


def test_a_photograph_held_out_is_decoded_within_40_db(int8_bundle):
    model = load_model()
    photo = middle_of(EMBEDDED / f"{HELD_OUT}.jpg", 256, 256)
    with torch.no_grad():
        moments = model.encode_moments(photo)
        image = model.decode_latents(moments[:, :16]).numpy()
    with open_vae(int8_bundle) as vae:
        decoded = vae.decode(moments[:, :16].numpy())[0]
        encoded = vae.encode(photo.numpy())[0].parameters
    for actual, expected in ((decoded, image), (encoded, moments.numpy())):
        error = np.square(actual - expected).mean()
        assert 10 * np.log10(np.ptp(expected) ** 2 / error) >= 40  # the bar that the bundle is held to
    assert psnr(*(np.clip(x[0] * 127.5 + 127.5, 0, 255).astype(np.uint8) for x in (decoded, image))) > 35


def test_the_manifest_says_what_is_int8_and_how_good(int8_bundle):
    manifest = Bundle(int8_bundle).manifest
    records = [r for r in manifest.rewrites if r["name"] == "quantize"]
    assert [(r["graph"], r["kept_in_higher_precision"]) for r in records] == [("encoder", []), ("decoder", [])]
    assert manifest.validation["thresholds"]["psnr_db"] == 40
    assert all(m["psnr_db"] >= 40 for m in manifest.validation["measurements"] if m["input"].startswith("photo"))
    # A byte a weight, where fp32 has four; what is not quantized is in fp32.
    bits = sum(entry.size for name, entry in manifest.files.items() if name.endswith(".bin"))
    assert bits < 0.4 * 4 * sum(p.numel() for p in load_model().parameters())


def test_the_photograph_that_measures_is_not_calibrated_on(monkeypatch):
    seen = []

    def crops(paths, *_):
        seen.extend(paths)
        return iter(())

    monkeypatch.setattr(target, "crops", crops)
    target.int8_calibration(load_model(), None, lambda *_: None)
    assert {path.stem for path in seen} == {path.stem for path in photographs()} - {HELD_OUT}


def test_only_the_convolutions_asked_for_are_quantized(graph):
    ir, latents = graph
    layers = quantize.quantizable_layers(ir)
    kept = layers[:2]
    quantized = quantize.quantize_ir(ir, latents, keep=kept)
    readers = {
        port.get_node().get_friendly_name()
        for node in quantized.get_ops()
        if node.get_type_name() == "FakeQuantize"
        for port in node.output(0).get_target_inputs()
    }
    assert set(layers) - set(kept) <= readers
    assert not readers & {*kept, *statistics(quantized)}
    assert "FakeQuantize" not in {node.get_type_name() for node in ir.get_ops()}, "the model given is not changed"


def test_layers_are_kept_until_the_bar_holds(graph):
    ir, latents = graph
    x = np.random.default_rng(9).standard_normal((1, 4, 8, 8)).astype(np.float32)
    expected = openvino.compile_model(ir, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([x])[0]

    def measure(candidate):
        y = openvino.compile_model(candidate, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([x])[0]
        return 10 * np.log10(np.ptp(expected) ** 2 / np.square(y - expected).mean())

    everything = measure(quantize.quantize_ir(ir, latents))
    found, kept, reached = quantize.quantize_until(ir, latents, measure, everything - 1)
    assert kept == [] and reached >= everything - 1
    found, kept, reached = quantize.quantize_until(ir, latents, measure, everything + 1)
    assert kept and reached >= everything + 1 and measure(found) == pytest.approx(reached)


def test_a_bundle_that_misses_the_bar_is_refused_and_nothing_left(two_level_model, tmp_path, monkeypatch):
    monkeypatch.setitem(THRESHOLDS, "int8", Thresholds(500.0, 1, 500.0))
    with pytest.raises(NumericsError, match=r"int8 gives .* at least 500 is demanded") as caught:
        export_bundle(two_level_model, tmp_path / "b", target="openvino", precision="int8")
    assert len(caught.value.measurements) > 2
    assert not list(tmp_path.iterdir())


def test_bad_choices_are_answered_with_what_there_is(graph, two_level_model, tmp_path, monkeypatch):
    ir, latents = graph
    with pytest.raises(ConfigError, match="nonsense cannot be kept: the quantizable layers are"):
        quantize.quantize_ir(ir, latents, keep=["nonsense"])
    with pytest.raises(ConfigError, match="at least one calibration array"):
        quantize.quantize_ir(ir, [])
    with pytest.raises(ConfigError, match="onnx bundles are made in fp32, fp16, bf16, not in int8"):
        export_bundle(two_level_model, tmp_path / "b", precision="int8")
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'vae-export\[int8\]'"):
        quantize.quantize_ir(ir, latents)


def test_squares_of_photographs_are_of_one_size_and_in_range():
    squares = list(crops(photographs(), 64, 15))
    assert len(squares) == 12  # three of each of four
    assert all(s.shape == (1, 3, 64, 64) and s.min() >= -1 and s.max() <= 1 for s in squares)
    assert len({s.numpy().tobytes() for s in squares}) == len(squares)
    assert len(list(crops(photographs() * 20, 64, 15))) <= 16
