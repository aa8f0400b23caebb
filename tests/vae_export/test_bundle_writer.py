"""Writing a bundle: whole or not at all, whatever happens meanwhile."""

import errno
import hashlib
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

import vae_export.bundle
from runtimes import Bundle, BundleError, VaeConfig
from runtimes.bundle import GraphSpec, Manifest, TensorSpec
from vae_export.bundle import write_bundle

MEGABYTE = 1 << 20


def fill(writer, data):
    """Put `data` and a manifest that lists it into a bundle in the making."""
    folder = writer.directory / "graphs"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(data)
    image, latents, moments = (TensorSpec("x", "float32", ("batch", c, "height", "width")) for c in (3, 4, 8))
    encoder, decoder = GraphSpec("graphs/model.onnx", image, moments), GraphSpec("graphs/model.onnx", latents, image)
    graphs = {"encoder": encoder, "decoder": decoder}
    writer.write_manifest(Manifest("0", "onnx", "fp32", VaeConfig(), writer.entries(), graphs))


def make(out, data=b"new", overwrite=False):
    with write_bundle(out, overwrite=overwrite) as writer:
        fill(writer, data)
        return writer.finish()


def content(out):
    bundle = Bundle(out)
    bundle.verify()
    return bundle.read("graphs/model.onnx")


def tree(directory):
    """All that is in a directory, to compare before and after."""
    paths = sorted(directory.rglob("*"))
    return {
        str(p.relative_to(directory)): os.readlink(p) if p.is_symlink() else p.is_dir() or p.read_bytes() for p in paths
    }


def start(code, *arguments):
    """Another process, with this module's functions at hand, that has reached the point where it says ready."""
    setup = "import sys, time; sys.path.insert(0, sys.argv[1]); from test_bundle_writer import *; out = sys.argv[2]\n"
    command = [sys.executable, "-c", setup + code, str(Path(__file__).parent), *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    return process


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte; remount(options) changes it."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options):
        return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], capture_output=True).returncode

    try:
        failed = mount("size=1m")
    except FileNotFoundError:
        failed = True
    if failed:
        pytest.skip("mounting a small file system is not permitted here")
    yield disk, mount
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_manifest_lists_every_file_with_its_size_and_hash(tiny_bundle):
    found = {p.relative_to(tiny_bundle).as_posix(): p.read_bytes() for p in tiny_bundle.rglob("*") if p.is_file()}
    assert found.keys() == {
        "manifest.json", "config.json",
        "vae_encoder/model.onnx", "vae_encoder/config.json", "vae_decoder/model.onnx", "vae_decoder/config.json",
    }  # fmt: skip
    del found["manifest.json"]
    listed = {name: (entry.size, entry.sha256) for name, entry in Bundle(tiny_bundle).manifest.files.items()}
    assert listed == {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in found.items()}
    assert stat.S_IMODE(tiny_bundle.stat().st_mode) == 0o755  # not the 0o700 of temporary directories


@pytest.mark.parametrize("name", ["new", "new/with/parents", "brackets [1] *", "with.dots.", "-o"])
def test_bundle_appears_and_nothing_else(tmp_path, name):
    assert make(tmp_path / name).path == tmp_path / name
    assert content(tmp_path / name) == b"new"
    assert os.listdir((tmp_path / name).parent) == [Path(name).name]


@pytest.mark.parametrize("overwrite", [False, True])
def test_empty_directory_is_free(tmp_path, overwrite):
    (tmp_path / "b").mkdir()
    make(tmp_path / "b", overwrite=overwrite)
    assert content(tmp_path / "b") == b"new"


def bundle_in_place(out):
    make(out, b"old")


def foreign_directory(out):
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")


def foreign_manifest(out):
    out.mkdir()
    (out / "manifest.json").write_text('{"name": "an app for the browser", "version": "1"}')


def file_in_place(out):
    out.write_text("a file")


def link_to_a_bundle(out):
    make(out.parent / "elsewhere", b"old")
    out.symlink_to("elsewhere")


def link_to_nothing(out):
    out.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("existing", "overwrite", "message"),
    [
        (bundle_in_place, False, "give --overwrite to replace it"),
        (foreign_directory, True, "not a bundle; it stays as it is"),
        (foreign_manifest, True, "not a bundle; it stays as it is"),
        (file_in_place, True, "not a directory"),
        (link_to_a_bundle, True, "not a directory"),
        (link_to_nothing, True, "not a directory"),
    ],
)
def test_what_may_not_be_replaced_is_refused_and_unharmed(tmp_path, existing, overwrite, message):
    existing(tmp_path / "b")
    before = tree(tmp_path)
    with pytest.raises(BundleError, match=message):
        make(tmp_path / "b", overwrite=overwrite)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("appearing", [bundle_in_place, foreign_directory, file_in_place])
def test_what_appeared_meanwhile_is_not_replaced(tmp_path, appearing):
    with pytest.raises(BundleError, match="exists"), write_bundle(tmp_path / "b") as writer:
        fill(writer, b"new")
        appearing(tmp_path / "b")
        before = tree(tmp_path / "b")
        writer.finish()
    assert tree(tmp_path / "b") == before
    assert os.listdir(tmp_path) == ["b"]


@pytest.mark.parametrize("name", ["file/b", "x" * 250])
def test_place_that_cannot_be_written_is_named(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match=r"cannot write to .* choose another place with --out"):
        make(tmp_path / name)
    assert os.listdir(tmp_path) == ["file"]


def test_read_only_place_is_named(small_disk):
    disk, mount = small_disk
    assert mount("remount,ro") == 0
    with pytest.raises(BundleError, match=f"cannot write to {disk}: Read-only file system"):
        make(disk / "b")


def test_full_disk_leaves_nothing(small_disk):
    disk, _ = small_disk
    make(disk / "b", b"old")
    with pytest.raises(BundleError, match=r"No space left on device; nothing was left behind"):
        make(disk / "b", b"\1" * 2 * MEGABYTE, overwrite=True)
    assert os.listdir(disk) == ["b"]
    assert content(disk / "b") == b"old"


def test_exhausted_quota_leaves_nothing(tmp_path):
    make(tmp_path / "b", b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MEGABYTE, hard))
    try:
        with pytest.raises(BundleError, match=os.strerror(errno.EFBIG)):
            make(tmp_path / "b", b"\1" * 2 * MEGABYTE, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["b"]
    assert content(tmp_path / "b") == b"old"


@pytest.mark.parametrize("step", ["_flush", "_exchange"])
def test_error_in_the_last_steps_leaves_the_old_bundle(tmp_path, monkeypatch, step):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    make(tmp_path / "b", b"old")
    monkeypatch.setattr(vae_export.bundle, step, fail)
    with pytest.raises(BundleError, match="Input/output error; nothing was left behind"):
        make(tmp_path / "b", overwrite=True)
    assert os.listdir(tmp_path) == ["b"]
    assert content(tmp_path / "b") == b"old"


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_interruption_leaves_nothing(tmp_path, interruption):
    with pytest.raises(interruption), write_bundle(tmp_path / "not" / "there" / "b") as writer:
        fill(writer, b"new")
        raise interruption
    assert os.listdir(tmp_path) == []


def test_other_errors_inside_are_not_taken_for_errors_of_the_bundle(tmp_path):
    with pytest.raises(FileNotFoundError), write_bundle(tmp_path / "b"):
        Path("/no/such/photograph").read_bytes()
    assert os.listdir(tmp_path) == []


def test_readers_never_see_a_broken_bundle_while_it_is_replaced(tmp_path):
    """Whoever opens the manifest gets all of the old one or all of the new one.

    Its other files may already be those of the next bundle; then their hashes differ, and reading them says so.
    """
    make(tmp_path / "b", b"0")
    replace = "print('ready', flush=True)\nfor i in range(50): make(out, b'%d' % i, overwrite=True)"
    process = start(replace, tmp_path / "b")
    seen = set()
    while process.poll() is None:
        seen.add(Manifest.from_json((tmp_path / "b" / "manifest.json").read_bytes()).files["graphs/model.onnx"])
    process.communicate()
    assert process.returncode == 0
    assert len(seen) > 1  # or nothing was tested
    assert content(tmp_path / "b") == b"49"
    assert os.listdir(tmp_path) == ["b"]


@pytest.mark.parametrize("name", ["b", "b [1]*"])
def test_killed_writer_is_cleaned_up_after_and_a_living_one_is_not(tmp_path, name):
    out = tmp_path / name
    hang = "with write_bundle(out) as w: fill(w, b'partial'); print('ready', flush=True); time.sleep(60)"
    process = start(hang, out)
    try:
        make(out, b"1")
        (partial,) = set(os.listdir(tmp_path)) - {name}
        assert (tmp_path / partial / "manifest.json").is_file()
    finally:
        process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert set(os.listdir(tmp_path)) == {name, partial}
    make(tmp_path / "other")
    assert set(os.listdir(tmp_path)) == {name, partial, "other"}
    make(out, b"2", overwrite=True)
    assert set(os.listdir(tmp_path)) == {name, "other"}
    assert content(out) == b"2"


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


def test_replacing_without_exchange_in_one_step(tmp_path, monkeypatch):
    """Where the system has no renameat2: two renames, and the first is undone if the second fails."""
    monkeypatch.setattr(vae_export.bundle.ctypes, "CDLL", lambda _: object())
    make(tmp_path / "b", b"old")
    make(tmp_path / "b", b"new", overwrite=True)
    assert content(tmp_path / "b") == b"new"
    rename = os.rename

    def fail_for_the_new_one(source, target):
        if ".partial-" in source.name and target == tmp_path / "b":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_for_the_new_one)
    with pytest.raises(BundleError, match="Input/output error"):
        make(tmp_path / "b", b"newer", overwrite=True)
    assert content(tmp_path / "b") == b"new"
    assert os.listdir(tmp_path) == ["b"]
