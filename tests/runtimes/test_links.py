"""Bundles whose files are links: in a cache of the Hugging Face Hub, and on a Kubernetes volume."""

import copy
import json
import os
import shutil

import pytest

from runtimes import Bundle, BundleError, IntegrityError, open_vae

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def in_hub_cache(bundle, cache, folder=""):
    """A copy in the layout of huggingface_hub: files are relative links to blobs -> the snapshot, or a folder of it."""
    repository = cache / "models--someone--vae"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in bundle.rglob("*") if path.is_file())):
        blob = repository / "blobs" / f"{number:064x}"
        shutil.copy(path, blob)
        link = snapshot / folder / path.relative_to(bundle)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot / folder


def on_volume(bundle, volume):
    """A copy in the layout of a ConfigMap: names are links through `..data`, itself a link to a dated directory."""
    shutil.copytree(bundle, volume / "..2026_01_01")
    (volume / "..data").symlink_to("..2026_01_01")
    for path in bundle.iterdir():
        (volume / path.name).symlink_to(f"..data/{path.name}")
    return volume


@pytest.mark.parametrize("folder", ["", "onnx/fp32"])
def test_a_snapshot_of_the_hubs_cache_opens(tiny_bundle, tmp_path, folder):
    path = in_hub_cache(tiny_bundle, tmp_path, folder)
    with open_vae(path) as vae, copy.copy(vae):
        Bundle(path).verify()


def test_a_link_to_a_snapshot_and_a_relative_path_open(tiny_bundle, tmp_path, monkeypatch):
    path = in_hub_cache(tiny_bundle, tmp_path)
    (tmp_path / "here").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    for given in ("here", path.relative_to(tmp_path)):
        Bundle(given).verify()


def test_a_volume_opens_where_its_links_are_allowed(tiny_bundle, tmp_path):
    path = on_volume(tiny_bundle, tmp_path / "volume")
    with pytest.raises(IntegrityError, match=r"symbolic link.*allow_links=DIRECTORY.*cp -rL"):
        open_vae(path)
    with open_vae(path, allow_links=path) as vae, copy.deepcopy(vae) as copied:
        assert copied._bundle.allow_links == path


def test_a_changed_blob_is_found(tiny_bundle, tmp_path):
    path = in_hub_cache(tiny_bundle, tmp_path)
    config = (path / "config.json").resolve()
    config.write_bytes(config.read_bytes().replace(b"{", b"[", 1))
    with pytest.raises(IntegrityError, match=r"config\.json was changed"):
        open_vae(path)


@pytest.mark.parametrize("name", ["manifest.json", "config.json", "vae_encoder/model.onnx"])
@pytest.mark.parametrize("layout", ["hub", "volume"])
def test_a_link_that_leads_out_of_the_root_is_refused(tiny_bundle, tmp_path, name, layout):
    inside = tmp_path / "inside"
    path = in_hub_cache(tiny_bundle, inside) if layout == "hub" else on_volume(tiny_bundle, inside)
    outside = tmp_path / "outside"
    shutil.copy(tiny_bundle / name, outside)
    target = path / name
    if layout == "volume":
        target = path / "..2026_01_01" / name
    target.unlink()
    target.symlink_to(outside)
    with pytest.raises(IntegrityError, match=f"{name} is a link to .*outside"):
        open_vae(path, allow_links=None if layout == "hub" else path)


def test_links_in_a_circle_and_to_nowhere_are_refused(tiny_bundle, tmp_path):
    for target, says in (("model.onnx", "cannot be opened"), ("nothing", "is missing")):
        path = tmp_path / target
        shutil.copytree(tiny_bundle, path)
        (path / "vae_encoder" / "model.onnx").unlink()
        (path / "vae_encoder" / "model.onnx").symlink_to(target)
        with pytest.raises(IntegrityError, match=says):
            open_vae(path, allow_links=path)


def test_a_directory_that_only_looks_like_a_cache_allows_no_links(tiny_bundle, tmp_path):
    path = in_hub_cache(tiny_bundle, tmp_path)
    (tmp_path / "models--someone--vae").rename(tmp_path / "vae")
    with pytest.raises(IntegrityError, match="symbolic link"):
        Bundle(tmp_path / "vae" / "snapshots" / path.name)


def test_the_root_of_links_is_a_directory(tiny_bundle, tmp_path):
    with pytest.raises(BundleError, match="not a directory"):
        Bundle(tiny_bundle, allow_links=tmp_path / "nothing")


def test_every_small_file_is_checked_at_opening(bundle_copy):
    """Configs are for other loaders: nothing here parses them, and a damaged one is still no sound bundle."""
    for name in ("config.json", "vae_encoder/config.json", "vae_decoder/config.json"):
        path = bundle_copy()
        assert name in json.loads((path / "manifest.json").read_bytes())["files"]
        (path / name).write_bytes((path / name).read_bytes() + b" ")
        with pytest.raises(IntegrityError, match=name):
            open_vae(path)
        (path / name).unlink()
        with pytest.raises(IntegrityError, match=f"{name} is missing"):
            open_vae(path)
