"""What stages open and compare with, made where it is needed: checkpoints, ONNX graphs, bundles, references.

Files are kept in a folder that is named after the sources they are made by, so that the next stage finds them. They are
made in a process of their own, which alone needs PyTorch and is idle while something is timed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.cuda_provider import FORMS
from benchmarks.models import WIDTHS, config_of, random_model
from benchmarks.peers import GRAPHS, Array, Case, count_flops, random_input, reason
from runtimes.config import VaeConfig
from runtimes.manifest import GraphSpec, TensorSpec

if TYPE_CHECKING:
    from vae_export.families.autoencoder_kl import AutoencoderKL

ROOT = Path(__file__).parents[2]
SMALL_WIDTHS = (32, 32, 32, 32)  #: of rehearsals: 32 groups, and as many levels as the real ones
#: all that decides on what is in the files
SOURCES = ("vae_export", "runtimes", "benchmarks/models.py", "benchmarks/cuda_provider.py", "benchmarks/gpu/made.py")
EMBEDDED = "embedded"  #: the model that comes with the package


class NotMade(Exception):
    """The file could not be made; the message says why."""


class Made:
    """The files. A stage that needs PyTorch anyway makes them itself (`here=True`), others ask a process."""

    def __init__(self, folder: Path, small: bool, here: bool = False) -> None:
        self.folder = folder / f"{'small' if small else 'real'}-{sources_digest()}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.small, self.here = small, here
        self._maker: subprocess.Popen[str] | None = None

    def config(self, model: str) -> VaeConfig:
        return config_of(model, SMALL_WIDTHS if self.small else WIDTHS)

    def input(self, model: str, case: Case) -> Array:
        return random_input(self.config(model), case)

    def reference(self, model: str, case: Case) -> Array:
        """What the model makes of the first image, in PyTorch in fp32 without TF32."""
        found: Array = np.load(self._file("reference", model=model, graph=case.graph, size=case.size))
        return found

    def embedded_reference(self, case: Case) -> Array:
        """What the embedded model makes of `random_input` of its own config."""
        found: Array = np.load(self._file("reference", model=EMBEDDED, graph=case.graph, size=case.size))
        return found

    def flop(self, model: str, case: Case) -> int:
        """Of the model as it is written, two for a multiplication and addition."""
        path = self._file("flop", model=model, graph=case.graph, size=case.size)
        return case.batch * int(json.loads(path.read_bytes()))

    def onnx(self, model: str, graph: str, precision: str, form: str) -> tuple[Path, GraphSpec]:
        """A graph in one of `cuda_provider.FORMS`, inputs and outputs in fp32."""
        path = self._file("onnx", model=model, graph=graph, precision=precision, form=form)
        spec = json.loads((path / "spec.json").read_bytes())
        sides = {side: TensorSpec(**spec[side] | {"shape": tuple(spec[side]["shape"])}) for side in ("input", "output")}
        return path / "model.onnx", GraphSpec(file=spec["file"], **sides)

    def checkpoint(self, model: str) -> Path:
        return self._file("checkpoint", model=model)

    def bundle(self, model: str, target: str, precision: str) -> Path:
        return self._file("bundle", model=model, target=target, precision=precision)

    def _file(self, kind: str, **what: Any) -> Path:
        path = self.folder / "-".join([kind, *map(str, what.values())]).replace(" ", "_")
        if kind == "reference":
            path = path.with_suffix(".npy")
        if not path.exists():
            failed = made(kind, path, self.small, what) if self.here else self._ask(kind, path, what)
            if failed:
                raise NotMade(f"{path.name} could not be made: {failed}")
        return path

    def _ask(self, kind: str, path: Path, what: dict[str, Any]) -> str | None:
        """Have the process make a file -> why that failed."""
        if self._maker is None or self._maker.poll() is not None:
            self._maker = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu.made"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
        assert self._maker.stdin is not None and self._maker.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._maker.stdin.write(json.dumps([kind, str(path), self.small, what]) + "\n")
            self._maker.stdin.flush()
        answer = self._maker.stdout.readline()
        failed: str | None = json.loads(answer)["failed"] if answer else f"its process ended with {self._maker.wait()}"
        return failed

    def close(self) -> None:
        if self._maker is not None:
            assert self._maker.stdin is not None and self._maker.stdout is not None
            self._maker.stdin.close()
            self._maker.wait()
            self._maker.stdout.close()


def sources_digest() -> str:
    """Of SOURCES: a machine that measures need not have the project's history."""
    digest = hashlib.sha256()
    for place in SOURCES:
        for path in sorted((ROOT / place).rglob("*.py") if (ROOT / place).is_dir() else [ROOT / place]):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


# In the process that makes them ---------------------------------------------------------------------------------------


def made(kind: str, path: Path, small: bool, what: dict[str, Any]) -> str | None:
    """Make a file -> why that failed, whatever a library raised."""
    try:
        make(kind, path, small, what)
    except Exception as error:
        return reason(error)
    return None


def make(kind: str, path: Path, small: bool, what: dict[str, Any]) -> None:
    """Whole or not at all."""
    partial = path.with_name(f"partial-{os.getpid()}-{path.name}")
    try:
        MAKERS[kind](
            model_of(what["model"], small), partial, **{name: v for name, v in what.items() if name != "model"}
        )
        os.rename(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def make_reference(model: AutoencoderKL, path: Path, graph: str, size: int) -> None:
    x = random_input(model.config, Case(graph, size, 1))
    np.save(path, compute_reference(model, graph, x))


def compute_reference(model: AutoencoderKL, graph: str, x: Array) -> Array:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    moved = model.to(device)
    try:
        with torch.no_grad(), without_tf32():
            function = moved.encode_moments if graph == "encode" else moved.decode_latents
            result: Array = function(torch.from_numpy(x).to(device)).cpu().numpy()
            return result
    finally:
        model.to("cpu")
        if device == "cuda":
            torch.cuda.empty_cache()  # a stage beside this process is to have the memory


@contextlib.contextmanager
def without_tf32(allowed: bool = False) -> Iterator[None]:
    """Products and convolutions of fp32 in fp32; or with `allowed` both in TF32."""
    import torch

    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def make_flop(model: AutoencoderKL, path: Path, graph: str, size: int) -> None:
    shape = random_input(model.config, Case(graph, size, 1)).shape
    path.write_text(json.dumps(count_flops(model, graph, shape)))


def make_onnx(model: AutoencoderKL, path: Path, graph: str, precision: str, form: str) -> None:
    from vae_export.rewrites.form import Form
    from vae_export.targets.onnx_graphs import export_onnx

    spec = export_onnx(model, GRAPHS[graph], path / "model.onnx", precision=precision, form=Form(**FORMS[form]))
    (path / "spec.json").write_text(json.dumps(asdict(spec)))


def make_checkpoint(model: AutoencoderKL, path: Path) -> None:
    model.save_pretrained(path)


def make_bundle(model: AutoencoderKL, path: Path, target: str, precision: str) -> None:
    from vae_export.export import export_bundle

    # Random weights overflow nothing; to find that out would take longer than the export.
    rescale = model.source.kind == "embedded"
    export_bundle(model, path, target=target, precision=precision, rescale=rescale, run_validation=False)


MAKERS: dict[str, Callable[..., None]] = {
    "reference": make_reference,
    "flop": make_flop,
    "onnx": make_onnx,
    "checkpoint": make_checkpoint,
    "bundle": make_bundle,
}
_models: dict[str, AutoencoderKL] = {}


def model_of(name: str, small: bool) -> AutoencoderKL:
    if name not in _models:
        if name == EMBEDDED:
            from vae_export import AutoencoderKL, load_model

            model = load_model()
            assert isinstance(model, AutoencoderKL)
            _models[name] = model
        else:
            _models[name] = random_model(config_of(name, SMALL_WIDTHS if small else WIDTHS))
    return _models[name]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # exporters print
    for line in sys.stdin:
        kind, path, small, what = json.loads(line)
        print(json.dumps({"failed": made(kind, Path(path), small, what)}), file=answers, flush=True)


if __name__ == "__main__":
    main()
