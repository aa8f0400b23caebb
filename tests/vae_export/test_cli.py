"""The command line: what it prints and where, its exit codes, and what it leaves when it is interrupted.

Tests runtimes/errors.py, vae_export/__main__.py, vae_export/cli/app.py, vae_export/cli/images.py,
vae_export/cli/main.py, vae_export/cli/printing.py.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

import vae_export
from runtimes import Bundle, errors
from runtimes.errors import (
    BackendUnavailable,
    BundleError,
    CompatibilityError,
    ConfigError,
    IntegrityError,
    NumericsError,
    OutOfMemoryError,
    ShapeError,
)
from runtimes.images import psnr
from tests.helpers.command import COMMAND, ERRORS, PHOTO, Result, heeding
from tools.blow_up import blown_up, gains
from vae_export.cli import images as cli_images
from vae_export.cli import main as cli

# The main job -----------------------------------------------------------------------------------------------------


def test_the_package_runs_as_the_command():
    done = subprocess.run([sys.executable, "-m", "vae_export", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert vae_export.__version__ in done.stdout


def test_embedded_model_is_exported_verified_and_validated_again(run, tmp_path):
    """What someone types first, in an empty directory, and as a process of its own."""
    done = subprocess.run([COMMAND, "--to", "onnx", "--json"], capture_output=True, text=True)
    assert done.stderr == ""
    assert os.listdir() == ["vae-onnx-fp32"]
    bundle = Bundle("vae-onnx-fp32")
    bundle.verify()
    printed = Result(done.returncode, done.stdout, done.stderr).json
    assert printed["manifest"] == json.loads(bundle.manifest.to_json())
    assert Path(printed["bundle"]) == tmp_path / "work" / "vae-onnx-fp32"
    assert bundle.manifest.source["kind"] == "embedded"
    assert bundle.manifest.validation["verdict"] == "passed"
    again, recorded = run("validate", "vae-onnx-fp32", "--json").json["measurements"], printed["manifest"]["validation"]
    assert len(again) == len(recorded["measurements"]) > 0
    for ours, theirs in zip(again, recorded["measurements"], strict=True):
        # To rounding: this process has another number of threads, and sums in another order.
        assert ours["psnr_db"] == pytest.approx(theirs["psnr_db"], abs=6)
        exact = ("graph", "by", "input", "shape", "finite", "passed")
        assert [ours[name] for name in exact] == [theirs[name] for name in exact]


def test_call_in_native_code_is_interrupted_and_no_picture_is_left(tileable_bundle, tmp_path):
    """Of 2048x2048 pixels at once, which takes longer than is waited here: Python's handlers would wait as long."""
    Image.new("RGB", (2048, 2048)).save(tmp_path / "large.png")
    command = heeding(signal.SIGINT, "roundtrip", tileable_bundle, "large.png")
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(5)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (130, "", "interrupted; nothing was left half-written\n")
    assert os.listdir(tmp_path) == ["large.png"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_export_stops_soon_and_leaves_nothing(tmp_path, number, code):
    command = heeding(number, "--to", "onnx", "--out", "new/b")
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("new/.b.partial-*")):  # until it is exporting
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(1)
        process.send_signal(number)
        _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (code, "interrupted; nothing was left half-written\n")
    assert os.listdir(tmp_path) == []


# Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ERRORS)
def test_each_error_class_has_an_exit_code_of_its_own(run, monkeypatch, kind):
    def fail(path):
        raise kind(f"{path} [/b] is\x1b[2J wrong;\ndo right")

    monkeypatch.setattr("vae_export.cli.app.Bundle", fail)
    result = run("inspect", "b")
    # A package that is not installed is one reason for a backend to be unavailable: both have one code.
    unavailable = [errors.BackendUnavailable, errors.NotInstalled]
    expected = unavailable if kind in unavailable else [kind]
    assert [other for other in ERRORS if other.exit_code == result.code] == expected
    assert result.code not in (0, 1, 2, 130, 143)
    # One line, brackets and all, and no escape sequence.
    assert result[1:] == ("", f"error ({kind.__name__}): b [/b] is [2J wrong; do right\n")


def test_bug_is_called_a_bug(run, monkeypatch):
    monkeypatch.setattr("vae_export.cli.app.Bundle", lambda path: 1 / 0)
    result = run("inspect", "b")
    assert result.code == 1
    assert "internal error (ZeroDivisionError)" in result.err and "VAE_EXPORT_DEBUG" in result.err
    monkeypatch.setenv("VAE_EXPORT_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli.main()


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        ("--to tflite", ConfigError, ["'tflite'", "known are onnx"]),
        ("--to onnx --precision fp12", ConfigError, ["'fp12'", "known are fp32"]),
        ("--to onnx --model no/such/model", ConfigError, ["no/such/model", "neither a directory"]),
        ("--to onnx --model [/such]", ConfigError, ["[/such]"]),
        ("--to onnx --model weights.ckpt", ConfigError, ["weights.ckpt", ".safetensors"]),
        ("--to onnx --out BUNDLE", BundleError, ["BUNDLE", "--overwrite"]),
        ("--to onnx --out FILES/photo.png", BundleError, ["photo.png", "not a directory"]),
        ("--to onnx --out FILES/photo.png/b", BundleError, ["cannot write to FILES/photo.png", "--out"]),
        ("inspect nowhere", BundleError, ["nowhere does not exist"]),
        ("inspect FILES/photo.png", BundleError, ["FILES/photo.png is not a directory"]),
        ("inspect .", BundleError, ["no manifest.json"]),
        ("validate BUNDLE", ConfigError, ["a model in memory", "--model"]),
        ("roundtrip BUNDLE FILES/odd.png", ShapeError, ["height 63 is not a multiple of 8", "pad to 64"]),
        ("roundtrip BUNDLE FILES/photo.png --tiling smooth", ConfigError, ["'smooth'", "blended, seamless"]),
        ("roundtrip BUNDLE FILES/photo.png --tiling seamless", ConfigError, ["--tileable"]),
        ("roundtrip BUNDLE FILES/photo.png --tile 100", ShapeError, ["100", "multiple of 8"]),
        ("roundtrip BUNDLE FILES/photo.png --tile -8", ShapeError, ["-8"]),
        ("roundtrip BUNDLE FILES/photo.png --memory-budget lots", ConfigError, ["'lots'", "2GiB"]),
        ("roundtrip BUNDLE FILES/photo.png --memory-budget 1KB", OutOfMemoryError, ["1000 bytes", "smallest"]),
        ("decode BUNDLE FILES/z.npy --size big", ShapeError, ["'big'", "1000x750"]),
        ("decode BUNDLE FILES/z.npy --size 99x24", ShapeError, ["99x24", "40x24"]),
        ("roundtrip BUNDLE FILES/speck.png --crop", ShapeError, ["7x7", "8x8"]),
        ("roundtrip BUNDLE FILES/empty.png", ShapeError, ["empty.png is empty (0 bytes)"]),
        ("roundtrip BUNDLE nowhere.png", ShapeError, ["nowhere.png does not exist"]),
        ("roundtrip BUNDLE FILES/photo.png --device tpu", BackendUnavailable, ["'tpu'", "cpu"]),
        ("roundtrip BUNDLE FILES/photo.png --backend abacus", BackendUnavailable, ["'abacus'", "onnxruntime"]),
        ("roundtrip BUNDLE FILES/photo.png --out no/x.png", BundleError, ["no/x.png"]),
        ("roundtrip BUNDLE FILES/photo.png --out x.doc", BundleError, ["x.doc"]),
        ("encode BUNDLE FILES/photo.png FILES/odd.png", ShapeError, ["of one size", "96", "95"]),
        ("encode BUNDLE FILES/photo.png --out no/x.npy", BundleError, ["no/x.npy", "No such file or directory"]),
        ("encode BUNDLE FILES/photo.png --out .", BundleError, ["directory"]),
        ("encode BUNDLE FILES/photo.png --out FILES/z.npy/z.npy", BundleError, ["FILES/z.npy", "Not a directory"]),
        ("decode BUNDLE nowhere.npy", ShapeError, ["nowhere.npy", "No such file or directory"]),
        ("decode BUNDLE FILES/pickled.npy", ShapeError, ["allow_pickle=False"]),
        ("decode BUNDLE FILES/several.npz", ShapeError, ["several arrays"]),
        ("decode BUNDLE FILES/channels.npy", ShapeError, ["[B, 4, height, width], not [2, 3, 3, 5]"]),
        ("decode BUNDLE FILES/flat.npy", ShapeError, ["not [4, 3, 5]"]),
        ("decode BUNDLE FILES/integers.npy", ShapeError, ["floating point, not int64"]),
        *(
            (f"decode BUNDLE FILES/{name}.npy", ShapeError, [f"{name}.npy is not a .npy file of latents"])
            for name in ("noise", "zip", "empty", "cut", "huge", "header")
        ),
    ],
)
def test_mistake_is_named_with_the_way_out(run, tiny_bundle, files, arguments, kind, said):
    def fill_in(text):
        return text.replace("BUNDLE", str(tiny_bundle)).replace("FILES", str(files))

    run(*map(fill_in, arguments.split())).check_refusal(kind, *map(fill_in, said))
    assert os.listdir() == []


@pytest.mark.parametrize(
    "arguments",
    ["--nonsense", "nonsense", "--model x", "inspect", "--to onnx --shift-factor x", "encode b i --seed -1"],
)
def test_wrong_usage_is_exit_code_2(run, arguments):
    result = run(*arguments.split())
    assert result.code == 2
    assert "Usage: vae-export" in result.err


def test_bundle_that_was_changed_or_is_of_the_future_is_refused(run, bundle_copy):
    changed = bundle_copy()
    data = bytearray((changed / "vae_decoder" / "model.onnx").read_bytes())
    data[1000] ^= 1
    (changed / "vae_decoder" / "model.onnx").write_bytes(data)
    for options in ([], ["--json"]):
        run("inspect", changed, *options).check_refusal(IntegrityError, "vae_decoder/model.onnx", "sha256")
    future = bundle_copy(lambda manifest: manifest.update(schema_version=99))
    run("inspect", future).check_refusal(CompatibilityError, "99", "upgrade vae-export")


def test_missed_threshold_is_shown_with_all_numbers(run, tiny_bundle, tiny_model, bundle_copy, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    proto = onnx.load(tiny_bundle / "vae_decoder" / "model.onnx")
    (bias,) = (tensor for tensor in proto.graph.initializer if "decoder.conv_out.bias" in tensor.name)
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(0.01), bias.name))
    wrong = bundle_copy(files={"vae_decoder/model.onnx": proto.SerializeToString()})
    result = run("validate", wrong, "--model", tmp_path / "model")
    result.check_refusal(NumericsError, "decoder", "dB (at least 100)")
    rows = [line.split()[0] for line in result.err.splitlines() if re.search(r"(ok|missed)\s*$", line)]
    assert rows.count("encoder") - 1 == rows.count("decoder") == 6
    assert "…" not in result.err  # no number is cut off


# Printing ---------------------------------------------------------------------------------------------------------


def test_no_arguments_prints_the_help_and_version_the_version(run):
    assert not [word for word in ("--to", "inspect", "roundtrip", "decode", "doctor") if word not in run().out]
    assert run("--version") == (0, f"{vae_export.__version__}\n", "")


def test_inspect_shows_graphs_files_and_verdict(run, tiny_bundle):
    assert run("inspect", tiny_bundle, "--json").json == json.loads((tiny_bundle / "manifest.json").read_text())
    shown = re.sub(r"[\s│]+", "", run("inspect", tiny_bundle).out)
    manifest = Bundle(tiny_bundle).manifest
    for tensor in (t for graph in manifest.graphs.values() for t in (graph.input, graph.output)):
        assert f"{tensor.name}{tensor.dtype}[{','.join(map(str, tensor.shape))}]" in shown
    for name, entry in manifest.files.items():
        assert f"{name}{entry.size:,}bytes,sha256{entry.sha256[:16]}" in shown
    assert "validationpassed(13comparisons)" in shown


def test_bundle_of_a_stranger_cannot_play_with_the_terminal(run, bundle_copy):
    def edit(manifest):
        manifest["source"] = {"given": "\x1b]0;owned\x07[/red][link=x]", "weights_sha256": "\x1b[2J"}
        manifest["validation"] = {"verdict": "\x1b[31m[/]passed", "measurements": 5}

    result = run("inspect", bundle_copy(edit))
    assert (result.code, result.err) == (0, "")
    assert "\x1b" not in result.out and "\x07" not in result.out
    assert "[/red][link=x]" in result.out


def test_doctor_says_what_works_and_how_to_get_the_rest(run):
    found = run("doctor", "--json").json
    assert found["backends"]["onnxruntime"]["cpu"] == found["export"] == "works"
    assert found["packages"]["numpy"] == np.__version__
    shown = re.sub(r"[\s│]+", " ", run("doctor").out)
    for states in found["backends"].values():
        assert all(state in shown for state in states.values())  # brackets of pip install 'vae-export[gpu]' included


# Running bundles --------------------------------------------------------------------------------------------------


def test_roundtrip_pictures_original_reconstruction_and_difference(run, tiny_bundle, files, monkeypatch):
    found = run("roundtrip", tiny_bundle, files / "photo.png", "--json").json
    with Image.open("roundtrip.png") as picture, Image.open(files / "photo.png") as photo:
        assert picture.size == (3 * 96, 64)
        original, restored, difference = np.split(np.asarray(picture), 3, axis=1)
        assert np.array_equal(original, np.asarray(photo))
    assert np.array_equal(difference, np.clip((restored.astype(int) - original) * 8 + 128, 0, 255))
    decibels = round(psnr(original, restored), 2)
    named = {"image": str(files / "photo.png"), "picture": "roundtrip.png"}
    assert found == {**named, "latents": [1, 4, 8, 12], "psnr_db": decibels}
    assert f"PSNR {decibels:.2f} dB" in run("roundtrip", tiny_bundle, files / "photo.png").out
    assert run("roundtrip", tiny_bundle, files / "odd.png", "--crop", "--json").json["latents"] == [1, 4, 7, 11]
    monkeypatch.setattr(cli_images, "psnr", lambda *_: float("inf"))  # equal images
    assert run("roundtrip", tiny_bundle, files / "photo.png", "--json").json["psnr_db"] is None


def test_any_size_is_padded_and_comes_back(run, tiny_bundle, files):
    found = run("roundtrip", tiny_bundle, files / "odd.png", "--pad", "--json").json
    assert found["latents"] == [1, 4, 8, 12]
    with Image.open("roundtrip.png") as picture:
        assert picture.size == (3 * 95, 63)
    assert run("encode", tiny_bundle, files / "odd.png", "--pad", "--out", "z.npy").code == 0
    assert run("decode", tiny_bundle, "z.npy", "--size", "95x63").out == "image.png 95x63\n"


def test_tiles_are_as_the_options_say(run, tileable_bundle, monkeypatch):
    told = []
    monkeypatch.setattr(cli_images, "progress_bar", lambda: contextlib.nullcontext(lambda *step: told.append(step)))
    seamless = run("roundtrip", tileable_bundle, PHOTO, "--crop", "--tiling", "seamless", "--tile", 128, "--json").json
    named = {what for what, *_ in told}
    assert {"Encoding", "Decoding"} < named and any(what.startswith("Decoding, tile 2 of ") for what in named)
    whole = run("roundtrip", tileable_bundle, PHOTO, "--crop", "--json").json
    assert seamless["psnr_db"] == pytest.approx(whole["psnr_db"], abs=0.01)
    told.clear()
    assert run("roundtrip", tileable_bundle, PHOTO, "--crop", "--memory-budget", "400MB").code == 0
    assert not [what for what, *_ in told if "tile" in what]
    assert run("roundtrip", tileable_bundle, PHOTO, "--crop", "--memory-budget", "60MB").code == 0
    assert [what for what, *_ in told if "tile" in what]


def test_encoded_images_are_decoded_again(run, tiny_bundle, files):
    result = run("encode", tiny_bundle, files / "photo.png", files / "photo.png", "--out", "z.npy")
    assert "[2, 4, 8, 12] in z.npy" in result.out
    z = np.load("z.npy")
    assert (z.dtype, z.shape) == (np.float32, (2, 4, 8, 12))
    assert run("decode", tiny_bundle, "z.npy", "--out", "y.png").out == "y-1.png 96x64\ny-2.png 96x64\n"
    np.save("one.npy", z[:1])
    assert run("decode", tiny_bundle, "one.npy").out == "image.png 96x64\n"
    assert sorted(os.listdir()) == ["image.png", "one.npy", "y-1.png", "y-2.png", "z.npy"]
    assert Path("image.png").read_bytes() == Path("y-1.png").read_bytes() == Path("y-2.png").read_bytes()


def test_pixels_are_exported_and_used(run, two_level_model, tmp_path):
    two_level_model.save_pretrained(tmp_path / "model")
    command = ("--to", "onnx", "--io", "uint8", "--model", tmp_path / "model", "--no-validate", "--out", "pixels")
    graphs = run(*command, "--json").json["manifest"]["graphs"]
    assert graphs["encoder"]["input"]["dtype"] == graphs["decoder"]["output"]["dtype"] == "uint8"
    assert run("roundtrip", "pixels", PHOTO, "--crop", "--json").json["psnr_db"] > 0
    run(*command, "--io", "uint16").check_refusal(ConfigError, "io 'uint16' is not known; known are float, uint8")


def test_seed_makes_a_draw_reproducible(run, tiny_bundle, files):
    for name, options in {"mode": [], "a": ["--seed=1"], "b": ["--seed=1"], "c": ["--seed=2"]}.items():
        assert run("encode", tiny_bundle, files / "photo.png", "--out", f"{name}.npy", *options).code == 0
    mode, a, b, c = (np.load(f"{name}.npy") for name in ("mode", "a", "b", "c"))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c) and not np.array_equal(a, mode)


def test_names_are_printed_as_they_are(run, tiny_bundle, files):
    name = "a [red] :cat: [" + "long " * 20 + ".png"
    (files / "photo.png").rename(name)
    assert run("roundtrip", tiny_bundle, name, "--out", "x [b].png").out.startswith(f"{name}: PSNR")


# Without PyTorch --------------------------------------------------------------------------------------------------

WITHOUT_TORCH = """
import contextlib, importlib.abc, io, json, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ("torch", "onnx", "onnxscript", "safetensors", "huggingface_hub"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
from vae_export.cli.main import main

for arguments in json.loads(sys.argv[1]):
    sys.argv = ["vae-export", *arguments]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main()
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([arguments[0], code, err.getvalue()]))
"""


def test_without_torch_bundles_run_and_exporting_says_what_to_install(tiny_bundle, files, tmp_path):
    works = ["inspect BUNDLE", "doctor", "roundtrip BUNDLE photo.png", "encode BUNDLE photo.png", "decode BUNDLE z.npy"]
    lines = [line.replace("BUNDLE", str(tiny_bundle)).split() for line in (*works, "--to onnx", "validate BUNDLE")]
    command = [sys.executable, "-c", WITHOUT_TORCH, json.dumps(lines)]
    done = subprocess.run(command, cwd=files, capture_output=True, text=True)
    # Any of the missing packages may be the first that is imported; the way out is the same.
    found = [json.loads(re.sub("needs (safetensors|onnx):", "needs torch:", line)) for line in done.stdout.splitlines()]
    told = "error (NotInstalled): exporting needs torch: pip install 'vae-export[export,cpu]'\n"
    expected = [(0, "")] * len(works) + [(BackendUnavailable.exit_code, told)] * 2
    assert found == [[line[0], *outcome] for line, outcome in zip(lines, expected, strict=True)], done.stderr


# Half precision ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blown_directory(tiny_model, tmp_path_factory):
    """A model whose activations overflow fp16, as a diffusers directory."""
    path = tmp_path_factory.mktemp("blown") / "pipeline" / "vae"
    blown_up(tiny_model, gains(0, powers_of_two=True), with_eps=False).save_pretrained(path)
    return path.parent


def test_ranges_are_printed_and_plotted_before_and_after(run, blown_directory):
    found = run("ranges", blown_directory, "--subfolder", "vae", "--json", "--out", "r.png").json
    assert max(found["before"].values()) > 65504
    assert max(found["after"].values()) < 65504 / 16
    assert found["divided_by_power_of_two"]
    with Image.open("r.png") as picture:
        assert picture.width > 800


def test_half_precision_is_rescaled_and_said_so(run, blown_directory):
    arguments = ("--to", "onnx", "--precision", "fp16", "--model", blown_directory, "--subfolder", "vae", "--out", "b")
    result = run(*arguments)
    assert result.code == 0, result.err
    assert re.search(r"largest activation \d+,\d+", result.out)
    assert re.search(r"decoder\.up_blocks\.\d divided by 2\^\d+", result.out)
    again = run("validate", "b", "--json").json  # finds the model in its subfolder again
    assert all(m["passed"] for m in again["measurements"])
    plain = run(*arguments, "--overwrite", "--no-rescale")
    plain.check_refusal(NumericsError, "overflows in fp16", "encoder.")
    assert Bundle("b").manifest.rewrites[0]["name"] == "rescale_activations", "the old bundle stays"


def test_calibration_photographs_must_exist(run, tmp_path):
    (tmp_path / "empty").mkdir()
    arguments = ("--to", "onnx", "--precision", "fp16", "--out", "b", "--calibrate")
    run(*arguments, tmp_path / "empty").check_refusal(ConfigError, "empty", ".jpg")
    run(*arguments, tmp_path / "none").check_refusal(ConfigError, "none", "not a directory")
