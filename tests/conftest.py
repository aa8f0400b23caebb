"""A small model with random weights and its bundle, shared by the tests of both packages."""

import functools
import gc
import hashlib
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from runtimes import open_vae
from runtimes.tensorrt.profiles import parse_profile
from tests.helpers.command import files_fixture, run_fixture  # noqa: F401  (fixtures: `files` and `run`)
from tests.helpers.nvidia_fakes import fakes_of_nvidia, in_use
from vae_export import AutoencoderKL, export_bundle, load_model
from vae_export.comparison import Case
from vae_export.targets.engines import plan_engine, rebuild_bundle

LEVELS = 4  # f = 8, as Stable Diffusion
CI_VARIABLES = ("CI", "TF_BUILD", "JENKINS_URL")  # by which OpenVINO knows machines whose use does not count


@pytest.fixture(scope="session", autouse=True)
def one_thread(request):
    """PyTorch with one thread, where no models of real size are run: for maps of a few pixels a second one costs more
    than it does, several times more on a busy machine."""
    if request.config.option.markexpr != "slow":
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model():
    """4 levels, 4 latent channels, tiles of 64 pixels and 8 latents; random weights, norms too. Do not change it."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = AutoencoderKL(
            block_out_channels=(16, 32, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * LEVELS,
            up_block_types=("UpDecoderBlock2D",) * LEVELS,
            layers_per_block=1,
            norm_num_groups=8,
            latent_channels=4,
            sample_size=64,
            scaling_factor=0.5,
            shift_factor=0.1,
        )
        for module in model.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def onnx_bundle(tiny_model, tmp_path_factory):
    """The path of the tiny model's ONNX bundle, exported once. Do not change it: that is what `bundle_copy` is for."""
    path = tmp_path_factory.mktemp("bundles") / "tiny"
    export_bundle(tiny_model, path, target="onnx", precision="fp32")
    return path


@pytest.fixture(scope="session")
def tileable_bundle(tmp_path_factory):
    """The path of the embedded model's ONNX bundle for seamless tiling. Do not change it."""
    path = tmp_path_factory.mktemp("bundles") / "tileable"
    export_bundle(load_model(), path, tileable=True)
    return path


@pytest.fixture(scope="session")
def two_level_model():
    """Two levels, no attention, random weights: where any model will do, quickly exported. Do not change it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoencoderKL(
            block_out_channels=(16, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=8,
            mid_block_add_attention=False,
            sample_size=64,
            scaling_factor=0.5,
        )
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny_bundle(onnx_bundle):
    """The same; the tests of other backends put theirs in its place."""
    return onnx_bundle


@pytest.fixture(scope="session")
def openvino_bundle(tiny_model, tmp_path_factory):
    """openvino_bundle(precision): the path of the tiny model's OpenVINO bundle, exported when it is first asked for.

    That in fp32 is made as a user would make it; the halves are not rescaled (they need not be) nor validated: slow.
    """
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("pip install 'vae-export[openvino]'")

    @functools.cache
    def export(precision):
        path = tmp_path_factory.mktemp("openvino") / precision
        whole = precision == "fp32"
        export_bundle(tiny_model, path, target="openvino", precision=precision, rescale=whole, run_validation=whole)
        return path

    return export


@pytest.fixture
def fake_gpu(tmp_path_factory, monkeypatch):
    """The fake GPU, for one test: at its end no rule was broken, and nothing of the GPU is still in use."""
    violations = tmp_path_factory.mktemp("fakes") / "violations"
    with fakes_of_nvidia(violations) as gpu:
        yield gpu
        monkeypatch.undo()  # before the real packages are back: it may have changed the faked ones
        if in_use(gpu):
            gc.collect()
        assert not in_use(gpu), "not given back to the GPU"
        assert not gpu.violations
        assert not violations.exists(), violations.read_text()


@pytest.fixture(scope="session")
def tensorrt_bundle(onnx_bundle, tmp_path_factory):
    """tensorrt_bundle(target, *profiles): the path of the tiny model's bundle in fp32, of plans that the fake built.

    Without profiles it is one that holds all shapes that tests use. Do not change it.
    """

    @functools.cache
    def build(target, *profiles):
        directory = tmp_path_factory.mktemp("tensorrt")
        shutil.copytree(onnx_bundle, directory / "tiny")
        with fakes_of_nvidia(directory / "violations") as gpu:
            parsed = [parse_profile(text, 8) for text in profiles or ("1..8x8..1536x8..1536@1x64x64",)]
            manifest = json.loads((directory / "tiny" / "manifest.json").read_bytes())
            manifest |= {"target": target, "engine": plan_engine(target, parsed).to_dict()}
            del manifest["manifest_sha256"]
            (directory / "tiny" / "manifest.json").write_text(json.dumps(manifest))
            rebuild_bundle(directory / "tiny", directory / "tiny", overwrite=True)
            assert not gpu.violations and not (directory / "violations").exists()
        return directory / "tiny"

    return build


@pytest.fixture(scope="session")
def flax_bundle(tiny_model, tmp_path_factory):
    """flax_bundle(precision): the path of the tiny model's flax bundle, exported when it is first asked for.

    Not validated: that compiles a dozen shapes. `test_flax_export` does it once. What is compiled for one test is kept
    on disk for the others.
    """
    if importlib.util.find_spec("flax") is None:
        pytest.skip("pip install 'vae-export[flax]'")
    import jax

    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

    @functools.cache
    def export(precision):
        path = tmp_path_factory.mktemp("flax") / precision
        export_bundle(tiny_model, path, target="flax", precision=precision, run_validation=False)
        return path

    return export


@pytest.fixture
def few_cases(monkeypatch):
    """Validation with one input for each graph: its choice of inputs is tested with the ONNX bundles."""
    x, z = torch.full((1, 3, 24, 16), 0.5), torch.randn(1, 4, 3, 2, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def reference_cases(model, *_):
        return [
            Case("encoder", "grey", x.numpy(), model.encode_moments(x).numpy()),
            Case("decoder", "noise", z.numpy(), model.decode_latents(z).numpy()),
        ]

    for module in ("export", "validate"):
        monkeypatch.setattr(f"vae_export.{module}.reference_cases", reference_cases)


@pytest.fixture
def bundle_copy(tiny_bundle, tmp_path):
    """bundle_copy(edit, files): a copy to tamper with.

    `files` {name: bytes} are put into it with the size and hash that the manifest then says; `edit` changes the
    manifest, a dictionary, in place.
    """

    def copy(edit=None, files=None):
        path = tmp_path / f"copy-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(tiny_bundle, path)
        manifest = json.loads((path / "manifest.json").read_bytes())
        for name, data in (files or {}).items():
            (path / name).write_bytes(data)
            manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        if edit is not None:
            config = dict(manifest.get("config", ()))
            edit(manifest)
            if isinstance(manifest, dict) and manifest.get("config") != config:
                manifest.pop("latent_space", None)  # it follows from the config, as in manifests that do not name it
        if files or edit:
            del manifest["manifest_sha256"]
            (path / "manifest.json").write_text(json.dumps(manifest))
        return path

    return copy


@pytest.fixture
def vae(tiny_bundle):
    """The tiny bundle, opened for this test alone: it may tune and close it."""
    with open_vae(tiny_bundle, threads=1) as runtime:
        yield runtime


@pytest.fixture
def alone(pytestconfig, tmp_path):
    """alone(program, *arguments): what a program prints in an interpreter of its own, warnings being errors.

    Its home is `tmp_path / "home"`, empty, and no request leaves the machine.
    """

    def run(program, *arguments, timeout=120):
        home = tmp_path / "home"
        home.mkdir()
        environment = {name: value for name, value in os.environ.items() if name not in CI_VARIABLES}
        environment |= {"HOME": str(home), "https_proxy": "http://127.0.0.1:9"}
        environment |= {"PYTHONPATH": str(pytestconfig.rootpath)}
        command = [sys.executable, "-W", "error", "-c", program, *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run
