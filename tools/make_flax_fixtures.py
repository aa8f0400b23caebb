"""Parity with FlaxAutoencoderKL of diffusers 0.39.0, the last that had it: fixtures for the tests, and the way back.

diffusers 0.39.0 and the JAX that it knows have an environment of their own, without this package:

    python -m venv oracle && oracle/bin/pip install diffusers==0.39.0 jax==0.4.38 jaxlib==0.4.38 flax==0.10.2
    oracle/bin/python tools/make_flax_fixtures.py make tests/data/flax     # their models, inputs and outputs
    python -m tools.make_flax_fixtures write /tmp/ours                     # ours, in this environment
    oracle/bin/python tools/make_flax_fixtures.py check /tmp/ours          # read by theirs

Each directory holds a model as `save_pretrained` writes it (config.json, diffusion_flax_model.msgpack), and
arrays.npz: images x [B, 3, H, W], their moments [B, h, w, 2*C], latents z [B, C, h, w], and what they decode to, y.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

COMMON = {"norm_num_groups": 4, "latent_channels": 4}
MODELS: dict[str, dict[str, Any]] = {
    "two-levels": {**COMMON, "block_out_channels": (8, 8), "layers_per_block": 2},
    "three-levels": {**COMMON, "block_out_channels": (4, 8, 8), "scaling_factor": 0.13025},
}
SIZE = (2, 3, 24, 32)
TOLERANCE = 2e-5  #: the same arithmetic in fp32, in another order, on values of about 1


def with_types(fields):
    levels = len(fields["block_out_channels"])
    return {
        **fields,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }


def random_params(shapes):
    """Every parameter random, norms and biases too, of a size that keeps activations near 1."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        last = path[-1].key
        if last == "kernel":
            return (rng.standard_normal(leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))).astype(np.float32)
        return rng.normal(1.0 if last == "scale" else 0.0, 0.2, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def outputs(vae, params, x, z):
    moments = vae.apply({"params": params}, x, method=vae.encode).latent_dist
    moments = np.concatenate([moments.mean, moments.logvar], axis=-1)
    return moments, np.asarray(vae.apply({"params": params}, z, method=vae.decode).sample)


def write(directory, flax_class):
    for name, fields in MODELS.items():
        vae = flax_class(**with_types(fields))
        params = random_params(jax.eval_shape(vae.init_weights, jax.random.PRNGKey(0)))
        rng = np.random.default_rng(1)
        x = rng.uniform(-1, 1, SIZE).astype(np.float32)
        factor = 2 ** (len(fields["block_out_channels"]) - 1)
        z = rng.standard_normal((SIZE[0], 4, SIZE[2] // factor, SIZE[3] // factor)).astype(np.float32)
        moments, y = outputs(vae, params, x, z)
        vae.save_pretrained(directory / name, params=params)
        np.savez_compressed(directory / name / "arrays.npz", x=x, moments=moments, z=z, y=y)
        print(f"{directory / name}: moments to {np.abs(moments).max():.2f}, images to {np.abs(y).max():.2f}")


def check(directory, flax_class):
    """Exit 1 unless diffusers reads what ours wrote, and computes the same."""
    for name in MODELS:
        path = directory / name
        vae, params = flax_class.from_pretrained(str(path))
        arrays = np.load(path / "arrays.npz")
        found = outputs(vae, params, arrays["x"], arrays["z"])
        worst = [float(np.abs(a - arrays[key]).max()) for a, key in zip(found, ("moments", "y"), strict=True)]
        print(f"{path}: largest difference {worst[0]:.1e} in moments, {worst[1]:.1e} in images")
        if max(worst) > TOLERANCE:
            sys.exit(1)


def main():
    command, directory = sys.argv[1], Path(sys.argv[2])
    if command == "write":
        from runtimes.flax.model import FlaxAutoencoderKL as Ours

        write(directory, Ours)
    else:
        from diffusers import FlaxAutoencoderKL as Theirs

        {"make": write, "check": check}[command](directory, Theirs)


if __name__ == "__main__":
    main()
