"""The number of CPUs that this process may use; every default number of threads or processes comes from here.

`os.cpu_count()` counts the CPUs of the machine. A process may have fewer: its affinity (`taskset`, cpusets, Slurm) and
the CPU quota of its control group (`docker run --cpus`, a Kubernetes limit, systemd's CPUQuota) limit it.

Libraries choose their number of threads themselves, and in our measurements none of them respected a quota. ONNX
Runtime and OpenVINO therefore receive `thread_limit()`, and PyTorch receives `available_cpus()` on the command line.
XLA has no option for its CPU threads: under a quota, set the affinity as well.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_ROOT = Path("/")


def available_cpus() -> int:
    """Return the number of CPUs that this process may use, at least 1: the smaller of affinity and quota.

    A quota of 2.5 CPUs counts as 2. The threads of a backend wait for each other: if a third thread exceeds the quota,
    the kernel stops all of them for the rest of the period.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_quota()
    return cpus if quota is None else max(1, min(cpus, int(quota)))


def thread_limit() -> int | None:
    """Return `available_cpus()` if it is less than the CPUs of the machine, else None.

    Use it for libraries whose own default (one thread per physical core) beats one thread per CPU but ignores the
    limits of the process.
    """
    cpus = available_cpus()
    return cpus if cpus < (os.cpu_count() or 1) else None


def cgroup_quota(root: Path = _ROOT) -> float | None:
    """Return the smallest CPU quota, in CPUs, of this process' control group and its ancestors; None without a quota.

    Reads /proc and /sys below `root`. Missing or unparsable files count as no quota: most machines, other operating
    systems and containers that hide these files look like that.
    """
    quotas = [quota for group, version in _cpu_groups(root) if (quota := _quota(group, version)) is not None]
    return min(quotas, default=None)


def _cpu_groups(root: Path) -> Iterator[tuple[Path, int]]:
    """Yield (directory, cgroup version) of each group that may limit this process' CPU time, innermost first."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except (OSError, ValueError):
        return
    paths: dict[int, PurePosixPath] = {}
    for line in groups:  # HIERARCHY:CONTROLLERS:PATH; version 2 has no controllers here
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if "cpu" in controllers.split(","):
            paths[1] = PurePosixPath(path)
        elif not controllers:
            paths[2] = PurePosixPath(path)
    for line in mounts:  # ... ROOT MOUNT_POINT OPTIONS ... - TYPE SOURCE SUPER_OPTIONS
        left, _, right = line.partition(" - ")
        fields, after = left.split(), right.split()
        if len(fields) < 5 or len(after) < 3:
            continue
        version = {"cgroup2": 2, "cgroup": 1}.get(after[0])
        if version is None or version not in paths or (version == 1 and "cpu" not in after[2].split(",")):
            continue
        mount = root / _unescaped(fields[4]).lstrip("/")
        try:  # in a container, the mount may start at this group
            inner = paths[version].relative_to(_unescaped(fields[3]))
        except ValueError:
            inner = PurePosixPath()
        if ".." in inner.parts:  # the group is outside of this cgroup namespace
            inner = PurePosixPath()
        inner = PurePosixPath(*(part for part in inner.parts if part != "/"))
        for group in (inner, *inner.parents):
            yield mount / group, version


def _quota(group: Path, version: int) -> float | None:
    """Return the quota of one control group in CPUs, or None if it sets no limit."""
    try:
        if version == 2:  # "max 100000" or "150000 100000": quota and period in microseconds
            quota, period = map(int, (group / "cpu.max").read_text().split()[:2])
        else:  # -1 means no limit
            quota = int((group / "cpu.cfs_quota_us").read_text())
            period = int((group / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
    return quota / period if quota > 0 and period > 0 else None


def _unescaped(path: str) -> str:
    """Decode a path of mountinfo, which writes blanks as octal escapes."""
    for octal, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        path = path.replace(octal, character)
    return path
