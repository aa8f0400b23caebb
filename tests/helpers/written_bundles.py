"""Bundles of one file, written as exports write theirs, here or by another process."""

import subprocess
import sys
from pathlib import Path

from runtimes import Bundle, VaeConfig
from runtimes.manifest import GraphSpec, Manifest, TensorSpec
from runtimes.names import Graph
from vae_export.bundle import write_bundle

ROOT = Path(__file__).parents[2]


def fill(writer, data):
    """Put `data` and a manifest that lists it into a bundle in the making."""
    (writer.directory / "graphs").mkdir()
    (writer.directory / "graphs" / "model.onnx").write_bytes(data)
    image, latents, moments = (TensorSpec("x", "float32", ("batch", c, "height", "width")) for c in (3, 4, 8))
    ends: dict[Graph, tuple[TensorSpec, TensorSpec]]
    ends = {"encoder": (image, moments), "decoder": (latents, image)}
    graphs = {name: GraphSpec("graphs/model.onnx", *both) for name, both in ends.items()}
    config = VaeConfig()
    writer.write_manifest(Manifest("0", "onnx", "fp32", config, writer.entries(), graphs, config.latent_space))


def make(out, data=b"new", overwrite=False):
    with write_bundle(out, overwrite=overwrite) as writer:
        fill(writer, data)
        return writer.finish()


def content(out):
    return Bundle(out).read("graphs/model.onnx")


def start(code, out):
    """Another process, with this module's names and `out` at hand, once it has said that it is ready."""
    setup = f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from {__name__} import *; out = sys.argv[1]\n"
    command = [sys.executable, "-c", setup + code, str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    return process
