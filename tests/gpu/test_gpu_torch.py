"""The reference in PyTorch on a real GPU: half precision as the hardware has it, and bundles in diffusers' place."""

import copy

import pytest
import torch

from runtimes import open_vae
from tests.helpers.gpu_arrays import cases, every_shape, latents, one_colour
from tools.blow_up import blown_up, gains
from vae_export.comparison import compare, simulated
from vae_export.export import export_bundle
from vae_export.rewrites.ranges import calibration_inputs, probe
from vae_export.rewrites.rescale import rescale_activations

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def true_fp32(cuda):
    """cuDNN would take TF32 for it, with the 10 bits of fp16."""
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch sees no GPU")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def on_gpu(model, dtype):
    """A candidate: the model as PyTorch computes it on the GPU."""
    model = model.to("cuda", dtype)

    @torch.no_grad()
    def candidate(graph, x):
        x = torch.from_numpy(x).to("cuda", dtype)
        return (model.encode_moments(x) if graph == "encoder" else model.decode_latents(x)).float().cpu().numpy()

    return candidate


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_reference_is_the_same_there(model, precision):
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    candidate = on_gpu(copy.deepcopy(model), dtype)
    assert compare(cases(model, [*every_shape(), *one_colour()]), "torch on cuda", candidate, precision)


def test_the_simulated_half_is_what_the_hardware_computes(model):
    """As far from the reference, to 3 dB: sums within a convolution are of fp32 in both, in another order."""
    blown = blown_up(model, gains(seed=0, powers_of_two=False))
    rescued, _ = rescale_activations(blown, probe(blown, calibration_inputs(blown)))
    arrays = cases(blown, [*every_shape(), *one_colour()])
    simulation = compare(arrays, "simulated fp16", simulated(rescued, "fp16"), "fp16")
    hardware = compare(arrays, "torch on cuda", on_gpu(rescued, torch.float16), "fp16")
    for expected, found in zip(simulation, hardware, strict=True):
        assert expected.psnr_db is not None and found.psnr_db is not None
        assert abs(expected.psnr_db - found.psnr_db) < 3, (expected, found)


def test_a_bundle_in_diffusers_place_keeps_tensors_on_the_gpu(model, tmp_path):
    pytest.importorskip("diffusers")
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDAExecutionProvider: pip install 'vae-export[gpu]'")
    from vae_export.diffusers import as_diffusers_vae

    export_bundle(model, tmp_path / "bundle", run_validation=False)
    with open_vae(tmp_path / "bundle", device="cuda") as runtime:
        vae, z = as_diffusers_vae(runtime).to(torch.float16), torch.from_numpy(latents(1, 8, 8)).cuda()
        assert vae.device == torch.device("cuda:0")
        answer = vae.decode(z.half()).sample
        assert (answer.dtype, answer.device) == (torch.float16, z.device)
        right = runtime.decode(z.half().float().cpu().numpy())[0]
        assert torch.equal(answer.cpu(), torch.from_numpy(right).half())
