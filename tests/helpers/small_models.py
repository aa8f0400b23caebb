"""Small models with random weights, and inputs for their graphs."""

import torch

from vae_export import AutoencoderKL
from vae_export.photos import middle_of, photographs


def small_model(*, attention=True, quant=True, levels=3, seed=0):
    """Random weights, norms too, so that no two groups are alike."""
    torch.manual_seed(seed)
    model = AutoencoderKL(
        block_out_channels=(16, 32, 32)[:levels],
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D")[:levels],
        up_block_types=("UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D")[:levels],
        norm_num_groups=8,
        layers_per_block=1,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        mid_block_add_attention=attention,
    )
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.eval().requires_grad_(False)


def inputs_of(model):
    factor, latents = model.config.downscale, model.config.latent_channels
    generator = torch.Generator().manual_seed(1)
    photos = [("encoder", middle_of(path, 12 * factor, 16 * factor)) for path in photographs()[:2]]
    return [*photos, ("decoder", torch.randn(1, latents, 12, 10, generator=generator))]


def run_graph(model, graph, x):
    """Images through the encoder, or latents through the decoder."""
    return model.encode_moments(x) if graph == "encoder" else model.decode_latents(x)
