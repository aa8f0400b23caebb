"""The examples, as their docstrings say to run them."""

import io
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtimes import open_vae

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def server(tiny_bundle, pytestconfig):
    """The URL of examples/serve_tensorrt.py, and its process; over ONNX Runtime, since the rest is the same."""
    command = [sys.executable, EXAMPLES / "serve_tensorrt.py", tiny_bundle, "--port", "0", "--warm-up", "64"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=pytestconfig.rootpath) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1], process
        process.kill()


def post(url, data):
    with urllib.request.urlopen(urllib.request.Request(f"{url}/decode", data=data), timeout=60) as answer:
        return answer.read()


def as_npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_the_server_answers_threads_refuses_nonsense_and_stops_cleanly(server, tiny_bundle):
    url, process = server
    latents = [np.random.default_rng(i).standard_normal((1, 4, 5, 6 + i), dtype=np.float32) for i in range(4)]
    with open_vae(tiny_bundle) as vae, ThreadPoolExecutor(4) as pool:
        images = list(pool.map(lambda z: post(url, as_npy(z)), latents))
        for z, image in zip(latents, images, strict=True):
            found = np.asarray(Image.open(io.BytesIO(image))).astype(int)
            assert np.abs(found - vae.latents_to_images(z)[0]).max() <= 1  # another number of threads sums otherwise
    for nonsense in (b"nonsense", as_npy(np.zeros((1, 3, 4, 4), np.float32))):
        with pytest.raises(urllib.error.HTTPError, match="400"):
            post(url, nonsense)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 0
    assert process.stdout.read() == "stopped\n"
