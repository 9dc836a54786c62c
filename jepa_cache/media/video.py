"""Encoded videos to RGB frames, in order, by PyAV or decord; what is damaged or cannot be decoded is an error that says so."""

from __future__ import annotations

import contextlib
import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jepa_cache.media.images import FrameSequence, SideBySide, decode_image
from jepa_cache.media.probe import (
    UPRIGHT,
    DecodeError,
    PacketIndex,
    VideoData,
    VideoInfo,
    as_file,
    explain_failure,
    index_packets,
    open_container,
    probe_video,
    read_orientation,
)

Decode = Callable[[int], np.ndarray]
"""The number of a frame in the container to the frame [h, w, 3], which may lie in the decoder's memory."""

MIN_SEEK_FRAMES = 64
"""PyAV decodes from the start up to here, and enters at a key frame beyond."""


class Video:
    """Frames of one container, read forwards only; owns the decoder and never keeps decoded frames.

    Attributes:
        info: Number of frames, rate, size and codec.
        decoder: "pyav" or "decord", whose frames are the same bit for bit, or "pillow" for pictures.
        first_frame: The frame of the container that is frame 0 here; 0 unless recordings share the container.
    """

    def __init__(
        self,
        video: VideoData,
        info: VideoInfo,
        decoder: str,
        first_frame: int,
        decode: Decode,
        close: Callable[[], None],
    ) -> None:
        """Hold an opened decoder; use `open_video`."""
        self.info, self.decoder, self.first_frame = info, decoder, first_frame
        self._video, self._decode, self._close = video, decode, close
        self._next_index = 0

    def read(self, indices: np.ndarray) -> np.ndarray:
        """`iter_frames` as one array [n, h, w, 3]."""
        frames = np.empty((len(indices), self.info.height, self.info.width, 3), np.uint8)
        for row, frame in enumerate(self.iter_frames(indices)):
            frames[row] = frame
        return frames

    def iter_frames(self, indices: np.ndarray) -> Iterator[np.ndarray]:
        """Decode the frames at `indices`, from where the call before ended.

        Args:
            indices: [n] integers, strictly ascending over all calls; counted from `first_frame`.

        Yields:
            [h, w, 3] uint8, RGB, 0 to 255; not to be written to: it may be the decoder's own memory, which is that frame's as long as
            somebody holds it.

        Raises:
            ValueError: `indices` are not within the video.
            DecodeError: A frame is damaged or missing.

        Cost: every frame up to the last index is decoded once, however many calls there are; of those before `first_frame`
            only the ones since the last key frame.
        """
        num_frames, expected = self.info.num_frames, (self.info.height, self.info.width, 3)
        for index in (np.asarray(indices, dtype=np.int64) + self.first_frame).tolist():
            assert index >= max(self._next_index, self.first_frame), "frames go forwards"
            if index >= num_frames:
                raise ValueError(f"frame {index} was requested, but the video has {num_frames} frames")
            try:
                frame = self._decode(index)
            except Exception as error:  # decord raises its own DECORDError, an Exception; PyAV a family of its own.
                what = f"frame {index} of {num_frames} cannot be decoded by {self.decoder}"
                raise explain_failure(error, what, self._video) from error
            self._next_index = index + 1
            if frame.shape != expected:
                raise DecodeError(
                    f"{self.decoder} returned a frame of shape {frame.shape} where {expected} was announced"
                )
            yield frame

    def close(self) -> None:
        """Release the decoder; may be called twice."""
        self._close()

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Frames:
    """Frames `first` to `stop` of a container, decoded by PyAV one after the other; owns the container.

    Frames are numbered by their times, which all packets tell without being decoded, so that one which the decoder leaves out
    moves no other; where a packet has no time, they are counted from the start.
    """

    def __init__(self, video: bytes | Path, packets: PacketIndex, first: int, stop: int) -> None:
        from av.video.reformatter import VideoReformatter

        self._container, self._packets, self._first, self.stop = open_container(video), packets, first, stop
        self._damage: list[tuple[int, str]] = []  # number of the frame, what was wrong
        self._iterator = self._iter_frames()
        # One for all frames: VideoFrame.to_ndarray(format=...) makes one for each, a quarter of the work.
        self._to_rgb = VideoReformatter()

    def close(self) -> None:
        self._container.close()

    def decode(self, index: int) -> np.ndarray:
        """Frame `index` [h, w, 3] RGB, as it is shown."""
        frame, info = self.decode_to(index), self._packets.info
        transposed, rows_reversed, columns_reversed = info.orientation
        size = (frame.width, frame.height) if transposed else (frame.height, frame.width)
        if size != (info.height, info.width) or read_orientation(frame) != info.orientation:
            raise DecodeError(
                f"frame {index} is {size[1]}x{size[0]}, {read_orientation(frame)}; the video began with "
                f"{info.width}x{info.height}, {info.orientation}"
            )
        image = self._to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray()  # else a thread for each core
        if transposed:
            image = image.transpose(1, 0, 2)
        return image[:: -1 if rows_reversed else 1, :: -1 if columns_reversed else 1]

    def decode_to(self, index: int) -> Any:
        """Frame `index`.

        Raises:
            DecodeError: It or one before it is damaged or missing; all damage up to the end of the recording is counted.
        """
        for number, frame in self._iterator:
            if self._damage and number >= self._first:
                break
            if number == index:
                return frame
        for _ in self._iterator:  # to its end, so that the count does not depend on which frame was requested
            pass
        counts = sorted(Counter(fault for _, fault in self._damage).items())
        first = min((number for number, _ in self._damage), default=index) - self._first
        words = "; ".join(f"{fault}: {count}" for fault, count in counts)
        raise DecodeError(
            f"its video is damaged ({words}; the first at frame {max(first, 0)} of {self.stop - self._first}): copy or record it "
            "again"
        )

    def _iter_frames(self) -> Iterator[tuple[int, Any]]:
        """Number and frame from the last key frame before `first` on, or from the start; damage is noted as it is met."""
        from av.error import FFmpegError

        info, times, key_times = self._packets
        stream = self._container.streams.video[info.stream]
        stream.codec_context.thread_count = 1  # One thread per video: the encode stage runs several videos.
        if info.codec == "mjpeg":  # Its decoder passes damaged pictures on otherwise; to others it makes no difference.
            stream.codec_context.options = {"err_detect": "explode"}
        expected = 0
        if times is not None and key_times is not None and self._first >= MIN_SEEK_FRAMES:
            starts = key_times[key_times <= times[self._first]]
            self._container.seek(int(starts[-1]) if len(starts) else int(times[0]), stream=stream)
            expected = -1  # looked up, never assumed
        for packet in self._container.demux(stream):
            faults = ["corrupt packets"] if packet.is_corrupt else []
            try:
                frames = packet.decode()
            except FFmpegError:
                frames = []
                faults.append("undecodable packets")
            if faults:
                self._note(self._find_number(packet.pts, expected), *faults)
            for frame in frames:
                number = self._find_number(frame.pts, expected)
                if expected < 0 and number > self._first:
                    raise DecodeError(
                        f"the video cannot be entered at frame {self._first}: no frame before it was found"
                    )
                for lost in range(expected, number) if expected >= 0 else ():
                    self._note(lost, "missing frames")
                if frame.key_frame and number <= self._first:  # What was wrong before it is not seen in what follows.
                    self._damage = [fault for fault in self._damage if fault[0] >= number]
                if frame.is_corrupt:
                    self._note(number, "corrupt frames")
                yield number, frame
                expected = number + 1
                if expected >= self.stop:
                    return
        for lost in range(max(expected, 0), self.stop):
            self._note(lost, "missing frames")

    def _find_number(self, pts: int | None, expected: int) -> int:
        times = self._packets.times
        if times is None or pts is None or (0 <= expected < len(times) and times[expected] == pts):
            return expected
        number = int(np.searchsorted(times, pts))
        return number if number < len(times) and times[number] == pts and number >= expected else expected

    def _note(self, number: int, *faults: str) -> None:
        if number < self.stop:
            self._damage += [(number, fault) for fault in faults]


def open_video(
    video: VideoData, decoder: str = "auto", *, first_frame: int = 0, num_frames: int | None = None
) -> Video:
    """Open a video for reading forwards; a FrameSequence is decoded by Pillow, whatever the decoder for containers is.

    Args:
        video: The encoded video.
        decoder: "pyav"; "decord"; or "auto", which is PyAV: where decord 0.6 is right the two give the same frames bit for bit,
            and decord does not tell damaged frames. Under "decord" files that it gets wrong are refused, and the others
            are decoded by PyAV first, to find damage.
        first_frame: Where the recording begins in a container that several share; indices count from there.
        num_frames: Frames of the recording; damage behind them does not matter. None: up to the end of the container.

    Raises:
        ValueError: decord requested by name where it is not installed, or a first frame that the video does not have.
        DecodeError: The video cannot be opened.
    """
    if isinstance(video, SideBySide):
        whole = open_video(video.video, decoder, first_frame=first_frame, num_frames=num_frames)
        width = whole.info.width // 2

        info, decode_left = whole.info._replace(width=width), lambda index: whole._decode(index)[:, :width]
        return Video(video.video, info, whole.decoder, first_frame, decode_left, whole.close)
    pictures = isinstance(video, FrameSequence)
    packets = PacketIndex(probe_video(video), None, None) if pictures else index_packets(video)
    info = packets.info
    if not 0 <= first_frame < info.num_frames:
        raise ValueError(f"the recording would begin at frame {first_frame} of a video of {info.num_frames} frames")
    if pictures:
        decode_picture = lambda index: decode_image(video.frames[index], (info.height, info.width))  # noqa: E731
        return Video(video, info, "pillow", first_frame, decode_picture, lambda: None)
    if decoder == "decord":
        _check_decord(info)
    frames = _Frames(video, packets, first_frame, min(info.num_frames, first_frame + (num_frames or info.num_frames)))
    if decoder != "decord":
        return Video(video, info, "pyav", first_frame, frames.decode, frames.close)
    with contextlib.closing(frames):
        frames.decode_to(frames.stop - 1)  # for damage alone
    return Video(video, info, "decord", first_frame, _open_decord(video, info), lambda: None)


def _check_decord(info: VideoInfo) -> None:
    """Refuse what decord 0.6 gets wrong without a word."""
    if importlib.util.find_spec("decord") is None:
        raise ValueError("decord is not installed on this machine; use the decoder 'auto' or 'pyav'")
    fault = info.decord_fault
    if info.open_gop:
        fault = "it has open groups of pictures, in which decord returns other frames than requested"
    if info.orientation != UPRIGHT:
        fault = "it is turned or mirrored, which decord does in part only"
    if fault:
        raise DecodeError(f"the video cannot be read by decord: {fault}; use the decoder 'auto' or 'pyav'")


def _open_decord(video: bytes | Path, info: VideoInfo) -> Decode:
    import decord

    try:
        reader = decord.VideoReader(as_file(video), ctx=decord.cpu(0), num_threads=1)
    except Exception as error:  # RuntimeError or decord's own DECORDError.
        raise explain_failure(error, "decord cannot open the video", b"") from error
    if len(reader) != info.num_frames:
        raise DecodeError(f"decord counts {len(reader)} frames where the container holds {info.num_frames}")
    return lambda index: reader[index].asnumpy()
