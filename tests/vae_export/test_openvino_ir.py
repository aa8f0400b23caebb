"""OpenVINO bundles on disk: what is in them, who else opens them, and what is refused before anything is written.

Tests vae_export/targets/openvino.py.
"""

import json
import os
import re
import sys

import numpy as np
import pytest
import torch

from runtimes import BackendUnavailable, Bundle, ConfigError, NumericsError
from runtimes.manifest import GraphSpec, TensorSpec
from runtimes.names import GRAPHS
from tests.helpers.files import tree
from tests.helpers.forms import FORMS
from tests.helpers.graph_table import TABLE
from vae_export import AutoencoderKL, export_bundle, validate_bundle
from vae_export.comparison import THRESHOLDS
from vae_export.rewrites import winograd
from vae_export.rewrites.apply import fitted
from vae_export.targets import openvino as openvino_ir
from vae_export.targets.openvino import export_ir

try:
    ov = openvino_ir.import_openvino()
except BackendUnavailable as error:
    pytest.skip(str(error), allow_module_level=True)

HALVES = ("fp16", "bf16")
PRECISIONS = ("fp32", *HALVES)


def file_of(graph, suffix):
    return f"vae_{graph}/openvino_model.{suffix}"


@pytest.fixture(params=GRAPHS)
def graph(request):
    return request.param


@pytest.fixture(params=PRECISIONS)
def bundle(request, openvino_bundle):
    return openvino_bundle(request.param)


# What is in a bundle ----------------------------------------------------------------------------------------------


def test_layout_is_the_one_that_openvinos_loaders_expect(bundle, tiny_model):
    config = tiny_model.config.to_json().encode()
    files = tree(bundle)
    assert sorted(files) == sorted(
        ["manifest.json", "config.json"]
        + [
            f"vae_{graph}/{name}"
            for graph in GRAPHS
            for name in ("config.json", "openvino_model.xml", "openvino_model.bin")
        ]
    )
    assert all(data == config for name, data in files.items() if name.endswith("config.json"))
    assert json.loads(config)["_class_name"] == "AutoencoderKL"
    opened = Bundle(bundle)
    opened.verify()
    assert set(opened.manifest.files) == set(files) - {"manifest.json"}, "the weights are hashed too"


def test_inputs_and_outputs_are_those_of_the_table(bundle, graph):
    model = ov.Core().read_model(bundle / file_of(graph, "xml"))
    sides = []
    for (name, channels, *_), ports in zip(TABLE[graph], (model.inputs, model.outputs), strict=True):
        (port,) = ports
        assert (port.get_names(), port.get_element_type()) == ({name}, ov.Type.f32)
        batch, fixed, *free = port.get_partial_shape()
        assert fixed == channels and batch.is_dynamic and all(size.is_dynamic for size in free)
    for name, *sizes in TABLE[graph]:
        sides.append(TensorSpec(name, "float32", ("batch", *sizes)))
    assert Bundle(bundle).manifest.graphs[graph] == GraphSpec(file_of(graph, "xml"), *sides)


def test_manifest_says_what_was_made_of_what_and_with_what(bundle, tiny_model):
    manifest = Bundle(bundle).manifest
    assert (manifest.target, manifest.precision, manifest.config) == ("openvino", bundle.name, tiny_model.config)
    assert list(manifest.rewrites) == fitted(FORMS["openvino", bundle.name], tiny_model).records()
    assert manifest.tools["openvino"] == ov.__version__
    assert {"python", "torch", "onnx"} <= set(manifest.tools)


def test_manifest_holds_what_was_measured_in_openvino(openvino_bundle):
    validation = Bundle(openvino_bundle("fp32")).manifest.validation
    assert validation["verdict"] == "passed" and "not_run" not in validation
    assert validation["thresholds"] == THRESHOLDS["fp32"]._asdict()
    assert {(m["graph"], m["by"]) for m in validation["measurements"]} == {(graph, "openvino") for graph in GRAPHS}
    assert all(m["passed"] and m["finite"] for m in validation["measurements"])


@pytest.mark.parametrize("precision", HALVES)
def test_halves_take_half_the_space_of_fp32(openvino_bundle, graph, precision):
    half, whole = ((openvino_bundle(p) / file_of(graph, "bin")).stat().st_size for p in (precision, "fp32"))
    # More or less: fp16 has the last block written in another form, and constants of shapes are integers.
    assert 0.47 < half / whole < 0.54


@pytest.mark.parametrize(("precision", "stored"), [("fp32", "f32"), ("fp16", "f16"), ("bf16", "bf16")])
def test_weights_are_of_the_precision(openvino_bundle, graph, precision, stored):
    model = ov.Core().read_model(openvino_bundle(precision) / file_of(graph, "xml"))
    kinds = [(op.get_element_type().get_type_name(), tuple(op.get_output_shape(0))) for op in model.get_ops()
             if op.get_type_name() == "Constant"]  # fmt: skip
    # Kernels: bias and weight of a norm are one number a channel, and fp32 where its statistics are.
    weights = [kind for kind, shape in kinds if len(shape) == 4 and shape[0] > 1 and kind not in ("i64", "i32")]
    assert len(weights) > 10 and set(weights) == {stored}


@torch.no_grad()
def test_wide_convolutions_are_those_of_winograd_in_fp32(two_level_model, tmp_path, monkeypatch):
    monkeypatch.setattr(winograd, "MIN_CHANNELS", 16)
    path = tmp_path / "decoder.xml"
    export_ir(two_level_model, "decoder", path, form=FORMS["openvino", "fp32"])
    kinds = [operation.get_type_name() for operation in ov.Core().read_model(path).get_ops()]
    assert kinds.count("GroupConvolution") == 16 * 3  # the first of the last block is in parts
    compiled = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for shape in ((1, 4, 1, 3), (2, 4, 7, 4)):
        z = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        expected = two_level_model.decode_latents(z)
        assert np.abs(compiled([z.numpy()])[0] - expected.numpy()).max() < 2e-5  # as between all forms: test_rewrite.py


def test_files_tell_nothing_of_the_machine_they_were_made_on(bundle, graph):
    traces = ("site-packages", ".py", "/home", "/root", "/tmp", os.path.expanduser("~"), os.getcwd(),
              "model.onnx", "stack_trace", "pkg.torch")  # fmt: skip
    for suffix in ("xml", "bin"):
        data = (bundle / file_of(graph, suffix)).read_bytes()
        # More must follow than the two or three letters that chance puts into megabytes of weights.
        assert not [trace for trace in traces if re.search(re.escape(trace.encode()) + rb"[\w/\"':]{2}", data)]


@pytest.fixture(scope="module")
def again(tiny_model, openvino_bundle, tmp_path_factory):
    """(the encoder of the bundle, the same exported once more), each {suffix: bytes}; the model must not change."""
    before, looks = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}, repr(tiny_model)
    path = tmp_path_factory.mktemp("again") / "openvino_model.xml"
    export_ir(tiny_model, "encoder", path, form=FORMS["openvino", "fp32"])
    assert repr(tiny_model) == looks
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny_model.state_dict().items())
    folders = openvino_bundle("fp32") / "vae_encoder", path.parent
    return [{suffix: (f / f"openvino_model.{suffix}").read_bytes() for suffix in ("xml", "bin")} for f in folders]


def test_exporting_twice_gives_the_same_bytes(again):
    """Though OpenVINO names operations without a name by a counter of the process."""
    first, second = again
    same = first == second  # beforehand: pytest would spell out how megabytes differ
    assert same


# Who else opens it ------------------------------------------------------------------------------------------------


@pytest.fixture
def genai_vae(openvino_bundle):
    """OpenVINO GenAI's own VAE, opened from a bundle; in fp32, since on a CPU with AMX it would take bf16."""
    genai = pytest.importorskip("openvino_genai", reason="pip install openvino-genai")
    folders = [openvino_bundle("fp32") / f"vae_{graph}" for graph in GRAPHS]
    return genai, genai.AutoencoderKL(*folders, "CPU", INFERENCE_PRECISION_HINT="f32")


def test_openvino_genai_decodes_a_bundle_to_the_same_image(genai_vae, tiny_model):
    """It takes scaled latents, scales and shifts them back by the config, and answers with uint8 [B, H, W, 3]."""
    z = np.random.default_rng(0).standard_normal((2, 4, 6, 5)).astype(np.float32)
    config = tiny_model.config
    raw = torch.from_numpy(z / config.scaling_factor + config.shift_factor)
    expected = (tiny_model.decode_latents(raw) / 2 + 0.5).clamp(0, 1).mul(255).permute(0, 2, 3, 1).numpy()
    _, vae = genai_vae
    image = vae.decode(ov.Tensor(z)).data
    assert image.dtype == np.uint8
    # The nearest step, or the one below (it does not promise to round); a thousandth for fp32.
    assert np.abs(image - expected).max() <= 1.001


def test_openvino_genai_encodes_with_a_bundle_to_the_same_latents(genai_vae, tiny_model):
    """It takes images in [-1, 1] and answers with a draw from the posterior, scaled: here the draw is the mean."""
    genai, vae = genai_vae

    class Zeros(genai.Generator):
        def __init__(self):
            genai.Generator.__init__(self)

        def next(self):
            return 0.0

        def randn_tensor(self, shape):
            return ov.Tensor(np.zeros(tuple(shape), np.float32))

    x = np.random.default_rng(0).uniform(-1, 1, (1, 3, 48, 40)).astype(np.float32)
    mean = tiny_model.encode(torch.from_numpy(x)).latent_dist.mode().numpy()
    config = tiny_model.config
    np.testing.assert_allclose(
        vae.encode(ov.Tensor(x), Zeros()).data, (mean - config.shift_factor) * config.scaling_factor, rtol=0, atol=2e-5
    )


# Refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def without_openvino(monkeypatch):
    """An installation without it, as far as an import can tell."""
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "runtimes.openvino", raising=False)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_inputs_of_another_type_are_refused_and_nothing_left(tiny_model, tmp_path, precision):
    with pytest.raises(ConfigError, match="--io-precision fp32"):
        export_bundle(
            tiny_model, tmp_path / "b", target="openvino", precision=precision, io_precision="same",
            rescale=False, run_validation=False,
        )  # fmt: skip
    with pytest.raises(ConfigError, match="float32"):
        export_ir(tiny_model, "decoder", tmp_path / "b" / "m.xml", precision=precision, io_precision="same")
    assert os.listdir(tmp_path) == []


def test_where_openvino_is_missing_the_error_says_what_to_install(tiny_model, tmp_path, without_openvino):
    with pytest.raises(BackendUnavailable, match=re.escape("pip install 'vae-export[openvino]'")):
        export_bundle(tiny_model, tmp_path / "b", target="openvino", run_validation=False)
    assert os.listdir(tmp_path) == []


def test_another_type_of_input_is_refused_before_the_work_begins(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(AutoencoderKL, "encode_moments", lambda *_: pytest.fail("began to work"))
    with pytest.raises(ConfigError, match="float32"):
        export_bundle(tiny_model, tmp_path / "b", target="openvino", io_precision="same")


def test_missing_openvino_is_said_before_the_work_begins(tiny_model, tmp_path, monkeypatch, without_openvino):
    monkeypatch.setattr(AutoencoderKL, "encode_moments", lambda *_: pytest.fail("began to work"))
    with pytest.raises(BackendUnavailable):
        export_bundle(tiny_model, tmp_path / "b", target="openvino")


def test_a_wrong_weight_is_found(openvino_bundle, tiny_model, tmp_path, monkeypatch, few_cases):
    """A graph with one weight 1 % off, written as if it were right: no bundle appears."""
    save = openvino_ir.save_ir

    def save_wrong(ir, path, precision):
        weights = [
            op for op in ir.get_ops() if op.get_type_name() == "Constant" and "conv_out.weight" in op.friendly_name
        ]
        for weight in weights:
            wrong = ov.opset16.constant(weight.data * np.float32(1.01))
            for target in weight.output(0).get_target_inputs():
                target.replace_source_output(wrong.output(0))
        assert weights
        save(ir, path, precision)

    sources = {graph: openvino_bundle("fp32") / file_of(graph, "xml") for graph in GRAPHS}
    specs = Bundle(openvino_bundle("fp32")).manifest.graphs
    monkeypatch.setattr(
        openvino_ir, "read_graph", lambda model, graph, *_, **__: (ov.Core().read_model(sources[graph]), specs[graph])
    )
    monkeypatch.setattr(openvino_ir, "save_ir", save_wrong)
    with pytest.raises(NumericsError, match="comparisons with the reference failed at fp32"):
        export_bundle(tiny_model, tmp_path / "b", target="openvino")
    assert os.listdir(tmp_path) == []


def test_a_bundle_is_validated_again_as_it_stands(openvino_bundle, tiny_model, few_cases, monkeypatch):
    measured = validate_bundle(openvino_bundle("fp32"), tiny_model)
    assert [(m.graph, m.by, m.passed) for m in measured] == [(graph, "openvino", True) for graph in GRAPHS]
    other = AutoencoderKL(tiny_model.config)
    with pytest.raises(ConfigError, match="the bundle was made from"):
        validate_bundle(openvino_bundle("fp32"), other)
    monkeypatch.setattr("vae_export.validate.check_weights", lambda *_: None)
    with pytest.raises(NumericsError):  # the numbers tell as well
        validate_bundle(openvino_bundle("fp32"), other)


# What leaves the machine ------------------------------------------------------------------------------------------


def test_an_export_reports_to_nobody(alone, tmp_path):
    """OpenVINO's package tells Google Analytics of every import, and of every conversion, unless it is kept from it."""
    program = """
import sys
from pathlib import Path
from vae_export import AutoencoderKL
from vae_export.targets.openvino import export_ir

model = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, mid_block_add_attention=False)
export_ir(model.eval(), "encoder", Path("m.xml"))
print("openvino_telemetry.main" in sys.modules)
"""
    assert alone(program) == ["False"]
    assert not (tmp_path / "home" / "intel").exists(), "an identity for Google Analytics was left in the home directory"
