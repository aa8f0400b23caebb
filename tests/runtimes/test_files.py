"""Writing one file: whole or not at all; through links; into pipes and devices; refused elsewhere."""

import errno
import os
import re
import socket
import threading

import numpy as np
import pytest
from PIL import Image

from runtimes.errors import BundleError
from runtimes.files import STDOUT, check_writable, is_stream, leftovers, written_whole
from runtimes.images import picture_format, save_image

PIXELS = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)


def write(path, data=b"new"):
    with written_whole(path) as temporary:
        temporary.write_bytes(data)


@pytest.mark.parametrize("before", [None, b"old"])
def test_file_is_written_whole_or_not_at_all(tmp_path, before):
    path = tmp_path / "a"
    if before is not None:
        path.write_bytes(before)
    with pytest.raises(ZeroDivisionError), written_whole(path) as temporary:
        temporary.write_bytes(b"half")
        assert leftovers(tmp_path, "a") == leftovers(tmp_path) == [temporary]
        _ = 1 / 0
    assert os.listdir(tmp_path) == ([] if before is None else ["a"])
    write(path)
    assert (path.read_bytes(), os.listdir(tmp_path)) == (b"new", ["a"])


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    with written_whole(tmp_path / "a") as first, written_whole(tmp_path / "a") as second:
        first.write_bytes(b"1")
        second.write_bytes(b"2")
    assert (tmp_path / "a").read_bytes() == b"1", "the last to end"


@pytest.mark.parametrize("there", [True, False])
def test_symbolic_link_stays_and_its_file_is_replaced(tmp_path, there):
    (tmp_path / "folder").mkdir()
    target = tmp_path / "folder" / "real"
    if there:
        target.write_bytes(b"old")
    (tmp_path / "middle").symlink_to("folder/real")
    (tmp_path / "link").symlink_to(tmp_path / "middle")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "middle").is_symlink()
    assert (target.read_bytes(), target.is_symlink()) == (b"new", False)
    assert sorted(os.listdir(tmp_path)) == ["folder", "link", "middle"]


@pytest.mark.parametrize("name", ["pipe", "link"])
def test_fifo_gets_the_bytes_and_stays(tmp_path, name):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    write(tmp_path / name, b"x" * 100_000)
    reader.join()
    assert read == [b"x" * 100_000]
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


@pytest.mark.parametrize("form", ["/dev/fd/{}", "/proc/self/fd/{}", "/proc/{pid}/fd/{}", "link"])
def test_open_file_is_written_where_it_stands(tmp_path, form):
    """Not from its first byte on, as opening /dev/fd/N anew would."""
    with (tmp_path / "a").open("wb", buffering=0) as file:
        file.write(b"before ")
        name = form.format(file.fileno(), pid=os.getpid())
        if form == "link":
            (tmp_path / "link").symlink_to(f"/dev/fd/{file.fileno()}")
            name = tmp_path / "link"
        assert is_stream(name)
        write(name)
        file.write(b" after")
    assert (tmp_path / "a").read_bytes() == b"before new after"


def test_socket_that_is_open_takes_the_bytes_and_one_with_a_name_is_refused(tmp_path):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        write(f"/dev/fd/{ours.fileno()}")
        assert theirs.recv(10) == b"new"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        with pytest.raises(BundleError, match=r"s: it is a socket; give the name of a file"):
            write(tmp_path / "s")


def test_device_stays_a_device(tmp_path):
    (tmp_path / "link").symlink_to("/dev/null")
    for path in ("/dev/null", tmp_path / "link"):
        write(path)
    assert (tmp_path / "link").is_symlink() and is_stream("/dev/null")
    with pytest.raises(BundleError, match=r"cannot write /dev/full: No space left on device"):
        write("/dev/full")


def test_what_cannot_be_written_is_refused_before_the_work_by_the_name_that_was_given(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "to-folder").symlink_to("folder")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    says = {
        "folder": "it is a directory; give the name of a file",
        "to-folder": "it is a directory",
        "loop": "Too many levels of symbolic links",
        "file/x": "Not a directory",
        "none/x": "No such file or directory: " + str(tmp_path / "none"),
        "x" * 300: "File name too long",
        "nul\0": "null byte",
    }
    for name, reason in says.items():
        for refuse in (check_writable, write):
            with pytest.raises(BundleError, match=re.escape(f"cannot write {tmp_path / name}: ") + ".*" + reason):
                refuse(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "loop", "to-folder"]


def test_full_disk_says_so_without_naming_the_temporary_file(tmp_path):
    with (
        pytest.raises(BundleError) as error,
        written_whole(tmp_path / "a", advice="run it again") as temporary,
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(temporary))
    assert str(error.value) == f"cannot write {tmp_path / 'a'}: No space left on device; make room and run it again"


@pytest.mark.parametrize("name", ["noext", "x.doc", "x.npy", ".png", "x.", "x.partial"])
def test_name_that_is_none_of_a_picture_is_refused_with_those_that_are(tmp_path, name):
    with pytest.raises(BundleError) as error:
        save_image(PIXELS, tmp_path / name)
    assert str(error.value).startswith(f"cannot write {tmp_path / name}: ") and ".png, .jpg, .webp" in str(error.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["a.png", "a.PNG", "a.jpg", "a.jpeg", "a.webp", "a.tiff", "a.bmp", "a.b.png"])
def test_extension_is_the_format(tmp_path, name):
    save_image(PIXELS, tmp_path / name)
    with Image.open(tmp_path / name) as image:
        assert (image.format, image.size) == (picture_format(name), (16, 16))


def test_picture_goes_into_a_pipe_as_png(tmp_path):
    assert picture_format(STDOUT) == picture_format("/dev/null") == "PNG"
    reading, writing = os.pipe()
    save_image(PIXELS, f"/dev/fd/{writing}")
    os.close(writing)
    with os.fdopen(reading, "rb") as file, Image.open(file) as image:
        assert np.array_equal(np.asarray(image), PIXELS)


def test_picture_that_its_format_has_no_room_for_is_refused(tmp_path):
    with pytest.raises(BundleError, match=r"cannot write .*a\.webp"):
        save_image(np.zeros((1, 20000, 3), np.uint8), tmp_path / "a.webp")
    assert os.listdir(tmp_path) == []
