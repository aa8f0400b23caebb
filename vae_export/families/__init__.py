"""Families of VAEs, one module each: config, reference network, names of tensors, and the rewrites that are exact.

To add one, write a module with a `vae_export.families.base.Family` and register it: a line in `FAMILIES`, or from
elsewhere

    FAMILIES.register("AutoencoderToy", "module:FAMILY")

under the class name that stands in a checkpoint's config.json.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

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
        "TAEF2": "vae_export.families.tiny:TAEF2_FAMILY",
    },
)
ALIASES = {"FlaxAutoencoderKL": "AutoencoderKL"}  #: other class names of the same configs

DEFAULT = "AutoencoderKL"  #: the family of a config that names no class


def family_named(class_name: str, origin: str = "the config") -> Family:
    """The family of a diffusers class name; `ConfigError` names `origin` and the families that there are."""
    name = ALIASES.get(class_name, class_name)
    if name not in FAMILIES:
        raise ConfigError(
            f"{origin} describes a {class_name!r}, and the families that can be exported are {', '.join(FAMILIES)}"
        )
    return cast("Family", FAMILIES[name])


def family_of(model: ReferenceVae) -> Family:
    """The family of a reference model."""
    return cast("Family", FAMILIES[model.family])


def recognised_family(names: Iterable[str]) -> Family | None:
    """The family that alone has tensors of these names, without prefix; None where names do not tell."""
    names = list(names)
    for name in FAMILIES:
        family = cast("Family", FAMILIES[name])
        if family.recognises is not None and family.recognises(names):
            return family
    return None
