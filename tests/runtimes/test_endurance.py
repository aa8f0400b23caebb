"""Busy threads and long runs, each in a process of its own: what a service does in a month, as far as it fits in here.

The many are run by `make slow`, a few of each by `make test`.
"""

import importlib.util
import json

import pytest

FEW = {"threads": 8, "calls_of_each": 12, "long": 150, "opens": 25}
MANY = {"threads": 8, "calls_of_each": 500, "long": 10_000, "opens": 500}
#: MB that a process may grow by in FEW; with other tests beside it, an allocator's arenas grew by 17
FEW_GROWTH = 30
GROWTH = 10  # MB: an allocator's slack; a leak of one 64x64 image in a call would be 490 MB in 10,000
BACKENDS = ("onnxruntime", "openvino", "flax")

COMMON = """
import ctypes, gc, json, os, random, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from runtimes import open_vae

path, counts = sys.argv[1], json.loads(sys.argv[2])
rng = np.random.default_rng(0)
SIDES = [(32, 32), (64, 32), (32, 64), (64, 64)]  # as many as OpenVINO and JAX keep compiled
inputs = [rng.uniform(-1, 1, (1 + n % 2, 3, *side)).astype(np.float32) for n, side in enumerate(SIDES)]
inputs += [rng.standard_normal((1 + n % 2, 4, h // 8, w // 8), np.float32) for n, (h, w) in enumerate(SIDES)]


def call(vae, number):
    x = inputs[number]
    return vae.encode(x)[0].parameters if x.shape[1] == 3 else vae.decode(x)[0]


def status():
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()  # it keeps some 30 KB of every opening until then: see FlaxVae
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free, and only not given back, is no leak: a compiler leaves much of it
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "mb": int(fields["VmRSS"].split()[0]) / 1024,
        "threads": int(fields["Threads"]),
        "files": len(os.listdir("/proc/self/fd")),
    }
"""
THREADS = """
with open_vae(path) as vae:
    serial = [call(vae, number) for number in range(len(inputs))]

    def work(thread):
        order = random.Random(thread)
        numbers = [order.randrange(len(inputs)) for _ in range(counts["calls_of_each"])]
        return sum(np.array_equal(call(vae, number), serial[number]) for number in numbers)

    with ThreadPoolExecutor(counts["threads"]) as pool:
        print(json.dumps(sum(pool.map(work, range(counts["threads"])))))
"""
LONG = """
order = random.Random(0)
with open_vae(path) as vae:
    for n in range(300):
        call(vae, n % len(inputs))
    seen = [status()]
    for _ in range(8):
        for _ in range(counts["long"] // 8):
            call(vae, order.randrange(len(inputs)))
        seen.append(status())
    # The least of three each: XLA's own memory goes up and down by some MB.
    print(json.dumps([min(part, key=lambda each: each["mb"]) for part in (seen[:3], seen[-3:])]))
"""
OPENS = """
def open_and_close(number):
    vae = open_vae(path)
    if number % 10 == 0:
        call(vae, 0)
    if number % 3:
        vae.close()
    # else it is forgotten, and that has to be enough

for number in range(20 + counts["opens"] // 5):
    open_and_close(number)
before = status()
for number in range(counts["opens"]):
    open_and_close(number)
print(json.dumps([before, status()]))
"""


def runs(few):
    """(backend, counts): few on these backends, many on all."""
    return [
        *(pytest.param(backend, FEW, id=f"{backend}-few") for backend in few),
        *(pytest.param(backend, MANY, id=f"{backend}-many", marks=pytest.mark.slow) for backend in BACKENDS),
    ]


every_backend = pytest.mark.parametrize(("bundle", "counts"), runs(BACKENDS), indirect=["bundle"])
#: JAX takes 25 s to compile what the others have at once.
few_without_jax = pytest.mark.parametrize(("bundle", "counts"), runs(BACKENDS[:2]), indirect=["bundle"])


@pytest.fixture
def bundle(request, tiny_bundle):
    backend = request.param
    if backend == "onnxruntime":
        return tiny_bundle
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"pip install 'vae-export[{backend}]'")
    return request.getfixturevalue(f"{backend}_bundle")("fp32")


@pytest.fixture
def run(alone, bundle):
    """run(program, counts): what it prints, as JSON."""
    return lambda program, counts: json.loads(alone(COMMON + program, bundle, json.dumps(counts), timeout=1500)[-1])


@every_backend
def test_threads_get_to_the_bit_what_one_gets(run, counts):
    assert run(THREADS, counts) == counts["threads"] * counts["calls_of_each"]


@few_without_jax
def test_memory_does_not_grow_with_calls(run, counts):
    before, after = run(LONG, counts)
    print(before, after)
    assert after["mb"] - before["mb"] < (FEW_GROWTH if counts is FEW else GROWTH)
    assert (after["threads"], after["files"]) == (before["threads"], before["files"])


@few_without_jax
def test_opening_and_closing_leaves_nothing(run, counts):
    before, after = run(OPENS, counts)
    print(before, after)
    assert after["mb"] - before["mb"] < (FEW_GROWTH if counts is FEW else GROWTH)
    assert after["threads"] <= before["threads"]
    assert after["files"] <= before["files"]
