"""The adapter in pipelines that are made of others, offloaded, copied and sent to other processes."""

import copy
import operator
import pickle
import warnings

import numpy as np
import pytest
import torch

from runtimes import ConfigError, VaeError

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from examples.tiny_pipelines import tiny_pipeline  # noqa: E402
from vae_export.diffusers import DiffusersVae, as_diffusers_vae  # noqa: E402

PROMPT = "a photograph of a cat"
PHOTO = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
SIBLINGS = {
    "stable-diffusion": (diffusers.StableDiffusionImg2ImgPipeline, diffusers.StableDiffusionInpaintPipeline),
    "stable-diffusion-xl": (diffusers.StableDiffusionXLImg2ImgPipeline, diffusers.StableDiffusionXLInpaintPipeline),
    "stable-diffusion-3": (diffusers.StableDiffusion3Img2ImgPipeline, diffusers.StableDiffusion3InpaintPipeline),
    "flux": (diffusers.FluxImg2ImgPipeline, diffusers.FluxInpaintPipeline),
}


@pytest.fixture
def ours(vae):
    return as_diffusers_vae(vae)


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def picture(pipe, **options):
    """uint8 [64, 64, 3] of two steps."""
    options = {"height": 64, "width": 64} | options
    made = pipe(PROMPT, num_inference_steps=2, generator=torch.Generator().manual_seed(0), **options)
    return np.asarray(made.images[0])


# from_pipe --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SIBLINGS)
def test_from_pipe_takes_it_along(kind, ours):
    pipe = tiny_pipeline(kind, ours)
    automatic = diffusers.AutoPipelineForImage2Image, diffusers.AutoPipelineForInpainting
    for sibling in (*SIBLINGS[kind], type(pipe), *automatic):
        assert sibling.from_pipe(pipe).vae is ours, sibling.__name__


def test_a_pipeline_of_from_pipe_makes_the_same_picture(ours, tiny_model):
    fields = {name: value for name, value in tiny_model.config.to_dict().items() if not name.startswith("_")}
    original = diffusers.AutoencoderKL(**fields)
    original.load_state_dict(tiny_model.state_dict())
    made = []
    for vae in (original.eval(), ours):
        pipe = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(tiny_pipeline("stable-diffusion", vae))
        pipe.set_progress_bar_config(disable=True)
        made.append(picture(pipe, image=PHOTO, strength=1.0, height=None, width=None).astype(int))
    assert np.abs(made[0] - made[1]).max() <= 2  # fp32 in another order, rounded to pixels


def test_its_class_is_equal_to_diffusers_and_not_the_same(ours):
    theirs = diffusers.AutoencoderKL
    assert type(ours) is DiffusersVae and type(ours) is not theirs
    assert operator.eq(type(ours), theirs) and operator.eq(theirs, type(ours)) and type(ours) in (theirs,)
    assert not operator.ne(type(ours), theirs) and not operator.ne(theirs, type(ours))
    assert operator.ne(type(ours), diffusers.AutoencoderTiny)
    assert {theirs: "theirs", DiffusersVae: "ours"}[type(ours)] == "ours"
    assert not issubclass(theirs, DiffusersVae)


# Inside -----------------------------------------------------------------------------------------------------------


def test_the_parts_that_pipelines_call_are_there(ours):
    """As older pipelines do it: moments of the encoder and quant_conv, images of post_quant_conv and the decoder."""
    x, z = noise(1, 3, 32, 32), noise(1, 4, 4, 4)
    moments = ours.quant_conv(ours.encoder(x))
    assert torch.equal(moments, ours.encode(x).latent_dist.parameters)
    assert torch.equal(ours.decoder(ours.post_quant_conv(z)), ours.decode(z).sample)
    for part in (ours.encoder, ours.decoder, ours.quant_conv, ours.post_quant_conv):
        assert next(part.parameters()).dtype == torch.float32
    ours.half()
    for part in (ours.decoder.conv_in, ours.decoder.mid_block, ours.post_quant_conv):  # as AnimateDiff's upcast_vae
        part.to(torch.float32)
        assert ours.dtype == next(ours.decoder.parameters()).dtype == torch.float32


def test_a_gradient_that_nobody_will_get_is_warned_of_once(ours):
    z = noise(1, 4, 8, 8).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            ours.decode(z)
        ours.decode(z.detach())
    with pytest.warns(UserWarning, match="no gradient flows") as caught:
        assert not ours.decode(z).sample.requires_grad
        ours.decode(z), ours.encode(noise(1, 3, 32, 32).requires_grad_())
    assert len(caught) == 1


# Offloading -------------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerate():
    return pytest.importorskip("accelerate")


@pytest.mark.parametrize("kind", ["stable-diffusion", "flux"])
@pytest.mark.parametrize("way", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_pipelines_with_offloading_make_the_same_picture(ours, accelerate, kind, way):
    expected = picture(tiny_pipeline(kind, ours))
    pipe = tiny_pipeline(kind, ours)
    if way == "enable_sequential_cpu_offload":
        # accelerate 1.15 fails to offload the weights of transformers 5 again after a call on the CPU.
        pipe._exclude_from_cpu_offload = [name for name in pipe.components if name != "vae"]
    getattr(pipe, way)(device="cpu")
    for _ in range(2):
        assert np.array_equal(picture(pipe), expected)
    pipe.remove_all_hooks()
    assert np.array_equal(picture(tiny_pipeline(kind, ours)), expected)


def test_the_model_before_it_is_offloaded_when_it_is_called(vae, accelerate):
    """That is what offloading is for: the UNet leaves the GPU before the VAE works."""
    unet = torch.nn.Linear(2, 2)
    _, before = accelerate.cpu_offload_with_hook(unet, "cpu")
    unet.to("meta")  # in the place of a GPU
    offloaded = []
    before.offload = lambda: offloaded.append(unet)
    ours = as_diffusers_vae(vae)
    ours._home = torch.device("meta")
    accelerate.cpu_offload_with_hook(ours, "meta", prev_module_hook=before)
    assert ours.decode(noise(1, 4, 8, 8)).sample.shape == (1, 3, 64, 64)
    assert offloaded == [unet] and ours.device.type == "meta"


def test_it_moves_between_its_device_and_the_cpu_alone(vae):
    ours = as_diffusers_vae(vae)
    for device in ("cpu", "cpu:0"):
        assert ours.to(device).device.type == "cpu"
    with pytest.raises(ConfigError, match="neither can be moved"):
        ours.to("meta")
    ours._home = torch.device("meta")  # in the place of a GPU, on which the runtime is
    assert ours.to("meta").device.type == "meta"


# Copies and pickles -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_it_is_copied_and_pickled_with_its_bundle(vae, again):
    ours = as_diffusers_vae(vae)
    ours.to(torch.float16).enable_tiling()
    z = noise(1, 4, 8, 8)
    copied = again(ours)
    assert copied.dtype == torch.float16 and copied.use_tiling and copied.config == ours.config
    assert torch.equal(copied.decode(z).sample, ours.decode(z).sample)
    copied.runtime.close()
    if again is copy.copy:  # shallow, of the adapter: both have one runtime, as with any module's parts
        assert copied.runtime is vae
    else:
        ours.decode(z)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_pipeline_that_holds_it_is_copied_and_pickled(ours, again):
    pipe = tiny_pipeline("stable-diffusion", ours)
    expected, copied = picture(pipe), again(pipe)
    assert type(copied.vae) is DiffusersVae and copied.vae.runtime is not ours.runtime
    assert np.array_equal(picture(copied), expected)
    copied.vae.runtime.close()
    assert np.array_equal(picture(pipe), expected)


def test_of_a_closed_bundle_no_copy_is_made(vae, ours):
    vae.close()
    with pytest.raises(VaeError, match="closed"):
        copy.deepcopy(tiny_pipeline("stable-diffusion", ours))


DATASET = """
import sys
import torch
from torch.utils.data import DataLoader, Dataset
from runtimes import open_vae
from vae_export.diffusers import as_diffusers_vae

class Pictures(Dataset):
    def __init__(self, vae):
        self.vae = vae

    def __len__(self):
        return 2

    def __getitem__(self, number):
        with torch.no_grad():
            return self.vae.decode(torch.full((1, 4, 2, 2), float(number))).sample[0]

if __name__ == "__main__":
    dataset = Pictures(as_diffusers_vae(open_vae(sys.argv[1], threads=1)))
    expected = torch.stack([dataset[n] for n in range(2)])
    loader = DataLoader(dataset, num_workers=1, multiprocessing_context="spawn")
    print(torch.equal(torch.cat(list(loader)), expected))
"""


def test_a_dataset_that_holds_it_goes_to_the_workers_of_a_dataloader(alone, tiny_bundle, tmp_path):
    (tmp_path / "job.py").write_text(DATASET)
    again = "import os, sys; os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    assert alone(again, tmp_path / "job.py", tiny_bundle)[-1] == "True"
