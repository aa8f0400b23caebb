"""The cache of TensorRT plans that were built on this machine: found again by all that a plan depends on.

    DIRECTORY/KEY/plan          the plan
    DIRECTORY/KEY/entry.json    its size and sha256, and what the key was made of
    DIRECTORY/KEY.lock          held by whoever builds it
    DIRECTORY/timing-...        what the builder has timed, to be faster the next time

A plan is code that the GPU's driver runs: a directory that others can write to is refused, and the bytes that are
handed out are those that were hashed.
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

DEFAULT_CACHE_BYTES = 20 << 30  #: bytes that the cache may hold, unless another number is given
DIRECTORY_VARIABLE = "VAE_EXPORT_CACHE"
TIMING = "timing-"  #: how the names of files begin that keep what the builder has timed
_PARTIAL = ".partial-"
_KEY = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class CachedPlan:
    """An entry of the cache, as `vae-export cache list` shows it."""

    key: str
    size: int  #: bytes
    used: float  #: when it was last asked for, in seconds since 1970
    made_of: Mapping[str, Any]


def default_directory() -> Path:
    """$VAE_EXPORT_CACHE, or where this system keeps caches; the plans are in `plans` below it."""
    given = os.environ.get(DIRECTORY_VARIABLE)
    if given:
        return Path(given) / "plans"
    try:
        import platformdirs
    except ModuleNotFoundError:
        raise NotInstalled("the plan cache needs platformdirs: pip install 'vae-export[tensorrt]'") from None
    return Path(platformdirs.user_cache_dir("vae-export")) / "plans"


class PlanCache:
    """A directory of plans, bounded in size: what was not used for longest goes first.

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
        """The plan made of these; built, once, by whoever asks first, while others wait for it."""
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
                self._warn(error)  # it took minutes to build, and works
        self._remove_beyond(self.most, spare=key)
        return plan

    def _warn(self, error: OSError) -> None:
        warnings.warn(
            f"the plan cannot be kept in {self.directory}: {error.strerror or error}; the next use builds it again",
            RuntimeWarning,
            stacklevel=3,
        )

    def entries(self) -> list[CachedPlan]:
        """What is there, the last used first."""
        found = []
        for path in self.directory.glob("*/entry.json"):
            if not _KEY.fullmatch(path.parent.name):  # half-written
                continue
            with suppress(OSError, ValueError, KeyError, TypeError):
                entry = json.loads(path.read_bytes())
                found.append(CachedPlan(path.parent.name, int(entry["size"]), path.stat().st_mtime, entry["made_of"]))
        return sorted(found, key=lambda entry: entry.used, reverse=True)

    def clear(self) -> int:
        """Remove all plans, and nothing that is not the cache's -> bytes that this freed."""
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
        """The plan, if it is there and is what was written; one that is not is removed."""
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
        """What processes that were killed had begun to write: that of keys which nobody else has locked."""
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
    """40 hex digits that differ wherever anything that a plan depends on does."""
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:40]
