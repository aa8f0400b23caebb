"""Registries of backends, targets and families, to which more can be added.

A registry maps each name to a location "module:object", which is imported at first use. Names can therefore be listed
even if the package behind one of them is not installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from runtimes.errors import VaeError


class Registry(Mapping[str, Any]):
    """A mapping from names to objects. Reading an entry imports it; iterating over the names does not.

    Reading an unknown name raises `error`, with a message that lists the known names.
    """

    def __init__(self, kind: str, error: type[VaeError], places: Mapping[str, str]) -> None:
        self.kind = kind
        self._error = error
        self._places: dict[str, Any] = dict(places)

    def register(self, name: str, place: Any) -> None:
        """Add or replace an entry; `place` is "module:object" or the object itself."""
        self._places[name] = place

    def unregister(self, name: str) -> None:
        """Remove an entry; used by tests."""
        del self._places[name]

    def __getitem__(self, name: str) -> Any:
        if name not in self._places:
            raise self._error(f"{self.kind} {name!r} is not known; known are {', '.join(self._places)}")
        place = self._places[name]
        if not isinstance(place, str):
            return place
        module, _, attribute = place.partition(":")
        return getattr(importlib.import_module(module), attribute)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
