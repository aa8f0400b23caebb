"""The command line: run in this process or as one of its own, what it answers, and files to give it."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

import vae_export
from runtimes import errors
from runtimes.errors import VaeError
from vae_export.cli import main as cli

COMMAND = str(Path(sys.executable).with_name("vae-export"))
PHOTO = Path(vae_export.__file__).parent / "assets" / "photos" / "coffee.jpg"
#: VaeError and every class below it
ERRORS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, VaeError)]
#: headers of .npy files whose shape is wrong
WRONG = {"huge": "(1, 4, 10000000, 10000000)", "header": "(1, 4,"}


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self):
        assert self.code == 0, self.err
        return json.loads(self.out, parse_constant=pytest.fail)  # NaN and Infinity are not JSON

    def check_refusal(self, kind, *said):
        """The exit code of the class, and on standard error one readable line that holds all that is `said`.

        On standard output nothing, or the error as JSON.
        """
        line = self.err.splitlines()[-1]
        assert self.code == kind.exit_code, self.err
        assert not self.out or json.loads(self.out)["error"]["class"] == kind.__name__
        assert line.startswith(f"error ({kind.__name__}): ") and "Traceback" not in self.err
        assert not [part for part in said if part not in line], line


@pytest.fixture(name="run")
def run_fixture(monkeypatch, capsys, tmp_path):
    """run(arguments): the command in this process, as its console script calls it, in an empty directory."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["vae-export", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert isinstance(stop.value.code, int)
        return Result(stop.value.code, *capsys.readouterr())

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(name="files")
def files_fixture(tmp_path):
    """A directory of images and latents: `photo.png`, `z.npy`, and those with something wrong."""
    with Image.open(PHOTO) as image:
        small = image.resize((96, 64))
    for name, side in (("photo", (96, 64)), ("odd", (95, 63)), ("speck", (7, 7))):
        small.crop((0, 0, *side)).save(tmp_path / f"{name}.png")
    z = np.random.default_rng(0).standard_normal((2, 4, 3, 5), dtype=np.float32)
    arrays = {"z": z, "channels": z[:, :3], "flat": z[0], "integers": z.astype(int), "pickled": np.array([{}, None])}
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array, allow_pickle=True)
    np.savez(tmp_path / "several.npz", a=z, b=z)
    headers = {f"{n}.npy": f"{{'descr': '<f4', 'fortran_order': False, 'shape': {s}, }}" for n, s in WRONG.items()}
    garbage = {n: b"\x93NUMPY\x01\x00" + len(h).to_bytes(2, "little") + h.encode() for n, h in headers.items()}
    garbage |= {"noise.npy": os.urandom(999), "zip.npy": b"PK\x03\x04 is no zip", "empty.npy": b"", "empty.png": b""}
    for name, data in {**garbage, "cut.npy": (tmp_path / "z.npy").read_bytes()[:-1]}.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def heeding(number, *arguments):
    """The command as a process that a signal ends.

    A shell has its background jobs ignore Ctrl-C, and what they start too: the tests may be one of them.
    """
    heed = "import os, signal as s, sys; s.signal(int(sys.argv[1]), s.SIG_DFL); os.execv(sys.argv[2], sys.argv[2:])"
    return [sys.executable, "-c", heed, str(number), COMMAND, *map(str, arguments)]
