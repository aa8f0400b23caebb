"""The benchmark measures every row in turn, and reports what it could not measure with the reason."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from benchmarks import compare
from benchmarks.peers import ROWS, Case

ROOT = Path(__file__).parents[1]
ASKED = ("torch fp32", "openvino plain fp32", "ours onnxruntime fp32")
REASON = "OpenVINO is absent from this test"


def run(*arguments, **environment):
    command = [sys.executable, "-m", "benchmarks.compare", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(output, report, directory) of a run in which OpenVINO cannot be imported."""
    place = tmp_path_factory.mktemp("compare")
    (place / "openvino").mkdir()
    (place / "openvino" / "__init__.py").write_text(f"raise ImportError({REASON!r})\n")
    options = ("--model", "tiny", "--graphs", "decode", "--sizes", "64", "--rounds", "2", "--memory-sizes", "32")
    finished = run(*options, "--out", place / "out", "--rows", *ASKED, PYTHONPATH=str(place))
    assert finished.returncode == 0, finished.stderr
    return finished.stdout, json.loads((place / "out" / "compare.json").read_text()), place / "out"


def names(results):
    return tuple(f"{result['row']} {result['precision']}" for result in results)


def test_every_row_is_measured_against_the_reference(done):
    _, report, _ = done
    assert names(report["results"]) == ASKED
    torch, _, ours = report["results"]
    (work,) = (case["gflop"] for case in report["gflop"] if case["size"] == 64)
    for result in (torch, ours):
        assert (result["graph"], result["size"], result["batch"]) == ("decode", 64, 1)
        assert len(result["seconds"]) == 2
        assert 0 < result["min_seconds"] <= result["median_seconds"] <= result["max_seconds"] < 60
        assert result["images_per_second"] == pytest.approx(1 / result["median_seconds"])
        assert result["gflops"] == pytest.approx(work / result["median_seconds"])
        assert result["share_of_peak"] == pytest.approx(result["gflops"] / report["peak_gflops"]["fp32"])
        assert 0 < result["load_seconds"] < 60
        assert 0 < result["first_call_seconds"] < 60
        # fp32 in another order of summation, as in vae_export.comparison
        assert result["psnr_db"] is None or result["psnr_db"] > 100
        assert result["max_abs"] < 1e-4
        assert result["best_peer"] == "torch"
    assert torch["ratio_to_best_peer"] == 1
    assert ours["ratio_to_best_peer"] == pytest.approx(ours["median_seconds"] / torch["median_seconds"])


def test_memory_is_that_of_the_row_alone(done):
    """A process without PyTorch needs less than one with it; ru_maxrss would give both what their parent held."""
    _, report, _ = done
    torch, _, ours = (result.get("peak_memory_gb") for result in report["results"])
    assert 0.02 < ours < torch < 4
    assert names(report["memory"]) == ASKED
    assert 0.02 < report["memory"][2]["peak_memory_gb"] < torch


def test_rows_are_asked_in_turn(done):
    _, report, _ = done
    assert report["turns"] == [
        {"graph": "decode", "size": 64, "batch": 1, "group": 1, "calls": ["torch fp32", "ours onnxruntime fp32"] * 2}
    ]


def test_a_row_that_cannot_run_is_reported_with_the_reason(done):
    output, report, _ = done
    assert report["results"][1]["unavailable"] == f"ImportError: {REASON}"
    assert "median_seconds" not in report["results"][1]
    assert f"not run: openvino plain fp32: ImportError: {REASON}" in " ".join(output.split())
    assert report["peak_gflops"]["int8"] == f"ImportError: {REASON}"


def test_the_report_says_where_and_how_and_the_verdict(done):
    output, report, directory = done
    assert report["machine"]["cpu"]
    assert report["machine"]["cores"] >= 1
    assert report["machine"]["load_average_before"] >= 0
    assert report["machine"]["packages"]["torch"]
    assert report["command"].startswith("python -m benchmarks.compare --model tiny")
    verdict, memory = report["verdicts"]
    assert verdict.startswith("decode 64 fp32: ours (onnxruntime) ")
    assert "best peer (torch) " in verdict
    assert memory.startswith("decode 32 fp32 peak memory: ours (onnxruntime) ") and "leanest peer (torch) " in memory
    assert output.splitlines()[-2:] == [verdict, memory]
    assert max(map(len, output.splitlines())) <= max(100, len(report["command"]), len(verdict))
    assert (directory / "compare.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sizes", "100"), "100 is not a multiple of 8"),
        (("--rounds", "0"), "'0' is not a whole number above 0"),
        (("--rows", "caffe"), "no row has caffe in its name"),
        (("--out", "README.md"), "--out README.md"),
    ],
)
def test_a_bad_argument_is_an_error_of_one_line(arguments, message):
    finished = run(*arguments)
    assert finished.returncode == 2
    assert message in finished.stderr.splitlines()[-1]
    assert "Traceback" not in finished.stderr


class Scripted:
    """A worker that has done its work, in 1 s and 2 GB."""

    opened = 0

    def __init__(self, *_, **__):
        Scripted.opened += 1

    def answer(self):
        return {"load_seconds": 1.0}

    def ask(self, what):
        return {"seconds": 1.0, "peak_memory_gb": 2.0, "idle_seconds": 1.0, "idle_cpu_seconds": 0.0}

    def close(self):
        Scripted.opened -= 1


def test_where_memory_is_short_only_those_that_fit_are_asked_in_turn(monkeypatch, tmp_path):
    """2 GB each, and half as much again to be safe: of 7 GB two fit beside each other."""
    monkeypatch.setattr(compare, "Worker", Scripted)
    monkeypatch.setattr(compare, "SETTLE", 0)
    monkeypatch.setattr(compare, "available_memory", lambda: 7 - 2 * Scripted.opened)
    monkeypatch.setattr(np, "load", lambda path: None)
    status = Console(stderr=True).status("")
    results, orders = compare.measure(tmp_path, Case("decode", 64, 1), ROWS[:5], 2, {}, status)
    rows = [str(row) for row in ROWS[:5]]
    assert orders == [rows[:2] * 2, rows[2:4] * 2, rows[4:] * 2]
    assert [result["group"] for result in results] == [1, 1, 2, 2, 3]


def test_int8_is_held_against_our_bf16():
    def result(row, precision, seconds):
        return {"row": row, "precision": precision, "ours": "ours" in row, "median_seconds": seconds, "group": 1}

    results = [
        result("openvino plain", "bf16", 4.0),
        result("ours openvino", "bf16", 2.0),
        {"row": "ours flax", "precision": "bf16", "ours": True, "unavailable": "no flax"},
        result("ours openvino", "int8", 1.5),
    ]
    assert list(compare.verdicts(Case("decode", 512, 4), results)) == [
        "decode 512 batch 4 bf16: ours (openvino) 2.00 s, best peer (openvino plain) 4.00 s: 0.50",
        "decode 512 batch 4 int8: ours (openvino) 1.50 s, our bf16 (openvino) 2.00 s: 0.75",
    ]
