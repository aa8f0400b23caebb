"""Configs of small models of every architecture, with the shape of the images to try them with."""


def levels(*channels, attention=(), **fields):
    """Config fields for these channels, with attention in the levels named (0 is the full-size one)."""
    down = ["AttnDownEncoderBlock2D" if i in attention else "DownEncoderBlock2D" for i in range(len(channels))]
    up = ["AttnUpDecoderBlock2D" if i in attention else "UpDecoderBlock2D" for i in reversed(range(len(channels)))]
    return dict(
        {"norm_num_groups": 8, "sample_size": 32},
        block_out_channels=list(channels),
        down_block_types=down,
        up_block_types=up,
        **fields,
    )


NO_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False}
# name -> (config, image shape)
CASES = {
    "sd": (levels(16, 32, 64, 64, layers_per_block=2), (1, 3, 64, 64)),
    "sdxl-32-groups": (levels(32, 64, 64, 64, layers_per_block=2, norm_num_groups=32), (1, 3, 48, 64)),
    "sd3-flux": (levels(16, 32, 64, 64, layers_per_block=2, latent_channels=16, **NO_QUANT), (2, 3, 64, 64)),
    "cogview": (
        levels(16, 64, 128, 128, layers_per_block=3, latent_channels=16, mid_block_add_attention=False, **NO_QUANT),
        (1, 3, 64, 64),
    ),
    "x4-upscaler": (levels(16, 32, 64, layers_per_block=2), (1, 3, 64, 64)),
    "attention-everywhere": (levels(16, 32, attention=(0, 1)), (1, 3, 32, 32)),
    "attention-in-the-last-level": (levels(16, 32, 32, attention=(2,), layers_per_block=2), (1, 3, 32, 32)),
    "one-level": (levels(32), (1, 3, 16, 16)),
    "odd-size": (levels(16, 32, 32, layers_per_block=1), (1, 3, 43, 61)),
    "non-square-batch-3": (levels(16, 32, 64, 64), (3, 3, 40, 88)),
    "grey-to-rgba": (levels(16, 32, in_channels=1, out_channels=4), (1, 1, 32, 32)),
    "only-post-quant": (levels(16, 32, use_quant_conv=False), (1, 3, 32, 32)),
    "swish": (levels(16, 32, act_fn="swish"), (1, 3, 32, 32)),
    "mish": (levels(16, 32, act_fn="mish"), (1, 3, 32, 32)),
    "gelu": (levels(16, 32, act_fn="gelu"), (1, 3, 32, 32)),
    "relu": (levels(16, 32, act_fn="relu"), (1, 3, 32, 32)),
}
