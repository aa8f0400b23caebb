"""Damaged latents: a resumed job makes them anew, the reader refuses them, and `verify-latents` names them.

Tests vae_export/dataset/verify.py.
"""

import json
import pickle
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from runtimes import BundleError, CompatibilityError, IntegrityError
from runtimes.latents import LatentDataset
from runtimes.latents.dataset import read_contract
from runtimes.latents.shards import check_hash, open_shard
from tests.helpers.dataset_samples import encode, make_folder, written
from vae_export.cli.app import app

pytest.importorskip("pyarrow", reason="pip install 'vae-export[dataset]'")
pytest.importorskip("filelock")

from vae_export.dataset.verify import verify_latents

SHARDS = ("shards/00000000.safetensors", "shards/00000001.safetensors", "shards/00000002.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten images, one of them broken."""
    folder = make_folder(tmp_path_factory.mktemp("images"))
    (folder / "005.png").write_bytes(b"not an image")
    return folder


@pytest.fixture(scope="module")
def made(folder, onnx_bundle, tmp_path_factory):
    """Their latents, in three shards. Do not change them."""
    out = tmp_path_factory.mktemp("latents") / "out"
    encode(folder, onnx_bundle, out)
    return out


@pytest.fixture
def own(made, tmp_path):
    """Latents to damage."""
    return shutil.copytree(made, tmp_path / "out")


def change_byte(path, place):
    """Change one byte; a float `place` is a fraction of the file."""
    data = bytearray(path.read_bytes())
    place = int(place * len(data)) if isinstance(place, float) else place
    data[place] ^= 0x01
    path.unlink()  # a mapped file must not be cut
    path.write_bytes(data)


def place_of_latents(path, number=0):
    """Offset of the first byte of an entry's latents."""
    wanted = open_shard(path).latents(number).tobytes()
    return path.read_bytes().index(wanted)


# Resuming -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 7, 20, 60, 200, 0.5, 0.8, -1])
def test_a_job_that_resumes_makes_a_damaged_shard_anew_and_no_other(place, own, made, folder, tiny_bundle):
    change_byte(own / SHARDS[0], place)
    untouched = (own / SHARDS[1]).stat().st_mtime_ns
    summary = encode(folder, tiny_bundle, own)
    assert (summary.shards_damaged, summary.shards_written, summary.encoded, summary.unchanged) == (1, 1, 4, 6)
    assert written(own) == written(made)
    assert (own / SHARDS[1]).stat().st_mtime_ns == untouched


@pytest.mark.parametrize("kind", ["empty", "cut", "longer", "missing", "exchanged"])
def test_a_job_that_resumes_repairs_shards_that_were_replaced(kind, own, made, folder, tiny_bundle):
    shard = own / SHARDS[0]
    data = shard.read_bytes()
    if kind == "missing":
        shard.unlink()
    else:
        other = (own / SHARDS[1]).read_bytes()
        shard.write_bytes({"empty": b"", "cut": data[:-1], "longer": data + b"\0", "exchanged": other}[kind])
    encode(folder, tiny_bundle, own)
    assert written(own) == written(made)


@pytest.mark.parametrize("name", ["index.parquet", "errors.parquet", "skipped.parquet"])
@pytest.mark.parametrize("place", [6, 0.3, 0.6, -2])
def test_a_job_that_resumes_writes_damaged_tables_anew(name, place, own, made, folder, tiny_bundle):
    change_byte(own / name, place)
    summary = encode(folder, tiny_bundle, own)
    assert summary.encoded == 0
    assert LatentDataset(own).ids == LatentDataset(made).ids
    assert verify_latents(own).entries == 9


def test_latents_do_not_look_finished_while_a_damaged_shard_is_made_anew(own, folder, tiny_bundle, monkeypatch):
    from runtimes.base import VaeRuntime

    change_byte(own / SHARDS[2], place_of_latents(own / SHARDS[2]))

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(VaeRuntime, "encode", killed)
    with pytest.raises(KeyboardInterrupt):
        encode(folder, tiny_bundle, own)
    with pytest.raises(BundleError, match="has not finished"):
        LatentDataset(own)


def test_a_contract_that_was_changed_is_refused(own, folder, tiny_bundle):
    text = (own / "contract.json").read_text()
    (own / "contract.json").write_text(text.replace('"scaled": true', '"scaled": false'))
    for attempt in (lambda: LatentDataset(own), lambda: encode(folder, tiny_bundle, own), lambda: verify_latents(own)):
        with pytest.raises(IntegrityError, match=r"contract\.json was changed since .*restore it"):
            attempt()


def test_the_contract_states_its_own_hash(own):
    contract = json.loads((own / "contract.json").read_bytes())
    assert len(contract.pop("sha256")) == 64
    assert read_contract(own) == contract


# Reading ------------------------------------------------------------------------------------------------------------


def test_the_reader_never_returns_latents_that_differ_from_what_was_written(own, made):
    """Every byte of an entry, in turn: that entry alone is refused."""
    path = own / SHARDS[0]
    start, size = place_of_latents(path, 1), open_shard(path).latents(1).nbytes
    whole = path.read_bytes()
    expected = [entry.latents for entry in LatentDataset(made)]
    for place in range(start, start + size, 97):
        path.write_bytes(whole)
        change_byte(path, place)
        dataset = LatentDataset(own)
        with pytest.raises(IntegrityError, match=r"is damaged: the entry of .*run the encode-dataset command again"):
            dataset[1]
        np.testing.assert_array_equal(dataset[0].latents, expected[0])
        np.testing.assert_array_equal(dataset[2].latents, expected[2])


def test_the_reader_refuses_latents_whose_dtype_was_changed(own):
    """float32 as two float16 would be read without a complaint otherwise."""
    path = own / SHARDS[0]
    path.write_bytes(path.read_bytes().replace(b'"dtype":"F32"', b'"dtype":"I32"'))
    with pytest.raises(IntegrityError):
        LatentDataset(own)[0]


def test_any_changed_byte_of_a_shard_is_an_error_or_leaves_what_is_read_as_it_was(own, made):
    path = own / SHARDS[0]
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    expected = list(LatentDataset(made))[:3]
    refused = 0
    for place in rng.integers(len(whole), size=200).tolist():
        path.write_bytes(whole)
        change_byte(path, place)
        for number, entry in enumerate(expected):
            try:
                found = LatentDataset(own)[number]
            except (IntegrityError, CompatibilityError):
                refused += 1
                continue
            assert found._replace(latents=None) == entry._replace(latents=None)
            np.testing.assert_array_equal(found.latents, entry.latents)
        with pytest.raises(IntegrityError):
            check_hash(path)
    assert refused


def test_the_reader_checks_whole_shards_on_request(own):
    path = own / SHARDS[0]
    change_byte(path, path.read_bytes().index(b"000.png"))  # an id: no entry's latents
    LatentDataset(own)[0]
    dataset = LatentDataset(own, verify=True)
    for opened in (dataset, pickle.loads(pickle.dumps(dataset))):
        with pytest.raises(IntegrityError, match="its content is not what was written"):
            opened[0]
        assert opened[len(opened) - 1].latents.size


def test_a_damaged_index_is_refused_or_read_as_it_was_written(own, made):
    """Pages have checksums. What they do not cover, statistics and versions, is not read."""
    path = own / "index.parquet"
    whole, expected = path.read_bytes(), list(LatentDataset(made).described())
    errors = []
    for place in range(0, len(whole), 41):
        path.unlink()
        path.write_bytes(whole)
        change_byte(path, place)
        try:
            found = list(LatentDataset(own).described())
        except IntegrityError as error:
            errors.append(str(error))
            continue
        assert found == expected, place
    assert all("index.parquet is not readable" in error for error in errors)
    assert any("CRC" in error and "run the encode-dataset command again" in error for error in errors)


# verify-latents -----------------------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_sound_latents_are_said_to_be_sound(made):
    done = run("verify-latents", made)
    assert done.exit_code == 0 and "sound, 3 shards with 9 latents" in done.stdout
    found = json.loads(run("verify-latents", made, "--json").stdout)
    size = sum((made / name).stat().st_size for name in SHARDS)
    assert found == {"latents": str(made), "shards": 3, "entries": 9, "failures": 1, "bytes": size}


def test_all_damaged_files_are_named(own):
    change_byte(own / SHARDS[0], 0.5)
    change_byte(own / SHARDS[2], 0)
    with pytest.raises(IntegrityError) as raised:
        verify_latents(own)
    assert f"damaged or missing: {SHARDS[0]}, {SHARDS[2]}. Run the encode-dataset command again" in str(raised.value)
    assert isinstance(run("verify-latents", own).exception, IntegrityError)


def test_missing_and_surplus_shards_and_foreign_tables_are_named(own, made, folder, tiny_bundle, tmp_path):
    (own / SHARDS[1]).rename(tmp_path / "away")
    with pytest.raises(IntegrityError, match=r"missing: shards/00000001\.safetensors\. Run"):
        verify_latents(own)
    shutil.copy(tmp_path / "away", own / SHARDS[1])
    verify_latents(own)
    shutil.copy(tmp_path / "away", own / "shards" / "00000003.safetensors")
    with pytest.raises(IntegrityError, match=r"index\.parquet"):
        verify_latents(own)
    (own / "shards" / "00000003.safetensors").unlink()
    encode(folder, tiny_bundle, tmp_path / "others", policy="center-crop", sizes=((40, 40),))
    for name in ("index.parquet", "errors.parquet"):
        shutil.copy(made / name, own / name)
    shutil.copy(tmp_path / "others" / "index.parquet", own / "index.parquet")
    with pytest.raises(IntegrityError, match=r"index\.parquet"):
        verify_latents(own)


def test_what_is_no_directory_of_finished_latents_is_refused(own, tmp_path):
    with pytest.raises(BundleError, match="not latents of vae-export"):
        verify_latents(tmp_path)
    (own / "index.parquet").unlink()
    with pytest.raises(BundleError, match="has not finished"):
        verify_latents(own)
