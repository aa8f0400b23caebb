"""What a user gets from pip: extras, package data, and a bundle that runs in a clean environment without PyTorch."""

import email
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import vae_export
from runtimes import BackendUnavailable

REPOSITORY = Path(__file__).parent.parent
DESIGNED_EXTRAS = {
    *("export", "cpu", "gpu", "tensorrt", "rtx", "openvino", "int8"),
    *("diffusers", "flax", "dataset", "ray", "sign", "report", "docs", "dev"),
}

ROUNDTRIP = """
import importlib.util, sys
import numpy as np
from runtimes import open_vae
import vae_export, vae_export.cli.app

assert sys.prefix != sys.base_prefix and vae_export.__file__.startswith(sys.prefix)
assert not any(importlib.util.find_spec(name) for name in ("torch", "onnx", "safetensors"))
with open_vae(sys.argv[1]) as vae:
    z = vae.encode(np.load("x.npy")).latent_dist.mode()
    np.savez("answer.npz", z=z, y=vae.decode(z).sample)
"""


def pip(python, *arguments):
    done = subprocess.run([python, "-m", "pip", "-q", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode and re.search("NewConnectionError|name resolution|ConnectTimeout", done.stderr):
        pytest.skip("pip does not reach a package index from here")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the repository, since building leaves files in it."""
    place = tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "out", "tests")
    shutil.copytree(REPOSITORY, place / "source", ignore=unwanted)
    pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", place, place / "source")
    (path,) = place.glob("*.whl")
    return path


def test_wheel_holds_both_packages_with_model_photographs_and_types(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {
        path.relative_to(REPOSITORY).as_posix()
        for package in ("vae_export", "runtimes")
        for path in (REPOSITORY / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }
    assert packed == wanted
    assert {"vae_export/py.typed", "runtimes/py.typed", "vae_export/assets/tiny/config.json"} <= packed
    assert any(re.fullmatch(r"vae_export/assets/photos/\w+\.jpg", name) for name in packed)


def test_extras_are_those_of_the_design_and_of_the_error_messages(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    extras = set(metadata.get_all("Provides-Extra", []))
    assert metadata["Version"] == vae_export.__version__
    assert extras == DESIGNED_EXTRAS
    source = "".join(
        path.read_text() for package in ("vae_export", "runtimes") for path in REPOSITORY.glob(f"{package}/*.py")
    )
    advised = {extra for listed in re.findall(r"vae-export\[([\w,]+)\]", source) for extra in listed.split(",")}
    assert advised and advised <= extras
    core = " ".join(line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line)
    assert "numpy" in core and not re.search("torch|onnx|safetensors|hub", core)


def test_bundle_runs_in_a_clean_environment_without_torch(wheel, tiny_bundle, vae, tmp_path):
    """About a quarter of a minute; pip fetches onnxruntime and what else the extra `cpu` needs."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip(python, "install", f"{wheel}[cpu]")
    x = np.random.default_rng(0).uniform(-1, 1, (1, 3, 24, 16)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)

    def run(*command):
        return subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True)

    done = run(python, "-I", "-c", ROUNDTRIP, tiny_bundle)
    assert done.returncode == 0, done.stderr
    answer = np.load(tmp_path / "answer.npz")
    z = vae.encode(x).latent_dist.mode()
    # Perhaps another version of ONNX Runtime, which may sum in another order.
    np.testing.assert_allclose(answer["z"], z, atol=1e-4)
    np.testing.assert_allclose(answer["y"], vae.decode(z).sample, atol=1e-4)
    command = python.with_name("vae-export")
    assert run(command, "doctor").returncode == 0
    exporting = run(command, "--to", "onnx")
    assert exporting.returncode == BackendUnavailable.exit_code
    assert "pip install 'vae-export[export,cpu]'" in exporting.stderr
