"""Processes that are started run no file of the working directory, whatever its name.

The working directory holds modules with the names of ours and of the standard library's; each writes down that it was
run. The program itself starts with `-P`, as installed commands do.
"""

import importlib.util
import os
import subprocess
import sys

import pytest

from runtimes import children
from tests.helpers.dataset_samples import make_folder
from tests.helpers.nvidia_fakes import FAKES

NAMES = (
    *("runtimes", "vae_export", "numpy", "PIL", "torch", "ray", "tensorrt", "onnxruntime", "tests", "atheris"),
    *("json", "pickle", "multiprocessing", "subprocess", "random", "socket", "encodings", "sitecustomize", "hashlib"),
)


@pytest.fixture
def hostile(tmp_path):
    """The working directory; `ran` beside it lists the modules that were run."""
    here, ran = tmp_path / "here", tmp_path / "ran"
    tell = f"open({str(ran)!r}, 'a').write(__name__ + '\\n')\nraise ImportError('run from the working directory')\n"
    for name in NAMES:
        (here / name).mkdir(parents=True)
        (here / name / "__init__.py").write_text(tell)
    return here


def run(hostile, pytestconfig, program, *arguments, paths=(), timeout=120):
    """What the program prints; nothing of the working directory was run."""
    program_file = hostile.parent / "program.py"
    program_file.write_text(program)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, [pytestconfig.rootpath, *paths]))
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    command = [sys.executable, "-P", program_file, *map(str, arguments)]
    done = subprocess.run(command, cwd=hostile, env=environment, capture_output=True, text=True, timeout=timeout)
    ran = hostile.parent / "ran"
    assert not ran.exists(), f"run from the working directory: {sorted(set(ran.read_text().split()))}"
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_module_in_the_working_directory_would_be_imported_without_protection(hostile, pytestconfig):
    """What the tests below would see."""
    program = "import subprocess, sys; subprocess.run([sys.executable, '-m', 'runtimes.tensorrt.builder'])"
    with pytest.raises(AssertionError, match="run from the working directory"):
        run(hostile, pytestconfig, program)


BUILD = """
import os, sys
os.environ["PYTHONPATH"] += os.pathsep  # an empty entry is the working directory
from runtimes.tensorrt import builder as tensorrt_builder
from runtimes.tensorrt.builder import BuildJob, build_plan
with open(sys.argv[1], "rb") as file:
    plan = build_plan(file.read(), BuildJob("tensorrt", "sample", (((1, 3, 8, 8),) * 3,)), "encoder")
print(len(plan) > 0)
"""


def test_the_builder_of_tensorrt(hostile, pytestconfig, onnx_bundle):
    assert run(hostile, pytestconfig, BUILD, onnx_bundle / "vae_encoder/model.onnx", paths=[FAKES]) == ["True"]


ENCODE = """
import sys
from tests.helpers.dataset_samples import encode
if __name__ == "__main__":
    options = {"ray": "local", "ray_workers": 1} if sys.argv[4] == "ray" else {"workers": 1}
    print(encode(*sys.argv[1:4], **options).encoded)
"""


@pytest.mark.parametrize("workers", ["processes", "ray"])
def test_the_workers_of_a_dataset(hostile, pytestconfig, onnx_bundle, tmp_path, workers):
    for package in ("pyarrow", *(["ray"] if workers == "ray" else [])):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"pip install {package}")
    arguments = make_folder(tmp_path / "images", 4), onnx_bundle, tmp_path / "out", workers
    assert run(hostile, pytestconfig, ENCODE, *arguments) == ["4"]


def test_the_fuzzer(hostile, pytestconfig):
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("pip install atheris")
    script = pytestconfig.rootpath / "tests" / "fuzz" / "run.py"
    program = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    (line,) = run(hostile, pytestconfig, program, "--seconds", "1", "manifest")
    assert "Done" in line


def test_relative_entries_of_the_path_are_kept_and_the_working_directory_is_not(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", ".", "./", "mine", "/other", ""]))
    entries = children.environment()["PYTHONPATH"].split(os.pathsep)
    assert entries[1:] == [str(tmp_path / "mine"), "/other"]


@pytest.mark.parametrize("before", [None, "1"])
def test_the_environment_of_the_program_is_left_as_it_was(monkeypatch, before):
    if before is None:
        monkeypatch.delenv(children.SAFE_PATH, raising=False)
    else:
        monkeypatch.setenv(children.SAFE_PATH, before)
    with children.safe_path():
        assert os.environ[children.SAFE_PATH] == "1"
    assert os.environ.get(children.SAFE_PATH) == before
