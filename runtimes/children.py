"""Child processes that import nothing from the working directory, whose files are not trusted.

Python puts the working directory first on the import path of `python -c` and `python -m`: a folder `runtimes/` or a
file `pickle.py` there would be executed. `-P` and PYTHONSAFEPATH prevent that. Children inherit the other entries of
this process' path, such as the directory of the user's script.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import Any

SAFE_PATH = "PYTHONSAFEPATH"
_PACKAGE_PARENT = Path(__file__).resolve().parents[1]
_changing = threading.RLock()


def command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs one of our modules; start it with `environment()`."""
    return [sys.executable, "-P", "-m", module, *arguments]


def environment() -> dict[str, str]:
    """Return this process' environment with our packages first on PYTHONPATH and without the working directory."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    # An empty entry, which a stray colon produces, means the working directory.
    kept = [os.path.abspath(entry) for entry in given if entry and os.path.normpath(entry) != os.curdir]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(_PACKAGE_PARENT), *kept]), SAFE_PATH: "1"}


@contextmanager
def safe_path() -> Iterator[None]:
    """Set PYTHONSAFEPATH inside the block, for libraries that start processes themselves."""
    with _changing:
        before = os.environ.get(SAFE_PATH)
        os.environ[SAFE_PATH] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ[SAFE_PATH]
            else:
                os.environ[SAFE_PATH] = before


class _Process(SpawnProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        with safe_path():
            return SpawnProcess._Popen(process_obj)


class _Context(SpawnContext):
    Process = _Process


def spawn_context() -> SpawnContext:
    """Return the "spawn" context of multiprocessing, whose processes do not import from the working directory."""
    with safe_path():
        resource_tracker.ensure_running()  # also a child process, which starts at the first lock or queue
    return _Context()
