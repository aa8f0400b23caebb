"""Small checkpoints in every format, and models to compare with."""

import functools
import json
import pickle
import re

import torch
from diffusers import AutoencoderKL as DiffusersVae
from safetensors.torch import save

# The same operations in the same order: what is left is the order of summation inside a kernel.
TOLERANCE = 1e-5
WEIGHTS = "diffusion_pytorch_model.safetensors"
GROUPS = {"norm_num_groups": 8}
REPO = "someone/vae"


def levels(*channels, attention=(), **fields):
    """Config fields for these channels, with attention in the levels named (0 is the full-size one)."""
    down = ["AttnDownEncoderBlock2D" if i in attention else "DownEncoderBlock2D" for i in range(len(channels))]
    up = ["AttnUpDecoderBlock2D" if i in attention else "UpDecoderBlock2D" for i in reversed(range(len(channels)))]
    blocks = {"block_out_channels": list(channels), "down_block_types": down, "up_block_types": up}
    return GROUPS | {"scaling_factor": 0.5, "shift_factor": 0.25} | blocks | fields


NO_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False}
VARIANTS = {
    "sd": levels(16, 32, 64, 64, layers_per_block=2),
    "flux": levels(16, 32, 64, 64, layers_per_block=2, latent_channels=16, **NO_QUANT),
    "cogview": levels(16, 64, 64, 64, layers_per_block=3, mid_block_add_attention=False, **NO_QUANT),
    "x4-upscaler": levels(16, 32, 32, layers_per_block=2),
    "tiny": levels(16, 32),
    "one-level": levels(16),
    "attention-everywhere": levels(16, 32, attention=(0, 1), layers_per_block=2),
    "attention-in-the-last-level": levels(16, 32, 32, attention=(2,)),
    "grey-to-rgba": levels(16, 32, in_channels=1, out_channels=4),
    "only-post-quant": levels(16, 32, use_quant_conv=False),
}


@functools.cache
def source_model(variant):
    """A diffusers model in which no two tensors of a shape are alike; not to be changed."""
    torch.manual_seed(0)
    model = DiffusersVae(**VARIANTS[variant]).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.normal_(mean=0.5, std=0.2)
    return model


def weights_of(variant):
    return {name: tensor.clone() for name, tensor in source_model(variant).state_dict().items()}


@functools.cache
def repository(variant="tiny", folder=""):
    """The files of a diffusers repository."""
    model = source_model(variant)
    config = {"_class_name": "AutoencoderKL", **VARIANTS[variant]}
    return {folder + "config.json": json.dumps(config).encode(), folder + WEIGHTS: save(model.state_dict())}


def assert_same_weights(model, expected):
    """Every tensor of `expected` (a diffusers state dict), and no other, exactly."""
    actual = model.state_dict()
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different


def factors(model):
    return model.config.scaling_factor, model.config.shift_factor


# Names ----------------------------------------------------------------------------------------------------------------

LDM_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
LEGACY_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def ldm_name(name, count):
    """A diffusers name in the words of the original latent-diffusion code, for a model of `count` levels."""

    def resnet(leaf):
        return ["nin_shortcut" if part == "conv_shortcut" else part for part in leaf]

    def attention(module, leaf):
        return [LDM_ATTENTION[module], leaf[-1]]

    side, *rest = name.split(".")
    match rest:
        case ["conv_norm_out", *leaf]:
            rest = ["norm_out", *leaf]
        case ["mid_block", "resnets", j, *leaf]:
            rest = ["mid", f"block_{int(j) + 1}", *resnet(leaf)]
        case ["mid_block", "attentions", "0", module, *leaf]:
            rest = ["mid", "attn_1", *attention(module, leaf)]
        case ["down_blocks" | "up_blocks" as blocks, i, *inside]:
            level = ["down", i] if blocks == "down_blocks" else ["up", str(count - 1 - int(i))]
            match inside:
                case ["resnets", j, *leaf]:
                    rest = [*level, "block", j, *resnet(leaf)]
                case ["attentions", j, module, *leaf]:
                    rest = [*level, "attn", j, *attention(module, leaf)]
                case ["downsamplers", "0", *leaf]:
                    rest = [*level, "downsample", *leaf]
                case ["upsamplers", "0", *leaf]:
                    rest = [*level, "upsample", *leaf]
    return ".".join([side, *rest])


def to_ldm(tensors, rank=4):
    """Names and attention weights [C, C, 1, 1] of the original latent-diffusion code."""
    count = len({name.split(".")[2] for name in tensors if name.startswith("encoder.down_blocks.")})
    return {ldm_name(name, count): tensor for name, tensor in with_attention_of_rank(tensors, rank).items()}


def with_attention_of_rank(tensors, rank):
    """Linear weights [C, C] as those of convolutions: [C, C, 1] or [C, C, 1, 1]."""
    linear = re.compile(r".*\.attentions\.\d+\.to_.*\.weight")
    return {n: t.reshape(*t.shape, *[1] * (rank - 2)) if linear.fullmatch(n) else t for n, t in tensors.items()}


def as_convolutions(tensors):
    return with_attention_of_rank(tensors, 4)


def with_legacy_attention(tensors):
    """The attention names of diffusers before 0.17."""

    def rename(name):
        return re.sub(r"\.(to_[qkv]|to_out\.0)\.", lambda m: f".{LEGACY_ATTENTION[m[1]]}.", name)

    return {rename(name): tensor for name, tensor in tensors.items()}


def below(prefix):
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def inside_a_whole_checkpoint(tensors):
    others = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3),
        "model.diffusion_model.out.2.bias": torch.zeros(4),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(7),
        "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(8, 8),
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.bias": torch.zeros(8),
        "first_stage_model.loss.logvar": torch.zeros(()),
        "first_stage_model.loss.discriminator.main.0.weight": torch.zeros(8, 3, 4, 4),
        "first_stage_model.model_ema.num_updates": torch.tensor(7),
        "alphas_cumprod": torch.zeros(1000),
    }
    return others | below("first_stage_model.")(tensors)


def beside_its_training(tensors):
    """As the original code saves a VAE that it trains: the loss, and a moving average of the weights."""
    averages = {"model_ema." + name.replace(".", ""): tensor + 1 for name, tensor in tensors.items()}
    rest = {"loss.logvar": torch.zeros(()), "loss.perceptual_loss.lin0.model.1.weight": torch.zeros(1, 64, 1, 1)}
    return rest | averages | {"model_ema.num_updates": torch.tensor(7)} | tensors


def chain(*changes):
    return lambda tensors: functools.reduce(lambda changed, change: change(changed), changes, tensors)


LAYOUTS = {
    "diffusers": chain(),
    "diffusers-below-vae": below("vae."),
    "diffusers-legacy-attention": with_legacy_attention,
    "diffusers-legacy-attention-as-convolutions": chain(as_convolutions, with_legacy_attention),
    "diffusers-attention-of-rank-3": lambda tensors: with_attention_of_rank(tensors, 3),
    "diffusers-legacy-in-a-whole-checkpoint": chain(with_legacy_attention, inside_a_whole_checkpoint),
    "ldm": to_ldm,
    "ldm-attention-of-rank-2": lambda tensors: to_ldm(tensors, rank=2),
    "ldm-attention-of-rank-3": lambda tensors: to_ldm(tensors, rank=3),
    "ldm-below-first-stage-model": chain(to_ldm, below("first_stage_model.")),
    "ldm-below-vae": chain(to_ldm, below("vae.")),
    "ldm-in-a-whole-checkpoint": chain(to_ldm, inside_a_whole_checkpoint),
    "ldm-beside-its-training": chain(to_ldm, beside_its_training),
}


# Files ----------------------------------------------------------------------------------------------------------------


class Exploit:
    """What an attacker puts into a pickle: loading it runs a command."""

    def __reduce__(self):
        return exec, ("raise SystemExit('code in a pickle was run')",)


def save_exploit(path, form):
    if form == "torch":
        torch.save({"state_dict": Exploit()}, path)
    elif form == "torch-legacy":
        torch.save({"state_dict": Exploit()}, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(Exploit(), protocol=int(form)))
