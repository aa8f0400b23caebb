"""A TensorRT bundle: what ONNX Runtime's tests promise of every backend, and what is its own.

NVIDIA's packages are those of `tests/fakes`, which keep to the rules of the real ones; `test_gpu.py` has the real ones.

Tests runtimes/tensorrt/execution.py, runtimes/tensorrt/flavours.py, runtimes/tensorrt/runtime.py.
"""

import importlib
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from runtimes import (
    BackendUnavailable,
    Bundle,
    BundleError,
    CompatibilityError,
    ConfigError,
    IntegrityError,
    OutOfMemoryError,
    ShapeError,
    VaeError,
    open_vae,
)
from runtimes.tensorrt import flavours as tensorrt_flavours
from runtimes.tensorrt.profiles import parse_profile
from runtimes.tensorrt.runtime import TensorRtRtxVae, TensorRtVae
from tests.helpers.backend_contract import BackendContract
from tests.helpers.inputs import TOLERANCE, images, latents, results
from tests.helpers.nvidia_fakes import FAKES
from tests.helpers.without_torch import USE
from vae_export import AutoencoderKL, export_bundle
from vae_export.targets.engines import plan_engine

pytestmark = pytest.mark.usefixtures("fake_gpu")

PLAN = "vae_decoder/model.plan"
NARROW, WIDE = "1x8..64x8..64@1x64x64", "1..4x64..512x64..512@1x512x512"


@pytest.fixture(scope="session")
def tiny_bundle(tensorrt_bundle):
    """Instead of the ONNX bundle: `vae` and `bundle_copy` are made of this one here."""
    return tensorrt_bundle("tensorrt")


@pytest.fixture
def vae(tiny_bundle, fake_gpu):
    """The tiny bundle, opened for this test alone."""
    with open_vae(tiny_bundle) as runtime:
        yield runtime


@pytest.fixture
def rtx(tensorrt_bundle, fake_gpu):
    """rtx(options): the tiny model's bundle for TensorRT-RTX, opened."""
    return lambda **options: open_vae(tensorrt_bundle("tensorrt-rtx"), **options)


@pytest.fixture
def parsed(fake_gpu, monkeypatch):
    """All plans that reach TensorRT's parser, in a list."""
    seen, runtime = [], importlib.import_module("tensorrt").Runtime
    read = runtime.deserialize_cuda_engine
    monkeypatch.setattr(runtime, "deserialize_cuda_engine", lambda self, data: seen.append(data) or read(self, data))
    return seen


class TestTensorRt(BackendContract):
    backend = "tensorrt"
    files = (PLAN.replace("decoder", "encoder"), PLAN)
    count_options = ("contexts", "max_graphs", "cache_bytes")
    unknown_devices = ("cpu", "cuda:", "cuda:x", "gpu", "")
    known_devices = "'cuda' or 'cuda:N'"
    loads = frozenset({"tensorrt", "cuda"})
    needs = ("tensorrt",)
    extra = "tensorrt"
    use = f"sys.path.insert(0, {str(FAKES)!r})\n{USE}"

    @pytest.fixture
    def opened(self, vae):
        """For one test: the fake GPU is there for one test."""
        return vae

    def test_what_was_built_is_at_hand(self, opened, rtx):
        assert opened.device == "cuda"
        assert [str(profile) for profile in opened.profiles] == ["1..8 x 8..1536 x 8..1536 (best at 1x64x64)"]
        with rtx() as other:
            assert other.backend == "tensorrt-rtx"


def test_an_exported_bundle_was_run_and_compared(tmp_path, fake_gpu):
    """All of the way, with a model that exports fast."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=2,
            sample_size=16,
            scaling_factor=1.0,
        )
    engine = plan_engine("tensorrt", profiles=[parse_profile("1..2x16..64x16..64", 2)])
    export_bundle(model, tmp_path / "b", target="tensorrt", precision="fp32", engine=engine)
    bundle = Bundle(tmp_path / "b")
    bundle.verify()
    manifest = bundle.manifest
    assert manifest.engine == engine and manifest.engine.gpus == ("sm89",)
    assert manifest.tools["tensorrt"] == engine.version
    assert manifest.validation["verdict"] == "passed" and "not_run" not in manifest.validation
    assert {m["by"] for m in manifest.validation["measurements"]} == {"onnxruntime", "tensorrt"}
    assert {f"vae_{graph}/model.{kind}" for graph in ("encoder", "decoder") for kind in ("onnx", "plan")} <= {
        *manifest.files
    }


# Memory -----------------------------------------------------------------------------------------------------------


def test_memory_is_that_of_the_shape_at_hand_and_given_back(tiny_bundle, fake_gpu):
    with open_vae(tiny_bundle) as vae:
        assert fake_gpu.used == 0, "the engines are loaded, and nothing was asked of them"
        for use, make in ((vae.decode, latents), (vae.encode, images)):
            before = fake_gpu.used
            use(make(1, 32, 32))
            large = fake_gpu.used - before
            use(make(1, 2, 2))
            assert 0 < fake_gpu.used - before <= large / 64  # the shape has a 256th of the elements
    assert fake_gpu.used == 0


def test_what_fits_alone_fits_after_others_too(tiny_bundle, fake_gpu):
    """Old memory goes before the new is asked for."""
    with open_vae(tiny_bundle) as vae:
        vae.decode(latents(1, 32, 32))
        alone = fake_gpu.used
    fake_gpu.total = alone
    with open_vae(tiny_bundle) as vae:
        for side in (4, 8, 16, 32, 4, 32):
            vae.decode(latents(1, side, side))


def test_too_little_memory_is_named_and_survived(vae, fake_gpu):
    z = latents(1, 8, 8)
    expected = vae.decode(z).sample
    fake_gpu.total = 2 * fake_gpu.used
    with pytest.raises(
        OutOfMemoryError,
        match=r"the decoder of \[1, 4, 128, 128\] needs 4 MiB on cuda:0, which has \d+ of \d+ MiB free; enable_tiling",
    ):
        vae.decode(latents(1, 128, 128))
    assert np.array_equal(vae.decode(z).sample, expected)
    vae.enable_tiling()
    assert vae.decode(latents(1, 32, 32)).sample.shape == (1, 3, 256, 256)


def test_what_lies_idle_makes_room_for_what_is_asked_for(tiny_bundle, fake_gpu):
    """Memory of the other graph, and of calls that ran beside one another, is kept for what may come again."""
    with open_vae(tiny_bundle) as vae:
        vae.encode(images(1, 32, 32))
        encoding = fake_gpu.used
    with open_vae(tiny_bundle) as vae:
        vae.decode(latents(1, 32, 32))
        decoding = fake_gpu.used
    fake_gpu.total = max(encoding, decoding)
    with open_vae(tiny_bundle) as vae:
        for _ in range(2):
            vae.encode(images(1, 32, 32)), vae.decode(latents(1, 32, 32))
        assert fake_gpu.used <= fake_gpu.total
    assert fake_gpu.used == 0


def test_where_tensorrt_runs_out_of_memory_that_is_what_it_is(vae, monkeypatch):
    vae.decode(latents())
    engine = vae._engines["encoder"]
    severity = engine.flavour.trt.ILogger.Severity.ERROR

    def refuse(how):
        engine.flavour.logger.log(severity, "[device.cpp::alloc::1] Error Code 1: Cuda Runtime (out of memory)")

    monkeypatch.setattr(engine.engine, "create_execution_context", refuse)
    with pytest.raises(OutOfMemoryError, match=r"create_execution_context failed in the encoder of .*out of memory"):
        vae.encode(images())


# Profiles ---------------------------------------------------------------------------------------------------------


def test_the_nearest_profile_runs_in_a_context_of_its_own(tensorrt_bundle, tiny_model, fake_gpu):
    with open_vae(tensorrt_bundle("tensorrt", NARROW, WIDE)) as vae:
        for shape, contexts in (
            ((1, 2, 2), [0]),
            ((1, 8, 8), [0]),  # both hold it, and it is what the first does best
            ((2, 8, 8), [0, 1]),
            ((1, 9, 8), [0, 1]),
            ((1, 8, 8), [0, 1]),  # what is there is used again
        ):
            z = latents(*shape)
            expected = tiny_model.decode_latents(torch.from_numpy(z)).numpy()
            np.testing.assert_allclose(vae.decode(z).sample, expected, rtol=0, atol=TOLERANCE)
            assert fake_gpu.contexts == contexts


@pytest.mark.parametrize(("use", "given"), [("encode", images(5, 8, 8)), ("decode", latents(5, 8, 8))])
def test_a_shape_outside_of_all_profiles_is_answered_with_their_list(tensorrt_bundle, use, given):
    with open_vae(tensorrt_bundle("tensorrt", NARROW, WIDE)) as vae:
        with pytest.raises(ShapeError) as error:
            getattr(vae, use)(given)
        said = str(error.value)
        assert said.startswith("5 x 64 x 64 (batch, height, width in pixels) is outside")
        assert "; ".join(map(str, vae.profiles)) in said and "enable_tiling(), enable_slicing()" in said


def test_tiling_and_slicing_bring_shapes_inside(tensorrt_bundle, tiny_bundle):
    x, z = images(3, 20, 11), latents(3, 20, 11)
    with open_vae(tensorrt_bundle("tensorrt", NARROW)) as vae, open_vae(tiny_bundle) as wide:
        for runtime in (vae, wide):
            runtime.enable_tiling(), runtime.enable_slicing()
        assert all(map(np.array_equal, results(vae, x, z), results(wide, x, z)))
        vae.disable_slicing()
        with pytest.raises(ShapeError, match="3 x 64 x 64"):
            vae.decode(z)


@pytest.mark.parametrize("tile", [8, 64])  # latents: as large as the profile takes, and far larger
def test_tiles_are_cut_as_profiles_take_them(tensorrt_bundle, tile):
    """Nothing is below 48 pixels nor above 64, at the edges neither."""
    x, z = images(1, 20, 11), latents(1, 20, 11)
    with open_vae(tensorrt_bundle("tensorrt", "1x48..64x48..64")) as vae:
        vae.tile_sample_min_size, vae.tile_latent_min_size = 8 * tile, tile
        vae.enable_tiling()
        parameters, sample = results(vae, x, z)
    assert parameters.shape == (1, 8, 20, 11) and sample.shape == (1, 3, 160, 88)


def test_profiles_of_plans_are_not_chosen_any_more(tiny_bundle):
    with pytest.raises(ConfigError, match="are built: their profiles cannot be chosen"):
        open_vae(tiny_bundle, profiles=[NARROW])


# Files that are not what they should be ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("version", "10.13.0.35", "was built with tensorrt 10.13.0.35, and 11.4.0.1 is installed"),
        ("flavour", "tensorrt-rtx", "was built with tensorrt-rtx, and this is tensorrt"),
        ("gpus", ["sm86", "sm90"], "was built for sm86, sm90, and this GPU is sm89"),
        ("system", "win32-AMD64", "was built on win32-AMD64, and this is"),
    ],
)
def test_a_plan_of_elsewhere_is_refused_before_it_is_parsed(bundle_copy, fake_gpu, field, value, says):
    path = bundle_copy(lambda manifest: manifest["engine"].update({field: value}))
    with pytest.raises(CompatibilityError, match=f"{says}.*: vae-export rebuild {path} builds it"):
        open_vae(path)
    assert fake_gpu.deserialized == 0


DAMAGE = {
    "a bit flipped": lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:],
    "cut short": lambda data: data[:-1],
    "empty": lambda data: b"",
    "garbage": lambda data: b"garbage" * 100,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_plan_is_named_before_a_byte_of_any_is_parsed(bundle_copy, fake_gpu, damage):
    path = bundle_copy()
    (path / PLAN).write_bytes(DAMAGE[damage]((path / PLAN).read_bytes()))
    with pytest.raises(IntegrityError, match=re.escape(PLAN)):
        open_vae(path)
    assert fake_gpu.deserialized == 0


GARBAGE = {
    "nothing": (lambda plan: b"", "magic tag does not match"),
    "noise": (lambda plan: np.random.default_rng(0).bytes(10_000), "magic tag does not match"),
    "a header": (lambda plan: plan[:50], "."),
    "half a plan": (lambda plan: plan[: len(plan) // 2], "."),
}


@pytest.mark.parametrize("garbage", GARBAGE)
def test_a_plan_that_is_none_is_refused_in_tensorrts_own_words(bundle_copy, tiny_bundle, garbage):
    make, says = GARBAGE[garbage]
    path = bundle_copy(files={PLAN: make((tiny_bundle / PLAN).read_bytes())})
    with pytest.raises(CompatibilityError, match=rf"tensorrt 11\.4\.0\.1 cannot load the plan of the decoder: {says}"):
        open_vae(path)


def test_the_plan_of_the_other_graph_is_refused(bundle_copy, tiny_bundle):
    path = bundle_copy(files={PLAN: (tiny_bundle / PLAN.replace("decoder", "encoder")).read_bytes()})
    with pytest.raises(CompatibilityError, match=r"decoder has the tensors sample, latent_parameters.*latent_sample"):
        open_vae(path)


def test_a_plan_of_other_types_or_profiles_than_the_manifest_says_is_refused(bundle_copy):
    def halve(manifest):
        manifest["graphs"]["decoder"]["input"]["dtype"] = "float16"

    def add_profile(manifest):
        manifest["engine"]["profiles"] *= 2

    for edit, says in ((halve, "latent_sample and sample of float16"), (add_profile, "1 profiles, .* manifest says 2")):
        with pytest.raises(CompatibilityError, match=says):
            open_vae(bundle_copy(edit))


# CUDA graphs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def replaying(tiny_bundle, fake_gpu):
    """One context, so that it is known which one a call gets, and room for two graphs."""
    with open_vae(tiny_bundle, cuda_graphs=True, contexts=1, max_graphs=2) as runtime:
        yield runtime


def test_launches_are_replayed_from_the_second_call_on(replaying, vae, fake_gpu):
    for launched, z in enumerate(latents() for _ in range(4)):
        assert np.array_equal(replaying.decode(z).sample, vae.decode(z).sample)
        assert fake_gpu.launched == launched


def test_a_graph_stays_right_while_other_shapes_are_run(replaying, vae, fake_gpu):
    """A graph is void once its context was told another shape; the fake refuses to launch it then."""
    for shape in ((1, 6, 4), (1, 4, 6), (1, 6, 4), (1, 4, 6)):
        z = latents(*shape)
        assert np.array_equal(replaying.decode(z).sample, vae.decode(z).sample)
    assert fake_gpu.launched == 2


def test_the_graph_that_was_not_used_for_longest_goes_first(replaying, fake_gpu):
    first, second, third = latents(1, 6, 4), latents(1, 5, 4), latents(1, 4, 4)
    for z, launched in ((first, 0), (second, 0), (first, 1), (third, 1), (first, 2), (second, 2)):
        replaying.decode(z)
        assert fake_gpu.launched == launched
        assert len(fake_gpu.graphs) <= 2


def test_graphs_are_captured_anew_when_their_memory_was_replaced(replaying, vae, fake_gpu):
    for shape, launched in (((1, 2, 2), 0), ((1, 2, 2), 1), ((1, 9, 9), 1), ((1, 2, 2), 1), ((1, 2, 2), 2)):
        z = latents(*shape)
        assert np.array_equal(replaying.decode(z).sample, vae.decode(z).sample)
        assert fake_gpu.launched == launched


def test_a_capture_that_fails_is_said_and_survived(replaying, vae, fake_gpu):
    fake_gpu.refused_graphs = True
    with pytest.raises(VaeError, match="cudaStreamEndCapture failed"):
        replaying.decode(latents())
    fake_gpu.refused_graphs = False
    z = latents()
    assert np.array_equal(replaying.decode(z).sample, vae.decode(z).sample)


# Threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"contexts": 1}, {"contexts": 2}, {"contexts": 2, "cuda_graphs": True}], ids=str)
def test_threads_share_as_many_contexts_as_there_are(tiny_bundle, fake_gpu, options):
    inputs = [make(*shape) for shape in ((1, 1, 1), (3, 5, 2)) for make in (images, latents)]
    with open_vae(tiny_bundle, **options) as vae, ThreadPoolExecutor(8) as pool:

        def call(i):
            x = inputs[i % len(inputs)]
            return vae.encode(x)[0].parameters if x.shape[1] == 3 else vae.decode(x)[0]

        serial = [call(i) for i in range(len(inputs))]
        answers = list(pool.map(call, range(100)))
        assert all(np.array_equal(answer, serial[i % len(inputs)]) for i, answer in enumerate(answers))
        assert len(fake_gpu.streams) <= 2 * options["contexts"]  # of two graphs
        assert "cuda_graphs" in options or len(fake_gpu.contexts) == len(fake_gpu.streams)


def test_closing_lets_calls_at_work_end_also_those_that_wait_for_a_context(tiny_bundle, fake_gpu, monkeypatch):
    z, at_work, go_on = latents(), threading.Event(), threading.Event()
    vae = open_vae(tiny_bundle, contexts=1)
    expected = vae.decode(z).sample
    engine = vae._engines["decoder"].engine
    compute = engine._compute

    def slow(*arguments):
        at_work.set()
        assert go_on.wait(10)
        compute(*arguments)

    monkeypatch.setattr(engine, "_compute", slow)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(vae.decode, z)
        assert at_work.wait(10)
        second = pool.submit(vae.decode, z)
        while vae._calls < 2:
            pass
        vae.close()
        with pytest.raises(VaeError, match="was closed"):
            vae.decode(z)
        assert fake_gpu.streams
        go_on.set()
        assert np.array_equal(first.result(10).sample, expected)
        assert np.array_equal(second.result(10).sample, expected)
    assert not fake_gpu.streams


def test_a_thread_works_on_the_gpu_that_was_chosen(tiny_bundle, fake_gpu):
    fake_gpu.count = 2
    with open_vae(tiny_bundle, device="cuda:1") as vae, ThreadPoolExecutor(1) as pool:
        pool.submit(vae.decode, latents()).result()
    assert fake_gpu.devices == {1}


# Arrays on the GPU ------------------------------------------------------------------------------------------------


@pytest.fixture
def cupy(fake_gpu):
    return importlib.import_module("cupy")


@pytest.mark.parametrize("options", [{}, {"cuda_graphs": True}], ids=["plain", "graphs"])
def test_arrays_on_the_gpu_are_read_and_answered_there(tiny_bundle, fake_gpu, cupy, options):
    with open_vae(tiny_bundle, check_finite=True, **options) as vae:
        for _ in range(3):
            x, z = images(2), latents(2)
            expected = results(vae, x, z)
            before = dict(fake_gpu.copied)
            answers = results(vae, cupy.asarray(x), cupy.asarray(z))
            assert fake_gpu.copied == before, "nothing went through the host"
            for answer, right in zip(answers, expected, strict=True):
                assert isinstance(answer, cupy.ndarray) and np.array_equal(answer.get(), right)
        del answers, answer


def test_arrays_on_the_gpu_of_any_float_type_are_tiled_sliced_drawn_and_pictured_as_others(vae, cupy):
    x, z = images(2, 9, 10).astype(np.float16), latents(2, 9, 10).astype(np.float64)
    vae.enable_tiling(), vae.enable_slicing()
    for answer, right in zip(results(vae, cupy.asarray(x), cupy.asarray(z)), results(vae, x, z), strict=True):
        assert np.array_equal(answer.get(), right)
    draws = [vae.encode(given).latent_dist.sample(np.random.default_rng(7)) for given in (x, cupy.asarray(x))]
    assert np.array_equal(draws[0], draws[1].get())
    pictures = vae.latents_to_images(z)
    for given in (cupy.asarray(z), [cupy.asarray(one) for one in z]):
        assert np.array_equal(vae.latents_to_images(given).get(), pictures)
    assert np.array_equal(vae.images_to_latents(cupy.asarray(pictures)).get(), vae.images_to_latents(pictures))
    with pytest.raises(ShapeError, match="not int64"):
        vae.decode(cupy.asarray(z.astype(np.int64)))


def test_an_array_on_another_gpu_is_refused(vae, cupy, monkeypatch):
    monkeypatch.setattr(cupy.ndarray.device, "id", 1)
    with pytest.raises(ShapeError, match="the array is on cuda:1, and this VAE on cuda:0"):
        vae.decode(cupy.asarray(latents()))


def test_a_backend_without_a_gpu_answers_them_in_kind_too(onnx_bundle, cupy):
    z = latents()
    with open_vae(onnx_bundle, threads=1) as vae:
        answer = vae.decode(cupy.asarray(z)).sample
        assert isinstance(answer, cupy.ndarray) and np.array_equal(answer.get(), vae.decode(z).sample)


# TensorRT-RTX -----------------------------------------------------------------------------------------------------


def test_rtx_gives_the_results_of_the_reference(rtx, tiny_model):
    x, z = images(2, 3, 5), latents(2, 3, 5)
    with rtx() as vae:
        expected = results(tiny_model, torch.from_numpy(x), torch.from_numpy(z))
        for ours, theirs in zip(results(vae, x, z), expected, strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=TOLERANCE)


def test_kernels_are_kept_in_a_file_at_close_and_given_back_at_open(rtx, tmp_path):
    files = [tmp_path / f"kernels-{graph}" for graph in ("encoder", "decoder")]
    for kept in (b"kernels+1", b"kernels+1+1"):
        with rtx(runtime_cache=tmp_path / "kernels") as vae:
            vae.decode(latents())
        assert [file.read_bytes() for file in files] == [kept, kept]
    for file in files:
        file.write_bytes(b"of another version")
    rtx(runtime_cache=str(tmp_path / "kernels")).close()
    assert [file.read_bytes() for file in files] == [b"kernels+1"] * 2
    assert sorted(tmp_path.iterdir()) == sorted(files), "and nothing else"


def test_a_file_for_kernels_that_cannot_be_used_is_named(rtx, tmp_path, fake_gpu):
    (tmp_path / "kernels-decoder").mkdir()
    with pytest.raises(ConfigError, match=re.escape(f"runtime_cache {tmp_path / 'kernels-decoder'} cannot be read")):
        rtx(runtime_cache=tmp_path / "kernels")
    vae = rtx(runtime_cache=tmp_path / "none" / "kernels")
    vae.decode(latents())
    with pytest.raises(BundleError, match="cannot write"):
        vae.close()
    assert fake_gpu.used == 0, "the rest is closed all the same"


@pytest.mark.parametrize("chosen", ["lazy", "eager", "none"])
def test_when_kernels_are_specialized_is_the_users_choice(rtx, chosen):
    with rtx(kernel_specialization=chosen) as vae:
        for engine in vae._engines.values():
            strategy = engine.config.dynamic_shapes_kernel_specialization_strategy
            assert strategy.name == chosen.upper()


def test_rtx_captures_graphs_by_itself(rtx, fake_gpu):
    with rtx(cuda_graphs=True) as vae:
        vae.decode(latents())
        assert vae._engines["decoder"].config.cuda_graph_strategy.name == "WHOLE_GRAPH_CAPTURE"
        assert not fake_gpu.graphs


@pytest.mark.parametrize("options", [{"runtime_cache": "kernels"}, {"kernel_specialization": "lazy"}], ids=str)
def test_what_rtx_alone_has_is_refused_for_the_other(tiny_bundle, options):
    with pytest.raises(ConfigError, match="runtime_cache and kernel_specialization are for backend tensorrt-rtx"):
        open_vae(tiny_bundle, **options)


def test_an_unknown_specialization_is_named_with_the_known(rtx):
    with pytest.raises(ConfigError, match="one of lazy, eager, none, not 'never'"):
        rtx(kernel_specialization="never")


# What may be missing ----------------------------------------------------------------------------------------------


def test_a_gpu_that_is_not_here_is_named(tiny_bundle, fake_gpu):
    with pytest.raises(BackendUnavailable, match=r"there is no cuda:3: this machine has 1 NVIDIA GPU"):
        open_vae(tiny_bundle, device="cuda:3")
    assert TensorRtVae.check_devices() == {"cuda": "works (sm89)"}
    fake_gpu.count = 0
    with pytest.raises(BackendUnavailable, match=r"no NVIDIA GPU can be used here: .*CUDA driver version is"):
        open_vae(tiny_bundle)
    assert "no NVIDIA GPU can be used here" in TensorRtRtxVae.check_devices()["cuda"]


def test_what_is_not_installed_is_named_with_the_command_that_does(tiny_bundle, rtx, monkeypatch):
    monkeypatch.setattr(tensorrt_flavours, "_loaded", {})
    for name, package, use in (("tensorrt", "tensorrt", lambda: open_vae(tiny_bundle)), ("tensorrt_rtx", "rtx", rtx)):
        with monkeypatch.context() as missing, pytest.raises(BackendUnavailable) as error:
            missing.setitem(sys.modules, name, None)
            use()
        assert str(error.value) == f"{name} is not installed: pip install 'vae-export[{package}]'"
    for name in ("cuda.bindings.runtime", "cuda.cudart"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BackendUnavailable, match=r"cuda-python is not installed: pip install 'vae-export\[tensorrt\]'"):
        open_vae(tiny_bundle)


def test_a_tensorrt_that_is_too_old_or_does_not_load_is_named(tiny_bundle, monkeypatch, tmp_path):
    monkeypatch.setattr(tensorrt_flavours, "_loaded", {})
    monkeypatch.setattr(importlib.import_module("tensorrt"), "__version__", "10.9.0.34")
    with pytest.raises(BackendUnavailable, match=r"10\.9\.0\.34 is too old: 10\.13 or later, pip install -U"):
        open_vae(tiny_bundle)
    (tmp_path / "tensorrt.py").write_text("raise OSError('libnvinfer.so.11: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt")
    with pytest.raises(BackendUnavailable, match=r"does not load \(libnvinfer\.so\.11.*pip install 'vae-export\["):
        open_vae(tiny_bundle)
