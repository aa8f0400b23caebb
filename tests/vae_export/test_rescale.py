"""Half precision that cannot overflow: exact in fp32, finite in fp16, as good as before the model was blown up."""

import copy
import math

import numpy as np
import pytest
import torch

from runtimes.errors import NumericsError
from tests.helpers.small_models import inputs_of, run_graph, small_model
from tools.blow_up import blown_up, gains
from vae_export import export_bundle
from vae_export.checkpoints.load import load_model
from vae_export.families.autoencoder_kl import Attention
from vae_export.rewrites.attention import use_portable_attention
from vae_export.rewrites.ranges import Ranges, SimulatedHalf, Watch, probe
from vae_export.rewrites.rescale import TARGET, rescale_activations
from vae_export.rewrites.upsample import fold_upsample


def psnr(actual, expected):
    return 10 * math.log10((expected.max() - expected.min()) ** 2 / (actual - expected).pow(2).mean())


def rescue_and_compare(model, draw):
    """Blow up, rescale, check exactness and range; per input, what going and coming back cost in fp16, in dB."""
    blown, inputs = blown_up(model, draw), inputs_of(model)
    rescued, exponents = rescale_activations(blown, probe(blown, inputs))
    assert exponents
    assert max(probe(rescued, inputs).largest.values()) <= TARGET
    lost = []
    for graph, x in inputs:
        expected = run_graph(blown, graph, x)
        assert torch.equal(run_graph(rescued, graph, x), expected), "fp32 must be the same to the last bit"
        before, plain, after = (SimulatedHalf(m, "fp16") for m in (model, blown, rescued))
        assert plain.run(graph, x).isnan().all(), "the test must blow the model up far enough"
        assert plain.first_not_finite
        quality = psnr(after.run(graph, x), expected)
        assert after.first_not_finite is None
        lost.append(psnr(before.run(graph, x), run_graph(model, graph, x)) - quality)
    return lost


VARIANTS = [pytest.param(a, q, id=f"attention-{a}-quant-{q}") for a in (True, False) for q in (True, False)]

# What fp16 costs one small model on one input depends on how single roundings fall, which one bit in one weight, or the
# order in which a CPU sums, changes. Over 24 models the cost of a rescue was 0.0 dB on average with powers of two (0.1
# from model to model) and 0.1 dB with any gains (0.4 from model to model): what is promised is the average, and the
# bounds are three standard errors above it.


@pytest.mark.parametrize(("attention", "quant"), VARIANTS)
def test_models_blown_up_by_powers_of_two_are_rescued_exactly(attention, quant):
    models = [small_model(attention=attention, quant=quant, seed=seed) for seed in range(6)]
    lost = [rescue_and_compare(model, gains(seed, powers_of_two=True)) for seed, model in enumerate(models)]
    assert np.mean(lost) <= 0.2
    assert np.max(lost) <= 1.5


@pytest.mark.parametrize(("attention", "quant"), VARIANTS)
def test_models_blown_up_by_any_gains_are_rescued(attention, quant):
    models = [small_model(attention=attention, quant=quant, seed=seed) for seed in range(12)]
    lost = [rescue_and_compare(model, gains(seed, powers_of_two=False)) for seed, model in enumerate(models)]
    assert np.mean(lost) <= 0.5
    assert np.max(lost) <= 3.0


@pytest.mark.parametrize("powers_of_two", [True, False], ids=["powers-of-two", "any-gain"])
def test_the_embedded_model_blown_up_is_rescued(powers_of_two):
    """A trained model on photographs has weights enough for the rounding to average out.

    Its file holds fp16, which rounds to fp16 without loss; half a step of noise makes it a model trained in fp32.
    """
    model = load_model()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.mul_(1 + (torch.rand(parameter.shape, generator=generator) - 0.5) * 2**-11)
    assert max(rescue_and_compare(model, gains(0, powers_of_two))) <= 0.5


def test_a_model_that_needs_nothing_is_left_alone():
    model = small_model()
    same, exponents = rescale_activations(model, probe(model, inputs_of(model)))
    assert exponents == {}
    for (name, ours), theirs in zip(same.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_values_lost_among_the_subnormals_are_scaled_up():
    model = small_model()
    faint = blown_up(model, lambda low, high: 2.0**-18)
    inputs = inputs_of(model)
    rescued, exponents = rescale_activations(faint, probe(faint, inputs))
    assert min(exponents.values()) < 0
    graph, x = inputs[0]
    expected = run_graph(faint, graph, x)
    assert torch.equal(run_graph(rescued, graph, x), expected)
    better, worse = (psnr(SimulatedHalf(m, "fp16").run(graph, x), expected) for m in (rescued, faint))
    assert math.isfinite(better)
    assert not worse > better - 20  # the faint one has few significant bits left, or none: then it is NaN


@pytest.mark.parametrize("faint", ["to_q", "to_k"])
def test_queries_and_keys_lost_among_the_subnormals_are_balanced(faint):
    model = small_model()
    other = {"to_q": "to_k", "to_k": "to_q"}[faint]
    for module in model.modules():
        if isinstance(module, Attention):
            for parameter in getattr(module, faint).parameters():
                parameter.mul_(2.0**-20)
            for parameter in getattr(module, other).parameters():
                parameter.mul_(2.0**8)  # nothing is over the target
    inputs = inputs_of(model)
    rescued, exponents = rescale_activations(model, probe(model, inputs))
    assert exponents
    assert {place.rsplit(".", 1)[1] for place in exponents} == {"to_q"}
    seen = probe(rescued, inputs)
    for name, module in rescued.named_modules():
        if isinstance(module, Attention):
            q, k = seen.at(f"{name}.to_q"), seen.at(f"{name}.to_k")
            assert 0.5 <= q / k <= 2
    for graph, x in inputs:
        assert torch.equal(run_graph(rescued, graph, x), run_graph(model, graph, x))


def test_the_model_given_is_not_changed():
    model = blown_up(small_model(), gains(0, True))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    eps = [m.eps for m in model.modules() if isinstance(m, torch.nn.GroupNorm)]
    rescale_activations(model, probe(model, inputs_of(model)))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert eps == [m.eps for m in model.modules() if isinstance(m, torch.nn.GroupNorm)]


def test_one_level_and_every_place_is_covered():
    model = small_model(levels=1)
    blown = blown_up(model, gains(3, True))
    rescued, _ = rescale_activations(blown, probe(blown, inputs_of(model)))
    assert max(probe(rescued, inputs_of(model)).largest.values()) <= TARGET


def test_a_rescaled_model_can_be_folded():
    blown = blown_up(small_model(), gains(0, True))
    rescued, _ = rescale_activations(blown, probe(blown, inputs_of(blown)))
    graph, x = inputs_of(blown)[2]
    half = SimulatedHalf(fold_upsample(rescued, "conv"), "fp16")
    assert psnr(half.run(graph, x), run_graph(blown, graph, x)) > 50  # the threshold of validation
    assert half.first_not_finite is None


# The simulated half -----------------------------------------------------------------------------------------------


def test_the_simulated_half_rounds_every_operation():
    model = use_portable_attention(small_model())
    watch = Watch(model, torch.float16)
    seen = []
    watch_seen = watch._seen

    def spy(result, func):
        rounded = watch_seen(result, func)
        if isinstance(rounded, torch.Tensor) and rounded.is_floating_point() and not func.is_view:
            seen.append(rounded)
        return rounded

    watch._seen = spy  # type: ignore[method-assign]  # a spy on this object
    graph, x = inputs_of(model)[0]
    with watch.watching():
        run_graph(model, graph, x)
    assert len(seen) > 50
    assert all(torch.equal(tensor, tensor.half().float()) for tensor in seen)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_simulated_half_is_near_pytorchs_own(precision):
    """Where PyTorch has half kernels on the CPU, they differ from the simulation by their rounding alone."""
    model = small_model()
    graph, x = inputs_of(model)[2]
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    real = run_graph(copy.deepcopy(model).to(dtype), graph, x.to(dtype)).float()
    simulated, expected = SimulatedHalf(model, precision).run(graph, x), run_graph(model, graph, x)
    assert abs(psnr(real, expected) - psnr(simulated, expected)) < 3  # dB; the fused attention rounds less often


def test_overflow_is_found_where_it_happens():
    model = small_model()
    model.decoder.up_blocks[1].resnets[0].conv1.weight.mul_(1e6)
    half = SimulatedHalf(model, "fp16")
    half.run("decoder", torch.randn(1, 4, 6, 6))
    assert half.first_not_finite == "decoder.up_blocks.1.resnets.0.conv1"
    bf16 = SimulatedHalf(model, "bf16")
    bf16.run("decoder", torch.randn(1, 4, 6, 6))
    assert bf16.first_not_finite is None, "bf16 has the range of fp32"


def test_what_no_power_of_two_can_save_is_named(tmp_path):
    model = small_model()
    model.decoder.up_blocks[1].resnets[0].norm1.weight.fill_(1e7)  # behind the norm, before SiLU: not linear
    with pytest.raises(NumericsError, match=r"decoder\.up_blocks\.1\.resnets\.0\.\w+ overflows in fp16"):
        export_bundle(model, tmp_path / "bundle", precision="fp16")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_overflow_fp32_are_named_by_the_probe():
    model = small_model()
    model.encoder.conv_in.weight.fill_(1e38)
    with pytest.raises(NumericsError, match=r"encoder\.\S+ gives NaN or infinity already in fp32"):
        probe(model, inputs_of(model))


def test_places_of_a_module_and_of_its_own_operations():
    ranges = Ranges({"a": 1.0, "a add": 5.0, "a.conv": 3.0, "ab": 9.0})
    assert ranges.at("a") == 5.0
    assert ranges.at("a.conv") == 3.0
    assert ranges.at("nothing") == 0.0
