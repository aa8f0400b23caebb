"""An ONNX bundle's folders in a pipeline directory of Optimum: its ORT classes load them as they are.

optimum-onnx 0.1.0 takes transformers below 4.58, and this repository pins a later one: this runs in an environment of
its own, made with `pip install 'optimum-onnx[onnxruntime]' diffusers pytest -e '.[export,cpu]'`.
"""

import shutil
import warnings

import numpy as np
import pytest
import torch

pytest.importorskip(
    "optimum.onnxruntime",
    reason="optimum-onnx takes transformers below 4.58: it needs an environment of its own",
    exc_type=ImportError,
)
import diffusers
from optimum.onnxruntime import ORTStableDiffusionPipeline

from examples.tiny_pipelines import tiny_pipeline


@pytest.mark.filterwarnings("ignore")  # of Optimum's own export of the rest
def test_a_bundle_dropped_into_a_pipeline_directory_loads_in_optimum(tiny_model, tiny_bundle, tmp_path):
    tiny_model.save_pretrained(tmp_path / "vae")
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae")
    tiny_pipeline("stable-diffusion", vae).save_pretrained(tmp_path / "torch")

    def picture(pipe):
        pipe.set_progress_bar_config(disable=True)
        arguments = {"height": 64, "width": 96, "num_inference_steps": 3, "output_type": "np"}
        return pipe("a photograph of a cat", generator=torch.Generator().manual_seed(0), **arguments).images

    expected = picture(diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "torch"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # A text: Optimum takes no Path.
        ORTStableDiffusionPipeline.from_pretrained(str(tmp_path / "torch"), export=True).save_pretrained(
            tmp_path / "onnx"
        )
    for folder in ("vae_encoder", "vae_decoder"):
        shutil.rmtree(tmp_path / "onnx" / folder)
        shutil.copytree(tiny_bundle / folder, tmp_path / "onnx" / folder)
    pipe = ORTStableDiffusionPipeline.from_pretrained(str(tmp_path / "onnx"))
    assert np.abs(picture(pipe) - expected).max() * 255 <= 2
    x = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    ours, theirs = pipe.vae.encode(x).latent_dist, vae.encode(x).latent_dist
    torch.testing.assert_close(ours.mode(), theirs.mode(), rtol=0, atol=2e-5)
