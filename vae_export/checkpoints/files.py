"""Weights files of a diffusers directory or repository: their variants, and checkpoints that are split into parts.

A checkpoint is one file, `diffusion_pytorch_model.safetensors`, or several parts with an index that maps each tensor to
its part. Both may have a variant in their names: `diffusion_pytorch_model.fp16.safetensors`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from runtimes.errors import ConfigError

STEM = "diffusion_pytorch_model"
WEIGHTS_FILE = f"{STEM}.safetensors"
INDEX_SUFFIX = ".index.json"
SHOWN = 5  #: number of names that an error lists before it counts the rest

_VARIANT = r"[A-Za-z0-9_-]+"
_PART = re.compile(rf".*-\d{{5}}-of-(\d{{5}})(?:\.{_VARIANT})?\.safetensors")
# The weights; the index as diffusers names it; the index named after the weights file of a variant.
_FILES = (
    re.compile(rf"{STEM}(?:\.({_VARIANT}))?\.safetensors"),
    re.compile(rf"{STEM}\.safetensors\.index(?:\.({_VARIANT}))?\.json"),
    re.compile(rf"{STEM}\.({_VARIANT})\.safetensors\.index\.json"),
)


class WeightsFiles(NamedTuple):
    """The files of one checkpoint: one weights file, or parts with an index."""

    path: Path  #: the file, or the index
    parts: Mapping[str, Path]  #: name -> path of each part; without an index, of the one file
    listed: Mapping[str, str] | None = None  #: the index: tensor -> name of its part

    @classmethod
    def at(cls, path: Path) -> WeightsFiles:
        """Find the files of a local checkpoint: `path` is a weights file, or an index with its parts beside it.

        Raises `ConfigError` if parts are missing or surplus, or if `path` is a single part.
        """
        if not is_index(path.name):
            if _PART.fullmatch(path.name):
                raise ConfigError(
                    f"{path} is one part of a checkpoint: name its index ({INDEX_SUFFIX}), or its directory"
                )
            return cls(path, {path.name: path})
        listed = read_index(path)
        names = sorted(set(listed.values()))
        missing = [name for name in names if not (path.parent / name).is_file()]
        if missing:
            raise ConfigError(f"{path} lists parts that are not beside it: {shortened(missing)}; download them again")
        surplus = sorted(p.name for p in path.parent.iterdir() if p.name not in names and _same_set(p.name, names))
        if surplus:
            raise ConfigError(
                f"{path} does not list these parts, which are beside it: {shortened(surplus)}; remove them if they are "
                "left over from another checkpoint, or get the index that belongs to them"
            )
        return cls(path, {name: path.parent / name for name in names}, listed)

    def check(self, held: Mapping[str, Collection[str]]) -> None:
        """Raise `ConfigError` unless the parts hold exactly the index's tensors; `held` is part -> tensors."""
        if self.listed is None:
            return
        missing = [f"{name} in {part}" for name, part in self.listed.items() if name not in held[part]]
        surplus = [f"{name} in {part}" for part in held for name in held[part] if self.listed.get(name) != part]
        for what, names in (("missing", missing), ("not listed", surplus)):
            if names:
                raise ConfigError(
                    f"{self.path} and its parts do not belong together: tensors are {what}: "
                    f"{shortened(names)}; download them again"
                )

    def sha256(self) -> str:
        """Return the SHA-256 of the file; for parts, that of the output of `sha256sum PARTS`, sorted by name."""
        if self.listed is None:
            return _sha256(self.path)
        lines = (f"{_sha256(path)}  {name}\n" for name, path in sorted(self.parts.items()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def is_index(name: str) -> bool:
    """Return whether a file has the name of an index."""
    return name.endswith(INDEX_SUFFIX) or (_variant_of(name) is not None and name.endswith(".json"))


def names_of(variant: str | None) -> tuple[str, ...]:
    """Return the names that the weights, or their index, can have, in the order of preference."""
    if variant is None:
        return WEIGHTS_FILE, f"{WEIGHTS_FILE}{INDEX_SUFFIX}"
    if not re.fullmatch(_VARIANT, variant):
        raise ConfigError(f"variant {variant!r} cannot be part of a file's name; variants are like fp16 or non_ema")
    weights = f"{STEM}.{variant}.safetensors"
    return weights, f"{WEIGHTS_FILE}.index.{variant}.json", f"{weights}{INDEX_SUFFIX}"


def choose(names: Iterable[str], variant: str | None, where: str) -> str:
    """Choose the weights, or their index, among a directory's file names.

    Without a `variant`, choose the name without variant, or else the only variant. Raises `ConfigError`, which lists
    the names, if there is no match. `where` names the directory in the message.
    """
    names = sorted(names)
    for name in names_of(variant):
        if name in names:
            return name
    found = {v: name for name in reversed(names) if (v := _variant_of(name)) is not None}
    if variant is None and len(found) == 1:
        return next(iter(found.values()))
    seen = [name for name in names if name.endswith((".safetensors", ".json", ".bin")) and name != "config.json"]
    there = f"it has {shortened(seen)}" if seen else "it has no weights at all"
    hint = f"; give variant= (--variant): {' or '.join(sorted(found))}" if found else ""
    raise ConfigError(f"{where} has no {names_of(variant)[0]}; {there}{hint}")


def variant_of(name: str) -> str | None:
    """Return the variant in the name of weights or of their index; None without a variant, or for other files."""
    return _variant_of(name) or None


def read_index(path: Path) -> dict[str, str]:
    """Read an index file: {tensor: name of its part}. Raises `ConfigError` if it is not one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        listed = data["weight_map"]
        plain = all(isinstance(part, str) and re.fullmatch(r"[\w.-]+\.safetensors", part) for part in listed.values())
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} is not the index of a checkpoint, JSON with a weight_map ({type(error).__name__}: {error})"
        ) from None
    if not listed or not plain:
        raise ConfigError(f"{path}: weight_map must name .safetensors files beside the index, and nothing else")
    return dict(listed)


def shortened(names: Collection[str]) -> str:
    """Join the first SHOWN names by commas, and count the rest."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _variant_of(name: str) -> str | None:
    """The variant; "" for the plain name, None for what is neither weights nor an index."""
    if _PART.fullmatch(name):
        return None
    match = next((match for pattern in _FILES if (match := pattern.fullmatch(name))), None)
    return None if match is None else match.group(1) or ""


def _same_set(name: str, parts: Iterable[str]) -> bool:
    """Return whether a file name differs from one of the parts only in its number."""
    kind = _without_number(name)
    return kind is not None and kind in {_without_number(part) for part in parts}


def _without_number(name: str) -> str | None:
    return re.sub(r"-\d{5}-of-\d{5}", "", name) if _PART.fullmatch(name) else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
