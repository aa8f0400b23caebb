"""Calls of a TensorRT runtime: CUDA graphs, threads that share contexts, arrays that lie on the GPU.

Tests runtimes/tensorrt/execution.py, runtimes/tensorrt/device_arrays.py.
"""

import importlib
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from runtimes import (
    ShapeError,
    VaeError,
    open_vae,
)
from tests.helpers.inputs import images, latents, results

pytestmark = pytest.mark.usefixtures("fake_gpu")


# CUDA graphs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def replaying(tiny_bundle, fake_gpu):
    """One context, so that it is known which one a call gets, and room for two graphs."""
    with open_vae(tiny_bundle, cuda_graphs=True, contexts=1, max_graphs=2) as runtime:
        yield runtime


def test_launches_are_replayed_from_the_second_call_on(replaying, vae, fake_gpu):
    for launched, z in enumerate(latents() for _ in range(4)):
        assert np.array_equal(replaying.decode(z).sample, vae.decode(z).sample)
        assert fake_gpu.launched == launched


def test_a_graph_stays_right_while_other_shapes_are_run(replaying, vae, fake_gpu):
    """A graph is void once its context was told another shape; the fake refuses to launch it then."""
    for shape in ((1, 6, 4), (1, 4, 6), (1, 6, 4), (1, 4, 6)):
        z = latents(*shape)
        assert np.array_equal(replaying.decode(z).sample, vae.decode(z).sample)
    assert fake_gpu.launched == 2


def test_the_graph_that_was_not_used_for_longest_goes_first(replaying, fake_gpu):
    first, second, third = latents(1, 6, 4), latents(1, 5, 4), latents(1, 4, 4)
    for z, launched in ((first, 0), (second, 0), (first, 1), (third, 1), (first, 2), (second, 2)):
        replaying.decode(z)
        assert fake_gpu.launched == launched
        assert len(fake_gpu.graphs) <= 2


def test_graphs_are_captured_anew_when_their_memory_was_replaced(replaying, vae, fake_gpu):
    for shape, launched in (((1, 2, 2), 0), ((1, 2, 2), 1), ((1, 9, 9), 1), ((1, 2, 2), 1), ((1, 2, 2), 2)):
        z = latents(*shape)
        assert np.array_equal(replaying.decode(z).sample, vae.decode(z).sample)
        assert fake_gpu.launched == launched


def test_a_capture_that_fails_is_said_and_survived(replaying, vae, fake_gpu):
    fake_gpu.refused_graphs = True
    with pytest.raises(VaeError, match="cudaStreamEndCapture failed"):
        replaying.decode(latents())
    fake_gpu.refused_graphs = False
    z = latents()
    assert np.array_equal(replaying.decode(z).sample, vae.decode(z).sample)


# Threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"contexts": 1}, {"contexts": 2}, {"contexts": 2, "cuda_graphs": True}], ids=str)
def test_threads_share_as_many_contexts_as_there_are(tiny_bundle, fake_gpu, options):
    inputs = [make(*shape) for shape in ((1, 1, 1), (3, 5, 2)) for make in (images, latents)]
    with open_vae(tiny_bundle, **options) as vae, ThreadPoolExecutor(8) as pool:

        def call(i):
            x = inputs[i % len(inputs)]
            return vae.encode(x)[0].parameters if x.shape[1] == 3 else vae.decode(x)[0]

        serial = [call(i) for i in range(len(inputs))]
        answers = list(pool.map(call, range(100)))
        assert all(np.array_equal(answer, serial[i % len(inputs)]) for i, answer in enumerate(answers))
        assert len(fake_gpu.streams) <= 2 * options["contexts"]  # of two graphs
        assert "cuda_graphs" in options or len(fake_gpu.contexts) == len(fake_gpu.streams)


def test_closing_lets_calls_at_work_end_also_those_that_wait_for_a_context(tiny_bundle, fake_gpu, monkeypatch):
    z, at_work, go_on = latents(), threading.Event(), threading.Event()
    vae = open_vae(tiny_bundle, contexts=1)
    expected = vae.decode(z).sample
    engine = vae._engines["decoder"].engine
    compute = engine._compute

    def slow(*arguments):
        at_work.set()
        assert go_on.wait(10)
        compute(*arguments)

    monkeypatch.setattr(engine, "_compute", slow)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(vae.decode, z)
        assert at_work.wait(10)
        second = pool.submit(vae.decode, z)
        while vae._calls < 2:
            pass
        vae.close()
        with pytest.raises(VaeError, match="was closed"):
            vae.decode(z)
        assert fake_gpu.streams
        go_on.set()
        assert np.array_equal(first.result(10).sample, expected)
        assert np.array_equal(second.result(10).sample, expected)
    assert not fake_gpu.streams


def test_a_thread_works_on_the_gpu_that_was_chosen(tiny_bundle, fake_gpu):
    fake_gpu.count = 2
    with open_vae(tiny_bundle, device="cuda:1") as vae, ThreadPoolExecutor(1) as pool:
        pool.submit(vae.decode, latents()).result()
    assert fake_gpu.devices == {1}


# Arrays on the GPU ------------------------------------------------------------------------------------------------


@pytest.fixture
def cupy(fake_gpu):
    return importlib.import_module("cupy")


@pytest.mark.parametrize("options", [{}, {"cuda_graphs": True}], ids=["plain", "graphs"])
def test_arrays_on_the_gpu_are_read_and_answered_there(tiny_bundle, fake_gpu, cupy, options):
    with open_vae(tiny_bundle, check_finite=True, **options) as vae:
        for _ in range(3):
            x, z = images(2), latents(2)
            expected = results(vae, x, z)
            before = dict(fake_gpu.copied)
            answers = results(vae, cupy.asarray(x), cupy.asarray(z))
            assert fake_gpu.copied == before, "nothing went through the host"
            for answer, right in zip(answers, expected, strict=True):
                assert isinstance(answer, cupy.ndarray) and np.array_equal(answer.get(), right)
        del answers, answer


def test_arrays_on_the_gpu_of_any_float_type_are_tiled_sliced_drawn_and_pictured_as_others(vae, cupy):
    x, z = images(2, 9, 10).astype(np.float16), latents(2, 9, 10).astype(np.float64)
    vae.enable_tiling(), vae.enable_slicing()
    for answer, right in zip(results(vae, cupy.asarray(x), cupy.asarray(z)), results(vae, x, z), strict=True):
        assert np.array_equal(answer.get(), right)
    draws = [vae.encode(given).latent_dist.sample(np.random.default_rng(7)) for given in (x, cupy.asarray(x))]
    assert np.array_equal(draws[0], draws[1].get())
    pictures = vae.latents_to_images(z)
    for given in (cupy.asarray(z), [cupy.asarray(one) for one in z]):
        assert np.array_equal(vae.latents_to_images(given).get(), pictures)
    assert np.array_equal(vae.images_to_latents(cupy.asarray(pictures)).get(), vae.images_to_latents(pictures))
    with pytest.raises(ShapeError, match="not int64"):
        vae.decode(cupy.asarray(z.astype(np.int64)))


def test_an_array_on_another_gpu_is_refused(vae, cupy, monkeypatch):
    monkeypatch.setattr(cupy.ndarray.device, "id", 1)
    with pytest.raises(ShapeError, match="the array is on cuda:1, and this VAE on cuda:0"):
        vae.decode(cupy.asarray(latents()))


def test_a_backend_without_a_gpu_answers_them_in_kind_too(onnx_bundle, cupy):
    z = latents()
    with open_vae(onnx_bundle, threads=1) as vae:
        answer = vae.decode(cupy.asarray(z)).sample
        assert isinstance(answer, cupy.ndarray) and np.array_equal(answer.get(), vae.decode(z).sample)
