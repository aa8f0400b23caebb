"""Files of every kind become pixels in sRGB, grey, RGB or RGBA, or an error that says why not.

Tests runtimes/image_files.py.
"""

import io
import mmap
import os
import tempfile
import threading
import warnings
import zipfile
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from runtimes import ConfigError, ShapeError
from runtimes.image_files import load_image, load_pil
from runtimes.images import as_uint8_batch, picture_format, save_image, to_pil

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (24, 40, 3), dtype=np.uint8)
PHOTO = Image.fromarray(PIXELS)
ALPHA = RNG.integers(0, 256, (24, 40), dtype=np.uint8)
RGBA = np.dstack([PIXELS, ALPHA])


def saved(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


PNG = saved(PHOTO)


# What a file may come as ------------------------------------------------------------------------------------------


class Place(os.PathLike):
    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return self.path


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, io.BytesIO])
def test_the_content_of_a_file_is_read_like_the_file(kind):
    loaded = load_image(kind(PNG))
    assert np.array_equal(loaded, PIXELS) and loaded.flags.writeable
    for given in (kind(PNG), [kind(PNG)]):
        assert np.array_equal(as_uint8_batch(given), PIXELS[None])


def test_files_that_are_open_are_read_from_their_beginning_and_stay_open(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    with path.open("rb") as buffered, path.open("rb", buffering=0) as raw, tempfile.SpooledTemporaryFile() as spooled:
        spooled.write(PNG)  # and stands at its end
        with mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            for file in (buffered, raw, spooled, mapped):
                for _ in range(2):
                    assert np.array_equal(as_uint8_batch(file), PIXELS[None])
                assert not file.closed and file.read(1) == b""


def test_what_cannot_seek_is_read_as_it_comes(tmp_path):
    class Stream(io.RawIOBase):
        def readable(self):
            return True

        def seek(self, *_):
            raise io.UnsupportedOperation

        def read(self, size=-1):
            return PNG

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", PNG)
    with zipfile.ZipFile(tmp_path / "a.zip") as archive, archive.open("a.png") as member:
        files: list[Any] = [Stream(), member]
        for file in files:
            assert np.array_equal(load_image(file), PIXELS)


@pytest.mark.parametrize("as_bytes", [False, True])
def test_whatever_names_a_path_is_one(tmp_path, as_bytes):
    path = tmp_path / "ä.png"
    path.write_bytes(PNG)
    place = Place(os.fsencode(path) if as_bytes else str(path))
    assert np.array_equal(as_uint8_batch([place, path]), np.stack([PIXELS, PIXELS]))
    with pytest.raises(ShapeError, match=r"missing\.png does not exist"):
        load_image(Place(os.fsencode(tmp_path / "missing.png") if as_bytes else str(tmp_path / "missing.png")))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (b"", "empty"),
        (io.BytesIO(), "empty"),
        (b"holiday.jpg", "a path is given as str or Path"),
        (io.StringIO("text"), 'open it in mode "rb"'),
        (PNG[:-200], "truncated"),
        (3, "not int"),
        (None, "not NoneType"),
    ],
)
def test_what_is_no_image_is_refused_in_words(source, says):
    with pytest.raises(ShapeError, match=says):
        load_image(source)


def test_a_memoryview_of_pixels_is_an_array():
    assert np.array_equal(as_uint8_batch(PIXELS.data), PIXELS[None])


# Channels ---------------------------------------------------------------------------------------------------------


def test_rgba_keeps_what_is_transparent_and_the_colours_below_it():
    content = saved(Image.fromarray(RGBA))
    assert np.array_equal(load_image(content, 4), RGBA)
    opaque = np.dstack([PIXELS, np.full_like(ALPHA, 255)])
    assert np.array_equal(load_image(PNG, 4), opaque)
    assert np.array_equal(load_image(to_pil(RGBA), 4), RGBA)


def test_grey_is_the_lightness_of_colours_laid_over_white():
    assert np.array_equal(load_image(PNG, 1), np.asarray(PHOTO.convert("L"))[..., None])
    clear = np.dstack([PIXELS, np.zeros_like(ALPHA)])
    assert (load_image(to_pil(clear), 1) == 255).all()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_what_is_written_is_read_back(tmp_path, channels):
    pixels = RGBA[..., :channels]
    assert np.array_equal(load_image(to_pil(pixels), channels), pixels)
    for suffix in (".png", ".tiff"):
        save_image(pixels, tmp_path / f"a{suffix}")
        assert np.array_equal(load_image(tmp_path / f"a{suffix}", channels), pixels)


def test_a_format_without_transparency_is_refused_before_anything_is_written(tmp_path):
    for use in (lambda path: save_image(RGBA, path), lambda path: picture_format(path, 4)):
        with pytest.raises(Exception, match=r"no transparency; give a name that ends in \.png") as caught:
            use(tmp_path / "a.jpg")
        assert type(caught.value).__name__ == "BundleError" and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("channels", "pixels"),
    [(1, PIXELS[..., :1]), (1, PIXELS[..., 0]), (4, RGBA), (2, PIXELS[..., :2]), (5, np.dstack([RGBA, ALPHA]))],
)
def test_arrays_have_the_channels_of_the_model(channels, pixels):
    expected = pixels.reshape(1, 24, 40, channels)
    for given in (pixels, [pixels], (pixels,), expected):
        assert np.array_equal(as_uint8_batch(given, channels), expected)
    with pytest.raises(ShapeError, match=rf"\[B, H, W, {channels}\].*not \[1, 24, 40, 3\]"):
        as_uint8_batch(PIXELS, channels)


def test_files_for_other_numbers_of_channels_are_refused():
    with pytest.raises(ShapeError, match="images of 5 channels cannot be read from files"):
        as_uint8_batch(PNG, 5)


# Bits -------------------------------------------------------------------------------------------------------------

#: mode -> what is white, or from which mode Pillow converts to it
WHITE: dict[str, Any] = {
    "1": 1, "L": 255, "LA": (255, 255), "La": "LA", "P": "RGB", "PA": "P", "RGB": (255,) * 3, "RGBA": (255,) * 4,
    "RGBa": "RGBA", "RGBX": (255,) * 4, "CMYK": (0,) * 4, "YCbCr": (255, 128, 128), "HSV": (0, 0, 255),
    "LAB": (255, 128, 128), "I;16": 65535, "I;16L": 65535, "I;16B": 65535, "I;16N": 65535, "I": 255, "F": 255.0,
}  # fmt: skip


def white(mode):
    value = WHITE[mode]
    return white(value).convert(mode) if isinstance(value, str) else Image.new(mode, (8, 8), value)


@pytest.mark.parametrize("mode", WHITE)
def test_white_is_white_in_every_mode_or_there_is_an_error(mode):
    for channels in (1, 3, 4):
        if mode in ("I", "F"):
            with pytest.raises(ShapeError, match="nobody knows which"):
                load_image(white(mode), channels)
        else:
            assert load_image(white(mode), channels).min() >= (254 if mode == "LAB" else 255)  # LAB is rounded twice


def tiff(levels, bits, photometric, packed):
    """A TIFF of one strip, little-endian."""
    height, width = levels.shape
    entries = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8 + 2 + 9 * 12 + 4)]
    entries += [(277, 1), (278, height), (279, len(packed))]
    body = b"".join(
        tag.to_bytes(2, "little") + (4).to_bytes(2, "little") + (1).to_bytes(4, "little") + value.to_bytes(4, "little")
        for tag, value in entries
    )
    return b"II*\0\x08\0\0\0" + len(entries).to_bytes(2, "little") + body + bytes(4) + packed


def test_grey_of_9_to_16_bits_keeps_its_high_byte():
    grey = PIXELS[..., 0]
    levels = grey * np.uint16(256) + PIXELS[..., 1]
    expected = np.stack([grey] * 3, axis=-1)
    pgm = b"P5 40 24 65535\n" + levels.astype(">u2").tobytes()  # of which Pillow makes 32-bit integers
    white_is_zero = tiff(levels, 16, 0, (65535 - levels).astype("<u2").tobytes())
    twelve = levels // 16
    packed = np.stack([twelve[:, ::2] >> 4, (twelve[:, ::2] & 15) << 4 | twelve[:, 1::2] >> 8, twelve[:, 1::2] & 255])
    of_12_bits = tiff(levels, 12, 1, np.moveaxis(packed, 0, -1).astype(np.uint8).tobytes())
    for content in (saved(Image.fromarray(levels)), pgm, white_is_zero, of_12_bits):
        assert np.array_equal(load_image(content), expected)


def test_the_transparent_value_of_16_bit_grey_is_transparent():
    levels = np.array([[1000, 30000]], np.uint16)
    content = saved(Image.fromarray(levels), transparency=1000)
    assert load_image(content, 4)[0, :, 3].tolist() == [0, 255]
    assert load_image(content, 1)[0, :, 0].tolist() == [255, 117]


@pytest.mark.parametrize(
    "levels", [np.array([[0, 255]], np.int32), np.array([[0, 65535]], np.int32), np.array([[0, 1]], np.float32)]
)
def test_grey_of_32_bits_is_never_guessed(levels):
    for source in (Image.fromarray(levels), saved(Image.fromarray(levels), "TIFF")):
        with pytest.raises(ShapeError, match=r"nobody knows which .*; (save it with|give) "):
            load_image(source)


# Colours ----------------------------------------------------------------------------------------------------------


def lab_profile():
    """A profile of another space than sRGB that Pillow can make."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


def swapped_profile():
    """sRGB's, by whose tags red is blue and blue is red, and of another name."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = data.index(b"rXYZ"), data.index(b"bXYZ")
    data[red : red + 4], data[blue : blue + 4] = b"bXYZ", b"rXYZ"
    for name in (b"s\0R\0G\0B", b"sRGB"):
        while (at := data.find(name, 128)) >= 0:
            data[at : at + len(name)] = name.replace(b"R", b"X")
    return bytes(data)


def test_colours_are_converted_to_srgb():
    profile = swapped_profile()
    loaded = load_image(saved(PHOTO, icc_profile=profile))
    assert np.abs(loaded.astype(int) - PIXELS[..., ::-1]).max() <= 2  # rounding, of curves that are as steep as 13
    with_alpha = load_image(saved(Image.fromarray(RGBA), icc_profile=profile), 4)
    assert np.array_equal(with_alpha[..., 3], ALPHA) and np.array_equal(with_alpha[..., :3], loaded)


def test_what_is_in_srgb_is_left_alone():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(load_image(saved(PHOTO, icc_profile=profile)), PIXELS)


@pytest.mark.parametrize(("profile", "says"), [(b"no profile", "cannot be read"), (lab_profile(), "not one of RGB")])
def test_a_profile_that_does_not_fit_is_warned_of(profile, says):
    with pytest.warns(UserWarning, match=f"{says}.*taken as sRGB") as caught:
        assert np.array_equal(load_image(saved(PHOTO, icc_profile=profile)), PIXELS)
    assert caught[0].filename == __file__


# Frames -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF", "TIFF"])
def test_of_several_frames_the_first_is_taken_with_a_warning(tmp_path, format):
    frames = [Image.new("RGB", (16, 8), colour) for colour in ("white", "black", "red")]
    path = tmp_path / "moving.image"
    path.write_bytes(saved(frames[0], format, save_all=True, append_images=frames[1:]))
    with pytest.warns(UserWarning, match=r"moving\.image has several frames or pages: the first one") as caught:
        assert (load_image(path) == 255).all()
    assert len(caught) == 1 and caught[0].filename == __file__
    with Image.open(path) as opened:
        opened.seek(1)  # the caller's choice
        assert (load_image(opened) == 0).all()


def test_previews_of_a_photograph_are_no_frames():
    content = saved(PHOTO, "MPO", save_all=True, append_images=[PHOTO.resize((8, 8))])
    assert load_image(content).shape == (24, 40, 3)


# Sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "BMP"])
@pytest.mark.parametrize("limit", [100, 479, 480, 600])
def test_a_panorama_opens_with_a_higher_limit_and_pillows_own_is_as_before(monkeypatch, format, limit):
    content = saved(PHOTO, format, **({"lossless": True} if format == "WEBP" else {}))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # of 960; above half of it, Pillow only warns
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's DecompressionBombWarning is never seen
        with pytest.raises(ShapeError, match=r"too large to open safely.*raise max_pixels"):
            load_image(content)
        assert np.array_equal(load_image(content, max_pixels=960), PIXELS)
        with pytest.raises(ShapeError, match="40x24 pixels are more than 959"):
            load_image(content, max_pixels=959)
    assert limit == Image.MAX_IMAGE_PIXELS


def test_a_lower_limit_holds_too():
    with pytest.raises(ShapeError, match="40x24 pixels are more than 100"):
        load_image(PNG, max_pixels=100)


@pytest.mark.parametrize("max_pixels", [0, -1, 1.5, "9", True])
def test_a_limit_is_a_whole_number(max_pixels):
    with pytest.raises(ConfigError, match="max_pixels must be a whole number"):
        load_pil(PNG, max_pixels=max_pixels)


def test_limits_of_threads_do_not_mix(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    wrong = []

    def read(limit):
        for _ in range(30):
            try:
                opened = load_image(PNG, max_pixels=limit) is not None
            except ShapeError:
                opened = False
            if opened != (limit is not None and limit >= 960):
                wrong.append(limit)

    threads = [threading.Thread(target=read, args=(limit,)) for limit in (None, 700, 960, 2000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and Image.MAX_IMAGE_PIXELS == 600
