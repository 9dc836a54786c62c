"""Decoding, encoding and writing, overlapped: the loop that fills the token stores of the missing units, and its progress bar."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from jepa_cache.encoding.decoding import Decoders, DecodeSettings, EpisodeStream, UnitEnd, UnreadableUnit, Unusable
from jepa_cache.encoding.groups import EncodingGroup
from jepa_cache.encoding.units import check_unchanged
from jepa_cache.episode import Episode, Skipped
from jepa_cache.files import full_disk_named
from jepa_cache.media.probe import DecodeError
from jepa_cache.plausibility import find_implausible
from jepa_cache.sources import Unit
from jepa_cache.store import layout
from jepa_cache.store.controls import ControlsWriter
from jepa_cache.store.quantisation import get_codec, step_bytes
from jepa_cache.store.root import CacheRoot
from jepa_cache.store.writer import TokenWriter, table

if TYPE_CHECKING:
    from jepa_cache.encoder.frozen import FrozenEncoder

# What differs from run to run in a decoder's message, and so must not get into a store: the time of day, and the frames
# that were asked for when it broke (decord decodes ahead in a thread of its own, so that is a race).
CLOCK_TIME = re.compile(r"\[\d\d:\d\d:\d\d\] ?")
FRAMES_ASKED_FOR = re.compile(r"^frames \d+ to \d+ of (\d+) cannot")
WRITES_AHEAD = 4  # calls that may wait for the disk
HERE = "here"  # the work of this process, where there are no workers


@dataclass
class Timing:
    """Where the main loop spent its time; the largest wait names the limit."""

    decode_s: float = 0.0  # waiting for decoded frames
    encode_s: float = 0.0  # in the encoder
    write_s: float = 0.0  # waiting for the disk
    num_frames: int = 0
    num_bytes: int = 0  # of tokens
    num_episodes: int = 0
    elapsed_s: float = 0.0

    def __add__(self, other: Timing) -> Timing:
        return Timing(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def limit(self) -> str:
        """Which of the three the others waited for."""
        times = {"decoding": self.decode_s, "the encoder": self.encode_s, "writing": self.write_s}
        return max(times, key=times.__getitem__)


@dataclass
class _UnitRows:
    """Step and segment tables of one unit while they grow."""

    steps: list[dict[str, np.ndarray]] = field(default_factory=list)
    segments: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    implausible: list[str] = field(default_factory=list)
    decoders: dict[str, int] = field(default_factory=dict)

    @property
    def provenance(self) -> dict[str, Any]:
        """What is recorded outside the digest, so that a rule that finds more later gives the same stores."""
        doubts = {"implausible": self.implausible} if self.implausible else {}
        return {"decoders": dict(sorted(self.decoders.items())), **doubts}


class Encoded(NamedTuple):
    """What `encode_units` took, and the digests of the units that could not be read, each with the reason: they have no store."""

    timing: Timing
    unreadable: dict[str, str]


def encode_units(
    units: Iterable[Unit],
    group: EncodingGroup,
    encoder: FrozenEncoder,
    root: CacheRoot,
    *,
    provenance: Mapping[str, Any],
    on_progress: Callable[[Timing, int], None],
) -> Encoded:
    """Encode every unit and publish its token store and controls, one unit after the other.

    Args:
        units: Of the group; taken one by one, by another thread, shortly before each is read.
        group: Recipe and settings.
        encoder: The frozen encoder.
        root: Cache root.
        provenance: Recorded in every store, outside its digest.
        on_progress: Called after every batch with the timing so far and the bytes of recordings processed so far.

    Raises:
        ValueError: When the encoder overflows the stored dtype, or a unit changes while it is read.
    """
    unreadable: dict[str, str] = {}
    settings = DecodeSettings(group.encode, encoder.preset.tubelet_size, group.phase)
    timing, started, bytes_processed, bytes_finished = Timing(), time.perf_counter(), 0, 0
    with (
        full_disk_named(root.path / "tokens" / group.fingerprint),
        WriterThread() as write,
        Decoders(group.source, units, settings, encoder.preprocess) as items,
    ):
        current: _OpenUnit | None = None
        for item in _timed(items, timing):
            if isinstance(item, Unit):
                current = _OpenUnit(root, group, item, encoder, write)
            elif isinstance(item, UnreadableUnit):
                write.close(current.tokens)
                unreadable[item.unit.digest] = item.reason
            elif isinstance(item, UnitEnd):
                check_unchanged(item.unit)
                current.publish(provenance)
                bytes_finished += item.unit.num_bytes
                bytes_processed = bytes_finished  # inside a unit only the videos' bytes are known
            elif isinstance(item, Skipped):
                current.rows.skipped.append(item)
            elif isinstance(item, Unusable):
                current.skip(item.episode, item.reason)
            else:
                for num_frames, num_bytes in current.encode(item, timing):
                    timing.num_frames += num_frames
                    timing.num_bytes += num_bytes
                    timing.elapsed_s = time.perf_counter() - started
                    timing.write_s = write.wait_s
                    on_progress(timing, bytes_processed)
                bytes_processed += video_bytes(item.episode.video)
    timing.elapsed_s = time.perf_counter() - started
    timing.write_s = write.wait_s
    return Encoded(timing, unreadable)


def video_bytes(video: Any) -> int:
    """Size of an encoded video, whatever form it has."""
    if isinstance(video, bytes):
        return len(video)
    return video.stat().st_size if isinstance(video, Path) else video.size_bytes


class _OpenUnit:
    """The stores of one unit while they are filled; all disk work goes through the writer thread."""

    def __init__(
        self, root: CacheRoot, group: EncodingGroup, unit: Unit, encoder: FrozenEncoder, write: WriterThread
    ) -> None:
        self.rows = _UnitRows()
        self._root, self._encoder, self._write, self._recipe = root, encoder, write, group.recipe
        dtype = group.encode.dtype
        self._cast = get_codec(dtype).cast
        self.tokens = TokenWriter(
            group.tokens(root, unit), num_tokens=encoder.num_tokens, width=encoder.width, dtype=dtype
        )
        self._step_bytes = step_bytes(dtype, encoder.num_tokens, encoder.width)
        self._controls_path = group.controls(root, unit)
        self._controls: list[tuple[str, Mapping[str, np.ndarray]]] = []
        self._num_steps = 0
        write.open(self.tokens)

    def encode(self, stream: EpisodeStream, timing: Timing) -> Iterator[tuple[int, int]]:
        """Encode one episode; yields (frames, bytes) per batch. An unreadable video is taken back and skipped by name."""
        from jepa_cache.encoder.frozen import TokenOverflowError, measure_cast, to_stored

        start, luma = self._num_steps, []
        try:
            for batch in _timed(stream, timing):
                begun = time.perf_counter()
                computed = self._encoder.encode(batch.pixels).flatten(0, 1)
                tokens, errors = to_stored(computed, self._cast), measure_cast(computed, self._cast)
                timing.encode_s += time.perf_counter() - begun
                luma.append(batch.luma)
                self._num_steps += len(tokens)
                self._write(self.tokens.append, tokens, errors)
                yield batch.pixels.shape[0] * batch.pixels.shape[1], len(tokens) * self._step_bytes
        except DecodeError as error:
            self._num_steps = start
            self._write(self.tokens.roll_back, start)
            self.skip(stream.episode, str(error))
            return
        except TokenOverflowError as error:
            raise ValueError(
                f"episode {stream.episode.key!r}, step {self._num_steps - start + error.step}: {error}"
            ) from error
        self._describe(stream, start, np.concatenate(luma))
        timing.num_episodes += 1

    def skip(self, episode: Episode, reason: str) -> None:
        """Skip an episode by name; its controls are kept, since under another recipe it may be usable."""
        stable = FRAMES_ASKED_FOR.sub(r"some of the \1 frames cannot", CLOCK_TIME.sub("", reason))
        self.rows.skipped.append(Skipped(episode.key, stable))
        self._controls.append((episode.key, episode.controls))

    def publish(self, provenance: Mapping[str, Any]) -> None:
        """Publish controls first, then tokens: a published token store has its controls."""
        rows = self.rows
        columns = {
            field.name: np.concatenate([part[field.name] for part in rows.steps]) if rows.steps else []
            for field in layout.STEPS_SCHEMA
        }
        steps = table(layout.STEPS_SCHEMA, columns)
        segments = table(
            layout.SEGMENTS_SCHEMA,
            {field.name: [row[field.name] for row in rows.segments] for field in layout.SEGMENTS_SCHEMA},
        )
        metadata = {
            "recipe": self._recipe,
            "skipped": [skipped._asdict() for skipped in rows.skipped],
            "notes": rows.notes,
            "num_segments": len(rows.segments),
            "num_episodes": len(rows.steps),
        }
        self._write(_write_controls, self._root, self._controls_path, self._controls)
        self._write(self.tokens.publish, steps, segments, metadata, {**provenance, **rows.provenance})
        self._write.close(self.tokens)
        self._write(self._root.publish, self.tokens.final)

    def _describe(self, stream: EpisodeStream, start: int, luma: np.ndarray) -> None:
        episode, plan = stream.episode, stream.plan
        first = len(self.rows.segments)
        # Luma comes for every sampled frame; steps keep that of their anchor.
        anchor_luma = luma[np.searchsorted(plan.inputs.reshape(-1), plan.anchors)]
        ticks = episode.frame_ticks[plan.anchors]
        self.rows.steps.append(
            {
                "segment": first + np.repeat(np.arange(len(plan.segments)), np.diff(plan.segments, axis=1)[:, 0]),
                "frame": plan.anchors,
                "tick": ticks,
                "gui": episode.controls["gui"][ticks] if "gui" in episode.controls else np.zeros(len(ticks), bool),
                "idle": _idle_share(episode.controls.get("idle"), ticks),
                "luma_mean": anchor_luma[:, 0],
                "luma_std": anchor_luma[:, 1],
            }
        )
        self.rows.segments += [
            {
                "segment": first + i,
                "episode": episode.key,
                "start": start + a,
                "stop": start + b,
                "step_hz": plan.step_hz,
            }
            for i, (a, b) in enumerate(plan.segments.tolist())
        ]
        self.rows.notes += [f"{episode.key}: {note}" for note in episode.notes]
        self.rows.implausible += [f"{episode.key}: {text}" for text in find_implausible(episode.controls)]
        self.rows.decoders[stream.decoder] = self.rows.decoders.get(stream.decoder, 0) + 1
        self._controls.append((episode.key, episode.controls))


def _timed(items: Any, timing: Timing) -> Any:
    """Yield from `items`, counting the time spent waiting for the next one as decoding."""
    iterator = iter(items)
    while True:
        begun = time.perf_counter()
        try:
            item = next(iterator)
        except StopIteration:
            return
        finally:
            timing.decode_s += time.perf_counter() - begun
        yield item


def _write_controls(root: CacheRoot, path: Path, controls: Sequence[tuple[str, Mapping[str, np.ndarray]]]) -> None:
    if root.fetch(path):
        return
    with ControlsWriter(path) as writer:
        for episode, columns in controls:
            writer.append(episode, columns)
    root.publish(path)


def _idle_share(idle: np.ndarray | None, ticks: np.ndarray) -> np.ndarray:
    """Mean of `idle` over the ticks from each anchor to the next; NaN where there is no next one or no record."""
    share = np.full(len(ticks), np.nan, np.float32)
    if idle is not None:
        total = np.concatenate([[0.0], np.cumsum(idle, dtype=np.float64)])
        share[:-1] = (total[ticks[1:]] - total[ticks[:-1]]) / np.maximum(np.diff(ticks), 1)
    return share


class WriterThread:
    """Runs calls one after the other; `write(function, *arguments)` waits only while too many are queued.

    After a call that failed none is run any more, so that nothing is published on top of a hole; what it raised is
    raised by the next `write`, or at the end of the block.

    Attributes:
        wait_s: Seconds that callers had to wait.
    """

    def __init__(self) -> None:
        self.wait_s = 0.0
        self._failed = False
        self._pending: list[Future] = []
        self._open: list[TokenWriter] = []

    def __enter__(self) -> WriterThread:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            if kind is None:
                self._wait_for(0)
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
            for writer in list(self._open):
                self._leave(writer)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Queue a call.

        Raises:
            Exception: What an earlier call raised.
        """
        self._pending.append(self._pool.submit(self._run, function, *arguments))
        self._wait_for(WRITES_AHEAD)

    def open(self, writer: TokenWriter) -> None:
        """Enter a writer; it is left when closed, or when the block ends."""
        self._open.append(writer)
        self(writer.__enter__)

    def close(self, writer: TokenWriter) -> None:
        """Leave a writer after what was queued before."""
        self(self._leave, writer)

    def _run(self, function: Callable[..., Any], *arguments: Any) -> None:
        if self._failed:
            return
        try:
            function(*arguments)
        except BaseException:
            self._failed = True
            raise

    def _leave(self, writer: TokenWriter) -> None:
        writer.__exit__(None, None, None)
        self._open.remove(writer)

    def _wait_for(self, num_left: int) -> None:
        begun = time.perf_counter()
        while len(self._pending) > num_left:
            self._pending.pop(0).result()
        self.wait_s += time.perf_counter() - begun


class ProgressBar:
    """Shows how far the recordings are, whoever encodes them; its methods may be called from any thread.

    How many frames there are is not known before they are decoded: it is estimated from the bytes processed so far.
    """

    def __init__(self, view: str, total_bytes: int) -> None:
        self._total_bytes = total_bytes
        self._ended = (0, 0)  # frames, bytes
        self._running: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._bar = tqdm(desc="encoding" if view == "main" else f"encoding {view}", unit=" frames", dynamic_ncols=True)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.total = self._bar.n
        self._bar.close()

    def show(self, timing: Timing, bytes_processed: int) -> None:
        """Show how far this process is, and what it waits for most."""
        self.say(f"limit: {timing.limit}")
        self.report(HERE, timing.num_frames, bytes_processed)

    def report(self, key: str, num_frames: int, bytes_processed: int) -> None:
        """Show how far a piece of work is that has not ended."""
        with self._lock:
            self._running[key] = (num_frames, bytes_processed)
            self._show()

    def end(self, key: str, num_frames: int, num_bytes: int) -> None:
        """Count a piece of work that has ended: the frames that were encoded, and the bytes that need no more work."""
        with self._lock:
            self._running.pop(key, None)
            self._ended = (self._ended[0] + num_frames, self._ended[1] + num_bytes)
            self._show()

    def say(self, what: str) -> None:
        """Show words behind the numbers."""
        self._bar.set_postfix_str(what, refresh=False)

    def wait(self, unit: str) -> None:
        """Show that another encoder is being waited for."""
        self._bar.set_postfix_str(f"waiting for another encoder: unit {unit}")

    def _show(self) -> None:
        num_frames, num_bytes = (sum(numbers) for numbers in zip(self._ended, *self._running.values(), strict=True))
        if num_bytes:
            self._bar.total = max(num_frames, round(num_frames * self._total_bytes / num_bytes))
        self._bar.update(num_frames - self._bar.n)
