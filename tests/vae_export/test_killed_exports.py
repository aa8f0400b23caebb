"""Exports that are killed, stopped, or run out of disk: the old bundle stays whole, or the new one is there.

Whatever they leave behind, the next export of the same bundle removes.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from runtimes import Bundle, open_vae
from tests.helpers.command import heeding

KILLS, FILLS = 100, 30

# Every step of writing a bundle that another process could see, as moments before which this one is killed. Children
# are forks of a process with nothing but this loaded: a thousand of them take seconds.
EVERY_MOMENT = """
import fcntl, os, signal, sys
from pathlib import Path

import vae_export.bundle
from runtimes import BundleError
from tests.helpers.written_bundles import content, make

place, one_step = Path(sys.argv[1]), sys.argv[2] == "one step"
if not one_step:
    vae_export.bundle.ctypes.CDLL = lambda _: object()  # a system without renameat2
moments = []


def killed_before(function, moment):
    def wrapper(*arguments, **options):
        moments.append(function.__name__)
        if len(moments) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    return wrapper


def child(out, data, moment):
    for module, names in (
        (os, ("mkdir", "rename", "rmdir", "unlink", "fsync", "chmod")),
        (fcntl, ("flock",)),
        (Path, ("write_bytes", "write_text")),
        (vae_export.bundle, ("_exchange",)),
    ):
        for name in names:
            setattr(module, name, killed_before(getattr(module, name), moment))
    make(out, data, overwrite=True)
    os._exit(100 + min(len(moments), 100))


def run(out, data, moment):
    pid = os.fork()
    if pid == 0:
        try:
            child(out, data, moment)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


make(place / "b", b"0")
whole = run(place / "b", b"0", -1) - 100
assert 15 < whole < 100, whole
seen = set()
for moment in range(1, whole + 30):  # beyond that of a quiet run: cleaning up after the one before has moments, too
    code = run(place / "b", b"%d" % moment, moment)
    assert code == -signal.SIGKILL or code >= 100, code
    if not one_step and not (place / "b").exists():
        try:  # any export begins by restoring what was there, also one that then refuses
            make(place / "b", b"another")
        except BundleError:
            pass
    found = content(place / "b")
    assert found in (b"%d" % moment, b"%d" % (moment - 1)), (moment, found)
    seen.add((code > 0, found == b"%d" % moment))
    make(place / "b", b"%d" % moment, overwrite=True)
    assert os.listdir(place) == ["b"], (moment, os.listdir(place))
assert {(False, False), (False, True), (True, True)} <= seen, seen
print("moments", whole)
"""


@pytest.mark.parametrize("way", ["one step", "three steps"])
def test_killed_before_any_step_of_writing_there_is_a_whole_bundle(tmp_path, alone, way):
    (said,) = alone(EVERY_MOMENT, tmp_path / "out", way)
    assert int(said.split()[1]) > 15


def export(out, number=signal.SIGTERM):
    """The command, overwriting, as a process that signals end."""
    command = heeding(number, "--to", "onnx", "--out", out, "--overwrite")
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """(a bundle that the command made, the seconds that took)."""
    out = tmp_path_factory.mktemp("killed") / "bundle"
    start = time.monotonic()
    with export(out) as process:
        assert process.wait(300) == 0
    return out, time.monotonic() - start


def age(out):
    return Bundle(out).path.stat().st_ino


def assert_whole(out):
    Bundle(out).verify()
    with open_vae(out, threads=1) as vae:
        assert np.isfinite(vae.decode(np.zeros((1, vae.config.latent_channels, 2, 2), np.float32))[0]).all()


@pytest.mark.slow
def test_exports_killed_at_a_hundred_moments(first):
    out, seconds = first
    rng, outcomes = random.Random(0), {"old": 0, "new": 0}
    for turn in range(KILLS):
        before, there, number = age(out), set(os.listdir(out.parent)), (signal.SIGKILL, signal.SIGTERM)[turn % 2]
        with export(out) as process:
            time.sleep(rng.uniform(0, 1.1 * seconds))
            process.send_signal(number)
            process.wait(60)
        assert process.returncode in (0, -number, 143)
        assert_whole(out)
        outcomes["old" if age(out) == before else "new"] += 1
        if process.returncode == 143:
            assert set(os.listdir(out.parent)) <= there, "what is asked to end leaves nothing"
    assert min(outcomes.values()) >= 3, f"nothing was tested: {outcomes}"
    with export(out) as process:
        assert process.wait(300) == 0
    assert os.listdir(out.parent) == ["bundle"]
    print(outcomes)


@pytest.mark.slow
def test_a_full_disk_loses_nothing(first, tmp_path):
    """Disks of every size from too small for anything to just too small, with the old bundle on them."""
    if os.geteuid() != 0 or sys.platform != "linux":
        pytest.skip("mounting a small disk takes root")
    size = sum(file.stat().st_size for file in first[0].rglob("*") if file.is_file())
    rng, codes = random.Random(0), set()
    disk = tmp_path / "disk"
    disk.mkdir()
    for turn in range(FILLS):
        room = int(size * (1.02 + (turn / (FILLS - 1)) ** 2)) + rng.randrange(4096)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "none", disk], check=True)
        try:
            shutil.copytree(first[0], disk / "b")
            before = age(disk / "b")
            with export(disk / "b") as process:
                said = process.communicate(timeout=300)[1]
            codes.add(process.returncode)
            if process.returncode:
                assert "Traceback" not in said and "No space left on device" in said, said
                assert age(disk / "b") == before
                assert os.listdir(disk) == ["b"], "nothing half-written takes room"
            assert_whole(disk / "b")
        finally:
            subprocess.run(["umount", "--lazy", disk], check=True)
    assert len(codes) > 1, "some were large enough"
