"""ONNX Runtime's CUDA provider on a real GPU."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from runtimes import CompatibilityError, NumericsError, OutOfMemoryError, ShapeError, open_vae
from tests.helpers.gpu_arrays import SHAPES, cases, every_shape, images, latents, one_colour, run
from tools.blow_up import blown_up, gains
from vae_export.comparison import compare, opened_bundle
from vae_export.export import export_bundle

pytestmark = pytest.mark.gpu

onnxruntime = pytest.importorskip("onnxruntime")
PROVIDER = "CUDAExecutionProvider"
# A process without PyTorch, whose libraries would be found by ONNX Runtime too.
ALONE = """
import sys
from runtimes import open_vae
import numpy as np
with open_vae(sys.argv[1], device="cuda") as vae:
    print(vae.decode(np.zeros((1, 16, 4, 4), np.float32)).sample.shape, "torch" in sys.modules)
"""


@pytest.fixture(scope="module", autouse=True)
def provider(cuda):
    if PROVIDER not in onnxruntime.get_available_providers():
        pytest.skip(f"this ONNX Runtime has no {PROVIDER}: pip install 'vae-export[gpu]'")


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    """exported(precision): the path of the embedded model's bundle."""
    made = {}

    def export(precision):
        if precision not in made:
            made[precision] = tmp_path_factory.mktemp("gpu") / precision
            export_bundle(model, made[precision], precision=precision, run_validation=False)
        return made[precision]

    return export


@pytest.fixture(params=["fp32", "fp16"])
def vae(request, exported):
    with open_vae(exported(request.param), device="cuda") as runtime:
        yield runtime


@pytest.fixture
def plain(exported):
    """In fp32."""
    with open_vae(exported("fp32"), device="cuda") as runtime:
        yield runtime


@pytest.mark.parametrize("arrays", [every_shape, one_colour])
def test_results_are_those_of_the_reference(vae, model, arrays):
    """By the thresholds of the precision, which TF32 in place of fp32 misses by far."""
    assert compare(cases(model, arrays()), "onnxruntime on cuda", opened_bundle(vae), vae.precision)


def test_tf32_is_what_it_says_where_it_is_asked_for(exported, model):
    """10 bits of mantissa: below the threshold of fp32, far above that of fp16."""
    found = cases(model, [images(1, 32, 32), latents(1, 32, 32)])
    with open_vae(exported("fp32"), device="cuda", allow_tf32=True) as vae:
        assert compare(found, "onnxruntime in TF32", opened_bundle(vae), "fp16")
        with pytest.raises(NumericsError):
            compare(found, "onnxruntime in TF32", opened_bundle(vae), "fp32")


def test_bf16_which_it_does_not_compute_is_refused(exported):
    with pytest.raises(CompatibilityError, match=r"cannot load vae_encoder/model\.onnx"):
        open_vae(exported("bf16"), device="cuda")


def test_a_model_whose_activations_overflow_is_exact_in_real_half_precision(model, tmp_path):
    """What `simulated fp16` promises, where fp16 is what is computed."""
    blown = blown_up(model, gains(seed=0, powers_of_two=False))
    expected = cases(blown, [*every_shape(), *one_colour()])
    for rescale in (True, False):
        path = tmp_path / f"rescale-{rescale}"
        export_bundle(blown, path, precision="fp16", rescale=rescale, run_validation=False)
        with open_vae(path, device="cuda") as vae:
            if rescale:
                assert compare(expected, "onnxruntime on cuda", opened_bundle(vae), "fp16")
            else:
                with pytest.raises(NumericsError, match="NaN or infinity"):
                    compare(expected, "onnxruntime on cuda", opened_bundle(vae), "fp16")


def test_eight_threads_get_what_one_gets(plain):
    """To the bit, though the provider plans its convolutions anew whenever the size changes (0.4 s)."""
    inputs = every_shape()
    serial = [run(plain, x) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: run(plain, inputs[i % len(inputs)]), range(40)))
    assert all(np.array_equal(answer, serial[i % len(inputs)]) for i, answer in enumerate(answers))


def test_tensors_on_the_gpu_are_answered_there(vae):
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch sees no GPU")
    for shape in SHAPES:
        for x in (images(*shape), latents(*shape)):
            given = torch.from_numpy(x).cuda()
            answer = run(vae, given)
            assert answer.device == given.device and answer.dtype == torch.float32
            assert np.array_equal(answer.cpu().numpy(), run(vae, x))
            strided = torch.from_numpy(x).cuda().mT.contiguous().mT
            assert torch.equal(run(vae, strided), answer)


def test_work_queued_before_and_after_is_waited_for(plain):
    """The tensor is still being made on PyTorch's stream when it is given, and the answer is used at once."""
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch sees no GPU")
    z = latents(2, 32, 32)
    expected = plain.decode(torch.from_numpy(z).cuda()).sample.clone()
    weight = torch.randn(4096, 4096, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(5):
            slow = weight
            for _ in range(20):
                slow = slow @ weight / 64
            given = torch.from_numpy(z).cuda() + 0 * slow.nan_to_num(0, 0, 0).sum()
            assert torch.equal(plain.decode(given).sample + 0, expected)


def test_a_tensor_on_another_device_is_refused(plain):
    class Elsewhere:
        is_cuda, device = True, torch.device("cuda:1")

    with pytest.raises(ShapeError, match="the array is on cuda:1, and this VAE on cuda:0"):
        plain._run_on_device("decoder", Elsewhere())


def test_too_little_memory_is_named_and_survived(plain, hogged):
    z = latents(1, 8, 8)
    expected = plain.decode(z).sample
    with hogged(), pytest.raises(OutOfMemoryError, match="does not fit the memory of cuda"):
        plain.decode(latents(4, 128, 128))
    assert np.array_equal(plain.decode(z).sample, expected)


def test_nothing_but_its_packages_is_needed(exported, alone):
    """CUDA's libraries are found where pip put them, with no PyTorch imported and no LD_LIBRARY_PATH."""
    assert alone(ALONE, exported("fp32")) == ["(1, 3, 32, 32) False"]
    assert "torch" in sys.modules
