"""The reference model against diffusers, same weights: the oracle of everything that follows.

Tests vae_export/families/autoencoder_kl.py.
"""

import pytest
import torch
from diffusers import AutoencoderKL as DiffusersVae
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as DiffusersPosterior

from runtimes.errors import ConfigError, ShapeError
from runtimes.posterior import DiagonalGaussianDistribution
from tests.helpers.model_configs import CASES, NO_QUANT, levels
from vae_export import AutoencoderKL, VaeConfig

# The same operations in the same order: what is left is the order of summation inside a kernel.
TOLERANCE = 1e-5
# Another batch size or a fused product takes other kernels; the random norms of these models amplify their rounding.
OTHER_KERNELS = 1e-4


@pytest.fixture(params=CASES, ids=str)
def pair(request):
    """(ours, theirs, images): two models with the same weights, norms and biases too being random."""
    fields, shape = CASES[request.param]
    torch.manual_seed(0)
    theirs = DiffusersVae(**fields).eval()
    for parameter in theirs.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
    ours = AutoencoderKL(VaeConfig.from_dict(dict(theirs.config))).eval()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs, torch.rand(shape) * 2 - 1


def difference(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@torch.no_grad()
def test_encode_and_decode_equal_diffusers(pair):
    ours, theirs, x = pair
    posterior, expected = ours.encode(x).latent_dist, theirs.encode(x).latent_dist
    assert difference(posterior.parameters, expected.parameters) <= TOLERANCE
    z = expected.mode()
    assert difference(ours.decode(z).sample, theirs.decode(z).sample) <= TOLERANCE
    assert difference(ours(x).sample, theirs(x).sample) <= TOLERANCE


@torch.no_grad()
def test_tiled_encode_and_decode_equal_diffusers(pair):
    ours, theirs, x = pair
    x = torch.nn.functional.interpolate(x, size=(56, 72)) if min(x.shape[-2:]) < 56 else x
    for vae in (ours, theirs):
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = 32, 32 // ours.config.downscale
    moments, expected = ours.encode(x).latent_dist.parameters, theirs.encode(x).latent_dist.parameters
    assert difference(moments, expected) <= TOLERANCE
    z = torch.randn(x.shape[0], ours.config.latent_channels, *moments.shape[-2:])
    assert difference(ours.decode(z).sample, theirs.decode(z).sample) <= TOLERANCE
    ours.disable_tiling()
    assert difference(ours.tiled_decode(z).sample, theirs.decode(z).sample) <= TOLERANCE
    assert difference(ours.tiled_encode(x).latent_dist.parameters, expected) <= TOLERANCE


@torch.no_grad()
def test_slicing_and_tuples(pair):
    ours, _, x = pair
    x = torch.cat([x, x.flip(0) * 0.5])
    whole = ours.encode(x).latent_dist.parameters
    ours.enable_slicing()
    (posterior,) = ours.encode(x, return_dict=False)
    assert difference(posterior.parameters, whole) <= OTHER_KERNELS
    (sample,) = ours.decode(posterior.mode(), return_dict=False)
    ours.disable_slicing()
    assert difference(sample, ours.decode(posterior.mode()).sample) <= OTHER_KERNELS


@torch.no_grad()
def test_fused_projections_change_nothing_but_speed(pair):
    ours, _, x = pair
    before, names = ours(x).sample, list(ours.state_dict())
    ours.fuse_qkv_projections()
    assert list(ours.state_dict()) == names, "fusing must not change what is saved"
    assert difference(ours(x).sample, before) <= OTHER_KERNELS
    ours.unfuse_qkv_projections()
    assert torch.equal(ours(x).sample, before)


@pytest.mark.parametrize("generators", ["none", "one", "list"])
def test_posterior_samples_equal_diffusers(generators):
    parameters = torch.randn(3, 8, 5, 7) * 3

    def draw(posterior_type):
        torch.manual_seed(7)
        seeded = [torch.Generator().manual_seed(i) for i in range(3)]
        generator = {"none": None, "one": seeded[0], "list": seeded}[generators]
        return posterior_type(parameters).sample(generator)

    assert torch.equal(draw(DiagonalGaussianDistribution), draw(DiffusersPosterior))


def test_posterior_densities_equal_diffusers():
    first, second = torch.randn(3, 8, 5, 7) * 30, torch.randn(3, 8, 5, 7)  # times 30: logvar is clamped
    ours, theirs = DiagonalGaussianDistribution(first), DiffusersPosterior(first)
    x = torch.randn(3, 4, 5, 7)
    assert torch.equal(ours.mode(), theirs.mode())
    torch.testing.assert_close(ours.kl(), theirs.kl())
    torch.testing.assert_close(
        ours.kl(DiagonalGaussianDistribution(second)), theirs.kl(DiffusersPosterior(second)), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(ours.nll(x), theirs.nll(x))
    torch.testing.assert_close(ours.nll(x, dims=[1]), theirs.nll(x, dims=[1]))
    still = DiagonalGaussianDistribution(first, deterministic=True)
    assert torch.equal(still.sample(), still.mode())
    assert torch.equal(still.kl(), torch.tensor([0.0]))


def test_wrong_number_of_generators_is_named():
    with pytest.raises(ShapeError, match="2 generators for a batch of 3"):
        DiagonalGaussianDistribution(torch.zeros(3, 8, 2, 2)).sample([torch.Generator()] * 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_out_channels": [48]}, "multiple of norm_num_groups"),
        ({"down_block_types": ["DownBlock2D"]}, "known block types"),
        ({"block_out_channels": [32, 32]}, "one entry per level"),
        ({"act_fn": "tanh"}, "known activations"),
        ({"scaling_factor": 0}, "must not be 0"),
        ({"scaling_factor": float("nan")}, "finite"),
        ({"latents_mean": [0.0]}, "latent_channels = 4"),
        ({"latent_channels": True}, "positive integer"),
        ({"num_attention_heads": 8, "latent_channels": 4}, "num_attention_heads"),
        ({"_class_name": "AutoencoderTiny"}, "AutoencoderTiny"),
        ({"hidden_size": 768}, "hidden_size"),
        ({}, "not a VAE config"),
    ],
)
def test_a_config_of_something_else_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        AutoencoderKL.from_config({"_class_name": "AutoencoderKL"} | fields if fields else {})


def test_parameter_counts_are_those_of_the_public_models():
    public = levels(128, 256, 512, 512, layers_per_block=2, norm_num_groups=32)
    with torch.device("meta"):
        sdxl = AutoencoderKL(**public)
        flux = AutoencoderKL(**public | {"latent_channels": 16} | NO_QUANT)
    assert sum(p.numel() for p in sdxl.parameters()) == 83_653_863
    assert sum(p.numel() for p in flux.parameters()) == 83_819_683
    assert len(sdxl.state_dict()) == 248
    assert len(flux.state_dict()) == 244
