"""The number of CPUs that this process may use: affinity, and quotas of control groups of both versions."""

import os
import subprocess
import sys

import pytest

from runtimes import cpus, open_vae
from runtimes.cpus import available_cpus, cgroup_quota, thread_limit

V2_MOUNT = "30 23 0:26 {root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup rw,nsdelegate"
V1_MOUNT = "32 31 0:29 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"
V1_OTHER = "33 31 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"


@pytest.fixture
def system(tmp_path):
    """system(groups, mounts, {file: content}) -> root of a file system with these files in /proc and /sys."""

    def make(groups, mounts, files):
        texts = {"proc/self/cgroup": "\n".join(groups), "proc/self/mountinfo": "\n".join(mounts)}
        for name, text in (texts | {f"sys/fs/cgroup/{name}": text for name, text in files.items()}).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("group", "root", "files", "quota"),
    [
        ("0::/", "/", {"cpu.max": "150000 100000"}, 1.5),  # a container with a namespace of its own
        ("0::/", "/", {"cpu.max": "max 100000"}, None),
        ("0::/", "/", {}, None),  # the root group has no cpu.max
        ("0::/a/b", "/", {"a/b/cpu.max": "max 100000", "a/cpu.max": "200000 100000"}, 2.0),  # the parent bounds it
        ("0::/a/b", "/", {"a/b/cpu.max": "50000 100000", "a/cpu.max": "200000 100000"}, 0.5),
        ("0::/../other", "/", {"cpu.max": "100000 100000"}, 1.0),  # seen from within another namespace
        ("0::/docker/x", "/docker/x", {"cpu.max": "300000 100000"}, 3.0),  # host's path, mounted from there
        ("0::/a", "/", {"a/cpu.max": "nonsense"}, None),
        ("0::/a", "/", {"a/cpu.max": "0 0"}, None),
    ],
)
def test_the_quota_of_cgroup_v2_is_the_smallest_on_the_way_to_the_root(group, root, files, quota, system):
    assert cgroup_quota(system([group], [V2_MOUNT.format(root=root)], files)) == quota


@pytest.mark.parametrize(
    ("group", "root", "directory", "quota"),
    [
        ("/", "/", "", 2.5),
        ("/docker/x", "/docker/x", "", 2.5),  # a container without a namespace of its own
        ("/user", "/", "user/", 2.5),
        ("/elsewhere", "/docker/x", "", 2.5),
        ("/", "/", "", None),
    ],
)
def test_the_quota_of_cgroup_v1_is_found_where_its_cpu_controller_is_mounted(group, root, directory, quota, system):
    place = f"cpu,cpuacct/{directory}"
    microseconds = "-1" if quota is None else f"{quota * 100_000:.0f}"
    files = {f"{place}cpu.cfs_quota_us": microseconds, f"{place}cpu.cfs_period_us": "100000"}
    groups = ["5:memory:/other", f"4:cpu,cpuacct:{group}", "0::/"]
    assert cgroup_quota(system(groups, [V1_OTHER, V1_MOUNT.format(root=root)], files)) == quota


def test_a_system_without_cgroups_has_no_quota(tmp_path, system):
    assert cgroup_quota(tmp_path) is None
    assert cgroup_quota(system(["", "nonsense", "1:x"], ["", "a b c", "a b c d e - f"], {})) is None


@pytest.mark.parametrize(("quota", "expected"), [(None, 8), (3.9, 3), (0.5, 1), (100.0, 8)])
def test_a_quota_is_rounded_down_to_one_cpu_or_more(quota, expected, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(cpus, "cgroup_quota", lambda: quota)
    assert available_cpus() == expected
    assert thread_limit() == (None if expected == 8 else expected)


def test_systems_without_affinity_count_the_cpus_of_the_machine(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available_cpus() == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_affinity_bounds_the_cpus_of_a_process():
    one = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, {{{one}}}); import runtimes.cpus as c; print(c.available_cpus())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"


def test_backends_are_told_the_bound_unless_the_caller_says_how_many_threads(onnx_bundle, monkeypatch):
    pytest.importorskip("onnxruntime")
    import runtimes.onnxruntime

    monkeypatch.setattr(runtimes.onnxruntime, "thread_limit", lambda: 3)
    for threads, expected in ((None, 3), (2, 2)):
        with open_vae(onnx_bundle, threads=threads) as vae:
            assert isinstance(vae, runtimes.onnxruntime.OnnxRuntimeVae)
            options = vae._sessions["encoder"].get_session_options()
            assert options.intra_op_num_threads == expected


def test_no_module_counts_cpus_by_itself(pytestconfig):
    root = pytestconfig.rootpath
    modules = [path for package in ("runtimes", "vae_export") for path in (root / package).rglob("*.py")]
    counting = {path.name for path in modules if "cpu_count" in path.read_text() or "getaffinity" in path.read_text()}
    assert counting == {"cpus.py"}
