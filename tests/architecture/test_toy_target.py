"""A target is one file and one call: this one has ONNX graphs under a name of its own, and a file that says hello.

Tests vae_export/targets/base.py.
"""

import json
import subprocess
import sys

import numpy as np
import pytest

from runtimes import Bundle, ConfigError, open_vae, register_backend
from runtimes.backends import BACKENDS, unregister_backend
from vae_export import export_bundle, tune_bundle, validate_bundle
from vae_export.rewrites.form import Form
from vae_export.targets import TARGETS
from vae_export.targets.base import Target, Written
from vae_export.targets.onnx_graphs import export_onnx


class ToyTarget(Target):
    """ONNX graphs in files of another name."""

    name = "toy"
    graph_file = "graph.toy"
    forms = {"fp32": Form(upsample="conv"), "fp16": Form()}  # noqa: RUF012

    def check(self, model, options):
        if options.io == "uint8":
            raise ConfigError("toys take floats (--io float)")

    def write(self, export, graph, path):
        spec = export_onnx(export.exact, graph, path, precision=export.precision, form=export.form(graph))
        return Written(spec, ({"name": "wound up", "graph": graph},))

    def finish(self, export, writer):
        (writer.directory / "hello.txt").write_text("hello")

    def tool_versions(self, options):
        return {"toys": "1.0"}


def register():
    TARGETS.register("toy", ToyTarget)
    register_backend("toyruntime", BACKENDS["onnxruntime"], targets=("toy",))


@pytest.fixture(autouse=True)
def toy():
    register()
    yield
    TARGETS.unregister("toy")
    unregister_backend("toyruntime")


def test_export_validate_and_run_know_it(two_level_model, tmp_path):
    path = tmp_path / "b"
    manifest = export_bundle(two_level_model, path, target="toy", precision="fp16").manifest
    assert (manifest.target, manifest.precision, manifest.tools["toys"]) == ("toy", "fp16", "1.0")
    assert {"name": "wound up", "graph": "decoder"} in manifest.rewrites
    assert "hello.txt" in manifest.files and "vae_encoder/graph.toy" in manifest.files
    assert {m["by"] for m in manifest.validation["measurements"]} == {"simulated fp16", "onnxruntime"}
    assert all(m.passed for m in validate_bundle(path, two_level_model))
    with open_vae(path) as vae:
        assert vae.images_to_latents(np.zeros((1, 8, 8, 3), np.uint8)).shape == (1, 4, 4, 4)


def test_its_refusals_come_before_the_work(two_level_model, tmp_path):
    with pytest.raises(ConfigError, match="toys take floats"):
        export_bundle(two_level_model, tmp_path / "b", target="toy", io="uint8")
    with pytest.raises(ConfigError, match="toy bundles are made in fp32, fp16, not in bf16"):
        export_bundle(two_level_model, tmp_path / "b", target="toy", precision="bf16")
    with pytest.raises(ConfigError, match=r"seamless tiling .* are onnx, not toy"):
        export_bundle(two_level_model, tmp_path / "b", target="toy", tileable=True)


def test_tune_knows_it(two_level_model, tmp_path):
    tuned = tune_bundle(two_level_model, tmp_path / "b", target="toy", height=8, width=8, rounds=1)
    assert tuned.bundle.manifest.target == "toy"
    assert {trial.form.upsample for trial in tuned.trials if trial.graph == "decoder"} == {"none", "conv", "deconv"}


COMMANDS = """
from tests.architecture.test_toy_target import register
register()
from vae_export.cli.main import main
main()
"""


def test_the_command_line_knows_it(tmp_path, pytestconfig):
    def run(*arguments):
        command = [sys.executable, "-c", COMMANDS, *map(str, arguments)]
        done = subprocess.run(command, cwd=pytestconfig.rootpath, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "or toy" in " ".join(run("--help").split())
    assert "toy" in json.loads(run("doctor", "--json"))["targets"]
    run("--to", "toy", "--out", tmp_path / "b", "--no-validate")
    assert Bundle(tmp_path / "b").manifest.target == "toy"
    assert "toy fp32" in run("inspect", tmp_path / "b")
