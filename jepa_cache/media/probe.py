"""What an encoded video holds, by its header and packets: size, rate and number of frames; nothing is decoded."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jepa_cache.media.images import FrameSequence, SideBySide, measure_image
from jepa_cache.media.tar import describe_stand_in

VideoData = bytes | Path | FrameSequence | SideBySide
"""An encoded video: a container, its path, a picture per frame, or a stereo container."""

FORMATS = ("mov", "matroska", "avi", "mpegts")
"""FFmpeg's names of the containers that are read; none of them refers to other files, as its playlists do."""

ISO_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp")
TRANSPORT_BYTES = 188
HEAD_BYTES = TRANSPORT_BYTES + 1


class DecodeError(ValueError):
    """A video, or one of its frames, that cannot be decoded; the message holds the decoder's reason."""


_counts_by_header: ContextVar[bool] = ContextVar("counts_by_header", default=False)


@contextmanager
def header_counts() -> Iterator[None]:
    """Within the block `probe_video` believes the index of a container, where it has one, and reads no packet.

    For estimates: a source then tells how long its recordings are in milliseconds each, without reading their videos. The
    count may differ by the few frames that an edit list hides.
    """
    token = _counts_by_header.set(True)
    try:
        yield
    finally:
        _counts_by_header.reset(token)


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


class PacketIndex(NamedTuple):
    """What the packets of a container tell without being decoded.

    Attributes:
        info: What it holds.
        times: [num_frames] int64, times of all frames, ascending, in the stream's unit; None where a packet has no time.
        key_times: The same of key frames.
    """

    info: VideoInfo
    times: np.ndarray | None
    key_times: np.ndarray | None


def probe_video(video: VideoData | BinaryIO) -> VideoInfo:
    """Read size, rate and number of frames without decoding any.

    Frames are counted by their packets, because headers may hold no count or a wrong one, and a file that was cut off
    keeps the header of the whole. Packets that an edit list hides are not counted: no decoder returns them.

    Args:
        video: The encoded video, or a file open for reading. Of a FrameSequence only the first picture is looked at;
            `Video.read` checks the others.

    Raises:
        DecodeError: Not a video, no video stream, no frame rate, no frames, or a file that ends before its last frame.

    Cost: one pass over the packets; 2.5 ms for 445 frames of 640x360. Of a file, once as long as it does not change.
    """
    if isinstance(video, SideBySide):
        info = probe_video(video.video)
        return info._replace(width=info.width // 2)
    if isinstance(video, FrameSequence):
        return _probe_images(video)
    return index_packets(video).info


def index_packets(video: bytes | Path | BinaryIO) -> PacketIndex:
    """Read the packets of a container; see `probe_video`, whose costs and errors these are."""
    if not isinstance(video, Path) or _counts_by_header.get():
        return _read_packets(video)
    try:
        status = video.stat()
    except OSError as error:
        raise DecodeError(f"the video cannot be opened: {describe_error(error)}") from error
    # A shared container is opened for each of its recordings, hundreds of times, and every time it would be read as a whole.
    return _read_packets_of_file(video, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@functools.lru_cache(maxsize=32)  # A day of frames at 30 Hz has 20 MB of times.
def _read_packets_of_file(path: Path, *_: int) -> PacketIndex:
    return _read_packets(path)


def _read_packets(video: bytes | Path | BinaryIO) -> PacketIndex:
    num_frames, open_gop, key_time = 0, False, None
    times: list[int] = []
    key_times: list[int] = []
    try:
        size_bytes = _count_bytes(video)
        with open_container(video) as container:
            if not container.streams.video:
                raise DecodeError("the container holds no video stream")
            stream = container.streams.video[0]
            rate = stream.average_rate or stream.guessed_rate
            # Indexed containers (mp4) tell where every packet ends. PyAV would return the frames before the cut
            # without a word.
            last_byte = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
            if last_byte > size_bytes:
                raise DecodeError(
                    f"the file is cut off: its last frame ends at byte {last_byte}, the file at {size_bytes}"
                )
            if _counts_by_header.get():
                num_frames = len(stream.index_entries)
            for packet in container.demux(stream) if num_frames == 0 else ():
                if not packet.size or packet.is_discard:
                    continue
                num_frames += 1
                if packet.pts is not None and packet.dts is not None:
                    times.append(packet.pts)
                    if packet.is_keyframe:
                        key_times.append(packet.pts)
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
    if len(times) < num_frames:
        return PacketIndex(info, None, None)
    return PacketIndex(info, *(np.sort(np.array(values, np.int64)) for values in (times, key_times)))


def _probe_images(video: FrameSequence) -> VideoInfo:
    if not video.frames or not video.fps > 0:
        raise DecodeError(f"the video has no usable frames: {len(video.frames)} pictures at {video.fps} Hz")
    try:
        height, width, codec = measure_image(video.frames[0])
    except ValueError as error:
        raise DecodeError(f"the video cannot be opened: {error}") from error
    return VideoInfo(len(video.frames), video.fps, height, width, codec)


def open_container(video: bytes | Path | BinaryIO) -> Any:
    """Open a container with PyAV.

    Raises:
        DecodeError: It is of a form that may lead elsewhere, such as a playlist of other files or addresses, or of none.
    """
    import av

    check_form(video)
    options = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "file"}
    try:
        return av.open(as_file(video), options=options)
    except Exception as error:
        raise DecodeError(f"the video cannot be opened: {describe_error(error)}") from error


def check_form(video: bytes | Path | BinaryIO) -> None:
    """Refuse what does not begin as one of the containers that are read.

    FFmpeg, in PyAV and decord, knows a file by its content and opens playlists (ffconcat, m3u8, and others) whatever they are
    called: these name other files of the machine, and addresses.

    Raises:
        DecodeError: Another beginning, or no such file.
    """
    try:
        head = _read_head(video)
    except OSError as error:
        raise DecodeError(f"the video cannot be opened: {describe_error(error)}") from error
    iso = head[4:8] in ISO_BOXES
    transport = head[:1] == b"\x47" == head[TRANSPORT_BYTES : TRANSPORT_BYTES + 1]
    if (what := describe_stand_in(head)) is not None:
        raise DecodeError(f"the video cannot be opened: {what}")
    if not (iso or transport or head[:4] == b"\x1aE\xdf\xa3" or (head[:4] == b"RIFF" and head[8:12] == b"AVI ")):
        raise DecodeError(
            f"the video cannot be opened: it begins with {head[:12]!r}, which is no mp4, mov, mkv, webm, avi or ts file"
        )


def _read_head(video: bytes | Path | BinaryIO) -> bytes:
    if isinstance(video, bytes):
        return video[:HEAD_BYTES]
    if isinstance(video, Path):
        with video.open("rb") as file:
            return file.read(HEAD_BYTES)
    video.seek(0)
    head = video.read(HEAD_BYTES)
    video.seek(0)
    return head


def as_file(video: bytes | Path | BinaryIO) -> BinaryIO | str:
    """What decoders open: a file in memory, an absolute path, which FFmpeg cannot take for a protocol (`concat:...`), or the file."""
    if isinstance(video, bytes):
        return io.BytesIO(video)
    return str(video.absolute()) if isinstance(video, Path) else video


def _count_bytes(video: bytes | Path | BinaryIO) -> int:
    if isinstance(video, bytes):
        return len(video)
    if isinstance(video, Path):
        return video.stat().st_size
    size_bytes = video.seek(0, io.SEEK_END)
    video.seek(0)
    return size_bytes


def describe_error(error: Exception) -> str:
    """The first line of a decoder's message; decord appends a stack trace."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
