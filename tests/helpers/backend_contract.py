"""The promises of every backend, as a class that the test of each backend subclasses."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from runtimes import BackendUnavailable, ConfigError, NumericsError, ShapeError, VaeError, open_vae
from runtimes.images import to_float
from tests.helpers.damage import DAMAGE, assert_damage_is_found
from tests.helpers.inputs import SHAPES, TOLERANCE, images, latents, pixels, results
from tests.helpers.without_torch import BANNED, USE


class Exchanged:
    """An array of a library unknown to us: all it has is DLPack."""

    def __init__(self, array):
        self.__dlpack__, self.__dlpack_device__ = array.__dlpack__, array.__dlpack_device__


def reversed_view(x):
    return np.flip(np.flip(x).copy())


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


MEAN, STD = [-1.5, 2.0, -1.0, 2.5], [8.5, 6.0, 6.5, 0.25]
M, S = (np.array(values, np.float32).reshape(1, 4, 1, 1) for values in (MEAN, STD))
# What the config says, and how pipelines then scale raw latents and go back.
CONVENTIONS = {
    "scale and shift": ({}, lambda z: (z - 0.1) * 0.5, lambda z: z / 0.5 + 0.1),
    "scale": ({"shift_factor": None}, lambda z: z * 0.5, lambda z: z / 0.5),
    "Playground": ({"latents_mean": MEAN, "latents_std": STD}, lambda z: (z - M) * 0.5 / S, lambda z: z * S / 0.5 + M),
}
KINDS = pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])


class BackendContract:
    """What every backend promises.

    The test of a new backend subclasses this as `class TestNAME(BackendContract)`, sets the attributes below, and gives
    these fixtures in its module: `tiny_bundle`, the path of the tiny model's bundle in fp32; `vae`, that bundle opened
    for one test; `parsed`, a list of all bytes that reach the parser of the backend. Where it cannot keep a promise,
    it overrides the test and gives the reason.
    """

    backend: str
    #: of fp32, to what the reference computes
    tolerance = TOLERANCE
    #: files of a bundle that the backend parses
    files: tuple[str, ...]
    #: options to open a VAE that many tests share: with room for all their shapes
    options: dict[str, Any] = {}  # noqa: RUF012
    #: options that count something
    count_options: tuple[str, ...]
    #: names of devices that the backend does not know, and how its message ends the list of those it knows
    unknown_devices: tuple[str, ...]
    known_devices: str
    #: packages that must be installed, and the extra that installs them
    needs: tuple[str, ...]
    extra: str
    #: top-level packages that using a bundle loads, and that importing `runtimes` does not
    loads: frozenset[str]
    #: top-level packages that using a bundle never loads
    never_loads: frozenset[str] = frozenset(BANNED)
    #: program that opens and uses the bundle sys.argv[1], and what it prints
    use = USE
    use_prints: tuple[str, ...] = ("(1, 3, 72, 80)", "(2, 72, 80, 3)")

    open = staticmethod(open_vae)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run a test once for each item of an attribute of the class."""
        for name, items in {
            "parsed_file": self.files,
            "count_option": self.count_options,
            "unknown_device": self.unknown_devices,
            "needed": self.needs,
        }.items():
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, items)

    @pytest.fixture(scope="class")
    @classmethod
    def opened(cls, tiny_bundle: Any) -> Iterator[Any]:
        """The tiny bundle, opened for several tests. Do not change it."""
        with cls.open(tiny_bundle, **cls.options) as runtime:
            yield runtime

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_results_are_those_of_the_reference(self, opened, tiny_model, shape):
        x, z = images(*shape), latents(*shape)
        for ours, theirs in zip(
            results(opened, x, z), results(tiny_model, torch.from_numpy(x), torch.from_numpy(z)), strict=True
        ):
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=self.tolerance)

    def test_the_api_is_that_of_diffusers_and_the_manifest_is_at_hand(self, opened, tiny_model):
        x, z = images(), latents()
        (posterior,), (sample,) = opened.encode(x, return_dict=False), opened.decode(z, return_dict=False)
        assert np.array_equal(posterior.parameters, opened.encode(x)[0].parameters)
        assert np.array_equal(sample, opened.decode(z, generator=np.random.default_rng(0)).sample)
        assert (opened.config, opened.backend, opened.precision) == (tiny_model.config, self.backend, "fp32")
        assert opened.spec["encoder"].input.name == "sample" and opened.spec["decoder"].output.shape[1] == 3

    @pytest.mark.parametrize(
        ("kind", "dtype"),
        [(kind, dtype) for kind in (np.asarray, torch.from_numpy) for dtype in ("float16", "float32", "float64")]
        + [(torch.from_numpy, "bfloat16")],
    )
    def test_every_float_type_is_taken_and_answered_in_kind(self, opened, kind, dtype):
        x, z = (torch.from_numpy(array).to(getattr(torch, dtype)) for array in (images(2), latents(2)))
        expected = results(opened, x.float().numpy(), z.float().numpy())
        given = (x.numpy(), z.numpy()) if kind is np.asarray else (x, z)
        for answer, right in zip(results(opened, *given), expected, strict=True):
            assert type(answer) is type(kind(right)) and "float32" in str(answer.dtype)
            assert np.array_equal(answer, right)

    @pytest.mark.parametrize("make", [Exchanged, np.ndarray.tolist, np.asfortranarray, reversed_view])
    def test_whatever_holds_the_numbers_is_taken_and_left_as_it_is(self, opened, make):
        x, z = images(2, 9, 9), latents(2, 9, 9)
        kept = x.copy(), z.copy()
        opened.enable_tiling(), opened.enable_slicing()
        try:
            for answer, right in zip(results(opened, make(x), make(z)), results(opened, x, z), strict=True):
                assert isinstance(answer, np.ndarray) and np.array_equal(answer, right)
        finally:
            opened.disable_tiling(), opened.disable_slicing()
        assert np.array_equal(x, kept[0]) and np.array_equal(z, kept[1])

    @pytest.mark.parametrize("value", [0, -1, "two", 1.5, True])
    def test_a_count_that_is_none_is_refused(self, tiny_bundle, count_option, value):
        with pytest.raises(ConfigError, match=f"{count_option} must be a whole number of at least 1, not {value!r}"):
            self.open(tiny_bundle, **{count_option: value})

    def test_an_unknown_device_is_named_with_the_known(self, tiny_bundle, unknown_device):
        with pytest.raises(BackendUnavailable, match=re.escape(f"{self.known_devices}, not {unknown_device!r}")):
            self.open(tiny_bundle, device=unknown_device)

    def test_eight_threads_get_what_one_gets(self, tiny_bundle):
        inputs = [make(*shape) for make in (images, latents) for shape in SHAPES]
        with self.open(tiny_bundle) as vae, ThreadPoolExecutor(8) as pool:

            def call(i):
                x = inputs[i % len(inputs)]
                return vae.encode(x)[0].parameters if x.shape[1] == 3 else vae.decode(x)[0]

            serial = [call(i) for i in range(len(inputs))]
            rounds = pool.map(lambda thread: [(i, call(i)) for i in range(thread, thread + 20)], range(8))
            assert all(np.array_equal(answer, serial[i % len(inputs)]) for answers in rounds for i, answer in answers)

    @pytest.mark.parametrize("convention", CONVENTIONS)
    def test_latents_are_scaled_as_the_config_says(self, bundle_copy, convention):
        config, scaled, raw = CONVENTIONS[convention]
        u, z = pixels(2), latents(2)
        close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}  # the order of three roundings of numbers up to 20
        with self.open(bundle_copy(lambda manifest: manifest["config"].update(config))) as vae:
            posterior = vae.encode(to_float(u)).latent_dist
            np.testing.assert_allclose(vae.images_to_latents(u), scaled(posterior.mode()), **close)
            drawn = vae.images_to_latents(u, generator=np.random.default_rng(7))
            np.testing.assert_allclose(drawn, scaled(posterior.sample(np.random.default_rng(7))), **close)
            back = np.clip(vae.decode(raw(z))[0].transpose(0, 2, 3, 1) / 2 + 0.5, 0, 1) * 255
            for given in (z, torch.from_numpy(z)):
                restored = vae.latents_to_images(given)
                assert type(restored) is type(given) and str(restored.dtype).endswith("uint8")
                assert np.abs(np.asarray(restored) - back).max() <= 0.51  # rounded to the nearest

    def test_images_of_any_kind_become_latents(self, opened, tmp_path):
        u, path = pixels()[0], tmp_path / "a.png"
        Image.fromarray(u).save(path)
        expected = opened.images_to_latents(u)
        assert expected.dtype == np.float32 and expected.shape == (1, 4, 4, 6)
        for given in (u[None], [u], Image.fromarray(u), [Image.fromarray(u)], path, [str(path)]):
            assert np.array_equal(opened.images_to_latents(given), expected)

    def test_an_unknown_scaling_factor_is_never_guessed(self, bundle_copy):
        with self.open(bundle_copy(lambda manifest: manifest["config"].update(scaling_factor=None))) as vae:
            for use, given in ((vae.images_to_latents, pixels()), (vae.latents_to_images, latents())):
                with pytest.raises(ConfigError, match="scaling_factor"):
                    use(given)
            results(vae, images(), latents())  # raw latents need none

    @pytest.mark.parametrize(
        ("method", "given", "says"),
        [
            ("encode", zeros(1, 3, 1001, 64), "height 1001 is not a multiple of 8; pad to 1008"),
            ("encode", torch.zeros(1, 3, 64, 7), "width 7 is not a multiple of 8; pad to 8"),
            ("encode", zeros(1, 4, 64, 64), "[B, 3, height, width], not [1, 4, 64, 64]"),
            ("encode", zeros(1, 64, 64, 3), "not [1, 64, 64, 3]"),
            ("encode", zeros(3, 64, 64), "not [3, 64, 64]"),
            ("encode", zeros(0, 3, 64, 64), "not [0, 3, 64, 64]"),
            ("encode", torch.zeros(1, 3, 0, 64), "not [1, 3, 0, 64]"),
            ("encode", zeros(1, 3, 64, 64, dtype=np.uint8), "not uint8; uint8 images go to images_to_latents"),
            ("encode", torch.zeros(1, 3, 64, 64, dtype=torch.int32), "not torch.int32"),
            ("encode", zeros(1, 3, 64, 64, dtype=np.complex64), "not complex64"),
            ("encode", [[1.0, 2.0], [3.0]], "cannot be read as an array"),
            ("encode", None, "not object"),
            ("decode", zeros(1, 3, 8, 8), "[B, 4, height, width], not [1, 3, 8, 8]"),
            ("decode", zeros(4, 8, 8), "not [4, 8, 8]"),
            ("decode", zeros(1, 4, 8, 8, dtype=np.int64), "not int64"),
            ("latents_to_images", torch.zeros(1, 16, 8, 8), "not [1, 16, 8, 8]"),
            ("images_to_latents", zeros(1, 60, 64, 3, dtype=np.uint8), "height 60 is not a multiple of 8; pad to 64"),
            ("images_to_latents", zeros(1, 64, 64, 3), "not float32"),
        ],
    )
    def test_a_wrong_input_is_answered_with_the_value_and_the_rule(self, opened, method, given, says):
        with pytest.raises(ShapeError, match=re.escape(says)):
            getattr(opened, method)(given)

    @KINDS
    def test_nan_is_reported_where_it_is_asked_for(self, opened, tiny_bundle, kind):
        x, z = kind(images()), kind(latents())
        x[0, 0, 0, 0] = z[0, 0, 0, 0] = np.nan
        assert all(np.isnan(np.asarray(result)).any() for result in results(opened, x, z))
        with self.open(tiny_bundle, check_finite=True) as strict:
            results(strict, images(), latents())
            for graph, use, given in (("encoder", strict.encode, x), ("decoder", strict.decode, z)):
                with pytest.raises(NumericsError, match=f"{graph} of this fp32 bundle gave NaN"):
                    use(given)

    def test_a_closed_vae_says_so(self, vae):
        vae.close()
        vae.close()
        for use, given in (
            (vae.encode, images()),
            (vae.decode, latents()),
            (vae.images_to_latents, pixels()),
            (vae.latents_to_images, latents()),
        ):  # fmt: skip
            with pytest.raises(VaeError, match="closed"):
                use(given)

    @pytest.mark.parametrize("damage", DAMAGE)
    def test_a_damaged_file_is_named_before_a_byte_of_it_is_parsed(self, bundle_copy, parsed, parsed_file, damage):
        assert_damage_is_found(bundle_copy, parsed, parsed_file, damage, open=self.open)

    @pytest.mark.parametrize(("field", "use", "given"), [
        ("latent_channels", "decode", np.zeros((1, 8, 4, 4), np.float32)),
        ("in_channels", "encode", np.zeros((1, 8, 32, 32), np.float32)),
    ])  # fmt: skip
    def test_a_config_that_does_not_fit_the_graphs_ends_in_an_error_of_ours(self, bundle_copy, field, use, given):
        path = bundle_copy(lambda manifest: manifest["config"].update({field: 8}))
        with pytest.raises(VaeError), self.open(path) as vae:
            getattr(vae, use)(given)

    def test_a_bundle_is_opened_and_used_without_torch(self, alone, tiny_bundle):
        program = f"import sys, numpy as np, runtimes\nprint(*sys.modules)\n{self.use}\nprint(*sys.modules)"
        before, *printed, after = alone(program, tiny_bundle)
        assert not self.loads & set(before.split()), "importing runtimes loads no backend"
        assert tuple(printed) == self.use_prints
        loaded = {name.partition(".")[0] for name in after.split()}
        assert {"runtimes", *self.loads} <= loaded and not loaded & self.never_loads

    def test_where_a_package_is_missing_the_error_says_what_to_install(self, alone, tiny_bundle, needed):
        program = f"""
import sys, runtimes
sys.modules["{needed}"] = None
try: runtimes.open_vae(sys.argv[1])
except runtimes.BackendUnavailable as error: print(error)
"""
        (printed,) = alone(program, tiny_bundle)
        assert f"pip install 'vae-export[{self.extra}]'" in printed
