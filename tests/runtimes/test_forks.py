"""A runtime belongs to the process that opened it: a fork of it is told so at once, and waits for nothing."""

import importlib.util

import pytest

# What the parent does, in an interpreter of its own: the fork of a test run would take its threads' locks with it.
PROGRAM = """
import gc, os, sys, warnings
warnings.simplefilter("ignore")  # JAX, and Python from 3.12 on, warn of any fork
import numpy as np
from runtimes import VaeError, open_vae

path, way = sys.argv[1:]
vae = open_vae(path)
x = np.zeros((1, 3, 32, 32), np.float32)
before = vae.encode(x)[0].parameters
child = os.fork()
if child == 0:
    for call in (lambda: vae.encode(x), lambda: vae.decode(np.zeros((1, 4, 4, 4), np.float32))):
        try:
            call()
        except VaeError as error:
            assert f"opened in process {os.getppid()}, and this process ({os.getpid()}) is a fork of it" in str(error)
        else:
            os._exit(2)
    if way == "closed":
        vae.close()
    del vae
    gc.collect()
    os._exit(0)  # as multiprocessing ends its forks
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
assert np.array_equal(vae.encode(x)[0].parameters, before)
vae.close()
"""


@pytest.mark.parametrize("way", ["closed", "forgotten"])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "flax"])
def test_in_a_fork_a_runtime_says_so_and_nothing_hangs(request, alone, backend, way):
    if backend != "onnxruntime" and importlib.util.find_spec(backend) is None:
        pytest.skip(f"pip install 'vae-export[{backend}]'")
    path = request.getfixturevalue("onnx_bundle" if backend == "onnxruntime" else f"{backend}_bundle")
    assert alone(PROGRAM, path if backend == "onnxruntime" else path("fp32"), way) == ["0"]


OPENS_ITS_OWN = """
import os, sys, warnings
warnings.simplefilter("ignore")
import numpy as np
from runtimes import VaeError, open_vae

x = np.zeros((1, 3, 32, 32), np.float32)
with open_vae(sys.argv[1]) as vae:
    before = vae.encode(x)[0].parameters
child = os.fork()
if child == 0:
    try:
        with open_vae(sys.argv[1]) as own:
            os._exit(10 if np.array_equal(own.encode(x)[0].parameters, before) else 2)
    except VaeError as error:
        os._exit(11 if "spawn or forkserver" in str(error) else 3)
print({10: "the same", 11: "told"}.get(code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), code))
"""


def test_a_fork_opens_its_own(onnx_bundle, alone):
    """ONNX Runtime's threads belong to a session: a new one has new ones."""
    assert alone(OPENS_ITS_OWN, onnx_bundle) == ["the same"]


@pytest.mark.parametrize("backend", ["openvino", "flax"])
def test_a_fork_that_would_hang_is_told(request, alone, backend):
    """OpenVINO and JAX would stand still in their own locks, even where what was opened has been closed."""
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"pip install 'vae-export[{backend}]'")
    assert alone(OPENS_ITS_OWN, request.getfixturevalue(f"{backend}_bundle")("fp32")) == ["told"]
