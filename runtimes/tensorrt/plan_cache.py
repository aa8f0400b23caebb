"""The cache of TensorRT plans that were built on this machine. A plan's key is a hash of all that it depends on.

    DIRECTORY/KEY/plan          the plan
    DIRECTORY/KEY/entry.json    size and sha256 of the plan, and the values that the key is made of
    DIRECTORY/KEY.lock          locked by the process that builds the plan
    DIRECTORY/timing-...        the builder's measured kernel times, which make later builds faster

A plan is code that the GPU's driver runs. So a directory that others can write to is refused, and each plan is compared
with its hash in memory before it is returned.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtimes.errors import ConfigError, NotInstalled

DEFAULT_CACHE_BYTES = 20 << 30  #: default limit of the cache's size, in bytes
DIRECTORY_VARIABLE = "VAE_EXPORT_CACHE"
TIMING = "timing-"  #: prefix of the names of timing caches
_PARTIAL = ".partial-"
_KEY = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class CachedPlan:
    """An entry of the cache; `vae-export cache list` prints it."""

    key: str
    size: int  #: bytes
    used: float  #: time of the last use, in seconds since 1970
    made_of: Mapping[str, Any]  #: the values that the key is made of


def default_directory() -> Path:
    """Return the folder `plans` in $VAE_EXPORT_CACHE, or in this system's cache directory for vae-export."""
    given = os.environ.get(DIRECTORY_VARIABLE)
    if given:
        return Path(given) / "plans"
    try:
        import platformdirs
    except ModuleNotFoundError:
        raise NotInstalled("the plan cache needs platformdirs: pip install 'vae-export[tensorrt]'") from None
    return Path(platformdirs.user_cache_dir("vae-export")) / "plans"


class PlanCache:
    """A directory of plans of at most `most`; the least recently used plans are removed first.

    Raises `ConfigError` for a directory that cannot be used, belongs to another user, or that others can write to.
    """

    def __init__(self, directory: str | Path | None = None, most: int = DEFAULT_CACHE_BYTES) -> None:
        self.directory = Path(directory) if directory is not None else default_directory()
        self.most = most
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            status = self.directory.stat()
        except OSError as error:
            raise ConfigError(f"the plan cache {self.directory} cannot be used: {error.strerror}") from None
        if status.st_uid != os.geteuid():
            raise ConfigError(f"the plan cache {self.directory} belongs to another user; choose one of your own")
        if stat.S_IMODE(status.st_mode) & 0o022:
            raise ConfigError(
                f"the plan cache {self.directory} can be written to by others, and plans are code: "
                f"chmod go-w {self.directory}"
            )
        if not os.access(self.directory, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
            raise ConfigError(f"the plan cache {self.directory} cannot be written to")

    def get_or_build(self, made_of: Mapping[str, Any], build: Callable[[], bytes]) -> bytes:
        """Return the plan for `made_of`, from the cache or from `build`.

        Processes that ask for the same plan at once build it once: the others wait for the first.
        """
        key = key_of(made_of)
        with ExitStack() as held:
            try:
                held.enter_context(self._locked(key))
            except OSError as error:
                self._warn(error)
                return build()
            plan = self._read(key)
            if plan is not None:
                return plan
            plan = build()
            try:
                self._write(key, plan, made_of)
            except OSError as error:
                self._warn(error)  # only a warning: the plan works, and took minutes to build
        self._remove_beyond(self.most, spare=key)
        return plan

    def _warn(self, error: OSError) -> None:
        warnings.warn(
            f"the plan cannot be kept in {self.directory}: {error.strerror or error}; the next use builds it again",
            RuntimeWarning,
            stacklevel=3,
        )

    def entries(self) -> list[CachedPlan]:
        """Return all entries, the most recently used first."""
        found = []
        for path in self.directory.glob("*/entry.json"):
            if not _KEY.fullmatch(path.parent.name):  # a partial entry
                continue
            with suppress(OSError, ValueError, KeyError, TypeError):
                entry = json.loads(path.read_bytes())
                found.append(CachedPlan(path.parent.name, int(entry["size"]), path.stat().st_mtime, entry["made_of"]))
        return sorted(found, key=lambda entry: entry.used, reverse=True)

    def clear(self) -> int:
        """Remove all plans and timing caches, and no other files. Returns the freed bytes."""
        freed = sum(entry.size for entry in self.entries())
        for path in self.directory.iterdir():
            if _KEY.fullmatch(path.name.removeprefix(_PARTIAL).partition("-")[0]):
                shutil.rmtree(path, ignore_errors=True)
            elif path.name.startswith(TIMING):
                path.unlink(missing_ok=True)
        return freed

    def _locked(self, key: str) -> Any:
        try:
            from filelock import FileLock
        except ModuleNotFoundError:
            raise NotInstalled("the plan cache needs filelock: pip install 'vae-export[tensorrt]'") from None
        return FileLock(self.directory / f"{key}.lock")

    def _read(self, key: str) -> bytes | None:
        """Return the plan if it is there and matches its hash; otherwise remove the entry and return None."""
        folder = self.directory / key
        try:
            entry = json.loads((folder / "entry.json").read_bytes())
            plan = (folder / "plan").read_bytes()
            sound = len(plan) == entry["size"] and hashlib.sha256(plan).hexdigest() == entry["sha256"]
        except FileNotFoundError:
            sound = False
        except (OSError, ValueError, KeyError, TypeError):
            sound = False
        if not sound:
            shutil.rmtree(folder, ignore_errors=True)
            return None
        with suppress(OSError):
            os.utime(folder / "entry.json")
        return plan

    def _write(self, key: str, plan: bytes, made_of: Mapping[str, Any]) -> None:
        self._remove_leftovers(key)
        folder = Path(tempfile.mkdtemp(prefix=f"{_PARTIAL}{key}-", dir=self.directory))
        try:
            (folder / "plan").write_bytes(plan)
            entry = {"size": len(plan), "sha256": hashlib.sha256(plan).hexdigest(), "made_of": dict(made_of)}
            (folder / "entry.json").write_text(json.dumps(entry, indent=1), encoding="utf-8")
            folder.rename(self.directory / key)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _remove_leftovers(self, mine: str) -> None:
        """Remove partial entries of killed processes: those whose key no other process has locked."""
        for path in self.directory.glob(f"{_PARTIAL}*"):
            key = path.name.removeprefix(_PARTIAL).partition("-")[0]
            lock = self._locked(key)
            with suppress(TimeoutError), nullcontext() if key == mine else lock.acquire(timeout=0):
                shutil.rmtree(path, ignore_errors=True)

    def _remove_beyond(self, most: int, spare: str) -> None:
        kept = 0
        for entry in self.entries():
            kept += entry.size
            if kept > most and entry.key != spare:
                shutil.rmtree(self.directory / entry.key, ignore_errors=True)


def key_of(made_of: Mapping[str, Any]) -> str:
    """Return the key, 40 hex digits, of the values that a plan depends on."""
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:40]
