"""Each shape is compiled once and kept, for all threads, in memory and in a cache on disk."""

import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from runtimes import (
    ConfigError,
    IntegrityError,
    NotInstalled,
    VaeError,
    open_vae,
)
from tests.helpers.inputs import TOLERANCE, images, latents
from tests.helpers.references import alive, cases
from vae_export.comparison import compare, opened_bundle

pytest.importorskip("runtimes.openvino", exc_type=NotInstalled)

XML, BIN = "vae_decoder/openvino_model.xml", "vae_decoder/openvino_model.bin"


def test_more_shapes_than_are_kept_are_compiled_anew_and_right(tiny_bundle, tiny_model, compiled):
    arrays = [latents(*shape) for shape in ((1, 2, 3), (1, 3, 2), (2, 2, 3), (1, 2, 3))]
    with open_vae(tiny_bundle, max_shapes=2) as vae:
        for done, case in enumerate(cases(tiny_model, arrays), 1):
            np.testing.assert_allclose(vae.decode(case.array).sample, case.expected, rtol=0, atol=TOLERANCE)
            assert len(compiled) == done  # two are kept, and a third had come between
            assert len(alive(compiled)) == min(done, 2)
        vae.decode(arrays[2]), vae.decode(arrays[3])
        assert len(compiled) == len(arrays), "the two last ones were at hand"
    assert not alive(compiled), "closing frees them"


def test_the_shape_that_was_not_used_for_longest_goes_first(tiny_bundle, compiled):
    first, second, third = latents(1, 2, 3), latents(1, 3, 2), latents(1, 2, 2)
    with open_vae(tiny_bundle, max_shapes=2) as vae:
        for z in (first, second, first, third, first):
            vae.decode(z)
        assert len(compiled) == 3


def test_eight_threads_may_fight_for_one_place(tiny_bundle, compiled):
    arrays = [images(1, 1, 1), latents(1, 1, 1), latents(2, 1, 2)]
    with open_vae(tiny_bundle, max_shapes=1, threads=1) as vae, ThreadPoolExecutor(8) as pool:

        def call(i):
            x = arrays[i % len(arrays)]
            return vae.encode(x)[0].parameters if x.shape[1] == 3 else vae.decode(x)[0]

        serial = [call(i) for i in range(len(arrays))]
        answers = list(pool.map(call, range(12)))
        assert all(np.array_equal(answer, serial[i % len(arrays)]) for i, answer in enumerate(answers))
        assert len(alive(compiled)) <= 2  # one of each graph


def test_threads_that_meet_a_new_shape_compile_it_once(tiny_bundle, compiled):
    z = latents(1, 7, 4)
    with open_vae(tiny_bundle) as vae, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: vae.decode(z).sample, range(16)))
    assert len(compiled) == 1
    assert all(np.array_equal(answer, answers[0]) for answer in answers)


def test_weights_are_held_of_those_graphs_only_that_are_called(vae):
    assert [graph._loaded for graph in vae._graphs.values()] == [None, None]
    vae.decode(latents())
    assert vae._graphs["encoder"]._loaded is None and vae._graphs["decoder"]._loaded is not None


def test_a_bundle_that_is_replaced_after_it_was_opened_is_read_as_it_was(bundle_copy, tiny_model):
    path, z = bundle_copy(), latents()
    with open_vae(path) as vae:
        shutil.rmtree(path)
        case = next(iter(cases(tiny_model, [z])))
        assert compare([case], "openvino", opened_bundle(vae), "fp32")


@pytest.mark.parametrize("file", [XML, BIN])
def test_a_file_that_is_changed_after_the_bundle_was_opened_is_not_parsed(bundle_copy, parsed, file):
    path = bundle_copy()
    with open_vae(path) as vae:
        before = len(parsed)
        data = bytearray((path / file).read_bytes())
        data[len(data) // 2] ^= 1
        with open(path / file, "r+b") as opened:  # in place: the file that is open
            opened.write(data)
        with pytest.raises(IntegrityError, match=f"{file} was changed"):
            vae.decode(latents())
        assert len(parsed) == before
        vae.encode(images())  # the rest works


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_bounds_the_threads_of_a_call(tiny_bundle, tiny_model, compiled, threads):
    (case,) = cases(tiny_model, [latents()])
    with open_vae(tiny_bundle, threads=threads) as vae:
        np.testing.assert_allclose(vae.decode(case.array).sample, case.expected, rtol=0, atol=TOLERANCE)
        assert alive(compiled)[0].get_property("INFERENCE_NUM_THREADS") == threads


def test_a_cache_that_cannot_be_used_is_said_at_once(tiny_bundle, tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=re.escape(f"cache_dir {path} cannot be used")):
            open_vae(tiny_bundle, cache_dir=path)


def test_a_shape_that_fails_takes_no_place_from_those_that_work(tiny_bundle, compiled, monkeypatch):
    with open_vae(tiny_bundle, max_shapes=2, threads=1) as vae:
        vae.decode(latents(1, 2, 3))
        monkeypatch.setattr(vae._graphs["decoder"], "_compile", lambda *_: (_ for _ in ()).throw(VaeError("failed")))
        for side in (4, 5, 6):
            with pytest.raises(VaeError, match="failed"):
                vae.decode(latents(1, side, side))
        vae.decode(latents(1, 2, 3))
        assert len(compiled) == 1


def test_compiled_graphs_are_kept_in_the_cache_and_give_the_same(tiny_bundle, vae, tmp_path):
    z, directory = latents(), tmp_path / "new" / "cache"
    expected = vae.decode(z).sample
    with open_vae(tiny_bundle, threads=1, cache_dir=directory) as first:
        assert np.array_equal(first.decode(z).sample, expected)
    kept = sorted(directory.iterdir())
    assert kept and all(file.stat().st_size for file in kept)
    with open_vae(tiny_bundle, threads=1, cache_dir=str(directory)) as second:
        assert np.array_equal(second.decode(z).sample, expected)
    assert sorted(directory.iterdir()) == kept
    for file in kept:
        file.write_bytes(file.read_bytes()[:1000])
    with open_vae(tiny_bundle, threads=1, cache_dir=directory) as third:
        assert np.array_equal(third.decode(z).sample, expected), "a broken cache is only slower"


def test_a_cache_tells_bundles_with_other_weights_apart(tiny_bundle, bundle_copy, tmp_path):
    weights = np.frombuffer((tiny_bundle / BIN).read_bytes(), np.uint8).copy()
    middle = len(weights) // 2 // 4 * 4
    weights[middle : middle + 4] = np.frombuffer(np.float32(5), np.uint8)  # one weight in a hundred thousand
    other, z = bundle_copy(files={BIN: weights.tobytes()}), latents()
    with open_vae(other, threads=1) as plain:
        expected = plain.decode(z).sample
    for path in (tiny_bundle, other):
        with open_vae(path, threads=1, cache_dir=tmp_path / "cache") as vae:
            assert np.array_equal(vae.decode(z).sample, expected) == (path is other)
