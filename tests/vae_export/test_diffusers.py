"""A bundle in pipelines of diffusers: the pictures are those of the original VAE, whatever a pipeline does to it."""

import os
import re
import subprocess
import sys
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from runtimes import ConfigError, NotInstalled, NumericsError, ShapeError, VaeError, open_vae
from runtimes.latent_space import LatentSpace

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from examples.tiny_pipelines import KINDS, tiny_pipeline  # noqa: E402
from vae_export.diffusers import DiffusersVae, as_diffusers_vae  # noqa: E402

PROMPT = "a photograph of a cat"
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
MASK = Image.fromarray(np.repeat(np.array([0, 255], np.uint8), 32)[None].repeat(64, axis=0))
ARGUMENTS = {
    "stable-diffusion-img2img": {"image": PHOTO, "strength": 0.7},
    "stable-diffusion-inpaint": {"image": PHOTO, "mask_image": MASK, "strength": 0.7},
    "stable-diffusion-3": {"height": 64, "width": 64, "max_sequence_length": 32},
    "flux": {"height": 64, "width": 64, "max_sequence_length": 32},
}
BACKENDS = ("onnxruntime", "openvino")
# The same fp32 arithmetic in another order, as in test_onnxruntime.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def original(tiny_model):
    """diffusers' own VAE with the weights of the tiny model."""
    fields = {name: value for name, value in tiny_model.config.to_dict().items() if not name.startswith("_")}
    vae = diffusers.AutoencoderKL(**fields)
    vae.load_state_dict(tiny_model.state_dict())
    return vae.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=BACKENDS)
def runtime(request, tiny_bundle):
    if request.param == "openvino":
        tiny_bundle = request.getfixturevalue("openvino_bundle")("fp32")
    with open_vae(tiny_bundle, threads=1) as opened:
        yield opened
        opened.disable_tiling(), opened.disable_slicing()


@pytest.fixture
def ours(runtime):
    """The adapter on each backend; tiling and slicing are off, as they are when a bundle is opened."""
    runtime.disable_tiling(), runtime.disable_slicing()
    return as_diffusers_vae(runtime)


@pytest.fixture
def pretended(vae, monkeypatch):
    """pretended(**attributes): the adapter on a runtime that says of itself what is not so."""

    def make(**attributes):
        for name, value in attributes.items():
            monkeypatch.setattr(vae, name, value)
        return as_diffusers_vae(vae)

    return make


def pictures(pipe, kind, seed=0, **options):
    """uint8 [B, 64, 64, 3] of three steps."""
    arguments = ARGUMENTS.get(kind, {"height": 64, "width": 64}) | options
    generator = torch.Generator().manual_seed(seed)
    images = pipe(PROMPT, num_inference_steps=3, generator=generator, **arguments).images
    return np.stack([np.asarray(image) for image in images])


def assert_alike(a, b):
    assert a.std() > 10  # a picture of something
    assert np.abs(a.astype(int) - b).max() <= 2


def noise(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


# Pipelines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_pipelines_make_the_pictures_of_the_original(kind, original, ours):
    pipe = tiny_pipeline(kind, original)
    expected = pictures(pipe, kind)
    pipe.vae = ours
    assert pipe.components["vae"] is ours
    assert_alike(pictures(pipe, kind), expected)


@pytest.mark.parametrize("kind", ["stable-diffusion", "flux"])
def test_a_pipeline_may_be_built_around_it(kind, original, ours):
    assert_alike(pictures(tiny_pipeline(kind, ours), kind), pictures(tiny_pipeline(kind, original), kind))


def test_the_switches_of_pipelines_reach_the_runtime(original, ours):
    pipe = tiny_pipeline("stable-diffusion", original)
    size = {"height": 128, "width": 96, "num_images_per_prompt": 2}
    untiled = pictures(pipe, "stable-diffusion", **size)
    pipe.vae.enable_tiling(), pipe.vae.enable_slicing()
    tiled = pictures(pipe, "stable-diffusion", **size)
    pipe.vae.disable_tiling(), pipe.vae.disable_slicing()
    pipe.vae = ours
    # Where pipelines have the method (the newest diffusers no longer does), it is the VAE's that they call.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        getattr(pipe, "enable_vae_tiling", pipe.vae.enable_tiling)()
        getattr(pipe, "enable_vae_slicing", pipe.vae.enable_slicing)()
        assert (ours.use_tiling, ours.runtime.use_tiling, ours.runtime.use_slicing) == (True, True, True)
        assert_alike(pictures(pipe, "stable-diffusion", **size), tiled)
        getattr(pipe, "disable_vae_tiling", pipe.vae.disable_tiling)()
        getattr(pipe, "disable_vae_slicing", pipe.vae.disable_slicing)()
    assert not ours.runtime.use_tiling and not ours.runtime.use_slicing
    assert_alike(pictures(pipe, "stable-diffusion", **size), untiled)


def test_a_pipeline_of_half_precision_upcasts_and_casts_back(original, ours):
    """SDXL's way around its overflow, with `force_upcast`; the rest stays in float32, for CPUs' sake."""
    pipe = tiny_pipeline("stable-diffusion-xl", original)
    expected = pictures(pipe, "stable-diffusion-xl")
    pipe.vae = ours
    ours.to(torch.float16)
    assert ours.config.force_upcast and ours.dtype == torch.float16
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # upcast_vae goes away, and SDXL still calls it
        assert_alike(pictures(pipe, "stable-diffusion-xl"), expected)
        assert ours.dtype == torch.float16
        pipe.upcast_vae()
    assert ours.dtype == next(iter(ours.post_quant_conv.parameters())).dtype == torch.float32


def test_pipelines_that_look_inside_to_upcast_find_nothing_to_keep_in_half(ours):
    ours.half()
    diffusers.AnimateDiffSDXLPipeline.upcast_vae(SimpleNamespace(vae=ours))
    assert ours.dtype == torch.float32


def test_fusing_projections_leaves_the_pictures_as_they_are(original, ours):
    pipe = tiny_pipeline("stable-diffusion", ours)
    before = pictures(pipe, "stable-diffusion")
    pipe.fuse_qkv_projections(unet=False)
    assert np.array_equal(pictures(pipe, "stable-diffusion"), before)
    pipe.unfuse_qkv_projections(unet=False)


def test_saving_is_refused_in_words(ours, tmp_path):
    pipe = tiny_pipeline("stable-diffusion", ours)
    with pytest.raises(ConfigError, match="no weights in PyTorch"):
        pipe.save_pretrained(tmp_path / "pipeline")
    with pytest.raises(ConfigError, match="no weights in PyTorch"):
        ours.save_pretrained(tmp_path / "vae")
    assert not (tmp_path / "vae").exists()
    with pytest.raises(ConfigError, match="open_vae"):
        DiffusersVae.from_pretrained(tmp_path)


def test_a_pipeline_is_saved_without_it_and_loaded_with_it(original, ours, tmp_path):
    pipe = tiny_pipeline("stable-diffusion", ours)
    expected = pictures(pipe, "stable-diffusion")
    pipe.vae = None
    pipe.save_pretrained(tmp_path / "without")
    tiny_pipeline("stable-diffusion", original).save_pretrained(tmp_path / "with")
    for directory in ("with", "without"):
        loaded = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / directory, vae=ours)
        loaded.set_progress_bar_config(disable=True)
        assert loaded.vae is ours
        assert np.array_equal(pictures(loaded, "stable-diffusion"), expected)


def test_moving_a_pipeline_moves_what_can_be_moved(original, ours):
    pipe = tiny_pipeline("stable-diffusion", ours)
    assert pipe.to("cpu").device == torch.device("cpu") and pipe.to(torch.float16).dtype == torch.float16
    assert ours.dtype == torch.float16
    moved = pictures(pipe.to(torch.float32), "stable-diffusion")
    assert_alike(moved, pictures(tiny_pipeline("stable-diffusion", original), "stable-diffusion"))
    with pytest.raises(ConfigError, match=f"runs in {ours.runtime.backend} on cpu"):
        pipe.to("meta")


# The VAE ------------------------------------------------------------------------------------------------------------


def test_it_has_the_type_and_the_config_that_pipelines_look_for(original, ours):
    assert isinstance(ours, (diffusers.AutoencoderKL, torch.nn.Module))
    # Those with an underscore are diffusers' own notes of what was loaded and saved.
    assert {name for name in original.config if not name.startswith("_")} == set(ours.config)
    for name, value in ours.config.items():
        expected = original.config[name]
        assert list(value) == list(expected) if isinstance(value, (list, tuple)) else value == expected
    assert (ours.config.scaling_factor, ours.config["shift_factor"], ours.config.get("latents_mean")) == (
        0.5,
        0.1,
        None,
    )
    assert len(ours.config.block_out_channels) == 4 and ours.config.latent_channels == 4
    assert not hasattr(ours.config, "temporal_compression_ratio")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_tensors_are_answered_in_the_callers_type(original, ours, dtype):
    x, z = noise(2, 3, 32, 48, dtype=dtype), noise(2, 4, 4, 6, dtype=dtype)
    (posterior,), (sample,) = ours.encode(x, return_dict=False), ours.decode(z, return_dict=False, generator=None)
    expected = original.encode(x.float()).latent_dist.parameters, original.decode(z.float()).sample
    step = torch.finfo(dtype).eps
    for got, wanted in zip((posterior.parameters, sample), expected, strict=True):
        assert got.dtype == dtype and got.device == x.device
        torch.testing.assert_close(got.float(), wanted, rtol=step, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_same_seed_draws_the_same_latents_as_in_diffusers(original, ours, dtype):
    x = noise(2, 3, 32, 48, dtype=dtype)
    theirs = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution(
        original.encode(x.float())[0].parameters.to(dtype)
    )
    for generators in (
        lambda: torch.Generator().manual_seed(3),
        lambda: [torch.Generator().manual_seed(n) for n in (3, 4)],
    ):
        got, wanted = (posterior.sample(generators()) for posterior in (ours.encode(x).latent_dist, theirs))
        assert got.dtype == dtype
        torch.testing.assert_close(got, wanted, rtol=4 * torch.finfo(dtype).eps, atol=4 * TOLERANCE)
    torch.testing.assert_close(ours.encode(x).latent_dist.mode(), theirs.mode(), rtol=2e-3, atol=TOLERANCE)
    torch.testing.assert_close(ours(x.float()).sample, original(x.float()).sample, rtol=0, atol=4 * TOLERANCE)


def test_tensors_reach_the_backend_where_they_are(pretended, monkeypatch):
    """No copy on the way in, and the backend's own memory on the way out."""
    adapter, seen = pretended(), {}

    def run(graph, x):
        result = torch.zeros(1, 8 if graph == "encoder" else 3, 8, 8)
        seen[graph] = x.data_ptr(), result.data_ptr()
        return result

    monkeypatch.setattr(adapter.runtime, "_run", run)
    x, z = noise(1, 3, 64, 64), noise(1, 4, 8, 8)
    moments, sample = adapter.encode(x)[0].parameters, adapter.decode(z)[0]
    assert seen == {"encoder": (x.data_ptr(), moments.data_ptr()), "decoder": (z.data_ptr(), sample.data_ptr())}


def test_it_adds_less_than_a_millisecond(pretended, monkeypatch):
    """All that is not the backend's work: checks, tensors to arrays and back, diffusers' posterior and its draw."""
    adapter = pretended()
    results = {"encoder": np.zeros((1, 8, 64, 64), np.float32), "decoder": np.zeros((1, 3, 512, 512), np.float32)}
    monkeypatch.setattr(adapter.runtime, "_run_on_host", lambda graph, x: results[graph])
    x, z, generator = noise(1, 3, 512, 512), noise(1, 4, 64, 64), torch.Generator().manual_seed(0)
    calls = {
        "encode": lambda: adapter.encode(x).latent_dist,
        "decode": lambda: adapter.decode(z, return_dict=False, generator=generator)[0],
    }
    for name, call in calls.items():
        took = []
        for _ in range(50):
            start = time.perf_counter()
            call()
            took.append(time.perf_counter() - start)
        print(f"{name}: {1e3 * np.median(took):.3f} ms")
        assert min(took) < 1e-3  # the least: what else this machine does is not the adapter's


def test_type_and_device_are_what_can_be_honoured(ours):
    assert (ours.dtype, ours.device, ours.training) == (torch.float32, torch.device("cpu"), False)
    for change in (ours.half, ours.bfloat16, ours.float):
        assert change() is ours
    assert ours.to("cpu", torch.float16).dtype == torch.float16 and ours.to(dtype=torch.float32) is ours
    with pytest.raises(
        ConfigError, match=rf"{ours.runtime.backend} on cpu in fp32: it takes and gives no torch.float64"
    ):
        ours.double()
    for move in (lambda: ours.to("cuda"), lambda: ours.to("meta"), lambda: ours.to(torch.device("cuda", 1)), ours.cuda):
        with pytest.raises(ConfigError, match=r"open_vae\(\.\.\., device=\.\.\.\)"):
            move()
    assert (ours.dtype, ours.device) == (torch.float32, torch.device("cpu"))


def test_the_device_follows_the_runtime_or_is_said(pretended):
    assert pretended(device="gpu").device == torch.device("cpu")  # OpenVINO's, which takes host memory
    assert as_diffusers_vae(pretended().runtime, device="meta").device == torch.device("meta")


def test_tiles_may_be_tuned_as_in_diffusers(original, ours):
    assert (ours.tile_sample_min_size, ours.tile_latent_min_size, ours.tile_overlap_factor) == (64, 8, 0.25)
    z = noise(1, 4, 16, 12)
    try:
        for vae in (original, ours):
            vae.enable_tiling()
            vae.tile_sample_min_size, vae.tile_latent_min_size, vae.tile_overlap_factor = 32, 4, 0.5
        torch.testing.assert_close(ours.decode(z).sample, original.decode(z).sample, rtol=0, atol=1e-4)
    finally:
        for vae in (original, ours):
            vae.disable_tiling()
            vae.tile_sample_min_size, vae.tile_latent_min_size, vae.tile_overlap_factor = 64, 8, 0.25
    for tiled in (ours.tiled_decode, ours.tiled_encode):
        with pytest.raises(ConfigError, match="enable_tiling"):
            tiled(z)


def test_misuse_is_answered_in_words(ours, vae, original, tiny_model):
    for x in (noise(1, 3, 30, 32), noise(1, 4, 32, 32), noise(3, 32, 32), noise(1, 3, 32, 32).long()):
        with pytest.raises(ShapeError):
            ours.encode(x)
    for no_runtime in (tiny_model, original, "bundle"):
        with pytest.raises(ConfigError, match="open_vae"):
            as_diffusers_vae(no_runtime)
    adapter = as_diffusers_vae(vae)
    vae.close()
    with pytest.raises(VaeError, match="closed"):
        adapter.decode(noise(1, 4, 8, 8))


def test_a_bundle_that_does_not_know_its_scale_is_refused(vae, monkeypatch):
    monkeypatch.setattr(vae, "latent_space", LatentSpace.scaled(4, 8, None))
    with pytest.raises(ConfigError, match="scaling_factor"):
        as_diffusers_vae(vae)


def test_errors_of_the_runtime_come_through(tiny_bundle):
    with open_vae(tiny_bundle, threads=1, check_finite=True) as runtime, pytest.raises(NumericsError):
        as_diffusers_vae(runtime).decode(noise(1, 4, 8, 8) * float("nan"))


# The module ---------------------------------------------------------------------------------------------------------


def test_its_name_does_not_hide_the_library(alone):
    program = "import vae_export.diffusers as ours, diffusers; print(diffusers.__name__, ours.__name__)"
    assert alone(program)[-1] == "diffusers vae_export.diffusers"


def test_where_diffusers_is_missing_the_error_says_what_to_install(alone):
    program = """
import sys
sys.modules["diffusers"] = None
try: import vae_export.diffusers
except ImportError as error: print(type(error).__name__, error)
"""
    (said,) = alone(program)
    assert said == f"{NotInstalled.__name__} diffusers is not installed: pip install 'vae-export[diffusers]'"


@pytest.mark.slow  # it exports the embedded model, with all its comparisons
def test_the_example_runs_offline(tmp_path, pytestconfig):
    script = pytestconfig.rootpath / "examples" / "diffusers_pipeline.py"
    command = [sys.executable, script, "--out", tmp_path, "--target", "openvino", "--pipeline", "flux"]
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"largest difference: (\d+) of 255", done.stdout)
    assert int(found[1]) <= 2 and {"original.png", "openvino.png"} <= set(os.listdir(tmp_path))
