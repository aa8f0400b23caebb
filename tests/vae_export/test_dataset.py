"""A dataset's latents: what is stored, and that no interruption, corrupt image or edit costs any of them."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from runtimes import BundleError, ConfigError, OutOfMemoryError, open_vae
from runtimes.images import load_image
from runtimes.latents import LatentDataset
from vae_export.dataset import Opening, encode_dataset
from vae_export.dataset_encode import Storage
from vae_export.dataset_images import SDXL_BUCKETS, SizePolicy, parse_sizes
from vae_export.dataset_sources import open_source

COMMAND = str(Path(sys.executable).with_name("vae-export"))
# What is stored is rounded to fp16: half a step of 11 bits of the largest latent, and other kernels for other batches.
HALF = 2.0**-10
SIZES = [(64, 48), (48, 64), (64, 48), (80, 56), (64, 48), (48, 64), (33, 50), (64, 48), (48, 64), (64, 48)]


def picture(seed, size):
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def encoded(image, format="PNG"):
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


@pytest.fixture(scope="module")
def pictures():
    """{id: bytes of a PNG}: ten images, in folders, of four sizes."""
    return {f"{'ab'[n % 2]}/{n:02}.png": encoded(picture(n, size)) for n, size in enumerate(SIZES)}


@pytest.fixture
def folder(pictures, tmp_path):
    for name, data in pictures.items():
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(data)
    return tmp_path / "images"


@pytest.fixture
def job(tiny_bundle, folder, tmp_path):
    """job(out, options): the latents of the folder -> (its summary, the directory)."""

    def run(out="latents", source=None, **options):
        options = {"workers": 0, "images_per_shard": 4, "batch_size": 3, **options}
        found = encode_dataset(open_source(source or folder), tmp_path / out, Opening(str(tiny_bundle)), **options)
        return found, tmp_path / out

    return run


def files_of(directory):
    """{name: sha256} of what a job wrote, but for its plan, which is a database."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not path.name.startswith(("plan.sqlite", ".lock"))
    }


# What is stored ---------------------------------------------------------------------------------------------------


def test_latents_are_those_of_the_runtime(job, tiny_bundle, folder):
    summary, out = job()
    assert (summary.images, summary.encoded, summary.failed, summary.shards_written) == (10, 10, 0, 3)
    latents = LatentDataset(out, vae=tiny_bundle, stored="mean", scaled=True, policy="none")
    assert sorted(latents.ids.to_pylist()) == sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.png"))
    with open_vae(tiny_bundle) as vae:
        for entry in latents:
            pixels = load_image(folder / entry.id)
            top, left = entry.crop
            height, width = (side - side % 8 for side in pixels.shape[:2])
            assert entry.original_size == entry.resized == pixels.shape[:2]
            assert (top, left) == ((pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2)
            expected = vae.images_to_latents(pixels[top : top + height, left : left + width])[0]
            assert entry.latents.dtype == np.float16
            np.testing.assert_allclose(entry.latents, expected, rtol=0, atol=HALF * np.abs(expected).max())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("stored", "scaled"), [("moments", False), ("mean", False), ("sample", True)])
def test_the_posterior_is_stored_as_it_is_wanted(job, tiny_bundle, folder, stored, scaled, dtype):
    _, out = job(storage=Storage(stored, scaled, dtype))
    dataset = LatentDataset(out, stored=stored, scaled=scaled)
    entry = dataset.by_id("a/00.png")
    with open_vae(tiny_bundle) as vae:
        pixels = load_image(folder / entry.id)
        posterior = vae.encode(pixels[None].transpose(0, 3, 1, 2) / np.float32(127.5) - 1)[0]
    assert len(entry.latents) == (8 if stored == "moments" else 4)
    step = {"float32": 1e-5, "float16": HALF, "bfloat16": 2.0**-8}[dtype]
    if stored == "sample":  # unscaled and without its mean and deviation, it is noise of unit variance
        z = np.asarray(entry.latents, np.float32) / 0.5 + 0.1
        noise = (z - posterior.mean[0]) / posterior.std[0]
        assert abs(noise.mean()) < 0.3 and 0.7 < noise.std() < 1.3
    else:
        expected = (posterior.parameters if stored == "moments" else posterior.mean)[0]
        np.testing.assert_allclose(entry.latents, expected, rtol=0, atol=2 * step * np.abs(expected).max())


def test_a_sample_follows_from_the_image_and_the_seed_alone(job, folder):
    names = ("a/02.png", "a/04.png")
    (folder / "zz.png").write_bytes((folder / names[0]).read_bytes())  # the same image, in another shard
    first, second = (
        LatentDataset(job(out, storage=Storage("sample", dtype="float32", seed=seed))[1])
        for out, seed in (("one", 0), ("two", 1))
    )
    again = LatentDataset(job("three", storage=Storage("sample", dtype="float32"), batch_size=1)[1])
    for name in names:
        np.testing.assert_allclose(first.by_id(name).latents, again.by_id(name).latents, rtol=0, atol=1e-4)
        assert np.abs(first.by_id(name).latents - second.by_id(name).latents).max() > 0.01
    np.testing.assert_allclose(first.by_id("zz.png").latents, first.by_id(names[0]).latents, rtol=0, atol=1e-4)


def test_mirror_images_are_stored_beside_the_images(job, tiny_bundle, folder):
    _, out = job(storage=Storage(flips=True), policy="center-crop", sizes=((48, 48),))
    dataset = LatentDataset(out, policy="center-crop", size=(48, 48))
    assert len(dataset) == 20 and {tuple(size) for size in dataset.sizes.tolist()} == {(6, 6)}
    image = Image.open(folder / "a/00.png")  # 64x48: nothing to resize
    middle = np.asarray(image)[:, 8:56]
    with open_vae(tiny_bundle) as vae:
        for flipped, pixels in ((False, middle), (True, middle[:, ::-1])):
            expected = vae.images_to_latents(np.ascontiguousarray(pixels))[0]
            entry = dataset.by_id("a/00.png", flipped=flipped)
            assert entry.crop == (0, 8) and entry.flipped == flipped
            np.testing.assert_allclose(entry.latents, expected, rtol=0, atol=HALF * np.abs(expected).max())


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
    assert "cannot identify" in reasons["001.png"]
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
    ("policy", "sizes", "says"),
    [
        ("squash", (), "'squash'"),
        ("center-crop", (), "one --size"),
        ("center-crop", ((100, 64),), "100x64.*multiples of 8, such as 96x64"),
        ("buckets", ((64, 0),), "64x0"),
        ("none", ((64, 64),), "takes no sizes"),
    ],
)
def test_sizes_that_cannot_be_are_refused(policy, sizes, says):
    with pytest.raises(ConfigError, match=says):
        SizePolicy(policy, sizes, 8)


def test_the_buckets_of_sdxl_are_a_megapixel_each():
    assert parse_sizes("sdxl") == SDXL_BUCKETS and len(set(SDXL_BUCKETS)) == len(SDXL_BUCKETS)
    assert all(w % 64 == h % 64 == 0 and 0.87 < w * h / 2**20 <= 1.02 for w, h in SDXL_BUCKETS)
    assert {(h, w) for w, h in SDXL_BUCKETS} == set(SDXL_BUCKETS)
    with pytest.raises(ConfigError, match="'big'"):
        parse_sizes("64x64,big")


# Sources ----------------------------------------------------------------------------------------------------------


def as_tars(pictures, root):
    root.mkdir()
    for shard in range(2):
        with tarfile.open(root / f"shard-{shard}.tar", "w") as tar:
            for n, data in list(enumerate(pictures.values()))[shard::2]:
                for suffix, content in (("png", data), ("txt", b"a caption")):
                    member = tarfile.TarInfo(f"{n:03}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return root


def as_parquet(pictures, root):
    root.mkdir()
    table = pa.table({"image": list(pictures.values()), "caption": ["a"] * len(pictures)})
    pq.write_table(table, root / "all.parquet", row_group_size=3)
    return root


def as_structs(pictures, root):
    root.mkdir()
    cells = [{"bytes": data, "path": name} for name, data in pictures.items()]
    pq.write_table(pa.table({"image": cells, "thumbnail": cells, "key": list(pictures)}), root / "all.parquet")
    return root


def as_datasets(pictures, root):
    """As `datasets.save_to_disk` writes it."""
    root.mkdir()
    table = pa.table({"image": [{"bytes": data, "path": None} for data in pictures.values()]})
    with pa.ipc.new_stream(root / "data-00000-of-00001.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=4)
    (root / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (root / "dataset_info.json").write_text("{}")
    return root


@pytest.mark.parametrize(
    ("make", "first"),
    [(as_tars, "shard-0/000.png"), (as_parquet, "all.parquet:0"), (as_datasets, "data-00000-of-00001.arrow:0")],
)
def test_every_source_gives_the_same_latents(job, pictures, tmp_path, make, first):
    expected = LatentDataset(job()[1])
    summary, out = job("other", make(pictures, tmp_path / "source"))
    found = LatentDataset(out)
    assert summary.encoded == len(found) == len(pictures)
    # Other images are beside them in a batch: to rounding.
    np.testing.assert_allclose(
        found.by_id(first).latents.astype(float), expected.by_id("a/00.png").latents, rtol=0, atol=0.01
    )


def test_where_several_columns_could_be_meant_one_has_to_be_said(job, pictures, tmp_path):
    root = as_structs(pictures, tmp_path / "source")
    with pytest.raises(ConfigError, match=r"--image-column; it has x .*, y .*, key"):
        pq.write_table(pq.read_table(root / "all.parquet").rename_columns(["x", "y", "key"]), tmp_path / "xy.parquet")
        open_source(tmp_path / "xy.parquet")
    with pytest.raises(ConfigError, match="no column 'key' of image bytes"):
        open_source(root, image_column="key")
    source = open_source(root, image_column="thumbnail", id_column="key")
    assert [item.id for item in source.items()] == list(pictures)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: p, "does not exist"),
        (lambda p: p.mkdir(), "no images"),
        (lambda p: p.write_bytes(b"x"), "not a directory"),
        (
            lambda p: (p.mkdir(), (p / "a.tar").write_bytes(b"junk" * 999)),
            "a.tar cannot be read as an uncompressed tar",
        ),
        (lambda p: (p.mkdir(), (p / "a.parquet").write_bytes(b"junk")), "a.parquet cannot be read"),
        (lambda p: (p.mkdir(), (p / "state.json").write_bytes(b"{")), "state.json"),
        (lambda p: (p.mkdir(), (p / "a.tar").touch(), (p / "a.png").touch()), "--format"),
    ],
)
def test_what_is_no_source_says_why(job, tmp_path, make, says):
    make(tmp_path / "source")
    with pytest.raises(ConfigError, match=says):
        job(source=tmp_path / "source")


def test_an_id_that_stands_twice_is_named(pictures, tiny_bundle, tmp_path):
    pq.write_table(pa.table({"image": list(pictures.values()), "id": ["same"] * 10}), tmp_path / "twice.parquet")
    source = open_source(tmp_path / "twice.parquet", id_column="id")
    with pytest.raises(ConfigError, match="'same' stands twice"):
        encode_dataset(source, tmp_path / "out", Opening(str(tiny_bundle)), workers=0)


# Images that are broken -------------------------------------------------------------------------------------------


def test_broken_images_are_listed_and_take_none_with_them(job, folder):
    good = (folder / "a/00.png").read_bytes()
    broken = {
        "a/empty.png": b"",
        "a/text.jpg": b"no image",
        "b/cut.png": good[:-60],
        "b/speck.png": encoded(picture(0, (7, 7))),
    }
    for name, data in broken.items():
        (folder / name).write_bytes(data)
    (folder / "a/fifo.png").symlink_to("/nowhere")
    summary, out = job()
    assert (summary.images, summary.encoded, summary.failed) == (15, 10, 5)
    listed = {row["id"]: row["reason"] for row in pq.read_table(out / "errors.parquet").to_pylist()}
    assert listed.keys() == {*broken, "a/fifo.png"} and all(listed.values())
    assert "empty" in listed["a/empty.png"] and "smaller than one latent" in listed["b/speck.png"]
    assert len(LatentDataset(out)) == 10
    # Again: what is broken for good is not tried again, nor is anything written.
    before = files_of(out)
    again, _ = job()
    assert (again.encoded, again.failed, again.shards_written) == (0, 5, 0) and files_of(out) == before
    (folder / "b/cut.png").write_bytes(good)
    mended, _ = job()
    assert (mended.encoded, mended.failed) == (1, 4) and len(LatentDataset(out)) == 11


def test_an_image_that_kills_its_process_is_broken_alone(job, folder, monkeypatch):
    """A decoder that crashes: here one that is killed by a plug-in of Pillow in the worker."""
    (folder / "a/deadly.png").write_bytes(b"deadly")
    (folder.parent / "sitecustomize.py").write_text(
        "import os, vae_export.dataset_images as d\n"
        "old = d.prepare\n"
        "def prepare(source, item, known, policy):\n"
        "    if item.id == 'a/deadly.png': os._exit(9)\n"
        "    return old(source, item, known, policy)\n"
        "import vae_export.dataset_workers as w\n"
        "w.prepare = prepare\n"
    )
    paths = [str(folder.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    summary, out = job(workers=1)
    assert (summary.encoded, summary.failed) == (10, 1)
    (row,) = pq.read_table(out / "errors.parquet").to_pylist()
    assert row["id"] == "a/deadly.png" and "died" in row["reason"]


def test_memory_that_runs_out_halves_the_batch_and_loses_nothing(job, tiny_bundle, monkeypatch):
    from runtimes.onnxruntime import OnnxRuntimeVae

    expected = LatentDataset(job()[1])
    run = OnnxRuntimeVae._run

    def short(self, graph, x):
        if len(x) > 1:
            raise OutOfMemoryError("one at a time")
        return run(self, graph, x)

    monkeypatch.setattr(OnnxRuntimeVae, "_run", short)
    summary, out = job("short")
    assert (summary.encoded, summary.failed) == (10, 0)
    for entry in LatentDataset(out):
        np.testing.assert_allclose(entry.latents.astype(float), expected.by_id(entry.id).latents, rtol=0, atol=0.01)


# Again, and interrupted -------------------------------------------------------------------------------------------


def test_the_same_command_again_writes_nothing(job):
    _, out = job()
    before = files_of(out)
    again, _ = job()
    assert (again.encoded, again.unchanged, again.shards_written) == (0, 10, 0)
    assert files_of(out) == before


def test_edited_removed_and_added_images(job, folder):
    _, out = job()
    before = {entry.id: entry for entry in LatentDataset(out)}
    stamps = (folder / "a/00.png").stat()
    (folder / "a/00.png").write_bytes(encoded(picture(99, (64, 48))))
    os.utime(folder / "a/00.png", ns=(stamps.st_atime_ns, stamps.st_mtime_ns))  # nobody could tell by its time
    (folder / "b/01.png").unlink()
    (folder / "a/new.png").write_bytes(encoded(picture(7, (48, 64))))
    summary, _ = job()
    assert (summary.encoded, summary.removed, summary.unchanged) == (2, 1, 8)
    after = {entry.id: entry for entry in LatentDataset(out)}
    assert after.keys() == before.keys() - {"b/01.png"} | {"a/new.png"}
    assert np.abs(after["a/00.png"].latents - before["a/00.png"].latents).max() > 0.1
    for name in after.keys() & before.keys() - {"a/00.png"}:
        assert np.array_equal(after[name].latents, before[name].latents)


def test_any_number_of_workers_writes_the_same_bytes(job):
    expected = files_of(job("one")[1])
    assert files_of(job("two", workers=2)[1]) == expected


@pytest.mark.parametrize("moment", [0.0, 0.3, 0.6, 0.9])
def test_killed_at_any_moment_it_goes_on_and_ends_with_the_same_bytes(tiny_bundle, folder, tmp_path, moment):
    """SIGKILL while shards come; `moment` is which share of them is there."""

    def command(out):
        options = ["--bundle", tiny_bundle, "--out", tmp_path / out, "--workers", 1, "--shard-images", 1, "--batch", 1]
        return [COMMAND, "encode-dataset", str(folder), *map(str, options), "--json"]

    def run(out):
        return json.loads(subprocess.run(command(out), capture_output=True, text=True, check=True).stdout)

    killed, shards = tmp_path / "killed", tmp_path / "killed" / "shards"
    with subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while len(list(shards.glob("*.safetensors"))) < 10 * moment and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    there = len(list(shards.glob("*.safetensors")))
    found = run("killed")
    assert found["encoded"] == 10 - there  # what was there whole was not done again
    run("whole")
    assert files_of(killed) == files_of(tmp_path / "whole")


def test_another_contract_is_refused_with_what_differs(job):
    _, out = job()
    before = files_of(out)
    with pytest.raises(ConfigError, match='stored is "mean" there and "sample" now'):
        job(storage=Storage("sample"))
    with pytest.raises(ConfigError, match="images_per_shard is 4 there and 5 now"):
        job(images_per_shard=5)
    with pytest.raises(ConfigError, match="policy"):
        job(policy="center-crop", sizes=((64, 64),))
    assert files_of(out) == before


def test_a_directory_that_is_something_else_is_left_alone(job, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(BundleError, match="holds no latents; it stays as it is"):
        job("mine")
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]


def test_another_source_is_not_taken_for_the_same(job, tmp_path, pictures):
    job()
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "x.png").write_bytes(pictures["a/00.png"])
    with pytest.raises(ConfigError, match="another source"):
        job(source=tmp_path / "others")


def test_two_jobs_do_not_work_on_one_directory(job, tmp_path):
    from filelock import FileLock

    _, out = job()
    with FileLock(out / ".lock"), pytest.raises(BundleError, match="another job is at work"):
        job()


def test_a_full_disk_is_an_error_and_making_room_goes_on(job, monkeypatch):
    import vae_export.dataset_shards as shards

    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 6:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(shards.os, "fsync", full)
    with pytest.raises(BundleError, match="No space left on device; make room and run the same command again"):
        job()
    monkeypatch.setattr(shards.os, "fsync", fsync)
    summary, out = job()
    assert 0 < summary.encoded < 10 or summary.unchanged
    assert files_of(out) == files_of(job("whole")[1])


# The command ------------------------------------------------------------------------------------------------------


def test_errors_of_the_command_are_one_line(tiny_bundle, tmp_path):
    for options, says in (
        (["nowhere", "--bundle", tiny_bundle, "--out", "x"], "nowhere does not exist"),
        ([tmp_path, "--bundle", tiny_bundle, "--out", "x", "--policy", "center-crop"], "--size"),
        ([tmp_path, "--bundle", tiny_bundle, "--out", "x", "--dtype", "fp8"], "'fp8'"),
        ([tmp_path, "--bundle", tiny_bundle, "--out", "x", "--store", "moments"], "--unscaled"),
    ):
        done = subprocess.run(
            [COMMAND, "encode-dataset", *map(str, options)], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode >= 4 and done.stdout == "" and says in done.stderr, done.stderr
        assert done.stderr.startswith("error (") and len(done.stderr.splitlines()) <= 3
