"""Model repositories, read by the real tritonserver: no GPU and no backend is needed to hear what it thinks of them."""

import importlib.util
import os
import re
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtimes import Bundle
from runtimes.errors import BundleError, CompatibilityError, ConfigError
from runtimes.manifest import Engine
from runtimes.names import GRAPHS
from runtimes.tensorrt.profiles import parse_profile
from vae_export.triton import model_config, write_repository

# The sign that the server took a config, and then looked for the backend's library, which is not here.
ACCEPTED = r"unable to find backend library for backend '(onnxruntime|tensorrt)'"


def as_tensorrt(manifest):
    """What the manifest of a TensorRT bundle says, for its config: writing a plan would need a GPU."""
    profiles = tuple(parse_profile(text, 8) for text in ("1..4x512x512", "1x256..1024x256..1024@1x768x768"))
    graphs = {name: replace(spec, file=spec.file.replace(".onnx", ".plan")) for name, spec in manifest.graphs.items()}
    engine = Engine("tensorrt", "11.4.0", ("sm89",), "linux-x86_64", profiles)
    return replace(manifest, target="tensorrt", graphs=graphs, engine=engine)


@pytest.fixture
def server(tmp_path):
    """server(repository): what tritonserver says of it, and of each model in its table."""
    found = importlib.util.find_spec("pytriton")
    if found is None or found.submodule_search_locations is None:
        pytest.skip("nvidia-pytriton, which has the server, is not installed")
    home = Path(found.submodule_search_locations[0]) / "tritonserver"
    binary = home / "bin" / "tritonserver"
    binary.chmod(0o755)

    def ask(repository):
        (tmp_path / "backends").mkdir(exist_ok=True)
        command = [str(binary), f"--model-repository={repository}", f"--backend-directory={tmp_path / 'backends'}"]
        command += ["--allow-metrics=false", "--disable-auto-complete-config", "--exit-on-error=true"]
        command += ["--allow-http=false", "--allow-grpc=false"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            return process.communicate(timeout=60)[0]
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            return process.communicate()[0]

    return ask


def test_the_server_accepts_what_is_made_of_an_onnx_bundle(tiny_bundle, tmp_path, server):
    models = write_repository(tiny_bundle, tmp_path / "repository", instances=2)
    assert sorted(models) == ["vae_decoder", "vae_encoder"]
    for graph in GRAPHS:
        file = Bundle(tiny_bundle).manifest.graphs[graph].file
        assert (models[f"vae_{graph}"] / "1" / "model.onnx").read_bytes() == Bundle(tiny_bundle).read(file)
    said = server(tmp_path / "repository")
    assert len(re.findall(ACCEPTED, said)) >= 2, said


def test_the_server_accepts_what_is_made_of_a_tensorrt_bundle(tiny_bundle, tmp_path, server):
    manifest = as_tensorrt(Bundle(tiny_bundle).manifest)
    for graph in GRAPHS:
        folder = tmp_path / "repository" / f"vae_{graph}"
        (folder / "1").mkdir(parents=True)
        (folder / "1" / "model.plan").write_bytes(b"a plan")
        (folder / "config.pbtxt").write_text(model_config(manifest, graph, 1, False, 4, 2000))
    said = server(tmp_path / "repository")
    assert len(re.findall(ACCEPTED, said)) >= 2, said


def test_the_server_would_say_where_a_config_is_wrong(tiny_bundle, tmp_path, server):
    write_repository(tiny_bundle, tmp_path / "repository")
    config = tmp_path / "repository" / "vae_encoder" / "config.pbtxt"
    config.write_text(config.read_text().replace("TYPE_FP32", "TYPE_NONE", 1))
    assert "TYPE_NONE" in server(tmp_path / "repository")  # else acceptance would mean nothing


def test_a_config_says_all_that_a_client_and_the_server_need(tiny_bundle):
    manifest = Bundle(tiny_bundle).manifest
    text = model_config(manifest, "encoder", 3, False, 8, 500)
    for line in (
        'name: "sample"',
        "data_type: TYPE_FP32",
        "dims: [ 3, -1, -1 ]",
        "dims: [ 8, -1, -1 ]",
        "max_batch_size: 8",
        "max_queue_delay_microseconds: 500",
        "kind: KIND_GPU",
        "count: 3",
        "dims: [ 3, 512, 512 ]",
        'key: "scaling_factor"\n  value { string_value: "0.5" }',
    ):
        assert line in text, line
    text = model_config(as_tensorrt(manifest), "decoder", 1, False, 4, 0)
    for line in ('profile: [ "0", "1" ]', "dims: [ 4, 64, 64 ]", 'string_value: "ON_PROFILE_CHANGE"', '"model.plan"'):
        assert line in text, line


def test_what_cannot_be_served_is_refused_and_leaves_nothing(tiny_bundle, openvino_bundle, tmp_path):
    out = tmp_path / "r"
    with pytest.raises(CompatibilityError, match="not of openvino; export with --to onnx"):
        write_repository(openvino_bundle("fp32"), out)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"instances": 0}, "instances must be at least 1, not 0"),
        ({"max_batch": -2}, "max_batch must be at least 1, not -2"),
        ({"queue_delay_us": -1}, "queue_delay_us must not be negative, and is -1"),
    ]
    for options, told in refused:
        with pytest.raises(ConfigError, match=told):
            write_repository(tiny_bundle, out, **options)
    out.mkdir()
    with pytest.raises(BundleError, match="exists"):
        write_repository(tiny_bundle, out)
    assert [path.name for path in tmp_path.iterdir()] == ["r"] and not list(out.iterdir())
