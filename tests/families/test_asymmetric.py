"""AsymmetricAutoencoderKL (vae_export/families/asymmetric.py): parity with diffusers, its files, its bundles."""

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from runtimes import ConfigError, open_vae
from tests.helpers.checkpoint_samples import TOLERANCE, to_ldm
from vae_export import export_bundle, load_model

LEVELS = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
SMALL = LEVELS | {"norm_num_groups": 8, "down_block_out_channels": (16, 32, 32, 32), "scaling_factor": 0.25}
CONFIGS: dict[str, dict[str, Any]] = {
    "wider": SMALL | {"up_block_out_channels": (24, 48, 48, 48)},
    "same": SMALL | {"up_block_out_channels": (16, 32, 32, 32)},
    "deeper": SMALL | {"up_block_out_channels": (16, 32, 64, 64), "layers_per_up_block": 3},
    "deeper encoder": SMALL | {"up_block_out_channels": (16, 32, 32, 32), "layers_per_down_block": 2},
    "sixteen channels": SMALL | {"up_block_out_channels": (24, 24, 48, 48), "latent_channels": 16},
    "attention": SMALL
    | {
        "up_block_out_channels": (16, 32, 32, 32),
        "up_block_types": ("AttnUpDecoderBlock2D", *LEVELS["up_block_types"][1:]),
    },
}


def made(**fields):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return diffusers.AsymmetricAutoencoderKL(**fields).eval().requires_grad_(False)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_it_computes_what_diffusers_computes(name, tmp_path):
    original = made(**CONFIGS[name])
    original.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    x = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = original.encode(x).latent_dist
    torch.testing.assert_close(model.encode(x).latent_dist.parameters, expected.parameters, rtol=0, atol=TOLERANCE)
    z = expected.mode()
    torch.testing.assert_close(model.decode(z)[0], original.decode(z).sample, rtol=0, atol=TOLERANCE)
    model.save_pretrained(tmp_path / "again")  # with the weights for masks
    again = diffusers.AsymmetricAutoencoderKL.from_pretrained(tmp_path / "again")
    assert all(torch.equal(tensor, original.state_dict()[name]) for name, tensor in again.state_dict().items())


@pytest.fixture(scope="module")
def original():
    return made(**CONFIGS["wider"])


@pytest.fixture(scope="module")
def model(original, tmp_path_factory):
    directory = tmp_path_factory.mktemp("asymmetric")
    original.save_pretrained(directory)
    return load_model(directory)


def test_a_single_file_is_recognised(original, model, tmp_path):
    save_file(to_ldm(original.state_dict()), tmp_path / "vae.safetensors")
    read = load_model(tmp_path / "vae.safetensors", config={"norm_num_groups": 8}, scaling_factor=0.25)
    assert read.family == "AsymmetricAutoencoderKL"
    same = ("up_block_out_channels", "layers_per_up_block", "down_block_out_channels", "layers_per_down_block")
    assert all(getattr(read.config, name) == getattr(model.config, name) for name in same)
    with pytest.raises(ConfigError, match="norm_num_groups"):
        load_model(tmp_path / "vae.safetensors")


def test_a_mask_is_refused(model):
    with pytest.raises(ConfigError, match="mask is not supported"):
        model.decode(torch.zeros(1, 4, 2, 2), mask=torch.zeros(1, 1, 16, 16))


CHOICES: dict[str, dict[str, Any]] = {
    "onnx fp32 in steps": {"target": "onnx", "tileable": True},
    "onnx fp16": {"target": "onnx", "precision": "fp16"},
    "openvino bf16": {"target": "openvino", "precision": "bf16"},
    "flax fp32": {"target": "flax"},
}


@pytest.mark.parametrize(
    "choice",
    [
        "onnx fp32 in steps",
        "flax fp32",
        pytest.param("onnx fp16", marks=pytest.mark.slow),
        pytest.param("openvino bf16", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_every_target_takes_it(choice, model, tmp_path):
    bundle = export_bundle(model, tmp_path / "b", **CHOICES[choice])
    assert bundle.manifest.validation["verdict"] == "passed"
    with open_vae(bundle) as vae:
        images = np.random.default_rng(0).integers(0, 256, (1, 48, 64, 3), np.uint8)
        latents = vae.images_to_latents(images)
        raw = model.encode(torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mode()
        # As for FLUX.2, and a quarter of it: that is the scaling factor.
        atol = {"fp32": 2e-5, "fp16": 0.02, "bf16": 0.1}[bundle.manifest.precision]
        np.testing.assert_allclose(latents, 0.25 * raw, rtol=0, atol=atol)
        if bundle.manifest.target != "flax":
            vae.memory_budget = "1GiB"
        assert vae.latents_to_images(latents).shape == (1, 48, 64, 3)


def test_diffusers_takes_the_bundle_in_its_place(original, model, tmp_path):
    from vae_export.diffusers import as_diffusers_vae

    with open_vae(export_bundle(model, tmp_path / "b", run_validation=False)) as vae:
        ours = as_diffusers_vae(vae)
        assert isinstance(ours, diffusers.AsymmetricAutoencoderKL)
        z = torch.randn(1, 4, 4, 6)
        torch.testing.assert_close(ours.decode(z).sample, original.decode(z).sample, rtol=0, atol=2e-5)
        with pytest.raises(ConfigError, match="image and a mask"):
            ours.decode(z, mask=torch.zeros(1, 1, 32, 48))
