"""What an encoded video holds, by its header, packets and first frame: size, rate, number and times of frames."""

from __future__ import annotations

import functools
import io
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jepa_cache.media.images import FrameSequence, SideBySide, measure_image
from jepa_cache.media.tar import SUFFIXES, describe_stand_in, list_samples

VideoData = bytes | Path | FrameSequence | SideBySide
"""An encoded video: a container, its path, a picture per frame, or a stereo container."""

FORMATS = ("mov", "matroska", "avi", "mpegts")
"""FFmpeg's names of the containers that are read; none of them refers to other files, as its playlists do."""

ISO_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp")
TRANSPORT_BYTES = 188

# Measured with decord 0.6 and PyAV 18: in these the two return the same frames bit for bit, at sizes from 64x48 to 1280x720, in
# H.264, HEVC, VP9, MPEG-4, MPEG-2, MJPEG, FFV1, ProRes, QuickTime RLE and raw video. They differ in 4:2:0 of 9 to 16 bits
# (mean 2.3 to 5.0 of 255), 10-bit 4:2:2 of H.264 (2.9), 4:4:0 and 4:1:0 (2.3 to 3.3), RGB of 9 to 16 bits (0.9), pal8 (141).
DECORD_PIXELS = re.compile("yuvj?4(20|22|44)p|yuva4(20|44)p|gray|ya8|gbrp|rgb24|bgr24|bgr0|bgra|argb")

ROUNDING_S = 0.001
"""Matroska and many recorders count whole milliseconds, and remuxing into a finer clock keeps that."""


class DecodeError(ValueError):
    """A video, or one of its frames, that cannot be decoded; the message holds the decoder's reason."""


class Orientation(NamedTuple):
    """How decoded frames become those that are shown: rows and columns exchanged, then the order of each reversed."""

    transposed: bool = False
    rows_reversed: bool = False
    columns_reversed: bool = False


UPRIGHT = Orientation()


class VideoInfo(NamedTuple):
    """What a container holds, as it is shown.

    Attributes:
        num_frames: Frames that decoders return.
        fps: The average rate that the container states, Hz.
        height, width: Of the shown frames, pixels.
        codec: FFmpeg's name.
        open_gop: Frames that follow a key frame in the file are shown before it. decord 0.6 jumps to key frames between the
            frames requested, and then returns other frames than those, without a word (measured with HEVC and H.264 with
            open groups of pictures, and with MPEG-4 Part 2 with B-frames, at strides from 4 to 40).
        times_s: When each frame is shown, seconds since the first, where the rate varies; None where frame t is at t / fps.
        stream: Number of the video stream that is read.
        orientation: How decoded frames become those that are shown.
        decord_fault: What else decord 0.6 gets wrong in it; empty where nothing is known.
    """

    num_frames: int
    fps: float
    height: int
    width: int
    codec: str
    open_gop: bool = False
    times_s: tuple[float, ...] | None = None
    stream: int = 0
    orientation: Orientation = UPRIGHT
    decord_fault: str = ""

    @property
    def frame_times_s(self) -> np.ndarray | None:
        """`times_s` as an array [num_frames] float64."""
        return None if self.times_s is None else np.array(self.times_s)

    @property
    def typical_fps(self) -> float:
        """`fps`, or where the rate varies that of most frames."""
        return self.fps if self.times_s is None else measure_rate(np.array(self.times_s), self.fps)


class PacketIndex(NamedTuple):
    """What the packets of a container tell without being decoded.

    Attributes:
        info: What it holds.
        times: [num_frames] int64, times of all frames, ascending, in the stream's unit; None where frames have none.
        key_times: The same of key frames; None where the container cannot be entered at them.
    """

    info: VideoInfo
    times: np.ndarray | None
    key_times: np.ndarray | None


_headers_only: ContextVar[bool] = ContextVar("headers_only", default=False)


@contextmanager
def header_counts() -> Iterator[None]:
    """Within the block `probe_video` believes the index of a container, where it has one, and reads no packet.

    For estimates, in milliseconds a recording; the count may differ by the few frames that an edit list hides.
    """
    token = _headers_only.set(True)
    try:
        yield
    finally:
        _headers_only.reset(token)


def probe_video(video: VideoData | BinaryIO) -> VideoInfo:
    """Read size, rate, number and times of frames; one frame is decoded, which tells how the video is turned.

    Frames are counted by their packets, because headers may hold no count or a wrong one, and a file that was cut off
    keeps the header of the whole. Packets that an edit list hides are not counted: no decoder returns them. Of a
    FrameSequence only the first picture is looked at; `Video.read` checks the others.

    Raises:
        DecodeError: Not a video, no video stream, no frame rate, no frames, or a file that ends before its last frame.

    Cost: one pass over the packets and a frame; 6 ms for 445 frames of 640x360. Of a file, once as long as it does not change.
    """
    if isinstance(video, SideBySide):
        return (info := probe_video(video.video))._replace(width=info.width // 2)
    if not isinstance(video, FrameSequence):
        return index_packets(video).info
    if not video.frames or not video.fps > 0:
        raise DecodeError(f"the video has no usable frames: {len(video.frames)} pictures at {video.fps} Hz")
    try:
        return VideoInfo(len(video.frames), video.fps, *measure_image(video.frames[0]))
    except ValueError as error:
        raise DecodeError(f"the video cannot be opened: {error}") from error


def index_packets(video: bytes | Path | BinaryIO) -> PacketIndex:
    """Read the packets of a container; see `probe_video`, whose costs and errors these are."""
    if not isinstance(video, Path):
        return _read_packets(video)
    status = video.stat()
    stamp = status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    # A shared container is opened for each of its recordings, hundreds of times, and every time it would be read as a whole.
    return _read_packets_of_file(video, _headers_only.get(), *stamp)


@functools.lru_cache(maxsize=32)  # A day of frames at 30 Hz has 20 MB of times.
def _read_packets_of_file(path: Path, *_: int) -> PacketIndex:
    return _read_packets(path)


def _read_packets(video: bytes | Path | BinaryIO) -> PacketIndex:
    num_frames, open_gop, key_time, orientation = 0, False, None, None
    times: list[int] = []
    key_times: list[int] = []
    try:
        with open_container(video) as container:
            number, stream = _choose_stream(container)
            # Indexed containers (mp4) tell where every packet ends. PyAV would return the frames before the cut
            # without a word.
            last_byte = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
            if last_byte > container.size:
                raise DecodeError(
                    f"the file is cut off: its last frame ends at byte {last_byte}, the file at {container.size}"
                )
            if _headers_only.get():
                num_frames = len(stream.index_entries)
            stream.codec_context.thread_count = 1  # Several threads return the first frame later.
            for packet in container.demux(stream) if num_frames == 0 else ():
                if orientation is None:
                    orientation = _find_orientation(packet)
                if not packet.size or packet.is_discard:
                    continue
                num_frames += 1
                if packet.pts is not None and packet.dts is not None:
                    times.append(packet.pts)
                    key_times += [packet.pts] if packet.is_keyframe else []
                if packet.is_keyframe:
                    key_time = packet.pts
                elif packet.pts is not None and key_time is not None:
                    open_gop |= packet.pts < key_time
            codec, orientation = stream.codec_context, orientation or UPRIGHT
            info = VideoInfo(
                num_frames,
                float(stream.average_rate or stream.guessed_rate or 0.0),
                *((codec.width, codec.height) if orientation.transposed else (codec.height, codec.width)),
                codec.name,
                open_gop,
                stream=number,
                orientation=orientation,
                decord_fault=_find_decord_fault(container, codec.pix_fmt),
            )
            form, time_base_s = container.format.name, float(stream.time_base)
    except Exception as error:
        raise explain_failure(error, "the video cannot be opened", video) from error
    if info.num_frames == 0 or info.fps <= 0 or info.height == 0 or info.width == 0:
        raise DecodeError(f"the video has no usable frames: {info}")
    if len(times) < num_frames:
        return PacketIndex(info, None, None)
    shown, keys = np.sort(np.array(times, np.int64)), np.sort(np.array(key_times, np.int64))
    times_s = find_varying_times((shown - shown[0]) * time_base_s, info.fps, time_base_s)
    if times_s is not None:
        info = info._replace(times_s=tuple(times_s.tolist()))
    if form == "avi":  # It holds the order of packets alone; with B-frames the decoder gives frames each other's times.
        return PacketIndex(info, None, None)
    # Seeking in a transport stream lands somewhere, often behind the frame.
    return PacketIndex(info, shown, None if form == "mpegts" else keys)


def _choose_stream(container: Any) -> tuple[int, Any]:
    """The first video stream that is no picture of a cover, and its number among the video streams.

    FFmpeg has a "best" one, which decord takes: by size, bit rate and length, so that an added thumbnail or another version of
    the program may change it.
    """
    from av.stream import Disposition

    for number, stream in enumerate(container.streams.video):
        if not stream.disposition & Disposition.attached_pic:
            return number, stream
    raise DecodeError("the container holds no video stream")


def _find_orientation(packet: Any) -> Orientation | None:
    """How the first frame that comes out of this packet is to be turned; None where none comes out."""
    from av.error import FFmpegError

    try:
        frames = packet.decode()
    except FFmpegError:  # A damaged frame is reported by `Video.read`; the next one is turned in the same way.
        return None
    return read_orientation(frames[0]) if frames else None


def read_orientation(frame: Any) -> Orientation:
    """How a decoded frame is to be turned, by its display matrix: rows [a, b, .] and [c, d, .] of 16.16 fixed point numbers.

    A pixel at (x, y) is shown at (a x + c y, b x + d y), up to a shift.

    Raises:
        DecodeError: By anything but quarter turns and mirrors.

    Source: ISO/IEC 14496-12, the matrix of a track's header, which FFmpeg attaches to frames.
    """
    matrix = next((data for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return UPRIGHT
    values = np.frombuffer(bytes(matrix), np.int32)
    (a, b), (c, d) = values[[0, 1]].tolist(), values[[3, 4]].tolist()
    if not ((a and d and not b and not c) or (b and c and not a and not d)):
        raise DecodeError(
            f"its display matrix {values.tolist()} turns it by other than quarter turns, which is not supported"
        )
    return Orientation(a == 0, b + d < 0, a + c < 0)


def _find_decord_fault(container: Any, pixels: str | None) -> str:
    if len(container.streams.video) > 1:
        return "it holds several video streams, of which decord may take another one"
    if container.format.name == "mpegts":
        return "it is an MPEG transport stream, of which decord returns other frames than requested"
    if DECORD_PIXELS.fullmatch(pixels or ""):
        return ""
    return f"its pixels are {pixels}, which decord turns into other colours"


def find_varying_times(times_s: np.ndarray, fps: float, time_base_s: float) -> np.ndarray | None:
    """The times themselves where the rate varies; None where frame t is at t / fps, as far as the times can tell.

    That is: the times [F], which begin with 0 and do not decrease, are evenly spaced to within what rounding does to them (a unit
    of the time base or a millisecond, but no more than a quarter of a frame), and nowhere further than half a frame from
    t / fps. A rate that is right to six digits is half a frame off after hours; more tells that the header is wrong.
    """
    count = len(times_s)
    if count < 2:
        return None
    rounding_s = min(max(time_base_s, ROUNDING_S), 0.25 / fps) + 1e-9
    even = np.abs(times_s - np.linspace(0.0, times_s[-1], count)).max() <= rounding_s
    return None if even and np.abs(times_s - np.arange(count) / fps).max() <= 0.5 / fps else times_s


def measure_rate(times_s: np.ndarray, stated: float) -> float:
    """Typical frames per second, Hz: by the mean of the intervals that are within a factor 1.5 of the median.

    The stated rate or a whole number takes its place where it is within 0.1 %, so that rounded times give no odd stride.

    Raises:
        DecodeError: All times are the same.
    """
    intervals_s = np.diff(times_s)
    intervals_s = intervals_s[intervals_s > 0]
    if len(intervals_s) == 0:
        raise DecodeError("all frames are shown at the same time")
    ratios = intervals_s / np.median(intervals_s)
    rate = 1.0 / float(intervals_s[(ratios > 1 / 1.5) & (ratios < 1.5)].mean())
    nearest = min((stated, float(round(rate))), key=lambda known: abs(known - rate))
    return nearest if abs(nearest / rate - 1) < 1e-3 else rate


def open_container(video: bytes | Path | BinaryIO) -> Any:
    """Open a container with PyAV; what does not begin as one of those that are read is refused first.

    FFmpeg opens playlists (ffconcat, m3u8, and others) whatever they are called: these name other files, and addresses.

    Raises:
        DecodeError: Another beginning, or a container that cannot be opened. OSError: The file cannot be read.
    """
    import av

    with video.open("rb") if isinstance(video, Path) else nullcontext(as_file(video)) as file:
        file.seek(0)
        head = file.read(TRANSPORT_BYTES + 1)
        file.seek(0)
    if (what := describe_stand_in(head)) is not None:
        raise DecodeError(f"the video cannot be opened: {what}")
    transport = head[:1] == b"\x47" == head[TRANSPORT_BYTES:]
    known = head[4:8] in ISO_BOXES or head[:4] == b"\x1aE\xdf\xa3" or (head[:4] == b"RIFF" and head[8:12] == b"AVI ")
    if not known and not transport:
        raise DecodeError(
            f"the video cannot be opened: it begins with {head[:12]!r}, which is no mp4, mov, mkv, webm, avi or ts file"
        )
    options = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "file"}
    try:
        return av.open(as_file(video), options=options)
    except Exception as error:
        raise explain_failure(error, "the video cannot be opened", video) from error


def as_file(video: bytes | Path | BinaryIO) -> BinaryIO | str:
    """What decoders open: a file in memory, an absolute path, which FFmpeg cannot take for a protocol (`concat:...`), or the file."""
    if isinstance(video, bytes):
        return io.BytesIO(video)
    return str(video.absolute()) if isinstance(video, Path) else video


def explain_failure(error: Exception, what: str, video: bytes | Path | BinaryIO) -> Exception:
    """The error to raise: a file that cannot be read now may be read in the next run, a video that is damaged stays so.

    PyAV's errors share no base class but Exception; those of the operating system are OSErrors too.
    """
    if isinstance(error, DecodeError) or (isinstance(error, OSError) and not isinstance(video, bytes)):
        return error
    lines = str(error).strip().splitlines()  # decord appends a stack trace
    return DecodeError(f"{what}: {': '.join([type(error).__name__, *lines[:1]])}")


VIDEO_SUFFIXES = ("mp4", "mkv", "webm", "mov", "avi")


def iter_tar_videos(path: Path) -> Iterator[tuple[str, VideoInfo | None, str]]:
    """Yield key and video of every recording of a tar shard, by its header, or None and why it cannot be used.

    Cost: the tar's headers, and some 70 kB and a few milliseconds a video.
    """
    for key, headers, problem in list_samples(path, SUFFIXES):
        if problem is not None or len(headers) < len(SUFFIXES):
            yield key, None, problem or "video or records are missing"
            continue
        try:
            with header_counts(), tarfile.open(path, "r:") as tar, tar.extractfile(headers["mp4"]) as file:
                yield key, probe_video(file), ""
        except DecodeError as error:
            yield key, None, str(error)
