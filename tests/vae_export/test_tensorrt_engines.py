"""Our graphs in the real TensorRT-RTX, which builds engines where there is no GPU, though it cannot run them there.

Tests vae_export/targets/engine_memory.py, vae_export/targets/engines.py, vae_export/targets/tensorrt.py.
"""

import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from runtimes import Bundle, open_vae
from runtimes.errors import BackendUnavailable, CompatibilityError, ConfigError, NumericsError, OutOfMemoryError
from runtimes.manifest import Engine
from runtimes.names import GRAPHS
from runtimes.tensorrt.builder import BuildJob, build, build_plan
from runtimes.tensorrt.flavours import load_flavour, system
from runtimes.tensorrt.profiles import DEFAULT, Profile, Range, parse_profile
from tests.helpers.forms import FORMS
from vae_export import export_bundle
from vae_export.comparison import THRESHOLDS, Thresholds
from vae_export.families.autoencoder_kl import activation_places
from vae_export.rewrites.form import Form
from vae_export.targets.engine_memory import activation_bytes, check_memory, estimate_memory, largest_fitting
from vae_export.targets.engines import plan_engine, rebuild_bundle
from vae_export.targets.onnx_graphs import export_onnx

try:
    load_flavour("tensorrt-rtx")
except BackendUnavailable as reason:
    pytest.skip(str(reason), allow_module_level=True)

pytestmark = pytest.mark.engines

GPUS = ("sm86", "sm89", "sm120")
PROFILE = "1..2x64..128x64..128"
#: what ONNX and TensorRT bundles hold, and every other form in half precision, which `tune` may choose
BUILT = {(form, precision) for (target, precision), form in FORMS.items() if target in ("onnx", "tensorrt-rtx")}
BUILT |= {(Form(), precision) for precision in ("fp32", "fp16", "bf16")}
BUILT |= {(form, "fp16") for form in (*FORMS.values(), Form(upsample="deconv", norm="rows", last_block="lean"))}


def named(part):
    return part if isinstance(part, str) else "-".join(map(str, part))


def job(spec, graph, channels, profile=PROFILE, **options):
    shapes = parse_profile(profile, 8).shapes(graph, channels, 8)
    return BuildJob("tensorrt-rtx", spec.input.name, (tuple(shapes),), **options)


def exported(model, graph, path, precision, form):
    spec = export_onnx(model, graph, path, precision=precision, form=form)
    return spec, path.read_bytes()


@pytest.mark.parametrize(
    ("form", "precision"), sorted(BUILT), ids=lambda part: part if isinstance(part, str) else "-".join(map(str, part))
)
def test_every_form_that_is_exported_builds(tiny_model, tmp_path, form, precision):
    for graph in GRAPHS:
        spec, data = exported(tiny_model, graph, tmp_path / f"{graph}.onnx", precision, form)
        plan = build(data, job(spec, graph, int(spec.input.shape[1]), gpus=GPUS), lambda *_: None)
        assert len(plan) > 10_000


def test_transposed_convolution_in_bf16_is_refused(tiny_model, tmp_path):
    """No kernel for it: no target that TensorRT opens is exported in this form."""
    spec, data = exported(tiny_model, "decoder", tmp_path / "m.onnx", "bf16", Form(upsample="deconv"))
    with pytest.raises(CompatibilityError, match="the decoder: tensorrt_rtx"):
        build_plan(data, job(spec, "decoder", 4), "decoder")
    assert not [at for at, form in FORMS.items() if at[0].startswith("tensorrt") and form.upsample == "deconv"]


@pytest.mark.parametrize("profile", ["1x512x512", "1..2x256..320x256"])
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_attention_in_blocks_builds_where_sizes_are_fixed(tiny_model, tmp_path, precision, profile):
    spec, data = exported(tiny_model, "encoder", tmp_path / "m.onnx", precision, FORMS["tensorrt-rtx", precision])
    assert build(data, job(spec, "encoder", 3, profile=profile), lambda *_: None)


def test_refused_operators_are_named_with_their_node():
    """ONNX's own Attention, which TensorRT takes for small heads only: the reason for ours from MatMul and Softmax."""
    sides = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, [1, 1, 64, 512]) for name in "qkvy"]
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], name="the_node")
    graph = helper.make_graph([node], "g", sides[:3], sides[3:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    shape = (1, 1, 64, 512)
    with pytest.raises(CompatibilityError, match=r"the decoder: tensorrt_rtx 1\..*"):
        build_plan(model.SerializeToString(), BuildJob("tensorrt-rtx", "q", ((shape,) * 3,)), "decoder")
    graph.node[0].op_type = "NotAnOperator"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    with pytest.raises(CompatibilityError, match=r"the_node \(NotAnOperator\)"):
        build_plan(model.SerializeToString(), BuildJob("tensorrt-rtx", "q", ((shape,) * 3,)), "decoder")


@pytest.mark.parametrize("data", [b"", b"garbage", b"\x08\x0a" * 1000], ids=["nothing", "garbage", "protobuf"])
def test_what_is_no_graph_is_refused(data):
    with pytest.raises(CompatibilityError, match="the graph of the encoder is not a whole ONNX model"):
        build_plan(data, BuildJob("tensorrt-rtx", "sample", (((1, 3, 64, 64),) * 3,)), "encoder")


@pytest.mark.parametrize("gpus", [("sm61",), ("sm89", "sm90"), ("h100",), ("none",)])
def test_a_gpu_that_it_does_not_build_for_is_refused_with_those_that_it_does(tiny_model, tmp_path, gpus):
    spec, data = exported(tiny_model, "encoder", tmp_path / "m.onnx", "fp16", FORMS["tensorrt-rtx", "fp16"])
    with pytest.raises(ConfigError, match=rf"does not build for '{gpus[-1]}', only for .*sm89"):
        build_plan(data, job(spec, "encoder", 3, gpus=gpus), "encoder")


# Bundles ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rtx_bundle(tiny_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("rtx") / "bundle"
    engine = plan_engine("tensorrt-rtx", [parse_profile(PROFILE, 8)], ["sm89", "sm120"])
    steps = []
    export_bundle(tiny_model, path, target="tensorrt-rtx", engine=engine, progress=lambda what, *_: steps.append(what))
    assert any(step.startswith("Building the decoder: ") for step in steps), "progress comes from the builder"
    return path


def test_a_bundle_holds_plans_and_the_graphs_that_they_were_built_from(rtx_bundle):
    bundle = Bundle(rtx_bundle)
    bundle.verify()
    manifest = bundle.manifest
    assert (manifest.target, manifest.precision) == ("tensorrt-rtx", "fp16")
    for graph in GRAPHS:
        assert manifest.graphs[graph].file == f"vae_{graph}/model.plan"
        kept = onnx.load_model_from_string(bundle.read(f"vae_{graph}/model.onnx"))
        kernels = [tensor for tensor in kept.graph.initializer if len(tensor.dims) == 4 and tensor.dims[0] > 1]
        assert {tensor.data_type for tensor in kernels} == {TensorProto.FLOAT16}
    version = load_flavour("tensorrt-rtx").version
    profile = Profile(Range(1, 1, 2), Range(64, 128, 128), Range(64, 128, 128))
    assert manifest.engine == Engine("tensorrt-rtx", version, ("sm89", "sm120"), system(), (profile,))
    assert manifest.tools["tensorrt-rtx"] == version


def test_the_graph_inside_is_compared_and_the_plan_said_not_to_have_been_run(rtx_bundle):
    validation = Bundle(rtx_bundle).manifest.validation
    assert {m["by"] for m in validation["measurements"]} == {"simulated fp16", "onnxruntime"}
    sizes = {
        by: {tuple(m["shape"][2:]) for m in validation["measurements"] if (m["graph"], m["by"]) == ("encoder", by)}
        for by in ("simulated fp16", "onnxruntime")
    }
    assert sizes["onnxruntime"] == {(64, 64), (96, 96)}, "sizes within the profile"
    assert (8, 8) in sizes["simulated fp16"], "small sizes, since it takes any and is slow"
    assert "no NVIDIA GPU" in validation["not_run"]


def test_opening_it_without_a_gpu_says_what_is_missing(rtx_bundle):
    with pytest.raises(BackendUnavailable, match="NVIDIA GPU"):
        open_vae(rtx_bundle)
    with pytest.raises(CompatibilityError, match=r"onnxruntime does not open tensorrt-rtx bundles; tensorrt-rtx does"):
        open_vae(rtx_bundle, backend="onnxruntime")


def test_rebuilding_for_this_machine_keeps_profiles_and_graphs(rtx_bundle, tmp_path):
    made = rebuild_bundle(rtx_bundle, tmp_path / "again")
    made.verify()
    before = Bundle(rtx_bundle).manifest
    assert made.manifest.engine == replace(before.engine, gpus=())
    assert made.manifest.files["vae_decoder/model.onnx"] == before.files["vae_decoder/model.onnx"]
    assert made.manifest.validation["verdict"] == "skipped"


def test_rebuilding_needs_plans(tiny_bundle, tmp_path):
    with pytest.raises(CompatibilityError, match="no plans to rebuild"):
        rebuild_bundle(tiny_bundle, tmp_path / "again")


def test_where_the_graph_is_too_far_from_the_model_nothing_is_left(tiny_model, tmp_path, monkeypatch):
    engine = plan_engine("tensorrt-rtx", [parse_profile(PROFILE, 8)], ["sm89"])
    monkeypatch.setitem(THRESHOLDS, "fp32", Thresholds(psnr_db=1000.0, uint8_steps=1, noise_psnr_db=1000.0))
    with pytest.raises(NumericsError):
        export_bundle(tiny_model, tmp_path / "b", target="tensorrt-rtx", precision="fp32", engine=engine)
    assert list(tmp_path.iterdir()) == []


def test_profiles_are_for_engines(tiny_model, tmp_path):
    engine = Engine("tensorrt-rtx", "1", (), "linux", (DEFAULT,))
    with pytest.raises(ConfigError, match="planned for tensorrt-rtx, and the target is onnx"):
        export_bundle(tiny_model, tmp_path / "b", engine=engine)


def test_tensorrt_itself_has_to_be_here():
    try:
        load_flavour("tensorrt")
    except BackendUnavailable:
        with pytest.raises(BackendUnavailable, match=re.escape("pip install 'vae-export[tensorrt]'")):
            plan_engine("tensorrt")


# Memory -----------------------------------------------------------------------------------------------------------


def alive_at_once(path, x):
    """Bytes of the tensors of a graph that are alive at once, as it is written, one operation after the other."""
    model = onnx.load(path)
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer}
    # Not those of constants, and not the half of a SiLU, which every runtime computes in one pass.
    left_out = ("Constant", "Sigmoid")
    constants = {name for node in graph.node if node.op_type in left_out for name in node.output}
    last = {name: index for index, node in enumerate(graph.node) for name in node.input}
    results = [name for node in graph.node for name in node.output if name and name not in constants]
    del graph.output[:]
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in results)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    sizes = {
        name: result.nbytes for name, result in zip(results, session.run(None, {graph.input[0].name: x}), strict=True)
    }
    alive, most = set(), 0
    for index, node in enumerate(graph.node):
        alive |= {name for name in node.output if name in sizes} - weights
        most = max(most, sum(sizes[name] for name in alive))
        alive = {name for name in alive if last.get(name, -1) > index}
    return most


@pytest.mark.parametrize("graph", GRAPHS)
def test_the_estimate_is_what_the_graph_as_written_holds_at_once(tiny_model, tmp_path, graph):
    """Within a third: what a runtime fuses is not known, and the estimate is for refusing what cannot fit at all."""
    form = Form(upsample="deconv")
    export_onnx(tiny_model, graph, tmp_path / "m.onnx", form=form)
    height, width, batch = 128, 192, 2
    shape = (batch, 3, height, width) if graph == "encoder" else (batch, 4, height // 8, width // 8)
    counted = alive_at_once(tmp_path / "m.onnx", np.zeros(shape, np.float32))
    estimate = activation_bytes(
        tiny_model.config, activation_places, graph, batch, height, width, form=form, precision="fp32"
    )
    assert 2 / 3 <= estimate / counted <= 4 / 3


def test_scores_of_attention_count_and_blocks_save_them(tiny_model):
    sizes = 1, 4096, 4096
    whole, blocks = (
        activation_bytes(
            tiny_model.config, activation_places, "decoder", *sizes, form=Form(attention_blocks=n), precision="fp16"
        )
        for n in (1, 16)
    )
    tokens = 512 * 512
    assert whole > 2 * tokens**2 * 2  # scores and their softmax, two bytes each
    assert whole / blocks > 10


class Gpu8GB:
    index = 0

    def free_memory(self):
        return 7 << 30, 8 << 30


def test_a_profile_that_cannot_fit_is_refused_with_the_largest_that_would(tiny_model):
    config = tiny_model.config
    form = FORMS["tensorrt", "fp32"]
    profile = parse_profile("1..4x512..16384x512..16384", 8)
    engine = Engine("tensorrt", "11", ("sm89",), "linux", (DEFAULT, profile))
    estimates = estimate_memory(engine, config, activation_places, form, "fp32")
    fitting = largest_fitting(config, 8, activation_places, form, "fp32")
    with pytest.raises(
        OutOfMemoryError, match=r"1\.\.4 x 512\.\.16384.* has 8\.0; the largest profile that fits"
    ) as error:
        check_memory(estimates, fitting, Gpu8GB())
    found = fitting(profile, 8 << 30)
    assert str(found) in str(error.value)
    assert (
        max(
            e.bytes
            for e in estimate_memory(replace(engine, profiles=(found,)), config, activation_places, form, "fp32")
        )
        <= 8 << 30
    )
    more = replace(found, height=replace(found.height, max=found.height.max + 512))
    assert (
        max(
            e.bytes for e in estimate_memory(replace(engine, profiles=(more,)), config, activation_places, form, "fp32")
        )
        > 8 << 30
    )
    check_memory(estimates, fitting, None)  # no GPU, no limit


# The command line -------------------------------------------------------------------------------------------------


def command(*arguments, cwd):
    run = [sys.executable, "-c", "from vae_export.cli.main import main; main()", *arguments]
    return subprocess.run(run, cwd=cwd, capture_output=True, text=True, check=False)


def test_the_command_builds_for_ranges_as_people_say_them(tmp_path):
    options = "--height 256..320 --width 256 --batch 1..2 --opt 1x256x256 --gpu sm89 --no-validate --json"
    done = command("--to", "tensorrt-rtx", *options.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    manifest = json.loads(done.stdout)["manifest"]
    assert manifest["precision"] == "fp16"
    assert manifest["engine"]["gpus"] == ["sm89"]
    assert manifest["engine"]["profiles"] == [
        Profile(Range(1, 1, 2), Range(256, 256, 320), Range(256, 256, 256)).to_dict()
    ]
    assert re.search(r"decoder at 2 x 320 x 256: about 0\.\d\d GiB of device memory", done.stderr)
    assert (tmp_path / "vae-tensorrt-rtx-fp16" / "vae_decoder" / "model.plan").stat().st_size > 1e6


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        ("--height 250..512", 4, "height 250 of a profile is not a multiple of 8; take 256"),
        ("--height 512..256", 4, "begins above its end; write 256..512"),
        ("--opt 1x2048x2048", 4, "best at 2048"),
        ("--profile 1x2", 4, "is not BATCHxHEIGHTxWIDTH"),
        ("--profile 1x512x512 --height 512", 2, "--profile says all sizes"),
        ("--gpu sm12 --height 64", 4, "does not build for 'sm12'"),
        ("--precision int8", 4, "tensorrt-rtx bundles are made in fp16, fp32, bf16, not in int8"),
    ],
)
def test_bad_ranges_are_refused_with_the_way_out(tmp_path, options, code, told):
    done = command("--to", "tensorrt-rtx", "--no-validate", *options.split(), cwd=tmp_path)
    assert (done.returncode, list(tmp_path.iterdir())) == (code, [])
    assert told in " ".join(re.sub(r"[│╭╮╰╯─]", " ", done.stderr).split())
    assert "Traceback" not in done.stderr
