"""Threads: every call gets what it would get alone, and a runtime may be closed while others use it.

Tests runtimes/cancellation.py.
"""

import threading
import time
import warnings
from typing import Any

import numpy as np
import pytest

from runtimes import VaeError, open_vae
from runtimes.cancellation import cancel_calls

X = np.zeros((1, 3, 32, 32), np.float32)


@pytest.fixture
def slow_vae(vae, monkeypatch):
    """`vae`, whose calls wait for `go`; (it, entered, go)."""
    entered, go, real = threading.Event(), threading.Event(), vae._run

    def run(graph, x):
        entered.set()
        assert go.wait(30)
        return real(graph, x)

    monkeypatch.setattr(vae, "_run", run)
    return vae, entered, go


def test_a_call_at_work_ends_well_when_another_thread_closes(slow_vae):
    vae, entered, go = slow_vae
    answers = []
    worker = threading.Thread(target=lambda: answers.append(vae.encode(X)[0].parameters))
    worker.start()
    assert entered.wait(30)
    start = time.perf_counter()
    vae.close()
    assert time.perf_counter() - start < 5, "closing does not wait"
    with pytest.raises(VaeError, match="closed"):
        vae.encode(X)
    assert vae._sessions, "the call at work needs them"
    go.set()
    worker.join(30)
    assert len(answers) == 1 and np.isfinite(answers[0]).all()
    assert not vae._sessions, "released by the last call"


def test_closing_under_fire(tiny_bundle):
    """Eight threads call as fast as they can: whoever is late is told that it is closed, and nothing else happens."""
    for _ in range(5):
        vae = open_vae(tiny_bundle, threads=1)
        others: list[Exception] = []
        expected = vae.encode(X)[0].parameters

        def work(vae=vae, expected=expected, others=others):
            try:
                while True:
                    assert np.array_equal(vae.encode(X)[0].parameters, expected)
            except VaeError as error:
                if "was closed" not in str(error):
                    others.append(error)
            except BaseException as error:
                others.append(error)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        vae.close()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        assert not others


SIGNALS = """
import signal, sys
from runtimes import VaeError, open_vae

vae, released, told = open_vae(sys.argv[1], threads=1), [], 0
vae._close = lambda: released.append(1)
signal.signal(signal.SIGALRM, lambda *_: vae.close())
for turn in range(2000):
    vae._closed = vae._released = False
    signal.setitimer(signal.ITIMER_REAL, 5e-6 + turn % 80 * 1e-6)
    try:
        while True:
            with vae._at_work():
                pass
    except VaeError as error:
        told += "was closed" in str(error)
    assert (vae._calls, len(released)) == (0, turn + 1)
print(told)
"""


def test_a_signal_may_close_what_it_interrupts(tiny_bundle, alone):
    """Wherever it comes, also between the lines that count calls: nothing waits for itself, and it is released once."""
    assert alone(SIGNALS, tiny_bundle) == ["2000"]


def test_a_good_result_is_not_lost_where_releasing_fails(slow_vae, monkeypatch):
    vae, entered, go = slow_vae
    monkeypatch.setattr(vae, "_close", lambda: 1 / 0)
    answers: list[Any] = []
    caught: list[str] = []

    def work():
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            answers.append(vae.encode(X)[0].parameters)
        caught.extend(str(warning.message) for warning in seen)

    worker = threading.Thread(target=work)
    worker.start()
    assert entered.wait(30)
    vae.close()
    go.set()
    worker.join(30)
    assert len(answers) == 1
    assert len(caught) == 1 and "division by zero" in caught[0]


def test_closing_twice_or_from_several_threads_releases_once(tiny_bundle, monkeypatch):
    vae, released = open_vae(tiny_bundle, threads=1), []
    monkeypatch.setattr(vae, "_close", lambda: released.append(1))
    threads = [threading.Thread(target=vae.close) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert released == [1]


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_another_thread_ends_a_call_at_work(tiny_bundle, openvino_bundle, backend):
    z, over = np.ones((1, 4, 48, 48), np.float32), threading.Event()

    def cancel():
        while not over.wait(0.02):
            cancel_calls()

    with open_vae(tiny_bundle if backend == "onnxruntime" else openvino_bundle("fp32")) as vae:
        assert vae.backend == backend
        expected = vae.decode(z)[0]
        thread = threading.Thread(target=cancel)
        thread.start()
        try:
            with pytest.raises(VaeError, match=r"terminate|canceled"):
                vae.decode(z)
        finally:
            over.set()
            thread.join()
        assert np.array_equal(vae.decode(z)[0], expected)
