"""Join, check and install what tools.offline_wheels has cut up. It travels with the parts, and needs Python alone.

python3 install.py --into FOLDER        # then: . FOLDER/env.sh
"""

import argparse
import hashlib
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

BLOCK = 1 << 20


def join(manifest, folder, out):
    """Write the wheels of the parts in `folder` to `out`, and return their paths; SystemExit says what is wrong."""
    parts = manifest["parts"]
    missing = [part["name"] for part in parts if not (folder / part["name"]).exists()]
    if missing:
        raise SystemExit(f"error: {folder} lacks {', '.join(missing)} of {len(parts)} parts: bring them")
    for part in parts:
        if digest(folder / part["name"]) != part["sha256"]:
            raise SystemExit(f"error: {folder / part['name']} is not what was cut (its sha256 differs): bring it again")
    stream = Stream([folder / part["name"] for part in parts])
    wheels = []
    for wheel in manifest["wheels"]:
        path = out / wheel["name"]
        with path.open("wb") as file:
            left = wheel["size"]
            while left:
                block = stream.read(min(left, BLOCK))
                file.write(block)
                left -= len(block)
        if digest(path) != wheel["sha256"]:
            raise SystemExit(f"error: {wheel['name']} is not what was downloaded (its sha256 differs)")
        wheels.append(path)
    return wheels


class Stream:
    """Files, read one behind the other."""

    def __init__(self, paths):
        self.paths, self.file = list(paths), None

    def read(self, size):
        while True:
            if self.file is None:
                if not self.paths:
                    raise SystemExit("error: the parts are shorter than what the manifest says")
                self.file = self.paths.pop(0).open("rb")
            block = self.file.read(size)
            if block:
                return block
            self.file.close()
            self.file = None


def digest(path):
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            found.update(block)
    return found.hexdigest()


def library_folders():
    """Where NVIDIA's packages keep their libraries here: what is installed apart from them does not look there."""
    found = []
    for place in sys.path:
        found += sorted(str(path) for path in Path(place or ".").glob("nvidia/*/lib") if path.is_dir())
    return list(dict.fromkeys(found))


def write_environment(folder):
    lines = [f'export PYTHONPATH="{folder}${{PYTHONPATH:+:$PYTHONPATH}}"']
    libraries = library_folders()
    if libraries:
        lines.append(f'export LD_LIBRARY_PATH="{os.pathsep.join(libraries)}${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}"')
    (folder / "env.sh").write_text("\n".join(lines) + "\n")


def unmet(requirements):
    """Lines about what was taken to be here and is not, or is of another version."""
    try:
        requirements_of = importlib.import_module("packaging.requirements")
    except ImportError:
        requirements_of = importlib.import_module("pip._vendor.packaging.requirements")
    for text in requirements:
        requirement = requirements_of.Requirement(text)
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield f"{text} was taken to be here, and is not"
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            yield f"{text} is asked for, and {version} is here"


def check_import(module, folder):
    """Import it as a stage will, from `folder` and nowhere else."""
    program = f"import {module}; print({module}.__version__, {module}.__file__)"
    command = ["sh", "-c", '. "$0" && exec "$1" -c "$2"', str(folder / "env.sh"), sys.executable, program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    words = done.stdout.split()
    if done.returncode or not words[-1].startswith(str(folder)):
        said = (done.stdout + done.stderr).strip().splitlines()[-1:]
        raise SystemExit(f"error: {module} cannot be imported from {folder}: {' '.join(said)}")
    print(f"{module} {words[0]} is found in {folder}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--into", type=Path, required=True, help="folder to install into; it must not exist")
    parser.add_argument("--parts", type=Path, default=Path(__file__).absolute().parent, help="folder of the parts")
    arguments = parser.parse_args()
    manifest = json.loads((arguments.parts / "manifest.json").read_text())
    here = ".".join(map(str, sys.version_info[:2]))
    if here != manifest["python"]:
        raise SystemExit(f"error: these packages are for Python {manifest['python']}, and this is {here}")
    folder = arguments.into.absolute()
    if folder.exists():
        raise SystemExit(f"error: {folder} exists: name another folder, or remove it")
    with tempfile.TemporaryDirectory() as scratch:
        wheels = join(manifest, arguments.parts, Path(scratch))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        command += ["--disable-pip-version-check", "--target", str(folder), *map(str, wheels)]
        if subprocess.run(command).returncode:
            raise SystemExit("error: pip could not install them")
    write_environment(folder)
    for line in unmet(manifest["assumed"]):
        print(f"warning: {line}")
    print(f"installed {', '.join(wheel['name'] for wheel in manifest['wheels'])}")
    check_import(manifest["module"], folder)
    print(f"now: . {folder / 'env.sh'}")


if __name__ == "__main__":
    main()
