"""`--io uint8`: pixels in, pixels out, the conversion inside of the graphs, and the same numbers as outside of them."""

from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from runtimes import Bundle, ConfigError, NumericsError, ShapeError, VaeError, open_vae
from runtimes.images import to_float, to_uint8
from runtimes.manifest import TensorSpec
from runtimes.tensorrt.builder import build_plan
from runtimes.tensorrt.profiles import parse_profile
from runtimes.tensorrt.runtime import job_of
from tests.helpers.forms import FORMS
from vae_export import export_bundle, validate_bundle
from vae_export.comparison import compare, opened_bundle, reference_cases, thresholds_of, through_pixels
from vae_export.export import complete_options
from vae_export.options import ExportOptions
from vae_export.targets.engines import plan_engine
from vae_export.targets.onnx_graphs import PixelDecoderGraph, PixelEncoderGraph, export_onnx

RNG = np.random.default_rng(0)
TOLERANCE = 2e-5  # the same fp32 arithmetic in another order, as in test_onnxruntime
TABLE = {
    "encoder": (
        TensorSpec("sample", "uint8", ("batch", "height", "width", 3)),
        TensorSpec("latent_parameters", "float32", ("batch", 8, "latent_height", "latent_width")),
    ),
    "decoder": (
        TensorSpec("latent_sample", "float32", ("batch", 4, "latent_height", "latent_width")),
        TensorSpec("sample", "uint8", ("batch", "height", "width", 3)),
    ),
}


@pytest.fixture(scope="module")
def bundles(tiny_model, tmp_path_factory):
    """{target: the path of the tiny model's bundle of pixels}."""
    paths = {target: tmp_path_factory.mktemp("pixels") / target for target in ("onnx", "openvino")}
    for target, path in paths.items():
        # Once as a user makes it; the other is compared here.
        export_bundle(tiny_model, path, target=target, io="uint8", run_validation=target == "onnx")
    return paths


@pytest.fixture(scope="module", params=["onnx", "openvino"])
def both(request, bundles, tiny_bundle):
    """A bundle of pixels on its backend, and the same model with floats."""
    floats = request.getfixturevalue("openvino_bundle")("fp32") if request.param == "openvino" else tiny_bundle
    with open_vae(bundles[request.param], threads=1) as pixels, open_vae(floats, threads=1) as other:
        yield pixels, other


@pytest.fixture
def pixels_and_floats(both):
    for runtime in both:
        runtime.disable_tiling(), runtime.disable_slicing()
    return both


def pixels(batch=1, height=4, width=6):
    return RNG.integers(0, 256, (batch, 8 * height, 8 * width, 3), dtype=np.uint8)


def latents(batch=1, height=4, width=6):
    return RNG.standard_normal((batch, 4, height, width)).astype(np.float32)


def assert_same_pixels(ours, expected):
    """Where a value lies between two of them, either will do; that is rare."""
    assert ours.dtype == expected.dtype == np.uint8 and ours.shape == expected.shape
    steps = np.abs(ours.astype(int) - expected)
    assert steps.max() <= 1 and (steps > 0).mean() < 1e-2


# The graphs -------------------------------------------------------------------------------------------------------


def graph_of(kind, **functions):
    return kind(SimpleNamespace(dtype=torch.float32, **functions), torch.float32)


@pytest.fixture
def conversions():
    """Both graphs around a model that does nothing."""
    same = {"encode_moments": lambda x: x, "decode_latents": lambda z: z}
    return graph_of(PixelEncoderGraph, **same), graph_of(PixelDecoderGraph, **same)


def test_the_conversion_is_that_of_images_and_of_diffusers(conversions):
    encoder, decoder = conversions
    ramp = np.stack([np.arange(256, dtype=np.uint8).reshape(1, 16, 16)] * 3, axis=-1)
    floats = encoder.forward(torch.from_numpy(ramp))
    assert np.array_equal(floats.numpy(), to_float(ramp))
    assert np.array_equal(decoder.forward(floats).numpy(), ramp)
    samples = RNG.uniform(-1.5, 1.5, (2, 3, 64, 64)).astype(np.float32)
    samples[0, :, :4] = ((np.arange(256) + 0.5) / 127.5 - 1).reshape(4, 64)  # half a step: up or down?
    ours = decoder.forward(torch.from_numpy(samples)).numpy()
    theirs = VaeImageProcessor().postprocess(torch.from_numpy(samples), output_type="pil")
    assert np.array_equal(ours, to_uint8(samples))
    assert np.array_equal(ours, np.stack([np.asarray(image) for image in theirs]))


@pytest.mark.parametrize("graph", TABLE)
def test_manifest_and_graph_say_uint8_and_a_cast_touches_it(bundles, graph):
    spec = Bundle(bundles["onnx"]).manifest.graphs[graph]
    assert (spec.input, spec.output) == TABLE[graph]
    proto = onnx.load(bundles["onnx"] / spec.file)
    for value, said in ((proto.graph.input[0], spec.input), (proto.graph.output[0], spec.output)):
        kind = value.type.tensor_type
        assert (kind.elem_type == onnx.TensorProto.UINT8) == (said.dtype == "uint8")
        assert tuple(d.dim_param or d.dim_value for d in kind.shape.dim) == said.shape
    name = proto.graph.input[0].name if graph == "encoder" else proto.graph.output[0].name
    touching = [node.op_type for node in proto.graph.node if name in (*node.input, *node.output)]
    assert set(touching) - {"Shape"} == {"Cast"}


@pytest.mark.engines
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("graph", TABLE)
def test_tensorrt_rtx_builds_them(graph, precision, tiny_model, tmp_path):
    """The real builder, which needs no GPU; running the engine does."""
    pytest.importorskip("tensorrt_rtx", reason="pip install 'vae-export[rtx]'")
    path = tmp_path / "model.onnx"
    spec = export_onnx(tiny_model, graph, path, precision=precision, io="uint8", form=FORMS["tensorrt-rtx", precision])
    engine = plan_engine("tensorrt-rtx", [parse_profile("1..2x64..256x64..256", 8)], ["sm89"])
    job = job_of(engine, graph, spec, 8)
    smallest = (1, 64, 64, 3) if graph == "encoder" else (1, 4, 8, 8)
    assert job.profiles[0][0] == smallest
    assert len(build_plan(path.read_bytes(), job, graph)) > 10_000


# Running them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 8), (3, 5, 7)], ids=str)
def test_results_are_those_of_floats(pixels_and_floats, shape):
    ours, floats = pixels_and_floats
    x, z = pixels(*shape), latents(*shape)
    moments, sample = ours.encode(x).latent_dist.parameters, ours.decode(z).sample
    np.testing.assert_allclose(moments, floats.encode(to_float(x))[0].parameters, rtol=0, atol=TOLERANCE)
    assert_same_pixels(sample, to_uint8(floats.decode(z).sample))


def test_images_become_latents_and_images_again(pixels_and_floats, tmp_path):
    ours, floats = pixels_and_floats
    x = pixels()
    Image.fromarray(x[0]).save(tmp_path / "a.png")
    expected = floats.images_to_latents(x)
    for images in (x, x[0], Image.fromarray(x[0]), tmp_path / "a.png", [str(tmp_path / "a.png")]):
        z = ours.images_to_latents(images)
        np.testing.assert_allclose(z, expected, rtol=0, atol=TOLERANCE)
    drawn, expected = (runtime.images_to_latents(x, np.random.default_rng(3)) for runtime in pixels_and_floats)
    np.testing.assert_allclose(drawn, expected, rtol=0, atol=4 * TOLERANCE)
    assert_same_pixels(ours.latents_to_images(z), floats.latents_to_images(z))


def test_tiles_and_slices_of_pixels_are_those_of_floats(pixels_and_floats, monkeypatch):
    ours, floats = pixels_and_floats
    # A tile of pixels ends at black and white before it is blended.
    decode = floats._run
    monkeypatch.setattr(
        floats, "_run", lambda graph, x: np.clip(decode(graph, x), -1, 1) if graph == "decoder" else decode(graph, x)
    )
    x, z = pixels(2, 12, 17), latents(2, 12, 17)
    untiled = ours.decode(z).sample
    for runtime in pixels_and_floats:
        runtime.enable_tiling(), runtime.enable_slicing()
    np.testing.assert_allclose(ours.encode(x)[0].mean, floats.encode(to_float(x))[0].mean, rtol=0, atol=TOLERANCE)
    tiled, expected = ours.decode(z).sample, to_uint8(floats.decode(z).sample)
    # Blending weighs errors of half a step, and then what was blended is rounded to the next step.
    assert np.abs(tiled.astype(int) - expected).max() <= 1
    assert np.abs(tiled.astype(int) - untiled).max() > 1  # it was tiled


def test_torch_tensors_are_answered_by_torch_tensors(pixels_and_floats):
    ours, _ = pixels_and_floats
    x, z = pixels(2, 12, 17), latents(2, 12, 17)
    for tiling in (False, True):
        ours.use_tiling = tiling
        moments, sample = ours.encode(torch.from_numpy(x))[0].parameters, ours.decode(torch.from_numpy(z))[0]
        assert (moments.dtype, sample.dtype) == (torch.float32, torch.uint8) and sample.is_contiguous()
        assert np.array_equal(moments.numpy(), ours.encode(x)[0].parameters)
        assert np.array_equal(sample.numpy(), ours.decode(z)[0])


def test_what_is_not_pixels_is_refused_in_words(pixels_and_floats, bundles):
    ours, _ = pixels_and_floats
    for x in (to_float(pixels()), pixels()[0], pixels().transpose(0, 3, 1, 2), pixels()[:0], [[1, 2]]):
        with pytest.raises(ShapeError, match=r"uint8 images \[B, height, width, 3\]"):
            ours.encode(x)
    with pytest.raises(ShapeError, match="width 47 is not a multiple of 8; pad to 48"):
        ours.encode(pixels()[:, :, :47])
    for broken in (np.nan, np.inf):
        with pytest.raises(NumericsError, match="the latents hold NaN or infinity"):
            ours.latents_to_images(latents() * broken)
    with pytest.raises(ConfigError, match="finds no NaN in pixels"):
        open_vae(bundles["onnx"], check_finite=True)
    vae = open_vae(bundles["onnx"])
    vae.close()
    with pytest.raises(VaeError, match="closed"):
        vae.encode(pixels())


def test_pipelines_get_floats_or_an_error(bundles):
    from vae_export.diffusers import as_diffusers_vae

    with open_vae(bundles["onnx"]) as vae, pytest.raises(ConfigError, match="export without --io uint8"):
        as_diffusers_vae(vae)


# Exporting them ---------------------------------------------------------------------------------------------------


def test_they_are_measured_like_every_bundle(bundles, tiny_model):
    validation = Bundle(bundles["onnx"]).manifest.validation
    assert validation["verdict"] == "passed" and validation["thresholds_of_pixels"]["psnr_db"] == 60
    measured = validation["measurements"]
    assert {(m["graph"], m["by"]) for m in measured} == {(graph, "onnxruntime") for graph in TABLE}
    assert all(m["shape"][-1] == 3 for m in measured if m["graph"] == "encoder")
    assert all(m["uint8_steps"] <= 1 for m in measured if m["graph"] == "decoder")
    for bundle in bundles.values():
        again = [m.to_dict() for m in validate_bundle(bundle, tiny_model)]
        assert [m["shape"] for m in again] == [m["shape"] for m in measured]


def test_a_graph_that_is_off_by_a_step_everywhere_is_not_written(tiny_model, bundles):
    cases = reference_cases(tiny_model, io="uint8")
    with open_vae(bundles["onnx"]) as vae:
        right = opened_bundle(vae)

        def wrong(graph, x):
            y = right(graph, x)
            return np.where(y < 255, y + 1, y).astype(np.uint8) if graph == "decoder" else y

        assert all(m.passed for m in compare(cases, "right", right, "fp32"))
        with pytest.raises(NumericsError, match="at least 60"):
            compare(cases, "wrong", wrong, "fp32")
    assert thresholds_of("fp16", pixels=True) == thresholds_of("fp16", pixels=False)


def test_half_precision_is_simulated_through_pixels_and_run(two_level_model, tmp_path):
    bundle = export_bundle(two_level_model, tmp_path / "half", precision="fp16", io_precision="same", io="uint8")
    graphs = bundle.manifest.graphs
    types = [(graphs[graph].input.dtype, graphs[graph].output.dtype) for graph in ("encoder", "decoder")]
    assert types == [("uint8", "float16"), ("float16", "uint8")]
    assert {m["by"] for m in bundle.manifest.validation["measurements"]} == {"simulated fp16", "onnxruntime"}


def test_a_candidate_on_floats_serves_pixels():
    x, z = pixels(), latents()
    both_ways = through_pixels(lambda graph, array: array[:, :3])
    assert np.array_equal(both_ways("encoder", x), to_float(x))
    assert np.array_equal(both_ways("decoder", z), to_uint8(z[:, :3]))


def test_what_has_no_pixels_is_refused_before_the_work(tiny_model):
    for target, precision, io, says in (
        ("openvino", "int8", "uint8", "--io float"),
        ("onnx", "fp32", "uint16", "known are float, uint8"),
    ):
        with pytest.raises(ConfigError, match=says):
            complete_options(tiny_model, ExportOptions(target=target, precision=precision, io=io))
