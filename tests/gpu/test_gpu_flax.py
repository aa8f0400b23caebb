"""JAX on a real GPU."""

import numpy as np
import pytest

from runtimes import BackendUnavailable, open_vae
from tests.helpers.gpu_arrays import cases, every_shape, latents, one_colour, run
from vae_export.comparison import compare, opened_bundle
from vae_export.export import export_bundle

pytestmark = pytest.mark.gpu

pytest.importorskip("flax")


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def vae(request, cuda, model, tmp_path_factory):
    """Opened once: JAX compiles each shape for seconds."""
    path = tmp_path_factory.mktemp("gpu") / "flax"
    export_bundle(model, path, target="flax", precision=request.param, run_validation=False)
    try:
        runtime = open_vae(path, device="gpu", max_shapes=16)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    with runtime:
        yield runtime


@pytest.mark.parametrize("arrays", [every_shape, one_colour])
def test_results_are_those_of_the_reference(vae, model, arrays):
    assert compare(cases(model, arrays()), "flax on gpu", opened_bundle(vae), vae.precision)


def test_arrays_on_the_gpu_are_taken(vae):
    import jax

    z = latents(1, 8, 8)
    expected = run(vae, z)
    answer = vae.decode(jax.device_put(z, jax.devices("gpu")[0])).sample
    assert isinstance(answer, np.ndarray) and np.array_equal(answer, expected)
