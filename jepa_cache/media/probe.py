"""What an encoded video holds, by its header and packets: size, rate and number of frames; nothing is decoded."""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple

from jepa_cache.media.images import FrameSequence, SideBySide, measure_image

VideoData = bytes | Path | FrameSequence | SideBySide
"""An encoded video: a container, its path, a picture per frame, or a stereo container."""


class DecodeError(ValueError):
    """A video, or one of its frames, that cannot be decoded; the message holds the decoder's reason."""


class VideoInfo(NamedTuple):
    """What a container holds: `num_frames` frames of [height, width] pixels at `fps` Hz, as `codec`.

    `open_gop`: frames that follow a key frame in the file are shown before it. decord 0.6 jumps to key frames between the
    frames asked for, and then returns other frames than those, without a word (measured with HEVC and H.264 with open
    groups of pictures, and with MPEG-4 Part 2 with B-frames, at strides from 4 to 40).
    """

    num_frames: int
    fps: float
    height: int
    width: int
    codec: str
    open_gop: bool = False


def probe_video(video: VideoData) -> VideoInfo:
    """Read size, rate and number of frames without decoding any.

    Frames are counted by their packets, because headers may hold no count or a wrong one, and a file that was cut off
    keeps the header of the whole. Packets that an edit list hides are not counted: no decoder returns them.

    Args:
        video: The encoded video. Of a FrameSequence only the first picture is looked at; `Video.read` checks the others.

    Raises:
        DecodeError: Not a video, no video stream, no frame rate, no frames, or a file that ends before its last frame.

    Cost: one pass over the packets; 2.5 ms for 445 frames of 640x360.
    """
    import av

    if isinstance(video, SideBySide):
        info = probe_video(video.video)
        return info._replace(width=info.width // 2)
    if isinstance(video, FrameSequence):
        return _probe_images(video)
    try:
        with av.open(as_file(video)) as container:
            if not container.streams.video:
                raise DecodeError("the container holds no video stream")
            stream = container.streams.video[0]
            rate = stream.average_rate or stream.guessed_rate
            size_bytes = len(video) if isinstance(video, bytes) else video.stat().st_size
            # Indexed containers (mp4) tell where every packet ends. PyAV would return the frames before the cut
            # without a word.
            last_byte = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
            if last_byte > size_bytes:
                raise DecodeError(
                    f"the file is cut off: its last frame ends at byte {last_byte}, the file at {size_bytes}"
                )
            num_frames, open_gop, key_time = 0, False, None
            for packet in container.demux(stream):
                if packet.size and not packet.is_discard:
                    num_frames += 1
                    if packet.is_keyframe:
                        key_time = packet.pts
                    elif packet.pts is not None and key_time is not None:
                        open_gop |= packet.pts < key_time
            codec = stream.codec_context
            info = VideoInfo(num_frames, float(rate or 0.0), codec.height, codec.width, codec.name, open_gop)
    except DecodeError:
        raise
    except Exception as error:  # PyAV's errors share no base class with the OSErrors of a path.
        raise DecodeError(f"the video cannot be opened: {describe_error(error)}") from error
    if info.num_frames == 0 or info.fps <= 0 or info.height == 0 or info.width == 0:
        raise DecodeError(f"the video has no usable frames: {info}")
    return info


def _probe_images(video: FrameSequence) -> VideoInfo:
    if not video.frames or not video.fps > 0:
        raise DecodeError(f"the video has no usable frames: {len(video.frames)} pictures at {video.fps} Hz")
    try:
        height, width, codec = measure_image(video.frames[0])
    except ValueError as error:
        raise DecodeError(f"the video cannot be opened: {error}") from error
    return VideoInfo(len(video.frames), video.fps, height, width, codec)


def as_file(video: bytes | Path) -> io.BytesIO | str:
    """What decoders open: a file in memory, or a path as text."""
    return io.BytesIO(video) if isinstance(video, bytes) else str(video)


def describe_error(error: Exception) -> str:
    """The first line of a decoder's message; decord appends a stack trace."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
