"""Convert the names of tensors from every format in which an `AutoencoderKL` is published to diffusers' names.

Formats differ in three ways. The VAE may be alone in the file or below a prefix in a whole checkpoint. The names are
those of diffusers or of the original latent-diffusion code ("LDM"). Old diffusers named the layers of the attention
query, key, value and proj_attn; the original code stores them as 1x1 convolutions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from runtimes.errors import ConfigError
from runtimes.names import Graph
from vae_export.families import FAMILIES

PREFIXES = ("first_stage_model.", "vae.model.", "vae.")

# The prefixes that DistributedDataParallel and torch.compile add to the names of a module that they wrap.
_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:module|_orig_mod)\.")

# Prefixes of what the original code saves beside the VAE: training loss, moving averages, other models.
DROPPED = (
    "loss.", "model_ema.", "model.", "cond_stage_model.", "conditioner.", "denoiser.", "text_encoders.",
    "text_encoder.", "text_encoder_2.", "text_encoder_3.", "unet.", "transformer.", "lora_", "embedder.",
)  # fmt: skip

_SIDES = ("encoder", "decoder")
_VAE_KEY = re.compile(rf"(?:{'|'.join(map(re.escape, PREFIXES))})?(?:encoder|decoder|quant_conv|post_quant_conv)\.")

# Names that only one other kind of VAE has, and that kind.
_OTHER_VAES = (
    (re.compile(r"(?:encoder|decoder)\..*\.gamma"), "Wan or Qwen-Image (AutoencoderKLWan, AutoencoderKLQwenImage)"),
    (re.compile(r"(?:encoder|decoder)\.stages\..*|encoder\.down_blocks\.\d+\.\d+\..*"), "SANA (AutoencoderDC)"),
    (
        re.compile(r"decoder\..*(?:time_conv_out|temporal_res_block|time_mix_conv|time_stack)\..*"),
        "Stable Video Diffusion (AutoencoderKLTemporalDecoder)",
    ),
    (re.compile(r"quantize\.embedding\.weight"), "a vector-quantised autoencoder (VQModel)"),
)
_ATTENTION_LEAVES = {
    "norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0",
    "query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0",
}  # fmt: skip
_ATTENTION = re.compile(rf"(.*\.attentions\.\d+)\.({'|'.join(_ATTENTION_LEAVES)})\.(weight|bias)")


def tensor_names(keys: Iterable[str]) -> dict[str, str]:
    """Find the tensors of an AutoencoderKL among the keys of a file: {name in diffusers: key in the file}.

    Raises `ConfigError` if there is no VAE, more than one, or one of another kind.
    """
    selected = select_vae_keys(keys)
    refuse_other_vaes(selected)
    names = to_diffusers_names(selected)
    return {names[bare]: key for bare, key in selected.items()}


def bare_names(keys: Iterable[str]) -> dict[str, str]:
    """{key without wrappers and the VAE's prefix: key in the file}, of all tensors of a file."""
    names = {}
    for key in keys:
        name = _WRAPPERS.sub("", key).removeprefix("state_dict.")
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
        names[name.removeprefix(prefix)] = key
    return names


def half_of(names: Iterable[str]) -> Graph | None:
    """Which half of a VAE a file holds alone, by names that lack "encoder." and "decoder."; None for a whole VAE.

    FLUX.2's small decoder and the original TAESD are published so.
    """
    names = set(names)
    if any(name.startswith(("encoder.", "decoder.")) for name in names):
        return None
    numbered = any(re.fullmatch(r"\d+\.conv\.\d+\.weight", name) for name in names)
    if numbered:  # the original TAESD: the decoder begins with a clamp, which has no weights
        return "encoder" if "0.weight" in names else "decoder"
    if "conv_in.weight" in names:
        found = {name.partition(".")[0] for name in names}
        return "decoder" if found & {"up", "up_blocks"} else "encoder" if found & {"down", "down_blocks"} else None
    return None


def select_vae_keys(keys: Iterable[str]) -> dict[str, str]:
    """Select the VAE's keys of a file: {key without prefix: key in the file}.

    Keys of other models and of the training loss are dropped by their prefixes. All other keys are kept, so that the
    check of the weights can name the unexpected ones. Raises `ConfigError` if there is no VAE, or more than one.
    """
    keys = list(keys)
    unwrapped: dict[str, str] = {}
    for key in keys:
        name = _WRAPPERS.sub("", key).removeprefix("state_dict.")
        if name in unwrapped and _VAE_KEY.match(name):
            raise ConfigError(
                f"{unwrapped[name]!r} and {key!r} are both {name!r}: more than one VAE in the file; save the one that "
                "you mean to a file of its own"
            )
        unwrapped[name] = key
    whole = [p for p in ("", *PREFIXES) if any(f"{p}{side}.conv_in.weight" in unwrapped for side in _SIDES)]
    if len(whole) > 1:
        shown = " and ".join(f"below {prefix!r}" if prefix else "without a prefix" for prefix in whole)
        raise ConfigError(f"more than one VAE in the file: {shown}; save the one that you mean to a file of its own")
    for prefix in PREFIXES:
        inside = {name.removeprefix(prefix): key for name, key in unwrapped.items() if name.startswith(prefix)}
        if inside and (prefix != "vae.model." or whole == [prefix]):
            return {name: key for name, key in inside.items() if not name.startswith(DROPPED)}
    bare = {name: key for name, key in unwrapped.items() if not name.startswith(DROPPED)}
    if not any(key.startswith(("encoder.", "decoder.")) for key in bare):
        if not keys:
            raise ConfigError("the file holds no tensors")
        raise ConfigError(
            f"no VAE among the {len(keys)} tensors: none is named encoder.* or decoder.*, alone or below "
            f"{' or '.join(PREFIXES)} (the first are {', '.join(map(repr, keys[:3]))})"
        )
    return bare


def to_diffusers_names(names: Iterable[str]) -> dict[str, str]:
    """Map names without prefix to diffusers' names; diffusers' names map to themselves.

    Raises `ConfigError` if two names map to the same one.
    """
    names = list(names)
    ups = [int(match.group(1)) for name in names if (match := re.match(r"decoder\.up\.(\d+)\.", name))]
    levels = max(ups) + 1 if ups else 0
    mapping = {name: _modern_attention(_from_ldm(name, levels)) for name in names}
    if len(set(mapping.values())) != len(mapping):
        seen: dict[str, str] = {}
        for name, target in mapping.items():
            if target in seen:
                raise ConfigError(f"{seen[target]!r} and {name!r} are both {target!r}: two formats in one file")
            seen[target] = name
    return mapping


def refuse_other_vaes(names: Iterable[str]) -> None:
    """Raise `ConfigError` if a name, without prefix, belongs to a known VAE of another kind."""
    for name in names:
        for pattern, kind in _OTHER_VAES:
            if pattern.fullmatch(name):
                raise ConfigError(
                    f"it is the VAE of {kind}, which is not supported ({name!r}); supported are {', '.join(FAMILIES)}"
                )


def is_fused_projection(name: str) -> bool:
    """Return whether a diffusers name is that of a fused q, k and v, which fuse_qkv_projections makes."""
    return re.fullmatch(r".*\.attentions\.\d+\.to_qkv\.(weight|bias)", name) is not None


def is_attention_projection(name: str) -> bool:
    """Return whether a diffusers name is a linear weight that older files store as a 1x1 convolution."""
    return re.fullmatch(r".*\.attentions\.\d+\.(to_q|to_k|to_v|to_out\.0)\.weight", name) is not None


def _from_ldm(name: str, levels: int) -> str:
    """Convert decoder.up.2.block.0.nin_shortcut.weight to decoder.up_blocks.1.resnets.0.conv_shortcut.weight etc."""
    if not name.startswith(("encoder.", "decoder.")):
        return name
    side, rest = name.split(".", 1)
    rest = re.sub(r"^norm_out\.", "conv_norm_out.", rest)
    rest = re.sub(r"^mid\.block_([12])\.", lambda m: f"mid_block.resnets.{int(m[1]) - 1}.", rest)
    rest = re.sub(r"^mid\.attn_1\.", "mid_block.attentions.0.", rest)
    rest = re.sub(r"^down\.(\d+)\.", r"down_blocks.\1.", rest)
    # The original decoder numbers its levels from the output, diffusers from the input.
    rest = re.sub(r"^up\.(\d+)\.", lambda m: f"up_blocks.{levels - 1 - int(m[1])}.", rest)
    rest = re.sub(r"^((?:down|up)_blocks\.\d+)\.block\.", r"\1.resnets.", rest)
    rest = re.sub(r"^((?:down|up)_blocks\.\d+)\.attn\.", r"\1.attentions.", rest)
    rest = re.sub(r"^(down_blocks\.\d+)\.downsample\.", r"\1.downsamplers.0.", rest)
    rest = re.sub(r"^(up_blocks\.\d+)\.upsample\.", r"\1.upsamplers.0.", rest)
    return f"{side}.{rest.replace('.nin_shortcut.', '.conv_shortcut.')}"


def _modern_attention(name: str) -> str:
    match = _ATTENTION.fullmatch(name)
    return f"{match[1]}.{_ATTENTION_LEAVES[match[2]]}.{match[3]}" if match else name
