"""The real TensorRT on a real GPU.

What needs no GPU to be checked (files, refusals, the cache, the order of calls) is in the other tests of TensorRT.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from runtimes import BackendUnavailable, OutOfMemoryError, open_vae
from runtimes.tensorrt.flavours import MODULES, load_flavour
from runtimes.tensorrt.profiles import parse_profile
from runtimes.tensorrt.runtime import TensorRtVae
from tests.helpers.gpu_arrays import SHAPES, cases, every_shape, latents, one_colour, run
from vae_export import export_bundle, validate_bundle
from vae_export.comparison import compare, opened_bundle
from vae_export.targets.engines import plan_engine

pytestmark = pytest.mark.gpu

PROFILES = ("1..2x64..512x64..512@1x256x256", "8x64x64")


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


def test_what_was_built_keeps_to_the_thresholds(bundle):
    measured = validate_bundle(bundle)
    assert {m.by for m in measured} <= set(MODULES) and {m.graph for m in measured} == {"encoder", "decoder"}
    assert len({m.shape for m in measured if m.graph == "decoder"}) >= 3


def test_results_are_those_of_the_reference_at_every_shape(vae, model):
    assert compare(cases(model, every_shape()), vae.backend, opened_bundle(vae), vae.precision)


def test_a_picture_of_one_colour_is_that_of_the_reference(vae, model):
    assert compare(cases(model, one_colour()), vae.backend, opened_bundle(vae), vae.precision)


@pytest.mark.parametrize("options", [{"contexts": 1}, {"contexts": 4}, {"contexts": 2, "cuda_graphs": True}], ids=str)
def test_eight_threads_get_what_one_gets(bundle, options):
    """To the bit: an engine has one set of kernels, whichever context runs them."""
    inputs = every_shape()
    with open_vae(bundle, **options) as vae, ThreadPoolExecutor(8) as pool:
        serial = [run(vae, x) for x in inputs]
        answers = list(pool.map(lambda i: run(vae, inputs[i % len(inputs)]), range(200)))
        assert all(np.array_equal(answer, serial[i % len(inputs)]) for i, answer in enumerate(answers))


def test_cuda_graphs_give_the_same(bundle, vae):
    inputs = [latents(*shape) for shape in SHAPES] * 3  # captured the first time, and replayed among others
    with open_vae(bundle, cuda_graphs=True, contexts=1) as replaying:
        for z in inputs:
            assert np.array_equal(replaying.decode(z)[0], vae.decode(z).sample)


def test_memory_is_that_of_the_shape_at_hand_and_given_back(bundle, cuda):
    with open_vae(bundle, contexts=1) as vae:
        for shape in SHAPES:  # kernels and their modules are loaded, and stay
            vae.decode(latents(*shape))
        used = {}
        for side in (64, 8, 64, 8):
            vae.decode(latents(1, side, side))
            used[side] = cuda.free_memory()[0]
        assert isinstance(vae, TensorRtVae)
        slot = vae._engines["decoder"]._slots[0]
        assert slot._scratch._size < 16 << 20, "8 x 8 latents"
        held = used[8] - used[64]
        assert held > 8 * (slot._scratch._size + slot.output._size)  # 64 times the elements
        before = cuda.free_memory()[0]
    assert cuda.free_memory()[0] >= before


def test_too_little_memory_is_named_and_survived(vae, hogged):
    z = latents(1, 8, 8)
    expected = vae.decode(z).sample
    with hogged(), pytest.raises(OutOfMemoryError):
        vae.decode(latents(2, 64, 64))
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
            answers.append(vae.decode(z)[0])
        built = len(reports)
    assert np.array_equal(*answers) and 0 < len(reports) == built


def test_rtx_keeps_its_kernels(bundle, flavour, tmp_path):
    if flavour != "tensorrt-rtx":
        pytest.skip("TensorRT-RTX alone compiles kernels when they are first needed")
    z, answers = latents(1, 8, 8), []
    for chosen in ("eager", "lazy", "none"):
        with open_vae(bundle, runtime_cache=tmp_path / "kernels", kernel_specialization=chosen) as vae:
            answers.append(vae.decode(z)[0])
        assert (tmp_path / "kernels-decoder").stat().st_size > 0
    # Kernels for one shape may add up in another order: fp16 keeps 11 bits of what is about 1.
    assert max(np.abs(answer - answers[0]).max() for answer in answers) < (2e-2 if vae.precision == "fp16" else 1e-4)
