"""Damage is found before a native parser sees a byte: a thousand single bits and a hundred ends, on every target."""

import importlib.util
import json
import shutil
from contextlib import suppress

import numpy as np
import pytest

from runtimes import Bundle, BundleError, IntegrityError, open_vae

FLIPS, CUTS = 250, 25  # of each of the four targets
PARSERS = {
    "onnx": ["onnxruntime.InferenceSession"],
    "openvino": ["openvino.Core.read_model"],
    "flax": ["jax.export.deserialize", "msgpack.unpackb"],
    "tensorrt-rtx": ["runtimes.tensorrt.runtime.LoadedPlan"],
}


@pytest.fixture(params=PARSERS)
def target(request):
    if request.param in ("openvino", "flax") and importlib.util.find_spec(request.param) is None:
        pytest.skip(f"pip install 'vae-export[{request.param}]'")
    return request.param


@pytest.fixture
def bundle(target, request, tmp_path):
    """A copy of the target's bundle, to damage and mend."""
    made = {
        "onnx": lambda: request.getfixturevalue("onnx_bundle"),
        "openvino": lambda: request.getfixturevalue("openvino_bundle")("fp32"),
        "flax": lambda: request.getfixturevalue("flax_bundle")("fp32"),
        "tensorrt-rtx": lambda: request.getfixturevalue("tensorrt_bundle")("tensorrt-rtx"),
    }[target]()
    shutil.copytree(made, tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def parsers(target, request, monkeypatch):
    """From now on no parser may be called: `pytest.fail` is no Exception that anything here would catch."""
    if target == "tensorrt-rtx":
        request.getfixturevalue("fake_gpu")
    for name in PARSERS[target]:
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("parsed"))


@pytest.fixture
def opens(target, parsers):
    """What opening a sound bundle comes to under `parsers`: that the watch works."""

    def check(path):
        with pytest.raises(pytest.fail.Exception, match="parsed"):
            open_vae(path)

    return check


def is_read(path, name):
    """Not what is listed for other programs: damage to that is for `verify` to find."""
    return name == "manifest.json" or not (
        name.endswith("config.json") or (name.endswith(".onnx") and json_of(path)["target"] == "tensorrt-rtx")
    )


def json_of(path):
    return json.loads((path / "manifest.json").read_bytes())


def assert_found(path, name, damaged):
    """The damage is found by `verify`, and by `open_vae` where it would parse the file; then the file is mended."""
    file = path / name
    sound, manifest = file.read_bytes(), json_of(path)
    file.write_bytes(damaged)
    try:
        if name == "manifest.json":
            with suppress(ValueError):
                if json.loads(damaged) == manifest:  # é as \u00E9 instead of \u00e9: no damage
                    return
            with pytest.raises(BundleError):
                open_vae(path)
            return
        with pytest.raises(IntegrityError) as error:
            Bundle(path).verify()
        assert str(error.value).startswith(f"{name} ")
        if is_read(path, name):
            with pytest.raises(IntegrityError) as error:
                open_vae(path)
            assert str(error.value).startswith(f"{name} ")
    finally:
        file.write_bytes(sound)


def files_of(path):
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())


def test_every_flipped_bit_is_found_before_anything_is_parsed(bundle, opens):
    rng, names = np.random.default_rng(0), files_of(bundle)
    contents = {name: (bundle / name).read_bytes() for name in names}
    for _ in range(FLIPS):
        name = names[rng.integers(len(names))]
        data = bytearray(contents[name])
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        assert_found(bundle, name, bytes(data))
    opens(bundle)


def test_every_cut_is_found_before_anything_is_parsed(bundle, opens):
    rng, names = np.random.default_rng(1), files_of(bundle)
    for _ in range(CUTS):
        name = names[rng.integers(len(names))]
        data = (bundle / name).read_bytes()
        assert_found(bundle, name, data[: rng.integers(len(data))])
    opens(bundle)


def test_every_digit_of_a_manifest_counts(onnx_bundle, tmp_path):
    """Damage that is JSON still: another scaling factor makes wrong pictures, and no parser would notice."""
    raw = (onnx_bundle / "manifest.json").read_bytes()
    shutil.copytree(onnx_bundle, tmp_path / "bundle")
    digits = [place for place, byte in enumerate(raw) if chr(byte).isdigit()]
    for place in digits:
        changed = raw[:place] + b"%d" % ((int(raw[place : place + 1]) + 1) % 10) + raw[place + 1 :]
        with suppress(ValueError):
            if json.loads(changed) == json.loads(raw):  # the seventeenth digit of a float may round away
                continue
        (tmp_path / "bundle" / "manifest.json").write_bytes(changed)
        with pytest.raises(BundleError, match=r"manifest\.json|schema version"):
            Bundle(tmp_path / "bundle")


def test_a_manifest_without_its_seal_opens_as_those_before_it(onnx_bundle, tmp_path):
    shutil.copytree(onnx_bundle, tmp_path / "bundle")
    manifest = json_of(onnx_bundle)
    assert list(manifest)[-1] == "manifest_sha256"
    del manifest["manifest_sha256"]
    (tmp_path / "bundle" / "manifest.json").write_text(json.dumps(manifest))
    assert Bundle(tmp_path / "bundle").manifest == Bundle(onnx_bundle).manifest
    for other in ("0" * 64, None, 1, ["a"]):
        (tmp_path / "bundle" / "manifest.json").write_text(json.dumps({**manifest, "manifest_sha256": other}))
        with pytest.raises(IntegrityError, match="was changed: its manifest_sha256"):
            Bundle(tmp_path / "bundle")
