"""Sizes and crops, and which images are encoded together.

Tests vae_export/dataset/encode.py, vae_export/dataset/images.py, vae_export/dataset/items.py.
"""

import io

import numpy as np
import pytest
from PIL import Image

from runtimes import ConfigError
from tests.helpers.dataset_samples import image_bytes
from vae_export.dataset.encode import MAX_WAITING_PIXELS, BatchSize, batches
from vae_export.dataset.images import SDXL_BUCKETS, Broken, Prepared, SizePolicy, Unchanged, parse_sizes, prepare
from vae_export.dataset.items import Item, Source


class OneImage(Source):
    """Its `root` holds the bytes."""

    def items(self, skip=None):
        yield Item("one", b"", 0, 0)

    def read(self, item):
        return self.root


def prepared(data, policy, sizes=(), known=None):
    return prepare(OneImage(data), Item("one", b"", 0, 0), known, SizePolicy(policy, tuple(sizes), 8))


def test_the_buckets_of_sdxl():
    assert len(set(SDXL_BUCKETS)) == len(SDXL_BUCKETS) == 41
    assert all((height, width) in SDXL_BUCKETS for width, height in SDXL_BUCKETS)
    assert all(side % 64 == 0 for size in SDXL_BUCKETS for side in size)
    # About a megapixel: the report's own list begins at nine tenths of it.
    assert all(0.89 < width * height / 1024**2 <= 1.0 for width, height in SDXL_BUCKETS)


@pytest.mark.parametrize(
    "size", [(3000, 2000), (640, 480), (100, 1000), (4000, 300), (1023, 1025), (1216, 832), (7, 5)]
)
def test_an_image_covers_its_bucket_and_no_more(size):
    width, height = size
    fit = SizePolicy("buckets", SDXL_BUCKETS, 8).fit(width, height)
    nearest = min(abs(w / h - width / height) for w, h in SDXL_BUCKETS)
    assert abs(fit.size[0] / fit.size[1] - width / height) == nearest
    # One side fits, the other is at least as long, and both are scaled alike but for rounding to whole pixels.
    assert fit.resized[0] == fit.size[0] or fit.resized[1] == fit.size[1]
    assert fit.resized[0] >= fit.size[0] and fit.resized[1] >= fit.size[1]
    scale = max(fit.size[0] / width, fit.size[1] / height)
    assert abs(fit.resized[0] - scale * width) <= 0.5 and abs(fit.resized[1] - scale * height) <= 0.5
    assert fit.crop == tuple((whole - kept) // 2 for whole, kept in zip(fit.resized, fit.size, strict=True))


def test_an_image_of_a_buckets_size_is_left_alone():
    sizes = ((64, 64), (128, 128))  # one shape: the first would be the nearest
    assert SizePolicy("buckets", sizes, 8).fit(128, 128) == ((128, 128), (0, 0), (128, 128))


def test_without_a_policy_sides_are_cut_to_multiples():
    data = image_bytes(0, (53, 47))
    found = prepared(data, "none")
    whole = np.asarray(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(found.pixels, whole[3:43, 2:50])
    assert found[2:] == ((47, 53), (47, 53), (3, 2))


def test_orientation_and_transparency_are_those_of_images_in_files():
    image = Image.fromarray(np.arange(48 * 40 * 3, dtype=np.uint32).astype(np.uint8).reshape(40, 48, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    found = prepared(file.getvalue(), "none")
    np.testing.assert_array_equal(found.pixels, np.asarray(image.transpose(Image.Transpose.ROTATE_270)))


def test_a_known_image_is_not_decoded():
    data = image_bytes(0)
    first = prepared(data, "none")
    assert isinstance(prepared(data, "none", known=first.sha256), Unchanged)
    assert isinstance(prepared(data, "none", known=b"another"), Prepared)


def test_a_bomb_is_broken_and_not_decoded(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    found = prepared(image_bytes(0), "none")
    assert isinstance(found, Broken) and "raise max_pixels" in found.reason
    assert found.sha256 is None  # tried again in the next run, which may have another limit


def test_reasons_are_the_same_each_time():
    data = image_bytes(0)[:-100]
    assert prepared(data, "none") == prepared(data, "none")


@pytest.mark.parametrize("text", ["", "1024", "1024x", "ax8", "8x8;8x8"])
def test_sizes_that_cannot_be_parsed(text):
    if text == "1024":
        assert parse_sizes(text) == ((1024, 1024),)
        return
    with pytest.raises(ConfigError, match="not WIDTHxHEIGHT"):
        parse_sizes(text)


def found_images(sides):
    for number, (height, width) in enumerate(sides):
        yield (
            Item(str(number), b"", 0, 0),
            Prepared(np.broadcast_to(np.uint8(0), (height, width, 3)), b"", (0, 0), (0, 0), (0, 0)),
        )


def test_batches_are_of_one_size_and_hold_everything_once():
    sides = [(8, 8), (8, 16)] * 5 + [(16, 16)]
    made = [
        [(item.id, image.pixels.shape) for item, image in batch] for batch in batches(found_images(sides), BatchSize(2))
    ]
    assert all(len({shape for _, shape in batch}) == 1 and len(batch) <= 2 for batch in made)
    assert sorted(int(id) for batch in made for id, _ in batch) == list(range(11))
    assert sum(len(batch) == 2 for batch in made) == 4


def test_what_waits_is_bounded():
    side = 1 << 10
    sides = [(side, side + number) for number in range(200)]  # no two alike
    taken = 0

    def counted():
        nonlocal taken
        for found in found_images(sides):
            taken += 1
            yield found

    given = most = 0
    for batch in batches(counted(), BatchSize(8)):
        most = max(most, taken - given)
        given += len(batch)
    assert given == 200 and most <= MAX_WAITING_PIXELS // side**2 + 1
