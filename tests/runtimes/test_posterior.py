"""One posterior for NumPy and torch: the same numbers from the same parameters, and from the same seed."""

import numpy as np
import pytest
import torch

from runtimes import DiagonalGaussianDistribution, ShapeError

SHAPE = (3, 4, 5, 6)  # of the latents
# exp differs by an ulp or two between the libraries, sums by their order: some 1e-7 each, relative.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def parameters(dtype="float32", seed=0):
    """[3, 8, 5, 6]; in fp32 the logvars of some elements lie outside the clamp, whose variances fp16 cannot hold."""
    values = np.random.default_rng(seed).standard_normal((3, 8, 5, 6))
    if dtype == "float32":
        values[:, 4:, 0, 0], values[:, 4:, 1, 0] = -40, 25
    return values.astype(dtype)


@pytest.fixture
def pair():
    """The same posterior on NumPy and on torch."""
    array = parameters()
    return DiagonalGaussianDistribution(array), DiagonalGaussianDistribution(torch.from_numpy(array))


@pytest.mark.parametrize("name", ["mean", "logvar", "std", "var"])
def test_moments_are_those_of_torch(pair, name):
    ours, theirs = (getattr(posterior, name) for posterior in pair)
    assert isinstance(ours, np.ndarray) and ours.shape == SHAPE
    np.testing.assert_allclose(ours, theirs.numpy(), **CLOSE)


def test_the_logvar_is_clamped(pair):
    assert [(float(p.logvar.min()), float(p.logvar.max())) for p in pair] == [(-30, 20)] * 2


def test_kl_and_nll_are_those_of_torch(pair):
    other = parameters(seed=1)
    others = DiagonalGaussianDistribution(other), DiagonalGaussianDistribution(torch.from_numpy(other))
    x = np.random.default_rng(2).standard_normal(SHAPE).astype(np.float32)
    for ours, theirs, shape in (
        (pair[0].kl(), pair[1].kl(), (3,)),
        (pair[0].kl(others[0]), pair[1].kl(others[1]), (3,)),
        (pair[0].nll(x), pair[1].nll(torch.from_numpy(x)), (3,)),
        (pair[0].nll(x, dims=[1]), pair[1].nll(torch.from_numpy(x), dims=[1]), (3, 5, 6)),
    ):
        assert ours.shape == shape
        np.testing.assert_allclose(ours, theirs.numpy(), **CLOSE)


def test_kl_and_nll_are_those_of_torch_distributions():
    array = parameters()[:, :, 2:]  # inside the clamp
    ours, mean, std = DiagonalGaussianDistribution(array), *torch.from_numpy(array).chunk(2, dim=1)
    normal = torch.distributions.Normal(mean, torch.exp(0.5 * std))
    standard = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    kl = torch.distributions.kl_divergence(normal, standard).sum(dim=(1, 2, 3))
    np.testing.assert_allclose(ours.kl(), kl.numpy(), **CLOSE)
    x = np.random.default_rng(2).standard_normal(mean.shape).astype(np.float32)
    nll = -normal.log_prob(torch.from_numpy(x)).sum(dim=(1, 2, 3))
    np.testing.assert_allclose(ours.nll(x), nll.numpy(), **CLOSE)


# Draws --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_one_numpy_seed_gives_one_draw_on_either_kind(pair, kind):
    posterior = pair[kind == "torch"]
    first, again, other = (np.asarray(posterior.sample(np.random.default_rng(seed))) for seed in (7, 7, 8))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    noise = np.random.default_rng(7).standard_normal(SHAPE, dtype=np.float32)
    np.testing.assert_allclose(first, pair[0].mean + pair[0].std * noise, **CLOSE)


def test_a_torch_generator_draws_as_diffusers_does(pair):
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7))
    expected = pair[1].mean + pair[1].std * noise
    assert torch.equal(pair[1].sample(torch.Generator().manual_seed(7)), expected)
    on_numpy = pair[0].sample(torch.Generator().manual_seed(7))
    assert isinstance(on_numpy, np.ndarray)
    np.testing.assert_allclose(on_numpy, expected.numpy(), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_torch_draws_in_the_dtype_of_the_parameters(dtype):
    posterior = DiagonalGaussianDistribution(torch.from_numpy(parameters("float16")).to(dtype))
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7), dtype=dtype)
    assert torch.equal(posterior.sample(torch.Generator().manual_seed(7)), posterior.mean + posterior.std * noise)


def test_without_a_generator_draws_differ_and_torch_follows_its_global_seed(pair):
    assert not np.array_equal(pair[0].sample(), pair[0].sample())
    with torch.random.fork_rng():
        torch.manual_seed(7)
        drawn = pair[1].sample()
    assert torch.equal(drawn, pair[1].sample(torch.Generator().manual_seed(7)))


@pytest.mark.parametrize("generator", [np.random.default_rng, lambda seed: torch.Generator().manual_seed(seed)])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_with_a_generator_per_sample_a_sample_does_not_depend_on_its_batch(kind, generator):
    array = parameters()
    together = DiagonalGaussianDistribution(kind(array)).sample([generator(seed) for seed in (1, 2, 3)])
    for i, seed in enumerate((1, 2, 3)):
        alone = DiagonalGaussianDistribution(kind(array[i : i + 1])).sample([generator(seed)])
        assert np.array_equal(np.asarray(together)[i], np.asarray(alone)[0])
        assert np.array_equal(alone, DiagonalGaussianDistribution(kind(array[i : i + 1])).sample(generator(seed)))


def test_generators_must_be_as_many_as_samples(pair):
    with pytest.raises(ShapeError, match="2 generators for a batch of 3"):
        pair[0].sample([np.random.default_rng(seed) for seed in (1, 2)])


# Kinds --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_float16_stays_float16(make):
    posterior = DiagonalGaussianDistribution(make(parameters("float16")))
    x = posterior.sample(np.random.default_rng(0))
    results = (posterior.mean, posterior.std, posterior.var, x, posterior.mode(), posterior.nll(x, dims=[1]))
    assert all("float16" in str(result.dtype) for result in results)


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_a_deterministic_posterior_is_its_mean(make):
    array = parameters()
    posterior = DiagonalGaussianDistribution(make(array), deterministic=True)
    assert np.array_equal(posterior.sample(np.random.default_rng(0)), array[:, :4])
    assert np.array_equal(posterior.mode(), array[:, :4])
    assert not np.any(np.asarray(posterior.std)) and not np.any(np.asarray(posterior.var))
    assert np.array_equal(posterior.kl(), [0]) and np.array_equal(posterior.nll(posterior.mean), [0])
