"""Claims: one picture from both decoders, whatever the container does: turned, several streams, unusual pixels, damaged packets.

The frames are the ones that a player shows. What decord gets wrong is refused under its name and read by PyAV else. Damage of a
recording is counted in the error, the same at every stride; damage outside of it does not matter.
"""

import importlib.util
import re

import numpy as np
import pytest

from jepa_cache.media.probe import DecodeError, probe_video
from jepa_cache.media.video import open_video
from tests.makers import make_video
from tests.videos import add_cover, damage_packet, flag_packet, join_streams, make_pixels, turn_video

HAS_DECORD = importlib.util.find_spec("decord") is not None
DECODERS = ["pyav", "auto", *(["decord"] if HAS_DECORD else [])]
NUM_FRAMES = 90


def read(video, decoder="auto", stride=1, first_frame=0, num_frames=None):
    with open_video(video, decoder, first_frame=first_frame, num_frames=num_frames) as opened:
        stop = opened.info.num_frames - first_frame if num_frames is None else num_frames
        return opened.read(np.arange(0, stop, stride))


@pytest.fixture(scope="module")
def video():
    return make_video(NUM_FRAMES, options={"g": "30", "bf": "2"})


# A pixel at (x, y) is shown at (a x + c y, b x + d y); beside it what that makes of rows and columns [F, h, w, 3].
TURNS = {
    "upright": ((1, 0, 0, 1), lambda frames: frames),
    "clockwise": ((0, 1, -1, 0), lambda frames: np.rot90(frames, -1, (1, 2))),
    "upside down": ((-1, 0, 0, -1), lambda frames: np.rot90(frames, 2, (1, 2))),
    "anticlockwise": ((0, -1, 1, 0), lambda frames: np.rot90(frames, 1, (1, 2))),
    "mirrored": ((-1, 0, 0, 1), lambda frames: frames[:, :, ::-1]),
    "mirrored and anticlockwise": ((0, 1, 1, 0), lambda frames: frames.transpose(0, 2, 1, 3)),
}


@pytest.mark.parametrize("decoder", ["auto", "pyav"])
@pytest.mark.parametrize("turn", TURNS)
def test_frames_are_turned_as_they_are_shown_wherever_the_recording_begins(video, turn, decoder):
    matrix, shown = TURNS[turn]
    turned, wanted = turn_video(video, matrix), shown(read(video))
    info = probe_video(turned)
    assert (info.height, info.width) == wanted.shape[1:3]
    for first_frame in (0, 70):
        assert np.array_equal(read(turned, decoder, 3, first_frame), wanted[first_frame::3])


def test_a_video_turned_by_other_than_quarter_turns_is_refused(video):
    with pytest.raises(DecodeError, match="quarter turns"):
        probe_video(turn_video(video, (0.7, 0.7, -0.7, 0.7)))


@pytest.mark.skipif(not HAS_DECORD, reason="decord is not installed")
def test_decord_refuses_a_turned_video_by_name(video):
    with pytest.raises(DecodeError, match=r"turned or mirrored.*'auto' or 'pyav'"):
        read(turn_video(video, TURNS["clockwise"][0]), "decord")


def test_a_cover_picture_is_not_taken_for_the_video(video):
    assert np.array_equal(read(add_cover(video)), read(video))


def test_the_first_video_stream_is_read_however_large_the_others_are(video):
    other = make_video(NUM_FRAMES, 5, size=(96, 128))
    for first, second in ((video, other), (other, video)):
        assert np.array_equal(read(join_streams(first, second)), read(first))
    if HAS_DECORD:
        with pytest.raises(DecodeError, match="several video streams"):
            read(join_streams(video, other), "decord")


@pytest.mark.parametrize(
    "pixels", ["yuv420p", "yuvj420p", "yuv422p", "yuv444p", "gray", "yuv420p10le", "yuv422p10le", "yuv444p10le"]
)
def test_pixels_are_the_same_from_every_decoder_that_takes_them(pixels):
    video = make_pixels(pixels)
    wanted = read(video, "pyav", 4)
    assert np.array_equal(read(video, "auto", 4), wanted)
    if HAS_DECORD and pixels.endswith("10le"):
        with pytest.raises(DecodeError, match=pixels):
            read(video, "decord", 4)
    elif HAS_DECORD:
        assert np.array_equal(read(video, "decord", 4), wanted)


@pytest.mark.skipif(not HAS_DECORD, reason="decord is not installed")
def test_decord_refuses_a_transport_stream_whose_frames_it_mixes_up():
    with pytest.raises(DecodeError, match="transport stream"):
        read(make_video(30, container="mpegts"), "decord")


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("codec", ["libx264", "mpeg4", "mpeg2video", "mjpeg"])
def test_damaged_frames_are_counted_the_same_at_every_stride(codec, decoder):
    options = {"strict": "unofficial"} if codec == "mjpeg" else {"g": "12", "bf": "0"}
    video = make_video(40, codec=codec, size=(96, 128), options=options)
    damaged = damage_packet(damage_packet(video, 17), 25)
    reasons = set()
    for stride in (1, 4):
        with pytest.raises(DecodeError) as caught:
            read(damaged, decoder, stride)
        reasons.add(str(caught.value))
    assert len(reasons) == 1
    assert re.search(
        r"\((corrupt frames: 2|missing frames: 2; undecodable packets: 2); the first at frame 17 of 40\)", reasons.pop()
    )


@pytest.mark.parametrize("decoder", DECODERS)
def test_damage_outside_the_recording_does_not_matter(decoder):
    video = make_video(NUM_FRAMES, size=(96, 128), options={"g": "20", "bf": "0"})
    damaged = damage_packet(damage_packet(video, 5), 85)
    assert np.array_equal(
        read(damaged, decoder, 1, first_frame=45, num_frames=30), read(video, decoder, 1, first_frame=45, num_frames=30)
    )
    for first_frame in (4, 15, 70):  # Frame 15 is predicted from frame 5.
        with pytest.raises(DecodeError, match=r"corrupt frames: 1; the first at frame [0-9]+ of 20"):
            read(damaged, decoder, 1, first_frame=first_frame, num_frames=20)


def test_a_packet_that_the_container_calls_corrupt_is_counted():
    video = make_video(30, container="mpegts", options={"g": "10", "bf": "0"})
    assert len(read(video)) == 30
    with pytest.raises(DecodeError, match="corrupt packets: 1"):
        read(flag_packet(video, 12))


def test_frames_that_the_decoder_drops_in_silence_are_missed():
    options = {"x265-params": "log-level=none:bframes=0:keyint=10:open-gop=0"}
    damaged = damage_packet(make_video(40, codec="libx265", size=(96, 128), options=options), 15)
    with pytest.raises(DecodeError, match="missing frames: 5; the first at frame 15 of 40"):
        read(damaged, stride=4)
