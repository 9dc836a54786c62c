"""Recordings decoded and preprocessed ahead of the encoder, by threads, in order and in bounded memory."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jepa_cache.encoding.groups import EncodingGroup
from jepa_cache.encoding.steps import StepPlan
from jepa_cache.episode import Episode, Skipped
from jepa_cache.media.probe import DecodeError
from jepa_cache.media.video import Video, open_video
from jepa_cache.sources import Unit, describe_unreadable

if TYPE_CHECKING:
    import torch

BATCHES_AHEAD = 2  # per episode: one being encoded, one ready
# Decoded at once. A batch of 64 frames of 640x360 is 44 MB, which would have to be fetched from memory again to be
# resized: decoding it in such pieces takes a tenth less time.
PIECE_FRAMES = 8


class PixelBatch(NamedTuple):
    """Preprocessed encoder inputs `pixels` [B, G, 3, R, R] and the luma mean and deviation of their B*G frames."""

    pixels: torch.Tensor
    luma: np.ndarray  # [B * G, 2] float32


class UnreadableError(Exception):
    """A unit cannot be read now, or not to its end: what came of it is not used, and the next run tries it again."""


class EpisodeStream:
    """One episode on its way to the encoder: its plan, and batches that arrive while it is decoded."""

    def __init__(self, episode: Episode, get: Callable[[queue.Queue], Any]) -> None:
        """Begin without a batch; `get` takes from a queue."""
        self.episode, self.num_bytes, self._get = episode, video_bytes(episode.video), get
        self.batches: queue.Queue[PixelBatch | Exception | None] = queue.Queue(BATCHES_AHEAD)
        self.plan: StepPlan  # set by the decoding thread before the first batch, as is the decoder
        self.decoder = ""
        self.dropped = False

    def __iter__(self) -> Iterator[PixelBatch]:
        """Yield batches in order; raises DecodeError where the video is bad, UnreadableError where its file is."""
        while (item := self._get(self.batches)) is not None:
            yield item

    def drop(self) -> None:
        """Let the decoder end: nobody wants the rest."""
        self.dropped = True
        with suppress(DecodeError, UnreadableError):
            for _ in self:
                pass


class Decoders:
    """Iterates over all units in order, each with its recordings, while threads work ahead of the consumer.

    A feeder thread reads recordings from the source; each gets a decoding task. Queues are bounded, so memory holds a
    few episodes' containers and a few batches however long the run is. Batches never cross episodes, so the tokens of
    an episode depend on nothing else. `wait_s` is how long the consumer waited.
    """

    def __init__(
        self, group: EncodingGroup, units: Iterable[Unit], preprocess: Callable[[np.ndarray], torch.Tensor]
    ) -> None:
        self.wait_s = 0.0
        self._group, self._units, self._preprocess = group, units, preprocess
        # Of each unit itself, its recordings, then None or why it cannot be read to its end; a last None.
        self._items: queue.Queue[Unit | EpisodeStream | Skipped | Exception | None] = queue.Queue(
            group.encode.num_decoders
        )
        self._stop = threading.Event()

    def __enter__(self) -> Decoders:
        self._pool = ThreadPoolExecutor(self._group.encode.num_decoders, thread_name_prefix="decode")
        self._feeder = threading.Thread(target=self._feed, name="feed", daemon=True)
        self._feeder.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._feeder.join()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[tuple[Unit, Iterator[EpisodeStream | Skipped]]]:
        """Yield every unit with its recordings; what the consumer leaves of them is dropped."""
        while (unit := self._get(self._items)) is not None:
            recordings = self._iter_recordings()
            yield unit, recordings
            with suppress(UnreadableError):
                for recording in recordings:
                    if isinstance(recording, EpisodeStream):
                        recording.drop()

    def _iter_recordings(self) -> Iterator[EpisodeStream | Skipped]:
        """Yield up to the unit's end; raises UnreadableError where it cannot be read so far."""
        while (item := self._get(self._items)) is not None:
            yield item

    def _get(self, source: queue.Queue) -> Any:
        begun = time.perf_counter()
        item = source.get()
        self.wait_s += time.perf_counter() - begun
        if isinstance(item, Exception):
            raise item
        return item

    def _feed(self) -> None:
        try:
            for unit in self._units:
                self._put(self._items, unit)
                self._put(self._items, self._feed_unit(unit))
            self._put(self._items, None)
        except Exception as error:  # handed to the consumer, which raises it
            self._put(self._items, error)

    def _feed_unit(self, unit: Unit) -> UnreadableError | None:
        try:
            for recording in self._group.source.iter_episodes(unit):
                self._put(self._items, self._start(recording) if isinstance(recording, Episode) else recording)
                if self._stop.is_set():
                    break
        except (ValueError, OSError) as error:
            return UnreadableError(describe_unreadable(error))
        return None

    def _start(self, episode: Episode) -> EpisodeStream:
        stream = EpisodeStream(episode, self._get)
        self._pool.submit(self._decode, stream)
        return stream

    def _decode(self, stream: EpisodeStream) -> None:
        episode, encode = stream.episode, self._group.encode
        num_frames = len(episode.frame_ticks)
        end: Exception | None = None
        try:
            stream.plan = self._plan(episode)
            inputs = stream.plan.inputs
            with open_video(
                episode.video, encode.decoder, first_frame=episode.first_frame, num_frames=num_frames
            ) as video:
                stream.decoder = video.decoder
                for start in range(0, len(inputs), encode.batch_size):
                    if self._stop.is_set() or stream.dropped:
                        break
                    self._put(stream.batches, self._read_batch(video, inputs[start : start + encode.batch_size]))
        except OSError as error:  # the disk or network failed, or the file is gone
            end = UnreadableError(describe_unreadable(error))
        except Exception as error:
            end = error
        self._put(stream.batches, end)

    def _plan(self, episode: Episode) -> StepPlan:
        try:
            return self._group.plan(len(episode.frame_ticks), episode.fps, episode.frame_times_s)
        except ValueError as error:  # too short or too slow: skipped as a video is that cannot be decoded
            raise DecodeError(str(error)) from error

    def _read_batch(self, video: Video, inputs: np.ndarray) -> PixelBatch:
        """Decode and preprocess the frames [B, G] of one batch."""
        import torch

        frames, pixels, luma = inputs.reshape(-1), [], []
        for start in range(0, len(frames), PIECE_FRAMES):
            piece = video.read(frames[start : start + PIECE_FRAMES])
            pixels.append(self._preprocess(piece))
            luma.append(luma_statistics(piece))
        joined = torch.cat(pixels)
        return PixelBatch(joined.reshape(*inputs.shape, *joined.shape[1:]), np.concatenate(luma))

    def _put(self, destination: queue.Queue, item: Any) -> None:
        """Put, but give up when the consumer has gone."""
        while not self._stop.is_set():
            try:
                destination.put(item, timeout=0.1)
                return
            except queue.Full:
                continue


def video_bytes(video: Any) -> int:
    """Size of a video, encoded or as pictures."""
    if isinstance(video, bytes):
        return len(video)
    return video.stat().st_size if isinstance(video, Path) else video.size_bytes


def luma_statistics(frames: np.ndarray) -> np.ndarray:
    """Mean and deviation of each frame's luma, [F, 2] float32, 0 to 255, from every fourth pixel in both directions.

    Frames are [F, h, w, 3] uint8 RGB. Source of the weights: ITU-R BT.601.
    """
    sampled = np.empty((*frames[:, ::4, ::4].shape[:3], 3), np.uint8)
    for channel in range(3):  # a third quicker than picking pixels, whose three values numpy copies one by one
        sampled[..., channel] = frames[:, ::4, ::4, channel]
    luma = sampled.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    return np.stack([luma.mean(axis=(1, 2)), luma.std(axis=(1, 2))], axis=1)
