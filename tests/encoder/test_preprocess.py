"""What the crop rules promise.

Claims: crops are the official centred ones; every rule keeps a constant picture constant, works for frames smaller and
larger than the output, treats each frame alone, and is torch's own resizing to the bit.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_cache.encoder.preprocess import CROP_RULES, ac_crop_box, normalise, resizes_exactly
from tests.official_files import IMAGENET_MEAN, IMAGENET_STD, prepare

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
    out = prepare(CROP_RULES[rule], frames, 48)
    expected = torch.from_numpy((colour / 255.0 - IMAGENET_MEAN) / IMAGENET_STD).float()
    assert out.shape == (2, 3, 48, 48)
    # float32 arithmetic on values of order 1.
    torch.testing.assert_close(out, expected.view(1, 3, 1, 1).expand_as(out), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rule", CROP_RULES)
def test_a_frame_does_not_depend_on_its_neighbours(rule):
    frames = noise(3, 50, 70)
    together, alone = (prepare(CROP_RULES[rule], it, 32) for it in (frames, frames[1:2]))
    assert torch.equal(together[1:2], alone)


def test_square_rule_takes_the_centred_square():
    frames = noise(1, 40, 100)
    square, cut = prepare(CROP_RULES["square"], frames, 32), prepare(CROP_RULES["ac"], frames[:, :, 30:70], 32)
    assert torch.equal(square, cut)


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 256).map(lambda n: 4 * n) | st.integers(1, 800),
    width=st.integers(1, 600),
    size=st.sampled_from([64, 96, 256]),
)
def test_what_is_resized_later_has_the_same_bits_and_is_no_larger(height, width, size):
    frames = noise(1, height, width)
    later, now = (CROP_RULES["ac"].cut(frames, size, resize_later=later) for later in (True, False))
    assert later.nbytes <= now.nbytes
    statistics = CROP_RULES["ac"].statistics(IMAGENET_MEAN, IMAGENET_STD)
    one, other = (normalise(it, size, *statistics, in_levels=True) for it in (later, now))
    assert torch.equal(one, other)


@pytest.mark.parametrize("size", [(360, 640), (180, 320), (720, 1280), (480, 640)])
def test_of_the_usual_videos_uint8_is_what_travels(size):
    _, _, height, width = ac_crop_box(*size)
    assert resizes_exactly(height, width, 256) and not resizes_exactly(height, width, 224)
    travelling = CROP_RULES["ac"].cut(noise(1, *size), 256, resize_later=True)
    assert travelling.dtype == (torch.uint8 if height * width <= 4 * 256**2 else torch.float32)


@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 400), width=st.integers(1, 300), size=st.sampled_from([16, 48, 64, 96, 256]))
def test_pixels_are_to_the_bit_those_of_torch_resizing_the_whole_crop(height, width, size):
    frames = noise(1, height, width)
    top, left, crop_height, crop_width = ac_crop_box(height, width)
    crop = torch.from_numpy(frames[:, top : top + crop_height, left : left + crop_width]).permute(0, 3, 1, 2).float()
    expected = torch.nn.functional.interpolate(crop, (size, size), mode="bilinear", align_corners=False)
    shift, spread = (torch.tensor(values).view(3, 1, 1) * 255 for values in (IMAGENET_MEAN, IMAGENET_STD))
    assert torch.equal(prepare(CROP_RULES["ac"], frames, size), (expected - shift) / spread)
