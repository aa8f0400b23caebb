"""Packages for a machine without a network: left out, cut, joined, checked and installed. No network is used."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools import offline_wheels
from tools.offline_wheels import Failed, Index, applying, cut, main, pack, parse_size, resolve

PYTHON = ".".join(map(str, sys.version_info[:2]))
SIZE = 1000  #: bytes of a part


def make_wheel(folder, name, version, requires=(), content="", tag="py3-none-any"):
    module, info = name.replace("-", "_"), f"{name.replace('-', '_')}-{version}.dist-info"
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", *(f"Requires-Dist: {r}" for r in requires)]
    files = {
        f"{module}.py": f"__version__ = {version!r}\n{content}",
        f"{info}/METADATA": "\n".join(metadata) + "\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    record = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{module}-{version}-{tag}.whl", "w") as wheel:
        for file, text in {**files, f"{info}/RECORD": record}.items():
            wheel.writestr(file, text)


@pytest.fixture(scope="module")
def links(tmp_path_factory):
    """A folder of wheels: what is asked for, what it needs, and what is there already or for other systems."""
    folder = tmp_path_factory.mktemp("links")
    needs = [
        "toy-base>=2",
        "toy-there",
        'toy-extra; extra == "cuda"',
        'toy-never; extra == "rocm"',
        'toy-windows; sys_platform == "win32"',
        'toy-old; python_version < "3.0"',
    ]
    make_wheel(folder, "toy-top", "1.0", needs, content="#" * 3000)
    make_wheel(folder, "toy-base", "2.1")
    make_wheel(folder, "toy-base", "1.9")
    make_wheel(folder, "toy-extra", "3.0", ["toy-there>=99"], tag="py3-none-manylinux_2_34_x86_64")
    return folder


@pytest.fixture(scope="module")
def index(links):
    return Index(PYTHON, ("--no-index", "--find-links", str(links)))


@pytest.fixture(scope="module")
def resolved(index):
    return resolve(["toy-top[cuda]"], frozenset({"toy-there"}), index)


@pytest.fixture(scope="module")
def packed_once(index, resolved, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(offline_wheels.MODULES, "toy", "toy_top")
        found, assumed = resolved
        return pack("toy", found, assumed, index, tmp_path_factory.mktemp("packed"), SIZE)


@pytest.fixture
def packed(packed_once, tmp_path):
    """A copy of the folder that travels, to tamper with."""
    return Path(shutil.copytree(packed_once, tmp_path / "out" / "toy"))


def install(folder, into, parts=None):
    command = [sys.executable, str(folder / "install.py"), "--into", str(into)]
    command += ["--parts", str(parts)] if parts else []
    return subprocess.run(command, capture_output=True, text=True)


def test_only_what_is_not_there_is_downloaded(index, resolved):
    found, assumed = resolved
    assert [str(each) for each in found] == ["toy-top==1.0", "toy-base==2.1", "toy-extra==3.0"]
    assert assumed == ["toy-there", "toy-there>=99"]
    assert [str(each) for each in resolve(["toy-base<2"], frozenset(), index)[0]] == ["toy-base==1.9"]


def test_what_no_index_has_is_named(index):
    with pytest.raises(Failed, match="toy-absent"):
        resolve(["toy-absent"], frozenset(), index)
    with pytest.raises(Failed, match=r"toy-base>=2 is needed, and toy-base==1.9"):
        resolve(["toy-base<2", "toy-top"], frozenset({"toy-there"}), index)


def test_requirements_apply_as_on_the_other_machine():
    texts = ['a; python_version >= "3.12"', 'b; platform_machine == "aarch64"', 'c; extra == "x"', "d>1"]
    assert [str(need) for need in applying(texts, ["x"], "3.12")] == ["a", "c", "d>1"]
    assert [str(need) for need in applying(texts, [], "3.11")] == ["d>1"]


def test_parts_are_no_larger_than_asked_and_hold_every_byte(tmp_path):
    wheels = []
    for name, size in (("a", 2500), ("b", 1), ("c", 499)):
        wheels.append(tmp_path / name)
        wheels[-1].write_bytes(name.encode() * size)
    (tmp_path / "parts").mkdir()
    parts = cut(wheels, tmp_path / "parts", SIZE)
    assert [part["size"] for part in parts] == [1000, 1000, 1000]
    joined = b"".join((tmp_path / "parts" / part["name"]).read_bytes() for part in parts)
    assert joined == b"a" * 2500 + b"b" + b"c" * 499


def test_what_was_cut_is_joined_and_installed_apart(packed, tmp_path):
    manifest = json.loads((packed / "manifest.json").read_text())
    assert len(manifest["parts"]) > 2 and all(part["size"] <= SIZE for part in manifest["parts"])
    done = install(packed, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    assert f"toy_top 1.0 is found in {tmp_path / 'site'}" in done.stdout
    assert "warning: toy-there was taken to be here, and is not" in done.stdout
    program = "import toy_top, toy_base, toy_extra; print(toy_base.__version__)"
    command = ["sh", "-c", f'. "{tmp_path}/site/env.sh" && "{sys.executable}" -c "{program}"']
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "2.1\n"
    assert "exists: name another folder" in install(packed, tmp_path / "site").stderr


def test_parts_may_come_one_by_one_and_those_that_lack_are_named(packed, tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    shutil.copy(packed / "manifest.json", there)
    parts = sorted(packed.glob("part-*"))
    for part in parts[1:]:
        shutil.copy(part, there)
    lacking = install(packed, tmp_path / "site", there)
    assert lacking.returncode and f"lacks part-001 of {len(parts)} parts" in lacking.stderr
    assert not (tmp_path / "site").exists()
    shutil.copy(parts[0], there)
    assert install(packed, tmp_path / "site", there).returncode == 0


@pytest.mark.parametrize("damage", ["a bit", "an end"])
def test_a_part_that_was_damaged_is_named_and_nothing_is_installed(packed, tmp_path, damage):
    part = packed / "part-002"
    data = bytearray(part.read_bytes())
    if damage == "a bit":
        data[500] ^= 1
    part.write_bytes(data if damage == "a bit" else data[:-1])
    done = install(packed, tmp_path / "site")
    assert done.returncode and "part-002 is not what was cut" in done.stderr and not (tmp_path / "site").exists()


def test_packages_of_another_python_are_refused(packed, tmp_path):
    path = packed / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "python": "3.99"}))
    done = install(packed, tmp_path / "site")
    assert done.returncode and f"for Python 3.99, and this is {PYTHON}" in done.stderr


def test_what_cannot_be_imported_in_the_end_is_an_error(packed, tmp_path):
    path = packed / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "module": "toy_absent"}))
    done = install(packed, tmp_path / "site")
    assert done.returncode and "toy_absent cannot be imported" in done.stderr


def test_a_second_download_replaces_the_first_and_a_failed_one_leaves_it(packed, index, monkeypatch):
    before = sorted(path.name for path in packed.iterdir())
    found, assumed = resolve(["toy-base"], frozenset(), index)
    monkeypatch.setattr(Index, "download", lambda *_: (_ for _ in ()).throw(Failed("the network is gone")))
    with pytest.raises(Failed, match="the network is gone"):
        pack("toy", found, assumed, index, packed.parent, SIZE)
    assert sorted(path.name for path in packed.iterdir()) == before
    assert [path.name for path in packed.parent.iterdir()] == ["toy"]
    monkeypatch.undo()
    monkeypatch.setitem(offline_wheels.MODULES, "toy", "toy_base")
    pack("toy", found, assumed, index, packed.parent, 10 * SIZE)
    assert sorted(path.name for path in packed.iterdir()) == ["install.py", "manifest.json", "part-001"]


def test_the_command_line(links, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(offline_wheels.WANTED, "ort", ("toy-base",))
    monkeypatch.setitem(offline_wheels.MODULES, "ort", "toy_base")
    options = ["--find-links", str(links), "--python", PYTHON, "--out", str(tmp_path / "out")]
    assert main(["dataset", *options, "--dry-run"]) == 0 and not (tmp_path / "out").exists()
    assert f"ort, Python {PYTHON}: toy-base==2.1" in capsys.readouterr().out
    assert main(["ort", *options, "--parts", "1KiB"]) == 0 and (tmp_path / "out" / "ort" / "part-001").exists()
    assert main(["jax", *options]) == 0 and "jax needs nothing beyond" in capsys.readouterr().out
    assert main(["trt", *options]) == 1 and "TensorRT's libraries are fetched from elsewhere" in capsys.readouterr().err
    monkeypatch.setitem(offline_wheels.WANTED, "ort", ("toy-absent",))
    assert main(["ort", *options]) == 1 and "toy-absent" in capsys.readouterr().err


def test_sizes_are_read_as_they_are_written():
    assert [parse_size(text) for text in ("60MiB", "1 KiB", "7", "2GiB")] == [60 << 20, 1024, 7, 2 << 30]
    for text in ("60MB", "0", "-1MiB", "MiB"):
        with pytest.raises(Exception, match="is no size such as 60MiB"):
            parse_size(text)


def test_what_is_there_is_a_list_of_names_as_pip_writes_them(tmp_path):
    frozen = tmp_path / "frozen"
    frozen.write_text(
        "# of a machine\nTorch==2.11.0+cu130\nnvidia_cudnn_cu13 == 9.15\n-e git+https://x#egg=y\nonnx @ file:///x\n"
    )
    assert offline_wheels.names_in(frozen) == {"torch", "nvidia-cudnn-cu13", "onnx"}
    there = offline_wheels.names_in(offline_wheels.THERE)
    assert {"torch", "jax", "nvidia-cudnn-cu13"} <= there and "onnxruntime-gpu" not in there


def test_the_installer_needs_nothing_but_python():
    source = Path(offline_wheels.INSTALLER).read_text()
    imported = {line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert imported <= sys.stdlib_module_names
