"""Families of VAEs, one module each: config, reference network, names of tensors, and exact rewrites.

To add a family, write a module with a `vae_export.families.base.Family` and register it, with a line in `FAMILIES` or
from another package with

    FAMILIES.register("AutoencoderToy", "module:FAMILY")

The name is the class name in the config.json of its checkpoints.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from runtimes.errors import ConfigError
from runtimes.registry import Registry

if TYPE_CHECKING:
    from vae_export.families.base import Family, ReferenceVae

FAMILIES = Registry("family", ConfigError, {"AutoencoderKL": "vae_export.families.autoencoder_kl:FAMILY"})
ALIASES = {"FlaxAutoencoderKL": "AutoencoderKL"}  #: other class names of the same configs

DEFAULT = "AutoencoderKL"  #: the family of a config that names no class


def family_named(class_name: str, origin: str = "the config") -> Family:
    """Return the family of a diffusers class name. Raises `ConfigError`, with `origin` and the known names."""
    name = ALIASES.get(class_name, class_name)
    if name not in FAMILIES:
        raise ConfigError(
            f"{origin} describes a {class_name!r}, and the families that can be exported are {', '.join(FAMILIES)}"
        )
    return cast("Family", FAMILIES[name])


def family_of(model: ReferenceVae) -> Family:
    """Return the family of a reference model."""
    return cast("Family", FAMILIES[model.family])
