"""Models of real size, with random weights: for time and memory, not for quality."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from runtimes.config import VaeConfig

if TYPE_CHECKING:
    from vae_export.families.autoencoder_kl import AutoencoderKL

WIDTHS = (128, 256, 512, 512)
#: name -> what its config has beside widths and blocks
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "sd": {},
    "flux": {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
}


def config_of(architecture: str, widths: tuple[int, ...] = WIDTHS) -> VaeConfig:
    """Of an architecture: "sd" is that of Stable Diffusion's and SDXL's VAE, "flux" that of FLUX.1."""
    return VaeConfig(
        block_out_channels=widths,
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        **ARCHITECTURES[architecture],
    )


def random_model(config: VaeConfig) -> AutoencoderKL:
    import torch

    from vae_export.families.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(config).eval().requires_grad_(False)


def stable_diffusion_sized() -> AutoencoderKL:
    """The architecture of Stable Diffusion's and SDXL's VAE, 84 M parameters."""
    return random_model(config_of("sd"))
