"""`VaeConfig`: the config of an `AutoencoderKL`, with the fields that diffusers writes to config.json.

`ConfigFile` is what the configs of all families share: they are read from a config.json and written to one.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

from runtimes.errors import ConfigError
from runtimes.files import what_it_is_instead
from runtimes.latent_space import LatentSpace
from runtimes.names import Graph

DOWN_BLOCK_TYPES = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
UP_BLOCK_TYPES = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
ACTIVATIONS = ("silu", "swish", "mish", "gelu", "relu")

Config = TypeVar("Config", bound="ConfigFile")

# Autoencoders of diffusers that are recognised but not supported, and the models that use them.
OTHER_VAES = {
    "AutoencoderDC": "SANA",
    "AutoencoderKLHunyuanImage": "HunyuanImage 2.1",
    "AutoencoderKLQwenImage": "Qwen-Image",
    "AutoencoderKLTemporalDecoder": "Stable Video Diffusion",
    "AutoencoderKLWan": "Wan",
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


class ConfigFile:
    """Base of the dataclasses of configs: reading and writing a config.json."""

    #: values of `_class_name` that the file may have; the first is written, and is the name of the family
    class_names: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            if isinstance(getattr(self, field.name), list):
                object.__setattr__(self, field.name, tuple(getattr(self, field.name)))
        self._check()

    def _check(self) -> None:
        """Raise `ConfigError` naming the field, its value and the rule."""
        raise NotImplementedError

    @classmethod
    def from_dict(
        cls: type[Config], data: Mapping[str, Any], *, origin: str = "config", strict: bool = False
    ) -> Config:
        """Read a diffusers config; another `_class_name` raises `ConfigError`.

        So does an unknown field whose name speaks of a part of a network. Any other is ignored, with a warning;
        `strict` refuses all.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"{origin} is not a JSON object but a {type(data).__name__}")
        class_name = data.get("_class_name", cls.class_names[0])
        family = cls.class_names[0]
        if class_name not in cls.class_names:
            raise ConfigError(f"{origin} describes a {class_name!r}, not an {family}{instead_of(class_name)}")
        values = {name: value for name, value in data.items() if not name.startswith("_")}
        unknown = sorted(values.keys() - {field.name for field in fields(cls)}, key=str)  # type: ignore[arg-type]
        grave = [name for name in unknown if strict or _may_change_the_network(name)]
        if grave:
            raise ConfigError(
                f"{origin} has fields that no {family} has: {', '.join(map(repr, grave[:5]))}. It is the config "
                "of another model, or of a newer diffusers; remove the fields if they are meaningless"
            )
        if unknown:
            warnings.warn(
                f"{origin}: fields that no {family} has are ignored: {', '.join(map(repr, unknown))}",
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
    def from_json(cls: type[Config], path: str | Path) -> Config:
        """Read a config.json; raises `ConfigError` if it is unreadable or malformed."""
        return cls.from_dict(read_json(path), origin=str(path))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as diffusers writes them to config.json: `_class_name` first, tuples as lists."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}  # type: ignore[call-overload]
        return {"_class_name": self.class_names[0], **values}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"


@dataclass(frozen=True)
class VaeConfig(ConfigFile):
    """The config of an `AutoencoderKL`, with diffusers' defaults for fields that older configs omit.

    The network never reads `scaling_factor`, `shift_factor`, `latents_mean`, `latents_std` or `force_upcast`; they
    describe how a diffusion model sees the latents. `scaling_factor` is None if it is unknown (a single file that does
    not store it): such a model encodes to and decodes from raw latents, and functions that need the factor raise
    `ConfigError`.

    Raises `ConfigError` on construction for a value that no `AutoencoderKL` can have.
    """

    class_names = ("AutoencoderKL", "FlaxAutoencoderKL")

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
        if isinstance(self.act_fn, str):
            object.__setattr__(self, "act_fn", self.act_fn.lower())  # diffusers accepts any case
        super().__post_init__()

    def _check(self) -> None:
        check_network(self)
        check_flags(self, "force_upcast")
        check_factors(self)

    @property
    def downscale(self) -> int:
        """The spatial ratio between image and latents, f = 2 ** (levels - 1); 8 for Stable Diffusion."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Channels of the decoder's levels, the one of the image's size first."""
        return self.block_out_channels

    @property
    def decoder_layers(self) -> int:
        """Number of resnets of each of the decoder's levels."""
        return self.layers_per_block + 1

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
        return data["_class_name"] in VaeConfig.class_names
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


# Fields that several families have, under names of their own ----------------------------------------------------------


def level_widths(config: Any, graph: Graph) -> tuple[int, ...]:
    """Channels of the levels of the encoder or the decoder, the one of the image's size first.

    `config` is that of any family with such levels; `ConfigError` for another.
    """
    names = {
        "encoder": ("down_block_out_channels", "block_out_channels"),
        "decoder": ("decoder_block_out_channels", "up_block_out_channels", "block_out_channels"),
    }
    for name in names[graph]:
        widths = getattr(config, name, None)
        if isinstance(widths, (list, tuple)) and widths and all(is_size(width) for width in widths):
            return tuple(widths)
    raise ConfigError(f"the config has none of {', '.join(names[graph])}")


def norm_groups(config: Any) -> int:
    """The number of groups of the norms; `ConfigError` for a config without it."""
    groups = getattr(config, "norm_num_groups", None)
    if not is_size(groups):
        raise ConfigError(f"norm_num_groups of the config is {groups!r}, not a positive integer")
    return int(cast(int, groups))


def instead_of(class_name: Any) -> str:
    """What follows from another `_class_name`, as the end of a message."""
    name = str(class_name)
    if name in OTHER_VAES:
        return f" ({OTHER_VAES[name]}): another network, which is not supported"
    if "autoencoder" in name.lower() or "vae" in name.lower():
        return ": another network, which is not supported"
    return "; for a pipeline directory or repository give subfolder='vae'"


def _may_change_the_network(name: Any) -> bool:
    """Return whether the name of an unknown field contains one of NETWORK_WORDS."""
    return name not in HARMLESS_FIELDS and any(word in str(name).lower() for word in NETWORK_WORDS)


# Checks of fields -----------------------------------------------------------------------------------------------------


def require(config: Any, name: str, fits: bool, rule: str) -> None:
    """Raise `ConfigError` naming the field, its value and the rule, unless the value fits."""
    if not fits:
        raise ConfigError(f"{name} = {getattr(config, name)!r}: {rule}")


def check_network(config: Any) -> None:
    """Raise `ConfigError` unless the fields describe an encoder and a decoder that can be built."""
    check_sizes(config, "in_channels", "out_channels", "latent_channels", "norm_num_groups", "sample_size")
    check_layers(config, "layers_per_block")
    check_flags(config, "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention")
    check_levels(config, "block_out_channels", down_block_types=DOWN_BLOCK_TYPES, up_block_types=UP_BLOCK_TYPES)
    require(config, "act_fn", config.act_fn in ACTIVATIONS, f"known activations are {', '.join(ACTIVATIONS)}")


def check_sizes(config: Any, *names: str) -> None:
    """Raise `ConfigError` unless the fields are integers from 1 to 65536."""
    for name in names:
        require(config, name, is_size(getattr(config, name)), "must be a positive integer, from 1 to 65536")


def check_layers(config: Any, *names: str) -> None:
    """Raise `ConfigError` unless the fields are integers from 1 to 64."""
    for name in names:
        layers = getattr(config, name)
        require(config, name, is_size(layers) and layers <= 64, "must be an integer from 1 to 64")


def check_flags(config: Any, *names: str) -> None:
    """Raise `ConfigError` unless the fields are true or false."""
    for name in names:
        require(config, name, isinstance(getattr(config, name), bool), "must be true or false")


def check_levels(config: Any, widths: str, **types: tuple[str, ...]) -> None:
    """Raise `ConfigError` unless the field `widths` lists channels, and each of `types` as many block types.

    `types` maps the name of a field to the block types that it may have.
    """
    channels = getattr(config, widths)
    require(
        config,
        widths,
        isinstance(channels, tuple) and len(channels) > 0 and all(is_size(c) for c in channels),
        "must be a non-empty list of positive integers, each from 1 to 65536",
    )
    require(config, widths, len(channels) <= 16, "at most 16 levels")
    groups = config.norm_num_groups
    require(
        config, widths, all(c % groups == 0 for c in channels), f"each must be a multiple of norm_num_groups = {groups}"
    )
    for name, known in types.items():
        given = getattr(config, name)
        require(config, name, isinstance(given, tuple), "must be a list")
        require(config, name, all(t in known for t in given), f"known block types are {', '.join(known)}")
        rule = f"must have one entry per level, and there are {len(channels)}"
        require(config, name, len(given) == len(channels), rule)


def check_factors(config: Any) -> None:
    """Raise `ConfigError` unless scaling_factor, shift_factor, latents_mean and latents_std can be applied and undone.

    A config need not have all of these fields; None means that a value is unknown.
    """

    def value_of(name: str) -> Any:
        return getattr(config, name, None)

    for name in ("scaling_factor", "shift_factor"):
        require(config, name, value_of(name) is None or is_real(value_of(name)), "must be a finite number")
    require(config, "scaling_factor", value_of("scaling_factor") != 0, "must not be 0")
    for name in ("latents_mean", "latents_std"):
        values = value_of(name)
        fits = values is None or (
            isinstance(values, tuple) and len(values) == config.latent_channels and all(is_real(v) for v in values)
        )
        require(config, name, fits, f"must be a list of latent_channels = {config.latent_channels} finite numbers")
    deviations, means = value_of("latents_std"), value_of("latents_mean")
    require(config, "latents_std", deviations is None or all(v != 0 for v in deviations), "must not contain 0")
    # One without the other has no defined meaning in any pipeline.
    require(config, "latents_std", (deviations is None) == (means is None), "needs latents_mean as well")


def is_size(value: Any) -> bool:
    """Return whether a value is an integer from 1 to 65536."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 65536


def is_real(value: Any) -> bool:
    """Return whether a value is a finite number."""
    # Not math.isfinite: it raises OverflowError for an integer beyond the range of floats.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
