"""A TensorRT-RTX bundle: its numbers, its kernels, and options that it alone has."""

import re

import numpy as np
import pytest
import torch

from runtimes import (
    BundleError,
    ConfigError,
    open_vae,
)
from tests.helpers.inputs import TOLERANCE, images, latents, results

pytestmark = pytest.mark.usefixtures("fake_gpu")


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
