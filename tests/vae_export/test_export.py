"""Exporting: the graphs are what the table in the design says, and a bundle with wrong graphs is never written."""

import os
import re
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

import vae_export
import vae_export.export
from runtimes import Bundle, BundleError, ConfigError, IntegrityError, NumericsError, open_vae
from runtimes.bundle import GRAPHS, TensorSpec
from vae_export import AutoencoderKL, export_bundle, validate_bundle
from vae_export import onnx_graphs as graphs_module
from vae_export.validate import THRESHOLDS, inputs

# Names and free dimensions; 4 latent channels.
TABLE = {
    "encoder": (
        TensorSpec("sample", "float32", ("batch", 3, "height", "width")),
        TensorSpec("latent_parameters", "float32", ("batch", 8, "latent_height", "latent_width")),
    ),
    "decoder": (
        TensorSpec("latent_sample", "float32", ("batch", 4, "latent_height", "latent_width")),
        TensorSpec("sample", "float32", ("batch", 3, "height", "width")),
    ),
}
# Another order of summation in fp32, on values of about 1 to 10.
TOLERANCE = 1e-4


def tree(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def scale_a_weight(name, factor):
    """A change to a graph: the weight of this name (a part of it) times `factor`."""

    def change(proto):
        (tensor,) = (tensor for tensor in proto.graph.initializer if name in tensor.name)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), tensor.name))

    return change


@pytest.fixture
def quick_export(monkeypatch, tiny_bundle):
    """quick_export(encoder=change): from now on exporting gives the tiny bundle's graphs, so changed, without tracing."""

    def stub(**changes):
        def export_onnx(model, graph, path, **_):
            spec = Bundle(tiny_bundle).manifest.graphs[graph]
            proto = onnx.load(tiny_bundle / spec.file)
            changes.get(graph, lambda proto: None)(proto)
            path.parent.mkdir()
            onnx.save(proto, path)
            return spec._replace(file=path.name) if hasattr(spec, "_replace") else replace_file(spec, path.name)

        monkeypatch.setattr(vae_export.export, "export_onnx", export_onnx)

    return stub


def replace_file(spec, name):
    return type(spec)(name, spec.input, spec.output)


# Graphs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=GRAPHS)
def graph(request):
    return request.param


@pytest.fixture
def proto(tiny_bundle, graph):
    return onnx.load(tiny_bundle / f"vae_{graph}" / "model.onnx", load_external_data=False)


def test_inputs_and_outputs_are_those_of_the_table(proto, graph, tiny_bundle):
    assert TABLE[graph] == tuple(
        TensorSpec(
            value.name,
            onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
            tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim),
        )
        for (value,) in (proto.graph.input, proto.graph.output)
    )
    spec = Bundle(tiny_bundle).manifest.graphs[graph]
    assert (spec.input, spec.output) == TABLE[graph]


def test_graph_is_one_sound_file_of_standard_operators(proto):
    onnx.checker.check_model(proto, full_check=True)
    assert not any(tensor.external_data for tensor in proto.graph.initializer)
    assert [(opset.domain, opset.version) for opset in proto.opset_import] == [("", graphs_module.OPSET)]
    assert not proto.functions
    operators = {(node.domain, node.op_type) for node in proto.graph.node}
    assert {domain for domain, _ in operators} == {""}
    assert not [op for _, op in operators if "Random" in op or op in ("Bernoulli", "Multinomial", "Dropout")]


def test_scaling_is_not_baked_in(tiny_bundle, tiny_model):
    """The decoder takes raw latents: its first operation on them is the 1x1 convolution, not a division."""
    proto = onnx.load(tiny_bundle / "vae_decoder" / "model.onnx")
    readers = [node.op_type for node in proto.graph.node if "latent_sample" in node.input]
    assert set(readers) <= {"Conv", "Cast"}


def test_graph_tells_nothing_of_the_machine_it_was_made_on(tiny_bundle, graph):
    data = (tiny_bundle / f"vae_{graph}" / "model.onnx").read_bytes()
    home = os.path.expanduser("~").encode()
    weights = sum(tensor.ByteSize() for tensor in onnx.load_from_string(data).graph.initializer)
    assert len(data) < weights + 100_000  # so no copy of anything else
    for trace in (b"site-packages", b".py", b"/home", home, os.getcwd().encode(), b"stack_trace", b"Traceback"):
        assert not re.search(re.escape(trace) + rb"[\w/\"']", data), trace


@pytest.mark.parametrize("size", [(1, 1, 1), (3, 1, 1), (1, 9, 4), (3, 5, 13), (2, 6, 10)], ids=str)
def test_batch_height_and_width_are_free(vae, tiny_model, graph, size):
    batch, height, width = size
    shape = (batch, 3, height * 8, width * 8) if graph == "encoder" else (batch, 4, height, width)
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    with torch.no_grad():
        if graph == "encoder":
            actual, expected = vae.encode(x).latent_dist.parameters, tiny_model.encode_moments(torch.from_numpy(x))
        else:
            actual, expected = vae.decode(x).sample, tiny_model.decode_latents(torch.from_numpy(x))
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected.numpy(), atol=TOLERANCE)


def test_exporting_twice_gives_the_same_bytes_and_leaves_the_model_as_it_was(tiny_model, tiny_bundle, tmp_path):
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    steps = []
    export_bundle(tiny_model, tmp_path / "again", progress=lambda *step: steps.append(step))
    assert tree(tmp_path / "again") == tree(tiny_bundle)
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny_model.state_dict().items())
    assert all(what and 0 <= done <= total for what, done, total in steps)


def test_model_fresh_from_its_constructor_is_exported_in_eval_mode(tmp_path):
    """In training mode, with gradients; grey images, two levels, neither mid attention nor the 1x1 convolutions."""
    model = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    bundle = export_bundle(model, tmp_path / "grey")
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert bundle.manifest.graphs["encoder"].input.shape == ("batch", 1, "height", "width")
    with open_vae(tmp_path / "grey") as vae:
        assert vae.encode(np.zeros((1, 1, 6, 4), np.float32)).latent_dist.mean.shape == (1, 4, 3, 2)


# Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "tflite"}, "'tflite' is not known; known are onnx"),
        ({"precision": "fp12"}, "'fp12' is not known; known are fp32"),
        ({"precision": ""}, "'' is not known"),
    ],
    ids=str,
)
def test_unknown_choice_is_refused_before_anything_is_written(tiny_model, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        export_bundle(tiny_model, tmp_path / "new" / "b", **options)
    assert os.listdir(tmp_path) == []


def test_unknown_scaling_factor_is_asked_for(tmp_path):
    with pytest.raises(ConfigError, match="--scaling-factor"):
        export_bundle(AutoencoderKL(scaling_factor=None), tmp_path / "b")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_weights_too_large_for_one_file_are_refused(tiny_model, tmp_path, monkeypatch, precision):
    monkeypatch.setattr(graphs_module, "LARGEST", 1000)
    with pytest.raises(ConfigError, match="one ONNX file holds 2 GiB"):
        export_bundle(tiny_model, tmp_path / "b", precision=precision)
    assert os.listdir(tmp_path) == []


def test_existing_directory_is_refused_before_the_work_begins(tiny_model, bundle_copy, monkeypatch):
    def work(*_, **__):
        raise AssertionError("began to export")

    path = bundle_copy()
    monkeypatch.setattr(vae_export.export, "export_onnx", work)
    with pytest.raises(BundleError, match="--overwrite"):
        export_bundle(tiny_model, path)


# Validation -------------------------------------------------------------------------------------------------------


def test_validation_feeds_no_side_that_the_graphs_were_traced_with(tiny_model):
    sizes = set()
    for case in inputs(tiny_model):
        batch, _, *sides = case.array.shape
        height, width = (side // 8 if case.graph == "encoder" else side for side in sides)
        assert batch != graphs_module.TRACE_BATCH
        assert height != graphs_module.TRACE_HEIGHT
        assert width != graphs_module.TRACE_WIDTH
        sizes.add((case.graph, batch, height, width))
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
    "encoder weight 1 % off": {"encoder": scale_a_weight("encoder.conv_in.weight", 1.01)},
    "decoder weight 1 % off": {"decoder": scale_a_weight("decoder.conv_out.weight", 1.01)},
    "one bias 1 % off": {"decoder": scale_a_weight("up_blocks.3.resnets.1.conv2.bias", 1.01)},
    "NaN in the encoder": {"encoder": scale_a_weight("encoder.conv_in.weight", np.nan)},
    "infinity in the decoder": {"decoder": scale_a_weight("decoder.conv_out.bias", np.inf)},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("overwrite", [False, True])
def test_wrong_graph_is_found_and_not_written(quick_export, tiny_model, bundle_copy, tmp_path, wrong, overwrite):
    if overwrite:
        out = bundle_copy()
        out = out.rename(tmp_path / "b")
    before = tree(tmp_path)
    quick_export(**wrong)
    with pytest.raises(NumericsError, match="comparisons with the reference failed at fp32") as caught:
        export_bundle(tiny_model, tmp_path / "b", overwrite=overwrite)
    assert tree(tmp_path) == before
    assert os.listdir(tmp_path) == ["b"] * overwrite
    missed = [m for m in caught.value.measurements if not m["passed"]]
    assert {m["graph"] for m in missed} == set(wrong)
    assert len(missed) < len(caught.value.measurements)  # the good ones are there too


def test_graph_frozen_to_the_trace_is_found(quick_export, tiny_model, tmp_path):
    def freeze(proto):
        for dimension, size in zip(proto.graph.input[0].type.tensor_type.shape.dim, (2, 4, 6, 10), strict=True):
            dimension.dim_value = size

    quick_export(decoder=freeze)
    with pytest.raises(Exception, match=r"(?i)dimension"):
        export_bundle(tiny_model, tmp_path / "b")
    assert os.listdir(tmp_path) == []


def test_nan_in_a_model_from_memory_ends_in_an_error(tiny_model, tmp_path):
    model = AutoencoderKL(tiny_model.config)
    model.load_state_dict(tiny_model.state_dict())
    with torch.no_grad():
        model.decoder.conv_in.bias[0] = torch.nan
    with pytest.raises(NumericsError, match="NaN or infinity"):
        export_bundle(model, tmp_path / "b")
    assert os.listdir(tmp_path) == []


def test_skipped_validation_is_recorded(quick_export, tiny_model, tmp_path):
    quick_export(**WRONG["decoder weight 1 % off"])
    bundle = export_bundle(tiny_model, tmp_path / "b", run_validation=False)
    assert bundle.manifest.validation == {"verdict": "skipped", "reason": "--no-validate was given"}
    with pytest.raises(NumericsError):
        validate_bundle(tmp_path / "b", tiny_model)


@pytest.fixture
def saved_model(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def other_model(tiny_model, tmp_path):
    """A directory with a model of the same config and other weights."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        AutoencoderKL(tiny_model.config).save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def test_bundle_is_validated_against_its_own_model_only(quick_export, saved_model, other_model, tmp_path):
    quick_export()
    bundle = export_bundle(AutoencoderKL.from_pretrained(saved_model), tmp_path / "b")
    measured = bundle.manifest.validation["measurements"]
    assert [m.to_dict() for m in validate_bundle(tmp_path / "b")] == measured  # from where the manifest says
    assert [
        m.to_dict() for m in validate_bundle(tmp_path / "b", AutoencoderKL.from_pretrained(saved_model))
    ] == measured
    with pytest.raises(ConfigError, match=r"other has weights \w{64}, and the bundle was made from \w{64}; .*--model"):
        validate_bundle(tmp_path / "b", AutoencoderKL.from_pretrained(other_model))
    shutil.rmtree(saved_model)
    with pytest.raises(ConfigError, match="model"):
        validate_bundle(tmp_path / "b")
    other_model.rename(saved_model)
    with pytest.raises(ConfigError, match="--model"):
        validate_bundle(tmp_path / "b")


def test_bundle_of_a_model_from_memory_needs_the_model(tiny_bundle, tiny_model, other_model):
    with pytest.raises(ConfigError, match=r"a model in memory; .*--model"):
        validate_bundle(tiny_bundle)
    assert all(m.passed for m in validate_bundle(tiny_bundle, tiny_model))
    with pytest.raises(NumericsError):
        validate_bundle(tiny_bundle, AutoencoderKL.from_pretrained(other_model))


def test_changed_bundle_is_not_validated(bundle_copy, tiny_model):
    path = bundle_copy()
    with (path / "vae_decoder" / "config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(IntegrityError, match=r"vae_decoder/config\.json"):
        validate_bundle(path, tiny_model)
