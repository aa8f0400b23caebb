"""A diffusers pipeline with its own VAE and with an exported one: the same seed, the same picture.

    python examples/diffusers_pipeline.py                                     # a tiny random pipeline, no download
    python examples/diffusers_pipeline.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --steps 20
    python examples/diffusers_pipeline.py --target openvino --pipeline flux

Needs `pip install 'vae-export[export,cpu,openvino,diffusers]' transformers`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from examples.tiny_pipelines import KINDS, tiny_pipeline
from runtimes import open_vae
from vae_export import AutoencoderKL, export_bundle
from vae_export.checkpoints.load import load_model
from vae_export.diffusers import as_diffusers_vae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a diffusers pipeline: a directory or Hub id; default: a tiny random one")
    texts = [kind for kind in KINDS if not kind.endswith(("img2img", "inpaint"))]
    parser.add_argument("--pipeline", default=texts[0], choices=texts, help="the kind of the tiny one")
    parser.add_argument("--target", default="onnx", choices=["onnx", "openvino"])
    parser.add_argument("--prompt", default="an astronaut on a horse")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--size", type=int, help="pixels a side; default: 64 for a tiny one, else the pipeline's own")
    parser.add_argument("--out", type=Path, default=Path("out/diffusers"))
    given = parser.parse_args()

    if given.model is None:
        model = load_model()  # the one that comes with vae-export: really trained, unlike the rest
        assert isinstance(model, AutoencoderKL)
        pipe = tiny_pipeline(given.pipeline, in_diffusers(model))
        given.size = given.size or 64
    else:
        model = AutoencoderKL.from_pretrained(given.model, subfolder="vae")
        pipe = diffusers.DiffusionPipeline.from_pretrained(given.model)

    def picture(name: str) -> Any:
        generator = torch.Generator().manual_seed(0)
        start = time.perf_counter()
        size = {} if given.size is None else {"height": given.size, "width": given.size}
        image = pipe(given.prompt, num_inference_steps=given.steps, generator=generator, **size).images[0]
        image.save(given.out / f"{name}.png")
        print(f"{name}: {time.perf_counter() - start:.2f} s, {given.out / name}.png")
        return np.asarray(image).astype(int)

    given.out.mkdir(parents=True, exist_ok=True)
    original = picture("original")

    export_bundle(model, given.out / given.target, target=given.target, overwrite=True)
    with open_vae(given.out / given.target) as vae:
        pipe.vae = as_diffusers_vae(vae)
        exported = picture(given.target)
    print(f"largest difference: {np.abs(exported - original).max()} of 255")


def in_diffusers(model: AutoencoderKL) -> Any:
    """The same model as diffusers' own class."""
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return diffusers.AutoencoderKL.from_pretrained(directory)


if __name__ == "__main__":
    main()
