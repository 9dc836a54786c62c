"""Frames per second of each reader with its decoder, against the decoder alone, on one thread.

    python benchmarks/sources.py                          # every source, on what lies in ../shared/data, else on made recordings
    python benchmarks/sources.py vpt=shards/vpt           # PRESET=INPUT, presets of configs/dataset
    python benchmarks/sources.py --long 3000              # memory and open files over so many readings of tiny recordings

"reader" is all that stage one does from the bytes on disk to frames and controls: the source, the packet counts, the decoding of
every frame in order, in batches of 32, one thread. "decoder" is the library that was used, called on the same bytes with nothing of
ours around it, and once per file where recordings share one. The two take turns, recording by recording, so that other work on the
machine hits both; the table holds medians of five passes. `ratio` is of CPU seconds, `wall` of elapsed ones: a shared machine
disturbs the second. In stage one the source works in a thread of its own, beside the decoders.
"""

import argparse
import gc
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402

from benchmarks.source_inputs import Case, default_cases, long_cases  # noqa: E402
from jepa_cache.config.loading import load_config  # noqa: E402
from jepa_cache.episode import Episode  # noqa: E402
from jepa_cache.media.images import FrameSequence, SideBySide  # noqa: E402
from jepa_cache.media.probe import _read_packets_of_file, as_file  # noqa: E402
from jepa_cache.media.video import open_video  # noqa: E402
from jepa_cache.sources import build_source  # noqa: E402

BATCH_FRAMES = 32
NUM_PASSES = 5


def named_cases(arguments: list[str]) -> list[Case]:
    """The cases of PRESET=INPUT arguments."""
    cases = []
    for argument in arguments:
        preset, equals, given = argument.partition("=")
        if not equals:
            raise SystemExit(f"arguments are PRESET=INPUT; got {argument!r}")
        dataset = load_config(ROOT, [f"dataset={preset}"]).dataset
        cases.append(Case(preset, dataset.source, dict(dataset.source_options), given))
    return cases


def decode_alone(video: object, decoder: str) -> int:
    """Decode all frames with the library itself; their number."""
    if isinstance(video, FrameSequence):
        import io

        from PIL import Image

        for picture in video.frames:
            np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
        return len(video.frames)
    container = video.video if isinstance(video, SideBySide) else video
    if decoder == "decord":
        import decord

        reader = decord.VideoReader(as_file(container), ctx=decord.cpu(0), num_threads=1)
        for first in range(0, len(reader), BATCH_FRAMES):
            reader.get_batch(range(first, min(first + BATCH_FRAMES, len(reader)))).asnumpy()
        return len(reader)
    import av

    num_frames = 0
    with av.open(as_file(container)) as opened:
        opened.streams.video[0].codec_context.thread_count = 1
        for frame in opened.decode(video=0):
            frame.to_ndarray(format="rgb24")
            num_frames += 1
    return num_frames


class Clock:
    """CPU and elapsed seconds of everything that ran through it, and the frames that came out."""

    def __init__(self) -> None:
        self.cpu_s = self.wall_s = 0.0
        self.num_frames = 0

    def run(self, work: Callable) -> object:
        """Run `work` on the clock."""
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        try:
            return work()
        finally:
            self.cpu_s += time.process_time() - cpu_s
            self.wall_s += time.perf_counter() - wall_s


def decode_episode(episode: Episode) -> tuple[str, str, int]:
    """Decode an episode as stage one does; decoder, picture size, and number of frames."""
    with open_video(episode.video, first_frame=episode.first_frame) as video:
        for first in range(0, len(episode.frame_ticks), BATCH_FRAMES):
            video.read(np.arange(first, min(first + BATCH_FRAMES, len(episode.frame_ticks))))
        info = video.info
        return video.decoder, f"{info.codec} {info.width}x{info.height}", len(episode.frame_ticks)


def run_pass(case: Case) -> tuple[Clock, Clock, str, int, int]:
    """One pass over all recordings: clocks of reader and decoder alone, what was decoded, recordings, skipped ones."""
    reader, alone = Clock(), Clock()
    _read_packets_of_file.cache_clear()  # A run reads each file once; what a pass before has seen must not help.
    source = build_source(case.source, case.options)
    units = reader.run(lambda: source.list_units([case.given], Path.cwd()))
    what, num_recordings, num_skipped = "", 0, 0
    for unit in units:
        recordings, shared = source.iter_episodes(unit), {}
        while (recording := reader.run(lambda: next(recordings, None))) is not None:  # noqa: B023
            if not isinstance(recording, Episode):
                num_skipped += 1
                continue
            decoder, size, num_frames = reader.run(lambda: decode_episode(recording))
            reader.num_frames += num_frames
            num_recordings += 1
            what = f"{decoder} {size}"
            if isinstance(recording.video, Path):
                shared[recording.video] = decoder  # That of the last recording in it.
            else:
                alone.num_frames += alone.run(lambda: decode_alone(recording.video, decoder))  # noqa: B023
        for path, decoder in shared.items():
            alone.num_frames += alone.run(lambda: decode_alone(path, decoder))  # noqa: B023
    return reader, alone, what, num_recordings, num_skipped


def measure(case: Case) -> str:
    """One line of the table."""
    passes = [run_pass(case) for _ in range(NUM_PASSES)]
    *_, what, num_recordings, num_skipped = passes[0]
    if not num_recordings:
        return f"{case.name:<18} no recording could be read ({num_skipped} skipped)"

    def median(rate: Callable) -> float:
        return statistics.median(rate(reader, alone) for reader, alone, *_ in passes)

    reader_hz = median(lambda reader, _: reader.num_frames / reader.cpu_s)
    alone_hz = median(lambda _, alone: alone.num_frames / alone.cpu_s)
    ratio = median(lambda r, a: (r.num_frames / r.cpu_s) / (a.num_frames / a.cpu_s))
    wall = median(lambda r, a: (r.num_frames / r.wall_s) / (a.num_frames / a.wall_s))
    return (
        f"{case.name:<18} {what:<24} {num_recordings:>10} {num_skipped:>8} {passes[0][0].num_frames:>8} {reader_hz:>10.0f} "
        f"{alone_hz:>10.0f} {ratio:>6.3f} {wall:>6.3f}"
    )


def iter_everything(case: Case, num_recordings: int) -> Iterator[int]:
    """Read and decode every recording, over and over; yields their running number up to `num_recordings`."""
    source = build_source(case.source, case.options)
    number = 0
    while True:
        for unit in source.list_units([case.given], Path.cwd()):
            for recording in source.iter_episodes(unit):
                if isinstance(recording, Episode):
                    with open_video(recording.video, first_frame=recording.first_frame) as video:
                        video.read(np.arange(len(recording.frame_ticks)))
                    number += 1
                    yield number
                    if number == num_recordings:
                        return


def watch(case: Case, num_recordings: int) -> str:
    """Resident memory and open files after a tenth, half and all of the recordings, and the peak."""
    samples, seen = [], 0
    marks = {max(1, num_recordings // 10), num_recordings // 2, num_recordings}
    for number in iter_everything(case, num_recordings):
        seen = number
        if number in marks:
            gc.collect()
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            samples.append((resident / 2**20, len(list(Path("/proc/self/fd").iterdir()))))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    texts = " ".join(f"{resident:>8.0f}/{files:<3}" for resident, files in samples)
    return f"{case.name:<18} {seen:>10} {texts} {peak:>9.0f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="PRESET=INPUT")
    parser.add_argument("--long", type=int, metavar="N", help="watch memory and open files over N recordings")
    parser.add_argument("--only", help="names of default cases that contain this")
    given = parser.parse_args()
    if given.long:
        print(
            f"{'source':<18} {'recordings':>10} MiB resident/open files after 1/10, 1/2, all; peak of the process so far"
        )
    else:
        print(
            f"{'source':<18} {'decoder':<24} {'recordings':>10} {'skipped':>8} {'frames':>8} {'reader /s':>10} "
            f"{'decoder /s':>10} {'ratio':>6} {'wall':>6}"
        )
    with tempfile.TemporaryDirectory() as folder:
        if given.cases:
            cases = named_cases(given.cases)
        else:
            only = given.only or ""
            cases = long_cases(Path(folder), only) if given.long else default_cases(Path(folder), only)
        for case in cases:
            try:
                print(watch(case, given.long) if given.long else measure(case), flush=True)
            except ValueError as error:
                print(f"{case.name:<18} {error}")


if __name__ == "__main__":
    main()
