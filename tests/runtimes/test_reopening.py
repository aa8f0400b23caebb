"""An open VAE is copied and pickled as path, options and state: the copy is opened anew and stands alone."""

import copy
import importlib.util
import pickle
import shutil
from typing import Any

import numpy as np
import pytest

from runtimes import Bundle, ConfigError, IntegrityError, VaeError, open_vae

X = np.random.default_rng(0).uniform(-1, 1, (1, 3, 64, 64)).astype(np.float32)
WAYS = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda vae: pickle.loads(pickle.dumps(vae)),
    "oldest pickle": lambda vae: pickle.loads(pickle.dumps(vae, protocol=0)),
}


def moments(vae):
    return vae.encode(X)[0].parameters


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_gives_the_same_and_leaves_the_original_as_it_is(vae, way):
    expected = moments(vae)
    with WAYS[way](vae) as copied:
        assert copied is not vae and type(copied) is type(vae)
        assert np.array_equal(moments(copied), expected)
    with pytest.raises(VaeError, match="closed"):
        moments(copied)
    assert np.array_equal(moments(vae), expected)


def test_closing_the_original_leaves_the_copy_as_it_is(tiny_bundle):
    with open_vae(tiny_bundle, threads=1) as vae:
        expected, copied = moments(vae), copy.copy(vae)
    with copied:
        assert np.array_equal(moments(copied), expected)


def test_options_and_state_come_along(tiny_bundle):
    with open_vae(tiny_bundle, threads=1, check_finite=True, memory_budget="1GiB") as vae:
        vae.enable_tiling()
        vae.enable_slicing()
        vae.tile_sample_min_size, vae.tile_latent_min_size, vae.tile_overlap_factor = 32, 4, 0.5
        vae.on_tile = lambda done, of_all: None
        with pickle.loads(pickle.dumps(vae)) as copied:
            assert (copied._threads, copied.check_finite, copied.device) == (1, True, "cpu")
            assert copied.memory_budget == 1 << 30
            assert copied.use_tiling and copied.use_slicing and copied.tiling == "blended"
            sizes = copied.tile_sample_min_size, copied.tile_latent_min_size, copied.tile_overlap_factor
            assert sizes == (32, 4, 0.5)
            assert copied.on_tile is None, "a callback belongs to the original"
            vae.memory_budget = copied.memory_budget = None
            assert np.array_equal(moments(copied), moments(vae))


def test_a_backend_that_was_made_by_its_class_is_copied_as_well(tiny_bundle):
    from runtimes.onnxruntime import OnnxRuntimeVae

    with OnnxRuntimeVae(bundle=Bundle(tiny_bundle), threads=1) as vae, copy.copy(vae) as copied:
        assert np.array_equal(moments(copied), moments(vae))


def test_a_copy_that_cannot_be_made_whole_is_closed(tiny_bundle, monkeypatch):
    closed = []
    with open_vae(tiny_bundle, threads=1, memory_budget="1GiB") as vae:
        kept = pickle.dumps(vae)
    monkeypatch.setattr("runtimes.tiling.budget.RATES", {})
    monkeypatch.setattr(type(vae), "_close", lambda self: closed.append(self))
    with pytest.raises(ConfigError, match="measured model of memory"):
        pickle.loads(kept)
    assert len(closed) == 1


def test_seamless_tiling_comes_along(tileable_bundle):
    with open_vae(tileable_bundle, tiling="seamless") as vae, copy.deepcopy(vae) as copied:
        assert copied.use_tiling and copied.tiling == "seamless"


@pytest.mark.parametrize("backend", ["openvino", "flax"])
def test_every_backend_is_copied(request, backend):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"pip install 'vae-export[{backend}]'")
    with open_vae(request.getfixturevalue(f"{backend}_bundle")("fp32"), max_shapes=3) as vae:
        expected = moments(vae)
        with pickle.loads(pickle.dumps(vae)) as copied:
            assert copied._options == vae._options == {"max_shapes": 3}
            assert np.array_equal(moments(copied), expected)
        assert np.array_equal(moments(vae), expected)


def test_an_engine_is_copied_without_its_callback(fake_gpu, tensorrt_bundle):
    options: dict[str, Any] = {"contexts": 1, "progress": lambda *_: None}
    with open_vae(tensorrt_bundle("tensorrt"), **options) as vae, pickle.loads(pickle.dumps(vae)) as copied:
        assert copied._options == {"contexts": 1}
        assert np.array_equal(moments(copied), moments(vae))


def test_a_bundle_given_by_a_relative_path_is_found_from_another_directory(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_bundle.parent)
    with open_vae(tiny_bundle.name, threads=1) as vae:
        monkeypatch.chdir(tmp_path)
        copy.copy(vae).close()


def test_a_closed_vae_is_not_copied(tiny_bundle):
    vae = open_vae(tiny_bundle)
    vae.close()
    for way in WAYS.values():
        with pytest.raises(VaeError, match="closed"):
            way(vae)


def test_another_bundle_in_its_place_is_found(bundle_copy):
    path = bundle_copy()
    with open_vae(path, threads=1) as vae:
        kept = pickle.dumps(vae)
    shutil.rmtree(path)
    bundle_copy(lambda manifest: manifest["config"].update(scaling_factor=0.25)).rename(path)
    with pytest.raises(IntegrityError, match="replaced meanwhile"):
        pickle.loads(kept)


DATASET = """
import sys
import numpy as np, torch
from torch.utils.data import DataLoader, Dataset
from runtimes import open_vae

class Latents(Dataset):
    def __init__(self, vae):
        self.vae = vae

    def __len__(self):
        return 4

    def __getitem__(self, number):
        return torch.from_numpy(self.vae.encode(np.full((1, 3, 16, 16), number / 4, np.float32))[0].mode()[0])

if __name__ == "__main__":
    with open_vae(sys.argv[1], threads=1) as vae:
        dataset = Latents(vae)
        expected = torch.stack([dataset[n] for n in range(4)])
        loader = DataLoader(dataset, batch_size=2, num_workers=2, multiprocessing_context=sys.argv[2])
        print(torch.equal(torch.cat(list(loader)), expected))
"""


@pytest.mark.parametrize("start, backend", [("spawn", "onnxruntime"), ("forkserver", "openvino")])
def test_a_dataset_that_holds_one_goes_to_the_workers_of_a_dataloader(request, alone, tmp_path, start, backend):
    pytest.importorskip("torch")
    path = request.getfixturevalue("onnx_bundle" if backend == "onnxruntime" else "openvino_bundle")
    (tmp_path / "job.py").write_text(DATASET)
    runs_it = "import os, sys; os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    done = alone(runs_it, tmp_path / "job.py", path if backend == "onnxruntime" else path("fp32"), start)
    assert done == ["True"]
