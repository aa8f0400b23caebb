"""The embedded model keeps what its page says: trained, small, and good on photographs it has never seen."""

import json

import numpy as np
import pytest
from skimage import data
from sklearn.datasets import load_sample_image

from runtimes import open_vae
from runtimes.images import crop_to_multiple, psnr
from vae_export import export_bundle
from vae_export.checkpoints.load import EMBEDDED, load_model
from vae_export.photos import photographs


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    path = tmp_path_factory.mktemp("embedded") / "bundle"
    export_bundle(load_model(), path, run_validation=False)
    with open_vae(path) as opened:
        yield opened


HELD_OUT = {"coffee": data.coffee, "flower": lambda: load_sample_image("flower.jpg")}


@pytest.mark.parametrize("name", HELD_OUT)
def test_photographs_held_out_of_training_come_back(vae, name):
    photo = crop_to_multiple(HELD_OUT[name](), vae.config.downscale)
    reached = psnr(vae.latents_to_images(vae.images_to_latents(photo))[0], photo)
    assert reached >= 26
    report = json.loads((EMBEDDED / "training.json").read_text())
    assert name not in report["photos"]
    # What was written down was measured in PyTorch; a pixel in a hundred may round the other way.
    assert reached == pytest.approx(report["held_out_psnr_db"][name], abs=0.05)


def test_latents_are_scaled_to_about_unit_variance(vae):
    latents = np.concatenate([vae.images_to_latents(path).ravel() for path in photographs()])
    assert 0.7 < np.std(latents) < 1.4  # scaled on crops of the training photographs; these are four whole ones


def test_the_file_is_small():
    assert sum(path.stat().st_size for path in EMBEDDED.iterdir()) < 5_000_000
