"""Infer the config of a checkpoint without one, from the shapes of its tensors and from facts about public VAEs.

`VaeConfig` itself is in `runtimes.config`, because opening a bundle needs it too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from runtimes.config import VaeConfig
from runtimes.errors import ConfigError
from runtimes.names import Graph

__all__ = ["VaeConfig", "complete_config", "find_public_vae", "infer_architecture"]


@dataclass(frozen=True)
class PublicVae:
    """Config values of a public VAE that its weights do not determine; found by repository or sha256 of the file."""

    name: str
    scaling_factor: float
    sample_size: int
    shift_factor: float | None = None
    force_upcast: bool = True
    repositories: tuple[str, ...] = ()
    files_sha256: tuple[str, ...] = ()


# The values are from the config.json files of these repositories, the hashes from the Hub's pages of the files.
PUBLIC_VAES = (
    PublicVae(
        name="Stable Diffusion 1.x",
        scaling_factor=0.18215,
        sample_size=512,
        repositories=("stabilityai/sd-vae-ft-mse-original", "stabilityai/sd-vae-ft-ema-original"),
        files_sha256=("735e4c3a447a3255760d7f86845f09f937809baa529c17370d83e4c3758f3c75",),
    ),
    PublicVae(
        name="SDXL",
        scaling_factor=0.13025,
        sample_size=1024,
        repositories=("stabilityai/sdxl-vae",),
        files_sha256=("63aeecb90ff7bc1c115395962d3e803571385b61938377bc7089b36e81e92e2e",),
    ),
    PublicVae(
        name="SDXL, fp16 fix",
        scaling_factor=0.13025,
        sample_size=512,
        force_upcast=False,
        repositories=("madebyollin/sdxl-vae-fp16-fix",),
        files_sha256=("235745af8d86bf4a4c1b5b4f529868b37019a10f7c0b2e79ad0abca3a22bc6e1",),
    ),
    PublicVae(
        name="SD3",
        scaling_factor=1.5305,
        shift_factor=0.0609,
        sample_size=1024,
        repositories=(
            "stabilityai/stable-diffusion-3-medium",
            "stabilityai/stable-diffusion-3.5-medium",
            "stabilityai/stable-diffusion-3.5-large",
        ),
    ),
    PublicVae(
        name="FLUX.1",
        scaling_factor=0.3611,
        shift_factor=0.1159,
        sample_size=1024,
        repositories=("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell"),
        files_sha256=("afc8e28272cd15db3919bacdb6918ce9c1ed22e96cb12c4d5ed0fba823529e38",),
    ),
)

# (block_out_channels, layers_per_block) for which all public VAEs have 32 norm groups.
PUBLIC_ARCHITECTURES = (
    ((128, 256, 512, 512), 2),  # Stable Diffusion, SDXL, Playground, SD3, FLUX.1
    ((128, 256, 512), 2),  # Stable Diffusion x4 upscaler
    ((128, 512, 1024, 1024), 3),  # CogView
)
PUBLIC_NORM_NUM_GROUPS = 32


def find_public_vae(repo: str | None, sha256: str) -> PublicVae | None:
    """Return the public VAE with this repository or this hash of its file; None if it is unknown."""
    for vae in PUBLIC_VAES:
        if sha256 in vae.files_sha256 or (repo is not None and repo in vae.repositories):
            return vae
    return None


def infer_architecture(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return the config fields that the shapes of a complete checkpoint, by diffusers names, determine.

    Raises `ConfigError` if the names are not those of an `AutoencoderKL`.
    """

    def shape(key: str) -> tuple[int, ...]:
        return _convolution_shape(shapes, key)

    channels = widths_of(shapes, "encoder")
    levels = len(channels)
    layers = layers_of(shapes, "encoder")

    def block_types(side: str, plain: str, attention: str) -> tuple[str, ...]:
        prefixes = (f"{side}.{i}.attentions." for i in range(levels))
        return tuple(attention if any(key.startswith(p) for key in shapes) else plain for p in prefixes)

    return {
        "in_channels": shape("encoder.conv_in.weight")[1],
        "out_channels": shape("decoder.conv_out.weight")[0],
        "latent_channels": shape("encoder.conv_out.weight")[0] // 2,
        "block_out_channels": channels,
        "layers_per_block": layers,
        "down_block_types": block_types("encoder.down_blocks", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": block_types("decoder.up_blocks", "UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": any(key.startswith("encoder.mid_block.attentions.") for key in shapes),
    }


def widths_of(shapes: Mapping[str, tuple[int, ...]], side: Graph) -> tuple[int, ...]:
    """Channels of the levels of the encoder or the decoder, in the order of the computation."""
    blocks = f"{side}.{'down' if side == 'encoder' else 'up'}_blocks"
    levels = _count(shapes, rf"{re.escape(blocks)}\.(\d+)\.")
    return tuple(_convolution_shape(shapes, f"{blocks}.{i}.resnets.0.conv1.weight")[0] for i in range(levels))


def layers_of(shapes: Mapping[str, tuple[int, ...]], side: Graph) -> int:
    """Number of resnets of each level of the encoder or the decoder."""
    blocks = "down_blocks" if side == "encoder" else "up_blocks"
    return _count(shapes, rf"{side}\.{blocks}\.0\.resnets\.(\d+)\.")


def _convolution_shape(shapes: Mapping[str, tuple[int, ...]], key: str) -> tuple[int, ...]:
    """[out, in, height, width] of a convolution's weight; `ConfigError` where there is none of this name."""
    if key not in shapes:
        raise ConfigError(
            f"not an AutoencoderKL: there is no tensor {key!r} (nor its name in the original format) among the "
            f"{len(shapes)} encoder and decoder tensors of the file"
        )
    if len(shapes[key]) != 4:
        raise ConfigError(
            f"not an AutoencoderKL: tensor {key!r} has shape {list(shapes[key])}, and the weight of a 2-D "
            "convolution has four dimensions"
        )
    return shapes[key]


def complete_config(
    architecture: Mapping[str, Any],
    *,
    given: Mapping[str, Any] | None = None,
    public: PublicVae | None = None,
) -> VaeConfig:
    """Return the config from the fields that the shapes determine, the public VAE's values, and the caller's fields.

    Later ones override earlier ones. Unknown scaling and shift are None, never a default. Raises `ConfigError` for
    unknown fields, or if norm_num_groups stays unknown.
    """
    values: dict[str, Any] = {"scaling_factor": None, "shift_factor": None, "sample_size": 512, **architecture}
    if (architecture["block_out_channels"], architecture["layers_per_block"]) in PUBLIC_ARCHITECTURES:
        values["norm_num_groups"] = PUBLIC_NORM_NUM_GROUPS
    if public is not None:
        facts = ("scaling_factor", "shift_factor", "sample_size", "force_upcast")
        values |= {name: getattr(public, name) for name in facts}
    values |= {name: value for name, value in (given or {}).items() if not name.startswith("_")}
    unknown = sorted(values.keys() - {field.name for field in fields(VaeConfig)})
    if unknown:
        raise ConfigError(f"config has fields that no AutoencoderKL has: {', '.join(unknown)}")
    if "norm_num_groups" not in values:
        raise ConfigError(
            f"the file does not say norm_num_groups, and block_out_channels {list(values['block_out_channels'])} with "
            f"{values['layers_per_block']} layers a block is not a public architecture, whose value would be known; "
            "give config={'norm_num_groups': ...} or the model's config.json (--config)"
        )
    return VaeConfig(**values)


def with_factors(config: Any, scaling_factor: float | None, shift_factor: float | None) -> Any:
    """The config with the factors that the caller gives; None leaves a factor as it is.

    Raises `ConfigError` where the config has no such factors.
    """
    given: dict[str, Any] = {"scaling_factor": scaling_factor, "shift_factor": shift_factor}
    given = {name: value for name, value in given.items() if value is not None}
    foreign = [name for name in given if name not in config.to_dict()]
    if foreign:
        raise ConfigError(
            f"an {config.to_dict()['_class_name']} has no {' and no '.join(foreign)}: its checkpoint says how its "
            "latents are normalised; leave the option out"
        )
    return replace(config, **given) if given else config


def _count(shapes: Mapping[str, Any], pattern: str) -> int:
    """Return the number of consecutive indices, from 0, that the pattern's group matches among the keys."""
    found = {int(match.group(1)) for key in shapes if (match := re.match(pattern, key))}
    count = 0
    while count in found:
        count += 1
    return count
