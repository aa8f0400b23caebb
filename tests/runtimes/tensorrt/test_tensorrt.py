"""A TensorRT bundle: the promises of every backend, which files are refused, and what may be missing.

NVIDIA's packages are those of `tests/fakes`, which keep to the rules of the real ones; `tests/gpu` has the real ones.

Tests runtimes/tensorrt/runtime.py, runtimes/tensorrt/flavours.py.
"""

import importlib
import re
import sys

import numpy as np
import pytest
import torch

from runtimes import (
    BackendUnavailable,
    Bundle,
    CompatibilityError,
    IntegrityError,
    open_vae,
)
from runtimes.tensorrt import flavours as tensorrt_flavours
from runtimes.tensorrt.profiles import parse_profile
from runtimes.tensorrt.runtime import TensorRtRtxVae, TensorRtVae
from tests.helpers.backend_contract import BackendContract
from tests.helpers.nvidia_fakes import FAKES
from tests.helpers.without_torch import USE
from vae_export import AutoencoderKL, export_bundle
from vae_export.targets.engines import plan_engine

pytestmark = pytest.mark.usefixtures("fake_gpu")

PLAN = "vae_decoder/model.plan"


class TestTensorRt(BackendContract):
    backend = "tensorrt"
    files = (PLAN.replace("decoder", "encoder"), PLAN)
    count_options = ("contexts", "max_graphs", "cache_bytes")
    unknown_devices = ("cpu", "cuda:", "cuda:x", "gpu", "")
    known_devices = "'cuda' or 'cuda:N'"
    loads = frozenset({"tensorrt", "cuda"})
    needs = ("tensorrt",)
    extra = "tensorrt"
    use = f"sys.path.insert(0, {str(FAKES)!r})\n{USE}"

    @pytest.fixture
    def opened(self, vae):
        """For one test: the fake GPU is there for one test."""
        return vae

    def test_what_was_built_is_at_hand(self, opened, rtx):
        assert opened.device == "cuda"
        assert [str(profile) for profile in opened.profiles] == ["1..8 x 8..1536 x 8..1536 (best at 1x64x64)"]
        with rtx() as other:
            assert other.backend == "tensorrt-rtx"


def test_an_exported_bundle_was_run_and_compared(tmp_path, fake_gpu):
    """All of the way, with a model that exports fast."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=2,
            sample_size=16,
            scaling_factor=1.0,
        )
    engine = plan_engine("tensorrt", profiles=[parse_profile("1..2x16..64x16..64", 2)])
    export_bundle(model, tmp_path / "b", target="tensorrt", precision="fp32", engine=engine)
    bundle = Bundle(tmp_path / "b")
    bundle.verify()
    manifest = bundle.manifest
    assert manifest.engine == engine and manifest.engine.gpus == ("sm89",)
    assert manifest.tools["tensorrt"] == engine.version
    assert manifest.validation["verdict"] == "passed" and "not_run" not in manifest.validation
    assert {m["by"] for m in manifest.validation["measurements"]} == {"onnxruntime", "tensorrt"}
    assert {f"vae_{graph}/model.{kind}" for graph in ("encoder", "decoder") for kind in ("onnx", "plan")} <= {
        *manifest.files
    }


# Files that are not what they should be ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("version", "10.13.0.35", "was built with tensorrt 10.13.0.35, and 11.4.0.1 is installed"),
        ("flavour", "tensorrt-rtx", "was built with tensorrt-rtx, and this is tensorrt"),
        ("gpus", ["sm86", "sm90"], "was built for sm86, sm90, and this GPU is sm89"),
        ("system", "win32-AMD64", "was built on win32-AMD64, and this is"),
    ],
)
def test_a_plan_of_elsewhere_is_refused_before_it_is_parsed(bundle_copy, fake_gpu, field, value, says):
    path = bundle_copy(lambda manifest: manifest["engine"].update({field: value}))
    with pytest.raises(CompatibilityError, match=f"{says}.*: vae-export rebuild {path} builds it"):
        open_vae(path)
    assert fake_gpu.deserialized == 0


DAMAGE = {
    "a bit flipped": lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:],
    "cut short": lambda data: data[:-1],
    "empty": lambda data: b"",
    "garbage": lambda data: b"garbage" * 100,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_plan_is_named_before_a_byte_of_any_is_parsed(bundle_copy, fake_gpu, damage):
    path = bundle_copy()
    (path / PLAN).write_bytes(DAMAGE[damage]((path / PLAN).read_bytes()))
    with pytest.raises(IntegrityError, match=re.escape(PLAN)):
        open_vae(path)
    assert fake_gpu.deserialized == 0


GARBAGE = {
    "nothing": (lambda plan: b"", "magic tag does not match"),
    "noise": (lambda plan: np.random.default_rng(0).bytes(10_000), "magic tag does not match"),
    "a header": (lambda plan: plan[:50], "."),
    "half a plan": (lambda plan: plan[: len(plan) // 2], "."),
}


@pytest.mark.parametrize("garbage", GARBAGE)
def test_a_plan_that_is_none_is_refused_in_tensorrts_own_words(bundle_copy, tiny_bundle, garbage):
    make, says = GARBAGE[garbage]
    path = bundle_copy(files={PLAN: make((tiny_bundle / PLAN).read_bytes())})
    with pytest.raises(CompatibilityError, match=rf"tensorrt 11\.4\.0\.1 cannot load the plan of the decoder: {says}"):
        open_vae(path)


def test_the_plan_of_the_other_graph_is_refused(bundle_copy, tiny_bundle):
    path = bundle_copy(files={PLAN: (tiny_bundle / PLAN.replace("decoder", "encoder")).read_bytes()})
    with pytest.raises(CompatibilityError, match=r"decoder has the tensors sample, latent_parameters.*latent_sample"):
        open_vae(path)


def test_a_plan_of_other_types_or_profiles_than_the_manifest_says_is_refused(bundle_copy):
    def halve(manifest):
        manifest["graphs"]["decoder"]["input"]["dtype"] = "float16"

    def add_profile(manifest):
        manifest["engine"]["profiles"] *= 2

    for edit, says in ((halve, "latent_sample and sample of float16"), (add_profile, "1 profiles, .* manifest says 2")):
        with pytest.raises(CompatibilityError, match=says):
            open_vae(bundle_copy(edit))


# What may be missing ----------------------------------------------------------------------------------------------


def test_a_gpu_that_is_not_here_is_named(tiny_bundle, fake_gpu):
    with pytest.raises(BackendUnavailable, match=r"there is no cuda:3: this machine has 1 NVIDIA GPU"):
        open_vae(tiny_bundle, device="cuda:3")
    assert TensorRtVae.check_devices() == {"cuda": "works (sm89)"}
    fake_gpu.count = 0
    with pytest.raises(BackendUnavailable, match=r"no NVIDIA GPU can be used here: .*CUDA driver version is"):
        open_vae(tiny_bundle)
    assert "no NVIDIA GPU can be used here" in TensorRtRtxVae.check_devices()["cuda"]


def test_what_is_not_installed_is_named_with_the_command_that_does(tiny_bundle, rtx, monkeypatch):
    monkeypatch.setattr(tensorrt_flavours, "_loaded", {})
    for name, package, use in (("tensorrt", "tensorrt", lambda: open_vae(tiny_bundle)), ("tensorrt_rtx", "rtx", rtx)):
        with monkeypatch.context() as missing, pytest.raises(BackendUnavailable) as error:
            missing.setitem(sys.modules, name, None)
            use()
        assert str(error.value) == f"{name} is not installed: pip install 'vae-export[{package}]'"
    for name in ("cuda.bindings.runtime", "cuda.cudart"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BackendUnavailable, match=r"cuda-python is not installed: pip install 'vae-export\[tensorrt\]'"):
        open_vae(tiny_bundle)


def test_a_tensorrt_that_is_too_old_or_does_not_load_is_named(tiny_bundle, monkeypatch, tmp_path):
    monkeypatch.setattr(tensorrt_flavours, "_loaded", {})
    monkeypatch.setattr(importlib.import_module("tensorrt"), "__version__", "10.9.0.34")
    with pytest.raises(BackendUnavailable, match=r"10\.9\.0\.34 is too old: 10\.13 or later, pip install -U"):
        open_vae(tiny_bundle)
    (tmp_path / "tensorrt.py").write_text("raise OSError('libnvinfer.so.11: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt")
    with pytest.raises(BackendUnavailable, match=r"does not load \(libnvinfer\.so\.11.*pip install 'vae-export\["):
        open_vae(tiny_bundle)
