"""Families of VAEs, one module each: config, reference network, names of tensors, and exact rewrites.

To add a family, write a module with a `vae_export.families.base.Family` and register it, with a line in `FAMILIES` or
from another package with

    FAMILIES.register("AutoencoderToy", "module:FAMILY")

The name is the class name in the config.json of its checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

from runtimes.config import instead_of
from runtimes.errors import ConfigError
from runtimes.registry import Registry

if TYPE_CHECKING:
    from vae_export.families.base import Family, ReferenceVae

FAMILIES = Registry(
    "family",
    ConfigError,
    {
        "AutoencoderKL": "vae_export.families.autoencoder_kl:FAMILY",
        "AutoencoderKLFlux2": "vae_export.families.flux2:FAMILY",
        "AsymmetricAutoencoderKL": "vae_export.families.asymmetric:FAMILY",
        "AutoencoderTiny": "vae_export.families.tiny:FAMILY",
        "TAEF2": "vae_export.families.taef2:FAMILY",
    },
)
ALIASES = {"FlaxAutoencoderKL": "AutoencoderKL"}  #: other class names of the same configs

DEFAULT = "AutoencoderKL"  #: the family of a config that names no class


def family_named(class_name: str) -> Family:
    """The family of a diffusers class name; `ConfigError` lists the families that there are."""
    return cast("Family", FAMILIES[ALIASES.get(class_name, class_name)])


def family_of_config(data: Any, origin: str) -> Family:
    """The family that a config's `_class_name` names; without one it is AutoencoderKL.

    Raises `ConfigError`, which names `origin`, for any other class: what it is, and the families that there are.
    """
    name = data.get("_class_name", DEFAULT) if isinstance(data, Mapping) else DEFAULT
    if ALIASES.get(name, name) not in FAMILIES:
        raise ConfigError(
            f"{origin} describes a {name!r}, not one of {', '.join(FAMILIES)}, which can be exported{instead_of(name)}"
        )
    return family_named(name)


def family_of(model: ReferenceVae) -> Family:
    """Return the family of a reference model."""
    return cast("Family", FAMILIES[model.family])


def recognised_family(names: Iterable[str]) -> Family | None:
    """The family that alone has tensors of these names, without prefix; None where names do not tell."""
    names = list(names)
    for name in FAMILIES:
        family = cast("Family", FAMILIES[name])
        if family.recognises is not None and family.recognises(names):
            return family
    return None
