"""One posterior for NumPy and torch: the same numbers from the same parameters, and from the same seed."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as DiffusersPosterior

from runtimes import DiagonalGaussianDistribution as Posterior
from runtimes import ShapeError

SHAPE = (3, 4, 5, 6)  # of the latents
# exp differs by an ulp or two between the libraries, sums by their order: some 1e-7 each, relative.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}
KINDS = pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])


def parameters(seed=0, outside=True):
    """[3, 8, 5, 6]; the logvars of some elements lie outside the clamp on either side."""
    values = np.random.default_rng(seed).standard_normal((3, 8, 5, 6)).astype(np.float32)
    if outside:
        values[:, 4:, 0, 0], values[:, 4:, 1, 0] = -40, 25
    return values


def torch_generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("torch_class", [Posterior, DiffusersPosterior], ids=["ours", "diffusers"])
@pytest.mark.parametrize("outside", [False, True])  # the clamp: there, a few terms drown all others
def test_results_on_numpy_are_those_on_torch(torch_class, outside):
    x = np.random.default_rng(2).standard_normal(SHAPE).astype(np.float32)
    pairs: list[Any] = [
        (np.asarray, *(Posterior(parameters(seed, outside)) for seed in (0, 1))),
        (torch.from_numpy, *(torch_class(torch.from_numpy(parameters(seed, outside))) for seed in (0, 1))),
    ]
    on_numpy, on_torch = (
        {
            "moments": (p.mean, p.logvar, p.std, p.var, p.mode()),
            "kl": (p.kl(), p.kl(other)),
            "nll": (p.nll(kind(x)), p.nll(kind(x), dims=[1])),
        }
        for kind, p, other in pairs
    )
    for name, values in on_numpy.items():
        for ours, theirs in zip(values, on_torch[name], strict=True):
            assert isinstance(ours, np.ndarray) and ours.shape == tuple(theirs.shape)
            np.testing.assert_allclose(ours, theirs.numpy(), **CLOSE)


@KINDS
def test_one_numpy_seed_gives_one_draw_on_either_kind(kind):
    posterior = Posterior(kind(parameters()))
    first, again, other = (np.asarray(posterior.sample(np.random.default_rng(seed))) for seed in (7, 7, 8))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert not np.array_equal(posterior.sample(), posterior.sample())
    noise = np.random.default_rng(7).standard_normal(SHAPE, dtype=np.float32)
    np.testing.assert_allclose(first, np.asarray(posterior.mean) + np.asarray(posterior.std) * noise, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_torch_generator_draws_in_the_dtype_of_the_parameters_as_diffusers_does(dtype):
    posterior = Posterior(torch.from_numpy(parameters(outside=False)).to(dtype))
    expected = posterior.mean + posterior.std * torch.randn(SHAPE, generator=torch_generator(7), dtype=dtype)
    assert torch.equal(posterior.sample(torch_generator(7)), expected)
    if dtype == torch.float32:
        on_numpy = Posterior(parameters(outside=False)).sample(torch_generator(7))
        np.testing.assert_allclose(on_numpy, expected.numpy(), **CLOSE)


@KINDS
@pytest.mark.parametrize("number", [int, np.int64, np.uint8])
def test_a_whole_number_is_a_seed(kind, number):
    posterior = Posterior(kind(parameters()))
    expected = np.asarray(posterior.sample(np.random.default_rng(7)))
    assert np.array_equal(posterior.sample(number(7)), expected)
    seeds = [number(7), np.random.default_rng(8), np.random.RandomState(9)]
    one, *_ = posterior.sample(seeds)
    assert np.array_equal(one, Posterior(kind(parameters()[:1])).sample(7)[0])


@KINDS
def test_numpys_older_generator_draws_too(kind):
    posterior = Posterior(kind(parameters()))
    noise = np.random.RandomState(7).standard_normal(SHAPE).astype(np.float32)
    drawn = np.asarray(posterior.sample(np.random.RandomState(7)))
    np.testing.assert_allclose(drawn, np.asarray(posterior.mean) + np.asarray(posterior.std) * noise, **CLOSE)


@KINDS
@pytest.mark.parametrize("generator", [-1, 1.0, True, "7", random.Random(7), np.random, [0, 1, "2"]])
def test_what_draws_no_noise_is_refused_with_what_does(kind, generator):
    with pytest.raises(
        ShapeError, match=r"a seed is 0 or more, not -1|generator is a seed, a numpy\.random\.Generator"
    ):
        Posterior(kind(parameters())).sample(generator)


@pytest.mark.parametrize("generator", [np.random.default_rng, torch_generator])
@KINDS
def test_with_a_generator_per_sample_a_sample_does_not_depend_on_its_batch(kind, generator):
    array = parameters()
    together = np.asarray(Posterior(kind(array)).sample([generator(seed) for seed in range(3)]))
    for i in range(3):
        alone = Posterior(kind(array[i : i + 1]))
        assert np.array_equal(together[i : i + 1], alone.sample([generator(i)]))
        assert np.array_equal(together[i : i + 1], alone.sample(generator(i)))
    with pytest.raises(ShapeError, match="2 generators for a batch of 3"):
        Posterior(kind(array)).sample([generator(seed) for seed in range(2)])


@KINDS
def test_float16_stays_float16(kind):
    posterior = Posterior(kind(parameters(outside=False).astype(np.float16)))
    x = posterior.sample(np.random.default_rng(0))
    for result in (posterior.mean, posterior.std, posterior.var, x, posterior.mode(), posterior.nll(x, dims=[1])):
        assert "float16" in str(result.dtype)


@KINDS
def test_a_deterministic_posterior_is_its_mean(kind):
    posterior = Posterior(kind(parameters()), deterministic=True)
    for draw in (posterior.sample(np.random.default_rng(0)), posterior.mode(), posterior.mean):
        assert np.array_equal(draw, parameters()[:, :4])
    for zero in (posterior.std, posterior.var, posterior.kl(), posterior.nll(posterior.mean)):
        assert not np.asarray(zero).any()
