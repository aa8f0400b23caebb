"""Processes that we start import nothing from the working directory, which may hold anyone's files.

Python puts the working directory first on the path of `python -c` and `python -m`: a folder `runtimes/` or a file
`pickle.py` there would be run. `-P` and PYTHONSAFEPATH keep it off. What the path of this process has on its own, such
as the directory of the user's script, its children have as well.
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
    """The command that runs a module of ours; to be started with `environment()`."""
    return [sys.executable, "-P", "-m", module, *arguments]


def environment() -> dict[str, str]:
    """This process' environment, with the packages of ours first on the path and the working directory not on it."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    # An empty entry, as a stray colon leaves one, means the working directory.
    kept = [os.path.abspath(entry) for entry in given if entry and os.path.normpath(entry) != os.curdir]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(_PACKAGE_PARENT), *kept]), SAFE_PATH: "1"}


@contextmanager
def safe_path() -> Iterator[None]:
    """For libraries that start processes of their own: those that they start meanwhile have PYTHONSAFEPATH."""
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
    """multiprocessing's "spawn", by `python -c`, but for the working directory."""
    with safe_path():
        resource_tracker.ensure_running()  # a process as well, started at the first lock or queue
    return _Context()
