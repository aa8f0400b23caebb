"""AutoencoderKLFlux2 (vae_export/families/flux2.py): parity with diffusers, its files, its bundles, its pipeline."""

import json
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline
from safetensors.torch import save_file

from runtimes import ConfigError, NumericsError, ShapeError, open_vae
from tests.helpers.checkpoint_samples import TOLERANCE, WEIGHTS, to_ldm
from tests.helpers.dataset_samples import encode
from vae_export import export_bundle, load_model, validate_bundle
from vae_export.families.flux2 import AutoencoderKLFlux2

GROUPS: dict[str, Any] = {"norm_num_groups": 8, "batch_norm_eps": 1e-4}
SMALL = {"block_out_channels": (16, 32, 32, 32), "layers_per_block": 1, "latent_channels": 4, "sample_size": 64}
TWO = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "same widths": SMALL,
    "small decoder": SMALL | {"decoder_block_out_channels": (24, 24, 48, 48)},
    "two layers, eight channels": SMALL | {"layers_per_block": 2, "latent_channels": 8},
    "no quant convs": SMALL | {"use_quant_conv": False, "use_post_quant_conv": False},
    "no attention": SMALL | {"mid_block_add_attention": False, "batch_norm_eps": 1e-2},
    "two levels": SMALL | TWO | {"block_out_channels": (16, 32), "act_fn": "mish"},
}


def made(**fields):
    """A model of diffusers with random weights and statistics of its latents."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = diffusers.AutoencoderKLFlux2(**(GROUPS | fields)).eval().requires_grad_(False)
        model.bn.running_mean.normal_()
        model.bn.running_var.uniform_(0.5, 2)
        model.bn.num_batches_tracked.fill_(1000)
    return model


def loaded(original, directory):
    original.save_pretrained(directory)
    return load_model(directory)


@pytest.fixture(scope="module")
def original():
    return made(**CONFIGS["small decoder"])


@pytest.fixture(scope="module")
def model(original, tmp_path_factory):
    return loaded(original, tmp_path_factory.mktemp("flux2"))


def normalised(original, raw):
    """What diffusers' pipeline makes of raw latents."""
    mean, variance = (x.view(1, -1, 1, 1) for x in (original.bn.running_mean, original.bn.running_var))
    return (Flux2Pipeline._patchify_latents(raw) - mean) / torch.sqrt(variance + original.config.batch_norm_eps)


def pixels(height, width, batch=1):
    return np.random.default_rng(0).integers(0, 256, (batch, height, width, 3), np.uint8)


# The model ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_it_computes_what_diffusers_computes(name, tmp_path):
    original = made(**CONFIGS[name])
    model = loaded(original, tmp_path)
    x = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected, actual = original.encode(x).latent_dist, model.encode(x).latent_dist
    torch.testing.assert_close(actual.parameters, expected.parameters, rtol=0, atol=TOLERANCE)
    raw = expected.mode()
    torch.testing.assert_close(model.decode(raw).sample, original.decode(raw).sample, rtol=0, atol=TOLERANCE)
    space = model.latent_space
    torch.testing.assert_close(space.normalise(raw), normalised(original, raw), rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(space.denormalise(normalised(original, raw)), raw, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_tiles_are_those_of_diffusers(original, model):
    original.enable_tiling(), model.enable_tiling()
    try:
        z = torch.randn(1, 4, 20, 12, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(model.decode(z).sample, original.decode(z).sample, rtol=0, atol=TOLERANCE)
    finally:
        original.disable_tiling(), model.disable_tiling()


def test_diffusers_reads_what_it_saves(original, model, tmp_path):
    model.save_pretrained(tmp_path)
    again = diffusers.AutoencoderKLFlux2.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, original.state_dict()[name]) for name, tensor in again.state_dict().items())


# Single files ---------------------------------------------------------------------------------------------------------


def original_names(original):
    """The weights in the original format: its names, each 1x1 convolution within its half, and all of them fp16."""
    tensors = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    count = tensors.pop("bn.num_batches_tracked")
    moved = {"quant_conv": "encoder.quant_conv", "post_quant_conv": "decoder.post_quant_conv"}
    renamed = {
        name if name.partition(".")[0] not in moved else f"{moved[name.partition('.')[0]]}.{name.rpartition('.')[2]}": t
        for name, t in to_ldm(tensors).items()
    }
    # A tool that casts a whole checkpoint casts the count of batches as well.
    return {name: tensor.half() for name, tensor in (renamed | {"bn.num_batches_tracked": count}).items()}


def test_a_file_in_the_original_format_is_recognised(original, model, tmp_path):
    save_file(original_names(original), tmp_path / "flux2-vae.safetensors")
    read = load_model(tmp_path / "flux2-vae.safetensors", config=GROUPS)
    assert read.family == "AutoencoderKLFlux2"
    assert read.config.decoder_block_out_channels == (24, 24, 48, 48)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(read.state_dict()[name], tensor.half().to(tensor.dtype), rtol=0, atol=0)


def test_a_file_of_another_architecture_than_the_public_ones_needs_a_config(original, tmp_path):
    save_file(original_names(original), tmp_path / "vae.safetensors")
    with pytest.raises(ConfigError, match=r"does not say norm_num_groups and batch_norm_eps.*\(--config\)"):
        load_model(tmp_path / "vae.safetensors")


def test_the_small_decoder_replaces_the_decoder_of_another_file(model, tmp_path):
    full = made(**CONFIGS["same widths"])
    save_file(full.state_dict(), tmp_path / "full.safetensors")
    halves = original_names(made(**CONFIGS["small decoder"]))
    decoder = {name.removeprefix("decoder."): t for name, t in halves.items() if name.startswith("decoder.")}
    save_file(decoder, tmp_path / "small_decoder.safetensors")
    with pytest.raises(ConfigError, match=r"holds a decoder alone.*decoder= \(--decoder\)"):
        load_model(tmp_path / "small_decoder.safetensors")
    both = load_model(tmp_path / "full.safetensors", decoder=tmp_path / "small_decoder.safetensors", config=GROUPS)
    assert both.config.decoder_block_out_channels == (24, 24, 48, 48)
    assert torch.equal(both.state_dict()["encoder.conv_in.weight"], full.state_dict()["encoder.conv_in.weight"])
    assert torch.equal(both.state_dict()["bn.running_var"], full.state_dict()["bn.running_var"])
    name = "decoder.conv_in.weight"
    assert torch.equal(both.state_dict()[name], model.state_dict()[name].half().float())
    export_bundle(both, tmp_path / "bundle")
    assert validate_bundle(tmp_path / "bundle")  # the manifest remembers both files


# Bad checkpoints ------------------------------------------------------------------------------------------------------


def broken(original, directory, **changes):
    original.save_pretrained(directory)
    tensors = {**original.state_dict(), **changes}
    save_file({name: t.contiguous() for name, t in tensors.items() if t is not None}, directory / WEIGHTS)
    return directory


def test_a_checkpoint_without_statistics_is_refused(original, tmp_path):
    path = broken(original, tmp_path, **{"bn.running_mean": None, "bn.running_var": None})
    with pytest.raises(ConfigError, match=r"no bn\.running_mean and no bn\.running_var.*Take the file"):
        load_model(path)


@pytest.mark.parametrize(
    ("value", "message"), [(float("nan"), "NaN or infinity; the file is damaged"), (-1.0, "has -1, and a variance")]
)
def test_impossible_statistics_are_refused(original, tmp_path, value, message):
    variance = original.bn.running_var.clone()
    variance[3] = value
    with pytest.raises(NumericsError, match=message):
        load_model(broken(original, tmp_path, **{"bn.running_var": variance}))


def test_a_scaling_factor_is_not_for_it(original, tmp_path):
    original.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="AutoencoderKLFlux2 has no scaling_factor"):
        load_model(tmp_path, scaling_factor=0.5)


# Bundles --------------------------------------------------------------------------------------------------------------

CHOICES: dict[str, dict[str, Any]] = {
    "onnx fp32 in steps": {"target": "onnx", "tileable": True},
    "onnx fp32 normalised in steps": {"target": "onnx", "latents": "normalised", "tileable": True},
    "onnx fp16": {"target": "onnx", "precision": "fp16"},
    "openvino fp32": {"target": "openvino"},
    "openvino bf16 normalised": {"target": "openvino", "precision": "bf16", "latents": "normalised"},
    "openvino fp32 pixels, normalised": {"target": "openvino", "io": "uint8", "latents": "normalised"},
    "flax fp32 normalised": {"target": "flax", "latents": "normalised"},
}
#: of normalised latents, about 1: the order of sums in fp32; 11 and 8 bits of mantissa in fp16 and bf16
NEAR = {"fp32": 2e-5, "fp16": 0.02, "bf16": 0.15}


#: those that `make test` exports; `make slow` exports the others
QUICK = ("onnx fp32 in steps", "openvino bf16 normalised", "openvino fp32 pixels, normalised", "flax fp32 normalised")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in CHOICES],
)
def bundle(request, model, tmp_path_factory):
    return export_bundle(model, tmp_path_factory.mktemp("bundle") / "b", **CHOICES[request.param])


@torch.no_grad()
def test_every_bundle_gives_and_takes_the_latents_of_the_diffusion_model(bundle, original):
    images = pixels(48, 64)
    raw = original.encode(torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mode()
    expected = normalised(original, raw).numpy()
    precision = bundle.manifest.precision
    with open_vae(bundle) as vae:
        latents = vae.images_to_latents(images)
        assert latents.shape == (1, 16, 3, 4)
        np.testing.assert_allclose(latents, expected, rtol=0, atol=NEAR[precision])
        decoded = vae.latents_to_images(expected)
        wanted = (original.decode(raw).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255
        assert np.abs(decoded - wanted).max() <= {"fp32": 1, "fp16": 3, "bf16": 24}[precision]
        with pytest.raises(ShapeError, match=r"40.*multiple.* of 16|multiples of 16"):
            vae.images_to_latents(pixels(40, 64))
        assert vae.images_to_latents(pixels(40, 64), pad=True).shape == (1, 16, 3, 4)
        with pytest.raises(ShapeError, match="16"):
            vae.latents_to_images(np.zeros((1, 64, 3, 4), np.float32))


def test_steps_give_what_the_whole_graph_gives(bundle):
    if bundle.manifest.tileable is None:
        pytest.skip("this bundle is not in steps")
    images = pixels(96, 160)
    with open_vae(bundle, threads=1) as vae:
        whole = vae.images_to_latents(images)
        picture = vae.latents_to_images(whole)
        factor = vae.graph_space.factor
        vae.tile_sample_min_size, vae.tile_latent_min_size = 64, 64 // factor
        vae.enable_tiling("seamless")
        # Between steps maps are rounded to fp16, as everywhere in seamless tiling.
        np.testing.assert_allclose(vae.images_to_latents(images), whole, rtol=0, atol=0.01)
        assert np.abs(vae.latents_to_images(whole).astype(int) - picture).max() <= 2


@torch.no_grad()
def test_raw_latents_of_a_normalised_bundle_are_those_of_the_model(bundle, model):
    if bundle.manifest.latents == "raw" or bundle.manifest.graphs["encoder"].input.dtype == "uint8":
        pytest.skip("raw graphs, or graphs of pixels")
    x = np.random.default_rng(0).uniform(-1, 1, (1, 3, 32, 48)).astype(np.float32)
    atol = {"fp32": 2e-5, "bf16": 0.2}[bundle.manifest.precision]
    with open_vae(bundle) as vae:
        latents = vae.encode(x).latents
        np.testing.assert_allclose(latents, model.encode(torch.from_numpy(x)).latent_dist.mode(), rtol=0, atol=atol)
        expected = model.decode(torch.from_numpy(latents)).sample
        np.testing.assert_allclose(vae.decode(latents)[0], expected, rtol=0, atol=atol)
        with pytest.raises(ConfigError, match="--latents raw"):
            vae.images_to_latents(pixels(32, 48), generator=0)


def test_its_memory_is_bounded_like_that_of_the_network_that_was_measured(bundle):
    if bundle.manifest.target == "flax":
        pytest.skip("JAX was not measured")
    with open_vae(bundle) as vae:
        vae.memory_budget = "1GiB"
        assert vae.latents_to_images(np.zeros((1, 16, 3, 4), np.float32)).shape == (1, 48, 64, 3)


def test_a_dataset_has_its_latents(bundle, tmp_path):
    if bundle.manifest.target != "onnx":
        pytest.skip("one backend is enough: a job sees the one API")
    from PIL import Image

    (tmp_path / "photos").mkdir()
    Image.fromarray(pixels(48, 64)[0]).save(tmp_path / "photos" / "a.png")
    encode(tmp_path / "photos", bundle.path, tmp_path / "out", policy="center-crop", sizes=((48, 64),))
    contract = json.loads((tmp_path / "out" / "contract.json").read_text())
    assert (contract["vae"]["latent_channels"], contract["vae"]["downscale"]) == (16, 16)


# Other programs -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_openvino_genai_finds_the_statistics_and_decodes_raw_latents(model, tmp_path):
    genai = pytest.importorskip("openvino_genai", reason="pip install openvino-genai")
    import openvino as ov

    export_bundle(model, tmp_path / "b", target="openvino", run_validation=False)
    config = json.loads((tmp_path / "b" / "vae_decoder" / "config.json").read_text())
    assert config["bn_running_mean_data"] == model.bn.running_mean.tolist()
    assert config["bn_running_var_data"] == model.bn.running_var.tolist()
    assert (config["batch_norm_eps"], config["patch_size"]) == (1e-4, [2, 2])
    folders = [tmp_path / "b" / f"vae_{graph}" for graph in ("encoder", "decoder")]
    z = np.random.default_rng(0).standard_normal((1, 4, 6, 4)).astype(np.float32)
    image = genai.AutoencoderKL(*folders, "CPU", INFERENCE_PRECISION_HINT="f32").decode(ov.Tensor(z)).data
    expected = (model.decode_latents(torch.from_numpy(z)) / 2 + 0.5).clamp(0, 1).mul(255).permute(0, 2, 3, 1).numpy()
    assert np.abs(image - expected).max() <= 1.001  # the nearest step or the one below; a thousandth for fp32


def klein(vae):
    """A Flux2KleinPipeline of tiny random parts, without a text encoder: it is given embeddings."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = diffusers.Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ).eval()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.Flux2KleinPipeline(scheduler, vae, None, None, transformer, is_distilled=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("latents", ["raw", "normalised"])
def test_a_pipeline_makes_the_picture_of_diffusers(original, model, tmp_path, latents):
    from PIL import Image

    from vae_export.diffusers import as_diffusers_vae

    def picture(vae):
        embeds = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(1))
        options = {"image": Image.fromarray(pixels(64, 64)[0]), "num_inference_steps": 2, "height": 64, "width": 64}
        result = klein(vae)(prompt_embeds=embeds, generator=torch.Generator().manual_seed(0), **options)
        return np.asarray(result.images[0]).astype(int)

    expected = picture(original)
    assert expected.std() > 10  # a picture of something
    bundle = export_bundle(model, tmp_path / "b", target="openvino", latents=latents, run_validation=False)
    with open_vae(bundle, threads=1) as vae:
        ours = as_diffusers_vae(vae)
        assert isinstance(ours, diffusers.AutoencoderKLFlux2)
        assert np.abs(picture(ours) - expected).max() <= 2


def test_a_model_from_its_fields_is_exported(tmp_path):
    model = AutoencoderKLFlux2(**GROUPS, **CONFIGS["two levels"]).eval()
    assert export_bundle(model, tmp_path / "b", run_validation=False).manifest.family == "AutoencoderKLFlux2"
    with pytest.raises(ConfigError, match="patch_size"):
        AutoencoderKLFlux2(**GROUPS, patch_size=(2, 1))
