"""`runtimes` runs without torch, onnx and `vae_export`: what counts is what a fresh interpreter has loaded."""

import subprocess
import sys

import pytest

import runtimes
from tests.helpers.without_torch import BANNED, USE


@pytest.fixture
def fresh(pytestconfig, tiny_bundle):
    """Run a program in an interpreter of its own, warnings being errors; what it prints, and the packages it loaded."""

    def run(program):
        program = f"import sys, numpy as np, runtimes\n{program}\nprint(*sys.modules)"
        command = [sys.executable, "-W", "error", "-c", program, str(tiny_bundle)]
        result = subprocess.run(command, cwd=pytestconfig.rootpath, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        *printed, modules = result.stdout.splitlines()
        return printed, {name.partition(".")[0] for name in modules.split()}

    return run


def test_a_bundle_is_opened_and_used_without_torch(fresh):
    printed, loaded = fresh(USE)
    assert printed == ["(1, 3, 72, 80)", "(2, 72, 80, 3)"]
    assert {"runtimes", "onnxruntime"} <= loaded and not loaded & BANNED


def test_importing_runtimes_loads_no_backend(fresh):
    assert not fresh("")[1] & (BANNED | {"onnxruntime"})


def test_where_onnx_runtime_is_missing_the_error_says_what_to_install(fresh):
    absent = 'sys.modules["onnxruntime"] = None\ntry: runtimes.open_vae(sys.argv[1])\nexcept runtimes.'
    printed, _ = fresh(f"{absent}BackendUnavailable as error: print(error)")
    assert "pip install 'vae-export[cpu]'" in printed[0]


def test_the_public_names():
    names = """AutoencoderKLOutput BackendUnavailable Bundle BundleError CompatibilityError ConfigError DecoderOutput
    DiagonalGaussianDistribution IntegrityError NotInstalled NumericsError OutOfMemoryError ShapeError VaeConfig
    VaeError VaeRuntime open_vae register_backend"""
    assert sorted(runtimes.__all__) == names.split()
    assert all(hasattr(runtimes, name) for name in runtimes.__all__)
