"""Watching every operation: activations are measured, and half precision simulated, in little memory."""

import pytest
import torch

from vae_export import AutoencoderKL
from vae_export.rewrites.operators import attend_in_turn
from vae_export.rewrites.ranges import SimulatedHalf, Watch, probe, watchable

# Attention over every pixel: 96 * 128 = 12,288 positions have 151 million scores, 576 MiB in fp32. The scores, their
# rounded copy and the softmax, all at once, took 2.4 GiB; 1 GiB holds PyTorch and blocks of queries, and no more.
HIGH_RESOLUTION = r"""
import re
import torch
from vae_export import AutoencoderKL
from vae_export.rewrites.ranges import SimulatedHalf, probe

torch.set_num_threads(1)
model = AutoencoderKL(
    block_out_channels=(8, 8),
    down_block_types=("AttnDownEncoderBlock2D", "DownEncoderBlock2D"),
    up_block_types=("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
    mid_block_add_attention=False,
).eval().requires_grad_(False)
x = torch.rand(1, 3, 96, 128) * 2 - 1
{job}
# Not ru_maxrss, which begins with the size of the process that started this one.
print(int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]) / 2**20)
"""
JOBS = {
    "the reference": "model.encode_moments(x)",
    "the simulated half": "SimulatedHalf(model, 'fp16').run('encoder', x)",
}


@pytest.fixture(scope="module")
def attentive():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("AttnDownEncoderBlock2D",) * 2,
            up_block_types=("AttnUpDecoderBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=4,
        )
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("job", JOBS)
def test_attention_at_high_resolution_takes_little_memory(alone, job):
    (peak,) = alone(HIGH_RESOLUTION.replace("{job}", JOBS[job]))
    assert float(peak) < 1.0, f"{job} took {peak} GiB"


@pytest.mark.parametrize("queries", [1, 5, 12, 13])
def test_attention_of_some_queries_at_a_time_is_attention(queries):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 12, 8, generator=generator) for _ in range(3))
    expected = torch.softmax(q @ k.transpose(1, 2), dim=-1) @ v
    assert torch.allclose(attend_in_turn(q, k, v, queries), expected, atol=1e-6)  # another order of summation


def test_blocks_of_queries_change_neither_ranges_nor_the_simulated_half(attentive, monkeypatch):
    x = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = probe(attentive, [("encoder", x)]).largest, SimulatedHalf(attentive, "fp16").run("encoder", x)
    monkeypatch.setattr("vae_export.rewrites.ranges.SCORES", 5000)  # 13 of 384 queries: a remainder, too
    ranges = probe(attentive, [("encoder", x)]).largest
    assert {place for place in ranges if not place.endswith(" cat")} == set(whole[0])
    for place, value in whole[0].items():
        assert ranges[place] == pytest.approx(value, rel=1e-5)  # another order of summation
    # An fp32 sum that falls between two fp16 values may round to the other one, 2**-11 away; some layers follow.
    assert torch.allclose(SimulatedHalf(attentive, "fp16").run("encoder", x), whole[1], atol=2**-9)


@pytest.mark.parametrize("scores", [2**24, 5000])
def test_overflow_of_scores_is_seen_and_named(attentive, monkeypatch, scores):
    monkeypatch.setattr("vae_export.rewrites.ranges.SCORES", scores)
    model = watchable(attentive)
    for name in ("to_q", "to_k"):
        model.get_parameter(f"encoder.mid_block.attentions.0.{name}.weight").mul_(2**9)
    half = SimulatedHalf(model, "fp16")
    half.run("encoder", torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    assert half.first_not_finite == "encoder.mid_block.attentions.0 bmm"


def watched_through(*values):
    model = torch.nn.Sequential(torch.nn.LeakyReLU(negative_slope=1.0))  # which changes nothing
    watch, x = Watch(model), torch.tensor(values)
    with watch.watching():
        model(x)
    return watch


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_single_value_that_is_not_finite_is_found(value):
    assert watched_through(0.0, value, 1.0).first_not_finite == "0"


def test_the_largest_value_is_that_of_either_sign():
    assert watched_through(2.0, -3.0).largest == watched_through(-2.0, 3.0).largest == {"0": 3.0}
