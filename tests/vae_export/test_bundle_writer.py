"""Writing a bundle: whole or not at all, whatever happens meanwhile.

Tests vae_export/bundle.py.
"""

import ctypes
import fcntl
import hashlib
import os
import resource
import signal
import stat
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

import pytest

import vae_export.bundle
from runtimes import Bundle, BundleError
from tests.helpers.written_bundles import content, fill, make, start
from vae_export.bundle import check_output, write_bundle

MEGABYTE = 1 << 20


def test_manifest_lists_every_file_with_its_size_and_hash(tiny_bundle):
    found = {p.relative_to(tiny_bundle).as_posix(): p.read_bytes() for p in tiny_bundle.rglob("*") if p.is_file()}
    places = ("config.json", *(f"vae_{g}/{f}" for g in ("encoder", "decoder") for f in ("config.json", "model.onnx")))
    assert found.keys() == {"manifest.json", *places}
    listed = {name: (entry.size, entry.sha256) for name, entry in Bundle(tiny_bundle).manifest.files.items()}
    assert listed == {name: (len(found[name]), hashlib.sha256(found[name]).hexdigest()) for name in places}


@pytest.mark.parametrize("name", ["new", "new/with/parents", "empty", "brackets [1] *", "-o"])
def test_bundle_appears_and_nothing_else(tmp_path, name):
    (tmp_path / name).mkdir() if name == "empty" else None
    assert make(tmp_path / name).path == tmp_path / name
    assert content(tmp_path / name) == b"new"
    assert os.listdir((tmp_path / name).parent) == [Path(name).name]
    assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o755  # not the 0o700 of temporary directories


IN_PLACE = {
    "a bundle": (lambda b: make(b, b"old"), False, "give --overwrite to replace it"),
    "a folder": (lambda b: (b / "thesis").mkdir(parents=True), True, "not a bundle; it stays as it is"),
    "an app": (lambda b: b.mkdir() or (b / "manifest.json").write_text('{"name": 1}'), True, "not a bundle"),
    "a file": (lambda b: b.touch(), True, "not a directory"),
    "a link": (lambda b: b.symlink_to(make(b.parent / "linked").path), True, "not a directory"),
    "a broken link": (lambda b: b.symlink_to("nowhere"), True, "not a directory"),
}


@pytest.mark.parametrize("meanwhile", [False, True], ids=["before", "meanwhile"])
@pytest.mark.parametrize(("put", "overwrite", "message"), IN_PLACE.values(), ids=IN_PLACE)
def test_what_is_in_place_is_refused_and_unharmed(tmp_path, put, overwrite, message, meanwhile):
    def snapshot():
        return {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*") if ".partial-" not in str(p)}

    if not meanwhile:
        put(tmp_path / "b")
        before = snapshot()
        with pytest.raises(BundleError, match=message):
            check_output(tmp_path / "b", overwrite)
    with pytest.raises(BundleError, match=message), write_bundle(tmp_path / "b", overwrite=overwrite) as writer:
        fill(writer, b"new")
        put(tmp_path / "b")
        before = snapshot()
        writer.finish()
    assert snapshot() == before
    assert not list(tmp_path.glob(".b*"))


@pytest.mark.parametrize("name", ["file/b", "file/new/b", "x" * 250])
def test_place_that_cannot_be_written_is_named(tmp_path, name):
    (tmp_path / "file").touch()
    for refuse in (make, lambda out: check_output(out, False)) if "/" in name else (make,):
        with pytest.raises(BundleError, match=r"cannot write to .*; choose another place with --out"):
            refuse(tmp_path / name)
    assert os.listdir(tmp_path) == ["file"]


def test_full_and_read_only_disks_keep_the_old_bundle(tmp_path):
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(tmp_path), "-o"]
    if subprocess.run([*mount, "size=1m"], capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        make(tmp_path / "b", b"old")
        with pytest.raises(BundleError, match="No space left on device; nothing was left behind"):
            make(tmp_path / "b", bytes(2 * MEGABYTE), overwrite=True)
        subprocess.run([*mount, "remount,ro"], check=True)
        for refuse in (make, check_output):
            with pytest.raises(BundleError, match=f"cannot write to {tmp_path}"):
                refuse(tmp_path / "b", overwrite=True)
        assert os.listdir(tmp_path) == ["b"]
        assert content(tmp_path / "b") == b"old"
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


@pytest.mark.parametrize("step", ["flush", "_exchange", "too large"])
def test_error_while_writing_keeps_the_old_bundle(tmp_path, monkeypatch, step):
    def fail(*_):
        raise OSError(5, "Input/output error")

    make(tmp_path / "b", b"old")
    monkeypatch.setattr(vae_export.bundle, step, fail, raising=False)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MEGABYTE, limits[1]))
    try:
        with pytest.raises(BundleError, match=r"(Input/output error|File too large); nothing was left behind"):
            make(tmp_path / "b", bytes(2 * MEGABYTE if step == "too large" else 1), overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["b"]
    assert content(tmp_path / "b") == b"old"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, FileNotFoundError(2, "no photograph", "/photo.jpg")])
def test_interruption_leaves_nothing_and_is_passed_on(tmp_path, error):
    with (
        pytest.raises(error if isinstance(error, type) else type(error)),
        write_bundle(tmp_path / "new" / "b") as writer,
    ):
        fill(writer, b"new")
        raise error
    assert os.listdir(tmp_path) == []


def test_whoever_opens_a_manifest_while_bundles_are_replaced_gets_a_whole_one(tmp_path):
    """The files may then already be those of the next bundle: their hashes differ, and reading them says so."""
    make(tmp_path / "b", b"0")
    replace = "print('ready', flush=True)\nfor i in range(50): make(out, b'%d' % i, overwrite=True)"
    seen = set()
    with start(replace, tmp_path / "b") as process:
        while process.poll() is None:
            seen.add(Bundle(tmp_path / "b").manifest.files["graphs/model.onnx"])
    assert process.returncode == 0
    assert len(seen) > 1  # or nothing was tested
    assert content(tmp_path / "b") == b"49"
    assert os.listdir(tmp_path) == ["b"]


@pytest.mark.parametrize("name", ["b", "b [1]*"])
def test_killed_writer_is_cleaned_up_after_and_a_living_one_is_not(tmp_path, name):
    hang = "with write_bundle(out) as w: fill(w, b'partial'); print('ready', flush=True); time.sleep(60)"
    with start(hang, tmp_path / name) as process:
        make(tmp_path / name, b"1")
        (partial,) = set(os.listdir(tmp_path)) - {name}
        assert (tmp_path / partial / "manifest.json").is_file()
        process.kill()
    assert process.returncode == -signal.SIGKILL
    make(tmp_path / "other")
    assert set(os.listdir(tmp_path)) == {name, partial, "other"}
    make(tmp_path / name, b"2", overwrite=True)
    assert set(os.listdir(tmp_path)) == {name, "other"}
    assert content(tmp_path / name) == b"2"


ASIDE = ".b.previous-abcd1234"


@pytest.mark.parametrize("there", ["nothing", "an empty directory"])
def test_what_a_killed_writer_had_moved_aside_comes_back(tmp_path, there):
    """Where bundles cannot be exchanged in one step: see test_killed_exports."""
    make(tmp_path / ASIDE, b"old")
    if there == "an empty directory":
        (tmp_path / "b").mkdir()
    with pytest.raises(BundleError, match="exists; give --overwrite"):
        make(tmp_path / "b", b"new")
    assert content(tmp_path / "b") == b"old"
    assert os.listdir(tmp_path) == ["b"]


def test_what_only_looks_like_a_leftover_stays(tmp_path):
    make(tmp_path / "b", b"old")
    others = (".b.previous-2023", ".b.previous-abcd12345", ".b.partial-mine", ".b.previous-x.partial-abcd1234")
    for name in others:
        make(tmp_path / name, b"mine")
    (tmp_path / ASIDE).mkdir()
    (tmp_path / ASIDE / "notes").write_text("no bundle")
    make(tmp_path / "b", b"new", overwrite=True)
    assert {*os.listdir(tmp_path)} == {"b", ASIDE, *others}
    assert all(content(tmp_path / name) == b"mine" for name in others)


def test_what_a_living_writer_has_moved_aside_stays_its_own(tmp_path):
    make(tmp_path / ASIDE, b"old")
    lock = os.open(tmp_path / ASIDE, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    make(tmp_path / "b", b"another")
    assert content(tmp_path / ASIDE) == b"old"
    os.close(lock)


def test_many_writers_at_once_leave_one_whole_bundle(tmp_path):
    def work(number):
        for _ in range(10):
            with suppress(BundleError):
                make(tmp_path / "b", b"%d" % number, overwrite=number % 2 == 0)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert content(tmp_path / "b") in {b"%d" % number for number in range(6)}
    assert os.listdir(tmp_path) == ["b"]


def test_without_exchange_in_one_step_a_failure_is_undone(tmp_path, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())  # a system without renameat2
    make(tmp_path / "b", b"old")
    make(tmp_path / "b", b"new", overwrite=True)
    rename = os.rename

    def fail_for_the_newest(source, target):
        if ".partial-" in source.name and target == tmp_path / "b":
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_for_the_newest)
    with pytest.raises(BundleError, match="Input/output error"):
        make(tmp_path / "b", b"newest", overwrite=True)
    assert content(tmp_path / "b") == b"new"
    assert os.listdir(tmp_path) == ["b"]
