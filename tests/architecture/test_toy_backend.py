"""A backend is one file and one call: this one runs ONNX bundles one sample at a time.

Tests runtimes/backends.py.
"""

import functools
import json

import numpy as np
import onnxruntime
import pytest
from typer.testing import CliRunner

from runtimes import VaeRuntime, open_vae, register_backend
from runtimes.arrays import answer_in_kind
from runtimes.backends import BACKENDS_OF_TARGET, unregister_backend
from runtimes.names import GRAPHS
from tests.helpers.backend_contract import BackendContract
from tests.helpers.parsed_bytes import parsed_by_onnxruntime  # noqa: F401  (a fixture)
from vae_export.cli.app import app
from vae_export.photos import EMBEDDED


class ToyVae(VaeRuntime):
    """ONNX bundles, one sample at a time."""

    backend = "toy"

    def __init__(self, bundle, *, device="cpu", check_finite=False):
        super().__init__(bundle, check_finite=check_finite)
        self.device = device
        files = {graph: bundle.read(self.spec[graph].file) for graph in GRAPHS}
        self._sessions = {graph: onnxruntime.InferenceSession(data) for graph, data in files.items()}

    @staticmethod
    def check_devices():
        return {"cpu": "works, slowly"}

    def _run(self, graph, x):
        name = self.spec[graph].input.name
        run = self._sessions[graph].run
        return answer_in_kind(lambda array: np.concatenate([run(None, {name: one[None]})[0] for one in array]), x)

    def _close(self):
        self._sessions.clear()


@pytest.fixture(autouse=True)
def toy():
    register_backend("toy", ToyVae, targets=("onnx",))
    yield
    unregister_backend("toy")


@pytest.fixture
def vae(tiny_bundle, toy):
    """The tiny bundle, opened for one test."""
    with open_vae(tiny_bundle, backend="toy") as runtime:
        yield runtime


class TestToy(BackendContract):
    """The promises of every backend hold for the toy, but for those that its few lines leave out."""

    backend = "toy"
    files = ("vae_encoder/model.onnx", "vae_decoder/model.onnx")
    count_options = ()  # it has none
    unknown_devices = ()  # it does not look at the device
    loads = frozenset({"onnxruntime"})
    needs = ()  # a process of its own does not know the toy: its package cannot be missing there
    open = staticmethod(functools.partial(open_vae, backend="toy"))

    @pytest.fixture
    def opened(self, vae):
        """For one test: the toy is registered for one test."""
        return vae

    def test_a_config_that_does_not_fit_the_graphs_ends_in_an_error_of_ours(self):
        pytest.skip("the toy does not compare its graphs with the config")


def invoke(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_api_has_it(tiny_bundle, tiny_model):
    images = np.random.default_rng(0).integers(0, 256, (2, 24, 16, 3), np.uint8)
    with open_vae(tiny_bundle) as ours, open_vae(tiny_bundle, backend="toy") as toys:
        assert (ours.backend, toys.backend) == ("onnxruntime", "toy")
        latents = toys.images_to_latents(images)
        # The same kernels on one sample in place of two: rounding alone.
        np.testing.assert_allclose(latents, ours.images_to_latents(images), atol=1e-4)
        assert np.abs(toys.latents_to_images(latents).astype(int) - ours.latents_to_images(latents)).max() <= 1
        toys.enable_tiling()
        assert toys.decode(np.zeros((1, 4, 70, 70), np.float32))[0].shape == (1, 3, 560, 560)


def test_the_command_line_has_it(tiny_bundle, tmp_path):
    assert json.loads(invoke("doctor", "--json"))["backends"]["toy"] == {"cpu": "works, slowly"}
    photo = EMBEDDED / "rocket.jpg"
    out = tmp_path / "round.png"
    assert "PSNR" in invoke("roundtrip", tiny_bundle, photo, "--crop", "--backend", "toy", "--out", out)


def test_datasets_have_it(tiny_bundle, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "rocket.jpg").write_bytes((EMBEDDED / "rocket.jpg").read_bytes())
    latents = tmp_path / "latents"
    options = ["--bundle", tiny_bundle, "--out", latents, "--backend", "toy", "--workers", 1]
    invoke("encode-dataset", folder, *options, "--policy", "center-crop", "--size", "64x64")
    assert json.loads((latents / "contract.json").read_text())["encoded_with"][0]["backend"] == "toy"


def test_it_leaves_nothing_behind():
    assert BACKENDS_OF_TARGET["onnx"][-1] == "toy"
    unregister_backend("toy")
    assert BACKENDS_OF_TARGET["onnx"] == ("onnxruntime", "tensorrt", "tensorrt-rtx")
    register_backend("toy", ToyVae, targets=("onnx",))
