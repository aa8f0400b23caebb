"""Stored latents as trainers read them: what they find there is what they would have made themselves.

Tests vae_export/dataset/exporters.py.
"""

import io
import json
import tarfile

import numpy as np
import pytest

from runtimes import BundleError, ConfigError
from runtimes.image_files import load_image
from runtimes.latents import LatentDataset
from tests.helpers.dataset_samples import encode, image_bytes, make_folder
from vae_export.dataset.exporters import export_latents

pytest.importorskip("pyarrow", reason="pip install 'vae-export[dataset]'")

from pyarrow import parquet

ROUNDING = 2e-6  # float32: other batches, and a scaling that was undone


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def latents(folder, onnx_bundle, tmp_path_factory):
    """Scaled means in float32, flips too, at the images' own sizes."""
    out = tmp_path_factory.mktemp("latents") / "out"
    encode(folder, onnx_bundle, out, policy="none", sizes=(), storage={"flips": True})
    return LatentDataset(out)


def raw(vae, pixels):
    return vae.encode(pixels[None].transpose(0, 3, 1, 2) / np.float32(127.5) - np.float32(1))[0].mode()[0]


@pytest.mark.parametrize(
    ("model", "scaled", "key"), [("sdxl", False, ""), ("sd3", False, "_5x6"), ("flux", True, "_5x6")]
)
def test_sd_scripts_finds_its_own_cache(model, scaled, key, latents, folder, tmp_path, vae):
    """Names, keys, and raw latents for SD, SDXL and SD3, scaled ones for FLUX, as its strategies write them."""
    export_latents(latents, tmp_path / "out", "sd-scripts", model=model)
    assert len(list((tmp_path / "out").rglob("*.npz"))) == 10
    assert (tmp_path / "out" / f"deep/er/003_0048x0040_{model}.npz").exists()
    with np.load(tmp_path / "out" / f"000_0048x0040_{model}.npz") as found:
        assert set(found.files) == {name + key for name in ("latents", "latents_flipped", "original_size", "crop_ltrb")}
        assert found[f"original_size{key}"].tolist() == [48, 40] and found[f"crop_ltrb{key}"].tolist() == [0, 0, 48, 40]
        pixels = load_image(folder / "000.png")
        for name, image in (("latents", pixels), ("latents_flipped", np.ascontiguousarray(pixels[:, ::-1]))):
            expected = raw(vae, image)
            expected = (expected - 0.1) * 0.5 if scaled else expected
            assert found[name + key].dtype == np.float32
            np.testing.assert_allclose(found[name + key], expected, atol=ROUNDING)


def test_the_crop_that_sd_scripts_writes(folder, onnx_bundle, tmp_path):
    """Of an image of 64x40 in a bucket of 40x40: fitted into it, it is 40x25, 7 pixels from its top."""
    encode(folder, onnx_bundle, tmp_path / "latents", policy="center-crop", sizes=((40, 40),))
    export_latents(LatentDataset(tmp_path / "latents"), tmp_path / "out", "sd-scripts", model="sdxl")
    with np.load(tmp_path / "out" / "001_0064x0040_sdxl.npz") as found:
        assert found["crop_ltrb"].tolist() == [0, 7, 40, 32] and found["latents"].shape == (4, 5, 5)


def test_of_moments_sd_scripts_gets_the_mean(folder, onnx_bundle, tmp_path, vae):
    encode(folder, onnx_bundle, tmp_path / "m", policy="none", sizes=(), storage={"stored": "moments", "scaled": False})
    export_latents(LatentDataset(tmp_path / "m"), tmp_path / "out", "sd-scripts", model="flux")
    with np.load(tmp_path / "out" / "000_0048x0040_flux.npz") as found:
        expected = (raw(vae, load_image(folder / "000.png")) - 0.1) * 0.5
        np.testing.assert_allclose(found["latents_5x6"], expected, atol=ROUNDING)


@pytest.fixture(scope="module")
def clashing(onnx_bundle, tmp_path_factory):
    """Latents of images of which some differ in their suffix alone, and of their mirror images."""
    place = tmp_path_factory.mktemp("clashing")
    (place / "images").mkdir()
    names = ("a.jpg", "a.png", "a.webp", "a-png.jpg", "b.jpg", "b.png", "c.png")
    for number, name in enumerate(names):
        format = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[name.partition(".")[2]]
        (place / "images" / name).write_bytes(image_bytes(number, (48, 40), format))
    (place / "images" / "c.jpg").write_bytes(image_bytes(9, (64, 40), "JPEG"))  # of another size: no clash
    encode(place / "images", onnx_bundle, place / "latents", storage={"flips": True})
    return LatentDataset(place / "latents")


def latents_in(path):
    with np.load(path) as found:
        return found["latents"], found["latents_flipped"]


def test_names_that_clash_are_refused_and_all_listed(clashing, tmp_path):
    with pytest.raises(ConfigError, match=r"here 2 times: a\.jpg and a\.png and a\.webp; b\.jpg and b\.png\. --skip"):
        export_latents(clashing, tmp_path / "out", "sd-scripts", model="sd")
    assert not list(tmp_path.iterdir())


def test_of_names_that_clash_the_first_is_exported_on_request(clashing, tmp_path):
    done = export_latents(clashing, tmp_path / "out", "sd-scripts", model="sdxl", clashes="skip")
    assert (done.entries, done.skipped, done.renamed) == (10, ("a.png", "a.webp", "b.png"), ())
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {f"{stem}_0048x0040_sdxl.npz" for stem in ("a", "a-png", "b", "c")} | {"c_0064x0040_sdxl.npz"}
    first = latents_in(tmp_path / "out" / "a_0048x0040_sdxl.npz")[0]
    np.testing.assert_allclose((first - 0.1) * 0.5, clashing.by_id("a.jpg").latents, atol=ROUNDING)


def test_of_names_that_clash_the_others_get_their_suffix_on_request(clashing, tmp_path):
    """No name is given twice, also where one of the new names is that of an image."""
    done = export_latents(clashing, tmp_path / "out", "sd-scripts", model="sdxl", clashes="suffix")
    assert done.entries == len(clashing) and done.skipped == ()
    assert done.renamed == (("a.png", "a-png-2"), ("a.webp", "a-webp"), ("b.png", "b-png"))
    assert len(list((tmp_path / "out").iterdir())) == 8
    for id, stem in (("a.jpg", "a"), ("a-png.jpg", "a-png"), *done.renamed):
        for flipped, found in enumerate(latents_in(tmp_path / "out" / f"{stem}_0048x0040_sdxl.npz")):
            expected = clashing.by_id(id, flipped=bool(flipped)).latents
            np.testing.assert_allclose((found - 0.1) * 0.5, expected, atol=ROUNDING)


def test_what_to_do_about_clashes_is_checked(clashing, tmp_path):
    with pytest.raises(ConfigError, match="'merge'; known are refuse, skip, suffix"):
        export_latents(clashing, tmp_path / "out", "sd-scripts", model="sd", clashes="merge")
    with pytest.raises(ConfigError, match="only in sd-scripts exports, not in parquet"):
        export_latents(clashing, tmp_path / "out", "parquet", clashes="skip")


def test_webdataset(latents, tmp_path):
    export_latents(latents, tmp_path / "out", "webdataset")
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        names = tar.getnames()
        assert names[:3] == ["000000000.npy", "000000000.json", "000000001.npy"] and len(names) == 40
        for number, entry in enumerate(latents):
            stored, record = tar.extractfile(f"{number:09d}.npy"), tar.extractfile(f"{number:09d}.json")
            assert stored is not None and record is not None
            array, about = np.load(io.BytesIO(stored.read())), json.load(record)
            np.testing.assert_array_equal(array, entry.latents)
            assert (about["id"], about["flipped"]) == (entry.id, entry.flipped)
            assert tuple(about["crop"]) == entry.crop


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_parquet(dtype, folder, onnx_bundle, tmp_path):
    encode(folder, onnx_bundle, tmp_path / "latents", storage={"dtype": dtype})
    dataset = LatentDataset(tmp_path / "latents")
    export_latents(dataset, tmp_path / "out", "parquet")
    rows = parquet.read_table(tmp_path / "out").to_pylist()
    assert [row["id"] for row in rows] == dataset.ids.to_pylist()
    for row, entry in zip(rows, dataset, strict=True):
        np.testing.assert_array_equal(np.array(row["latents"], np.float32), entry.latents.astype(np.float32))
        assert tuple(row["original_size"]) == entry.original_size


def test_what_is_refused(latents, tmp_path):
    with pytest.raises(ConfigError, match=r"no format 'lmdb'.*sd-scripts, webdataset, parquet"):
        export_latents(latents, tmp_path / "out", "lmdb")
    for model in (None, "sd5"):
        with pytest.raises(ConfigError, match="sd, sdxl, sd3, flux"):
            export_latents(latents, tmp_path / "out", "sd-scripts", model=model)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("")
    with pytest.raises(BundleError, match="exists; choose another --out"):
        export_latents(latents, tmp_path / "mine", "parquet")
