"""Models of real size, with random weights: for time and memory, not for quality."""

from __future__ import annotations

import torch

from vae_export.families.autoencoder_kl import AutoencoderKL


def stable_diffusion_sized() -> AutoencoderKL:
    """The architecture of Stable Diffusion's and SDXL's VAE, 84 M parameters."""
    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    return model.eval().requires_grad_(False)
