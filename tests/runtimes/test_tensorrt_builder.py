"""The builder in its process: what it reports, what it refuses and how, and what is left when it dies.

NVIDIA's packages are those of `tests/fakes`, but for the last part: TensorRT-RTX builds without a GPU.

Tests runtimes/tensorrt/builder.py.
"""

import json
import os
import re
import sys
import time

import onnx
import pytest
from onnx import TensorProto, helper

from runtimes import BackendUnavailable, CompatibilityError, ConfigError, OutOfMemoryError, VaeError
from runtimes.tensorrt import builder as tensorrt_builder
from runtimes.tensorrt.builder import BuildJob, build_plan
from runtimes.tensorrt.flavours import load_flavour
from runtimes.tensorrt.profiles import parse_profile
from tests.helpers.nvidia_fakes import FAKES
from vae_export.options import ExportOptions
from vae_export.targets import target_named
from vae_export.targets.engines import plan_engine, rebuild_bundle

SMALLEST, BEST, LARGEST = (1, 4, 8, 8), (1, 4, 16, 16), (2, 4, 32, 32)
JOB = BuildJob("tensorrt", "x", ((SMALLEST, BEST, LARGEST),))
RTX = BuildJob("tensorrt-rtx", "x", ((SMALLEST, BEST, LARGEST),))


def graph(name="graph", *nodes):
    """x [b, 4, h, w] -> y, as bytes."""
    nodes = nodes or [helper.make_node("Relu", ["x"], ["y"], name="relu")]
    ends = [[helper.make_tensor_value_info(end, TensorProto.FLOAT, ["b", 4, "h", "w"])] for end in ("x", "y")]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("mine", 1)]
    made = helper.make_model(helper.make_graph(list(nodes), name, *ends), opset_imports=opsets, ir_version=10)
    return made.SerializeToString()


UNKNOWN = graph(
    "unknown",
    helper.make_node("Frobnicate", ["x"], ["z"], name="/decoder/norm/Frobnicate", domain="mine"),
    helper.make_node("Twist", ["z"], ["y"], name="/decoder/conv/Twist", domain="mine"),
)


@pytest.fixture
def temporary(monkeypatch, tmp_path):
    """Where builders keep their files; at the end nothing is left there."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield tmp_path
    assert os.listdir(tmp_path) == []


@pytest.fixture
def unchecked(monkeypatch):
    """Graphs of a domain of their own get as far as TensorRT's parser: what refuses them before has test_onnx_scan."""
    monkeypatch.setattr("runtimes.tensorrt.builder.check_onnx", lambda *_: None)


pytestmark = pytest.mark.usefixtures("temporary", "unchecked")


def header(plan):
    """What the fake builder was told."""
    length = int.from_bytes(plan[8:12], "little")
    return json.loads(plan[12 : 12 + length])


# What arrives -----------------------------------------------------------------------------------------------------


def test_a_plan_is_built_for_the_profiles_and_progress_is_told(fake_gpu):
    reports = []
    other = ((1, 4, 8, 8),) * 3
    plan = build_plan(
        graph(), BuildJob("tensorrt", "x", (*JOB.profiles, other)), "decoder", lambda *r: reports.append(r)
    )
    assert header(plan)["profiles"] == [[list(shape) for shape in profile] for profile in (*JOB.profiles, other)]
    assert header(plan)["flavour"] == "tensorrt" and plan.endswith(graph())
    assert reports[0] == ("Building the decoder: reading the graph", 0, 1)
    assert [(done, total) for what, done, total in reports if what.endswith("Tactic Selection")] == [
        (step, 3) for step in range(4)
    ]
    assert all(what.startswith("Building the decoder: ") and 0 <= done <= total for what, done, total in reports)


def test_what_libraries_print_does_not_come_between(fake_gpu, capfd):
    reports = []
    plan = build_plan(graph("noisy"), JOB, "decoder", lambda *report: reports.append(report))
    assert plan.endswith(graph("noisy")) and len(reports) > 3
    assert capfd.readouterr() == ("", "")


def test_lines_that_are_not_ours_are_passed_over():
    class Process:
        stdout = iter(["5\n", "null\n", "{\n", "[]\n", '{"note": 1}\n', '{"phase": "p", "done": 1, "total": 2}\n'])

    reports = []
    assert tensorrt_builder._follow(Process(), "encoder", lambda *report: reports.append(report)) is None
    assert reports == [("Building the encoder: p", 1, 2)]


def test_what_was_timed_is_kept_and_read_again(fake_gpu, tmp_path_factory):
    path = tmp_path_factory.mktemp("cache") / "timing"
    for kept in (b".", b".."):
        build_plan(graph(), JOB.with_timing_cache(path), "decoder")
        assert path.read_bytes() == kept
        assert os.listdir(path.parent) == ["timing"]
    build_plan(graph(), JOB.with_timing_cache(path.parent / "none" / "timing"), "decoder")  # only slower


# What is refused --------------------------------------------------------------------------------------------------


def test_a_graph_that_the_parser_refuses_is_named_by_its_nodes(fake_gpu):
    with pytest.raises(CompatibilityError) as error:
        build_plan(UNKNOWN, JOB, "decoder")
    says = "the decoder: tensorrt 11.4.0.1 does not take the graph: "
    says += "/decoder/norm/Frobnicate (Frobnicate): No importer registered for op: Frobnicate; "
    says += "/decoder/conv/Twist (Twist): No importer registered for op: Twist"
    assert str(error.value) == says


def test_what_is_no_graph_at_all_is_refused(fake_gpu):
    with pytest.raises(CompatibilityError, match=r"does not take the graph: .*Failed to parse the ONNX model"):
        build_plan(b"garbage", JOB, "decoder")


@pytest.mark.parametrize("profile", [(LARGEST, BEST, SMALLEST), (SMALLEST, LARGEST, BEST)])
def test_a_profile_that_tensorrt_does_not_take_is_named(fake_gpu, profile):
    """It answers -1, and nothing else."""
    low, high = ("x".join(map(str, shape)) for shape in (profile[0], profile[2]))
    with pytest.raises(ConfigError, match=f"tensorrt 11.4.0.1 does not take the profile {low} to {high}"):
        build_plan(graph(), BuildJob("tensorrt", "x", (profile,)), "decoder")


def test_a_build_that_gives_nothing_is_refused_in_tensorrts_own_words(fake_gpu):
    with pytest.raises(CompatibilityError, match="could not build the engine: a profile lacks an input"):
        build_plan(graph(), BuildJob("tensorrt", "another", JOB.profiles), "decoder")


def test_gpus_are_for_rtx_and_those_that_it_has(fake_gpu):
    def job(flavour, *gpus):
        return BuildJob(flavour, "x", JOB.profiles, gpus)

    with pytest.raises(ConfigError, match="--gpu is for tensorrt-rtx"):
        build_plan(graph(), job("tensorrt", "sm89"), "decoder")
    for gpu in ("sm90", "current", "__doc__"):
        with pytest.raises(ConfigError, match=f"does not build for '{gpu}', only for sm120, sm121, sm75, sm80, sm86,"):
            build_plan(graph(), job("tensorrt-rtx", "sm89", gpu), "decoder")
    assert build_plan(graph(), job("tensorrt-rtx", "sm89", "sm120"), "decoder").endswith(graph())


# A process that dies ----------------------------------------------------------------------------------------------


def test_a_builder_that_crashes_is_said_to_have_crashed(fake_gpu):
    with pytest.raises(CompatibilityError, match=r"tensorrt crashed while it built the decoder \(signal SIGSEGV\)"):
        build_plan(graph("crash"), JOB, "decoder")


def test_one_that_was_killed_ran_out_of_memory(fake_gpu):
    with pytest.raises(OutOfMemoryError, match="the process that built the decoder was killed, as the system does"):
        build_plan(graph("killed"), JOB, "decoder")


def test_one_that_has_a_bug_says_its_last_words(fake_gpu, tmp_path_factory, monkeypatch):
    broken = tmp_path_factory.mktemp("broken")
    (broken / "fake_tensorrt.py").write_text("raise RuntimeError('what a day')")
    monkeypatch.setenv("PYTHONPATH", f"{broken}:{FAKES}")
    with pytest.raises(BackendUnavailable, match=r"the decoder: tensorrt does not load \(what a day\)"):
        build_plan(graph(), JOB, "decoder")
    (broken / "fake_tensorrt.py").write_text("raise SystemExit('gone')")
    with pytest.raises(CompatibilityError, match=r"crashed .* \(exit code 1\); its last output: gone\. Another"):
        build_plan(graph(), JOB, "decoder")


def test_a_full_disk_is_called_that(fake_gpu, tmp_path_factory, monkeypatch):
    shim = tmp_path_factory.mktemp("full")
    (shim / "sitecustomize.py").write_text(
        "import pathlib\ndef full(*_): raise OSError(28, 'No space left on device')\npathlib.Path.write_bytes = full\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{shim}:{FAKES}")
    with pytest.raises(VaeError, match=r"the decoder: No space left on device in .*\$TMPDIR names another place"):
        build_plan(graph(), JOB, "decoder")


def test_a_crash_leaves_the_old_bundle_and_no_new_one(bundle_copy, tensorrt_bundle, fake_gpu, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    old = out / "b"
    tensorrt_bundle("tensorrt")  # built before, with its own fakes
    crashing = onnx.load(tensorrt_bundle("tensorrt") / "vae_decoder" / "model.onnx")
    crashing.graph.name = "crash"

    def to_tensorrt(manifest):
        engine = plan_engine("tensorrt", [parse_profile("1x64x64", 8)])
        manifest |= {"target": "tensorrt", "engine": engine.to_dict()}

    path = bundle_copy(to_tensorrt, {"vae_decoder/model.onnx": crashing.SerializeToString()})
    path.rename(old)
    before = {file: file.read_bytes() for file in old.rglob("*") if file.is_file()}
    for target in (old, out / "new"):
        with pytest.raises(CompatibilityError, match="crashed while it built the decoder"):
            rebuild_bundle(old, target, overwrite=True)
    assert os.listdir(out) == ["b"]
    assert {file: file.read_bytes() for file in old.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, ZeroDivisionError])
def test_an_interruption_ends_the_process_at_once(fake_gpu, monkeypatch, interruption):
    started = []

    class Builder(tensorrt_builder._Builder):
        def __init__(self, directory):
            super().__init__(directory)
            started.append(self)

    monkeypatch.setattr(tensorrt_builder, "_Builder", Builder)

    def interrupt(what, done, total):
        if what.endswith("Tactic Selection"):
            raise interruption

    begin = time.monotonic()
    with pytest.raises(interruption):
        build_plan(graph("slow"), JOB, "decoder", interrupt)  # which would take a minute
    assert time.monotonic() - begin < 30
    assert started[0].returncode == -9


def test_where_tensorrt_is_missing_no_process_is_started(fake_gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr(tensorrt_builder, "_Builder", lambda directory: pytest.fail("a process was started"))
    with pytest.raises(BackendUnavailable, match=re.escape("pip install 'vae-export[tensorrt]'")):
        build_plan(graph(), JOB, "decoder")


# What will be built -----------------------------------------------------------------------------------------------


def test_what_is_built_follows_from_the_gpu_that_is_here(fake_gpu):
    assert plan_engine("tensorrt").gpus == plan_engine("tensorrt-rtx").gpus == ("sm89",)
    assert plan_engine("tensorrt-rtx", gpus=["sm86", "sm120"]).gpus == ("sm86", "sm120")
    with pytest.raises(ConfigError, match="--gpu is for --to tensorrt-rtx"):
        plan_engine("tensorrt", gpus=["sm89"])
    fake_gpu.count = 0
    assert plan_engine("tensorrt-rtx").gpus == (), "all that it takes"
    with pytest.raises(BackendUnavailable, match="none can be used here; --to tensorrt-rtx builds"):
        plan_engine("tensorrt")


def test_a_profile_that_does_not_fit_the_gpu_is_refused_with_the_largest_that_would(tiny_model, fake_gpu):
    engine = plan_engine("tensorrt", [parse_profile("1x64..4096x64..8192", 8)])

    def estimates(engine):
        options = ExportOptions(target="tensorrt", precision="fp32", engine=engine)
        return target_named("tensorrt").estimates(tiny_model, options)

    fits = estimates(plan_engine("tensorrt", [parse_profile("1x64x64", 8)]))
    assert [estimate.graph for estimate in fits] == ["encoder", "decoder"]
    fake_gpu.total = 1 << 30
    with pytest.raises(
        OutOfMemoryError, match=r"needs about .* GiB, and cuda:0 has 1.0; the largest profile that fits: "
    ) as error:
        estimates(engine)
    batch, height, width = re.search(r"that fits: (\d+) x 64..(\d+) x 64..(\d+)", str(error.value)).groups()
    largest = parse_profile(f"{batch}x64..{height}x64..{width}", 8)
    assert estimates(plan_engine("tensorrt", [largest]))
    assert int(width) == pytest.approx(2 * int(height), abs=8), "in the proportions that were asked for"
    larger = parse_profile(f"{batch}x64..{int(height) + 16}x64..{int(width) + 16}", 8)
    with pytest.raises(OutOfMemoryError):
        estimates(plan_engine("tensorrt", [larger]))


# The real TensorRT-RTX, which builds without a GPU ----------------------------------------------------------------


@pytest.fixture
def real():
    try:
        return load_flavour("tensorrt-rtx")
    except BackendUnavailable as error:
        pytest.skip(str(error))


def test_the_real_one_builds_and_reports(real):
    reports = []
    job = BuildJob("tensorrt-rtx", "x", JOB.profiles, ("sm86", "sm89", "sm120"))
    assert len(build_plan(graph(), job, "decoder", lambda *report: reports.append(report))) > 1000
    assert reports[0] == ("Building the decoder: reading the graph", 0, 1) and len(reports) > 3
    assert all(0 <= done <= total and total > 0 for _, done, total in reports)


def test_the_real_ones_refusals_name_node_and_reason(real):
    with pytest.raises(CompatibilityError) as error:
        build_plan(UNKNOWN, RTX, "decoder")
    said = str(error.value)
    assert said.startswith(f"the decoder: tensorrt_rtx {real.version} does not take the graph: /decoder/norm/Frob")
    assert "(Frobnicate): " in said and "Plugin not found" in said
    with pytest.raises(
        CompatibilityError, match=r"does not take the graph: the graph: .*Failed to parse the ONNX model"
    ):
        build_plan(b"garbage", RTX, "decoder")
    with pytest.raises(ConfigError, match=r"does not take the profile 2x4x32x32 to 1x4x8x8: .*MIN<=OPT<=MAX"):
        build_plan(graph(), BuildJob("tensorrt-rtx", "x", ((LARGEST, BEST, SMALLEST),)), "decoder")
    with pytest.raises(CompatibilityError, match=r"could not build the engine: .*x is missing dimensions in profile 0"):
        build_plan(graph(), BuildJob("tensorrt-rtx", "another", JOB.profiles), "decoder")
    with pytest.raises(ConfigError, match="does not build for 'sm90', only for sm120, "):
        build_plan(graph(), BuildJob("tensorrt-rtx", "x", JOB.profiles, ("sm90",)), "decoder")
