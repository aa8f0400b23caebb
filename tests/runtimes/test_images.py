"""Images in, arrays out: the arithmetic is that of diffusers, and every odd file is either right or refused by name.

Tests runtimes/pixels.py, runtimes/images.py.
"""

import re

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from runtimes import BundleError, ShapeError
from runtimes.image_files import load_image
from runtimes.images import as_uint8_batch, crop_to_multiple, psnr, save_image, to_float, to_uint8

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (24, 40, 3), dtype=np.uint8)
GREY, PHOTO = PIXELS[..., 0], Image.fromarray(PIXELS)


def saved(path, image, **options):
    image.save(path, **options)
    return path


def as_rgb(grey):
    return np.stack([grey] * 3, axis=-1)


def test_all_256_values_survive_the_way_there_and_back():
    ramp = as_rgb(np.arange(256, dtype=np.uint8).reshape(1, 16, 16))
    floats = to_float(ramp)
    assert floats.dtype == np.float32 and floats.shape == (1, 3, 16, 16)
    assert floats.min() == -1 and floats.max() == 1
    assert np.array_equal(to_uint8(floats), ramp)


def test_floats_are_those_of_diffusers():
    expected = VaeImageProcessor(vae_scale_factor=8).preprocess(PHOTO).numpy()
    # 2 * (u / 255) - 1 there, u / 127.5 - 1 here: two roundings of numbers up to 2.
    np.testing.assert_allclose(to_float(PIXELS[None]), expected, rtol=0, atol=2.5e-7)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rounding_is_that_of_diffusers(dtype):
    samples = RNG.uniform(-1.5, 1.5, (2, 3, 64, 64)).astype(dtype)
    samples[0, :, :4] = ((np.arange(256) + 0.5) / 127.5 - 1).reshape(4, 64)  # half a step: up or down?
    expected = VaeImageProcessor().postprocess(torch.from_numpy(samples).float(), output_type="pil")
    assert np.array_equal(to_uint8(samples), np.stack([np.asarray(image) for image in expected]))


def test_transparency_is_laid_over_white(tmp_path):
    alpha = RNG.integers(0, 256, (24, 40), dtype=np.uint8)
    alpha[0], alpha[1] = 0, 255
    loaded = load_image(saved(tmp_path / "a.png", Image.fromarray(np.dstack([PIXELS, alpha]))))
    weight = alpha[..., None] / 255
    assert np.abs(loaded - (PIXELS * weight + 255 * (1 - weight))).max() <= 1  # Pillow blends in integers
    assert (loaded[0] == 255).all() and np.array_equal(loaded[1], PIXELS[1])


@pytest.mark.parametrize(("name", "transparency"), [("a.gif", 1), ("a.png", 1), ("a.png", bytes([255, 0, 255]))])
def test_a_transparent_palette_entry_becomes_white(tmp_path, name, transparency):
    image = Image.fromarray(GREY % 3, mode="P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    expected = np.array([[255, 0, 0], [255, 255, 255], [0, 0, 255]], np.uint8)[GREY % 3]
    assert np.array_equal(load_image(saved(tmp_path / name, image, transparency=transparency)), expected)


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("grey.png", Image.fromarray(GREY), as_rgb(GREY)),
        ("grey-alpha.png", Image.fromarray(GREY).convert("LA"), as_rgb(GREY)),
        ("one-bit.png", Image.fromarray(GREY >= 128), as_rgb(np.where(GREY >= 128, 255, 0))),
        ("cmyk.tif", Image.new("CMYK", (40, 24), (0, 255, 255, 0)), np.full((24, 40, 3), (255, 0, 0))),
        ("16-bit.png", Image.fromarray(GREY * np.uint16(256) + PIXELS[..., 1]), as_rgb(GREY)),  # its high byte
        ("16-bit.tif", Image.fromarray(GREY * np.uint16(256) + PIXELS[..., 1]), as_rgb(GREY)),
        ("rgb.webp", PHOTO, PIXELS),
    ],
)  # fmt: skip
def test_every_mode_becomes_rgb(tmp_path, name, image, expected):
    path = saved(tmp_path / name, image, **{"lossless": True} if "webp" in name else {})
    with Image.open(path) as opened:
        for source in (path, str(path), opened, image):
            assert np.array_equal(load_image(source), expected)


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
    assert np.array_equal(load_image(saved(tmp_path / "a.png", PHOTO, exif=exif)), UPRIGHT[orientation](PIXELS))


@pytest.mark.parametrize("tag", [b"\x01\x54", b"\x01\x00", b"\x01\x1a"])  # a short, a long and a rational by right
def test_orientation_is_applied_whatever_other_tags_hold(tmp_path, tag):
    """Cameras and editors write tags of the wrong type: here a text, in the place of a number."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    path = saved(tmp_path / "a.jpg", PHOTO, exif=exif)
    expected = load_image(path)
    assert expected.shape == (40, 24, 3)
    sound = path.read_bytes()
    path.write_bytes(sound.replace(b"\x01\x0e\x00\x02", tag + b"\x00\x02"))
    assert path.read_bytes() != sound and np.array_equal(load_image(path), expected)


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (Image.fromarray(GREY.astype(np.float32)), "floating-point pixels"),
        (Image.fromarray(GREY.astype(np.int32) * 65536), "grey values of 32 bits"),
        (Image.fromarray(GREY.astype(np.int32)), "grey values of 32 bits"),  # 0 to 255: black, as 16 bits
    ],
)
def test_grey_values_of_no_known_range_are_refused(tmp_path, image, says):
    for source in (image, saved(tmp_path / "a.tif", image)):
        with pytest.raises(ShapeError, match=says):
            load_image(source)


UNREADABLE = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a photograph\n" * 100),
    "cut short": lambda path: path.write_bytes(saved(path, PHOTO).read_bytes()[:-400]),
    "only its first bytes": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"),
    "missing": lambda path: None,
    "directory": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_what_is_no_whole_image_is_refused_by_name(tmp_path, what):
    UNREADABLE[what](tmp_path / "holiday.jpg")
    with pytest.raises(ShapeError, match=re.escape("holiday.jpg")):
        load_image(tmp_path / "holiday.jpg")
    if what == "cut short":
        with Image.open(tmp_path / "holiday.jpg") as lazy, pytest.raises(ShapeError, match="truncated"):
            load_image(lazy)


@pytest.mark.parametrize(("limit", "opens"), [(960, True), (959, False), (480, False), (479, False), (None, True)])
def test_a_decompression_bomb_is_refused_by_name(tmp_path, monkeypatch, limit, opens):
    path = saved(tmp_path / "bomb.png", PHOTO)  # 960 pixels; up to twice the limit Pillow only warns
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    if opens:
        assert np.array_equal(load_image(path), PIXELS)
    else:
        with pytest.raises(ShapeError, match=re.escape("bomb.png")):
            load_image(path)


def test_a_batch_may_be_given_in_many_ways(tmp_path):
    path = saved(tmp_path / "a.png", PHOTO)
    tensor = torch.from_numpy(PIXELS)
    for one in (PIXELS, PIXELS[None], path, str(path), PHOTO, [path], (PHOTO,), [PIXELS], tensor, [tensor]):
        assert np.array_equal(as_uint8_batch(one), PIXELS[None])
    assert as_uint8_batch([path, PHOTO, PIXELS, tensor]).shape == (4, 24, 40, 3)


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (PIXELS.astype(np.float32), "uint8 in 0..255, not float32"),
        ([PIXELS, PIXELS.astype(np.int64)], "uint8 in 0..255, not int64"),
        (GREY, "not [24, 40]; others are given as PIL.Image.fromarray(array), which is converted"),
        ([GREY[:, :3], GREY[:, :3]], "images of a list are [H, W, 3], not [24, 3]"),
        ([PIXELS[None]], "images of a list are [H, W, 3], not [1, 24, 40, 3]"),
        (np.dstack([PIXELS, GREY]), "not [1, 24, 40, 4]"),
        (PIXELS[None, None], "not [1, 1, 24, 40, 3]"),
        (PIXELS[:0], "not [1, 0, 40, 3], which is empty"),
        (PIXELS[None][:0], "not [0, 24, 40, 3], which is empty"),
        ([], "images are empty: a list with nothing in it"),
        ([PIXELS, PHOTO.crop((0, 0, 40, 16))], "of one size; these are [16, 40, 3], [24, 40, 3]"),
        ([PIXELS[0, 0], PIXELS[0]], "not [3]"),
        (None, "not object"),
        ([1, 2], "images of a list are [H, W, 3], not []"),
        ([[PIXELS]], "images of a list are [H, W, 3], not [1, 24, 40, 3]"),
        (b"holiday.jpg", "is not an image in a format that Pillow reads; a path is given as str or Path"),
    ],
)  # fmt: skip
def test_what_is_no_batch_of_images_is_refused(images, says):
    with pytest.raises(ShapeError, match=re.escape(says)):
        as_uint8_batch(images)


def test_an_image_is_written_whole_or_not_at_all(tmp_path):
    save_image(PIXELS, tmp_path / "a.png")
    assert np.array_equal(load_image(tmp_path / "a.png"), PIXELS)
    (tmp_path / "directory.png").mkdir()
    for path in (tmp_path / "a.unknown", tmp_path / "missing" / "a.png", tmp_path / "directory.png"):
        with pytest.raises(BundleError, match=re.escape(str(path))):
            save_image(PIXELS, path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "directory.png"]


def test_cutting_and_comparing():
    assert np.array_equal(crop_to_multiple(PIXELS[:23, :37], 8), PIXELS[3:19, 2:34])
    with pytest.raises(ShapeError, match="40x7"):
        crop_to_multiple(PIXELS[:7], 8)
    assert psnr(PIXELS, PIXELS) == float("inf")
    assert psnr(np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 51, np.uint8)) == pytest.approx(13.9794)  # 20 lg 5
