"""Bundles that version 0.1 made are opened by this one, and give what its reference gave: see tools/make_golden.py."""

import importlib.util
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from runtimes import Bundle, CompatibilityError, open_vae
from runtimes.manifest import Manifest

GOLDEN = Path(__file__).parent / "data" / "golden"
TARGETS = ("onnx", "openvino", "flax", "tensorrt-rtx")
#: fp32 on a CPU that sums in another order, on values of about 1; seen: 2e-6
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """golden(target): the path of its bundle."""
    directory = tmp_path_factory.mktemp("golden")
    for target in TARGETS:
        with tarfile.open(GOLDEN / f"{target}.tar.xz") as archive:
            archive.extractall(directory, filter="data")
    return lambda target: directory / target


@pytest.mark.parametrize("target", TARGETS)
def test_an_old_bundle_is_whole_and_its_manifest_is_understood(golden, target):
    bundle = Bundle(golden(target))
    bundle.verify()
    raw = (bundle.path / "manifest.json").read_bytes()
    read, written = json.loads(raw), json.loads(bundle.manifest.to_json())
    added = {key: written.pop(key) for key in written.keys() - read.keys()}
    for manifest in (read, written):
        del manifest["manifest_sha256"]  # of all the rest, with what is added
    assert written == read, "nothing of it is lost or made up"
    assert added.keys() == {"family", "latent_space"} and added["family"] == "AutoencoderKL"
    assert (added["latent_space"]["multiply"][0], added["latent_space"]["add"][0]) == (0.5, 0.25)
    assert Manifest.from_json(raw).target == target
    assert (bundle.manifest.config.scaling_factor, bundle.manifest.config.shift_factor) == (0.5, 0.25)


@pytest.mark.parametrize("target", ["onnx", "openvino", "flax"])
def test_an_old_bundle_runs_and_gives_what_it_gave(golden, target):
    if target != "onnx" and importlib.util.find_spec(target) is None:
        pytest.skip(f"pip install 'vae-export[{target}]'")
    expected = np.load(GOLDEN / "expected.npz")
    with open_vae(golden(target)) as vae:
        moments = vae.encode(expected["encoder_input"]).latent_dist.parameters
        sample = vae.decode(expected["decoder_input"])[0]
    np.testing.assert_allclose(moments, expected["encoder_output"], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(sample, expected["decoder_output"], atol=TOLERANCE, rtol=0)


def test_an_old_plan_says_how_to_build_it_again(golden, fake_gpu, monkeypatch):
    """Plans are for one version of TensorRT-RTX: what is promised of an old one is a way to a new one."""
    monkeypatch.setattr("tensorrt_rtx.__version__", "99.0")
    with pytest.raises(CompatibilityError, match=r"was built with .* 1\.7\.1.*vae-export rebuild"):
        open_vae(golden("tensorrt-rtx"))


@pytest.mark.engines
def test_an_old_plan_is_built_again_from_its_bundle(golden, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    from vae_export.targets.engines import rebuild_bundle

    rebuilt = rebuild_bundle(golden("tensorrt-rtx"), tmp_path / "new")
    rebuilt.verify()
    assert rebuilt.manifest.config == Bundle(golden("tensorrt-rtx")).manifest.config
