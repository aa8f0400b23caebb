"""Opening, closing, collecting, signals and the interpreter's end, in every order: no order ends the process.

Tests runtimes/base.py, runtimes/exits.py.
"""

import importlib.util

import pytest

BACKENDS = ("onnxruntime", "openvino", "flax")


def path_of(request, backend):
    """The tiny model's bundle for a backend."""
    if backend == "onnxruntime":
        return request.getfixturevalue("onnx_bundle")
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"pip install 'vae-export[{backend}]'")
    return request.getfixturevalue(f"{backend}_bundle")("fp32")


@pytest.fixture(params=BACKENDS)
def path(request):
    """The tiny model's bundle, one for each backend."""
    return path_of(request, request.param)


# Each letter is a step: open, use, close and drop two runtimes a and b. After every step the process gets a SIGINT.
ORDERS = """
import gc, os, signal, sys
import numpy as np
from runtimes import open_vae

x = np.zeros((1, 3, 16, 16), np.float32)
received = []
signal.signal(signal.SIGINT, lambda *_: received.append(1))
steps = 0
for order in ("oO c C d D", "oO C c D d", "oO c d C D", "oO d D", "oO D d", "o c O C d D", "ouOU c C d D", "oOuU d D"):
    open_ones = {}
    for step in order.replace(" ", ""):
        name, do = step.lower(), step.isupper()
        if name == "o":
            open_ones[do] = open_vae(sys.argv[1])
        elif name == "u":
            open_ones[do].encode(x)
        elif name == "c":
            open_ones[do].close()
        else:
            del open_ones[do]
            gc.collect()
        os.kill(os.getpid(), signal.SIGINT)
        steps += 1
assert len(received) == steps, "every signal was handled"

ticks = []
signal.signal(signal.SIGALRM, lambda *_: ticks.append(1))
with open_vae(sys.argv[1]) as vae:
    signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
    for _ in range(10):
        vae.encode(x)
    signal.setitimer(signal.ITIMER_REAL, 0)
print(len(ticks) > 0)
"""


def test_signals_come_while_runtimes_are_opened_used_closed_and_collected_in_any_order(path, alone):
    """Two Cores of OpenVINO, the first destroyed first, leave the process a signal stack that is freed memory."""
    assert alone(ORDERS, path) == ["True"]


ENDS = """
import atexit, gc, os, signal, sys, threading
import numpy as np
from runtimes import open_vae

path, way = sys.argv[1:]
x = np.zeros((1, 3, 16, 16), np.float32)
vae = open_vae(path)
vae.encode(x)

class Keeper:
    def __init__(self, vae):
        self.vae, self.itself = vae, self

    def __del__(self):
        self.vae.close()

if way == "closed at exit":
    atexit.register(vae.close)
elif way == "closed by a finalizer":
    sys.keeper = Keeper(vae)
elif way == "opened in a thread that ended":
    def work():
        global vae, another
        another = open_vae(path)
        another.encode(x)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    vae.close()
    del vae
    gc.collect()
elif way == "at work in a daemon thread":
    begun = threading.Event()
    def work():
        while True:
            begun.set()
            vae.encode(np.zeros((1, 3, 256, 256), np.float32))
    threading.Thread(target=work, daemon=True).start()
    begun.wait()
    vae.encode(x)
elif way == "used at exit":
    atexit.register(lambda: vae.encode(x))
elif way == "ended by a signal's handler":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    os.kill(os.getpid(), signal.SIGTERM)
"""
WAYS = {
    "onnxruntime": [
        "open",
        "closed at exit",
        "closed by a finalizer",
        "opened in a thread that ended",
        "at work in a daemon thread",
        "used at exit",
        "ended by a signal's handler",
    ],
    "openvino": ["open", "closed by a finalizer", "opened in a thread that ended", "at work in a daemon thread"],
    "flax": ["closed by a finalizer", "at work in a daemon thread"],  # each takes seconds to import JAX
}


@pytest.mark.parametrize("backend, way", [(backend, way) for backend, ways in WAYS.items() for way in ways])
def test_the_interpreter_ends_with_the_programs_own_exit_code(request, alone, backend, way):
    assert alone(ENDS, path_of(request, backend), way) == []


JOINED_AT_EXIT = """
import atexit, sys, threading

stop = threading.Event()
def work():
    begun.set()
    while not stop.is_set():
        vae.encode(x)
worker, begun = threading.Thread(target=work, daemon=True), threading.Event()
def end():
    stop.set()
    worker.join()
    print("joined")
atexit.register(end)  # before runtimes is imported: it runs after what runtimes registers

import numpy as np
from runtimes import open_vae

x = np.zeros((1, 3, 64, 64), np.float32)
vae = open_vae(sys.argv[1])
worker.start()
begun.wait()
"""


def test_a_program_that_joins_its_daemon_threads_at_exit_does_not_hang(onnx_bundle, alone):
    assert alone(JOINED_AT_EXIT, onnx_bundle, timeout=30) == ["joined"]


def test_all_of_openvino_shares_one_core(openvino_bundle):
    from runtimes import open_vae
    from runtimes.openvino import OpenVinoVae, shared_core

    with open_vae(openvino_bundle("fp32")) as one, open_vae(openvino_bundle("fp32")) as other:
        assert isinstance(one, OpenVinoVae) and isinstance(other, OpenVinoVae)
        assert one._core is other._core is shared_core()
