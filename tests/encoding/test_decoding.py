"""Claims: decoders of many episodes all work at once, whatever their lengths, within one budget of memory; order is kept."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from jepa_cache.encoding import decoding
from jepa_cache.encoding.decoding import Decoders
from jepa_cache.episode import Episode
from jepa_cache.sources import Unit

BATCH = 64
PIXELS = 16 * 1024  # bytes of a frame
BATCH_BYTES = BATCH * PIXELS
LENGTHS = [100, 384, 1500]


def make_decoders(monkeypatch, lengths, *, num_threads, budget_mib, on_read):
    """Decoders of one unit of episodes with so many frames, whose videos call `on_read(episode, first frame)`."""

    class Video:
        decoder = "made"

        def __init__(self, number):
            self.number = number

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def iter_frames(self, frames):
            on_read(self.number, int(frames[0]))
            yield from np.full((len(frames), 4, 4, 3), self.number % 251, np.uint8)

    def episodes(_):
        for number, length in enumerate(lengths):
            yield Episode(str(number), b"%d" % number, 20.0, {"x": np.zeros(length, bool)}, np.arange(length), length)

    monkeypatch.setattr(decoding, "open_video", lambda video, *_, **__: Video(int(video)))
    encode = SimpleNamespace(num_decoders=num_threads, decode_ahead_mib=budget_mib, batch_size=BATCH, decoder="auto")
    group = SimpleNamespace(
        encode=encode,
        source=SimpleNamespace(iter_episodes=episodes),
        plan=lambda num_frames, *_: SimpleNamespace(inputs=np.arange(num_frames)[:, None]),
    )
    preprocess = lambda frames: torch.from_numpy(np.stack(frames)[:, :1, :1, :1]).expand(-1, 1, 1, PIXELS)  # noqa: E731
    return Decoders(group, [Unit("unit", ())], preprocess)


def read_all(decoders):
    """Episode, first pixel and number of every batch, in the order they come."""
    seen = []
    for _, streams in decoders:
        for stream in streams:
            seen += [(stream.episode.key, int(batch.pixels.flatten()[0]), len(batch.pixels)) for batch in stream]
    return seen


def expected_of(lengths):
    sizes = [[min(BATCH, length - start) for start in range(0, length, BATCH)] for length in lengths]
    return [(str(number), number % 251, size) for number, row in enumerate(sizes) for size in row]


@pytest.mark.parametrize("num_threads", [8, 16])
@pytest.mark.parametrize("length", LENGTHS)
def test_all_threads_decode_at_once(monkeypatch, length, num_threads):
    """Every eighth of the way each thread waits for all others: it fails where one had to stand still."""
    lengths, meeting = [length] * (2 * num_threads), threading.Barrier(num_threads, timeout=60)
    stops = set(
        range(0, length, max(decoding.PIECE_FRAMES, length // 8 // decoding.PIECE_FRAMES * decoding.PIECE_FRAMES))
    )
    first_stops = {(number, stop) for number in range(num_threads) for stop in stops}

    def on_read(number, frame):
        if (number, frame) in first_stops:
            meeting.wait()

    with make_decoders(monkeypatch, lengths, num_threads=num_threads, budget_mib=4096, on_read=on_read) as decoders:
        assert read_all(decoders) == expected_of(lengths)
        assert decoders.budget.peak_bytes <= decoders.budget.limit_bytes and decoders.budget.held_bytes == 0


def test_a_budget_is_used_wholly_by_whichever_episodes_there_are_and_never_exceeded(monkeypatch):
    """While the first episode stands still the others decode on, up to the budget, and then none does."""
    lengths, gate = [1500, 100, 384, 1500, 100, 1500, 384], threading.Event()
    wait = lambda number, frame: number > 0 or gate.wait(60)  # noqa: E731
    with make_decoders(monkeypatch, lengths, num_threads=4, budget_mib=20, on_read=wait) as decoders:
        budget, idle = decoders.budget, threading.Event()
        for _ in range(2000):
            if budget.held_bytes > budget.limit_bytes - 5 * BATCH_BYTES:
                break
            idle.wait(0.01)
        assert budget.held_bytes > budget.limit_bytes - 5 * BATCH_BYTES
        gate.set()
        assert read_all(decoders) == expected_of(lengths)
        assert budget.peak_bytes <= budget.limit_bytes and budget.held_bytes == 0


def test_a_budget_below_one_batch_holds_one_batch(monkeypatch):
    lengths = [100, 384, 7]
    with make_decoders(monkeypatch, lengths, num_threads=3, budget_mib=0, on_read=lambda *_: None) as decoders:
        assert read_all(decoders) == expected_of(lengths)
        assert decoders.budget.peak_bytes <= BATCH_BYTES + 400
