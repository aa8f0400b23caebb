"""`runtimes` runs without torch, onnx and `vae_export`: what counts is what a fresh interpreter has loaded."""

import subprocess
import sys

import pytest

import runtimes

BANNED = {"torch", "onnx", "vae_export", "safetensors", "diffusers"}


@pytest.fixture
def fresh(pytestconfig, tiny_bundle):
    """Run a program in an interpreter of its own, with warnings as errors; what it prints."""

    def run(program):
        command = [sys.executable, "-W", "error", "-c", program, str(tiny_bundle)]
        result = subprocess.run(command, cwd=pytestconfig.rootpath, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()

    return run


def test_a_bundle_is_opened_and_used_without_torch(fresh):
    output = fresh(
        """
import sys
import numpy as np
from runtimes import open_vae

with open_vae(sys.argv[1]) as vae:
    posterior = vae.encode(np.zeros((1, 3, 72, 80), np.float32)).latent_dist
    print(vae.decode(posterior.sample(np.random.default_rng(0))).sample.shape)
    vae.enable_tiling(), vae.enable_slicing()
    latents = vae.images_to_latents(np.zeros((2, 72, 80, 3), np.uint8), generator=np.random.default_rng(0))
    print(vae.latents_to_images(latents).shape)
print(*sys.modules)
"""
    )
    assert output[:2] == ["(1, 3, 72, 80)", "(2, 72, 80, 3)"]
    loaded = {name.partition(".")[0] for name in output[2].split()}
    assert {"runtimes", "onnxruntime"} <= loaded
    assert not loaded & BANNED


def test_importing_runtimes_loads_no_backend(fresh):
    loaded = {name.partition(".")[0] for name in fresh("import sys, runtimes\nprint(*sys.modules)")[0].split()}
    assert "numpy" in loaded
    assert not loaded & (BANNED | {"onnxruntime"})


def test_where_onnx_runtime_is_missing_the_error_says_what_to_install(fresh):
    output = fresh(
        """
import sys
sys.modules["onnxruntime"] = None
import runtimes
try:
    runtimes.open_vae(sys.argv[1])
except runtimes.BackendUnavailable as error:
    print(error)
"""
    )
    assert "pip install 'vae-export[cpu]'" in output[0]


def test_the_public_names():
    assert sorted(runtimes.__all__) == [
        "AutoencoderKLOutput",
        "BackendUnavailable",
        "Bundle",
        "BundleError",
        "CompatibilityError",
        "ConfigError",
        "DecoderOutput",
        "DiagonalGaussianDistribution",
        "IntegrityError",
        "NumericsError",
        "OutOfMemoryError",
        "ShapeError",
        "VaeConfig",
        "VaeError",
        "VaeRuntime",
        "open_vae",
    ]
    assert all(hasattr(runtimes, name) for name in runtimes.__all__)
