"""Stage one's rate against its limits: the bare encoder on the same batches, and the decoder alone on the same frames.

    python benchmarks/encode.py                        # tiny (decoding is the limit) and vits (the encoder is)
    python benchmarks/encode.py vitb vitl --frames 24
    python benchmarks/encode.py tiny --recording FOLDER  # mp4 + jsonl pairs of your own

In every round, one after the other: stage one as a whole into an empty root (read, decode, encode, write, check, publish; the
disk's fsync included), the decoder alone on the same frames with as many threads (decord by its own batch call, else as stage one
reads), and the bare encoder on batches of the same sizes. Rates are in sampled frames a second by the clock; a ratio is the median
over the rounds, so that a busy machine hits both. "by CPU" compares the processor time of the decoder alone with all that stage one
takes. "cores" is what stage one used: where that is all there are, more decoder threads would be no quicker. vits, vitb and vitl
have random weights, for measuring only.
"""

import argparse
import contextlib
import io
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TQDM_DISABLE"] = "1"

import numpy as np  # noqa: E402

from jepa_cache.config.loading import load_config  # noqa: E402
from jepa_cache.config.schema import Config  # noqa: E402
from jepa_cache.encoding.steps import plan_episode  # noqa: E402
from jepa_cache.episode import Episode  # noqa: E402
from jepa_cache.media.probe import as_file  # noqa: E402
from jepa_cache.media.tar import pack_folder  # noqa: E402
from jepa_cache.media.video import open_video  # noqa: E402
from jepa_cache.sources import build_source  # noqa: E402
from jepa_cache.store.root import CacheRoot  # noqa: E402
from tests.makers import REAL_VPT, make_vpt_pair  # noqa: E402

# Width, depth, heads and width of the MLP of the usual small sizes, which have no released AC features.
SIZES = {"vits": (384, 12, 6, 1536), "vitb": (768, 12, 12, 3072), "vitl": (1024, 24, 16, 4096)}
BATCH_FRAMES = 8  # of the decoder alone: a tenth quicker than 64
NUM_FRAMES = {"tiny": 1200, "vits": 160, "vitb": 64, "vitl": 24}


def encoder_config(name: str, num_decoders: int) -> Config:
    """Settings of VPT recordings with one encoder, on the CPU in float32, random weights."""
    overrides = ["dataset=vpt", "encoder=tiny", "encode.device=cpu", f"encode.num_decoders={num_decoders}"]
    config = load_config(ROOT, overrides)
    if name not in SIZES:
        return config
    embed_dim, depth, num_heads, mlp_dim = SIZES[name]
    sizes = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, "mlp_dim": mlp_dim, "resolution": 256}
    encode = replace(config.encode, batch_size=8)
    return replace(config, encoder=replace(config.encoder, name=name, **sizes), encode=encode)


def make_recordings(folder: Path, config: Config, num_frames: int, given: Path | None) -> Path:
    """One tar shard with about so many sampled frames: real recordings where there are any, else a made one."""
    stride = round(20 / config.encode.fps)
    pairs = folder / "pairs"
    pairs.mkdir()
    real = sorted((given or REAL_VPT).glob("*.mp4"))
    if not real:
        (folder / "made.mp4").write_bytes((made := make_vpt_pair(400, size=(360, 640)))[0])
        (folder / "made.jsonl").write_bytes(made[1])
        real = [folder / "made.mp4"]
    source, total, copy = build_source(config.dataset.source, dict(config.dataset.source_options)), 0, 0
    per_round = sum(frames_of(source, path, folder / f"count-{path.stem}") for path in real) // stride
    while total < num_frames:
        for path in real:
            for suffix in (".mp4", ".jsonl"):
                shutil.copy(path.with_suffix(suffix), pairs / f"{copy:03}-{path.stem}{suffix}")
        total, copy = total + per_round, copy + 1
    pack_folder(pairs, folder / "tars")
    return folder / "tars"


def frames_of(source: object, path: Path, folder: Path) -> int:
    """Usable frames of one recording."""
    folder.mkdir()
    for suffix in (".mp4", ".jsonl"):
        shutil.copy(path.with_suffix(suffix), folder)
    pack_folder(folder, folder / "tars")
    return sum(len(episode.frame_ticks) for episode in read_episodes(source, folder / "tars"))


def read_episodes(source: object, tars: Path) -> list[Episode]:
    """Every usable recording."""
    units = source.list_units([str(tars)], tars)
    return [episode for unit in units for episode in source.iter_episodes(unit) if isinstance(episode, Episode)]


def decode(episode: Episode, config: Config, keep: bool) -> list[np.ndarray]:
    """Decode the sampled frames of one recording in batches, by the decoder's own means."""
    encode, batches = config.encode, []
    tubelet_size = config.encoder.tubelet_size
    plan = plan_episode(len(episode.frame_ticks), episode.fps, encode, tubelet_size=tubelet_size, phase=0)
    with open_video(episode.video, encode.decoder, first_frame=episode.first_frame) as video:
        frames = plan.inputs.reshape(-1)
        read = video.read
        if video.decoder == "decord":
            import decord

            reader = decord.VideoReader(as_file(episode.video), ctx=decord.cpu(0), num_threads=1)
            read = lambda indices: reader.get_batch(indices).asnumpy()  # noqa: E731
        for start in range(0, len(frames), BATCH_FRAMES):
            batch = read(frames[start : start + BATCH_FRAMES])
            batches += [batch] if keep else []
    return batches


def run_case(name: str, num_decoders: int, num_frames: int, num_rounds: int, given: Path | None, folder: Path) -> str:
    """One line of the table."""
    from jepa_cache.encoder.frozen import FrozenEncoder, load_module
    from jepa_cache.encoding.run import encode_dataset

    config = encoder_config(name, num_decoders)
    tars = make_recordings(folder, config, num_frames, given)
    episodes = read_episodes(build_source(config.dataset.source, dict(config.dataset.source_options)), tars)
    encoder = FrozenEncoder(config.encoder, load_module(config.encoder, None), device="cpu", compute_dtype="float32")
    # The encoder's speed does not depend on the pixels, so a few batches stand for all.
    sizes = [(-(-len(episode.frame_ticks) // round(episode.fps / config.encode.fps))) for episode in episodes]
    pixels = encoder.preprocess(np.concatenate(decode(episodes[0], config, True))[: config.encode.batch_size])
    batches = [
        min(config.encode.batch_size, size - start)
        for size in sizes
        for start in range(0, size, config.encode.batch_size)
    ]
    rates: dict[str, list[float]] = {"stage one": [], "decoder": [], "encoder": []}
    limits, cores, by_cpu, total = [], [], [], sum(batches)
    for number in range(num_rounds + 1):  # the first warms up
        begun = time.process_time()
        with contextlib.redirect_stdout(io.StringIO()):
            timing = encode_dataset(config, [str(tars)], base=folder, root=CacheRoot(folder / "cache")).timing
        assert timing.num_frames == total, (timing.num_frames, total)
        cpu_s = time.process_time() - begun
        shutil.rmtree(folder / "cache")
        begun, begun_cpu = time.perf_counter(), time.process_time()
        with ThreadPoolExecutor(config.encode.num_decoders) as pool:
            list(pool.map(lambda episode: decode(episode, config, False), episodes))
        decode_s, decode_cpu_s = time.perf_counter() - begun, time.process_time() - begun_cpu
        begun = time.perf_counter()
        for size in batches:
            encoder.encode(pixels[:size, None])
        encode_s = time.perf_counter() - begun
        if number:
            for key, seconds in (("stage one", timing.elapsed_s), ("decoder", decode_s), ("encoder", encode_s)):
                rates[key].append(total / seconds)
            limits.append(timing.limit)
            cores.append(cpu_s / timing.elapsed_s)
            by_cpu.append(decode_cpu_s / cpu_s)
    stage, decoder, bare = (np.array(rates[key]) for key in rates)
    limit = max(set(limits), key=limits.count)
    columns = [
        f"{name:<6} {num_decoders:>8} {total:>7} {np.median(cores):>6.1f}",
        *(f"{np.median(rate):>10.1f}" for rate in (stage, decoder, bare)),
    ]
    for ratio in (stage / decoder, np.array(by_cpu), stage / bare):
        low, middle, high = np.percentile(ratio, [25, 50, 75])
        columns.append(f"{middle:>8.1%} [{low:.1%}, {high:.1%}]")
    return " ".join([*columns, f" {limit}"])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("encoders", nargs="*", default=["tiny", "vits"], help=f"tiny, {', '.join(SIZES)}")
    parser.add_argument("--decoders", type=int, nargs="+", help="threads; default 2, and 1 with tiny")
    parser.add_argument("--frames", type=int, default=0, help="sampled frames at least; 0: by the encoder's size")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--recording", type=Path, help="folder of mp4 + jsonl pairs")
    arguments = parser.parse_args()
    unknown = set(arguments.encoders) - {"tiny", *SIZES}
    if unknown:
        parser.error(f"unknown encoders {sorted(unknown)}; known: tiny, {', '.join(SIZES)}")
    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {arguments.rounds} rounds; frames/s, medians; quartiles of the ratios"
    )
    print(
        f"{'':<6} {'decoders':>8} {'frames':>7} {'cores':>6} {'stage one':>10} {'decoder':>10} {'encoder':>10} {'of the decoder':>24} {'by CPU':>24} "
        f"{'of the encoder':>24}  the summary's limit"
    )
    for name in arguments.encoders:
        for num_decoders in arguments.decoders or ([1, 2] if name == "tiny" else [2]):
            with tempfile.TemporaryDirectory() as folder:
                os.environ["XDG_STATE_HOME"] = f"{folder}/state"
                frames = arguments.frames or NUM_FRAMES[name]
                case = name, num_decoders, frames, arguments.rounds, arguments.recording, Path(folder)
                print(run_case(*case), flush=True)


if __name__ == "__main__":
    main()
