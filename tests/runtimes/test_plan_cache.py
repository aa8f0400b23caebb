"""The cache of plans: built once, found again, bounded, and nothing in it that others could have put there.

Tests runtimes/tensorrt/plan_cache.py, vae_export/cli/engines.py.
"""

import errno
import hashlib
import itertools
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import numpy as np
import pytest

from runtimes import ConfigError, VaeError, open_vae
from runtimes.tensorrt import runtime as tensorrt
from runtimes.tensorrt.builder import build_plan
from runtimes.tensorrt.plan_cache import CachedPlan, PlanCache, default_directory, key_of
from runtimes.tensorrt.profiles import Profile, Range, parse_profile
from tests.helpers.inputs import images, latents, results

MADE_OF = {"onnx": "abc", "flavour": "tensorrt"}


@pytest.fixture
def cache(tmp_path):
    return PlanCache(tmp_path / "cache")


@pytest.fixture
def builds(monkeypatch):
    """The graphs that an ONNX bundle's plans were built of, in a list."""
    done, build = [], build_plan

    def spy(onnx, job, what, progress):
        done.append(what)
        return build(onnx, job, what, progress)

    monkeypatch.setattr(tensorrt, "build_plan", spy)
    return done


def never():
    raise AssertionError("it was built again")


def files_in(directory):
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


# Opening ONNX bundles ---------------------------------------------------------------------------------------------


def test_an_onnx_bundle_is_built_when_it_is_first_opened_and_found_afterwards(
    onnx_bundle, tensorrt_bundle, fake_gpu, builds, tmp_path
):
    reports = []
    options = {"backend": "tensorrt", "cache_dir": tmp_path / "cache", "profiles": ["1..4x8..64x8..64"]}
    x, z = images(2, 2, 3), latents(2, 2, 3)
    with open_vae(tensorrt_bundle("tensorrt")) as vae:
        expected = results(vae, x, z)
    for _ in range(2):
        with open_vae(onnx_bundle, **options, progress=lambda *report: reports.append(report)) as vae:
            assert all(map(np.array_equal, results(vae, x, z), expected))
            assert isinstance(vae, tensorrt.TensorRtVae)
            assert vae.profiles == (parse_profile("1..4x8..64x8..64", 8),)
        assert builds == ["encoder", "decoder"]
    assert ("Building the decoder: Tactic Selection", 3, 3) in reports
    with open_vae(onnx_bundle, **options | {"profiles": ["1..2x8..64x8..64"]}):
        assert builds == 2 * ["encoder", "decoder"], "another profile is another plan"
    assert [path.name for path in options["cache_dir"].glob("timing-*")] == ["timing-11.4.0.1-sm89"]


def test_each_flavour_has_plans_of_its_own(onnx_bundle, fake_gpu, builds, tmp_path):
    for backend in ("tensorrt", "tensorrt-rtx"):
        open_vae(onnx_bundle, backend=backend, cache_dir=tmp_path).close()
    assert builds == 2 * ["encoder", "decoder"]
    kept = {(entry.made_of["flavour"], entry.made_of["input"]) for entry in PlanCache(tmp_path).entries()}
    assert len(kept) == 4


@pytest.mark.parametrize(
    ("profile", "says"),
    [("1x100x64", "height 100"), (Profile(Range(1, 1, 1), Range(100, 100, 100), Range(64, 64, 64)), "height 100")],
    ids=str,
)
def test_a_profile_that_cannot_be_is_refused_before_anything_is_built(onnx_bundle, fake_gpu, builds, profile, says):
    with pytest.raises(ConfigError, match=f"{says} of a profile is not a multiple of 8"):
        open_vae(onnx_bundle, backend="tensorrt", profiles=[profile])
    assert not builds


@pytest.mark.parametrize("trouble", ["file", "open to others"])
def test_a_cache_that_cannot_be_used_is_refused_before_anything_is_built(
    onnx_bundle, fake_gpu, builds, tmp_path, trouble
):
    path = tmp_path / "cache"
    path.touch() if trouble == "file" else path.mkdir()
    path.chmod(0o777)
    with pytest.raises(ConfigError, match=re.escape(f"the plan cache {path} can")):
        open_vae(onnx_bundle, backend="tensorrt", cache_dir=path)
    assert not builds


# Keys -------------------------------------------------------------------------------------------------------------

KEY = {
    "onnx": "a" * 64,
    "flavour": "tensorrt",
    "version": "11.4.0.1",
    "gpus": ["sm89"],
    "system": "linux-x86_64",
    "profiles": [parse_profile("1x64x64", 8).to_dict()],
    "input": "sample",
}


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("onnx", "b" * 64),
        ("flavour", "tensorrt-rtx"),
        ("version", "11.4.0.2"),
        ("gpus", ["sm90"]),
        ("system", "win32-AMD64"),
        ("profiles", [parse_profile("1x64x72", 8).to_dict()]),
        ("profiles", [*KEY["profiles"], *KEY["profiles"]]),
        ("input", "latent_sample"),
    ],
)
def test_a_key_differs_wherever_a_plan_would(cache, field, other):
    assert cache.get_or_build(KEY, lambda: b"one") == b"one"
    assert cache.get_or_build({**KEY, field: other}, lambda: b"another") == b"another"
    assert cache.get_or_build(dict(reversed(KEY.items())), never) == b"one"


def test_all_of_it_is_in_the_key_of_an_opened_bundle(onnx_bundle, fake_gpu, tmp_path):
    open_vae(onnx_bundle, backend="tensorrt", cache_dir=tmp_path, profiles=["1x64x64"]).close()
    entries = PlanCache(tmp_path).entries()
    assert len(entries) == 2 and all(entry.made_of.keys() == KEY.keys() for entry in entries)
    found = next(entry for entry in entries if entry.made_of["input"] == "sample")
    onnx = hashlib.sha256((onnx_bundle / "vae_encoder" / "model.onnx").read_bytes()).hexdigest()
    assert found.made_of == {**KEY, "onnx": onnx, "system": found.made_of["system"]}
    assert found.key == key_of(found.made_of)


# At once ----------------------------------------------------------------------------------------------------------


def test_threads_that_ask_at_once_build_once(tmp_path):
    built = []

    def build():
        built.append(1)
        time.sleep(0.3)
        return b"plan"

    with ThreadPoolExecutor(8) as pool:
        plans = list(pool.map(lambda _: PlanCache(tmp_path / "cache").get_or_build(MADE_OF, build), range(8)))
    assert plans == [b"plan"] * 8 and built == [1]


BUILD_SLOWLY = """
import os, sys, time
from runtimes.tensorrt.plan_cache import PlanCache

def build():
    open(f"{sys.argv[1]}/built-{os.getpid()}", "x").close()
    time.sleep(0.5)
    return b"plan"

print(PlanCache(sys.argv[1]).get_or_build({"onnx": "abc", "flavour": "tensorrt"}, build))
"""


def test_processes_that_ask_at_once_build_once(tmp_path, pytestconfig):
    tmp_path.chmod(0o700)
    command = [sys.executable, "-W", "error", "-c", BUILD_SLOWLY, str(tmp_path)]
    running = [subprocess.Popen(command, cwd=pytestconfig.rootpath, stdout=subprocess.PIPE) for _ in range(3)]
    assert [process.communicate(timeout=60)[0] for process in running] == [b"b'plan'\n"] * 3
    assert len(list(tmp_path.glob("built-*"))) == 1


def test_a_build_that_fails_leaves_the_next_one_to_try(cache):
    def fail():
        raise VaeError("failed")

    with pytest.raises(VaeError, match="failed"):
        cache.get_or_build(MADE_OF, fail)
    assert cache.get_or_build(MADE_OF, lambda: b"plan") == b"plan"


# Size -------------------------------------------------------------------------------------------------------------


clock = itertools.count(1_000_000)  # seconds, long ago: what is used now is later


def use(cache, name, size=100):
    """Ask for a plan, at a time of its own; whether it had to be built."""
    built = []

    def build():
        built.append(1)
        return bytes(size)

    cache.get_or_build({"onnx": name}, build)
    os.utime(cache.directory / key_of({"onnx": name}) / "entry.json", 2 * (next(clock),))
    return bool(built)


def test_what_was_not_used_for_longest_goes_first(tmp_path):
    cache = PlanCache(tmp_path / "cache", most=250)
    assert use(cache, "a") and use(cache, "b")
    assert not use(cache, "a")
    assert use(cache, "c"), "which is one too many"
    assert not use(cache, "a") and not use(cache, "c")
    assert [entry.made_of["onnx"] for entry in cache.entries()] == ["c", "a"]
    assert use(cache, "b")


def test_a_plan_larger_than_the_cache_is_kept_until_the_next(tmp_path):
    cache = PlanCache(tmp_path / "cache", most=250)
    assert use(cache, "a") and use(cache, "huge", 1000)
    assert not use(cache, "huge")
    assert [entry.size for entry in cache.entries()] == [1000]
    assert use(cache, "b")
    assert [entry.made_of["onnx"] for entry in cache.entries()] == ["b"]


# Where it is ------------------------------------------------------------------------------------------------------


def test_the_default_is_where_the_variable_or_the_system_says(monkeypatch, tmp_path):
    monkeypatch.setenv("VAE_EXPORT_CACHE", str(tmp_path / "mine"))
    assert default_directory() == tmp_path / "mine" / "plans"
    assert PlanCache().directory == tmp_path / "mine" / "plans"
    assert stat.S_IMODE((tmp_path / "mine" / "plans").stat().st_mode) == 0o700
    monkeypatch.delenv("VAE_EXPORT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "system"))
    assert default_directory() == tmp_path / "system" / "vae-export" / "plans"


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_a_directory_that_others_can_write_to_is_refused(tmp_path, mode):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(mode)
    with pytest.raises(ConfigError, match=r"can be written to by others, and plans are code: chmod go-w .*cache$"):
        PlanCache(tmp_path / "cache")
    (tmp_path / "cache").chmod(0o755)
    PlanCache(tmp_path / "cache")


@pytest.fixture
def as_nobody():
    """A directory that is not of the superuser, who may write anywhere; for the test this process gives that up."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    user = os.geteuid()
    if user == 0:
        os.chown(path, 65534, 65534)
        os.seteuid(65534)
    try:
        yield path
    finally:
        if user == 0:
            os.seteuid(0)
        path.chmod(0o700)
        shutil.rmtree(path)


def test_a_directory_that_is_not_writable_is_refused(as_nobody):
    PlanCache(as_nobody)
    as_nobody.chmod(0o555)
    with pytest.raises(ConfigError, match="cannot be written to"):
        PlanCache(as_nobody)
    with pytest.raises(ConfigError, match=r"below cannot be used: Permission denied"):
        PlanCache(as_nobody / "below")


@pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser can give a directory to another")
def test_a_directory_of_another_user_is_refused(tmp_path):
    (tmp_path / "cache").mkdir(mode=0o700)
    os.chown(tmp_path / "cache", 65534, 65534)
    with pytest.raises(ConfigError, match="belongs to another user"):
        PlanCache(tmp_path / "cache")


def test_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=re.escape(f"the plan cache {path} cannot be used")):
            PlanCache(path)


# Disks that fill up, and files that are not what was written ------------------------------------------------------


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(("owner", "name"), [(Path, "write_bytes"), (os, "rename"), (filelock.FileLock, "acquire")])
def test_on_a_full_disk_a_plan_is_used_and_a_warning_says_so(cache, monkeypatch, owner, name):
    monkeypatch.setattr(owner, name, full)
    with pytest.warns(RuntimeWarning, match=r"cannot be kept in .*: No space left on device; the next use builds it"):
        assert cache.get_or_build(MADE_OF, lambda: b"plan") == b"plan"
    assert {name for name in files_in(cache.directory) if not name.endswith(".lock")} == set(), "nothing is left behind"
    monkeypatch.undo()
    assert cache.get_or_build(MADE_OF, lambda: b"again") == b"again"


DAMAGE = {
    "cut short": ("plan", lambda data: data[:-1]),
    "a bit flipped": ("plan", lambda data: data[:5] + bytes([data[5] ^ 1]) + data[6:]),
    "longer": ("plan", lambda data: data + b"\0"),
    "no entry": ("entry.json", lambda data: b""),
    "another entry": ("entry.json", lambda data: b"[]"),
    "half an entry": ("entry.json", lambda data: data[: len(data) // 2]),
    "no size": ("entry.json", lambda data: data.replace(b'"size"', b'"seize"')),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_plan_that_was_changed_is_built_again(cache, damage):
    cache.get_or_build(MADE_OF, lambda: b"the plan, as it was built")
    name, change = DAMAGE[damage]
    path = cache.directory / key_of(MADE_OF) / name
    path.write_bytes(change(path.read_bytes()))
    assert cache.get_or_build(MADE_OF, lambda: b"another") == b"another"
    assert cache.get_or_build(MADE_OF, never) == b"another"


def test_a_plan_whose_file_is_gone_is_built_again(cache):
    for name in ("plan", "entry.json"):
        cache.get_or_build(MADE_OF, lambda: b"plan")
        (cache.directory / key_of(MADE_OF) / name).unlink()
        assert cache.get_or_build(MADE_OF, lambda: b"another") == b"another"


KILLED_WHILE_WRITING = """
import os, signal, sys
from runtimes.tensorrt.plan_cache import PlanCache

os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
PlanCache(sys.argv[1]).get_or_build({"onnx": "abc", "flavour": "tensorrt"}, lambda: b"plan")
"""


def test_what_a_killed_process_was_writing_does_not_count_and_goes(cache, pytestconfig):
    command = [sys.executable, "-c", KILLED_WHILE_WRITING, str(cache.directory)]
    for _ in range(2):
        assert subprocess.run(command, cwd=pytestconfig.rootpath).returncode == -signal.SIGKILL
        assert len(list(cache.directory.glob(".partial-*/entry.json"))) == 1, "else there is nothing to see here"
    assert cache.entries() == []
    assert cache.get_or_build({"onnx": "other"}, lambda: b"other") == b"other"
    assert not list(cache.directory.glob(".partial-*")), "whoever writes next tidies up"
    assert cache.get_or_build(MADE_OF, lambda: b"plan") == b"plan"


def test_what_another_process_is_writing_stays(cache):
    folder = cache.directory / f".partial-{key_of(MADE_OF)}-xyz"
    folder.mkdir()
    with filelock.FileLock(cache.directory / f"{key_of(MADE_OF)}.lock"):
        cache.get_or_build({"onnx": "other"}, lambda: b"other")
        assert folder.exists()


def test_opening_a_cached_plan_hashes_at_no_less_than_500_megabytes_a_second(cache):
    plan = np.random.default_rng(0).bytes(256_000_000)
    cache.get_or_build(MADE_OF, lambda: plan)
    times = []
    for _ in range(3):  # of the processor, and the best: others may be at work on this machine
        begin = time.process_time()
        assert len(cache.get_or_build(MADE_OF, never)) == len(plan)
        times.append(time.process_time() - begin)
    assert len(plan) / min(times) >= 500e6


# The command line -------------------------------------------------------------------------------------------------


def test_the_command_lists_and_clears(run, cache):
    assert run("cache", "list", "--dir", cache.directory, "--json").json == {
        "directory": str(cache.directory),
        "plans": [],
    }
    cache.get_or_build(KEY, lambda: bytes(3 << 20))
    (cache.directory / "timing-11.4.0.1-sm89").write_bytes(b"times")
    (found,) = run("cache", "list", "--dir", cache.directory, "--json").json["plans"]
    entry = CachedPlan(**found)
    assert (entry.key, entry.size, entry.made_of) == (key_of(KEY), 3 << 20, KEY)
    assert abs(entry.used - time.time()) < 60
    shown = run("cache", "list", "--dir", cache.directory)
    assert shown.code == 0 and all(word in shown.out for word in ("tensorrt", "11.4.0.1", "sm89"))
    assert run("cache", "clear", "--dir", cache.directory).out == f"1 plans, 3 MiB, removed from {cache.directory}\n"
    assert {name for name in files_in(cache.directory) if not name.endswith(".lock")} == set()
    assert cache.get_or_build(KEY, lambda: b"again") == b"again"


def test_clearing_a_directory_of_someone_elses_files_removes_none(run, tmp_path):
    """As where --dir names a home directory by mistake."""
    home = tmp_path / "home"
    (home / "photographs").mkdir(parents=True, mode=0o700)
    for name in ("photographs/a.jpg", "notes.txt", "yarn.lock"):
        (home / name).write_text("mine")
    home.chmod(0o700)
    before = files_in(home)
    assert run("cache", "clear", "--dir", home).code == 0
    assert files_in(home) == before


def test_a_cache_of_others_is_refused_by_the_command_too(run, tmp_path):
    tmp_path.chmod(0o777)
    for command in ("list", "clear"):
        run("cache", command, "--dir", tmp_path).check_refusal(ConfigError, "can be written to by others", "chmod go-w")
