"""encode-dataset and export-latents on the command line."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from runtimes import ConfigError, ShapeError
from runtimes.latents import LatentDataset
from tests.helpers.dataset_samples import encode, image_bytes, make_folder
from vae_export.cli.app import app

pytest.importorskip("pyarrow", reason="pip install 'vae-export[dataset]'")


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_from_a_folder_to_what_a_trainer_reads(tiny_bundle, tmp_path):
    folder = make_folder(tmp_path / "images", 5)
    (folder / "bad.png").write_bytes(b"")
    options = ["--bundle", tiny_bundle, "--out", tmp_path / "out", "--policy", "center-crop", "--size", "40x32"]
    options += ["--dtype", "bf16", "--store", "sample", "--flips", "--workers", "0", "--threads", "1"]
    said = json.loads(run("encode-dataset", folder, *options, "--json").stdout)
    assert (said["images"], said["encoded"], said["failed"]) == (6, 5, 1) and said["images_per_second"] > 0
    done = run("encode-dataset", folder, *options)
    assert (
        "6 images, 0 encoded" in done.stdout and "6 unchanged" in done.stdout and "1 in errors.parquet" in done.stdout
    )
    dataset = LatentDataset(tmp_path / "out", vae=tiny_bundle, stored="sample", scaled=True, size=(40, 32))
    assert len(dataset) == 10 and dataset.contract["dtype"] == "bfloat16"
    done = run("export-latents", tmp_path / "out", "--to", "sd-scripts", "--model", "sdxl", "--out", tmp_path / "npz")
    assert "10 latents" in done.stdout and len(list((tmp_path / "npz").rglob("*_sdxl.npz"))) == 5


def test_the_default_buckets_are_those_of_sdxl(tiny_bundle, tmp_path):
    folder = make_folder(tmp_path / "images", 1)
    options = ["--bundle", tiny_bundle, "--out", tmp_path / "out", "--policy", "buckets", "--workers", 0]
    done = run("encode-dataset", folder, *options)
    assert done.exit_code == 0, done.output
    contract = json.loads((tmp_path / "out" / "contract.json").read_bytes())
    assert len(contract["preprocessing"]["sizes"]) == 41
    assert LatentDataset(tmp_path / "out")[0].latents.shape == (4, 112, 136)  # 48/40 is 1.2, 1088/896 1.21


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--policy", "center-crop"], "--size WIDTHxHEIGHT goes with"),
        (["--size", "64x64"], "--size WIDTHxHEIGHT goes with"),
        (["--dtype", "fp8"], "known are fp32, fp16, bf16"),
        (["--policy", "crop"], "no policy 'crop'"),
        (["--format", "zip"], "no format 'zip'"),
        (["--policy", "buckets", "--buckets", "64:64"], "not WIDTHxHEIGHT"),
    ],
)
def test_wrong_usage_is_said_in_a_line(options, said, tiny_bundle, tmp_path):
    folder = make_folder(tmp_path / "images", 1)
    done = run("encode-dataset", folder, "--bundle", tiny_bundle, "--out", tmp_path / "out", *options)
    assert isinstance(done.exception, ConfigError) and said in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_clashes_of_names_for_sd_scripts_are_skipped_or_renamed_and_each_is_said(tiny_bundle, tmp_path):
    (tmp_path / "images").mkdir()
    for suffix, format in (("jpg", "JPEG"), ("png", "PNG")):
        (tmp_path / "images" / f"a.{suffix}").write_bytes(image_bytes(0, format=format))
    encode(tmp_path / "images", tiny_bundle, tmp_path / "latents")
    export = ["export-latents", tmp_path / "latents", "--to", "sd-scripts", "--model", "sd", "--out"]
    assert "a.jpg and a.png" in str(run(*export, tmp_path / "refused").exception)
    done = run(*export, tmp_path / "skip", "--skip-clashes")
    assert "skipped a.png" in done.stderr and "1 latents for sd-scripts" in done.stdout
    done = run(*export, tmp_path / "suffix", "--suffix-clashes")
    assert "rename a.png to a-png.png" in done.stderr and "2 latents for sd-scripts" in done.stdout
    both = run(*export, tmp_path / "both", "--skip-clashes", "--suffix-clashes").exception
    assert isinstance(both, ConfigError) and "not both" in str(both)


def test_panoramas_are_encoded_when_the_limit_is_raised(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # of some 2000; Pillow only warns
    folder = make_folder(tmp_path / "images", 1)
    options = [folder, "--bundle", tiny_bundle, "--out", tmp_path / "out", "--workers", 0, "--json"]
    said = json.loads(run("encode-dataset", *options).stdout)
    assert (said["encoded"], said["failed"]) == (0, 1)
    said = json.loads(run("encode-dataset", *options, "--max-pixels", 2000).stdout)
    assert (said["encoded"], said["failed"]) == (1, 0)


@pytest.mark.parametrize("command", ["encode", "roundtrip"])
def test_a_panorama_is_one_option_away(tiny_bundle, tmp_path, monkeypatch, command):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    path = make_folder(tmp_path / "images", 1) / "000.png"
    options = [command, tiny_bundle, path, "--out", tmp_path / {"encode": "z.npy", "roundtrip": "a.png"}[command]]
    with pytest.raises(ShapeError, match="--max-pixels"):
        raise run(*options).exception
    assert run(*options, "--max-pixels", 1920).exit_code == 0
