"""Makers of unusual videos: frames at given times, turned pictures, several streams, damaged packets; and what was decoded."""

from __future__ import annotations

import io
import random
import struct
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np

from jepa_cache.media import video as video_module
from tests.makers import make_video

CLOCK = 10_000  # units a second of the videos made here


def make_timed_video(times_s: Sequence[float], *, size: tuple[int, int] = (48, 64), fps: float = 20) -> bytes:
    """An mp4 whose frame t is shown at `times_s[t]`; its grey value counts the frames (see `read_numbers`)."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"video_track_timescale": str(CLOCK)}) as output:
        stream = output.add_stream(
            "libx264", rate=Fraction(fps).limit_denominator(1000), options={"g": "10", "bf": "2", "qp": "1"}
        )
        stream.height, stream.width = size
        stream.pix_fmt, stream.thread_count = "yuv420p", 1
        stream.codec_context.time_base = Fraction(1, CLOCK)
        for number, time_s in enumerate(times_s):
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), 20 + 4 * (number % 50), np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(time_s * CLOCK), Fraction(1, CLOCK)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def read_numbers(frames: np.ndarray) -> np.ndarray:
    """The numbers (below 50) of frames [F, h, w, 3] of a timed video."""
    return np.round((frames.mean(axis=(1, 2, 3)) - 20) / 4).astype(int)


def damage_packet(video: bytes, number: int, seed: int = 0) -> bytes:
    """The video with the middle third of its packet `number` replaced by noise."""
    with av.open(io.BytesIO(video)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        start, size = packets[number].pos, packets[number].size
    first, stop = start + size // 3, start + max(size // 3 + 1, 2 * size // 3)
    return video[:first] + random.Random(seed).randbytes(stop - first) + video[stop:]


def record_decoded(monkeypatch) -> list[int]:
    """Numbers of the frames that PyAV decodes from now on."""
    decoded: list[int] = []
    iter_frames = video_module._Frames._iter_frames

    def recorded(self):
        for number, frame in iter_frames(self):
            decoded.append(number)
            yield number, frame

    monkeypatch.setattr(video_module._Frames, "_iter_frames", recorded)
    return decoded


def turn_video(video: bytes, matrix: Sequence[float]) -> bytes:
    """An mp4 with [a, b, c, d] as the display matrix of its only track."""
    a, b, c, d = (round(value * 65536) for value in matrix)
    header = video.find(b"tkhd")
    place = (
        header + 24 + (20 if video[header + 4] == 0 else 32)
    )  # behind version, times, track, duration, layer, volume
    return video[:place] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + video[place + 36 :]


def join_streams(*videos: bytes, dispositions: Sequence[str] = ()) -> bytes:
    """An mp4 with the first video stream of each."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        packets = []
        for number, video in enumerate(videos):
            source = av.open(io.BytesIO(video))
            stream = output.add_stream_from_template(source.streams.video[0])
            if number < len(dispositions):
                stream.disposition = av.stream.Disposition[dispositions[number]]
            for packet in source.demux(source.streams.video[0]):
                if packet.dts is not None:
                    packet.stream = stream
                    packets.append(packet)
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            output.mux(packet)
    return buffer.getvalue()


def add_cover(video: bytes) -> bytes:
    """The video with the picture of a cover as its first stream: the box that holds it goes before those of the tracks."""
    picture = make_video(1, 9, size=(96, 128), codec="mjpeg", options={"strict": "unofficial"})
    both = join_streams(picture, video, dispositions=["attached_pic"])
    start = both.find(b"moov") + 4
    boxes, at = [], start
    while at < len(both):
        size_bytes = int.from_bytes(both[at : at + 4], "big")
        boxes.append(both[at : at + size_bytes])
        at += size_bytes
    return both[:start] + b"".join(sorted(boxes, key=lambda box: box[4:8] != b"udta"))


def hide_start(video: bytes, num_frames: int) -> bytes:
    """The mp4 with an edit list that hides its first frames."""
    buffer, options = io.BytesIO(), {"avoid_negative_ts": "disabled"}
    with av.open(io.BytesIO(video)) as source, av.open(buffer, "w", format="mp4", options=options) as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                shift = num_frames * packet.duration
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                output.mux(packet)
    return buffer.getvalue()


def flag_packet(video: bytes, number: int) -> bytes:
    """A transport stream in which the receiver found an error in packet `number`."""
    with av.open(io.BytesIO(video)) as container:
        place = [packet.pos for packet in container.demux(video=0) if packet.size][number]
    return video[: place + 1] + bytes([video[place + 1] | 0x80]) + video[place + 2 :]


def make_pixels(pixels: str, num_frames: int = 12) -> bytes:
    """An H.264 video of coloured noise that drifts, in this pixel format."""
    rng, buffer = np.random.default_rng(0), io.BytesIO()
    image = np.kron(rng.integers(0, 256, (12, 16, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=20, options={"bf": "0"})
        stream.height, stream.width, stream.pix_fmt, stream.thread_count = 96, 128, pixels, 1
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(np.roll(image, 3 * number, axis=1), format="rgb24")
            output.mux(stream.encode(frame.reformat(format=pixels)))
        output.mux(stream.encode(None))
    return buffer.getvalue()
