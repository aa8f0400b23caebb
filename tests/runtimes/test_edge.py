"""What callers give: tensors of every kind, lists of them, pixels as floats; each right, warned of, or refused.

Tests runtimes/warning.py.
"""

import re
import warnings

import numpy as np
import pytest
import torch

from runtimes import ShapeError

RNG = np.random.default_rng(0)


def images(batch=2):
    return RNG.uniform(-1, 1, (batch, 3, 32, 48)).astype(np.float32)


def pixels(batch=2):
    return RNG.integers(0, 256, (batch, 32, 48, 3), dtype=np.uint8)


def latents(batch=2):
    return RNG.standard_normal((batch, 4, 4, 6)).astype(np.float32)


# Torch in, torch out ----------------------------------------------------------------------------------------------


def test_tensors_are_answered_by_tensors_with_the_same_numbers(vae):
    u, z = pixels(), latents()
    expected = vae.images_to_latents(u), vae.latents_to_images(z)
    found = vae.images_to_latents(torch.from_numpy(u)), vae.latents_to_images(torch.from_numpy(z))
    for ours, array, dtype in zip(found, expected, (torch.float32, torch.uint8), strict=True):
        assert isinstance(ours, torch.Tensor) and ours.dtype == dtype
        assert np.array_equal(ours.numpy(), array)
    part = vae.latents_to_images(torch.from_numpy(z), size=(20, 30))
    assert np.array_equal(part.numpy(), expected[1][:, :20, :30])


def test_a_seed_draws_the_same_for_tensors_and_arrays(vae):
    u = pixels()
    for seed in (7, [7, 8]):
        expected = vae.images_to_latents(u, seed)
        drawn = vae.images_to_latents(torch.from_numpy(u), seed).numpy()
        np.testing.assert_allclose(drawn, expected, rtol=1e-5, atol=1e-6)  # exp differs by an ulp between the two


def test_lists_of_tensors_are_stacked(vae):
    x, u, z = (torch.from_numpy(array) for array in (images(), pixels(), latents()))
    assert torch.equal(vae.encode(list(x)).latent_dist.mean, vae.encode(x).latent_dist.mean)
    assert torch.equal(vae.decode(tuple(z)).sample, vae.decode(z).sample)
    for given in (list(u), tuple(u)):
        assert torch.equal(vae.images_to_latents(given), vae.images_to_latents(u))
    mixed = vae.images_to_latents([u[0], u[1].numpy()])
    assert isinstance(mixed, np.ndarray) and np.array_equal(mixed, vae.images_to_latents(u.numpy()))


def test_lists_that_are_no_batch_are_refused(vae):
    x = torch.from_numpy(images())
    for given, says in (
        ([], "images are empty: a list with nothing in it"),
        ([x[0], x[1, :, :16]], "of one size; these are [3, 16, 48], [3, 32, 48]"),
        ([x[0], x[1].double()], "of one type; these are cpu torch.float32, cpu torch.float64"),
        ([x[0], x[1].numpy()], "arrays of one library"),
        ([x[0], x[1].to("meta")], "which holds no values"),
    ):
        with pytest.raises(ShapeError, match=re.escape(says)):
            vae.encode(given)


# Tensors that NumPy cannot view -----------------------------------------------------------------------------------


def test_bits_of_tensors_are_resolved(vae):
    x = torch.from_numpy(images())
    negative = torch.complex(x, -x).conj().imag
    assert negative.is_neg()
    for given in (negative, list(negative)):
        assert torch.equal(vae.encode(given).latent_dist.mean, vae.encode(x).latent_dist.mean)
    with pytest.raises(ShapeError, match=r"not torch\.complex64"):
        vae.encode(torch.complex(x, x).conj())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda x: x.to("meta"), 'device "meta", which holds no values'),
        (lambda x: x.to_sparse(), "sparse_coo tensor; give a dense one"),
        (lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8), "quantized tensor"),
        (lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged), "nested tensor|jagged tensor"),
    ],
    ids=["meta", "sparse", "quantized", "nested"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The PyTorch API of nested", "ignore:.*deprecated")
def test_tensors_without_plain_memory_are_refused(vae, make, says):
    for use, given in (
        (vae.encode, images()),
        (vae.decode, latents()),
        (vae.latents_to_images, latents()),
        (vae.images_to_latents, pixels()),
    ):
        with pytest.raises(ShapeError, match=says):
            use(make(torch.from_numpy(given)))


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_an_empty_batch_is_called_empty(vae, kind):
    for use, given in (
        (vae.encode, images()),
        (vae.decode, latents()),
        (vae.latents_to_images, latents()),
        (vae.images_to_latents, pixels()),
    ):
        with pytest.raises(ShapeError, match=r"not \[0, .*empty"):
            use(kind(given[:0]))


# Warned of once ---------------------------------------------------------------------------------------------------


def test_a_gradient_that_nobody_will_get_is_warned_of_once(vae):
    x, z = (torch.from_numpy(array).requires_grad_() for array in (images(), latents()))
    with torch.no_grad():
        vae.encode(x), vae.decode(z), vae.latents_to_images(z)
    with pytest.warns(UserWarning, match="no gradient flows") as caught:
        for use, given in ((vae.encode, list(x)), (vae.encode, x), (vae.decode, z), (vae.latents_to_images, z)):
            use(given)
    assert len(caught) == 1 and caught[0].filename == __file__


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_pixels_as_floats_are_warned_of_once(vae, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vae.encode(kind(np.clip(RNG.standard_normal((1, 3, 32, 48)), -9, 9).astype(np.float32)))
        vae.encode(kind(np.full((1, 3, 32, 48), np.nan, np.float32)))
    floats = pixels(1).transpose(0, 3, 1, 2).astype(np.float32)
    floats[0, 0, 0, :2] = 0, 255
    with pytest.warns(UserWarning, match=r"in \[-1, 1\], and these reach from 0 to 2\d\d: give uint8 pixels") as caught:
        vae.encode(kind(floats)), vae.encode(kind(floats))
    assert len(caught) == 1 and caught[0].filename == __file__
