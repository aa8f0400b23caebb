"""Images in, arrays out: the arithmetic is that of diffusers, and every odd file is either right or refused by name."""

import re

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from runtimes import BundleError, ShapeError
from runtimes.images import as_uint8_batch, crop_to_multiple, load_image, psnr, save_image, to_float, to_uint8

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (24, 40, 3), dtype=np.uint8)


def saved(path, image, **options):
    image.save(path, **options)
    return path


# Arithmetic ---------------------------------------------------------------------------------------------------------


def test_all_256_values_survive_the_way_there_and_back():
    ramp = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    floats = to_float(ramp)
    assert floats.dtype == np.float32 and floats.shape == (1, 3, 16, 16)
    assert floats.min() == -1 and floats.max() == 1
    assert np.array_equal(to_uint8(floats), ramp)


def test_floats_are_those_of_diffusers():
    expected = VaeImageProcessor(vae_scale_factor=8).preprocess(Image.fromarray(PIXELS)).numpy()
    # 2 * (u / 255) - 1 there, u / 127.5 - 1 here: two roundings of numbers up to 2.
    np.testing.assert_allclose(to_float(PIXELS[None]), expected, rtol=0, atol=2.5e-7)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rounding_is_that_of_diffusers(dtype):
    samples = RNG.uniform(-1.5, 1.5, (2, 3, 64, 64)).astype(dtype)
    halves = (np.arange(256) + 0.5) / 127.5 - 1  # between two steps, where the direction of rounding shows
    samples[0, :, :4, :] = halves.reshape(4, 64)
    images = VaeImageProcessor().postprocess(torch.from_numpy(samples).float(), output_type="pil")
    assert np.array_equal(to_uint8(samples), np.stack([np.asarray(image) for image in images]))


# Files --------------------------------------------------------------------------------------------------------------


def test_a_plain_photograph_is_taken_as_it_is(tmp_path):
    path = saved(tmp_path / "a.png", Image.fromarray(PIXELS))
    with Image.open(path) as lazy:
        for source in (path, str(path), lazy, Image.fromarray(PIXELS)):
            assert np.array_equal(load_image(source), PIXELS)


def test_transparency_is_laid_over_white(tmp_path):
    alpha = RNG.integers(0, 256, (24, 40), dtype=np.uint8)
    alpha[0], alpha[1] = 0, 255
    rgba = Image.fromarray(np.dstack([PIXELS, alpha]))
    loaded = load_image(saved(tmp_path / "a.png", rgba))
    weight = alpha[..., None] / 255
    assert np.abs(loaded - (PIXELS * weight + 255 * (1 - weight))).max() <= 1  # Pillow blends in integers
    assert (loaded[0] == 255).all() and np.array_equal(loaded[1], PIXELS[1])


def test_a_transparent_palette_entry_becomes_white(tmp_path):
    image = Image.fromarray((np.arange(24 * 40) % 3).astype(np.uint8).reshape(24, 40), mode="P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    colours = np.array([[255, 0, 0], [255, 255, 255], [0, 0, 255]], np.uint8)
    expected = colours[np.asarray(image)]
    for name, transparency in (("a.gif", 1), ("a.png", 1), ("b.png", bytes([255, 0, 255]))):
        assert np.array_equal(load_image(saved(tmp_path / name, image, transparency=transparency)), expected)


def test_grey_one_bit_and_cmyk_become_rgb(tmp_path):
    grey = PIXELS[..., 0]
    for mode, name, expected in (
        ("L", "a.png", grey),
        ("1", "b.png", np.where(grey >= 128, 255, 0)),
        ("LA", "c.png", grey),
    ):
        image = Image.fromarray(grey).point(lambda v: 255 * (v >= 128)) if mode == "1" else Image.fromarray(grey)
        loaded = load_image(saved(tmp_path / name, image.convert(mode)))
        assert np.array_equal(loaded, np.stack([expected] * 3, axis=-1))
    cmyk = Image.merge("CMYK", [Image.new("L", (8, 8), value) for value in (0, 255, 255, 0)])
    assert (load_image(saved(tmp_path / "d.tif", cmyk)) == (255, 0, 0)).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_keeps_its_high_byte(tmp_path, suffix):
    values = RNG.integers(0, 65536, (24, 40), dtype=np.uint16)
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(values))
    with Image.open(path) as image:
        assert image.mode.startswith("I")
    assert np.array_equal(load_image(path), np.stack([values // 256] * 3, axis=-1))


# EXIF orientation -> what has to be done to the stored pixels, from the standard's table.
UPRIGHT = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "a.png", Image.fromarray(PIXELS), exif=exif)
    assert np.array_equal(load_image(path), UPRIGHT[orientation](PIXELS))


def half_a_jpeg(path):
    saved(path, Image.fromarray(PIXELS), format="JPEG")
    path.write_bytes(path.read_bytes()[:-400])


UNREADABLE = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a photograph\n" * 100),
    "cut short": half_a_jpeg,
    "only its first bytes": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"),
    "missing": lambda path: None,
    "directory": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_what_is_no_whole_image_is_refused_by_name(tmp_path, what):
    path = tmp_path / "holiday.jpg"
    UNREADABLE[what](path)
    with pytest.raises(ShapeError, match=re.escape("holiday.jpg")):
        load_image(path)


def test_an_opened_image_that_is_cut_short_is_refused_too(tmp_path):
    half_a_jpeg(tmp_path / "holiday.jpg")
    with Image.open(tmp_path / "holiday.jpg") as image, pytest.raises(ShapeError, match="cannot be read"):
        as_uint8_batch(image)


@pytest.mark.parametrize(("limit", "opens"), [(960, True), (959, False), (480, False), (479, False), (None, True)])
def test_a_decompression_bomb_is_refused_by_name(tmp_path, monkeypatch, limit, opens):
    path = saved(tmp_path / "bomb.png", Image.fromarray(PIXELS))  # 960 pixels; Pillow warns up to twice its limit
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    if opens:
        assert np.array_equal(load_image(path), PIXELS)
    else:
        with pytest.raises(ShapeError, match=re.escape("bomb.png")):
            load_image(path)


# Batches ------------------------------------------------------------------------------------------------------------


def test_a_batch_may_be_given_in_many_ways(tmp_path):
    path, image = saved(tmp_path / "a.png", Image.fromarray(PIXELS)), Image.fromarray(PIXELS)
    for one in (PIXELS, PIXELS[None], path, str(path), image, [path], (image,), [PIXELS]):
        assert np.array_equal(as_uint8_batch(one), PIXELS[None])
    assert as_uint8_batch([path, image, PIXELS]).shape == (3, 24, 40, 3)


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (PIXELS.astype(np.float32), "uint8 in 0..255, not float32"),
        (PIXELS.astype(np.int64), "uint8 in 0..255, not int64"),
        ([PIXELS, PIXELS.astype(np.float32)], "uint8"),
        (PIXELS[..., 0], "not [24, 40]"),
        (np.dstack([PIXELS, PIXELS[..., :1]]), "not [1, 24, 40, 4]"),
        (PIXELS[None, None], "not [1, 1, 24, 40, 3]"),
        (PIXELS[:0], "not [1, 0, 40, 3]"),
        (np.empty((0, 8, 8, 3), np.uint8), "not [0, 8, 8, 3]"),
        ([], "empty list"),
        ([PIXELS, PIXELS[:16]], "of one size; these are [16, 40, 3], [24, 40, 3]"),
        ([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 16))], "of one size"),
        ([PIXELS[0, 0], PIXELS[0]], "of one size"),
        (None, "not object"),
        ([1, 2], "not int"),
        ([[PIXELS]], "not list"),
        (b"holiday.jpg", "not int"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(images, says):
    with pytest.raises(ShapeError, match=re.escape(says)):
        as_uint8_batch(images)


# Writing and comparing ----------------------------------------------------------------------------------------------


def test_an_image_is_written_whole_or_not_at_all(tmp_path):
    save_image(PIXELS, tmp_path / "a.png")
    assert np.array_equal(load_image(tmp_path / "a.png"), PIXELS)
    for path in (tmp_path / "a.unknown", tmp_path / "missing" / "a.png"):
        with pytest.raises(BundleError, match=re.escape(str(path))):
            save_image(PIXELS, path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_an_image_is_cut_to_its_middle():
    assert np.array_equal(crop_to_multiple(PIXELS[:23, :37], 8), PIXELS[3:19, 2:34])
    with pytest.raises(ShapeError, match="40x7"):
        crop_to_multiple(PIXELS[:7], 8)


def test_psnr():
    assert psnr(PIXELS, PIXELS) == float("inf")
    assert psnr(np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 51, np.uint8)) == pytest.approx(13.9794)  # 255 / 51
