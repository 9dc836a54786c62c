"""Claims: a recording inside a longer video is read from its own first frame; frames are the ones asked for at every stride.

Both bit for bit, also in videos whose groups of pictures are open, in which decord returns other frames.
"""

import numpy as np
import pytest

from jepa_cache.media.probe import DecodeError, probe_video
from jepa_cache.media.video import open_video
from tests.makers import make_video
from tests.videos import record_decoded

NUM_FRAMES = 150
CODECS = {
    "h264": ("libx264", {"g": "30", "bf": "3"}),
    "h264-open": ("libx264", {"g": "30", "bf": "3", "x264-params": "open-gop=1"}),
    "hevc-open": ("libx265", {"g": "25", "x265-params": "open-gop=1:log-level=error"}),
    "mpeg4": ("mpeg4", {"g": "12", "bf": "0"}),
    "mpeg4-open": ("mpeg4", {"g": "12", "bf": "2"}),
    "av1": ("libsvtav1", {"g": "20"}),
}


@pytest.fixture(scope="module", params=CODECS)
def video(request):
    """(name, container, all frames decoded one after the other by PyAV)."""
    codec, options = CODECS[request.param]
    content = make_video(NUM_FRAMES, 3, codec=codec, options=options)
    with open_video(content, "pyav") as opened:
        return request.param, content, opened.read(np.arange(NUM_FRAMES))


@pytest.mark.parametrize("decoder", ["auto", "pyav"])
@pytest.mark.parametrize("first_frame", [1, 63, 64, 89, 90, 91, 100, 149])
def test_frames_count_from_the_first_frame(video, decoder, first_frame):
    _, content, everything = video
    wanted = everything[first_frame:]
    indices = np.arange(0, len(wanted), 3)
    with open_video(content, decoder, first_frame=first_frame) as opened:
        frames = np.concatenate([opened.read(indices[:2]), opened.read(indices[2:])])
    assert np.array_equal(frames, wanted[::3])


@pytest.mark.parametrize("stride", [4, 5, 9, 20, 40])
def test_every_stride_gives_the_frames_asked_for(video, stride):
    _, content, everything = video
    with open_video(content) as opened:
        indices = np.arange(0, NUM_FRAMES, stride)
        frames = np.concatenate([opened.read(indices[:3]), opened.read(indices[3:])])
    assert np.array_equal(frames, everything[::stride])


def test_open_groups_of_pictures_are_seen_in_the_packets(video):
    name, content, _ = video
    assert probe_video(content).open_gop == name.endswith("-open")


def test_decord_by_name_refuses_open_groups_of_pictures():
    pytest.importorskip("decord")
    codec, options = CODECS["hevc-open"]
    with pytest.raises(DecodeError, match="use the decoder 'auto' or 'pyav'"):
        open_video(make_video(60, codec=codec, options=options), "decord")


@pytest.mark.parametrize("first_frame", [-1, 20])
def test_a_first_frame_that_is_not_there_is_refused(first_frame):
    with pytest.raises(ValueError, match="video of 20 frames"):
        open_video(make_video(20), first_frame=first_frame)


def test_a_recording_ends_with_its_video(video):
    _, content, _ = video
    with open_video(content, first_frame=140) as opened, pytest.raises(ValueError, match="has 150 frames"):
        opened.read(np.array([10]))


def test_what_lies_before_the_last_key_frame_is_not_decoded(monkeypatch):
    decoded = record_decoded(monkeypatch)
    codec, options = CODECS["h264"]
    with open_video(make_video(NUM_FRAMES, 3, codec=codec, options=options), "pyav", first_frame=140) as opened:
        opened.read(np.array([0]))
    assert decoded == list(range(120, 141))


def test_a_container_of_many_recordings_is_read_through_once_and_again_when_it_changes(tmp_path, monkeypatch):
    from jepa_cache.media import probe

    reads, real = [], probe._read_packets
    monkeypatch.setattr(probe, "_read_packets", lambda video: reads.append(video) or real(video))
    path = tmp_path / "many.mp4"
    path.write_bytes(make_video(NUM_FRAMES, codec="libx264", options={"g": "30"}))
    for first_frame in (0, 70, 100, 140):
        probe_video(path)
        with open_video(path, first_frame=first_frame) as opened:
            assert opened.read(np.arange(2)).shape == (2, 48, 64, 3)
    assert len(reads) == 1
    path.write_bytes(make_video(20))
    assert probe_video(path).num_frames == 20 and len(reads) == 2
