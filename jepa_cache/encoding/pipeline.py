"""Decoding, encoding and writing, overlapped: the loop that fills the token stores of a group."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from jepa_cache.encoding.actions import read_first_keys, write_controls
from jepa_cache.encoding.decoding import Decoders, EpisodeStream, UnreadableError
from jepa_cache.encoding.groups import EncodingGroup
from jepa_cache.encoding.steps import find_slower
from jepa_cache.encoding.task import Claims, describe_machine
from jepa_cache.encoding.units import check_unchanged
from jepa_cache.episode import Skipped, find_implausible
from jepa_cache.files import full_disk_named
from jepa_cache.media.probe import DecodeError
from jepa_cache.sources import Unit, take_key
from jepa_cache.store import layout
from jepa_cache.store.quantisation import get_codec, step_bytes
from jepa_cache.store.root import CacheRoot
from jepa_cache.store.writer import TokenWriter, table

if TYPE_CHECKING:
    import torch

    from jepa_cache.encoder.frozen import FrozenEncoder, Overlap, Slot

# What differs from run to run in a decoder's message, and so must not get into a store: the time of day, and the frame
# that was requested when it broke (decord decodes ahead in a thread of its own, so that is a race).
CLOCK_TIME = re.compile(r"\[\d\d:\d\d:\d\d\] ?")
FRAME_REQUESTED = re.compile(r"^frame \d+ of (\d+) cannot")
WRITES_AHEAD = 4  # calls that may wait for the disk


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

    @property
    def limit(self) -> str:
        """Which of the three the others waited for."""
        times = {"decoding": self.decode_s, "the encoder": self.encode_s, "writing": self.write_s}
        return max(times, key=times.__getitem__)


@dataclass
class FillResult:
    """What became of some units; `unreadable` has the reason by token fingerprint and digest."""

    timing: Timing = field(default_factory=Timing)
    num_encoded: int = 0
    busy: list[Unit] = field(default_factory=list)
    unreadable: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, other: FillResult) -> None:
        """Count further units; who is busy is no sum."""
        for it in fields(Timing):
            setattr(self.timing, it.name, getattr(self.timing, it.name) + getattr(other.timing, it.name))
        self.num_encoded += other.num_encoded
        self.unreadable |= other.unreadable


def fill_group(
    group: EncodingGroup,
    encoder: FrozenEncoder,
    root: CacheRoot,
    on_progress: Callable[[int, Timing], object] = lambda *_: None,
) -> FillResult:
    """Encode the units of a group that no other encoder is working on; publish one after the other.

    `on_progress` is called with the bytes of recordings that were processed since its last call, and the times so far.

    Raises:
        ValueError: When the encoder overflows the stored dtype, or a unit changes while it is read.
    """
    from jepa_cache.encoder.frozen import Overlap

    # Of the calls that are not done at most WRITES_AHEAD wait; one more batch is being launched, one being written.
    overlap = Overlap(encoder, get_codec(group.encode.dtype).cast, WRITES_AHEAD + 2)
    provenance, result = describe_machine(encoder, group.encode, group.num_threads), FillResult()
    if encoder.preset.origin is not None:
        provenance["encoder_origin"] = encoder.preset.origin
    with (
        Claims(root, group) as claims,
        full_disk_named(root.path / "tokens" / group.fingerprint),
        WriterThread() as write,
        Decoders(group, claims.take(), encoder.preprocess) as decoders,
    ):

        def advance(num_bytes: int) -> None:
            result.timing.decode_s, result.timing.write_s = decoders.wait_s, write.wait_s
            on_progress(num_bytes, result.timing)

        for unit, recordings in decoders:
            store, bytes_left = _OpenUnit(root, group, unit, overlap, write, result.timing), 0
            with suppress(OSError):  # gone meanwhile, as its reader will say
                bytes_left = unit.num_bytes
            try:
                for recording in recordings:
                    if isinstance(recording, Skipped):
                        store.skipped.append(recording)
                        continue
                    for share in store.encode(recording):
                        num_bytes = min(bytes_left, round(share * recording.num_bytes))
                        advance(num_bytes)
                        bytes_left -= num_bytes
                check_unchanged(unit)
                store.publish(provenance)
            except UnreadableError as error:
                write.close(store.tokens)
                result.unreadable[group.fingerprint, unit.digest] = str(error)
            advance(bytes_left)
    result.timing.decode_s, result.timing.write_s = decoders.wait_s, write.wait_s
    result.num_encoded, result.busy = claims.num_taken - len(result.unreadable), claims.busy
    return result


class _OpenUnit:
    """The stores of one unit while they are filled; all disk work goes through the writer thread."""

    def __init__(
        self, root: CacheRoot, group: EncodingGroup, unit: Unit, overlap: Overlap, write: WriterThread, timing: Timing
    ) -> None:
        self._root, self._group, self._unit, self._overlap, self._write = root, group, unit, overlap, write
        self._timing = timing
        self._dtype, self._encoder = group.encode.dtype, (encoder := overlap.encoder)
        self.tokens = TokenWriter(
            group.tokens(root, unit),
            num_tokens=encoder.num_tokens,
            width=encoder.width,
            dtype=self._dtype,
            **_quantise_on(encoder.device, self._dtype),
        )
        self.skipped: list[Skipped] = []
        self._steps: list[dict[str, np.ndarray]] = []  # of each episode
        self._segments: list[dict[str, Any]] = []
        self._notes: list[str] = []
        self._implausible: list[str] = []
        self._slower: set[tuple[float, int]] = set()
        self._column_names: Mapping[str, str] = {}
        self._decoders: Counter[str] = Counter()
        self._controls: list[tuple[str, Mapping[str, np.ndarray]]] = []
        self._first_keys = read_first_keys(root, group.controls(root, unit))
        self._num_steps = 0
        # Inputs [B, G, ...] that fill no batch yet, and the episode and number of each step that comes of them.
        self._waiting: list[torch.Tensor] = []
        self._owners: list[tuple[str, int]] = []
        write.open(self.tokens)

    def encode(self, stream: EpisodeStream) -> Iterator[float]:
        """Encode one episode; yields each batch's share of it. A bad video is taken back and skipped by name."""
        if (key := take_key(stream.episode.key, self._first_keys, ())) is not None:
            stream.episode = replace(stream.episode, key=key)
        episode, start, luma, timing = stream.episode, self._num_steps, [], self._timing
        try:
            for batch in stream:
                num_steps = len(batch.pixels) * len(stream.plan.anchors) // len(stream.plan.inputs)
                self._owners += [(episode.key, self._num_steps - start + step) for step in range(num_steps)]
                self._take(batch.pixels)
                luma.append(batch.luma)
                self._num_steps += num_steps
                timing.num_frames += batch.pixels.shape[0] * batch.pixels.shape[1]
                timing.num_bytes += num_steps * step_bytes(self._dtype, self._encoder.num_tokens, self._encoder.width)
                yield len(batch.pixels) / len(stream.plan.inputs)
        except DecodeError as error:
            if self._num_steps > start:
                self._launch()
                self._num_steps = start
                self._write(self.tokens.roll_back, start)
            reason = FRAME_REQUESTED.sub(r"some of the \1 frames cannot", CLOCK_TIME.sub("", str(error)))
            self.skipped.append(Skipped(episode.key, reason))
        else:
            self._describe(stream, start, np.concatenate(luma))
            timing.num_episodes += 1
        # Those of a skipped episode are kept too: under another recipe it may be usable.
        self._controls.append((episode.key, episode.controls))

    def _take(self, pixels: torch.Tensor) -> None:
        """Launch a batch of an episode; with `encode.fill_batches` what fills none waits for the next episodes of the unit.

        So batches depend on the unit alone, as everything in its store does, whoever encodes it and whenever.
        """
        encode, waiting = self._group.encode, self._waiting
        if waiting and (waiting[0].shape[1:], waiting[0].dtype) != (pixels.shape[1:], pixels.dtype):
            self._launch()
        while len(pixels):
            room = encode.batch_size - sum(map(len, waiting))
            waiting.append(pixels[:room])
            if not encode.fill_batches or len(pixels) >= room:
                self._launch()
            pixels = pixels[room:]

    def _launch(self) -> None:
        """Encode what waits, as one batch."""
        if not self._waiting:
            return
        begun = time.perf_counter()
        slot = self._overlap.submit(*self._waiting)
        self._timing.encode_s += time.perf_counter() - begun
        self._waiting.clear()
        owners, self._owners = self._owners[: len(slot.computed)], self._owners[len(slot.computed) :]
        waited_s = self._write.wait_device_s
        self._write(self._append, slot, owners)
        self._timing.encode_s += self._write.wait_device_s - waited_s

    def _append(self, slot: Slot, owners: Sequence[tuple[str, int]]) -> None:
        """Write what came of a batch; the writer thread waits for it, and finds what its dtype cannot hold."""
        from jepa_cache.encoder.frozen import TokenOverflowError

        begun = time.perf_counter()
        try:
            tokens, errors = slot.result()
        except TokenOverflowError as error:
            episode, step = owners[error.step]
            raise ValueError(f"episode {episode!r}, step {step}: {error}") from error
        self._write.device_s += time.perf_counter() - begun
        self.tokens.append(tokens, errors)
        slot.release()

    def publish(self, provenance: Mapping[str, Any]) -> None:
        """Publish controls first, then tokens: a published token store has its controls."""
        self._launch()
        columns = {
            field.name: np.concatenate([part[field.name] for part in self._steps]) if self._steps else []
            for field in layout.STEPS_SCHEMA
        }
        rows = {field.name: [row[field.name] for row in self._segments] for field in layout.SEGMENTS_SCHEMA}
        metadata = {
            "recipe": self._group.recipe,
            "skipped": [skipped._asdict() for skipped in self.skipped],
            "notes": self._notes,
            "num_segments": len(self._segments),
            "num_episodes": len(self._steps),
        }
        # Outside the digest, so that a rule that finds more implausible values later gives the same stores.
        made = {**provenance, "decoders": dict(sorted(self._decoders.items()))}
        made |= {"implausible": self._implausible} if self._implausible else {}
        made |= {layout.SLOWER: sorted(self._slower)} if self._slower else {}
        made |= {layout.COLUMN_NAMES: dict(self._column_names)} if self._column_names else {}
        steps, segments = table(layout.STEPS_SCHEMA, columns), table(layout.SEGMENTS_SCHEMA, rows)

        def publish() -> None:
            write_controls(self._root, self._group.controls(self._root, self._unit), self._controls)
            self.tokens.publish(steps, segments, metadata, made)
            self._write.leave(self.tokens)
            self._root.publish(self.tokens.final)

        self._write.behind(publish)

    def _describe(self, stream: EpisodeStream, start: int, luma: np.ndarray) -> None:
        episode, plan, first = stream.episode, stream.plan, len(self._segments)
        # Luma comes for every sampled frame; steps keep that of their anchor.
        anchor_luma = luma[np.searchsorted(plan.inputs.reshape(-1), plan.anchors)]
        ticks = episode.frame_ticks[plan.anchors]
        self._steps.append(
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
        of_all = {"episode": episode.key, "step_hz": plan.step_hz}
        for number, (a, b) in enumerate(plan.segments.tolist(), first):
            self._segments.append({"segment": number, "start": start + a, "stop": start + b, **of_all})
        self._notes += [f"{episode.key}: {note}" for note in episode.notes]
        self._implausible += [f"{episode.key}: {text}" for text in find_implausible(episode.controls)]
        if (slower := find_slower(episode.fps, self._group.encode.fps)) is not None:
            self._slower.add(slower)
        self._column_names = episode.column_names
        self._decoders[stream.decoder] += 1


def _quantise_on(device: torch.device, dtype: str) -> dict[str, Any]:
    """How a GPU makes a dtype's codes, as options of the writer, on a stream that batches do not wait in; none leaves it to the writer."""
    import torch

    from jepa_cache.encoding.quantising import quantise, sum_channels

    if device.type == "cpu":
        return {}
    stream = torch.cuda.Stream(device)

    def on_stream(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            with torch.cuda.stream(stream):
                return function(*arguments)

        return run

    return {
        "quantise": on_stream(partial(quantise, dtype=dtype, device=device)),
        "sums": on_stream(partial(sum_channels, device=device)),
    }


def _idle_share(idle: np.ndarray | None, ticks: np.ndarray) -> np.ndarray:
    """Mean of `idle` over the ticks from each anchor to the next; NaN where there is no next one or no record."""
    share = np.full(len(ticks), np.nan, np.float32)
    if idle is not None:
        total = np.concatenate([[0.0], np.cumsum(idle, dtype=np.float64)])
        share[:-1] = (total[ticks[1:]] - total[ticks[:-1]]) / np.maximum(np.diff(ticks), 1)
    return share


class WriterThread:
    """Runs calls one after the other; `write(function, *arguments)` waits only while too many are queued.

    `write.behind(function)` runs in a second thread, after the calls before it and while later ones go on: a unit is published while the
    next one is appended; one at a time, so that a third unit waits.

    After a call that failed none is run any more, so that nothing is published on top of a hole; what it raised is
    raised by the next `write`, or at the end of the block. `wait_s` is how long callers had to wait for the
    disk, `wait_device_s` how long for the encoder's results, which the calls wait for.
    """

    def __init__(self) -> None:
        self.wait_s = self.wait_device_s = 0.0
        self.device_s = 0.0  # that calls waited for the encoder
        self._failed = False
        self._pending: list[Future] = []
        self._behind: Future | None = None
        self._open: list[TokenWriter] = []

    def __enter__(self) -> WriterThread:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._second = ThreadPoolExecutor(1, thread_name_prefix="publish")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            if kind is None:
                self._wait_for(0)
                begun = time.perf_counter()
                self._wait_for_publishing()
                self.wait_s += time.perf_counter() - begun
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._second.shutdown(wait=True, cancel_futures=True)
            for writer in list(self._open):
                self.leave(writer)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Queue a call; raises what an earlier one raised."""
        self._pending.append(self._pool.submit(self._run, function, *arguments))
        self._wait_for(WRITES_AHEAD)

    def behind(self, function: Callable[[], Any]) -> None:
        """Queue a call for the second thread."""

        def hand_over() -> None:
            self._wait_for_publishing()
            self._behind = self._second.submit(self._run, function)

        self(hand_over)

    def open(self, writer: TokenWriter) -> None:
        """Enter a writer; it is left when closed, or when the block ends."""
        self._open.append(writer)
        self(writer.__enter__)

    def close(self, writer: TokenWriter) -> None:
        """Leave a writer after what was queued before."""
        self(self.leave, writer)

    def leave(self, writer: TokenWriter) -> None:
        """Leave a writer now."""
        writer.__exit__(None, None, None)
        self._open.remove(writer)

    def _run(self, function: Callable[..., Any], *arguments: Any) -> None:
        if self._failed:
            return
        try:
            function(*arguments)
        except BaseException:
            self._failed = True
            raise

    def _wait_for_publishing(self) -> None:
        if self._behind is not None:
            self._behind.result()

    def _wait_for(self, num_left: int) -> None:
        if self._behind is not None and self._behind.done():
            self._behind.result()
        begun, device_s = time.perf_counter(), self.device_s
        while len(self._pending) > num_left:
            self._pending.pop(0).result()
        waited_s = time.perf_counter() - begun
        for_device_s = min(waited_s, self.device_s - device_s)
        self.wait_s += waited_s - for_device_s
        self.wait_device_s += for_device_s
