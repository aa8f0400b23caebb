"""Exporting: the graphs are what the design's table says, and a bundle with wrong graphs is never written.

Tests vae_export/targets/onnx.py, vae_export/targets/onnx_graphs.py.
"""

import os
import re
import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from runtimes import Bundle, BundleError, ConfigError, IntegrityError, NumericsError, VaeError, open_vae
from runtimes.manifest import TensorSpec
from runtimes.names import GRAPHS
from tests.helpers.files import tree
from tests.helpers.graph_table import TABLE
from vae_export import AutoencoderKL, export_bundle, validate_bundle
from vae_export.comparison import THRESHOLDS
from vae_export.targets import onnx_graphs

# Another order of summation in fp32, on values of about 1 to 10.
TOLERANCE = 1e-4
SMALL: dict[str, Any] = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": False,
}


def scaled(name, factor):
    """A change to a graph: the weight with this in its name, times `factor`."""

    def change(proto):
        (tensor,) = (tensor for tensor in proto.graph.initializer if name in tensor.name)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), tensor.name))

    return change


def frozen(proto):
    """A change to a graph: its input has the trace's shape and no other."""
    for dimension, size in zip(proto.graph.input[0].type.tensor_type.shape.dim, (2, 4, 6, 10), strict=True):
        dimension.dim_value = size


@pytest.fixture
def quick_export(monkeypatch, tiny_bundle):
    """quick_export(encoder=change): exporting now gives the tiny bundle's graphs, so changed, and traces nothing."""

    def stub(**changes):
        def export_onnx(model, graph, path, **_):
            spec = Bundle(tiny_bundle).manifest.graphs[graph]
            proto = onnx.load(tiny_bundle / spec.file)
            changes.get(graph, lambda proto: None)(proto)
            path.parent.mkdir()
            onnx.save(proto, path)
            return replace(spec, file=path.name)

        monkeypatch.setattr("vae_export.targets.onnx_graphs.export_onnx", export_onnx)

    return stub


# Graphs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=GRAPHS)
def graph(request):
    return request.param


@pytest.fixture
def proto(tiny_bundle, graph):
    return onnx.load(tiny_bundle / f"vae_{graph}" / "model.onnx", load_external_data=False)


def test_inputs_and_outputs_are_those_of_the_table(proto, graph, tiny_bundle):
    spec = Bundle(tiny_bundle).manifest.graphs[graph]
    values = (*proto.graph.input, *proto.graph.output)
    for (name, *sizes), value, noted in zip(TABLE[graph], values, (spec.input, spec.output), strict=True):
        kind = value.type.tensor_type
        assert (value.name, kind.elem_type) == (name, onnx.TensorProto.FLOAT)
        assert [d.dim_param or d.dim_value for d in kind.shape.dim] == ["batch", *sizes]
        assert noted == TensorSpec(name, "float32", ("batch", *sizes))


def test_graph_is_one_sound_file_of_standard_operators(proto):
    onnx.checker.check_model(proto, full_check=True)
    assert not any(tensor.external_data for tensor in proto.graph.initializer)
    assert [(opset.domain, opset.version) for opset in proto.opset_import] == [("", onnx_graphs.OPSET)]
    assert not proto.functions
    assert {node.domain for node in proto.graph.node} == {""}
    operators = {node.op_type for node in proto.graph.node}
    assert not [op for op in operators if re.search("Random|Bernoulli|Multinomial|Dropout", op)]


def test_graph_tells_nothing_of_the_machine_it_was_made_on(tiny_bundle, graph):
    data = (tiny_bundle / f"vae_{graph}" / "model.onnx").read_bytes()
    traces = ("site-packages", ".py", "/home", os.path.expanduser("~"), os.getcwd(), "stack_trace")
    # More must follow than the two or three letters that chance puts into megabytes of weights.
    assert not [trace for trace in traces if re.search(re.escape(trace.encode()) + rb"[\w/\"':]{2}", data)]


@pytest.mark.parametrize("size", [(1, 1, 1), (3, 1, 1), (1, 9, 4), (3, 5, 13)], ids=str)
def test_batch_height_and_width_are_free(vae, tiny_model, graph, size):
    batch, height, width = size
    shape = (batch, 3, height * 8, width * 8) if graph == "encoder" else (batch, 4, height, width)
    x = np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
    if graph == "encoder":
        actual, expected = vae.encode(x).latent_dist.parameters, tiny_model.encode_moments(torch.from_numpy(x))
    else:
        actual, expected = vae.decode(x).sample, tiny_model.decode_latents(torch.from_numpy(x))
    np.testing.assert_allclose(actual, expected.numpy(), atol=TOLERANCE)


def test_exporting_twice_gives_the_same_bytes_and_leaves_the_model_as_it_was(tiny_model, tiny_bundle, tmp_path):
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    steps = []
    export_bundle(tiny_model, tmp_path / "again", progress=lambda *step: steps.append(step))
    assert tree(tmp_path / "again") == tree(tiny_bundle)
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny_model.state_dict().items())
    assert steps and all(what and 0 <= done <= total for what, done, total in steps)


def test_model_fresh_from_its_constructor_is_exported(tmp_path):
    """In training mode; grey images, one channel a norm group, neither attention nor the 1x1 convolutions."""
    model = AutoencoderKL(in_channels=1, out_channels=1, norm_num_groups=8, **SMALL)
    export_bundle(model, tmp_path / "grey")
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    with open_vae(tmp_path / "grey") as vae:
        assert vae.encode(np.zeros((1, 1, 6, 4), np.float32)).latent_dist.mean.shape == (1, 4, 3, 2)


# Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "tflite"}, "'tflite' is not known; known are onnx"),
        ({"precision": "fp12"}, "'fp12' is not known; known are fp32"),
        ({"precision": ""}, "'' is not known"),
        ({"LARGEST": 1000}, "one ONNX file holds 2 GiB"),
        ({"LARGEST": 1000, "precision": "fp16"}, "one ONNX file holds 2 GiB"),
    ],
    ids=str,
)
def test_what_cannot_be_exported_is_refused_and_nothing_left(tiny_model, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(onnx_graphs, "LARGEST", options.pop("LARGEST", onnx_graphs.LARGEST))
    with pytest.raises(ConfigError, match=message):
        export_bundle(tiny_model, tmp_path / "new" / "b", **options)
    assert os.listdir(tmp_path) == []


def test_unknown_scaling_factor_is_asked_for(tmp_path):
    with pytest.raises(ConfigError, match="--scaling-factor"):
        export_bundle(AutoencoderKL(scaling_factor=None, norm_num_groups=8, **SMALL), tmp_path / "b")
    assert os.listdir(tmp_path) == []


def test_existing_directory_is_refused_before_the_work_begins(tiny_model, tiny_bundle, monkeypatch):
    monkeypatch.setattr(AutoencoderKL, "encode_moments", lambda *_: pytest.fail("began to work"))
    with pytest.raises(BundleError, match="--overwrite"):
        export_bundle(tiny_model, tiny_bundle)


# Validation -------------------------------------------------------------------------------------------------------


def test_validation_feeds_no_side_that_the_graphs_were_traced_with(tiny_bundle):
    sizes = set()
    for m in Bundle(tiny_bundle).manifest.validation["measurements"]:
        batch, _, *sides = m["shape"]
        height, width = (side // 8 if m["graph"] == "encoder" else side for side in sides)
        assert batch != onnx_graphs.TRACE_BATCH
        assert height != onnx_graphs.TRACE_HEIGHT
        assert width != onnx_graphs.TRACE_WIDTH
        sizes.add((m["graph"], batch, height, width))
    for name in GRAPHS:
        assert (name, 1, 1, 1) in sizes  # the smallest legal size
        assert any(batch > 1 and height != width for graph, batch, height, width in sizes if graph == name)


def test_manifest_holds_what_was_measured(tiny_bundle):
    validation = Bundle(tiny_bundle).manifest.validation
    assert validation["verdict"] == "passed"
    assert validation["thresholds"] == THRESHOLDS["fp32"]._asdict()
    assert {m["graph"] for m in validation["measurements"]} == set(GRAPHS)
    for m in validation["measurements"]:
        assert m["passed"] and m["finite"]
        assert 0 <= m["mean_abs"] <= m["max_abs"] < TOLERANCE
        assert m["psnr_db"] is None or m["psnr_db"] >= THRESHOLDS["fp32"].psnr_db


WRONG = {
    "encoder weight 1 % off": {"encoder": scaled("encoder.conv_in.weight", 1.01)},
    "decoder weight 1 % off": {"decoder": scaled("decoder.conv_out.weight", 1.01)},
    "inner bias 1 % off": {"decoder": scaled("up_blocks.3.resnets.1.conv2.bias", 1.01)},
    "NaN in the encoder": {"encoder": scaled("encoder.conv_in.weight", np.nan)},
    "infinity in the decoder": {"decoder": scaled("decoder.conv_out.bias", np.inf)},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_wrong_graph_is_found_and_the_old_bundle_stays(quick_export, tiny_model, bundle_copy, tmp_path, wrong):
    out = bundle_copy()
    before = tree(out)
    quick_export(**wrong)
    with pytest.raises(NumericsError, match="comparisons with the reference failed at fp32") as caught:
        export_bundle(tiny_model, out, overwrite=True)
    assert tree(out) == before
    assert os.listdir(tmp_path) == [out.name]
    missed = [m for m in caught.value.measurements if not m["passed"]]
    assert {m["graph"] for m in missed} == set(wrong)
    assert len(missed) < len(caught.value.measurements)  # the good ones are there too


def test_graph_frozen_to_the_trace_is_found(quick_export, tiny_model, tmp_path):
    quick_export(decoder=frozen)
    with pytest.raises(VaeError, match="invalid dimensions"):
        export_bundle(tiny_model, tmp_path / "b")
    assert os.listdir(tmp_path) == []


def test_nan_in_a_model_from_memory_ends_in_an_error(tmp_path):
    model = AutoencoderKL(norm_num_groups=1, **SMALL)
    with torch.no_grad():
        model.get_parameter("decoder.conv_in.bias")[0] = torch.nan
    with pytest.raises(NumericsError, match="NaN or infinity"):
        export_bundle(model, tmp_path / "b")
    assert os.listdir(tmp_path) == []


def test_skipped_validation_is_recorded(quick_export, tiny_model, tmp_path):
    quick_export(**WRONG["decoder weight 1 % off"])
    bundle = export_bundle(tiny_model, tmp_path / "b", run_validation=False)
    assert bundle.manifest.validation == {"verdict": "skipped", "reason": "--no-validate was given"}
    with pytest.raises(NumericsError):
        validate_bundle(tmp_path / "b", tiny_model)


def test_bundle_is_validated_against_its_own_model_only(quick_export, tiny_model, tmp_path):
    quick_export()
    tiny_model.save_pretrained(tmp_path / "model")
    AutoencoderKL(tiny_model.config).save_pretrained(tmp_path / "other")
    model, other = (AutoencoderKL.from_pretrained(tmp_path / name) for name in ("model", "other"))
    measured = export_bundle(model, tmp_path / "b").manifest.validation["measurements"]
    for given in (model, None):  # None: from where the manifest says
        assert [m.to_dict() for m in validate_bundle(tmp_path / "b", given)] == measured
    with pytest.raises(ConfigError, match=r"other has weights \w{64}, and the bundle was made from \w{64}; .*--model"):
        validate_bundle(tmp_path / "b", other)
    shutil.rmtree(tmp_path / "model")
    (tmp_path / "other").rename(tmp_path / "model")
    with pytest.raises(ConfigError, match="model has weights"):
        validate_bundle(tmp_path / "b")
    with (tmp_path / "b" / "vae_decoder" / "config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(IntegrityError, match=r"vae_decoder/config\.json"):
        validate_bundle(tmp_path / "b", model)


def test_bundle_of_a_model_from_memory_needs_the_model(tiny_bundle, tiny_model):
    with pytest.raises(ConfigError, match=r"a model in memory; .*--model"):
        validate_bundle(tiny_bundle)
    assert all(m.passed for m in validate_bundle(tiny_bundle, tiny_model))
    with pytest.raises(ConfigError, match=r"the model in memory has weights \w{64}, and the bundle was made from"):
        validate_bundle(tiny_bundle, AutoencoderKL(tiny_model.config))
