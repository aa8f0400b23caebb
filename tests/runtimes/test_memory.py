"""A budget of memory: what fits is computed whole, and what does not in the largest tiles that do.

Tests runtimes/tiling/budget.py.
"""

import numpy as np
import pytest

from runtimes import ConfigError, OutOfMemoryError, open_vae
from runtimes.tiling.budget import RATES, Rate, call_bytes, parse_bytes, rate_of

RATE = Rate(encoder=10.0, decoder=20.0, step=5.0)


@pytest.fixture
def vae(tileable_bundle, monkeypatch):
    monkeypatch.setitem(RATES, ("onnxruntime", "fp32"), RATE)
    with open_vae(tileable_bundle) as runtime:
        yield runtime


@pytest.fixture
def sides(vae, monkeypatch):
    """The longest sides of what the backend is given, in latents."""
    seen, run = [], vae._run

    def spy(graph, x):
        seen.append(max(x.shape[2:]) // (8 if graph == "encoder" else 1))
        return run(graph, x)

    monkeypatch.setattr(vae, "_run", spy)
    return seen


@pytest.mark.parametrize(
    ("text", "amount"),
    [("2GiB", 2 << 30), ("1.5 gib", 3 << 29), ("500MB", 500_000_000), ("64 KiB", 65536), ("123", 123), (77, 77)],
)
def test_amounts_are_read_as_people_write_them(text, amount):
    assert parse_bytes(text) == amount


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "2 TiB", "0", 0, -5, True, 1.5, "1e9", "nan"])
def test_what_is_no_amount_is_refused(text, tileable_bundle):
    with pytest.raises(ConfigError, match="memory_budget"):
        parse_bytes(text)
    with pytest.raises(ConfigError, match="memory_budget"):
        open_vae(tileable_bundle, memory_budget=text)


def test_no_budget_where_nothing_was_measured():
    with pytest.raises(ConfigError, match=r"onnxruntime in fp32.*none for AutoencoderKL in tensorrt in fp16 on cuda"):
        rate_of("AutoencoderKL", "tensorrt", "cuda", "fp16")
    with pytest.raises(ConfigError, match="on cuda:0"):
        rate_of("AutoencoderKL", "onnxruntime", "cuda:0", "fp32")


def test_what_fits_is_computed_whole(vae, sides):
    z = np.zeros((1, 16, 20, 24), np.float32)
    needed = call_bytes(RATE, vae.config, 8, "decoder", 1, 160, 192)
    assert needed == 20 * 160 * 192 * 32
    whole = vae.decode(z)[0]
    vae.memory_budget = needed
    assert vae.memory_budget == needed and np.array_equal(vae.decode(z)[0], whole)
    assert sides == [24, 24]
    vae.memory_budget = needed - 1
    vae.decode(z)
    assert max(sides[2:]) == 20  # the largest that lines up: a quarter of it is whole, and 20 x 20 fits
    vae.memory_budget = None
    vae.decode(z)
    assert sides[-1] == 24


def test_graphs_and_batches_have_budgets_of_their_own(vae, sides):
    vae.memory_budget = call_bytes(RATE, vae.config, 8, "decoder", 1, 128, 128)
    vae.decode(np.zeros((1, 16, 16, 16), np.float32))
    vae.encode(np.zeros((2, 3, 128, 128), np.float32))  # half of the decoder's a pixel
    assert sides == [16, 16]
    vae.decode(np.zeros((2, 16, 16, 16), np.float32))
    assert max(sides[2:]) == 8


def test_seamless_tiles_leave_room_for_what_is_kept_between_them(vae, monkeypatch):
    given, run = [], vae.run_step

    def spy(step, x):
        if step.kind != "whole":
            given.append((step.kind, x["x"].shape))
        return run(step, x)

    monkeypatch.setattr(vae, "run_step", spy)
    z = np.random.default_rng(0).standard_normal((1, 16, 24, 24)).astype(np.float32)
    whole = vae.decode(z)[0]
    vae.enable_tiling("seamless")
    maps = 2 * (192 * 192) * (48 + 32)
    vae.memory_budget = maps + 5 * 128 * 128 * 32
    np.testing.assert_allclose(vae.decode(z)[0], whole, atol=1e-3 * np.ptp(whole))
    sizes = [max(shape[2:]) for kind, shape in given if kind == "out"]
    assert 96 < max(sizes) <= 130  # 192 in two parts of at most 128, and the pixel around each


def test_a_budget_below_the_smallest_tile_is_an_error(vae):
    vae.memory_budget = "100KB"
    with pytest.raises(
        OutOfMemoryError, match="100000 bytes: the decoder on 192x160 pixels needs about 2621440 even in"
    ):
        vae.decode(np.zeros((1, 16, 20, 24), np.float32))


def test_every_rate_counts_what_its_backend_does():
    assert RATES and all(rate.encoder > 0 and rate.decoder > rate.encoder for rate in RATES.values())
