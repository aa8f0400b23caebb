"""Reading stored latents: by number and by id, with and without PyTorch; refused where they are not what is wanted.

Tests runtimes/latents/dataset.py, runtimes/latents/shards.py.
"""

import contextlib
import json
import pickle
import shutil
import sys
from typing import Any

import numpy as np
import pytest
import torch

from runtimes import Bundle, BundleError, CompatibilityError, ConfigError, IntegrityError
from runtimes.latents import LatentDataset
from runtimes.latents.shards import from_stored, open_shard, to_stored
from tests.helpers.dataset_samples import encode, image_bytes, make_folder

pytest.importorskip("pyarrow", reason="pip install 'vae-export[dataset]'")

READ = """
import sys
from runtimes.latents import LatentDataset
dataset = LatentDataset(sys.argv[1], vae=sys.argv[2])
print(len(dataset), dataset.by_id("001.png").latents.shape)
print(*({"torch", "onnx", "vae_export", "safetensors"} & {name.partition(".")[0] for name in sys.modules}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def made(folder, onnx_bundle, tmp_path_factory):
    """made(dtype): latents of ten images and their mirror images, in shards of four images. Do not change them."""
    paths = {}
    for dtype in ("float32", "float16", "bfloat16"):
        paths[dtype] = tmp_path_factory.mktemp("latents") / dtype
        encode(folder, onnx_bundle, paths[dtype], storage={"dtype": dtype, "flips": True})
    return paths.__getitem__


def test_by_number_by_id_and_one_after_the_other_are_the_same(made, folder):
    dataset = LatentDataset(made("float32"))
    entries = list(dataset)
    assert len(dataset) == len(entries) == 20 and len(dataset.ids) == 20
    for number, entry in enumerate(entries):
        for other in (dataset[number], dataset[number - 20], dataset.by_id(entry.id, flipped=entry.flipped)):
            assert other._replace(latents=None) == entry._replace(latents=None)
            np.testing.assert_array_equal(other.latents, entry.latents)
        assert tuple(dataset.sizes[number]) == entry.latents.shape[1:]
        assert dataset.ids[number].as_py() == entry.id
    assert {(entry.id, entry.flipped) for entry in entries} == {
        (path.relative_to(folder).as_posix(), flipped) for path in folder.rglob("*.png") for flipped in (False, True)
    }
    with pytest.raises(IndexError):
        dataset[20]
    with pytest.raises(KeyError, match=r"no latents of 'nobody\.png'"):
        dataset.by_id("nobody.png")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_torch_gets_tensors_of_the_stored_dtype(dtype, made):
    arrays, tensors = LatentDataset(made(dtype)), LatentDataset(made(dtype), torch=True)
    assert tensors[3].latents.dtype == getattr(torch, dtype)
    assert arrays[3].latents.dtype == ("float32" if dtype == "bfloat16" else dtype)
    np.testing.assert_array_equal(tensors[3].latents.float().numpy(), arrays[3].latents.astype(np.float32))
    np.testing.assert_array_equal(arrays[3].latents, LatentDataset(made(dtype))[3].latents)


def test_a_data_loader_takes_it_as_it_is(made):
    dataset: Any = LatentDataset(made("float16"), torch=True)  # not a torch.utils.data.Dataset, and need not be
    alike = np.flatnonzero((dataset.sizes == dataset.sizes[0]).all(axis=1)).tolist()
    loader = torch.utils.data.DataLoader[Any](dataset, batch_sampler=[alike[:3], alike[3:]])
    first, *_ = loader
    assert first.latents.shape == (3, *dataset[alike[0]].latents.shape)
    assert list(first.id) == [dataset[number].id for number in alike[:3]]


def test_it_goes_into_other_processes_as_its_path(made):
    dataset = LatentDataset(made("float16"), torch=True)
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again[5].latents, dataset[5].latents)


def test_it_is_read_without_torch_and_without_safetensors(made, onnx_bundle, alone):
    printed = alone(READ, made("float32"), onnx_bundle)
    assert printed[0].startswith("20 (4, ") and printed[1] == ""


def test_torch_is_not_imported_for_the_caller(made, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")
    with pytest.raises(ConfigError, match="import torch before"):
        LatentDataset(made("float16"), torch=True)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_shards_are_safetensors_to_others(dtype, made):
    """Their own library reads them, and sees what is documented."""
    from safetensors.torch import load_file

    path = made(dtype) / "shards" / "00000000.safetensors"
    tensors, shard = load_file(path), open_shard(path)
    latents = {name: tensor for name, tensor in tensors.items() if name.startswith("latents.")}
    assert len(shard) == 8 and sum(map(len, latents.values())) == 8
    for name, tensor in latents.items():
        height, width = map(int, name.removeprefix("latents.").split("x"))
        assert tensor.dtype == getattr(torch, dtype) and tensor.shape[2:] == (height, width)
    ends = tensors["id_ends"].tolist()
    text = bytes(tensors["ids"].tolist())
    assert [text[start:end].decode() for start, end in zip([0, *ends], ends, strict=False)] == shard.ids


def test_bfloat16_is_rounded_as_torch_does():
    rng = np.random.default_rng(0)
    values = np.concatenate(
        [rng.standard_normal(10_000, np.float32), np.array([0, -0.0, 1e-40, 3e38, 1.00390625], np.float32)]
    )
    expected = torch.from_numpy(values).bfloat16()
    np.testing.assert_array_equal(from_stored(to_stored(values, "bfloat16")), expected.float().numpy())


# What is refused ----------------------------------------------------------------------------------------------------


def test_what_the_caller_says_is_held_against_the_contract(made, onnx_bundle):
    path = made("float32")
    LatentDataset(path, vae=onnx_bundle, stored="mean", scaled=True, policy="buckets")
    LatentDataset(path, vae=Bundle(onnx_bundle))
    refused: list[tuple[dict[str, Any], str]] = [
        ({"stored": "sample"}, "stored is 'mean', not 'sample'"),
        ({"scaled": False}, "scaled is True, not False"),
        ({"policy": "none"}, "policy is 'buckets', not 'none'"),
        ({"size": (40, 48)}, "sizes of images are 48x40, 40x48, not 40x48 alone"),
    ]
    for said, error in refused:
        with pytest.raises(CompatibilityError, match=error):
            LatentDataset(path, **said)


def test_latents_of_another_vae_are_refused(folder, bundle_copy, tmp_path):
    ours, others = (bundle_copy(lambda m, w=w: m["source"].update(weights_sha256=w * 64)) for w in "ab")
    encode(folder, ours, tmp_path / "out")
    LatentDataset(tmp_path / "out", vae=ours)
    LatentDataset(tmp_path / "out", vae="A" * 64)
    for other in (others, "b" * 64):
        with pytest.raises(CompatibilityError, match=r"weights_sha256 a{64}, not b{64}: encode the images"):
            LatentDataset(tmp_path / "out", vae=other)


def test_a_job_that_has_not_finished_is_not_read(made, tmp_path):
    out = shutil.copytree(made("float32"), tmp_path / "out")
    (out / "index.parquet").unlink()
    with pytest.raises(BundleError, match="has not finished; run encode-dataset again"):
        LatentDataset(out)
    with pytest.raises(BundleError, match=r"no contract\.json: not latents"):
        LatentDataset(tmp_path)


def test_contracts_that_cannot_be_read(made, tmp_path):
    out = shutil.copytree(made("float32"), tmp_path / "out")
    contract = json.loads((out / "contract.json").read_bytes())
    (out / "contract.json").write_text(json.dumps(contract | {"schema_version": 1}))
    with pytest.raises(CompatibilityError, match=r"schema version 1.*encode the images again"):
        LatentDataset(out)
    for text in ("{", "[]", '{"schema_version": 2}'):
        (out / "contract.json").write_text(text)
        with pytest.raises(IntegrityError, match="not a contract"):
            LatentDataset(out)


def test_files_that_are_damaged(made, tmp_path):
    out = shutil.copytree(made("float32"), tmp_path / "out")
    shard = out / "shards" / "00000000.safetensors"
    whole = shard.read_bytes()
    for data in (b"", whole[:7], whole[:1000], whole[:-10], b"\xff" * 100):
        shard.write_bytes(data)
        with pytest.raises(IntegrityError):
            LatentDataset(out)[0]
    shard.unlink()
    with pytest.raises(BundleError, match="cannot be read"):
        LatentDataset(out)[0]
    (out / "index.parquet").write_bytes(b"PAR1")
    with pytest.raises(IntegrityError, match="not readable"):
        LatentDataset(out)


def test_a_header_cannot_lead_out_of_the_file(made, tmp_path):
    """Whatever a byte of it is changed to, it is an error of ours or other numbers, never another exception."""
    source = made("float32") / "shards" / "00000000.safetensors"
    whole, rng = bytearray(source.read_bytes()), np.random.default_rng(0)
    length = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(300):
        data = whole.copy()
        data[int(rng.integers(length))] = int(rng.integers(256))
        (tmp_path / "shard").write_bytes(data)
        with contextlib.suppress(IntegrityError, CompatibilityError):
            open_shard(tmp_path / "shard")


def test_latents_that_are_written_anew_meanwhile_are_not_mixed_up(tmp_path, onnx_bundle):
    folder = make_folder(tmp_path / "images", 4)
    encode(folder, onnx_bundle, tmp_path / "out")
    opened = LatentDataset(tmp_path / "out")
    (folder / "000.png").write_bytes(image_bytes(50))
    encode(folder, onnx_bundle, tmp_path / "out")
    with pytest.raises(IntegrityError, match="open them again"):
        opened.by_id("000.png")
