"""Reading bundles needs nothing that Windows lacks: no fcntl, no forks, no opening relative to a folder."""

import subprocess
import sys

import pytest

from runtimes import Bundle, IntegrityError, bundle

# Libraries that have versions of their own for Windows are imported before anything is taken away.
PROGRAM = """
import os, sys
import multiprocessing.pool, secrets, shutil, subprocess, tempfile, numpy, onnxruntime, PIL.Image
for name in ("fcntl", "pwd", "grp", "resource"):
    sys.modules[name] = None
for name in ("O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "register_at_fork", "sched_getaffinity"):
    delattr(os, name)
os.supports_dir_fd = set()
from runtimes import open_vae
with open_vae(sys.argv[1]) as vae:
    latents = vae.images_to_latents(sys.argv[2])
    print(latents.shape, vae.latents_to_images(latents).shape)
"""


def test_a_bundle_is_opened_and_run_without_what_windows_lacks(tiny_bundle, tmp_path):
    from PIL import Image

    Image.new("RGB", (16, 24)).save(tmp_path / "image.png")
    command = [sys.executable, "-P", "-c", PROGRAM, str(tiny_bundle), str(tmp_path / "image.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(1, 4, 3, 2) (1, 24, 16, 3)", done.stderr


def test_links_are_refused_there_too(bundle_copy, tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "_POSIX", False)
    path = bundle_copy()
    assert Bundle(path).read("config.json")
    (path / "config.json").rename(tmp_path / "outside.json")
    (path / "config.json").symlink_to(tmp_path / "outside.json")
    with pytest.raises(IntegrityError, match=r"config.json is a symbolic link"):
        Bundle(path).read("config.json")
    (path / "config.json").unlink()
    with pytest.raises(IntegrityError, match="is missing"):
        Bundle(path).read("config.json")
