"""What nvidia-smi says of the first GPU; nothing is known where it is not installed."""

from __future__ import annotations

import statistics
import subprocess
import threading
import time
from collections.abc import Sequence
from typing import Any

#: field of nvidia-smi -> our name; each is known to every driver of the last years: one that is not voids the query
WHO = {"name": "name", "driver_version": "driver", "memory.total": "memory_mib", "compute_cap": "compute_capability"}
STATE = {
    "clocks.sm": "sm_mhz",
    "clocks.max.sm": "most_sm_mhz",
    "clocks.mem": "memory_mhz",
    "temperature.gpu": "celsius",
    "power.draw": "watts",
    "utilization.gpu": "busy_percent",
    "memory.used": "used_mib",
}
SECONDS_BETWEEN = 1.0


def ask(fields: dict[str, str]) -> dict[str, Any]:
    """{our name: number or text} of the first GPU; {} where nvidia-smi does not answer."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        return {}
    values = [value.strip() for value in lines[0].split(",")]
    return {name: _number(value) for name, value in zip(fields.values(), values, strict=False)}


def _number(text: str) -> Any:
    """A float where it is one, None where the driver does not tell ("[N/A]")."""
    if text.startswith("["):
        return None
    try:
        return float(text)
    except ValueError:
        return text


class Sampler:
    """Asks for the state of the card once a second, beside the work."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, dict[str, Any]]] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.is_set():
            state = ask(STATE)
            if state:
                self._samples.append((time.monotonic(), state))
            elif not self._samples:  # there is no card
                return
            self._end.wait(SECONDS_BETWEEN)

    def between(self, start: float, end: float) -> dict[str, Any]:
        """{name: {"median", "least", "most"}} of the samples between two times of time.monotonic()."""
        return summary([state for at, state in list(self._samples) if start <= at <= end])


def summary(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found = {}
    for name in STATE.values():
        values = [state[name] for state in states if isinstance(state.get(name), float)]
        if values:
            found[name] = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    return found
