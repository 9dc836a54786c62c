"""Recordings decoded and preprocessed ahead of the encoder, by threads, in order and in bounded memory."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jepa_cache.config.paths import default_num_decoders
from jepa_cache.encoding.groups import EncodingGroup
from jepa_cache.encoding.steps import StepPlan
from jepa_cache.episode import Episode, Skipped
from jepa_cache.media.probe import DecodeError
from jepa_cache.media.video import Video, open_video
from jepa_cache.sources import Unit, describe_unreadable

if TYPE_CHECKING:
    import torch

# Decoded at once. A batch of 64 frames of 640x360 is 44 MB, which would have to be fetched from memory again to be resized. One by
# one costs a fifth more than such pieces: the decoder, and all that works on its frames, throw each other's code out of the cache.
PIECE_FRAMES = 8


class PixelBatch(NamedTuple):
    """Preprocessed encoder inputs `pixels` [B, G, 3, R, R] and the luma mean and deviation of their B*G frames."""

    pixels: torch.Tensor
    luma: np.ndarray  # [B * G, 2] float32


class UnreadableError(Exception):
    """A unit cannot be read now, or not to its end: what came of it is not used, and the next run tries it again."""


class Budget:
    """Bytes that episodes may take which were read or decoded ahead, all together.

    The earliest episode may always hold one batch, so the consumer, which takes them in order, never waits in vain; room for that
    batch is kept free of the others. Of the room that finished episodes leave, each one that is being decoded has the larger a
    share the earlier it comes, the first of them that of nearly a whole one. Without shares all get to the same point before memory
    is full, and then one thread works alone until the first is done.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = self.peak_bytes = 0
        self._first = 0  # the earliest episode that is not done with
        self._episodes: Counter[int] = Counter()  # bytes of each episode itself
        self._batches: Counter[int] = Counter()  # and of its batches
        self._decoding: set[int] = set()
        self._changed = threading.Condition()
        self._closed = False

    def take_episode(self, number: int, num_bytes: int) -> None:
        """Wait for room for an episode as it was read, which gives it up with `finish`; they are numbered from 0."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or number == self._first or self.held_bytes + num_bytes <= self.limit_bytes
            )
            self._episodes[number] = num_bytes
            self._add(num_bytes)

    def wait_for_consumer(self, number: int) -> None:
        """Wait until the earliest episode that is not done with has this number or a later one."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._first >= number)

    @contextmanager
    def decoding(self, number: int) -> Iterator[None]:
        """While the block runs, an episode has a share."""
        with self._changed:
            self._decoding.add(number)
        try:
            yield
        finally:
            with self._changed:
                self._decoding.discard(number)
                self._changed.notify_all()

    def take_batch(self, number: int, num_bytes: int, whole_bytes: int) -> None:
        """Wait for room for a batch of an episode that is being decoded and will have `whole_bytes` in all."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._may_take(number, num_bytes, whole_bytes))
            self._batches[number] += num_bytes
            self._add(num_bytes)

    def _may_take(self, number: int, num_bytes: int, whole_bytes: int) -> bool:
        if number == self._first:
            return not self._batches[number] or self.held_bytes + num_bytes <= self.limit_bytes
        if self.held_bytes + 2 * num_bytes > self.limit_bytes:
            return False
        # The earliest of all needs no share: its batches go as they come.
        sharing = sorted(it for it in self._decoding if it != self._first)
        shared_bytes = self.limit_bytes - num_bytes - self.held_bytes + sum(self._batches[it] for it in sharing)
        # Threads that are one behind the other all the way hold half an episode each.
        count = max(1, min(len(sharing), int(2 * shared_bytes / whole_bytes)))
        share = shared_bytes * 2 * (count - sharing.index(number)) / (count * (count + 1))
        return self._batches[number] < share

    def give_back(self, number: int, num_bytes: int) -> None:
        """A batch is not needed any more."""
        with self._changed:
            self._batches[number] -= num_bytes
            self._add(-num_bytes)

    def finish(self, number: int) -> None:
        """An episode is done with, and all earlier ones."""
        with self._changed:
            self._first = max(self._first, number + 1)
            self._add(-self._episodes.pop(number, 0) - self._batches.pop(number, 0))

    def close(self) -> None:
        """Let everybody go on: nothing is limited any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _add(self, num_bytes: int) -> None:
        self.held_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        self._changed.notify_all()


class EpisodeStream:
    """One episode on its way to the encoder: its plan, and batches that arrive while it is decoded."""

    def __init__(self, number: int, episode: Episode, budget: Budget, get: Callable[[queue.Queue], Any]) -> None:
        """Begin without a batch; `get` takes from a queue."""
        self.number, self.episode, self.num_bytes = number, episode, video_bytes(episode.video)
        self._budget, self._get = budget, get
        self.batches: queue.Queue[PixelBatch | Exception | None] = queue.Queue()  # bounded by the budget
        self.plan: StepPlan  # set by the decoding thread before the first batch, as is the decoder
        self.decoder = ""
        self.dropped = False

    def __iter__(self) -> Iterator[PixelBatch]:
        """Yield batches in order, each until the next is asked for; raises DecodeError where the video is bad, UnreadableError where its file is."""
        try:
            while (item := self._get(self.batches)) is not None:
                yield item
                self._budget.give_back(self.number, item.pixels.nbytes)
        finally:
            self._budget.finish(self.number)

    def drop(self) -> None:
        """Let the decoder end: nobody wants the rest."""
        self.dropped = True
        with suppress(DecodeError, UnreadableError):
            for _ in self:
                pass


class Decoders:
    """Iterates over all units in order, each with its recordings, while threads work ahead of the consumer.

    A feeder thread reads recordings from the source; each gets a decoding task. What is read and decoded ahead stays within
    `encode.decode_ahead_mib`, so that threads do not wait for each other's episodes to be taken. Batches never cross episodes here.
    `wait_s` is how long the consumer waited.
    """

    def __init__(
        self, group: EncodingGroup, units: Iterable[Unit], preprocess: Callable[[Sequence[np.ndarray]], torch.Tensor]
    ) -> None:
        self.wait_s = 0.0
        self._group, self._units, self._preprocess = group, units, preprocess
        # Of each unit itself, its recordings, then None or why it cannot be read to its end; a last None.
        self._items: queue.Queue[Unit | EpisodeStream | Skipped | Exception | None] = queue.Queue()
        self.budget = Budget(group.encode.decode_ahead_mib << 20)
        self._num_threads = group.encode.num_decoders or default_num_decoders()
        self._num_episodes = 0
        self._stop = threading.Event()

    def __enter__(self) -> Decoders:
        self._pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="decode")
        self._feeder = threading.Thread(target=self._feed, name="feed", daemon=True)
        self._feeder.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self.budget.close()
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
        units = iter(self._units)
        try:
            while not self._stop.is_set():
                # A unit that is asked for is claimed: what no thread would decode soon is left to other encoders.
                self.budget.wait_for_consumer(self._num_episodes - self._num_threads + 1)
                if (unit := next(units, None)) is None:
                    break
                self._items.put(unit)
                self._items.put(self._feed_unit(unit))
            self._items.put(None)
        except Exception as error:  # handed to the consumer, which raises it
            self._items.put(error)

    def _feed_unit(self, unit: Unit) -> UnreadableError | None:
        try:
            for recording in self._group.source.iter_episodes(unit):
                self._items.put(self._start(recording) if isinstance(recording, Episode) else recording)
                if self._stop.is_set():
                    break
        except (ValueError, OSError) as error:
            return UnreadableError(describe_unreadable(error))
        return None

    def _start(self, episode: Episode) -> EpisodeStream:
        stream = EpisodeStream(self._num_episodes, episode, self.budget, self._get)
        self._num_episodes += 1
        self.budget.take_episode(stream.number, episode_bytes(episode))
        self._pool.submit(self._decode, stream)
        return stream

    def _decode(self, stream: EpisodeStream) -> None:
        episode, encode = stream.episode, self._group.encode
        num_frames = len(episode.frame_ticks)
        end: Exception | None = None
        try:
            stream.plan = self._plan(episode)
            inputs = stream.plan.inputs
            options = {"first_frame": episode.first_frame, "num_frames": num_frames}
            with self.budget.decoding(stream.number), open_video(episode.video, encode.decoder, **options) as video:
                stream.decoder = video.decoder
                for start in range(0, len(inputs), encode.batch_size):
                    if self._stop.is_set() or stream.dropped:
                        break
                    stream.batches.put(self._read_batch(stream, video, inputs[start : start + encode.batch_size]))
        except OSError as error:  # the disk or network failed, or the file is gone
            end = UnreadableError(describe_unreadable(error))
        except Exception as error:
            end = error
        stream.batches.put(end)

    def _plan(self, episode: Episode) -> StepPlan:
        try:
            return self._group.plan(len(episode.frame_ticks), episode.fps, episode.frame_times_s)
        except ValueError as error:  # too short or too slow: skipped as a video is that cannot be decoded
            raise DecodeError(str(error)) from error

    def _read_batch(self, stream: EpisodeStream, video: Video, inputs: np.ndarray) -> PixelBatch:
        """Decode and preprocess the frames [B, G] of one batch."""
        frames, luma = inputs.reshape(-1), []
        pixels: torch.Tensor | None = None
        for start in range(0, len(frames), PIECE_FRAMES):
            piece = list(video.iter_frames(frames[start : start + PIECE_FRAMES]))
            ready = self._preprocess(piece)
            if pixels is None:
                whole_bytes = ready[0].nbytes * stream.plan.inputs.size
                self.budget.take_batch(stream.number, ready[0].nbytes * len(frames), whole_bytes)
                pixels = ready.new_empty((len(frames), *ready.shape[1:]))
            pixels[start : start + len(ready)] = ready
            luma.append(luma_statistics(piece))
        return PixelBatch(pixels.unflatten(0, inputs.shape), np.concatenate(luma))


def episode_bytes(episode: Episode) -> int:
    """What an episode takes of memory before it is decoded: its container, unless that is a file, and its controls."""
    container = 0 if isinstance(episode.video, Path) else video_bytes(episode.video)
    return container + sum(values.nbytes for values in episode.controls.values())


def video_bytes(video: Any) -> int:
    """Size of a video, encoded or as pictures."""
    if isinstance(video, bytes):
        return len(video)
    return video.stat().st_size if isinstance(video, Path) else video.size_bytes


def luma_statistics(frames: Sequence[np.ndarray]) -> np.ndarray:
    """Mean and deviation of each frame's luma, [F, 2] float32, 0 to 255, from every fourth pixel in both directions.

    Frames are F of [h, w, 3] uint8 RGB. Source of the weights: ITU-R BT.601.
    """
    sampled = np.empty((len(frames), *frames[0][::4, ::4].shape), np.uint8)
    for target, frame in zip(sampled, frames, strict=True):
        for channel in range(3):  # a third quicker than picking pixels, whose three values numpy copies one by one
            target[..., channel] = frame[::4, ::4, channel]
    luma = sampled.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    mean = luma.mean(axis=(1, 2), keepdims=True)
    return np.stack([mean[:, 0, 0], luma.std(axis=(1, 2), mean=mean)], axis=1)
