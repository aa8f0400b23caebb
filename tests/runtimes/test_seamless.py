"""Seamless tiling: what the untiled graph gives, in tiles.

Tests vae_export/rewrites/tileable.py, runtimes/tiling/seamless.py.
"""

import dataclasses
import shutil

import numpy as np
import onnxruntime
import pytest
import torch

from runtimes import Bundle, ConfigError, IntegrityError, NumericsError, OutOfMemoryError, open_vae
from runtimes.image_files import load_image
from runtimes.images import psnr, to_float
from runtimes.manifest import Step
from runtimes.tiling.seamless import largest_maps, run_seamless
from tests.helpers.forms import FORMS
from vae_export import AutoencoderKL, export_bundle
from vae_export.photos import photographs
from vae_export.rewrites.form import Form
from vae_export.rewrites.rescale import rescaled
from vae_export.rewrites.tileable import TileableExport

# Maps are rounded to fp16 between steps, 11 bits some 20 times: 66 dB each where an error is as large as it can be.
# The promise is 60 dB; a seam, a zero out of place or statistics of a tile alone cost tens of dB (test below).
SEAMLESS_DB = 60.0
SIZES = [(9, 9), (20, 13), (8, 31), (17, 40)]  #: latents; tiles are of 8, and 17 and 13 are cut unevenly


def decibels(actual, expected):
    actual, expected = (np.asarray(array, np.float64) for array in (actual, expected))
    assert actual.shape == expected.shape
    error = np.mean((actual - expected) ** 2)
    return np.inf if error == 0 else 10 * np.log10(np.ptp(expected) ** 2 / error)


def inputs(height, width, batch=1):
    rng = np.random.default_rng(height)
    x, z = rng.uniform(-1, 1, (batch, 3, 8 * height, 8 * width)), rng.standard_normal((batch, 16, height, width))
    return x.astype(np.float32), z.astype(np.float32)


def results(vae, x, z):
    return vae.encode(x)[0].parameters, vae.decode(z)[0]


@pytest.fixture
def vae(tileable_bundle):
    """In tiles of 8 latents, once they are enabled."""
    with open_vae(tileable_bundle) as runtime:
        runtime.tile_sample_min_size, runtime.tile_latent_min_size = 64, 8
        yield runtime


@pytest.fixture
def calls(vae, monkeypatch):
    """The steps that were run, with the shape of what they were given, in a list."""
    seen, run = [], vae.run_step
    monkeypatch.setattr(vae, "run_step", lambda step, given: seen.append((step.kind, given)) or run(step, given))
    return seen


# Equal to the whole -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_tiles_give_what_the_whole_gives(vae, calls, height, width):
    x, z = inputs(height, width)
    whole = results(vae, x, z)
    vae.enable_tiling("seamless")
    for ours, expected in zip(results(vae, x, z), whole, strict=True):
        assert decibels(ours, expected) >= SEAMLESS_DB
    # All but what holds the attention ran in tiles: none larger than 64 x 64 pixels of the 32 channels of full size.
    assert {kind for kind, _ in calls} == {"whole", "in", "conv1", "conv2", "up", "down", "out"}
    assert max(given["x"][0, 0].size for kind, given in calls if kind == "out") <= 66 * 66
    assert sum(kind == "out" for kind, _ in calls) >= height * width // 64


def test_where_tiles_are_cut_is_of_no_consequence(vae):
    x, z = inputs(20, 13)
    vae.enable_tiling("seamless")
    found = []
    for side in (8, 12):
        vae.tile_sample_min_size, vae.tile_latent_min_size = 8 * side, side
        found.append(results(vae, x, z))
    # Not to the bit: sums over other tiles round otherwise, and with them what is rounded to fp16.
    assert min(decibels(a, b) for a, b in zip(*found, strict=True)) >= SEAMLESS_DB


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_batches_of_either_kind(vae, kind):
    x, z = inputs(10, 9, batch=2)
    whole = results(vae, x, z)
    vae.enable_tiling("seamless")
    tiled = results(vae, kind(x), kind(z))
    assert all(isinstance(result, type(kind(x))) for result in tiled)
    assert min(decibels(a, b) for a, b in zip(tiled, whole, strict=True)) >= SEAMLESS_DB


def test_what_fits_a_tile_is_not_cut(vae, calls):
    x, z = inputs(8, 5)
    whole = results(vae, x, z)
    vae.enable_tiling("seamless")
    assert all(map(np.array_equal, results(vae, x, z), whole)) and not calls


def test_photographs_show_no_seam_where_blended_tiles_do(vae):
    vae.tile_sample_min_size, vae.tile_latent_min_size = 128, 16
    for photo in photographs()[:2]:
        x = to_float(load_image(photo)[None, :320, :400])
        vae.disable_tiling()
        moments = vae.encode(x)[0].parameters
        z = moments[:, : vae.config.latent_channels]
        image = vae.decode(z)[0]
        vae.enable_tiling("seamless")
        assert decibels(vae.encode(x)[0].parameters, moments) >= SEAMLESS_DB
        assert decibels(vae.decode(z)[0], image) >= SEAMLESS_DB
        vae.enable_tiling("blended")
        assert decibels(vae.decode(z)[0], image) < 50


# Every model ------------------------------------------------------------------------------------------------------

PLAIN_LEVELS = {"layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
MODELS = {
    "gelu, attention at two levels": {
        "act_fn": "gelu",
        "block_out_channels": (8, 16, 24),
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"),
        "up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    },
    "relu, no attention, no quant convs": {
        "act_fn": "relu",
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "mid_block_add_attention": False,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "mish, one level": {
        "act_fn": "mish",
        "block_out_channels": (8,),
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
    },
}


FORMS_OF_MODELS = (Form(), Form(upsample="deconv", norm="rows"), Form())
ARCHITECTURES = [
    pytest.param(fields, form, id=name, marks=[pytest.mark.slow] if "two levels" in name else [])  # that takes 14 s
    for (name, fields), form in zip(MODELS.items(), FORMS_OF_MODELS, strict=True)
]


@pytest.mark.parametrize(("fields", "form"), ARCHITECTURES)
def test_every_architecture_is_cut(fields, form, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoencoderKL(**PLAIN_LEVELS, **fields).eval().requires_grad_(False)
    cutter = TileableExport(rescaled(model, None, lambda *_: None)[0], tmp_path, "fp32", form)
    x = torch.rand(1, 3, 44, 36) * 2 - 1
    moments = model.encode_moments(x)
    z = moments[:, :4]
    for graph, given, expected in (("encoder", x, moments), ("decoder", z, model.decode_latents(z))):
        steps = cutter.steps(graph)
        sessions = {
            step.file: onnxruntime.InferenceSession(tmp_path / step.file, providers=["CPUExecutionProvider"])
            for step in steps
        }
        found = run_seamless(
            steps,
            lambda step, inputs, sessions=sessions: sessions[step.file].run(None, dict(inputs)),
            given.numpy(),
            factor=model.config.downscale,
            groups=4,
            tile_values=16 * 16 * 8,
        )
        assert decibels(found, expected) >= SEAMLESS_DB


def test_half_precision_and_pixels_keep_to_their_bars(tiny_model, tmp_path):
    bundle = export_bundle(tiny_model, tmp_path / "b", precision="fp16", io="uint8", tileable=True)
    seamless = [m for m in bundle.manifest.validation["measurements"] if m["tiling"] == "seamless"]
    assert {(m["graph"], m["by"]) for m in seamless} == {("encoder", "onnxruntime"), ("decoder", "onnxruntime")}
    assert min(m["psnr_db"] for m in seamless) >= 50
    images = np.random.default_rng(0).integers(0, 256, (1, 80, 104, 3), np.uint8)
    with open_vae(bundle.path) as vae:
        latents = vae.images_to_latents(images)
        whole = vae.latents_to_images(latents)
        vae.enable_tiling("seamless")
        assert decibels(vae.images_to_latents(images), latents) >= 50
        # Two ways to the same number, each some steps of fp16 off.
        assert np.abs(vae.latents_to_images(latents).astype(int) - whole).max() <= 4


@pytest.mark.engines
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_tensorrt_rtx_builds_every_step(tiny_model, tmp_path, precision):
    """They are made for every ONNX backend; this one does not run them yet."""
    trt = pytest.importorskip("tensorrt_rtx", reason="pip install 'vae-export[rtx]'")
    cutter = TileableExport(tiny_model, tmp_path, precision, FORMS["onnx", precision])
    for step in (*cutter.steps("encoder"), *cutter.steps("decoder")):
        logger = trt.Logger(trt.Logger.ERROR)
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        assert parser.parse((tmp_path / step.file).read_bytes()), parser.get_error(0).desc()
        config = builder.create_builder_config()
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            if -1 in tensor.shape:
                # Skips and what the step gives are as large as what it reads, but for the pixel around it.
                least = 8 if tensor.name == "skip" else 10
                sides = [[least if side == -1 else side for side in tensor.shape]] * 3
                profile.set_shape(tensor.name, *(tuple(side) for side in sides))
        assert config.add_optimization_profile(profile) == 0
        assert builder.build_serialized_network(network, config) is not None, step.file


# What is counted --------------------------------------------------------------------------------------------------


def test_tiles_are_counted_and_an_exception_stops_between_two(vae):
    x, _ = inputs(16, 16)
    vae.enable_tiling("seamless")
    seen = []
    vae.on_tile = lambda done, total: seen.append((done, total))
    vae.encode(x)
    total = seen[0][1]
    assert seen == [(n, total) for n in range(1, total + 1)]

    def stop(done, total):
        raise KeyboardInterrupt

    vae.on_tile = stop
    with pytest.raises(KeyboardInterrupt):
        vae.encode(x)


def test_maps_between_steps_are_counted(vae):
    # The widest moment of the decoder: the stream has been upsampled, 48 channels, and conv1 has made 32 of them.
    assert largest_maps(vae.manifest.tileable["decoder"], 4, 4, 8) == 32 * 32 * 2 * (48 + 32)


# Bad bundles ------------------------------------------------------------------------------------------------------


def test_a_bundle_that_is_not_cut_says_so(onnx_bundle, openvino_bundle, tiny_model):
    with pytest.raises(ConfigError, match="export it again with --tileable"):
        open_vae(onnx_bundle, tiling="seamless")
    with pytest.raises(ConfigError, match="does not run in openvino"):
        open_vae(openvino_bundle("fp32"), tiling="seamless")
    with pytest.raises(ConfigError, match="'smooth'"):
        open_vae(onnx_bundle, tiling="smooth")
    with pytest.raises(ConfigError, match="--tileable"):
        tiny_model.enable_tiling("seamless")


def test_targets_without_steps_are_refused_before_the_work(tiny_model, tmp_path):
    with pytest.raises(ConfigError, match="tileable"):
        export_bundle(tiny_model, tmp_path / "b", target="flax", tileable=True)


def change(steps, **fields):
    return (*steps[:-1], dataclasses.replace(steps[-1], **fields))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda steps: steps[::-1], "order"),
        (lambda steps: steps[:-1], "order"),
        (lambda steps: (), "order"),
        (lambda steps: change(steps, kind="sideways"), "'sideways'"),
        (lambda steps: change(steps, file="../../etc/passwd"), "not among the listed files"),
        (lambda steps: change(steps, channels=-3), "-3 channels"),
        (lambda steps: change(steps, channels=10**9), "1000000000 channels"),
        (lambda steps: change(steps, channels=True), "True channels"),
    ],
)
def test_steps_that_cannot_be_are_refused(tileable_bundle, tmp_path, damage, says):
    shutil.copytree(tileable_bundle, tmp_path / "b")
    manifest = Bundle(tmp_path / "b").manifest
    steps = {**manifest.tileable, "decoder": damage(manifest.tileable["decoder"])}
    (tmp_path / "b" / "manifest.json").write_text(dataclasses.replace(manifest, tileable=steps).to_json())
    with pytest.raises(IntegrityError, match=says):
        Bundle(tmp_path / "b")


def test_a_step_that_was_changed_is_not_run(tileable_bundle, tmp_path):
    shutil.copytree(tileable_bundle, tmp_path / "b")
    last = tmp_path / "b" / Bundle(tmp_path / "b").manifest.tileable["decoder"][-1].file
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    last.write_bytes(data)
    # Small files are checked when the bundle is opened, large ones when the step is first needed.
    with pytest.raises(IntegrityError, match=last.name), open_vae(tmp_path / "b", tiling="seamless") as vae:
        vae.decode(inputs(70, 9)[1])


def test_what_does_not_fit_fp16_is_an_error_and_no_picture():
    steps = (Step("in", "in", 1), Step("whole", "whole", 1))
    given = np.ones((1, 1, 8, 8), np.float32)

    def run(step, inputs):
        return [np.full((1, 1, 8, 8), np.inf, np.float16), np.full((2, 1), np.inf, np.float32)]

    with pytest.raises(NumericsError, match="after in exceed 65504"):
        run_seamless(steps, run, given, factor=1, groups=1, tile_values=64)


def test_memory_that_runs_out_is_tried_again_with_smaller_tiles(vae, monkeypatch):
    x, _ = inputs(40, 40)
    vae.tile_sample_min_size, vae.tile_latent_min_size = 256, 32
    vae.enable_tiling("seamless")
    run, sizes = vae.run_step, []

    def short(step, given):
        if step.kind == "in":
            sizes.append(given["x"].shape[-1])
            if given["x"].shape[-1] > 100:
                raise OutOfMemoryError("no more than 100 pixels")
        return run(step, given)

    monkeypatch.setattr(vae, "run_step", short)
    vae.encode(x)
    assert sizes[0] > sizes[1] > 100 >= sizes[2]


def test_images_come_back_as_from_the_whole(vae):
    images = np.random.default_rng(0).integers(0, 256, (1, 72, 96, 3), np.uint8)
    latents = vae.images_to_latents(images)
    whole = vae.latents_to_images(latents)
    vae.enable_tiling("seamless")
    assert psnr(vae.latents_to_images(latents), whole) > 55  # a step here and there, where rounding falls the other way
