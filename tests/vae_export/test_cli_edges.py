"""What the command line prints and writes elsewhere than in files, errors as JSON, which model is loaded.

Tests vae_export/cli/options.py, vae_export/cli/streams.py.
"""

import io
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vae_export
from runtimes import Bundle
from runtimes.errors import BundleError, ConfigError, NumericsError, ShapeError
from tests.helpers.command import COMMAND, ERRORS
from vae_export.cli import app as cli
from vae_export.targets import int8 as quantize


def command(*arguments, stdout=subprocess.PIPE, **options):
    """The command as a process."""
    words = [COMMAND, *map(str, arguments)]
    return subprocess.run(words, stdout=stdout, stderr=subprocess.PIPE, check=False, **options)


# Output -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["-", "/dev/stdout", "/dev/fd/1", "link"])
def test_latents_go_to_standard_output_and_what_is_said_does_not(tiny_bundle, files, place):
    (files / "link").symlink_to("/dev/stdout")
    done = command("encode", tiny_bundle, "photo.png", "--out", place, cwd=files)
    assert (done.returncode, np.load(io.BytesIO(done.stdout)).shape) == (0, (1, 4, 8, 12)), done.stderr
    assert done.stderr.startswith(b"1 images -> latents [1, 4, 8, 12]")
    assert Path("/dev/stdout").is_symlink() and (files / "link").is_symlink()


def test_pictures_go_to_standard_output(tiny_bundle, files):
    picture = command("roundtrip", tiny_bundle, "photo.png", "--out", "-", cwd=files).stdout
    with Image.open(io.BytesIO(picture)) as image:
        assert (image.format, image.size) == ("PNG", (3 * 96, 64))
    several = command("decode", tiny_bundle, "z.npy", "--out", "-", cwd=files)
    assert (several.returncode, several.stdout) == (BundleError.exit_code, b"")
    assert b"it takes one image, and these are 2" in several.stderr


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        ("roundtrip BUNDLE FILES/photo.png --out noext", BundleError, ["cannot write noext", ".png, .jpg"]),
        ("decode BUNDLE FILES/z.npy --out x.doc", BundleError, ["cannot write x.doc", "'.doc'", ".png, .jpg"]),
        ("ranges --out x.doc", BundleError, ["cannot write x.doc", ".png, .svg"]),
        ("ranges --out no/x.png", BundleError, ["cannot write no/x.png", "No such file or directory"]),
        ("--to onnx --out /dev/null", BundleError, ["/dev/null exists and is not a directory"]),
        ("tune --out /dev/null", BundleError, ["/dev/null exists and is not a directory"]),
        ("triton BUNDLE --out /dev/null", BundleError, ["/dev/null exists"]),
        ("encode-dataset FILES --bundle BUNDLE --out /dev/null", BundleError, ["/dev/null exists"]),
        ("encode BUNDLE FILES/photo.png --out ~/no/z.npy", BundleError, ["HOME/no/z.npy"]),
        ("inspect ~/nowhere", BundleError, ["HOME/nowhere does not exist"]),
        ("roundtrip BUNDLE ~/nowhere.png", ShapeError, ["HOME/nowhere.png does not exist"]),
        ("--to onnx --model=~/nowhere.safetensors", ConfigError, ["HOME/nowhere.safetensors does not exist"]),
        ("validate BUNDLE --model=~/nowhere.safetensors", ConfigError, ["HOME/nowhere.safetensors does not exist"]),
        ("ranges ~/nowhere.safetensors", ConfigError, ["HOME/nowhere.safetensors does not exist"]),
    ],
)
def test_mistake_is_named_as_text_and_as_json(run, tiny_bundle, files, monkeypatch, arguments, kind, said):
    monkeypatch.setenv("HOME", str(files / "home"))
    names = {"BUNDLE": tiny_bundle, "FILES": files, "HOME": files / "home"}
    words = [re.sub("BUNDLE|FILES", lambda match: str(names[match[0]]), word) for word in arguments.split()]
    said = [part.replace("HOME", str(names["HOME"])) for part in said]
    run(*words).check_refusal(kind, *said)
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--to onnx --model=", "it is empty"),
        ("validate b --model=", "it is empty"),
        ("inspect ''", "it is empty"),
        ("--to onnx --out -", "not standard output"),
        ("encode-dataset x --bundle b --out -", "not standard output"),
        ("validate b --revision main", "--revision without a model"),
        ("validate b --scaling-factor 1", "--scaling-factor without a model"),
        ("ranges --subfolder vae", "--subfolder without a model"),
        ("--to onnx --config c.json", "--config without a model"),
        ("inspect", "bundle"),
        ("inspect b --nonsense", "--nonsense"),
        ("nonsense", "nonsense"),
    ],
)
def test_wrong_usage_is_exit_code_2_as_json_too(run, arguments, said):
    words = [word.strip("'") for word in arguments.split()]
    assert run(*words).code == 2
    result = run(*words, "--json") if "encode-dataset" not in words else run(*words[:1], "--json", *words[1:])
    error = json.loads(result.out)["error"]
    assert (result.code, error["exit_code"]) == (2, 2)
    assert said in error["message"] and said in result.err


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_full_standard_output_is_no_bug_of_ours(tiny_bundle, options):
    for arguments in (["inspect", tiny_bundle, *options], ["--help"], ["--version"]):
        for unbuffered in ("", "1"):
            with open("/dev/full", "w") as full:
                done = command(*arguments, stdout=full, env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
            said = b"error (BundleError): cannot write to standard output: No space left on device\n"
            assert (done.returncode, done.stderr) == (BundleError.exit_code, said)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_error_keeps_its_code_where_nothing_can_be_printed(unbuffered, monkeypatch):
    """Buffered output fails when it is flushed, at the end; unbuffered output where it is printed."""
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    with open("/dev/full", "w") as full:
        done = command("--to", "tflite", "--json", stdout=full)
        assert done.returncode == ConfigError.exit_code and b"'tflite'" in done.stderr
        silent = subprocess.run([COMMAND, "--to", "tflite"], stdout=full, stderr=full, check=False)
        assert silent.returncode == ConfigError.exit_code


def test_reader_that_has_gone_ends_the_command_without_a_word(tiny_bundle):
    reading, writing = os.pipe()
    os.close(reading)
    done = command("inspect", tiny_bundle, "--json", stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_reader_that_closes_the_pipe_of_the_data_ends_the_command_without_a_word(tiny_bundle, files):
    reading, writing = os.pipe()
    os.close(reading)
    for arguments in (["encode", tiny_bundle, "photo.png"], ["roundtrip", tiny_bundle, "photo.png"]):
        done = command(*arguments, "--out", "-", stdout=writing, cwd=files)
        assert (done.returncode, done.stderr) == (141, b""), arguments
    os.close(writing)


def test_warning_is_one_plain_line_on_standard_error(run, monkeypatch):
    def warn(path):
        warnings.warn("the config\nis left out", UserWarning, stacklevel=2)
        return Bundle(path)

    monkeypatch.setattr(cli, "Bundle", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        result = run("inspect", "missing")
    assert result.code == BundleError.exit_code
    assert result.err.splitlines()[0] == "warning: the config is left out"


def test_shell_completion_names_commands_without_loading_torch():
    code = "import sys; sys.modules['torch'] = sys.modules['onnx'] = None; import vae_export.__main__"
    completing = {**os.environ, "COMP_WORDS": "vae-export en", "COMP_CWORD": "1"}
    for instruction, expected in (
        ("complete_bash", b"encode\nencode-dataset"),
        ("source_bash", b"complete -o default"),
    ):
        environment = {**completing, "_VAE_EXPORT_COMPLETE": instruction}
        words = [sys.executable, "-c", code]
        done = subprocess.run(words, env=environment, capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, b"") and expected in done.stdout
    assert b"--install-completion" in command("--help").stdout


@pytest.mark.parametrize("encoding", ["ascii", "ascii:strict", "latin-1", "utf-8"])
def test_no_encoding_of_the_streams_makes_a_command_fail(tiny_bundle, files, encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    name = "Öl-日本.npy"
    done = command("encode", tiny_bundle, "photo.png", "--out", name, cwd=files, env=environment)
    plain = encoding.partition(":")[0]
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.rstrip().endswith(name.encode(plain, "backslashreplace"))
    assert (files / name).exists()
    missing = command("inspect", "Öl", cwd=files, env=environment)
    assert missing.returncode == BundleError.exit_code and "Öl".encode(plain, "backslashreplace") in missing.stderr


# Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ERRORS)
def test_each_error_class_is_printed_as_json(run, monkeypatch, kind):
    def fail(path):
        raise kind(f"{path} is wrong")

    monkeypatch.setattr(cli, "Bundle", fail)
    result = run("inspect", "b", "--json")
    record = {"class": kind.__name__, "message": "b is wrong", "exit_code": kind.exit_code}
    assert (result.code, json.loads(result.out)) == (kind.exit_code, {"error": record})
    assert result.err == f"error ({kind.__name__}): b is wrong\n"


def test_bug_is_printed_as_json(run, monkeypatch):
    monkeypatch.setattr(cli, "Bundle", lambda path: 1 / 0)
    result = run("inspect", "b", "--json")
    assert (result.code, json.loads(result.out)["error"]["class"]) == (1, "ZeroDivisionError")


def missed_by_int8(path):
    """What an int8 export raises whose measure stays below the bar, whatever is kept."""
    from openvino import Model, opset13

    x = opset13.parameter([1, 2, 8, 8], np.float32)
    y = x
    for number in range(5):
        y = opset13.convolution(y, np.ones((2, 2, 3, 3), np.float32), [1, 1], [1, 1], [1, 1], [1, 1])
        y.set_friendly_name(f"layer{number}")
    samples = [np.ones((1, 2, 8, 8), np.float32)]
    quantize.quantize_until(Model([y], [x], "m"), samples, lambda model: 30.3, 40.0)


def not_finite(path):
    row = {"graph": "encoder", "by": "ort", "input": "noise", "shape": [1, 4], "max_abs": float("nan")}
    row |= {"mean_abs": float("inf"), "psnr_db": float("nan"), "uint8_steps": None, "finite": False, "passed": False}
    raise NumericsError("missed", [row])


def of_no_known_kind(path):
    raise NumericsError("missed", [{"psnr_db": 3.0}, {"place": "a [b]", "largest": 1e9, "kept": [], "none": None}])


@pytest.mark.parametrize(
    ("fail", "shown"),
    [(missed_by_int8, "layer2"), (not_finite, "NaN"), (of_no_known_kind, "a [b]")],
)
def test_numbers_of_what_failed_are_printed_whatever_they_are(run, monkeypatch, fail, shown):
    monkeypatch.setattr(cli, "Bundle", fail)
    text = run("inspect", "b")
    text.check_refusal(NumericsError)
    assert shown in text.err and "internal" not in text.err
    result = run("inspect", "b", "--json")
    error = json.loads(result.out, parse_constant=pytest.fail)["error"]
    assert (result.code, error["class"]) == (NumericsError.exit_code, "NumericsError")
    assert error["measurements"]


def test_failing_validation_prints_its_numbers_as_json(run, tiny_bundle, monkeypatch):

    monkeypatch.setattr("vae_export.validate.validate_bundle", lambda *_, **__: not_finite(""))
    error = json.loads(run("validate", tiny_bundle, "--json").out)["error"]
    assert error["measurements"][0]["graph"] == "encoder" and error["measurements"][0]["max_abs"] is None


# Which model ------------------------------------------------------------------------------------------------------


def test_bundle_made_from_a_relative_path_is_validated_from_anywhere(run, two_level_model, tmp_path, monkeypatch):
    Path("models").mkdir()
    two_level_model.save_pretrained("models/vae")
    assert run("--to", "onnx", "--model", "models/vae", "--out", "b", "--no-validate").code == 0
    work = Path.cwd()
    source = Bundle("b").manifest.source
    assert (source["given"], source["absolute"]) == ("models/vae", str(work / "models/vae"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run("validate", work / "b", "--json").json["verdict"] == "passed"
    (work / "models").rename(work / "moved")
    missing = f"made from models/vae, then {work / 'models/vae'}, and nothing is there now; give --model"
    run("validate", work / "b").check_refusal(ConfigError, missing)
    assert run("validate", work / "b", "--model", work / "moved/vae", "--json").json["verdict"] == "passed"


def test_embedded_model_is_recorded_without_a_path(tiny_model):
    from vae_export import load_model

    assert load_model().source.absolute is None


def test_every_command_that_loads_a_model_takes_what_the_export_takes(run, monkeypatch):
    """All options reach the function that loads, from each command."""
    asked = []

    def load(source, **options):
        asked.append((source, options))
        raise ConfigError("enough")

    monkeypatch.setattr("vae_export.checkpoints.load.load_model", load)
    options = "--subfolder s --revision r --variant v --config c.json --scaling-factor 2 --shift-factor 0.5"
    for words in (["--to", "onnx", "--model", "m"], ["validate", "b", "--model", "m"], ["tune", "m"], ["ranges", "m"]):
        run(*words, *options.split()).check_refusal(ConfigError, "enough")
    expected = {"subfolder": "s", "variant": "v", "config": "c.json", "scaling_factor": 2.0, "shift_factor": 0.5}
    assert asked == [("m", {"hub": vae_export.Hub(revision="r"), **expected})] * 4
    asked.clear()
    run("ranges").check_refusal(ConfigError, "enough")
    assert asked == [(None, {"hub": vae_export.Hub()})]


def test_a_single_file_is_validated_measured_and_tuned_with_its_config(run, two_level_model, tmp_path):
    """Of an architecture that no public model has, so that the config has to be given."""
    two_level_model.save_pretrained(tmp_path / "m")
    file = tmp_path / "only.safetensors"
    (tmp_path / "m" / "diffusion_pytorch_model.safetensors").rename(file)
    config = ("--config", tmp_path / "m" / "config.json")
    assert run("--to", "onnx", "--model", file, *config, "--out", "b", "--no-validate").code == 0
    assert run("validate", "b", "--model", file, *config, "--json").json["verdict"] == "passed"
    assert run("ranges", file, *config, "--json").json["before"]
