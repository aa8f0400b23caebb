"""Models of grey images and of RGBA: what they take and give is theirs, from files to latents and back."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from runtimes import ShapeError, open_vae
from runtimes.image_files import load_image
from runtimes.images import to_pil
from tests.helpers.dataset_samples import encode as encode_folder
from vae_export import AutoencoderKL, export_bundle
from vae_export.cli.app import app
from vae_export.photos import crops, middle_of, photographs

RNG = np.random.default_rng(0)
RGBA = RNG.integers(0, 256, (16, 24, 4), dtype=np.uint8)
MODELS = {"grey": (1, 1), "RGBA": (4, 4), "grey to RGBA": (1, 4)}  #: channels in and out


@pytest.fixture(scope="module", params=MODELS)
def channels(request):
    return MODELS[request.param]


def model_of(channels):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderKL(
            in_channels=channels[0],
            out_channels=channels[1],
            block_out_channels=(16, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=8,
            mid_block_add_attention=False,
            scaling_factor=0.5,
        )


@pytest.fixture(scope="module")
def bundle(channels, tmp_path_factory):
    path = tmp_path_factory.mktemp("channels") / "bundle"
    export_bundle(model_of(channels), path)
    return path


@pytest.fixture(scope="module")
def opened(bundle):
    with open_vae(bundle, threads=1) as vae:
        yield vae


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    to_pil(RGBA).save(path)
    return path


def test_files_pictures_and_arrays_are_taken_alike_and_images_have_the_channels_of_the_decoder(opened, channels, photo):
    taken, given = channels
    pixels = load_image(photo, taken)
    assert pixels.shape == (16, 24, taken)
    latents = opened.images_to_latents(pixels)
    sources = [pixels[None], [pixels], photo, to_pil(pixels), to_pil(RGBA), [photo], photo.read_bytes()]
    for source in sources:
        assert np.array_equal(opened.images_to_latents(source), latents)
    assert np.array_equal(opened.images_to_latents(torch.from_numpy(pixels)).numpy(), latents)
    restored = opened.latents_to_images(latents)
    assert restored.shape == (1, 16, 24, given)
    assert to_pil(restored[0]).mode == {1: "L", 4: "RGBA"}[given]
    if taken == given:
        assert opened.images_to_latents(restored).shape == latents.shape


def test_arrays_of_other_channels_are_refused_and_the_advice_leads_somewhere(opened, channels):
    rgb = RGBA[..., :3]
    with pytest.raises(ShapeError, match=r"PIL\.Image\.fromarray\(array\), which is converted"):
        opened.images_to_latents(rgb)
    assert opened.images_to_latents(Image.fromarray(rgb)).shape == (1, 4, 8, 12)


def test_a_roundtrip_shows_what_should_come_back(bundle, channels, photo, tmp_path):
    done = CliRunner().invoke(app, ["roundtrip", str(bundle), str(photo), "--out", str(tmp_path / "a.png"), "--json"])
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == {1: "L", 4: "RGBA"}[channels[1]] and picture.size == (3 * 24, 16)
        shown = np.asarray(picture)[:, :24].reshape(16, 24, channels[1])
    assert np.array_equal(shown, load_image(photo, channels[1]))
    assert json.loads(done.stdout)["psnr_db"] > 0


def test_latents_on_the_command_line_are_those_of_the_api(bundle, opened, channels, photo, tmp_path):
    run = CliRunner()
    done = run.invoke(app, ["encode", str(bundle), str(photo), "--out", str(tmp_path / "z.npy")])
    assert done.exit_code == 0, done.output
    z = np.load(tmp_path / "z.npy")
    assert np.array_equal(z, opened.images_to_latents(photo))
    done = run.invoke(app, ["decode", str(bundle), str(tmp_path / "z.npy"), "--out", str(tmp_path / "a.png")])
    assert done.exit_code == 0, done.output
    restored = load_image(tmp_path / "a.png", channels[1])
    assert np.array_equal(restored, opened.latents_to_images(z)[0])


def test_a_dataset_is_encoded_with_the_channels_of_the_model(bundle, opened, photo, tmp_path):
    latents = pytest.importorskip("runtimes.latents.dataset", reason="pip install 'vae-export[dataset]'")
    folder = tmp_path / "images"
    folder.mkdir()
    photo.rename(folder / "photo.png")
    summary = encode_folder(folder, bundle, tmp_path / "out", policy="none", sizes=())
    assert (summary.encoded, summary.failed) == (1, 0)
    entry = latents.LatentDataset(tmp_path / "out")[0]
    np.testing.assert_allclose(entry.latents, opened.images_to_latents(folder / "photo.png")[0], rtol=1e-5, atol=1e-5)


def test_pixels_inside_the_graphs_have_the_channels_too(channels, photo, opened, tmp_path):
    export_bundle(model_of(channels), tmp_path / "pixels", io="uint8")
    with open_vae(tmp_path / "pixels", threads=1) as vae:
        latents = vae.images_to_latents(photo)
        np.testing.assert_allclose(latents, opened.images_to_latents(photo), rtol=1e-3, atol=1e-4)  # pixels in float32
        steps = vae.latents_to_images(latents).astype(int) - opened.latents_to_images(latents)
        assert steps.shape == (1, 16, 24, channels[1]) and np.abs(steps).max() <= 1


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
def test_photographs_to_measure_with_are_what_such_a_model_sees(channels):
    path = photographs()[0]
    for x in (middle_of(path, 32, 48, channels), next(crops([path], 32, 1, channels))):
        assert x.shape[1] == channels and x.min() >= -1 and x.max() <= 1
        if channels == 4:
            assert (x[:, 3] == 1).all()  # opaque
    grey, rgb = middle_of(path, 32, 48, 1), middle_of(path, 32, 48, 3)
    assert rgb.min(1).values.sub(grey[:, 0]).max() <= 0.01 and grey[:, 0].sub(rgb.max(1).values).max() <= 0.01
