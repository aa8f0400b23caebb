"""Prove that a restructuring left every exported graph as it was.

    python -m tools.same_graphs make before      in the checkout from before
    python -m tools.same_graphs make after       in the checkout from after
    python -m tools.same_graphs compare before after

`make` exports four models to every target and precision, and in the forms that targets can be asked for: pixels, the
precision of inputs and outputs, seamless tiling, and each exact rewrite. It takes 12 minutes of processor time, on two
cores at once; `--only 'bare-*'` makes some of the bundles. `compare` finds each file of one directory equal to its
namesake in the other, and exits with 1 where one is not. A file is

    equal             byte by byte, or
    the same graph    ONNX alone: node by node, with the same names, attributes and weights; the bytes differ in no more
                      than doc strings, metadata, the producer, and the order of weights, or
    renamed           ONNX alone: node by node, where names of nodes and of inner values do not count; an error unless
                      `--allow-renamed` is given.

Of a manifest, what describes the graphs is compared: not the versions of tools, hashes and measurements. Plans of
TensorRT are left out, since a real builder times kernels; the typed ONNX beside them, of which they are built, is in.
That needs no GPU: the plans are built by the fake TensorRT of the tests.

Nothing of the package is used but `AutoencoderKL`, `export_bundle` and the command line, so that the same file runs in
checkouts of different structure: copy it into `tools/` of the one that has none. `_form_class` lists where `Form`,
which names the rewrites, has been.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from onnx import numpy_helper

import vae_export
from vae_export import AutoencoderKL, export_bundle

ROOT = Path(__file__).resolve().parent.parent
ENGINES = ("tensorrt", "tensorrt-rtx")
GRAPHS = ("encoder", "decoder")
PRECISIONS: Mapping[str, tuple[str, ...]] = {
    "onnx": ("fp32", "fp16", "bf16"),
    "openvino": ("fp32", "fp16", "bf16", "int8"),
    "flax": ("fp32", "bf16"),
    "tensorrt": ("fp32", "fp16", "bf16"),
    "tensorrt-rtx": ("fp32", "fp16", "bf16"),
}
IGNORED = (".plan",)  #: suffixes of files that are not compared
#: fields of a manifest that describe what was exported; others tell of hashes, machines, tools and measurements
DESCRIBED = ("schema_version", "target", "precision", "config", "graphs", "rewrites", "tileable")

#: models with random weights
MODELS: Mapping[str, Mapping[str, Any]] = {
    # Attention on the way down and up, so that the steps of seamless tiling begin behind it.
    "attention": {
        "block_out_channels": (8, 16, 24),
        "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "sample_size": 32,
        "scaling_factor": 0.5,
        "shift_factor": 0.1,
    },
    # No convolutions around the latents, no attention, another activation, other widths.
    "bare": {
        "block_out_channels": (16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 2,
        "act_fn": "mish",
        "norm_num_groups": 4,
        "latent_channels": 6,
        "sample_size": 32,
        "scaling_factor": 1.5,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
    },
    # Convolutions wide enough for Winograd's form.
    "wide": {
        "block_out_channels": (8, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "sample_size": 32,
        "scaling_factor": 0.5,
        "mid_block_add_attention": False,
    },
}


class Export(NamedTuple):
    """One bundle: a model, and arguments of `export_bundle`; `form` is the fields of a `Form`, for both graphs."""

    name: str
    model: str
    options: Mapping[str, Any]
    form: Mapping[str, Any] | None = None


# Making -----------------------------------------------------------------------------------------------------------


def exports() -> Iterator[Export]:
    """Everything that is exported through `export_bundle`.

    Every model goes to every target and precision. The smallest, `bare`, also takes every form there, the others those
    that depend on what they have: attention, many levels, wide convolutions.
    """
    for model in ("embedded", "attention", "bare"):
        for target, precisions in PRECISIONS.items():
            for precision in precisions:
                options: dict[str, Any] = {"target": target, "precision": precision}
                yield Export(f"{model}-{target}-{precision}", model, options)
                if model == "bare" and target != "flax" and precision != "int8":
                    yield Export(f"{model}-{target}-{precision}-uint8", model, {**options, "io": "uint8"})
                if model == "bare" and precision == "fp16":
                    yield Export(f"{model}-{target}-fp16-not-rescaled", model, {**options, "rescale": False})
                    if target != "openvino":
                        yield Export(f"{model}-{target}-fp16-io", model, {**options, "io_precision": "same"})
    for model, precision in (("bare", "fp32"), ("bare", "bf16"), ("attention", "fp16")):
        options = {"target": "onnx", "precision": precision, "tileable": True}
        yield Export(f"{model}-onnx-{precision}-tileable", model, options)
    yield Export("bare-onnx-tileable-deconv", "bare", {"target": "onnx", "tileable": True}, {"upsample": "deconv"})
    for model, name, form in (
        ("bare", "plain", {}),
        ("bare", "deconv", {"upsample": "deconv"}),
        ("bare", "conv", {"upsample": "conv"}),
        ("bare", "rows", {"norm": "rows"}),
        ("attention", "lean", {"last_block": "lean"}),
        ("attention", "blocks", {"attention_blocks": 4}),
        ("wide", "winograd", {"convolutions": "winograd", "last_block": "lean"}),
    ):
        for target in ("onnx", "openvino"):
            yield Export(f"{model}-{target}-form-{name}", model, {"target": target, "precision": "fp32"}, form)
    # Validated: how far a graph is from the model decides which layers stay out of int8.
    options = {"target": "openvino", "precision": "int8", "run_validation": True}
    yield Export("embedded-openvino-int8-validated", "embedded", options)


def commands() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(name, model, arguments) of what is exported by the command line."""
    yield "command-onnx", "embedded", ("--to", "onnx", "--tileable")
    yield "command-openvino", "attention", ("--to", "openvino", "--precision", "bf16", "--io", "uint8")
    yield "command-flax", "bare", ("--to", "flax")
    yield "command-tensorrt", "embedded", ("--to", "tensorrt", "--height", "64..512", "--width", "64..512")
    yield "command-tensorrt-rtx", "attention", ("--to", "tensorrt-rtx", "--precision", "bf16")


def make(directory: Path, only: str, part: str) -> None:
    """Export everything whose name matches `only` into `directory`, which must not exist yet."""
    if ROOT not in Path(vae_export.__file__).resolve().parents:
        raise SystemExit(f"vae_export is that of {vae_export.__file__}, and not that of {ROOT}: run in {ROOT}")
    if part == "all":
        directory.mkdir(parents=True)
        for name, fields in MODELS.items():
            _random_model(fields, name).save_pretrained(directory / "models" / name)
        # At once, a core each: tracing is done in one thread.
        command = (sys.executable, "-m", "tools.same_graphs", "make", str(directory), "--only", only, "--part")
        running = [
            subprocess.Popen((*command, name), cwd=ROOT, env=environment)
            for name, environment in (("engines", _fakes()), ("others", dict(os.environ)))
        ]
        if sum(process.wait() != 0 for process in running):  # all of them, also where the first fails
            raise SystemExit(f"not everything was exported: see above; {directory} is of no use")
        return
    torch.set_num_threads(1)
    form_class = _form_class()
    models = {name: AutoencoderKL.from_pretrained(directory / "models" / name) for name in MODELS}
    embedded = Path(vae_export.__file__).parent / "assets" / "tiny"
    models["embedded"] = AutoencoderKL.from_pretrained(embedded)
    for export in exports():
        if (export.options["target"] in ENGINES) != (part == "engines") or not fnmatch(export.name, only):
            continue
        begun = time.perf_counter()
        forms = None if export.form is None else dict.fromkeys(GRAPHS, form_class(**export.form))
        options: dict[str, Any] = {"run_validation": False, **export.options}
        export_bundle(models[export.model], directory / export.name, forms=forms, **options)
        print(f"{export.name} {time.perf_counter() - begun:.1f} s", flush=True)
    for name, model, arguments in commands():
        if (arguments[1] in ENGINES) == (part == "engines") and fnmatch(name, only):
            source = () if model == "embedded" else ("--model", str(directory / "models" / model))
            _run_command(*arguments, *source, "--no-validate", "--out", str(directory / name))
            print(name, flush=True)


def _random_model(fields: Mapping[str, Any], seed: str) -> AutoencoderKL:
    """A model whose weights depend on their names alone, not on the order in which modules are made."""
    model = AutoencoderKL(**fields)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.1 * noise + (1 if "norm" in name and name.endswith("weight") else 0))
    return model.eval().requires_grad_(False)


def _form_class() -> Any:
    """`Form`, wherever this checkout has it: newest place first."""
    for name in ("vae_export.rewrites.form", "vae_export.rewrites.form"):
        if importlib.util.find_spec(name.rpartition(".")[0]) and importlib.util.find_spec(name):
            return importlib.import_module(name).Form
    raise SystemExit("this checkout has no module with Form: add its name here")


def _fakes() -> dict[str, str]:
    """An environment in which TensorRT and a GPU are those of the tests."""
    (fake,) = (ROOT / "tests").rglob("fake_tensorrt.py")
    paths = (str(fake.parent), os.environ.get("PYTHONPATH", ""))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _run_command(*arguments: str) -> None:
    """Run the command line of this checkout, whichever is installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, function = project["scripts"]["vae-export"].split(":")
    program = f"import sys, {module}; sys.argv[0] = 'vae-export'; {module}.{function}()"
    subprocess.run((sys.executable, "-c", program, *arguments), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


# Comparing --------------------------------------------------------------------------------------------------------


def compare(before: Path, after: Path, only: str, allow_renamed: bool) -> int:
    """Compare two directories that `make` filled, print what differs and how many files do not; -> the exit code."""
    names = [{p.relative_to(d).as_posix() for p in d.rglob("*") if p.is_file()} for d in (before, after)]
    counts: dict[str, int] = {}
    failed = False
    for name in sorted(names[0] | names[1]):
        if name.endswith(IGNORED) or not fnmatch(name.partition("/")[0], only):
            continue
        if name not in names[0] or name not in names[1]:
            verdict, why = "missing", f"in {before if name not in names[0] else after}"
        else:
            verdict, why = _compared(before / name, after / name)
        counts[verdict] = counts.get(verdict, 0) + 1
        if verdict in ("differs", "missing") or (verdict == "renamed" and not allow_renamed):
            failed = True
            print(f"{verdict}: {name}: {why}")
        elif verdict != "equal":
            print(f"{verdict}: {name}")
    if not counts:
        raise SystemExit(f"{before} and {after} hold nothing to compare")
    print(", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())))
    return int(failed)


def _compared(before: Path, after: Path) -> tuple[str, str]:
    """The verdict on two files, and where they differ first."""
    contents = before.read_bytes(), after.read_bytes()
    if before.name == "manifest.json":
        described = [{key: json.loads(data).get(key) for key in DESCRIBED} for data in contents]
        fields = [key for key in DESCRIBED if described[0][key] != described[1][key]]
        return ("differs", f"the fields {', '.join(fields)}") if fields else ("equal", "")
    if contents[0] == contents[1]:
        return "equal", ""
    if before.suffix != ".onnx":
        at = next((i for i, (a, b) in enumerate(zip(*contents, strict=False)) if a != b), min(map(len, contents)))
        around = slice(max(at - 40, 0), at + 40)
        return "differs", f"at byte {at}: {contents[0][around]!r}, {contents[1][around]!r}"
    models = onnx.load_from_string(contents[0]), onnx.load_from_string(contents[1])
    difference = _first_difference(*(list(_canonical(model, renamed=False)) for model in models))
    if difference is None:
        return "the same graph", ""
    if _first_difference(*(list(_canonical(model, renamed=True)) for model in models)) is None:
        return "renamed", difference
    return "differs", difference


def _first_difference(before: list[Any], after: list[Any]) -> str | None:
    for a, b in zip(before, after, strict=False):
        if a != b:
            return f"{str(a)[:300]} became {str(b)[:300]}"
    return None if len(before) == len(after) else f"{len(before)} nodes became {len(after)}"


def _canonical(model: onnx.ModelProto, *, renamed: bool) -> Iterator[Any]:
    """Everything that a graph computes, in order; where `renamed`, inner values are numbered instead of named."""
    yield "opsets", sorted((opset.domain, opset.version) for opset in model.opset_import), model.ir_version
    weights = {tensor.name: _weight(tensor) for tensor in model.graph.initializer}
    numbers: dict[str, str] = {}

    def named(value: str) -> Any:
        if value in weights:
            return weights[value] if renamed else (value, weights[value])
        return numbers.setdefault(value, f"#{len(numbers)}") if renamed else value

    for values in (model.graph.input, model.graph.output):  # whose names are a promise
        for value in values:
            numbers[value.name] = value.name
            yield value.name, value.type.SerializeToString(deterministic=True)
    for node in model.graph.node:
        attributes = sorted((a.name, _attribute(a)) for a in node.attribute)
        inputs, outputs = [named(value) for value in node.input], [named(value) for value in node.output]
        yield node.domain, node.op_type, "" if renamed else node.name, inputs, outputs, attributes


def _weight(tensor: onnx.TensorProto) -> tuple[int, tuple[int, ...], str]:
    array = np.ascontiguousarray(numpy_helper.to_array(tensor))
    return tensor.data_type, tuple(tensor.dims), hashlib.sha256(array.tobytes()).hexdigest()


def _attribute(attribute: onnx.AttributeProto) -> Any:
    if attribute.type == onnx.AttributeProto.TENSOR:
        return str(_weight(attribute.t))
    if attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
        raise SystemExit("graphs within graphs are not compared")
    return str(onnx.helper.get_attribute_value(attribute))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    jobs = parser.add_subparsers(dest="job", required=True)
    job = jobs.add_parser("make", help="export every model, target, precision and form")
    job.add_argument("directory", type=lambda text: Path(text).resolve())
    job.add_argument("--part", choices=("all", "engines", "others"), default="all", help=argparse.SUPPRESS)
    job.add_argument("--only", default="*", help="bundles of these names, as 'bare-onnx-*'")
    job = jobs.add_parser("compare", help="find the files of two directories equal")
    job.add_argument("before", type=Path)
    job.add_argument("after", type=Path)
    job.add_argument("--only", default="*", help="bundles of these names, as 'bare-onnx-*'")
    job.add_argument("--allow-renamed", action="store_true", help="names of nodes and inner values may differ")
    arguments = parser.parse_args()
    if arguments.job == "make":
        make(arguments.directory, arguments.only, arguments.part)
    else:
        raise SystemExit(compare(arguments.before, arguments.after, arguments.only, arguments.allow_renamed))


if __name__ == "__main__":
    main()
