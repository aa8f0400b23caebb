"""The view of a model whose latents are normalised (vae_export/normalised.py)."""

import json

import numpy as np
import pytest
import torch

from runtimes import ConfigError, open_vae
from runtimes.errors import IntegrityError
from runtimes.manifest import SEAL, Manifest
from vae_export import AutoencoderKL, export_bundle, load_model, validate_bundle
from vae_export.normalised import NormalisedVae, as_written


@torch.no_grad()
def test_it_gives_and_takes_what_the_latent_space_says(tiny_model):
    view = NormalisedVae(tiny_model)
    space = tiny_model.latent_space
    x = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    raw = tiny_model.encode_moments(x)[:, :4]
    torch.testing.assert_close(view.encode_moments(x), space.normalise(raw), rtol=0, atol=1e-6)
    z = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(1))
    expected = tiny_model.decode_latents(space.denormalise(z))
    torch.testing.assert_close(view.decode_latents(z), expected, rtol=0, atol=1e-5)
    assert view.latent_space == space.as_normalised
    assert (view.latent_space.factor, view.latent_space.posterior) == (8, False)
    assert as_written(tiny_model, "raw") is tiny_model


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_bundles_of_an_autoencoder_kl_can_have_them(tiny_model, tmp_path, precision):
    """The constants are computed in fp32 whatever the precision: nothing is rounded twice."""
    bundle = export_bundle(tiny_model, tmp_path / "b", precision=precision, latents="normalised")
    images = np.random.default_rng(0).integers(0, 256, (1, 48, 64, 3), np.uint8)
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    expected = tiny_model.latent_space.normalise(tiny_model.encode(x).latent_dist.mode())
    with open_vae(bundle) as vae:
        # The order of sums in fp32; 11 bits of mantissa in fp16, of latents about 1.
        atol = {"fp32": 2e-5, "fp16": 0.02}[precision]
        np.testing.assert_allclose(vae.images_to_latents(images), expected, rtol=0, atol=atol)
        assert vae.latents_to_images(expected.numpy()).shape == (1, 48, 64, 3)
    assert validate_bundle(tmp_path / "b", tiny_model)


@pytest.mark.slow
def test_the_trained_model_meets_the_bar_of_int8_with_them(tmp_path):
    bundle = export_bundle(load_model(), tmp_path / "b", target="openvino", precision="int8", latents="normalised")
    photos = [m for m in bundle.manifest.validation["measurements"] if m["input"].startswith("photo")]
    assert photos and all(m["psnr_db"] >= 40 for m in photos)


def test_a_model_that_does_not_know_its_scale_has_none(tiny_model):
    model = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, scaling_factor=None)
    with pytest.raises(ConfigError, match="scaling_factor"):
        NormalisedVae(model)


def test_other_latents_are_refused(tiny_model, tiny_bundle, tmp_path):
    with pytest.raises(ConfigError, match="latents 'scaled' is not known; known are raw, normalised"):
        export_bundle(tiny_model, tmp_path / "b", latents="scaled")
    data = json.loads((tiny_bundle / "manifest.json").read_text())
    del data[SEAL]
    with pytest.raises(IntegrityError, match="latents"):
        Manifest.from_json(json.dumps(data | {"latents": "scaled"}).encode())
