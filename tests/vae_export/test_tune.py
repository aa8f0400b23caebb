"""Tuning: the forms are timed in turn, the fastest is exported, and the manifest says how it was found."""

import json
import re
from contextlib import nullcontext
from typing import Any

import onnx
import pytest
from typer.testing import CliRunner

from runtimes import BackendUnavailable, Bundle, ConfigError
from runtimes.progress import no_progress
from tests.helpers.forms import FORMS
from vae_export import AutoencoderKL, tune
from vae_export.cli.app import app
from vae_export.options import ExportOptions
from vae_export.rewrites import winograd
from vae_export.rewrites.form import UPSAMPLES, Form
from vae_export.targets import target_named
from vae_export.targets.engines import present_gpu
from vae_export.tune import tune_bundle


@pytest.fixture
def race(monkeypatch):
    """race(seconds): timing asks `seconds(form, threads)` instead of exporting and running; the calls, in order."""

    def run(seconds):
        calls = []

        def timed(entry, graph, x):
            calls.append((graph, *entry))
            return seconds(*entry)

        monkeypatch.setattr(tune._Bench, "_bundle", lambda self, form: form)
        monkeypatch.setattr(tune, "open_vae", lambda form, threads: nullcontext((form, threads)))
        monkeypatch.setattr(tune, "_timed", timed)
        return calls

    return run


def test_the_fastest_form_is_kept_and_the_manifest_tells_how(tiny_model, tmp_path, race):
    calls = race(lambda form, threads: 1.0 if form[:2] == ("none", "group") and threads is None else 2.0)
    tuned = tune_bundle(tiny_model, tmp_path / "b", height=16, width=24, rounds=2)
    assert tuned.winners["decoder"].form[:3] == ("none", "group", FORMS["onnx", "fp32"].last_block)
    assert tuned.winners["decoder"].threads is None
    manifest = Bundle(tmp_path / "b").manifest
    assert manifest.validation["verdict"] == "passed"
    record = manifest.rewrites[-1]
    assert (record["name"], record["size"]) == ("tuned", [16, 24])
    assert record["winners"]["decoder"]["form"]["norm"] == "group"
    assert {t["form"]["upsample"] for t in record["trials"] if t["graph"] == "decoder"} == set(UPSAMPLES)
    assert all(len(t["seconds"]) == 2 for t in record["trials"])
    # In turn: A B C ... A B C ..., never A A A, since a slow minute must hit all alike.
    first = [entry for entry in calls if entry[0] == "decoder"][:18]
    assert first[:6] == first[6:12] == first[12:] and len(set(first)) == 6


def test_a_form_that_wins_by_noise_alone_is_not_preferred(tiny_model, tmp_path, race, monkeypatch):
    monkeypatch.setattr(tune, "export_bundle", lambda *_, **__: None)
    clock = iter(1.0 - 0.0001 * i for i in range(1000))  # every call a little faster than the one before
    race(lambda *_: next(clock))
    tuned = tune_bundle(tiny_model, tmp_path / "b", height=16, width=16, rounds=1)
    default = FORMS["onnx", "fp32"]
    assert tuned.winners["decoder"].form == default
    assert tuned.winners["encoder"].form == default._replace(last_block="plain")  # it has none


def test_wide_convolutions_are_raced_in_fp32_alone(two_level_model, tmp_path, race, monkeypatch):
    monkeypatch.setattr(winograd, "MIN_CHANNELS", 16)
    monkeypatch.setattr(tune, "export_bundle", lambda *_, **__: None)
    race(lambda form, threads: 1.0 if form.convolutions == "winograd" else 2.0)
    for precision, kinds in (("fp32", {"direct", "winograd"}), ("fp16", {"direct"})):
        tuned = tune_bundle(two_level_model, tmp_path / "b", precision=precision, height=16, width=16, rounds=1)
        assert {trial.form.convolutions for trial in tuned.trials} == kinds
        assert {winner.form.convolutions for winner in tuned.winners.values()} == {max(kinds)}  # the latter, if timed
    monkeypatch.setattr(winograd, "MIN_CHANNELS", 512)
    tuned = tune_bundle(two_level_model, tmp_path / "b", height=16, width=16, rounds=1)
    assert "convolutions" not in {trial.race for trial in tuned.trials}, "it has none"


def test_what_is_timed_is_the_graph_in_its_form(tmp_path):
    kinds: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    model = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, mid_block_add_attention=False, **kinds)
    options = ExportOptions(precision="fp32")
    bench = tune._Bench(model, target_named("onnx"), options, (4, 4), 1, tmp_path, no_progress)
    form = Form("deconv", "group")
    assert bench._bundle(form) == bench._bundle(form), "exported once"
    graph = onnx.load(bench._bundle(form) / "vae_decoder" / "model.onnx").graph
    assert {"ConvTranspose", "GroupNormalization"} <= {node.op_type for node in graph.node}
    trial = bench._race("forms", "decoder", [(form, 1)])
    assert trial.form == form and len(trial.seconds) == 1 and trial.median > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 20}, "cannot time 20x512 pixels in 3 rounds; sides are multiples of 8"),
        ({"rounds": 0}, "0 rounds"),
        ({"target": "tflite"}, "'tflite' is not known"),
    ],
    ids=str,
)
def test_what_cannot_be_tuned_is_refused_at_once(tiny_model, tmp_path, options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        tune_bundle(tiny_model, tmp_path / "b", **options)
    assert not list(tmp_path.iterdir())


def test_the_command_prints_what_it_timed(tmp_path, monkeypatch):
    trial = tune.Trial("forms", "decoder", Form("conv", "rows"), None, (0.5, 0.7, 0.6))
    bundle: Any = None  # the command does not look at it
    found = tune.Tuned(bundle, (trial,), {"decoder": trial})
    monkeypatch.setattr(tune, "tune_bundle", lambda *_, **__: found)
    result = CliRunner().invoke(app, ["tune", "--out", str(tmp_path / "b")])
    assert result.exit_code == 0
    assert re.search(r"decoder\s+conv\s+rows\s+plain\s+direct\s+auto\s+0\.600\s+1\.00\s+kept", result.output)
    result = CliRunner().invoke(app, ["tune", "--out", str(tmp_path / "b"), "--json"])
    assert json.loads(result.stdout)["trials"][0]["seconds"] == [0.5, 0.7, 0.6]


def test_engines_are_timed_where_they_will_run(tiny_model, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    if present_gpu() is not None:
        pytest.skip("there is a GPU here")
    with pytest.raises(BackendUnavailable, match="tuning tensorrt-rtx times engines on the GPU"):
        tune_bundle(tiny_model, tmp_path / "b", target="tensorrt-rtx", height=64, width=64)
    assert list(tmp_path.iterdir()) == []
