"""Claims: every encode mode samples at the stride ceil(rate / fps) and encodes each frame once, in order.

A step is anchored at the last frame that its tubelet has seen, and in clip mode each clip is a segment of its own.
"""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jepa_cache.encoding.steps import sampling_stride
from tests.encoded import plan_steps

RATES = st.sampled_from([5.0, 10.0, 15.0, 20.0, 24.0, 25.0, 30000 / 1001, 30.0, 60.0])


@st.composite
def requests(draw):
    rate = draw(RATES)
    tubelet = draw(st.integers(1, 4))
    return {
        "num_frames": draw(st.integers(1, 700)),
        "video_fps": rate,
        "fps": draw(st.floats(0.5, rate)),
        "mode": draw(st.sampled_from(["frame", "tubelet", "clip"])),
        "frames_per_clip": tubelet * draw(st.integers(1, 8)),
        "tubelet_size": tubelet,
    }


def group_of(request):
    return {"frame": 1, "tubelet": request["tubelet_size"], "clip": request["frames_per_clip"]}[request["mode"]]


def plan(request):
    """The plan, or None for an episode that is too short, after checking that it is."""
    try:
        return plan_steps(**request)
    except ValueError as error:
        stride = sampling_stride(request["video_fps"], request["fps"])
        assert len(range(0, request["num_frames"], stride)) < group_of(request)
        assert f"{request['mode']} mode needs {group_of(request)}; lower encode.frames_per_clip" in str(error)
        return None


@given(rate=RATES, share=st.floats(0.01, 1))
def test_the_true_rate_is_the_highest_that_is_not_above_the_one_asked_for(rate, share):
    stride = sampling_stride(rate, rate * share)
    slack = 1 + 2e-6  # of header rates such as 30000/1001
    assert rate / stride <= rate * share * slack
    assert stride == 1 or rate / (stride - 1) * slack > rate * share


def test_official_rates_give_the_official_strides_and_more_frames_than_there_are_are_refused():
    for rate, fps, stride in ((15, 4, 4), (20, 5, 4), (20, 20, 1), (30000 / 1001, 10000 / 1001, 3), (20.000001, 5, 4)):
        assert sampling_stride(rate, fps) == stride
    with pytest.raises(ValueError, match=r"encode\.fps 21 is above the video's 20"):
        sampling_stride(20.0, 21)


@given(requests())
def test_sampled_frames_are_used_in_order_each_once_and_steps_and_segments_follow_from_them(request):
    if (result := plan(request)) is None:
        return
    sampled = list(range(0, request["num_frames"], sampling_stride(request["video_fps"], request["fps"])))
    used, per_step = result.inputs.reshape(-1).tolist(), 1 if request["mode"] == "frame" else request["tubelet_size"]
    assert used == sampled[: len(used)], "in order, each once"
    assert len(sampled) - len(used) < group_of(request), "only an incomplete group is skipped"
    assert result.inputs.shape[1] == group_of(request) and result.inputs.dtype == np.int64
    assert result.anchors.tolist() == used[per_step - 1 :: per_step], "the last frame of a step's tubelet"
    covered = [step for start, stop in result.segments.tolist() for step in range(start, stop)]
    assert covered == list(range(len(result.anchors)))
    if request["mode"] == "clip":
        assert all(stop - start == group_of(request) // per_step for start, stop in result.segments.tolist())
        for (start, stop), frames in zip(result.segments.tolist(), result.inputs, strict=True):
            assert set(result.anchors[start:stop]) <= set(frames.tolist()), "each clip is a segment"
    else:
        assert len(result.segments) == 1
    if len(result.anchors) > 1:
        (distance,) = set(np.diff(result.anchors).tolist())
        assert result.step_hz == pytest.approx(float(Fraction(request["video_fps"]) / distance), rel=1e-12)
