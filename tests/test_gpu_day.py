"""A day with a GPU: whatever a stage does, what it measured is in its files; and every stage is rehearsed."""

import functools
import itertools
import json
import operator
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu import card, report, run_jax, run_ort, run_torch
from benchmarks.gpu.made import Made, NotMade
from benchmarks.gpu.stage import STAGES, CudaClock, HostClock, Stage, Way, timed
from benchmarks.gpu.supervise import Options, run_stage
from benchmarks.models import ARCHITECTURES, config_of
from benchmarks.peers import Case, random_input
from tests.helpers.tensorrt_names import names_in

ROOT = Path(__file__).parents[1]
#: members of objects that TensorRT-RTX gives, beside what is taken from its module
OF_TENSORRT_RTX = {
    "engines.py": ("Runtime.get_engine_validity",),
    "run_rtx.py": (
        "Builder.create_network",
        "Builder.create_builder_config",
        "Builder.create_optimization_profile",
        "Builder.build_serialized_network",
        "IBuilderConfig.num_compute_capabilities",
        "IBuilderConfig.set_compute_capability",
        "IBuilderConfig.add_optimization_profile",
        "IOptimizationProfile.set_shape",
        "OnnxParser.parse",
    ),
}
TOYS = {
    "rows": """
        for number in range(3):
            stage.measure(f"row {number}", {"number": number}, lambda: {"found": 1})
    """,
    "crash": """
        stage.measure("before", {}, lambda: {"found": 1})
        stage.measure("crash", {}, lambda: os.kill(os.getpid(), signal.SIGSEGV))
        stage.measure("behind", {}, lambda: {"found": 2})
    """,
    "endless": """
        stage.measure("before", {}, lambda: {"found": 1})
        stage.measure("endless", {}, lambda: time.sleep(600))
        stage.measure("behind", {}, lambda: {"found": 2})
    """,
    "raises": """
        def fail(error):
            raise error
        stage.measure("value", {}, lambda: fail(ValueError("no such\\nkernel")))
        stage.measure("package", {}, lambda: __import__("nvidia_package_of_another_machine"))
        stage.measure("typo", {}, lambda: __import__("benchmarks.no_such_module"))
        stage.measure("poisoned", {}, lambda: fail(RuntimeError("CUDA error: an illegal memory access")))
        stage.measure("behind", {}, lambda: {"process": os.getpid()})
    """,
    "lacks": """
        from benchmarks.gpu.stage import require
        require("nvidia_package_of_another_machine", "it is what is measured")
    """,
    "slow": """
        from benchmarks.gpu.stage import LEAST_LEFT
        stage.deadline = time.monotonic() + LEAST_LEFT + 2
        for number in range(100):
            stage.measure(f"row {number}", {}, lambda: time.sleep(1) or {"found": 1})
    """,
    "broken": "1 / 0",
}


@pytest.fixture
def toys(tmp_path, monkeypatch):
    """toys(name, **options): the result of a stage of TOYS."""
    folder = tmp_path / "toys"
    folder.mkdir()
    (folder / "__init__.py").touch()
    for name, body in TOYS.items():
        code = (
            f"import os, signal, sys, time\n\ndef run(stage):\n{body if body.startswith(chr(10)) else '    ' + body}\n"
        )
        (folder / f"run_{name}.py").write_text(code.replace("\n        ", "\n    "))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def run(name, **options):
        options = {"seconds": 60.0, "out": tmp_path / "out", **options}
        return run_stage(name, Options(models=tmp_path / "models", command="a test", package="toys", **options))

    return run


def written(tmp_path, stage):
    """(the JSON, the Markdown) of a stage."""
    path = tmp_path / "out" / stage
    return json.loads(path.with_suffix(".json").read_text()), path.with_suffix(".md").read_text()


# Supervision ----------------------------------------------------------------------------------------------------------


def test_a_stage_writes_its_rows_for_programs_and_for_people(toys, tmp_path):
    data = toys("rows")
    assert [(row["name"], row["found"]) for row in data["rows"]] == [(f"row {n}", 1) for n in range(3)]
    kept, text = written(tmp_path, "rows")
    assert kept == data and data["end"] == "complete" and data["commands"] == ["a test"]
    assert "| row 2 | number 2, found 1" in text and "numpy" in data["packages"]


def test_a_crash_is_a_row_and_the_others_go_on(toys, tmp_path):
    rows = {row["name"]: row for row in toys("crash")["rows"]}
    assert list(rows) == ["before", "crash", "behind"] and (rows["before"]["found"], rows["behind"]["found"]) == (1, 2)
    assert rows["crash"]["failed"].startswith("its process ended with signal SIGSEGV")
    assert "crash: its process ended with signal SIGSEGV" in written(tmp_path, "crash")[1]


def test_a_row_that_does_not_end_is_given_up_alone(toys):
    rows = {row["name"]: row for row in toys("endless", row_seconds=4.0)["rows"]}
    assert rows["endless"]["failed"] == "not done within 4 s" and rows["behind"]["found"] == 2


def test_the_time_limit_ends_a_stage_with_what_it_has(toys, tmp_path):
    data = toys("endless", seconds=8.0)
    assert data["end"] == "ended by the time limit of 8 s"
    found = {row["name"]: row for row in data["rows"]}
    assert list(found) == ["before", "endless"][: len(found)], "on a busy machine a process may take long to begin"
    assert found.get("endless", {}).get("failed", "cut off by the time limit of the stage").startswith("cut off")
    assert written(tmp_path, "endless")[0] == data


def test_rows_for_which_no_time_is_left_are_named(toys):
    data = toys("slow")
    assert data["end"] == "ran out of time" and data["rows"] and data["skipped"][-1] == "row 99"
    assert len(data["rows"]) + len(data["skipped"]) == 100


def test_what_fails_and_what_is_lacking_are_told_apart(toys):
    rows = {row["name"]: row for row in toys("raises")["rows"]}
    assert rows["value"]["failed"] == "ValueError: no such kernel"
    assert "nvidia_package_of_another_machine" in rows["package"]["lacks"]
    assert "benchmarks.no_such_module" in rows["typo"]["failed"]
    assert "illegal memory access" in rows["poisoned"]["failed"]
    assert rows["behind"]["process"], "a new process goes on where the card refuses an old one"


def test_a_stage_says_in_one_line_what_it_lacks(toys, tmp_path):
    data = toys("lacks")
    assert data["lacks"].startswith("nvidia_package_of_another_machine (it is what is measured)")
    assert "\n" not in data["lacks"] and data["lacks"] in written(tmp_path, "lacks")[1]


def test_a_stage_that_breaks_outside_of_its_rows_says_why(toys):
    assert "ZeroDivisionError" in toys("broken")["end"]


def test_a_run_may_go_on_with_the_rows_of_an_earlier_one(toys, tmp_path):
    assert [row["name"] for row in toys("rows", only=("row 1",))["rows"]] == ["row 1"]
    path = tmp_path / "out" / "rows.json"
    data = json.loads(path.read_text())
    data["rows"][0]["found"] = "earlier"
    path.write_text(json.dumps(data))
    rows = {row["name"]: row["found"] for row in toys("rows", go_on=True)["rows"]}
    assert rows == {"row 1": "earlier", "row 0": 1, "row 2": 1}
    data["card"] = {"name": "another"}
    path.write_text(json.dumps(data))
    assert toys("rows", go_on=True)["rows"][1]["found"] == 1, "not of this card"


def test_an_unknown_stage_is_named_with_those_that_there_are():
    command = [sys.executable, "-m", "benchmarks.gpu", "tensorflow"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and f"there are {', '.join(STAGES)}" in done.stderr


# What is measured -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [run_torch, run_ort, run_jax], ids=lambda stage: stage.__name__)
def test_no_two_rows_have_one_name_and_the_first_tells_the_most(stage):
    for rehearsal in (True, False):
        ways = stage.ways(rehearsal)
        assert len({(way.model, way.case, way.precision, way.how) for way in ways}) == len(ways)
    first = ways[0]
    assert (first.model, first.case.graph, first.case.batch) == ("sd", "decode", 1) and first.precision in (
        "fp16",
        "bf16",
    )


def test_pytorch_is_measured_with_everything_crossed():
    ways = set(run_torch.ways(rehearsal=False))
    for model, graph, size, batch, precision, how in itertools.product(
        ("sd", "flux"), ("decode", "encode"), (512, 1024, 2048), (1, 4), ("fp32", "tf32", "bf16", "fp16"),
        ("eager", "channels-last", "compile"),
    ):  # fmt: skip
        assert Way(model, Case(graph, size, batch), precision, how) in ways


@pytest.mark.parametrize("graph", ["encode", "decode"])
def test_one_reference_serves_all_batches(graph):
    config = config_of("flux", (32, 32, 32, 32))
    one, four = (random_input(config, Case(graph, 64, batch)) for batch in (1, 4))
    assert np.array_equal(one[0], four[0]) and not np.array_equal(four[0], four[1])


def test_the_architectures_are_those_of_their_names():
    sd, flux = (config_of(name) for name in ARCHITECTURES)
    assert (sd.latent_channels, sd.use_quant_conv, flux.latent_channels) == (4, True, 16)
    assert not flux.use_quant_conv and not flux.use_post_quant_conv and sd.downscale == flux.downscale == 8


def test_what_is_used_of_pytorch_on_a_gpu_has_these_names():
    cuda = (
        "Event",
        "synchronize",
        "max_memory_allocated",
        "max_memory_reserved",
        "reset_peak_memory_stats",
        "empty_cache",
    )
    assert all(callable(getattr(torch.cuda, name)) for name in cuda) and issubclass(
        torch.OutOfMemoryError, RuntimeError
    )
    modes = {options.get("mode") for options in run_torch.COMPILED.values() if options}
    assert modes <= {*torch._inductor.list_mode_options(), None}


@pytest.mark.parametrize("path", ["engines.py", "run_rtx.py"])
def test_what_is_used_of_tensorrt_rtx_has_these_names(path):
    trt = pytest.importorskip("tensorrt_rtx")
    used = names_in((ROOT / "benchmarks" / "gpu" / path).read_text())
    assert used
    for name in (*used, *OF_TENSORRT_RTX[path]):
        assert operator.attrgetter(name)(trt) is not None


def test_a_file_that_cannot_be_made_says_why(tmp_path):
    for here in (True, False):
        made = Made(tmp_path, small=True, here=here)
        with pytest.raises(NotMade, match=r"onnx-sd-decode-fp16-sideways could not be made: KeyError"):
            made.onnx("sd", "decode", "fp16", "sideways")
        made.close()
        assert not list(made.folder.iterdir())


# Timing and the card --------------------------------------------------------------------------------------------------


def test_time_on_the_device_is_that_between_two_events_around_the_call():
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return 12.5

    cuda = SimpleNamespace(Event=Event, synchronize=lambda: log.append("idle"))
    clock = CudaClock(SimpleNamespace(cuda=cuda))
    host, device = clock.time(lambda: log.append("call"))
    assert log == ["idle", "record", "call", "record", "wait"] and device == 0.0125 and host >= 0


def test_the_median_is_of_calls_behind_the_first(tmp_path):
    seconds = iter([9.0, *itertools.repeat(0.2, 100)])
    clock: Any = SimpleNamespace(time=lambda call: (next(seconds), 0.1))
    made: Any = None  # nothing is asked of it
    stage = Stage("toy", tmp_path, False, made, print, 1e12, frozenset())
    found = timed(lambda: None, clock, stage)
    assert (found["first_seconds"], found["host_ms"], found["device_ms"]) == (9.0, 200.0, 100.0)
    assert 3 <= found["calls"] <= 30 and found["host_ms_most"] == 200.0
    assert "device_ms" not in timed(lambda: None, HostClock(), stage)


def test_nvidia_smi_is_read_and_its_absence_is_no_error(tmp_path, monkeypatch):
    script = tmp_path / "nvidia-smi"
    script.write_text('#!/bin/sh\necho "$1" >&2\necho "1980, 1980, 2619, 45, 310.5, [N/A], 1024"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    state = card.ask(card.STATE)
    assert (state["sm_mhz"], state["watts"], state["busy_percent"]) == (1980.0, 310.5, None)
    assert card.summary([state, {**state, "celsius": 55.0}])["celsius"] == {"median": 50.0, "least": 45.0, "most": 55.0}
    with card.Sampler() as sampler:
        while not sampler.between(0, 1e12):
            pass
    script.write_text("#!/bin/sh\necho 'Field \"x\" is not a valid field to query.'\nexit 2\n")
    assert card.ask(card.STATE) == {}
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert card.ask(card.STATE) == {}


def test_rows_are_held_against_the_peak_and_the_best_of_pytorch():
    case = {"model": "sd", "graph": "decode", "size": 512, "batch": 1, "precision": "fp16"}
    torch_rows = [
        {"name": "peak fp16", "precision": "fp16", "tflops": 800.0},
        {**case, "name": "eager", "host_ms": 20.0},
        {**case, "name": "compile", "host_ms": 10.0},
    ]
    row = {**case, "name": "ours", "host_ms": 25.0, "device_ms": 20.0, "flop": 4e12}
    report.derive([row], torch_rows)
    assert (row["tflops"], row["of_peak"], row["of_best_torch"]) == (200.0, 0.25, 2.5)
    other = {**case, "name": "ours", "host_ms": 25.0, "size": 1024}
    report.derive([other], torch_rows)
    assert "of_best_torch" not in other and "tflops" not in other


# Results --------------------------------------------------------------------------------------------------------------


def test_results_are_listed_and_no_rehearsal_is_among_them():
    page = (ROOT / "docs" / "gpu" / "README.md").read_text()
    folders = [path for path in (ROOT / "docs" / "gpu" / "results").iterdir() if path.is_dir()]
    for folder in folders:
        assert f"results/{folder.name}" in page, f"{folder.name} is not in the table of docs/gpu/README.md"
        for path in folder.glob("*.json"):
            data = json.loads(path.read_text())
            assert not data["rehearsal"] and data["card"], path
    assert bool(folders) != ("none of these stages has run on a GPU yet" in page)


# Rehearsal ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """rehearsed(python): the results of all stages in that Python; model files are made once, where PyTorch is."""
    place = tmp_path_factory.mktemp("rehearsal")

    def rehearse(python):
        out = place / Path(python).parents[1].name.strip(".")
        command = [
            str(python),
            "-m",
            "benchmarks.gpu",
            "--rehearse",
            "--out",
            str(out),
            "--models",
            str(place / "models"),
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        return out, {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}

    first = functools.cache(lambda: rehearse(sys.executable))
    return lambda python=None: first() if python is None else first() and rehearse(python)


@pytest.mark.slow
def test_every_stage_is_rehearsed_without_a_failure(rehearsed):
    """What needs a GPU runs over NVIDIA's packages as tests/fakes has them; all else as it is."""
    out, results = rehearsed()
    assert set(results) == {*STAGES, "rtx-faked", "trt-faked"}
    for stage, data in results.items():
        assert data["end"] == "complete" and all(row["rehearsal"] for row in data["rows"]), stage
        assert (out / f"{stage}.md").read_text().count("A rehearsal on the CPU") == 1
    for stage in ("torch", "ort", "jax", "dataset", "trt-faked"):
        assert results[stage]["rows"] and not any("lacks" in row for row in results[stage]["rows"]), stage
    assert results["trt"]["lacks"] and all("lacks" in row for row in results["tests"]["rows"])


@pytest.mark.slow
def test_it_is_rehearsed_with_the_packages_of_such_a_machine(rehearsed):
    """In Python 3.12, with the versions that were seen there, but for PyTorch."""
    python = os.environ.get("PYTHON312", "python3.12")
    if subprocess.run(["sh", "-c", f"{python} --version"], capture_output=True).returncode:
        pytest.skip(f"there is no {python} here; PYTHON312 names one")
    subprocess.run(["make", ".venv312/ready", f"PYTHON312={python}"], cwd=ROOT, check=True, capture_output=True)
    interpreter = ROOT / ".venv312" / "bin" / "python"
    sources = ("runtimes", "vae_export", "benchmarks", "tools", "tests")
    subprocess.run([interpreter, "-m", "compileall", "-q", *sources], cwd=ROOT, check=True)
    _, results = rehearsed(interpreter)
    assert "torch" in results["torch"]["lacks"] and "torch" in results["tests"]["lacks"]
    for stage in ("ort", "jax", "rtx-faked", "trt-faked"):
        assert results[stage]["rows"] and not any("lacks" in row for row in results[stage]["rows"]), stage
