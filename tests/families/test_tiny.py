"""AutoencoderTiny and TAEF2: parity, files, bundles, tiles.

Tests vae_export/families/tiny.py, vae_export/families/taef2.py and runtimes/flax/tiny.py.
"""

import json
import re
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from runtimes import ConfigError, NumericsError, ShapeError, open_vae
from runtimes.errors import IntegrityError
from runtimes.manifest import SEAL, Manifest
from tests.helpers.checkpoint_samples import TOLERANCE
from vae_export import export_bundle, load_model, validate_bundle
from vae_export.families.taef2 import TAEF2
from vae_export.families.tiny import halo

SMALL: dict[str, Any] = {"encoder_block_out_channels": (16,) * 4, "decoder_block_out_channels": (16,) * 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "taesd": {},
    "taef1": {"latent_channels": 16},
    "small": SMALL | {"latent_channels": 16},
    "two stages of two widths": {
        "encoder_block_out_channels": (16, 16),
        "decoder_block_out_channels": (24, 24),
        "num_encoder_blocks": (1, 2),
        "num_decoder_blocks": (2, 1),
    },
    "another activation": SMALL | {"act_fn": "silu"},
    "scaled latents": SMALL | {"scaling_factor": 0.5, "shift_factor": 0.25},
    "grey to RGBA": SMALL | {"in_channels": 1, "out_channels": 4},
}


def made(**fields):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return diffusers.AutoencoderTiny(**fields).eval().requires_grad_(False)


def loaded(original, directory):
    original.save_pretrained(directory)
    return load_model(directory)


@pytest.fixture(scope="module")
def original():
    """16 channels of latents: diffusers' own tiles fail with any number but 4."""
    return made(**CONFIGS["small"])


@pytest.fixture(scope="module")
def model(original, tmp_path_factory):
    return loaded(original, tmp_path_factory.mktemp("tiny"))


def pixels(height, width):
    return np.random.default_rng(0).integers(0, 256, (1, height, width, 3), np.uint8)


# The model ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_it_computes_what_diffusers_computes(name, tmp_path):
    original = made(**CONFIGS[name])
    model = loaded(original, tmp_path)
    x = torch.rand(2, model.config.in_channels, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = original.encode(x).latents
    torch.testing.assert_close(model.encode(x).latents, expected, rtol=0, atol=TOLERANCE)
    z = 4 * torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))  # beyond 3, where it is limited
    torch.testing.assert_close(model.decode(z).sample, original.decode(z).sample, rtol=0, atol=TOLERANCE)


def test_diffusers_reads_what_it_saves(original, model, tmp_path):
    model.save_pretrained(tmp_path)
    again = diffusers.AutoencoderTiny.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, original.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_latents_are_those_of_the_diffusion_model(model):
    z = torch.randn(1, 16, 2, 3)
    assert torch.equal(model.latent_space.normalise(z), z)
    assert model.latent_space.posterior is False


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("encoder_block_out_channels", (16, 32, 32, 32)),
        ("num_decoder_blocks", (3, 3, 1)),
        ("upsampling_scaling_factor", 4),
        ("upsample_fn", "bilinear"),
        ("act_fn", "prelu"),
        ("scaling_factor", 0),
    ],
)
def test_configs_that_no_such_model_has_are_refused(field, value, tmp_path):
    from vae_export.families.tiny import TinyConfig

    with pytest.raises(ConfigError, match=field):
        TinyConfig(**{**SMALL, field: value})


# Single files ---------------------------------------------------------------------------------------------------------


def original_names(tensors):
    """The names of TAESD's own code: the decoder begins with a clamp, which counts as a layer."""

    def renamed(match):
        return f"{match[1]}.{int(match[2]) + (match[1] == 'decoder')}"

    return {re.sub(r"(encoder|decoder)\.layers\.(\d+)", renamed, name): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("layout", ["diffusers", "original", "below vae."])
def test_files_are_recognised_and_their_architecture_is_read_off(original, model, tmp_path, layout):
    tensors = original.state_dict()
    tensors = tensors if layout == "diffusers" else original_names(tensors)
    tensors = {f"vae.{name}": t for name, t in tensors.items()} if layout == "below vae." else tensors
    save_file(tensors, tmp_path / "taesd.safetensors")
    read = load_model(tmp_path / "taesd.safetensors")
    assert (read.family, read.config) == ("AutoencoderTiny", model.config)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in read.state_dict().items())


def test_encoder_and_decoder_may_be_files_of_their_own(original, model, tmp_path):
    tensors = original_names(original.state_dict())
    for side in ("encoder", "decoder"):
        half = {name.removeprefix(f"{side}."): t for name, t in tensors.items() if name.startswith(side)}
        save_file(half, tmp_path / f"taesd_{side}.safetensors")
    with pytest.raises(ConfigError, match=r"holds an encoder alone.*--decoder"):
        load_model(tmp_path / "taesd_encoder.safetensors")
    with pytest.raises(ConfigError, match=r"holds an encoder alone, and its decoder is asked for"):
        load_model(tmp_path / "taesd_encoder.safetensors", decoder=tmp_path / "taesd_encoder.safetensors")
    read = load_model(tmp_path / "taesd_encoder.safetensors", decoder=tmp_path / "taesd_decoder.safetensors")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in read.state_dict().items())


def test_another_vae_under_its_config_is_named(original, tmp_path):
    original.save_pretrained(tmp_path / "tiny")
    diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "large")
    for config, weights, message in (
        ("large", "tiny", "weights are of an AutoencoderTiny, and the config describes an AutoencoderKL"),
        ("tiny", "large", "another VAE: no tensor is named as those of an AutoencoderTiny"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_model(
                tmp_path / weights / "diffusion_pytorch_model.safetensors", config=tmp_path / config / "config.json"
            )


# Bundles --------------------------------------------------------------------------------------------------------------

CHOICES: dict[str, dict[str, Any]] = {
    "onnx fp32": {"target": "onnx"},
    "onnx fp16": {"target": "onnx", "precision": "fp16"},
    "openvino fp32, pixels": {"target": "openvino", "io": "uint8"},
    "openvino bf16": {"target": "openvino", "precision": "bf16"},
    "flax fp32": {"target": "flax"},
}
NEAR = {"fp32": 2e-5, "fp16": 0.02, "bf16": 0.1}  #: as for FLUX.2


@pytest.fixture(scope="module", params=CHOICES)
def bundle(request, model, tmp_path_factory):
    return export_bundle(model, tmp_path_factory.mktemp("bundle") / "b", **CHOICES[request.param])


@torch.no_grad()
def test_every_bundle_computes_what_diffusers_computes(bundle, original):
    images = pixels(48, 64)
    expected = original.encode(torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1).latents
    precision = bundle.manifest.precision
    with open_vae(bundle) as vae:
        np.testing.assert_allclose(vae.images_to_latents(images), expected, rtol=0, atol=NEAR[precision])
        wanted = (original.decode(expected).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255
        assert np.abs(vae.latents_to_images(expected.numpy()) - wanted).max() <= {"fp32": 1}.get(precision, 8)
        with pytest.raises(ShapeError, match=r"\[B, 16, height, width\]|16"):
            vae.latents_to_images(np.zeros((1, 4, 3, 4), np.float32))


@pytest.mark.parametrize(("height", "width"), [(480, 672), (368, 1000), (8, 800)])
def test_seamless_tiles_are_the_whole_in_every_bundle_at_any_size(bundle, height, width):
    """No step, no --tileable: each tile reads the 19 latents around it that reach its result."""
    if bundle.manifest.target == "flax" and width != 672:
        pytest.skip("JAX compiles each size for ten seconds")
    images = pixels(height, width)
    tiles = []
    with open_vae(bundle) as vae:
        whole = vae.images_to_latents(images)
        picture = vae.latents_to_images(whole)
        vae.tile_sample_min_size, vae.tile_latent_min_size = 368, 46
        vae.on_tile = lambda done, count: tiles.append((done, count))
        vae.enable_tiling("seamless")
        # The same arithmetic on other sizes: kernels may add in another order. In bf16 a rounding may then go the
        # other way, which is 2**-8 of a value about 1.
        atol = 2**-6 if bundle.manifest.precision == "bf16" else 2e-5
        np.testing.assert_allclose(vae.images_to_latents(images), whole, rtol=0, atol=atol)
        steps = np.abs(vae.latents_to_images(whole).astype(int) - picture).max()
        assert steps <= (2 if bundle.manifest.precision == "bf16" else 1)
        assert len(tiles) > 2 and tiles[-1][0] == tiles[-1][1]


def test_the_halo_is_no_larger_than_needed_and_no_smaller(model):
    """A change of one latent or pixel is seen at the halo's distance, less what was rounded up, and not beyond."""
    reach = halo(model, "decoder")
    assert reach == 19 == halo(model, "encoder")
    with torch.no_grad():
        z = torch.zeros(1, 16, 1, 64)
        changed = z.clone()
        changed[..., 32] = 3.0
        seen = (model.decode_latents(changed) != model.decode_latents(z)).any(1).any(1)[0].nonzero()[:, 0] // 8
    assert seen.min() >= 32 - reach and seen.max() <= 32 + reach
    assert seen.max() >= 32 + reach - 4  # the reach of weights that are not 0, at the resolution of latents


def test_it_needs_no_steps(model, tmp_path):
    with pytest.raises(ConfigError, match="tiles without seams: leave --tileable out"):
        export_bundle(model, tmp_path / "b", tileable=True)


def test_a_manifest_with_another_halo_is_refused(bundle):
    data = json.loads(bundle.manifest.to_json())
    del data[SEAL]  # as in manifests of before there was a seal
    data["halo"]["encoder"] = -1
    with pytest.raises(IntegrityError, match="halo of the encoder is -1"):
        Manifest.from_json(json.dumps(data).encode())


def test_int8_that_misses_its_bar_is_refused(model, tmp_path):
    """Random weights miss it. Nothing is left."""
    with pytest.raises(NumericsError, match="int8"):
        export_bundle(model, tmp_path / "b", target="openvino", precision="int8")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("kind", ["openvino fp32"])
@torch.no_grad()
def test_a_pipeline_makes_the_picture_of_diffusers(kind, tmp_path):
    from examples.tiny_pipelines import tiny_pipeline
    from vae_export.diffusers import as_diffusers_vae

    original = made(**SMALL, latent_channels=4)
    bundle = export_bundle(loaded(original, tmp_path / "model"), tmp_path / "b", target="openvino")

    def picture(vae):
        pipe = tiny_pipeline("stable-diffusion", vae)
        generator = torch.Generator().manual_seed(0)
        result = pipe("a cat", num_inference_steps=2, generator=generator, height=64, width=64)
        return np.asarray(result.images[0]).astype(int)

    with open_vae(bundle) as vae:
        ours = as_diffusers_vae(vae)
        assert isinstance(ours, diffusers.AutoencoderTiny) and type(ours) in (diffusers.AutoencoderTiny,)
        assert np.abs(picture(ours) - picture(original)).max() <= 2
        x = torch.rand(1, 3, 32, 32)
        torch.testing.assert_close(ours.encode(x).latents, original.encode(x).latents, rtol=0, atol=2e-5)


# TAEF2 ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taef2():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TAEF2(**SMALL).eval().requires_grad_(False)


class Pooled(torch.nn.Module):
    """A block at the size of the latents, as TAESD's own code computes it, from the weights of ours."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        pool = self.block.pool
        y = torch.nn.functional.conv2d(x, pool[0].weight)
        y = torch.nn.functional.group_norm(y, 4, pool[1].weight, pool[1].bias, 1e-5)
        x = x + torch.nn.functional.conv2d(torch.relu(y), pool[3].weight)
        return torch.relu(self.block.conv(x) + x)


def test_blocks_at_the_size_of_the_latents_are_pooled_and_no_others(taef2):
    names = [name for name, module in taef2.named_modules() if hasattr(module, "pool")]
    last, first = [f"encoder.layers.{n}" for n in (11, 12, 13)], [f"decoder.layers.{n}" for n in (2, 3, 4)]
    assert names == last + first
    x = torch.randn(1, 16, 5, 7)
    block = taef2.get_submodule(names[0])
    torch.testing.assert_close(block(x), Pooled(block)(x))


def test_its_file_is_recognised_and_its_latents_are_normalised_ones(taef2, tmp_path):
    save_file(original_names(taef2.state_dict()), tmp_path / "taef2.safetensors")
    model = load_model(tmp_path / "taef2.safetensors")
    assert (model.family, model.config) == ("TAEF2", taef2.config)
    images = pixels(48, 64)
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    bundle = export_bundle(model, tmp_path / "b")
    with open_vae(bundle) as vae:
        latents = vae.images_to_latents(images)
        assert latents.shape == (1, 128, 3, 4)  # as FLUX.2's diffusion model takes them
        expected = torch.nn.functional.pixel_unshuffle(taef2.encode(x).latents, 2)
        np.testing.assert_allclose(latents, expected, rtol=0, atol=2e-5)
        assert vae.latents_to_images(latents).shape == (1, 48, 64, 3)
        with pytest.raises(ConfigError, match="seamless"):
            vae.enable_tiling("seamless")  # its norm sees the whole image
    assert validate_bundle(tmp_path / "b")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_runs_in_jax(taef2, tmp_path, precision):
    assert export_bundle(taef2, tmp_path / "b", target="flax", precision=precision).manifest.family == "TAEF2"
