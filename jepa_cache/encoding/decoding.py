"""Recordings decoded and preprocessed ahead of the encoder, by threads, in order and in bounded memory."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jepa_cache.config.schema import EncodeConfig
from jepa_cache.encoding.steps import StepPlan, plan_episode
from jepa_cache.episode import Episode, Skipped
from jepa_cache.media.video import Video, open_video
from jepa_cache.sources import Source, Unit, describe_unreadable

if TYPE_CHECKING:
    import torch

BATCHES_AHEAD = 2  # per episode: one being encoded, one ready
# Decoded at once. A batch of 64 frames of 640x360 is 44 MB: it would have to be fetched from memory again to be resized, and
# decoding it in such pieces takes a tenth less time.
PIECE_FRAMES = 8


class PixelBatch(NamedTuple):
    """Preprocessed encoder inputs `pixels` [B, G, 3, R, R] and the luma mean and deviation of their B*G frames."""

    pixels: torch.Tensor
    luma: np.ndarray  # [B * G, 2] float32


class UnitEnd(NamedTuple):
    """Marks the end of a unit, whose beginning is marked by the unit itself."""

    unit: Unit


class UnreadableUnit(NamedTuple):
    """Marks that a unit cannot be read, or not to its end, and why: what came of it is not used."""

    unit: Unit
    reason: str


class Unusable(NamedTuple):
    """A recording that was read but gives no step under these settings, and why."""

    episode: Episode
    reason: str


@dataclass
class EpisodeStream:
    """One episode on its way to the encoder: its plan, and batches that arrive while it is decoded."""

    episode: Episode
    plan: StepPlan
    batches: queue.Queue[PixelBatch | Exception | None] = field(default_factory=lambda: queue.Queue(BATCHES_AHEAD))
    decoder: str = ""

    def __iter__(self) -> Iterator[PixelBatch]:
        """Yield batches in order; raises what the decoder raised."""
        while (item := self.batches.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item


@dataclass(frozen=True)
class DecodeSettings:
    """How recordings become encoder inputs."""

    encode: EncodeConfig
    tubelet_size: int
    phase: int


class Decoders:
    """Iterates over the streams of all units in order while `num_decoders` threads work ahead.

    A feeder thread reads recordings from the source; each gets a decoding task. Queues are bounded, so memory holds a
    few episodes' containers and a few batches however long the run is. Batches never cross episodes, so the tokens of an
    episode depend on nothing else.
    """

    def __init__(
        self,
        source: Source,
        units: Iterable[Unit],
        settings: DecodeSettings,
        preprocess: Callable[[np.ndarray], torch.Tensor],
    ) -> None:
        self._source, self._units, self._settings, self._preprocess = source, units, settings, preprocess
        self._items: queue.Queue[
            EpisodeStream | Skipped | Unusable | Unit | UnitEnd | UnreadableUnit | Exception | None
        ] = queue.Queue(settings.encode.num_decoders)
        self._stop = threading.Event()

    def __enter__(self) -> Decoders:
        self._pool = ThreadPoolExecutor(self._settings.encode.num_decoders, thread_name_prefix="decode")
        self._feeder = threading.Thread(target=self._feed, name="feed", daemon=True)
        self._feeder.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._feeder.join()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[EpisodeStream | Skipped | Unusable | Unit | UnitEnd | UnreadableUnit]:
        while (item := self._items.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item

    def _feed(self) -> None:
        try:
            for unit in self._units:
                self._put(self._items, unit)
                self._put(self._items, self._feed_unit(unit))
            self._put(self._items, None)
        except Exception as error:  # handed to the consumer, which raises it
            self._put(self._items, error)

    def _feed_unit(self, unit: Unit) -> UnitEnd | UnreadableUnit:
        recordings = self._source.iter_episodes(unit)
        while not self._stop.is_set():
            try:
                recording = next(recordings, None)
            except (ValueError, OSError) as error:
                return UnreadableUnit(unit, describe_unreadable(error))
            if recording is None:
                break
            self._put(self._items, self._start(recording))
        return UnitEnd(unit)

    def _start(self, recording: Episode | Skipped) -> EpisodeStream | Skipped | Unusable:
        if isinstance(recording, Skipped):
            return recording
        settings = self._settings
        try:
            plan = plan_episode(
                len(recording.frame_ticks),
                recording.fps,
                settings.encode,
                tubelet_size=settings.tubelet_size,
                phase=settings.phase,
                times_s=recording.frame_times_s,
            )
        except ValueError as error:
            return Unusable(recording, str(error))
        stream = EpisodeStream(recording, plan)
        self._pool.submit(self._decode, stream)
        return stream

    def _decode(self, stream: EpisodeStream) -> None:
        inputs, encode = stream.plan.inputs, self._settings.encode
        try:
            episode = stream.episode
            video = open_video(
                episode.video, encode.decoder, first_frame=episode.first_frame, num_frames=len(episode.frame_ticks)
            )
            try:
                stream.decoder = video.decoder
                for start in range(0, len(inputs), encode.batch_size):
                    if self._stop.is_set():
                        return
                    self._put(stream.batches, self._read_batch(video, inputs[start : start + encode.batch_size]))
            finally:
                video.close()
            self._put(stream.batches, None)
        except Exception as error:  # handed to the consumer, which raises it
            self._put(stream.batches, error)

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


def luma_statistics(frames: np.ndarray) -> np.ndarray:
    """Mean and deviation of each frame's luma, from every fourth pixel in both directions.

    Args:
        frames: [F, h, w, 3] uint8 RGB.

    Returns:
        [F, 2] float32, 0 to 255. Source of the weights: ITU-R BT.601.
    """
    sampled = np.empty((*frames[:, ::4, ::4].shape[:3], 3), np.uint8)
    for channel in range(3):  # a third quicker than picking pixels, whose three values numpy copies one by one
        sampled[..., channel] = frames[:, ::4, ::4, channel]
    luma = sampled.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    return np.stack([luma.mean(axis=(1, 2)), luma.std(axis=(1, 2))], axis=1)
