"""What the crop rules promise.

Claims: crops are the official centred ones; every rule keeps a constant picture constant, works for frames smaller and
larger than the output, treats each frame alone, is torch's own resizing to the bit, and refuses what is not uint8 RGB.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_cache.encoder.preprocess import (
    CROP_RULES,
    IMAGENET_MEAN,
    IMAGENET_STD,
    ac_crop_box,
    ac_transform,
    eval_transform,
)

SIZES = [(360, 640), (640, 360), (90, 90), (20, 30), (7, 200)]


def noise(num_frames, height, width):
    return np.random.default_rng(0).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [
        (720, 1280, (0, 154, 720, 972)),
        (360, 640, (0, 77, 360, 486)),
        (480, 640, (0, 0, 480, 640)),
        (640, 360, (80, 0, 480, 360)),
        (10, 41, (0, 13, 10, 14)),
        (41, 12, (12, 0, 16, 12)),
    ],
)
def test_ac_crop_is_the_official_fallback(height, width, box):
    assert ac_crop_box(height, width) == box
    assert ac_crop_box(50, 100, (0.75, 1.25))[3] == 62, "62.5 is rounded half to even, as 10 * 1.35 is to 14"


@pytest.mark.parametrize("rule", CROP_RULES)
@pytest.mark.parametrize("size", SIZES)
def test_a_constant_picture_maps_to_its_normalised_colour(rule, size):
    colour = np.array([200, 30, 77], np.uint8)
    frames = np.broadcast_to(colour, (2, *size, 3))
    out = CROP_RULES[rule](frames, 48, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    expected = torch.from_numpy((colour / 255.0 - IMAGENET_MEAN) / IMAGENET_STD).float()
    assert out.shape == (2, 3, 48, 48)
    # float32 arithmetic on values of order 1.
    torch.testing.assert_close(out, expected.view(1, 3, 1, 1).expand_as(out), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rule", CROP_RULES)
def test_a_frame_does_not_depend_on_its_neighbours_and_other_forms_are_refused(rule):
    def apply(frames):
        return CROP_RULES[rule](frames, 32, mean=IMAGENET_MEAN, std=IMAGENET_STD)

    frames = noise(3, 50, 70)
    assert torch.equal(apply(frames)[1:2], apply(frames[1:2]))
    for other in (np.zeros((2, 8, 8, 3), np.float32), np.zeros((8, 8, 3), np.uint8), np.zeros((2, 3, 8, 8), np.uint8)):
        with pytest.raises(ValueError, match="uint8 RGB"):
            apply(other)


def test_square_rule_takes_the_centred_square():
    frames = noise(1, 40, 100)
    square = CROP_RULES["square"](frames, 32, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    assert torch.equal(square, ac_transform(frames[:, :, 30:70], 32))


@pytest.mark.parametrize("antialias", [False, True])
def test_eval_pixels_are_whole_uint8_levels(antialias):
    out = eval_transform(noise(1, 100, 120), 48, antialias=antialias, mean=(0, 0, 0), std=(1, 1, 1)) * 255
    assert (out - out.round()).abs().max() < 1e-3


@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 400), width=st.integers(1, 300), size=st.sampled_from([16, 48, 64, 96, 256]))
def test_pixels_are_to_the_bit_those_of_torch_resizing_the_whole_crop(height, width, size):
    frames = noise(1, height, width)
    top, left, crop_height, crop_width = ac_crop_box(height, width)
    crop = torch.from_numpy(frames[:, top : top + crop_height, left : left + crop_width]).permute(0, 3, 1, 2).float()
    expected = torch.nn.functional.interpolate(crop, (size, size), mode="bilinear", align_corners=False)
    shift, spread = (torch.tensor(values).view(3, 1, 1) * 255 for values in (IMAGENET_MEAN, IMAGENET_STD))
    assert torch.equal(ac_transform(frames, size), (expected - shift) / spread)
