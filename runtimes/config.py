"""`VaeConfig`: the config of an `AutoencoderKL`, with the fields that diffusers writes to config.json."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from runtimes.errors import ConfigError
from runtimes.files import what_it_is_instead
from runtimes.latent_space import LatentSpace

DOWN_BLOCK_TYPES = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
UP_BLOCK_TYPES = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
ACTIVATIONS = ("silu", "swish", "mish", "gelu", "relu")


CLASS_NAMES = ("AutoencoderKL", "FlaxAutoencoderKL")

# Other autoencoders of diffusers, and the models that use them.
OTHER_VAES = {
    "AsymmetricAutoencoderKL": "inpainting with Stable Diffusion 1.5",
    "AutoencoderDC": "SANA",
    "AutoencoderKLFlux2": "FLUX.2",
    "AutoencoderKLHunyuanImage": "HunyuanImage 2.1",
    "AutoencoderKLQwenImage": "Qwen-Image",
    "AutoencoderKLTemporalDecoder": "Stable Video Diffusion",
    "AutoencoderKLWan": "Wan",
    "AutoencoderTiny": "TAESD, for previews",
    "VQModel": "a vector-quantised autoencoder",
}

# An unknown field whose name contains one of these may change the network's result, or belong to another network.
NETWORK_WORDS = (
    "act", "attention", "attn", "bias", "block", "causal", "channel", "compress", "conv", "depth", "dim", "down",
    "dropout", "embed", "encod", "eps", "expan", "fn", "gate", "group", "head", "kernel", "layer", "level", "magnitude",
    "mid", "mlp", "mult", "norm", "num_", "pad", "patch", "pool", "quant", "resample", "residual", "resnet", "rope",
    "scal", "shift", "shortcut", "size", "stage", "stride", "temp", "time", "type", "up", "width", "window",
)  # fmt: skip

# Unknown fields that do not change the network, although their names contain NETWORK_WORDS: the fields that diffusers'
# EMAModel.save_pretrained adds, and the dtype in which weights were saved.
HARMLESS_FIELDS = frozenset(
    ("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power")
) | {"dtype", "torch_dtype"}


@dataclass(frozen=True)
class VaeConfig:
    """The config of an `AutoencoderKL`, with diffusers' defaults for fields that older configs omit.

    The network never reads `scaling_factor`, `shift_factor`, `latents_mean`, `latents_std` or `force_upcast`; they
    describe how a diffusion model sees the latents. `scaling_factor` is None if it is unknown (a single file that does
    not store it): such a model encodes to and decodes from raw latents, and functions that need the factor raise
    `ConfigError`.

    Raises `ConfigError` on construction for a value that no `AutoencoderKL` can have.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float | None = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        for name in ("down_block_types", "up_block_types", "block_out_channels", "latents_mean", "latents_std"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if isinstance(self.act_fn, str):
            object.__setattr__(self, "act_fn", self.act_fn.lower())  # diffusers accepts any case
        _check(self)

    @property
    def downscale(self) -> int:
        """The spatial ratio between image and latents, f = 2 ** (levels - 1); 8 for Stable Diffusion."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @property
    def latent_space(self) -> LatentSpace:
        """The relation between raw latents and the latents of a diffusion model."""
        return LatentSpace.scaled(
            self.latent_channels,
            self.downscale,
            self.scaling_factor,
            self.shift_factor,
            self.latents_mean,
            self.latents_std,
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, origin: str = "config", strict: bool = False) -> VaeConfig:
        """Read a diffusers config; `origin` is its name in messages.

        Raises `ConfigError` for another `_class_name`, a wrong value, or an unknown field whose name contains one of
        NETWORK_WORDS. Other unknown fields are ignored with a warning; with `strict` they raise `ConfigError` too.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"{origin} is not a JSON object but a {type(data).__name__}")
        class_name = data.get("_class_name", "AutoencoderKL")
        if class_name not in CLASS_NAMES:
            raise ConfigError(f"{origin} describes a {class_name!r}, not an AutoencoderKL{_instead_of(class_name)}")
        values = {name: value for name, value in data.items() if not name.startswith("_")}
        unknown = sorted(values.keys() - {field.name for field in fields(cls)}, key=str)
        refused = [name for name in unknown if strict or _may_change_the_network(name)]
        if refused:
            raise ConfigError(
                f"{origin} has fields that no AutoencoderKL has: {', '.join(map(repr, refused[:5]))}. It is the config "
                "of another model, or of a newer diffusers; remove the fields if they are meaningless"
            )
        if unknown:
            warnings.warn(
                f"{origin}: fields that no AutoencoderKL has are ignored: {', '.join(map(repr, unknown))}",
                UserWarning,
                stacklevel=2,
            )
            values = {name: value for name, value in values.items() if name not in unknown}
        if not data.keys() & {"_class_name", "block_out_channels", "latent_channels"}:
            raise ConfigError(
                f"{origin} has neither _class_name, block_out_channels nor latent_channels: not a VAE config"
            )
        sample_size = values.get("sample_size")
        if isinstance(sample_size, (list, tuple)) and sample_size:
            values["sample_size"] = sample_size[0]  # as diffusers does for its tile size
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{origin}: {error}") from None

    @classmethod
    def from_json(cls, path: str | Path) -> VaeConfig:
        """Read a config.json; raises `ConfigError` if it is unreadable or malformed."""
        return cls.from_dict(read_json(path), origin=str(path))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as diffusers writes them to config.json: `_class_name` first, tuples as lists."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {"_class_name": "AutoencoderKL", **values}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file; `ConfigError` says what another file is instead."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:
        instead = what_it_is_instead(path) or ""
        explanation = error if not instead or instead.startswith("it is JSON") else instead
        raise ConfigError(f"{path} is not a readable JSON file: {explanation}") from None


def is_vae_config(data: Any) -> bool:
    """Return whether `data` is meant as the config of an `AutoencoderKL`: other models also have a config.json."""
    if not isinstance(data, Mapping):
        return False
    if "_class_name" in data:
        return data["_class_name"] in CLASS_NAMES
    return not data.keys().isdisjoint(("block_out_channels", "latent_channels"))


class OtherConfig:
    """The config of a family other than AutoencoderKL, with the fields that diffusers writes to config.json.

    Fields are attributes, as in diffusers: `config.patch_size`.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        self._data = dict(data)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._data:
            raise AttributeError(f"the config has no field {name!r}")
        return self._data[name]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OtherConfig) and other._data == self._data

    def __hash__(self) -> int:
        return hash(self.to_json())

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as they were given."""
        return dict(self._data)

    def to_json(self) -> str:
        """Return the fields as the text of a config.json."""
        return json.dumps(self._data, indent=2, allow_nan=False) + "\n"


def _instead_of(class_name: Any) -> str:
    """Return the end of the message about another `_class_name`: what it is, or what to do."""
    name = str(class_name)
    if name in OTHER_VAES:
        return f" ({OTHER_VAES[name]}): another network, which is not supported"
    if "autoencoder" in name.lower() or "vae" in name.lower():
        return ": another network, which is not supported"
    return "; for a pipeline directory or repository give subfolder='vae'"


def _may_change_the_network(name: Any) -> bool:
    """Return whether the name of an unknown field contains one of NETWORK_WORDS."""
    return name not in HARMLESS_FIELDS and any(word in str(name).lower() for word in NETWORK_WORDS)


def _check(config: VaeConfig) -> None:
    """Raise `ConfigError` naming the field, its value and the rule."""

    def require(name: str, fits: bool, rule: str) -> None:
        if not fits:
            raise ConfigError(f"{name} = {getattr(config, name)!r}: {rule}")

    for name in ("in_channels", "out_channels", "latent_channels", "norm_num_groups", "sample_size"):
        require(name, _is_size(getattr(config, name)), "must be a positive integer, from 1 to 65536")
    layers = config.layers_per_block
    require("layers_per_block", _is_size(layers) and layers <= 64, "must be an integer from 1 to 64")
    for name in ("force_upcast", "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"):
        require(name, isinstance(getattr(config, name), bool), "must be true or false")

    channels = config.block_out_channels
    require(
        "block_out_channels",
        isinstance(channels, tuple) and len(channels) > 0 and all(_is_size(c) for c in channels),
        "must be a non-empty list of positive integers, each from 1 to 65536",
    )
    require("block_out_channels", len(channels) <= 16, "at most 16 levels")
    require(
        "block_out_channels",
        all(c % config.norm_num_groups == 0 for c in channels),
        f"each must be a multiple of norm_num_groups = {config.norm_num_groups}",
    )
    for name, known in (("down_block_types", DOWN_BLOCK_TYPES), ("up_block_types", UP_BLOCK_TYPES)):
        types = getattr(config, name)
        require(name, isinstance(types, tuple), "must be a list")
        require(name, all(t in known for t in types), f"known block types are {', '.join(known)}")
        require(name, len(types) == len(channels), f"must have one entry per level, and there are {len(channels)}")
    require("act_fn", config.act_fn in ACTIVATIONS, f"known activations are {', '.join(ACTIVATIONS)}")

    require(
        "scaling_factor", config.scaling_factor is None or _is_real(config.scaling_factor), "must be a finite number"
    )
    require("scaling_factor", config.scaling_factor is None or config.scaling_factor != 0, "must not be 0")
    require("shift_factor", config.shift_factor is None or _is_real(config.shift_factor), "must be a finite number")
    for name in ("latents_mean", "latents_std"):
        values = getattr(config, name)
        fits = values is None or (
            isinstance(values, tuple) and len(values) == config.latent_channels and all(_is_real(v) for v in values)
        )
        require(name, fits, f"must be a list of latent_channels = {config.latent_channels} finite numbers")
    require("latents_std", config.latents_std is None or all(v != 0 for v in config.latents_std), "must not contain 0")
    # One without the other has no defined meaning in any pipeline.
    require("latents_std", (config.latents_std is None) == (config.latents_mean is None), "needs latents_mean as well")


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 65536


def _is_real(value: Any) -> bool:
    # Not math.isfinite: it raises OverflowError for an integer beyond the range of floats.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
