"""Whose `runtimes` it is: one in the user's directory hides ours, and the error says which."""

import os
import subprocess
import sys

import pytest


def imported(pytestconfig, cwd, program="import vae_export, runtimes; print(runtimes.open_vae.__name__)"):
    environment = {**os.environ, "PYTHONPATH": str(pytestconfig.rootpath)}
    environment.pop("PYTHONSAFEPATH", None)
    command = [sys.executable, "-c", program]  # with -c the working directory comes first
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", ["runtimes/__init__.py", "runtimes.py"])
@pytest.mark.parametrize("before", ["", "import runtimes; "])
def test_another_runtimes_is_named(pytestconfig, tmp_path, name, before):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("")
    done = imported(pytestconfig, tmp_path, f"{before}import vae_export")
    where = file.parent if name.endswith("__init__.py") else file
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: vae_export needs its own package 'runtimes'")
    assert f"another first: {where}. Rename that" in last


def test_a_folder_of_that_name_without_code_hides_nothing(pytestconfig, tmp_path):
    (tmp_path / "runtimes").mkdir()
    done = imported(pytestconfig, tmp_path)
    assert (done.stdout, done.returncode) == ("open_vae\n", 0), done.stderr


def test_ours_is_found_through_a_link(pytestconfig, tmp_path):
    (tmp_path / "here").symlink_to(pytestconfig.rootpath)
    done = imported(pytestconfig, tmp_path / "here")
    assert (done.stdout, done.returncode) == ("open_vae\n", 0), done.stderr
