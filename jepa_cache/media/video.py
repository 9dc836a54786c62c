"""Encoded videos to RGB frames, in order, by decord or PyAV; what cannot be decoded is an error that says so."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from jepa_cache.config.schema import DECODERS
from jepa_cache.media.images import FrameSequence, SideBySide, decode_image
from jepa_cache.media.probe import (
    DecodeError,
    PacketIndex,
    VideoData,
    VideoInfo,
    as_file,
    describe_error,
    index_packets,
    open_container,
    probe_video,
)

MIN_SEEK_FRAMES = 64
"""PyAV decodes from the start up to here, and enters at a key frame beyond."""


class Video:
    """Frames of one container, read forwards only; owns the decoder and never keeps decoded frames.

    Attributes:
        info: Number of frames, rate, size and codec.
        decoder: The decoder in use: "decord" or "pyav", whose frames are the same bit for bit, or "pillow" for pictures.
        first_frame: The frame of the container that is frame 0 here; 0 unless recordings share the container.
    """

    def __init__(
        self, info: VideoInfo, decoder: str, handle: Any, first_frame: int = 0, packets: PacketIndex | None = None
    ) -> None:
        """Hold an opened decoder; use `open_video`."""
        self.info = info
        self.decoder = decoder
        self.first_frame = first_frame
        self._handle = handle
        self._packets = packets
        self._next_index = 0
        self._frames: Iterator[Any] | None = None
        self._to_rgb: Any = None
        self._next_frame = 0

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Decode the frames at `indices`, going on from where the call before ended.

        Args:
            indices: [n] integers, strictly ascending, the first one above the last one of the call before; counted from
                `first_frame`.

        Returns:
            [n, h, w, 3] uint8, RGB, 0 to 255.

        Raises:
            ValueError: `indices` are not ascending or not within the video, or the video is closed.
            DecodeError: A frame is damaged or missing.

        Cost: every frame up to the last index is decoded once, however many calls there are; of those before `first_frame`
            only the ones since the last key frame.
        """
        if self._handle is None:
            raise ValueError("the video is closed; open it again with open_video")
        indices = np.asarray(indices, dtype=np.int64) + self.first_frame
        if len(indices) == 0:
            return np.empty((0, self.info.height, self.info.width, 3), np.uint8)
        if np.any(np.diff(indices) <= 0) or indices[0] < max(self._next_index, self.first_frame):
            raise ValueError(
                f"frames are read in ascending order, each once; got {indices.tolist()[:8]}... after frame "
                f"{self._next_index - 1}. Open the video again to go back"
            )
        if indices[-1] >= self.info.num_frames:
            raise ValueError(f"frame {indices[-1]} was asked for, but the video has {self.info.num_frames} frames")
        try:
            frames = getattr(self, f"_read_{self.decoder}")(indices)
        except DecodeError:
            raise
        except Exception as error:  # decord raises its own DECORDError, an Exception; PyAV a family of its own.
            raise DecodeError(
                f"frames {indices[0]} to {indices[-1]} of {self.info.num_frames} cannot be decoded by {self.decoder}: "
                f"{describe_error(error)}"
            ) from error
        self._next_index = int(indices[-1]) + 1
        expected = (len(indices), self.info.height, self.info.width, 3)
        if frames.shape != expected:
            raise DecodeError(f"{self.decoder} returned frames of shape {frames.shape} where {expected} was announced")
        return frames

    def close(self) -> None:
        """Release the decoder; may be called twice."""
        if self._handle is not None and self.decoder == "pyav":
            self._handle.close()
        self._handle = None
        self._frames = self._to_rgb = None

    def __enter__(self) -> Video:
        """Return itself; `with open_video(...) as video` closes it at the end."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the video."""
        self.close()

    def _read_decord(self, indices: np.ndarray) -> np.ndarray:
        return self._handle.get_batch(indices).asnumpy()

    def _read_pillow(self, indices: np.ndarray) -> np.ndarray:
        frames = np.empty((len(indices), self.info.height, self.info.width, 3), np.uint8)
        for row, index in enumerate(indices):
            frames[row] = decode_image(self._handle.frames[index], frames.shape[1:3])
        return frames

    def _read_pyav(self, indices: np.ndarray) -> np.ndarray:
        if self._frames is None:
            from av.video.reformatter import VideoReformatter

            # One for all frames: VideoFrame.to_ndarray(format=...) makes one for each, a quarter of the work.
            self._to_rgb = VideoReformatter()
            stream = self._handle.streams.video[0]
            stream.codec_context.thread_count = 1  # One thread per video: the encode stage runs several videos.
            if self.first_frame >= MIN_SEEK_FRAMES and self._packets is not None:
                self._frames, self._next_frame = _seek_pyav(self._handle, stream, self.first_frame, self._packets)
            else:
                self._frames = self._handle.decode(stream)
        frames = np.empty((len(indices), self.info.height, self.info.width, 3), np.uint8)
        for row, index in enumerate(indices):
            while True:
                frame = next(self._frames, None)
                if frame is None:
                    raise DecodeError(
                        f"the video ends after {self._next_frame} of its {self.info.num_frames} frames; "
                        f"frame {index} is missing"
                    )
                self._next_frame += 1
                if self._next_frame > index:
                    break
            if (frame.height, frame.width) != (self.info.height, self.info.width):
                raise DecodeError(
                    f"frame {index} is {frame.width}x{frame.height}; the video began with "
                    f"{self.info.width}x{self.info.height}"
                )
            frames[row] = self._to_rgb.reformat(frame, format="rgb24").to_ndarray()
        return frames


class _LeftHalf(Video):
    """The left picture of a stereo video."""

    def __init__(self, whole: Video) -> None:
        super().__init__(whole.info._replace(width=whole.info.width // 2), whole.decoder, None, whole.first_frame)
        self._whole = whole

    def read(self, indices: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(self._whole.read(indices)[:, :, : self.info.width])

    def close(self) -> None:
        self._whole.close()


def _seek_pyav(container: Any, stream: Any, index: int, packets: PacketIndex) -> tuple[Iterator[Any], int]:
    """Frames from a little before frame `index` on, and the number of the first of them.

    Frames are numbered by the order of their times, which all packets tell without being decoded. The number of the frame that
    comes first after the jump is looked up, never assumed. Containers without times are read from the start.

    Raises:
        DecodeError: The first frame after the jump is unknown or too late.
    """
    times, key_times = packets.times, packets.key_times
    if times is None or key_times is None:
        return container.decode(stream), 0
    starts = key_times[key_times <= times[index]]
    container.seek(int(starts[-1]) if len(starts) else int(times[0]), stream=stream)
    frames = container.decode(stream)
    first = next(frames, None)
    number = int(np.searchsorted(times, first.pts)) if first is not None and first.pts is not None else len(times)
    if number > index or times[number] != first.pts:
        raise DecodeError(f"the video cannot be entered at frame {index}: no frame before it could be found")
    return itertools.chain([first], frames), number


def open_video(video: VideoData, decoder: str = "auto", *, first_frame: int = 0) -> Video:
    """Open a video for reading forwards.

    Args:
        video: The encoded video. A FrameSequence is decoded by Pillow, whatever the decoder for containers is.
        decoder: "decord", "pyav", or "auto": decord where it is installed, opens the file and counts the same frames
            as the container, and the video has no open groups of pictures, else PyAV (decord 0.6 reads no AV1, and has
            wheels for x86-64 Linux only). `Video.decoder` says which one it became.
        first_frame: Where the recording begins in a container that several share; indices count from there.

    Raises:
        ValueError: An unknown decoder, decord asked for by name where it is not installed, or a first frame that the
            video does not have.
        DecodeError: The video cannot be opened.
    """
    if decoder not in DECODERS:
        raise ValueError(f"the decoder must be one of {', '.join(DECODERS)}; got {decoder!r}")
    if isinstance(video, SideBySide):
        return _LeftHalf(open_video(video.video, decoder, first_frame=first_frame))
    packets = None if isinstance(video, FrameSequence) else index_packets(video)
    info = probe_video(video) if packets is None else packets.info
    if not 0 <= first_frame < info.num_frames:
        raise ValueError(f"the recording would begin at frame {first_frame} of a video of {info.num_frames} frames")
    if packets is None:
        return Video(info, "pillow", video, first_frame)
    installed = importlib.util.find_spec("decord") is not None
    if decoder == "decord" and not installed:
        raise ValueError("decord is not installed on this machine; use the decoder 'auto' or 'pyav'")
    # decord reads all packets of a file whenever it opens it: of a container of many recordings that costs more than decoding one.
    if decoder == "decord" or (decoder == "auto" and installed and first_frame < MIN_SEEK_FRAMES):
        try:
            return Video(info, "decord", _open_decord(video, info), first_frame)
        except DecodeError:
            if decoder == "decord":
                raise
    return Video(info, "pyav", open_container(video), first_frame, packets)


def _open_decord(video: VideoData, info: VideoInfo) -> Any:
    import decord

    if info.open_gop:
        raise DecodeError(
            "the video has open groups of pictures, in which decord returns other frames than asked for; "
            "use the decoder 'auto' or 'pyav'"
        )
    try:
        reader = decord.VideoReader(as_file(video), ctx=decord.cpu(0), num_threads=1)
    except Exception as error:  # RuntimeError or decord's own DECORDError.
        raise DecodeError(f"decord cannot open the video: {describe_error(error)}") from error
    if len(reader) != info.num_frames:
        raise DecodeError(f"decord counts {len(reader)} frames where the container holds {info.num_frames}")
    return reader
