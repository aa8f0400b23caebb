"""fp16 and bf16 graphs: what is inside them, who loads them, and that backends honour the eps that rescaling needs."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from runtimes import ConfigError, open_vae
from tools.blow_up import blown_up, gains
from vae_export import export_bundle
from vae_export.targets.onnx_graphs import OPSET, export_onnx


@pytest.fixture(scope="module")
def half_bundle(tiny_model, tmp_path_factory):
    """The tiny model, blown up, in fp16 with fp32 inputs and outputs."""
    path = tmp_path_factory.mktemp("half") / "bundle"
    export_bundle(blown_up(tiny_model, gains(0, powers_of_two=True)), path, precision="fp16")
    return path


def test_an_fp16_bundle_records_and_proves_what_was_done(half_bundle):
    manifest = json.loads((half_bundle / "manifest.json").read_text())
    rewrite, *forms = manifest["rewrites"]
    assert rewrite["name"] == "rescale_activations"
    assert [form["name"] for form in forms] == ["fold_upsample", "row_norms", "attention_in_blocks"]
    assert rewrite["largest_activation"] > 65504
    assert all(isinstance(exponent, int) for exponent in rewrite["divided_by_power_of_two"].values())
    measured = manifest["validation"]["measurements"]
    assert {m["by"] for m in measured} == {"simulated fp16", "onnxruntime"}
    assert all(m["finite"] and m["passed"] for m in measured)


def test_an_fp16_bundle_runs_with_fp32_arrays(half_bundle, tiny_model):
    x = np.random.default_rng(0).uniform(-1, 1, (2, 3, 24, 40)).astype(np.float32)
    with open_vae(half_bundle, check_finite=True) as vae:
        moments = vae.encode(x).latent_dist.parameters
    assert moments.dtype == np.float32
    expected = tiny_model.encode_moments(torch.from_numpy(x)).numpy()
    # 11 bits of mantissa in the weights; the runtime computes in fp32.
    assert np.abs(moments - expected).max() < 2e-3 * np.abs(expected).max()


@pytest.mark.parametrize(("io_precision", "dtype"), [("fp32", TensorProto.FLOAT), ("same", TensorProto.FLOAT16)])
def test_weights_are_fp16_and_the_interface_as_asked(io_precision, dtype, tiny_model, tmp_path):
    spec = export_onnx(tiny_model, "decoder", tmp_path / "m.onnx", precision="fp16", io_precision=io_precision)
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)} == {dtype}
    assert spec.input.dtype == spec.output.dtype == {"fp32": "float32", "same": "float16"}[io_precision]
    floats = [w for w in graph.initializer if w.data_type not in (TensorProto.INT64, TensorProto.INT32)]
    assert all(weight.data_type == TensorProto.FLOAT16 for weight in floats if len(weight.dims) == 4)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    z = np.zeros((1, 4, 3, 5), np.float32 if io_precision == "fp32" else np.float16)
    assert np.isfinite(session.run(None, {spec.input.name: z})[0]).all()


def test_a_bf16_bundle_says_what_could_not_be_run(two_level_model, tmp_path):
    bundle = export_bundle(two_level_model, tmp_path / "bf16", precision="bf16")
    validation = bundle.manifest.validation
    assert "bfloat16" in validation["not_run"]
    assert {m["by"] for m in validation["measurements"]} == {"simulated bf16"}
    with pytest.raises(ConfigError, match="no bfloat16"):
        export_bundle(two_level_model, tmp_path / "same", precision="bf16", io_precision="same")


@pytest.mark.parametrize("exponent", [0, 15, 30])
def test_the_runtime_honours_an_eps_as_small_as_rescaling_makes_it(exponent):
    """Input whose variance is eps: a backend that clamps or drops eps is off by a factor of 1.4."""
    eps = 1e-6 * 4.0**-exponent
    x = (np.random.default_rng(0).standard_normal((1, 16, 8, 8)) * 1e-3 * 2.0**-exponent).astype(np.float32)
    shape: list[str | int | None] = ["n", 16, "h", "w"]
    one, zero = (helper.make_tensor(name, TensorProto.FLOAT, [16], [v] * 16) for name, v in (("s", 1.0), ("b", 0.0)))
    node = helper.make_node("GroupNormalization", ["x", "s", "b"], ["y"], epsilon=eps, num_groups=4)
    inputs, outputs = ([helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)] for name in ("x", "y"))
    graph = helper.make_graph([node], "norm", inputs, outputs, [one, zero])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = torch.nn.functional.group_norm(torch.from_numpy(x).double(), 4, eps=eps).numpy()
    assert np.abs(session.run(None, {"x": x})[0] - expected).max() < 1e-5
