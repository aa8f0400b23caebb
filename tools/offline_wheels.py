"""Packages for a machine without a network: what a stage of benchmarks.gpu needs there, downloaded here and cut up.

    python -m tools.offline_wheels ort --python 3.12 --parts 60MiB --out out/wheels
    python -m tools.offline_wheels rtx --dry-run                 # what would be downloaded

OUT/STAGE then holds parts of at most that size, `install.py` and `manifest.json`. Bring them all into one folder there,
in as many goes as it takes, and run `python3 install.py --into FOLDER`: it joins the parts, checks every hash, installs
into a folder of its own, and says which file to read (`. FOLDER/env.sh`) before the stage is run.

What that machine has is left out. tools/offline_there.txt names what was seen on one with PyTorch for CUDA 13;
`--there FILE`, the output of `pip freeze` on the machine, says it exactly.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
INSTALLER = Path(__file__).with_name("offline_install.py")
MANIFEST = "manifest.json"

#: stage -> what it needs beyond PyTorch, JAX and the packages of the project
WANTED: dict[str, tuple[str, ...]] = {
    "ort": ("onnxruntime-gpu[cuda,cudnn]",),
    "rtx": ("tensorrt-rtx-cu13", "cuda-bindings>=12.8", "platformdirs"),
}
MODULES = {"ort": "onnxruntime", "rtx": "tensorrt_rtx"}  #: that which must then be found there
#: published as sources alone, of pure Python: their wheels are built here
FROM_SOURCES = frozenset({"tensorrt-rtx-cu13"})
#: stages that ask for nothing more than others do, and one whose libraries no index holds
SAME_AS = {"tests": "ort", "dataset": "ort"}
NOTHING = ("torch", "jax")
NOT_TO_BE_HAD = {
    "trt": "TensorRT's libraries are fetched from elsewhere by what the index holds; use them where they are"
}
THERE = Path(__file__).with_name("offline_there.txt")  #: what was seen on a machine with PyTorch for CUDA 13
GLIBC = 39  #: 2.39, of Ubuntu 24.04
OLDEST_GLIBC = 5


class Failed(Exception):
    """What could not be done; the message is for the user."""


@dataclass(frozen=True)
class Found:
    """A package that pip would download."""

    name: str
    version: str
    needs: tuple[str, ...]  #: requirements, as its metadata has them

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


@dataclass(frozen=True)
class Index:
    """pip, asked for wheels of the other machine's Python and system."""

    python: str
    options: tuple[str, ...] = ()  #: such as --no-index --find-links FOLDER

    def _target(self, name: str) -> list[str]:
        common = ["--no-deps", "--disable-pip-version-check", *self.options]
        if name in FROM_SOURCES:
            return common
        versions = range(GLIBC, OLDEST_GLIBC - 1, -1)  # pip takes a tag as it stands, and not those of older systems
        platforms = [f"manylinux_2_{minor}_x86_64" for minor in versions]
        platforms += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
        tags = [text for platform in platforms for text in ("--platform", platform)]
        return [*common, *tags, "--only-binary=:all:", "--implementation", "cp", "--python-version", self.python]

    def find(self, requirement: Requirement) -> Found:
        """The newest that fits, by its metadata."""
        name = canonicalize_name(requirement.name)
        with tempfile.TemporaryDirectory() as nowhere:
            said = self._pip(
                "install", "--dry-run", "--quiet", "--ignore-installed", "--report", "-", "--target", nowhere,
                *self._target(name), f"{requirement.name}{requirement.specifier}",
            )  # fmt: skip
        (installed,) = json.loads(said)["install"]
        metadata = installed["metadata"]
        return Found(name, metadata["version"], tuple(metadata.get("requires_dist", ())))

    def download(self, found: Iterable[Found], folder: Path) -> None:
        for each in found:
            how = ("wheel", "--wheel-dir") if each.name in FROM_SOURCES else ("download", "--dest")
            self._pip(how[0], "--quiet", how[1], str(folder), *self._target(each.name), str(each))

    @staticmethod
    def _pip(*arguments: str) -> str:
        done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            raise Failed(f"pip {arguments[0]} {arguments[-1]}: {' '.join(lines) or done.stderr.strip()}")
        return done.stdout


def resolve(wanted: Sequence[str], there: frozenset[str], index: Index) -> tuple[list[Found], list[str]]:
    """What to download, and the requirements that are left to what is there."""
    pins = constraints()
    waiting = [Requirement(text) for text in wanted]
    found: dict[str, Found] = {}
    assumed: dict[str, None] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        requirement = waiting.pop(0)
        name = canonicalize_name(requirement.name)
        if name in there:
            assumed[str(requirement)] = None
            continue
        if name not in found:
            if not requirement.specifier:
                requirement.specifier = SpecifierSet(pins.get(name, ""))
            found[name] = index.find(requirement)
        elif not requirement.specifier.contains(found[name].version, prereleases=True):
            raise Failed(f"{requirement} is needed, and {found[name]} is needed as well: pip finds no such pair here")
        key = name, frozenset(requirement.extras)
        if key in seen:
            continue
        seen.add(key)
        waiting += applying(found[name].needs, requirement.extras, index.python)
    return list(found.values()), list(assumed)


def applying(needs: Iterable[str], extras: Iterable[str], python: str) -> Iterator[Requirement]:
    """Those that apply to Linux on x86-64, the Python version and the extras."""
    machine = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    for text in needs:
        need = Requirement(text)
        marker = need.marker
        if marker is None or any(marker.evaluate({**machine, "extra": extra}) for extra in ("", *extras)):
            need.marker = None
            yield need


def constraints() -> dict[str, str]:
    """{name: "==version"} of constraints.txt, so that what is measured there is what is tested here."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.partition("==") for line in lines if "==" in line and not line.startswith("#"))
    return {canonicalize_name(name): f"=={version.strip()}" for name, _, version in pairs}


def cut(wheels: Sequence[Path], folder: Path, size: int) -> list[dict[str, Any]]:
    """Write the wheels, one behind the other, as parts of at most `size` bytes -> what the manifest says of each."""
    parts: list[dict[str, Any]] = []
    pending = bytearray()

    def write(data: bytes) -> None:
        name = f"part-{len(parts) + 1:03d}"
        (folder / name).write_bytes(data)
        parts.append({"name": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()})

    for wheel in wheels:
        with wheel.open("rb") as file:
            while block := file.read(size - len(pending)):
                pending += block
                if len(pending) == size:
                    write(bytes(pending))
                    pending.clear()
    if pending:
        write(bytes(pending))
    return parts


def pack(stage: str, found: Sequence[Found], assumed: Sequence[str], index: Index, out: Path, size: int) -> Path:
    """Download, cut, and write everything that is to travel into OUT/STAGE, whole or not at all."""
    folder, partial = out / stage, out / f".{stage}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with tempfile.TemporaryDirectory(dir=out) as scratch:
            index.download(found, Path(scratch))
            wheels = sorted(Path(scratch).glob("*.whl"))
            entries = [
                {"name": wheel.name, "size": wheel.stat().st_size, "sha256": digest_of(wheel)} for wheel in wheels
            ]
            manifest = {
                "stage": stage,
                "python": index.python,
                "module": MODULES[stage],
                "packages": [asdict(each) for each in found],
                "assumed": list(assumed),
                "wheels": entries,
                "parts": cut(wheels, partial, size),
            }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        shutil.copyfile(INSTALLER, partial / "install.py")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# The command line -----------------------------------------------------------------------------------------------------


def parse_size(text: str) -> int:
    """ "60MiB" -> bytes."""
    match = re.fullmatch(r"(\d+)\s*(B|KiB|MiB|GiB)?", text)
    if match is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 60MiB")
    return int(match[1]) << {"B": 0, None: 0, "KiB": 10, "MiB": 20, "GiB": 30}[match[2]]


def names_in(path: Path) -> frozenset[str]:
    """Of the packages in the output of `pip freeze` or `pip list`."""
    lines = (re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", line) for line in path.read_text(encoding="utf-8").splitlines())
    return frozenset(canonicalize_name(match[0]) for match in lines if match)


def main(arguments: Sequence[str] | None = None) -> int:
    stages = (*WANTED, *SAME_AS, *NOTHING, *NOT_TO_BE_HAD)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=stages)
    parser.add_argument("--python", default="3.12", help="of the other machine; 3.12")
    parser.add_argument("--parts", type=parse_size, default=60 << 20, metavar="SIZE", help="largest part; 60MiB")
    parser.add_argument("--out", type=Path, default=Path("out/wheels"))
    parser.add_argument("--there", type=Path, default=THERE, metavar="FILE", help="`pip freeze` of the other machine")
    parser.add_argument("--dry-run", action="store_true", help="say what would be downloaded")
    parser.add_argument("--find-links", metavar="FOLDER", help="take wheels from there, and from nowhere else")
    chosen = parser.parse_args(arguments)
    stage = SAME_AS.get(chosen.stage, chosen.stage)
    if stage in NOTHING:
        print(f"{stage} needs nothing beyond what such a machine has")
        return 0
    try:
        if stage in NOT_TO_BE_HAD:
            raise Failed(f"{stage}: {NOT_TO_BE_HAD[stage]}")
        options = ("--no-index", "--find-links", chosen.find_links) if chosen.find_links else ()
        index = Index(chosen.python, options)
        found, assumed = resolve(WANTED[stage], names_in(chosen.there), index)
        print(f"{stage}, Python {chosen.python}: {', '.join(map(str, found))}")
        print(f"left to what is there: {', '.join(assumed) or 'nothing'}")
        if not chosen.dry_run:
            chosen.out.mkdir(parents=True, exist_ok=True)
            folder = pack(stage, found, assumed, index, chosen.out, chosen.parts)
            parts = sorted(folder.glob("part-*"))
            total = sum(part.stat().st_size for part in parts)
            print(f"{folder}: {total / 2**20:.0f} MiB in {len(parts)} parts, {MANIFEST}, install.py")
    except (Failed, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
