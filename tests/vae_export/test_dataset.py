"""A job over a dataset: what it writes, and that it writes the same whatever happens to it.

Tests vae_export/dataset/job.py, vae_export/dataset/plan.py, vae_export/dataset/shards.py,
vae_export/dataset/workers.py.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from filelock import FileLock
from PIL import Image

from runtimes import BundleError, ConfigError, NumericsError, OutOfMemoryError, open_vae
from runtimes.base import VaeRuntime
from runtimes.image_files import load_image
from tests.helpers.dataset_samples import BUCKETS, Deadly, encode, image_bytes, make_folder, written

pa = pytest.importorskip("pyarrow", reason="pip install 'vae-export[dataset]'")
pytest.importorskip("filelock")

from pyarrow import parquet  # noqa: E402

from runtimes.latents import LatentDataset  # noqa: E402
from runtimes.latents.shards import open_shard  # noqa: E402

ROUNDING = 2e-6  # float32, other batches: convolutions may sum in another order; latents are of the order of 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten images. Do not change it."""
    return make_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture
def own_folder(tmp_path):
    """Ten images, to change."""
    return make_folder(tmp_path / "images")


@pytest.fixture(scope="module")
def uninterrupted(folder, onnx_bundle, tmp_path_factory):
    """What a job over `folder` writes."""
    out = tmp_path_factory.mktemp("uninterrupted") / "latents"
    encode(folder, onnx_bundle, out)
    return written(out)


def errors_of(out):
    return {row["id"]: row["reason"] for row in parquet.read_table(out / "errors.parquet").to_pylist()}


# What is written ----------------------------------------------------------------------------------------------------


def test_latents_are_those_of_the_resized_and_cropped_image(folder, tiny_bundle, tmp_path, vae):
    encode(folder, tiny_bundle, tmp_path / "out", policy="center-crop", sizes=((40, 32),))
    dataset = LatentDataset(tmp_path / "out", vae=tiny_bundle, scaled=True, stored="mean", size=(40, 32))
    assert len(dataset) == 10
    for entry in dataset:
        pixels = load_image(folder / entry.id)
        image = Image.fromarray(pixels).resize(entry.resized[::-1], Image.Resampling.LANCZOS)
        (top, left), (height, width) = entry.crop, pixels.shape[:2]
        expected = vae.images_to_latents(np.asarray(image)[top : top + 32, left : left + 40])[0]
        np.testing.assert_allclose(entry.latents, expected, atol=ROUNDING)
        assert entry.original_size == (height, width) and min(entry.resized[0] - 32, entry.resized[1] - 40) == 0


@pytest.mark.parametrize("stored", ["moments", "mean", "sample"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_posterior_is_stored_as_chosen(stored, scaled, dtype, folder, tiny_bundle, tmp_path, vae):
    storage = {"stored": stored, "scaled": scaled, "dtype": dtype, "seed": 7}
    if stored == "moments" and scaled:
        with pytest.raises(ConfigError, match=r"moments.*--unscaled"):
            encode(folder, tiny_bundle, tmp_path / "out", storage=storage)
        return
    encode(folder, tiny_bundle, tmp_path / "out", policy="none", sizes=(), storage=storage)
    dataset = LatentDataset(tmp_path / "out", stored=stored, scaled=scaled)
    # Half a step of what is stored, where that is coarser than rounding: 11 and 8 bits.
    relative = {"float32": 1e-5, "float16": 2**-11, "bfloat16": 2**-8}[dtype]
    for number in (0, 4, 9):
        entry = dataset[number]
        pixels = load_image(folder / entry.id)
        posterior = vae.encode(pixels[None].transpose(0, 3, 1, 2) / np.float32(127.5) - np.float32(1))[0]
        sha256 = dataset._sha256[number].as_py()
        rng = np.random.default_rng([7, 0, int.from_bytes(sha256, "big")])
        expected = {"moments": posterior.parameters, "mean": posterior.mode(), "sample": posterior.sample([rng])}[
            stored
        ]
        if scaled:
            expected = (expected - 0.1) * 0.5  # the tiny model's shift and scaling
        np.testing.assert_allclose(entry.latents.astype(np.float32), expected[0], rtol=relative, atol=ROUNDING * 4)


def test_flips_are_entries_of_their_own(folder, tiny_bundle, tmp_path, vae):
    encode(folder, tiny_bundle, tmp_path / "out", policy="none", sizes=(), storage={"flips": True})
    dataset = LatentDataset(tmp_path / "out")
    assert len(dataset) == 20
    mirrored = np.ascontiguousarray(load_image(folder / "001.png")[:, ::-1])
    latents = dataset.by_id("001.png", flipped=True).latents
    np.testing.assert_allclose(latents, vae.images_to_latents(mirrored)[0], atol=ROUNDING)


def test_a_sample_depends_on_content_and_seed_alone(tiny_bundle, tmp_path):
    """Not on name, place, neighbours or batch."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "one.png").write_bytes(image_bytes(1))
    for number in (2, 1, 4, 3):
        (tmp_path / "b" / f"{9 - number}.png").write_bytes(image_bytes(number))
    found = {}
    for name, seed in (("a", 0), ("b", 0), ("a", 1)):
        out = tmp_path / f"out-{name}-{seed}"
        encode(tmp_path / name, tiny_bundle, out, storage={"stored": "sample", "seed": seed})
        found[name, seed] = LatentDataset(out).by_id({"a": "one.png", "b": "8.png"}[name]).latents
    np.testing.assert_allclose(found["a", 0], found["b", 0], atol=ROUNDING)
    assert np.abs(found["a", 0] - found["a", 1]).max() > 0.1


@pytest.mark.slow
def test_pixels_may_go_in_as_they_are(folder, tiny_model, tmp_path):
    """A bundle of --io uint8 gives the same latents."""
    from vae_export import export_bundle

    export_bundle(tiny_model, tmp_path / "uint8", io="uint8", run_validation=False)
    encode(folder, tmp_path / "uint8", tmp_path / "out")
    with open_vae(tmp_path / "uint8", threads=1) as vae:
        entry = LatentDataset(tmp_path / "out").by_id("000.png")
        np.testing.assert_allclose(entry.latents, vae.images_to_latents(folder / "000.png")[0], atol=ROUNDING)


def test_any_number_of_workers_writes_the_same(folder, tiny_bundle, uninterrupted, tmp_path):
    encode(folder, tiny_bundle, tmp_path / "out", workers=2)
    assert written(tmp_path / "out") == uninterrupted


def test_the_contract_says_what_the_latents_are(uninterrupted, tiny_bundle):
    contract = json.loads(uninterrupted["contract.json"])
    assert contract["schema_version"] == 2 and contract["stored"] == "mean" and contract["scaled"] is True
    assert contract["affine"] == {"multiply": [0.5] * 4, "add": [0.1] * 4}
    assert contract["preprocessing"]["sizes"] == [list(size) for size in BUCKETS]
    assert {"numpy", "pillow", "onnxruntime"} <= contract["encoded_with"][0]["packages"].keys()


# Crashes ------------------------------------------------------------------------------------------------------------


def killed_at(moment, folder, bundle, out, root):
    """Run a job that is killed at a moment -> how many moments it had, if it ended before."""
    command = [sys.executable, "-m", "tests.helpers.dataset_samples", folder, bundle, out, moment]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return int(done.stdout) if done.returncode == 0 else None


@pytest.mark.parametrize("moment", [1, 5, 8, 12, 17, 22])
def test_a_killed_job_goes_on_to_the_same_bytes(moment, folder, tiny_bundle, uninterrupted, tmp_path, pytestconfig):
    assert killed_at(moment, folder, tiny_bundle, tmp_path / "out", pytestconfig.rootpath) is None
    there = len(list((tmp_path / "out").glob("shards/*.safetensors")))
    summary = encode(folder, tiny_bundle, tmp_path / "out")
    assert written(tmp_path / "out") == uninterrupted
    assert summary.unchanged >= min(4 * there, 10)  # what was whole was not done again


@pytest.mark.slow
def test_a_job_killed_at_every_moment_and_a_rerun_at_every_moment(folder, tiny_bundle, tmp_path, pytestconfig):
    root = pytestconfig.rootpath
    own = tmp_path / "images"
    shutil.copytree(folder, own)
    encode(own, tiny_bundle, tmp_path / "before")
    first = written(tmp_path / "before")
    moments = killed_at(10**6, own, tiny_bundle, tmp_path / "whole", root)
    for moment in range(1, moments + 1):
        out = tmp_path / f"first-{moment}"
        assert killed_at(moment, own, tiny_bundle, out, root) is None
        encode(own, tiny_bundle, out)
        assert written(out) == first, moment
    (own / "001.png").unlink()
    (own / "004.png").write_bytes(image_bytes(44))
    (own / "new.png").write_bytes(image_bytes(45))
    shutil.copytree(tmp_path / "before", tmp_path / "changed")
    moments = killed_at(10**6, own, tiny_bundle, tmp_path / "changed", root)
    changed = written(tmp_path / "changed")
    for moment in range(1, moments + 1):
        out = tmp_path / f"second-{moment}"
        shutil.copytree(tmp_path / "before", out)
        assert killed_at(moment, own, tiny_bundle, out, root) is None
        encode(own, tiny_bundle, out)
        assert written(out) == changed, moment


def test_killed_from_outside_its_workers_end_and_nothing_is_lost(tiny_bundle, tmp_path, pytestconfig):
    folder = make_folder(tmp_path / "images", 60)
    program = (
        "import sys; from tests.helpers.dataset_samples import encode\n"
        "if __name__ == '__main__': encode(sys.argv[1], sys.argv[2], sys.argv[3], workers=2)"
    )
    (tmp_path / "job.py").write_text(program)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(pytestconfig.rootpath), *sys.path])}
    command = [sys.executable, tmp_path / "job.py", folder, tiny_bundle, tmp_path / "out"]
    with subprocess.Popen([*map(str, command)], env=environment) as job:
        deadline = time.monotonic() + 30
        while not list((tmp_path / "out").glob("shards/0*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        workers = psutil.Process(job.pid).children(recursive=True)
        job.kill()
    assert workers
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
    summary = encode(folder, tiny_bundle, tmp_path / "out")
    assert summary.unchanged and summary.encoded + summary.unchanged == 60
    encode(folder, tiny_bundle, tmp_path / "whole")
    assert written(tmp_path / "out") == written(tmp_path / "whole")


def test_a_full_disk_is_an_error_that_says_so_and_the_job_goes_on_after_it(
    folder, tiny_bundle, uninterrupted, tmp_path, monkeypatch
):
    real, count = os.fsync, [0]

    def full(descriptor):
        count[0] += 1
        if count[0] > 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BundleError, match=r"No space left.*make room"):
        encode(folder, tiny_bundle, tmp_path / "out")
    monkeypatch.undo()
    encode(folder, tiny_bundle, tmp_path / "out")
    assert written(tmp_path / "out") == uninterrupted


# Changes ------------------------------------------------------------------------------------------------------------


def test_a_second_run_does_nothing(own_folder, tiny_bundle, tmp_path, monkeypatch):
    encode(own_folder, tiny_bundle, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.*[st]")}
    monkeypatch.setattr(VaeRuntime, "encode", None)  # not called
    summary = encode(own_folder, tiny_bundle, tmp_path / "out")
    assert (summary.encoded, summary.unchanged, summary.shards_written) == (0, 10, 0)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_what_was_edited_removed_and_added_is_what_changes(own_folder, tiny_bundle, tmp_path):
    out = tmp_path / "out"
    encode(own_folder, tiny_bundle, out)
    before = {entry.id: entry.latents for entry in LatentDataset(out)}
    untouched = (out / "shards/00000001.safetensors").stat().st_mtime_ns
    times = (own_folder / "001.png").stat()
    (own_folder / "001.png").write_bytes(image_bytes(100, (48, 40)))
    os.utime(own_folder / "001.png", ns=(times.st_atime_ns, times.st_mtime_ns))  # content counts, not times
    (own_folder / "002.png").unlink()
    (own_folder / "added.png").write_bytes(image_bytes(101))
    summary = encode(own_folder, tiny_bundle, out)
    assert (summary.encoded, summary.removed, summary.images) == (2, 1, 10)
    dataset = LatentDataset(out)
    after = {entry.id: entry.latents for entry in dataset}
    assert after.keys() == (before.keys() | {"added.png"}) - {"002.png"}
    assert [id for id in before.keys() & after.keys() if not np.array_equal(before[id], after[id])] == ["001.png"]
    assert (out / "shards/00000001.safetensors").stat().st_mtime_ns == untouched
    encode(own_folder, tiny_bundle, tmp_path / "anew")
    np.testing.assert_allclose(
        after["001.png"], LatentDataset(tmp_path / "anew").by_id("001.png").latents, atol=ROUNDING
    )


def test_a_shard_whose_images_are_all_gone_leaves(own_folder, tiny_bundle, tmp_path):
    encode(own_folder, tiny_bundle, tmp_path / "out")
    first = open_shard(tmp_path / "out/shards/00000000.safetensors").ids
    for id in first:
        (own_folder / id).unlink()
    encode(own_folder, tiny_bundle, tmp_path / "out")
    assert not (tmp_path / "out/shards/00000000.safetensors").exists()
    assert len(LatentDataset(tmp_path / "out")) == 6


def test_another_source_does_not_replace_what_is_there(own_folder, tiny_bundle, tmp_path):
    encode(own_folder, tiny_bundle, tmp_path / "out")
    before = written(tmp_path / "out")
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "x.png").write_bytes(image_bytes(1))
    with pytest.raises(ConfigError, match=r"none of the 10 images.*another --out"):
        encode(tmp_path / "others", tiny_bundle, tmp_path / "out")
    assert written(tmp_path / "out") == before


def test_other_options_are_refused_and_named(folder, tiny_bundle, tmp_path):
    encode(folder, tiny_bundle, tmp_path / "out")
    before = written(tmp_path / "out")
    with pytest.raises(ConfigError, match=r'dtype is "float32" there and "float16" now; .*stored is "mean" there'):
        encode(folder, tiny_bundle, tmp_path / "out", storage={"dtype": "float16", "stored": "sample"})
    with pytest.raises(ConfigError, match=r"preprocessing.sizes is \[\[48, 40\]"):
        encode(folder, tiny_bundle, tmp_path / "out", sizes=((40, 40),))
    assert written(tmp_path / "out") == before


# What goes wrong ----------------------------------------------------------------------------------------------------


def test_broken_images_are_listed_and_take_none_with_them(own_folder, tiny_bundle, uninterrupted, tmp_path):
    (own_folder / "001.png").write_bytes(b"not a picture")
    (own_folder / "004.png").write_bytes(image_bytes(4)[:-200])
    (own_folder / "005.png").write_bytes(b"")
    (own_folder / "006.png").write_bytes(image_bytes(0, (4, 4)))
    summary = encode(own_folder, tiny_bundle, tmp_path / "out", policy="none", sizes=())
    assert (summary.encoded, summary.failed) == (6, 4)
    reasons = errors_of(tmp_path / "out")
    assert reasons.keys() == {"001.png", "004.png", "005.png", "006.png"}
    assert (
        "truncated" in reasons["004.png"] and "empty" in reasons["005.png"] and "4x4 is smaller" in reasons["006.png"]
    )
    assert "not an image in a format that Pillow reads" in reasons["001.png"]
    assert encode(own_folder, tiny_bundle, tmp_path / "out", policy="none", sizes=()).shards_written == 0
    (own_folder / "001.png").write_bytes(image_bytes(1))
    assert encode(own_folder, tiny_bundle, tmp_path / "out", policy="none", sizes=()).encoded == 1
    assert "001.png" not in errors_of(tmp_path / "out")
    assert LatentDataset(tmp_path / "out").by_id("001.png").original_size == (40, 64)


def test_an_image_that_takes_its_process_down_is_listed_alone(folder, tiny_bundle, tmp_path):
    summary = encode(Deadly(folder, victim="005.png"), tiny_bundle, tmp_path / "out", workers=2)
    assert (summary.encoded, summary.failed) == (9, 1)
    assert errors_of(tmp_path / "out") == {"005.png": "the process that decoded it died"}


def test_where_memory_runs_out_batches_are_halved_and_nothing_is_lost(folder, tiny_bundle, tmp_path, monkeypatch):
    encode(folder, tiny_bundle, tmp_path / "expected", batch_size=4)
    real, calls = VaeRuntime.encode, []

    def small(self, x, *arguments, **options):
        calls.append(len(x))
        if len(x) > 1:
            raise OutOfMemoryError("too large")
        return real(self, x, *arguments, **options)

    monkeypatch.setattr(VaeRuntime, "encode", small)
    assert encode(folder, tiny_bundle, tmp_path / "out", batch_size=4).failed == 0
    assert max(calls) > 2
    expected = {entry.id: entry.latents for entry in LatentDataset(tmp_path / "expected")}
    for entry in LatentDataset(tmp_path / "out"):
        np.testing.assert_allclose(entry.latents, expected.pop(entry.id), atol=ROUNDING)
    assert not expected


def test_an_image_that_does_not_fit_memory_is_listed_and_tried_again(folder, tiny_bundle, tmp_path, monkeypatch):
    real = VaeRuntime.encode

    def small(self, x, *arguments, **options):
        if x.shape[3] == 40:
            raise OutOfMemoryError("too large")
        return real(self, x, *arguments, **options)

    monkeypatch.setattr(VaeRuntime, "encode", small)
    assert encode(folder, tiny_bundle, tmp_path / "out").failed == 3
    assert "--memory-budget" in errors_of(tmp_path / "out")["002.png"]
    monkeypatch.undo()
    summary = encode(folder, tiny_bundle, tmp_path / "out")
    assert (summary.encoded, summary.unchanged, summary.failed) == (3, 7, 0)


def test_nan_is_listed_and_not_stored(folder, tiny_bundle, tmp_path, monkeypatch):
    real = VaeRuntime.encode

    def bad(self, x, *arguments, **options):
        output = real(self, x, *arguments, **options)
        output[0].parameters[-1] = np.nan
        return output

    monkeypatch.setattr(VaeRuntime, "encode", bad)
    summary = encode(folder, tiny_bundle, tmp_path / "out")
    assert summary.failed and summary.encoded + summary.failed == 10
    assert all("NaN" in reason for reason in errors_of(tmp_path / "out").values())
    assert all(np.isfinite(entry.latents).all() for entry in LatentDataset(tmp_path / "out"))


def test_errors_of_the_backend_stop_the_job(folder, tiny_bundle, tmp_path, monkeypatch):
    def broken(self, x):
        raise NumericsError("no")

    monkeypatch.setattr(VaeRuntime, "encode", broken)
    with pytest.raises(NumericsError):
        encode(folder, tiny_bundle, tmp_path / "out")


def test_two_jobs_at_once_are_refused(folder, tiny_bundle, tmp_path):
    encode(folder, tiny_bundle, tmp_path / "out")
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(BundleError, match="another job is at work"):
        encode(folder, tiny_bundle, tmp_path / "out")


def test_a_directory_of_something_else_stays_as_it_is(folder, tiny_bundle, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(BundleError, match=r"holds no latents.*--out"):
        encode(folder, tiny_bundle, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    with pytest.raises(BundleError, match="holds no latents"):
        encode(folder, tiny_bundle, tmp_path / "mine" / "thesis.tex")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"policy": "stretch"}, "no policy 'stretch'.*none, center-crop, buckets"),
        ({"sizes": ((50, 40),)}, "50x40.*multiples of 8, such as 48x40"),
        ({"policy": "center-crop"}, "center-crop one"),
        ({"storage": {"dtype": "fp8"}}, "dtype 'fp8'.*float32, float16, bfloat16"),
        ({"storage": {"stored": "mode"}}, "stored 'mode'"),
        ({"images_per_shard": 0}, "images_per_shard must be"),
    ],
)
def test_wrong_options_are_named_with_what_is_right(options, said, folder, tiny_bundle, tmp_path):
    with pytest.raises(ConfigError, match=said):
        encode(folder, tiny_bundle, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
