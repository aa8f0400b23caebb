"""Profiles: what a user may say, what is refused and how to say it right, and which one a shape takes."""

import dataclasses
import re

import pytest

from runtimes.errors import ConfigError, ShapeError
from runtimes.tensorrt.profiles import DEFAULT, Profile, Range, checked, make_profile, nearest, parse_profile


def test_a_profile_is_what_was_written():
    profile = Profile(Range(1, 2, 4), Range(512, 768, 1024), Range(256, 512, 2048))
    assert parse_profile("1..4x512..1024x256..2048@2x768x512", 8) == profile
    assert str(profile) == "1..4 x 512..1024 x 256..2048 (best at 2x768x512)"
    assert Profile.from_dict(profile.to_dict(), 8) == profile


def test_what_is_not_said_is_the_smallest_batch_and_the_largest_image():
    assert parse_profile("2..4x512..1024x64", 8) == Profile(Range(2, 2, 4), Range(512, 1024, 1024), Range(64, 64, 64))
    assert make_profile("1", " 64 ", "64..72", opt=None, factor=8).width == Range(64, 72, 72)


def test_the_decoder_takes_a_profile_in_latents():
    profile = parse_profile("1..4x512..1024x256..2048@2x768x512", 8)
    assert profile.shapes("encoder", 3, 8) == [(1, 3, 512, 256), (2, 3, 768, 512), (4, 3, 1024, 2048)]
    assert profile.shapes("decoder", 16, 8) == [(1, 16, 64, 32), (2, 16, 96, 64), (4, 16, 128, 256)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("512x512", "profile '512x512' is not BATCHxHEIGHTxWIDTH, as in 1..4x"),
        ("1x2x3x4", "is not BATCHxHEIGHTxWIDTH"),
        ("", "is not BATCHxHEIGHTxWIDTH"),
        ("1xax64", "height 'a' is no size and no range of sizes, such as 1024 or 512..1024"),
        ("1x64x64..", "width '64..' is no size"),
        ("-1x64x64", "batch '-1' is no size"),
        ("1x64.5x64", "height '64.5' is no size"),
        ("1x1024..512x64", "height '1024..512' begins above its end; write 512..1024"),
        ("1x64x64@64x64", "preferred sizes '64x64' are not BATCHxHEIGHTxWIDTH"),
        ("1x64x64@", "preferred sizes '' are not"),
        ("1x64..128x64@1x256x64", "height of a profile goes from 64 to 128, best at 256"),
        ("1x64x64@2x64x64", "batch of a profile goes from 1 to 1, best at 2"),
        ("1x100x64", "height 100 of a profile is not a multiple of 8; take 104"),
        ("1x64x8..100", "width 100 of a profile is not a multiple of 8; take 104"),
        ("1x64..128x64@1x100x64", "height 100 of a profile is not a multiple of 8; take 104"),
        ("0x64x64", "sizes are whole numbers from 1 to 65536"),
        ("1x0..64x64", "sizes are whole numbers from 1 to 65536"),
        ("1x64x131072", "sizes are whole numbers from 1 to 65536"),
    ],
)
def test_a_wrong_profile_is_answered_with_the_value_and_the_way_out(text, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        parse_profile(text, 8)


@pytest.mark.parametrize("value", [True, 1.0, "1", None, -8])
def test_sizes_that_are_no_whole_numbers_are_refused(value):
    with pytest.raises(ConfigError, match="whole numbers"):
        checked(dataclasses.replace(DEFAULT, batch=Range(value, value, value)), 8)


GOOD = DEFAULT.to_dict()


@pytest.mark.parametrize(
    "data",
    [
        {},
        {**GOOD, "batch": 1},
        {**GOOD, "width": {"min": 8, "max": 8}},
        {**GOOD, "width": {**GOOD["width"], "best": 8}},
    ],
    ids=str,
)
def test_data_that_is_no_profile_is_refused(data):
    with pytest.raises(ConfigError, match="is no profile: batch, height and width with min, opt and max"):
        Profile.from_dict(data, 8)


def test_the_nearest_profile_is_that_whose_best_is_the_least_work_away():
    small, large = parse_profile("1..4x64..512x64..512@1x64x64", 8), parse_profile("1x64..1024x64..1024", 8)
    profiles = [large, small]
    for shape, chosen in (
        ((1, 64, 64), small),
        ((1, 512, 512), large),  # a quarter of what the one does best, and 64 times the other's
        ((2, 512, 512), small),  # which alone holds it
        ((1, 1024, 64), large),
    ):
        assert profiles[nearest(profiles, *shape)] is chosen
    assert nearest([small, small], 1, 64, 64) == 0


@pytest.mark.parametrize("shape", [(5, 64, 64), (1, 56, 64), (1, 64, 1032)])
def test_a_shape_outside_is_answered_with_all_profiles(shape):
    profiles = [parse_profile("1..4x64..512x64..512", 8), parse_profile("1x64..1024x64..1024", 8)]
    says = (
        " x ".join(map(str, shape)) + " (batch, height, width in pixels) is outside of what the engine was built for: "
    )
    with pytest.raises(ShapeError, match=re.escape(says + "; ".join(map(str, profiles)) + ". Tiling")):
        nearest(profiles, *shape)
