"""The real TensorRT on a real GPU: `make gpu-check` runs these. Elsewhere they skip, with the reason.

What needs no GPU to be checked (files, refusals, the cache, the order of calls) is in the other tests of TensorRT.
"""

import ctypes
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from runtimes import BackendUnavailable, OutOfMemoryError, VaeError, open_vae
from runtimes.cuda import Cuda
from runtimes.profiles import parse_profile
from runtimes.tensorrt_flavours import MODULES, load_flavour
from vae_export.checkpoint import load_model
from vae_export.export import export_bundle, plan_engine, validate_bundle
from vae_export.validate import Case, compare, opened_bundle

pytestmark = pytest.mark.gpu

PROFILES = ("1..2x64..512x64..512@1x256x256", "8x64x64")
SHAPES = ((1, 8, 8), (2, 12, 9), (1, 32, 32), (8, 8, 8))  # batch, height and width in latents
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def cuda():
    try:
        return Cuda(0)
    except BackendUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=MODULES)
def flavour(request, cuda):
    try:
        found = load_flavour(request.param)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    gpu = cuda.compute_capability()
    if found.is_rtx and not hasattr(found.trt.ComputeCapability, gpu.upper()):
        pytest.skip(f"TensorRT-RTX {found.version} does not build for {gpu}")
    return request.param


@pytest.fixture(scope="module")
def model():
    return load_model()


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def bundle(request, flavour, model, tmp_path_factory):
    """The embedded model's bundle, compared with the reference while it was exported."""
    path = tmp_path_factory.mktemp("gpu") / "bundle"
    engine = plan_engine(flavour, [parse_profile(text, model.config.downscale) for text in PROFILES])
    export_bundle(model, path, target=flavour, precision=request.param, engine=engine)
    return path


@pytest.fixture
def vae(bundle):
    with open_vae(bundle) as runtime:
        yield runtime


def latents(batch, height, width):
    return RNG.standard_normal((batch, 16, height, width)).astype(np.float32)


def images(batch, height, width):
    return RNG.uniform(-1, 1, (batch, 3, 8 * height, 8 * width)).astype(np.float32)


def cases(model, arrays):
    """Arrays, images and latents, with what the reference makes of them."""
    for x in arrays:
        graph, function = ("encoder", model.encode_moments) if x.shape[1] == 3 else ("decoder", model.decode_latents)
        with torch.no_grad():
            yield Case(graph, f"array {list(x.shape)}", x, function(torch.from_numpy(x)).numpy())


def test_what_was_built_keeps_to_the_thresholds(bundle):
    measured = validate_bundle(bundle)
    assert {m.by for m in measured} <= set(MODULES) and {m.graph for m in measured} == {"encoder", "decoder"}
    assert len({m.shape for m in measured if m.graph == "decoder"}) >= 3


def test_results_are_those_of_the_reference_at_every_shape(vae, model):
    arrays = [make(*shape) for shape in SHAPES for make in (images, latents)]
    assert compare(list(cases(model, arrays)), vae.backend, opened_bundle(vae), vae.precision)


def test_a_picture_of_one_colour_is_that_of_the_reference(vae, model):
    """Its first maps are next to flat: norms that subtract squares give NaN there."""
    arrays = [np.full((1, 3, 256, 256), colour, np.float32) for colour in (-1, 0, 1)]
    assert compare(list(cases(model, arrays)), vae.backend, opened_bundle(vae), vae.precision)


@pytest.mark.parametrize("options", [{"contexts": 1}, {"contexts": 4}, {"contexts": 2, "cuda_graphs": True}], ids=str)
def test_eight_threads_get_what_one_gets(bundle, options):
    """To the bit: an engine has one set of kernels, whichever context runs them."""
    inputs = [make(*shape) for shape in SHAPES for make in (images, latents)]
    with open_vae(bundle, **options) as vae, ThreadPoolExecutor(8) as pool:

        def call(i):
            x = inputs[i % len(inputs)]
            return vae.encode(x)[0].parameters if x.shape[1] == 3 else vae.decode(x)[0]

        serial = [call(i) for i in range(len(inputs))]
        answers = list(pool.map(call, range(200)))
        assert all(np.array_equal(answer, serial[i % len(inputs)]) for i, answer in enumerate(answers))


def test_cuda_graphs_give_the_same(bundle, vae):
    inputs = [latents(*shape) for shape in SHAPES] * 3  # captured the first time, and replayed among others
    with open_vae(bundle, cuda_graphs=True, contexts=1) as replaying:
        for z in inputs:
            assert np.array_equal(replaying.decode(z).sample, vae.decode(z).sample)


def test_memory_is_that_of_the_shape_at_hand_and_given_back(bundle, cuda):
    with open_vae(bundle, contexts=1) as vae:
        for shape in SHAPES:  # kernels and their modules are loaded, and stay
            vae.decode(latents(*shape))
        used = {}
        for side in (64, 8, 64, 8):
            vae.decode(latents(1, side, side))
            used[side] = cuda.free_memory()[0]
        slot = vae._engines["decoder"]._slots[0]
        assert slot._scratch._size < 16 << 20, "8 x 8 latents"
        held = used[8] - used[64]
        assert held > 8 * (slot._scratch._size + slot.output._size)  # 64 times the elements
        before = cuda.free_memory()[0]
    assert cuda.free_memory()[0] >= before


def test_too_little_memory_is_named_and_survived(vae, cuda):
    z = latents(1, 8, 8)
    expected = vae.decode(z).sample
    hog, size = [], cuda.free_memory()[0]
    cuda.use()
    try:
        while size > 1 << 20:
            try:
                hog.append(cuda.allocate(size, "the hog"))
            except OutOfMemoryError:
                size //= 2
        with pytest.raises(OutOfMemoryError):
            vae.decode(latents(2, 64, 64))
    finally:
        for address in hog:
            cuda.release(address)
    assert np.array_equal(vae.decode(z).sample, expected)


@pytest.mark.parametrize("library", ["torch", "cupy"])
def test_arrays_on_the_gpu_are_answered_there(vae, library):
    if library == "cupy":
        xp = pytest.importorskip("cupy")
        device, host = xp.asarray, (lambda x: x.get())
    elif torch.cuda.is_available():
        device, host = (lambda x: torch.from_numpy(x).cuda()), (lambda x: x.cpu().numpy())
    else:
        pytest.skip("this PyTorch sees no GPU")
    z = latents(2, 9, 12)
    given = device(z)
    answer = vae.decode(given).sample
    assert type(answer) is type(given) and answer.device == given.device
    assert np.array_equal(host(answer), vae.decode(z).sample)


def test_a_plan_is_found_in_the_cache_and_gives_the_same(flavour, model, tmp_path):
    export_bundle(model, tmp_path / "onnx", run_validation=False)
    reports, z = [], latents(1, 8, 8)
    options = {"backend": flavour, "cache_dir": tmp_path / "cache", "profiles": ["1x64x64"]}
    answers = []
    for _ in range(2):
        with open_vae(tmp_path / "onnx", **options, progress=lambda *report: reports.append(report)) as vae:
            answers.append(vae.decode(z).sample)
        built = len(reports)
    assert np.array_equal(*answers) and 0 < len(reports) == built


def test_rtx_keeps_its_kernels(bundle, flavour, tmp_path):
    if flavour != "tensorrt-rtx":
        pytest.skip("TensorRT-RTX alone compiles kernels when they are first needed")
    z, answers = latents(1, 8, 8), []
    for chosen in ("eager", "lazy", "none"):
        with open_vae(bundle, runtime_cache=tmp_path / "kernels", kernel_specialization=chosen) as vae:
            answers.append(vae.decode(z).sample)
        assert (tmp_path / "kernels-decoder").stat().st_size > 0
    # Kernels for one shape may add up in another order: fp16 keeps 11 bits of what is about 1.
    assert max(np.abs(answer - answers[0]).max() for answer in answers) < (2e-2 if vae.precision == "fp16" else 1e-4)


# Our use of CUDA, without TensorRT --------------------------------------------------------------------------------


def test_memory_streams_and_graphs_do_what_they_say(cuda):
    cuda.use()
    size = 1 << 20
    x, y = ctypes.create_string_buffer(RNG.bytes(size), size), ctypes.create_string_buffer(size)
    address, stream = cuda.allocate(size, "a test"), cuda.stream()
    assert address % 256 == 0
    cuda.to_device(address, ctypes.addressof(x), size, stream)
    cuda.wait(stream)
    cuda.begin_capture(stream)
    cuda.to_host(ctypes.addressof(y), address, size, stream)
    graph = cuda.end_capture(stream)
    assert y.raw != x.raw, "it was captured, and not done"
    cuda.launch(graph, stream)
    cuda.wait(stream)
    assert y.raw == x.raw
    cuda.destroy_graph(graph)
    cuda.destroy_stream(stream)
    cuda.release(address)


def test_more_memory_than_there_is_is_refused(cuda):
    with pytest.raises(
        OutOfMemoryError, match=r"everything needs [\d,]+ MiB on cuda:0, which has [\d,]+ of [\d,]+ MiB"
    ):
        cuda.allocate(2 * cuda.free_memory()[1], "everything")
    with pytest.raises(VaeError, match="cudaStreamEndCapture failed with"):
        stream = cuda.stream()
        try:
            cuda.end_capture(stream)
        finally:
            cuda.destroy_stream(stream)


def test_another_thread_may_use_the_gpu(cuda):
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(cuda.free_memory).result()[1] == cuda.free_memory()[1]
