"""Reading stored latents: the right ones or an error, by number and by id, without PyTorch; and for trainers."""

import io
import json
import pickle
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from runtimes import BundleError, CompatibilityError, ConfigError, IntegrityError, open_vae
from runtimes.latents import LatentDataset
from vae_export.dataset import Opening, encode_dataset
from vae_export.dataset_encode import Storage
from vae_export.dataset_exporters import export_latents
from vae_export.dataset_sources import open_source

SIZES = [(64, 48), (48, 64), (64, 48), (56, 56), (64, 48), (48, 64)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for n, (width, height) in enumerate(SIZES):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(root / f"{n}.png")
    return root


@pytest.fixture(scope="module")
def stored(source, tiny_bundle, tmp_path_factory):
    """stored(storage): a directory of latents of the six images, made once. Do not change it."""
    made = {}

    def make(storage=Storage()):  # noqa: B008  (frozen)
        if storage not in made:
            made[storage] = tmp_path_factory.mktemp("latents") / "latents"
            options = {"workers": 0, "images_per_shard": 4, "storage": storage}
            encode_dataset(open_source(source), made[storage], Opening(str(tiny_bundle)), **options)
        return made[storage]

    return make


@pytest.fixture
def copied(stored, tmp_path):
    shutil.copytree(stored(), tmp_path / "copy")
    return tmp_path / "copy"


def test_entries_come_by_number_and_by_id(stored):
    dataset = LatentDataset(stored())
    assert len(dataset) == len(list(dataset)) == 6
    assert [entry.id for entry in dataset] == dataset.ids.to_pylist()
    for number, entry in enumerate(dataset):
        assert dataset.find(entry.id) == number and dataset[number - 6].id == entry.id
        assert np.array_equal(dataset.by_id(entry.id).latents, entry.latents)
        assert entry.latents.shape[1:] == tuple(dataset.sizes[number])
    for beyond in (6, -7):
        with pytest.raises(IndexError, match="of 6"):
            dataset[beyond]
    with pytest.raises(KeyError, match=r"no latents of .x\.png."):
        dataset.by_id("x.png")


def test_what_is_read_is_the_callers_own(stored):
    dataset = LatentDataset(stored())
    entry = dataset[0]
    entry.latents[:] = 0
    assert dataset[0].latents.any()


def test_shards_are_safetensors_like_any_other(stored):
    dataset = LatentDataset(stored())
    for path in sorted((dataset.path / "shards").iterdir()):
        with safe_open(path, "np") as file:
            names = set(file.keys())
            assert {"ids", "id_ends", "flipped", "sha256", "original_size", "resized", "crop"} < names
            for name in names:
                assert file.get_tensor(name) is not None
    first = next(entry for entry in dataset if entry.id == "0.png")
    with safe_open(dataset.path / "shards" / "00000000.safetensors", "np") as file:
        assert (file.get_tensor("latents.6x8") == first.latents).all((1, 2, 3)).any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_tensors_where_they_are_wanted(stored, dtype):
    storage = Storage(dtype=dtype)
    arrays, tensors = LatentDataset(stored(storage)), LatentDataset(stored(storage), torch=True)
    for array, tensor in zip(arrays, tensors, strict=True):
        assert tensor.latents.dtype == getattr(torch, dtype)
        assert np.array_equal(tensor.latents.float().numpy(), np.asarray(array.latents, np.float32))
    loader = torch.utils.data.DataLoader(tensors, batch_size=None, num_workers=0)
    assert [entry.id for entry in loader] == [entry.id for entry in arrays]


def test_it_goes_to_other_processes_as_its_path(stored):
    dataset = LatentDataset(stored())
    data = pickle.dumps(dataset)
    assert len(data) < 2000
    assert [entry.id for entry in pickle.loads(data)] == [entry.id for entry in dataset]


def test_no_torch_and_no_backend_is_needed(stored):
    code = (
        "import sys; from runtimes.latents import LatentDataset; d = LatentDataset(sys.argv[1]); print(len(list(d)));"
        "assert not {'torch', 'onnxruntime', 'onnx', 'vae_export'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(stored())], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("6\n", "")


# The contract -----------------------------------------------------------------------------------------------------


def test_what_the_caller_wants_is_held_against_the_contract(stored, tiny_bundle):
    path = stored()
    weights = LatentDataset(path).contract["vae"]["weights_sha256"]
    with open_vae(tiny_bundle) as vae:
        for identity in (tiny_bundle, vae, *([weights] if weights else [])):
            LatentDataset(path, vae=identity, stored="mean", scaled=True, policy="none")
    for said, says in (
        ({"stored": "sample"}, "stored is 'mean', not 'sample'"),
        ({"scaled": False}, "scaled is True, not False"),
        ({"policy": "buckets"}, "policy is 'none', not 'buckets'"),
        ({"size": (512, 512)}, "sizes of images are any, not 512x512 alone"),
        ({"vae": "0" * 64}, "which weights|weights_sha256"),
    ):
        with pytest.raises(CompatibilityError, match=says):
            LatentDataset(path, **said)


def test_another_vae_is_refused(stored, tiny_bundle, tmp_path):
    shutil.copytree(tiny_bundle, tmp_path / "other")
    manifest = tmp_path / "other" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"precision": "fp32"', '"precision":  "fp32"', 1))
    with pytest.raises(CompatibilityError, match="was made by a VAE of"):
        LatentDataset(stored(), vae=tmp_path / "other")


@pytest.mark.parametrize(
    ("damage", "kind", "says"),
    [
        (lambda p: (p / "contract.json").unlink(), BundleError, "not latents of vae-export"),
        (lambda p: (p / "contract.json").write_text("{"), IntegrityError, "contract"),
        (lambda p: (p / "contract.json").write_text("[" * 100_000), IntegrityError, "contract"),
        (lambda p: (p / "contract.json").write_text('{"schema_version": 1}'), IntegrityError, "lacks vae"),
        (lambda p: (p / "contract.json").write_text('{"schema_version": 9}'), CompatibilityError, "9"),
        (lambda p: (p / "index.parquet").unlink(), BundleError, "index.parquet|finished"),
        (lambda p: (p / "index.parquet").write_bytes(b"PAR1 junk PAR1"), IntegrityError, "index.parquet"),
    ],
)
def test_a_damaged_directory_says_so(copied, damage, kind, says):
    damage(copied)
    with pytest.raises(kind, match=says):
        LatentDataset(copied)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:4],
        lambda data: b"",
        lambda data: (2**63).to_bytes(8, "little") + data[8:],
        lambda data: data[:8] + b"[" * 50 + data[58:],
        lambda data: data.replace(b'"F16"', b'"Q16"', 1),
    ],
)
def test_a_damaged_shard_is_an_error_and_no_latents(copied, damage):
    path = copied / "shards" / "00000000.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(IntegrityError, match=r"00000000\.safetensors"):
        list(LatentDataset(copied))


# For trainers -----------------------------------------------------------------------------------------------------


def test_sd_scripts_finds_what_it_caches_itself(stored, tmp_path):
    dataset = LatentDataset(stored(Storage(flips=True)))
    export_latents(dataset, tmp_path / "npz", "sd-scripts", model="sdxl")
    assert len(list((tmp_path / "npz").iterdir())) == 6
    entry, flipped = dataset.by_id("0.png"), dataset.by_id("0.png", flipped=True)
    with np.load(tmp_path / "npz" / "0_0064x0048_sdxl.npz") as found:
        # Raw there: the trainer scales them itself.
        for name, each in (("latents", entry), ("latents_flipped", flipped)):
            expected = each.latents.astype(np.float32) / 0.5 + 0.1
            np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-5)
        assert found["original_size"].tolist() == [64, 48] and found["crop_ltrb"].tolist() == [0, 0, 64, 48]


def test_webdataset_and_parquet_hold_every_entry(stored, tmp_path):
    dataset = LatentDataset(stored())
    export_latents(dataset, tmp_path / "tars", "webdataset")
    with tarfile.open(tmp_path / "tars" / "00000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    export_latents(dataset, tmp_path / "tables", "parquet")
    rows = pq.read_table(tmp_path / "tables").to_pylist()
    for number, entry in enumerate(dataset):
        assert np.array_equal(np.load(io.BytesIO(members[f"{number:09}.npy"])), entry.latents)
        assert json.loads(members[f"{number:09}.json"])["id"] == rows[number]["id"] == entry.id
        assert np.array_equal(np.array(rows[number]["latents"], np.float16), entry.latents)


def test_what_cannot_be_exported_leaves_nothing(stored, tmp_path):
    dataset = LatentDataset(stored())
    for to, model, says in (("npz", None, "'npz'"), ("sd-scripts", None, "--model"), ("sd-scripts", "sd9", "sd9")):
        with pytest.raises(ConfigError, match=says):
            export_latents(dataset, tmp_path / "out", to, model=model)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(BundleError, match="exists"):
        export_latents(dataset, tmp_path / "full", "parquet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
