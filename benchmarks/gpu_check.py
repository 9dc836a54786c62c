"""One command for a GPU: is everything right on it (C1 to C9), and how quick is it (B1 to B6)? 8 minutes; no network, no data.

    python benchmarks/gpu_check.py --out OUT             # writes OUT/gpu_check.json and OUT/gpu_check.md, a table for docs/benchmarks.md
    python benchmarks/gpu_check.py --only C1 B1
    python benchmarks/gpu_check.py --device cpu          # the same at tiny sizes, to try the script: its figures mean nothing

Every part has a time limit and stops no other; what no time is left for is skipped and said. Each line has what was predicted for an H100
from counted operators and bytes (docs/benchmarks.md), what was measured, and a verdict: `ok`, `WRONG` (a check that does not hold),
`slower` (than 1.25 times predicted), `error`, or none where nothing was predicted. Exit code 1 if anything is WRONG or an error.
Recordings, caches and weights are made here, at random. docs/benchmarks.md says what a bare machine needs.
"""

# ruff: noqa: B023 (functions that a loop makes are called within it)

import argparse
import contextlib
import io
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
os.environ["TQDM_DISABLE"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from benchmarks.gpu_checks import (  # noqa: E402
    CHECKS,
    ENCODERS,
    Bench,
    Part,
    TrainStep,
    free,
    make_cache,
    make_encoder,
    make_stage_one,
    peak_gib,
    rate,
    rows_of,
    run_training,
    seconds,
)
from jepa_cache.actions import get_action_space  # noqa: E402
from jepa_cache.control.motion import build_motion  # noqa: E402
from jepa_cache.control.planner import SETTINGS, Context, plan_actions  # noqa: E402
from jepa_cache.data.loader import WindowLoader  # noqa: E402
from jepa_cache.data.windows import WindowIndex, WindowSampler  # noqa: E402
from jepa_cache.devices import describe_machine, pin_attention, resolve_device  # noqa: E402
from jepa_cache.encoding.run import encode_dataset  # noqa: E402
from jepa_cache.predictor.layers import block_causal_attention  # noqa: E402
from jepa_cache.predictor.rollout import LatentModel  # noqa: E402
from jepa_cache.store.root import CacheRoot  # noqa: E402
from jepa_cache.training.checkpoint import BackgroundWriter, Checkpoint, save_checkpoint  # noqa: E402
from tests import caches  # noqa: E402

LIMIT_S = 480.0
GRACE_S = 60.0  # beyond a part's limit, for a kernel or a library that does not return
FLASH_FIRST = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Line(NamedTuple):
    """One line of the table."""

    part: str
    name: str
    predicted: str
    measured: str
    verdict: str


def profiled(step: Callable[[], object]) -> tuple[int, float]:
    """Kernels that a call launches, and the share of its time in which one runs."""
    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        begun = time.perf_counter()
        step()
        torch.cuda.synchronize()
        taken = time.perf_counter() - begun
    kernels = [event for event in record.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return len(kernels), sum(event.device_time_total for event in kernels) / 1e6 / taken


def environment(bench: Bench) -> Part:
    """E: the machine, and which attention kernel is taken."""
    side = bench.size(8192, 128)
    big, a, b = (torch.randn(side, side, device=bench.device) for _ in range(3))
    yield rate(
        "copy, read and written",
        2 * big.nbytes / seconds(lambda: big.clone(), bench.device) / 1e12,
        "TB/s",
        2.6,
        low=False,
    )
    a, b = a.bfloat16(), b.bfloat16()
    yield rate(
        f"bfloat16 product of {side}",
        2 * side**3 / seconds(lambda: a @ b, bench.device) / 1e12,
        "TFLOP/s",
        550,
        low=False,
    )
    length = bench.size(258, 6)
    for how, cudnn in (("as we set it", False), ("as torch would choose", True)):
        taken = set()
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        for steps in bench.size(range(1, 8), (1,)):
            q, k = (torch.randn(2, 16, n * length, 64, device=bench.device, dtype=torch.bfloat16) for n in (1, steps))
            with profile() as record:
                F.scaled_dot_product_attention(q, k, k)
            names = (event.key.partition("aten::_scaled_dot_product_")[2] for event in record.key_averages())
            taken |= {name for name in names if name}
        predicted = "cudnn_attention (Hopper)" if cudnn else "flash_attention"
        yield f"attention kernel, {how}", predicted, ", ".join(sorted(taken)), ""
    pin_attention()


def train_steps(bench: Bench) -> Part:
    """B1: the training step of `ac300m` at 8 windows of 8 x 256 tokens of 1408 numbers, and smaller ones."""
    cases: list[tuple[str, str, int, dict[str, Any], float, float]] = [
        ("ours", "ac300m", 8, {}, 147, 19.5),
        ("ours, checkpointing", "ac300m", 8, {"checkpointing": True}, 183, 5.8),
        ("ours, blocks compiled", "ac300m", 8, {"compiled": "blocks"}, 107, 0),
        ("ours, blocks compiled, FlexAttention", "ac300m", 8, {"compiled": "flex"}, 92, 0),
        ("plain, checkpointing (the released setting)", "ac300m", 8, {"plain": True, "checkpointing": True}, 295, 0),
        ("plain", "ac300m", 8, {"plain": True}, 237, 0),
        ("small", "small", 8, {"embed_dim": 1024}, 18, 2.1),
        ("small, blocks compiled", "small", 8, {"embed_dim": 1024, "compiled": "blocks"}, 6, 0),
        ("LoRA, 2 windows", "ac300m", 2, {"lora": True, "checkpointing": True}, 0, 1.7),
        ("LoRA, 16 windows", "ac300m", 16, {"lora": True, "checkpointing": True}, 0, 0),
        ("ours, compiled as a whole", "ac300m", 8, {"compiled": "whole"}, 107, 0),
    ]
    for name, size, batch, options, predicted_ms, predicted_gib in bench.size(
        cases, (cases[0], cases[8])
    ):  # compiling takes minutes on a CPU
        free()
        step = TrainStep(bench, size, bench.size(batch, 1), **options)
        taken = seconds(step, bench.device, bench.size(10, 1))
        held = f"{peak_gib():.1f} GiB" + (f" of {predicted_gib}" if predicted_gib else "")
        yield rate(f"{name}: step", 1e3 * taken, "ms", predicted_ms, more=held)
        if (name.startswith("ours, blocks") or name in ("ours", "small")) and not bench.tiny:
            launches, busy = profiled(step)
            yield rate(
                f"{name}: launches",
                launches,
                "",
                {"ours": 3593, "ours, blocks compiled": 2777, "ours, blocks compiled, FlexAttention": 2393}.get(
                    name, 0
                ),
                more=f"busy {busy:.0%}",
            )
        del step
    free()


def attention_alone(bench: Bench) -> Part:
    """B2: attention of one block of `ac300m`, 7 steps, forward and backward."""
    for name, length in (
        ("prefixes, flash", 258),
        ("prefixes, cuDNN", 258),
        ("dense mask", 258),
        ("FlexAttention", 258),
        ("prefixes of 256, flash", 256),
    ):
        if bench.tiny and "flash" not in name:
            continue
        length = bench.size(length, length // 43)
        shape = (8, 16, 7 * length, 64) if not bench.tiny else (1, 2, 7 * length, 8)
        q, k, v = (torch.randn(shape, device=bench.device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        order = [SDPBackend.CUDNN_ATTENTION] if "cuDNN" in name else FLASH_FIRST
        if name == "FlexAttention":
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention

            mask = create_block_mask(
                lambda b, h, row, column, n=length: row // n >= column // n,
                None,
                None,
                shape[2],
                shape[2],
                device=bench.device.type,
            )
            flex = torch.compile(flex_attention)
            forward = lambda: flex(q, k, v, block_mask=mask)  # noqa: E731
        elif name == "dense mask":
            step = torch.arange(shape[2], device=bench.device) // length
            mask = step[:, None] >= step
            forward = lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # noqa: E731
        else:
            forward = lambda: block_causal_attention(q, k, v, tokens_per_step=length)[0]  # noqa: E731
        with sdpa_kernel(order, set_priority=True):
            ahead = seconds(forward, bench.device)
            both = seconds(lambda: forward().sum().backward(), bench.device)
        yield f"{name}: forward, forward and backward", "", f"{1e3 * ahead:.2f}, {1e3 * both:.2f} ms", ""


def bare_encoder(bench: Bench) -> Part:
    """B3: frames a second of the encoder alone, bfloat16."""
    side, before = bench.size(256, 32), 0.0
    for name, predicted in (("ViT-L", (1540, 2600)), ("ViT-g", (550, 840))):
        free()
        encoder = make_encoder(bench, name)
        with torch.no_grad(), torch.autocast(bench.device.type, torch.bfloat16):
            for size in bench.size((8, 16, 32, 64, 128), (2,)):
                frames = torch.randn(size, 3, 2, side, side, device=bench.device)
                taken = seconds(lambda: encoder(frames), bench.device, 4)
                before = max(before, size / taken)
                yield rate(
                    f"{name}, batch {size}", size / taken, "frames/s", predicted[0] if size >= 64 else 0, low=False
                )
            if bench.tiny:
                continue
            frames = torch.randn(64, 3, 2, side, side, device=bench.device)
            encoder.bfloat16()
            yield rate(
                f"{name}, batch 64, weights in bfloat16",
                64 / seconds(lambda: encoder(frames), bench.device, 4),
                "frames/s",
                low=False,
            )
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                encoder(frames)
            yield rate(
                f"{name}, batch 64, CUDA graph", 64 / seconds(graph.replay, bench.device, 4), "frames/s", low=False
            )
            encoder.compile()
            yield rate(
                f"{name}, batch 64, blocks compiled",
                64 / seconds(lambda: encoder(frames), bench.device, 4),
                "frames/s",
                predicted[1],
                low=False,
            )
            del graph
    if not bench.tiny:
        there = torch.empty(50 * 2**20, dtype=torch.uint8, device=bench.device)
        for pinned in (False, True):
            here = torch.empty(there.shape, dtype=torch.uint8, pin_memory=pinned)
            up, down = (
                1e3 * seconds(lambda a=a, b=b: a.copy_(b, non_blocking=True), bench.device)
                for a, b in ((there, here), (here, there))
            )
            yield (
                f"50 MiB to the GPU, and back, {'page-locked' if pinned else 'ordinary'} memory",
                "",
                f"{up:.1f}, {down:.1f} ms",
                "",
            )


def stage_one(bench: Bench) -> Part:
    """B4: decoding, ViT-L and writing together, from made 640x360 videos in which every frame is sampled; and writing alone."""
    sizes = bench.size({**ENCODERS["ViT-L"], "resolution": 256}, None)
    # A thread decodes one episode; and the first compiled run compiles.
    short, long = ((2, False), (8, False), (14, False), (14, True)), ((8, False), (8, True))
    for frames, ways in bench.size((([100] * 28, short), ([1500] * 8, long)), (([20] * 2, short[:1]),)):
        words = ("encode.compute_dtype=bfloat16", "encode.batch_size=64")
        config, tars = make_stage_one(bench, f"b4-{len(frames)}", frames, *words, sizes=sizes)
        for threads, compiled in ways:
            config = replace(config, encode=replace(config.encode, num_decoders=threads, compile=compiled))
            root = CacheRoot(bench.folder / f"b4-{len(frames)}/cache-{threads}")
            with contextlib.redirect_stdout(io.StringIO()):
                timing = encode_dataset(config, [str(tars)], base=bench.folder, root=root).timing
            name, quick = (
                f"{len(frames)} episodes of {frames[0]} frames, {threads} decoders"
                + (", compiled" if compiled else ""),
                timing.num_frames / timing.elapsed_s,
            )
            yield rate(name, quick, "frames/s", more=f"limit: {timing.limit}")
            shutil.rmtree(root.path)
    caches.GRID, caches.WIDTH = bench.size(((16, 16), 1024), ((2, 2), 8))
    shape = (bench.size(512, 16), caches.GRID[0] ** 2, caches.WIDTH)
    tokens, rest = (
        np.random.default_rng(0).standard_normal(shape, np.float32).astype(np.float16),
        np.zeros((shape[0], 2)),
    )
    begun, root = time.perf_counter(), CacheRoot(bench.folder / "b4/cache")
    caches._write_unit(root, {"dtype": "float16"}, {}, "0" * 64, ["made"], [tokens], [rest], [rest])
    taken = time.perf_counter() - begun
    yield rate("writing alone, 256 x 1024 float16", shape[0] / taken, "steps/s", 1500, low=False)


def trainings(bench: Bench) -> Part:
    """B5: whole trainings from a made cache of 256 x 1024 tokens, the loader alone, and what a checkpoint delays."""
    cache = make_cache(bench, "b5", *bench.size((16, 1024), (2, 8)))
    for name in ("small", "ac300m"):
        steps = bench.size(60 if name == "small" else 30, 4)
        words = (
            f"train.num_steps={steps}",
            "train.num_warmup=1",
            "train.num_anneal=1",
            "train.validate_every=0",
            "train.log_every=10" if not bench.tiny else "train.log_every=2",
            "train.checkpoint_every=100000",
        )
        words += (
            "train.window_steps=8",
            "train.batch_size=8",
            "train.precision=bfloat16",
            "train.deterministic=false",
            "train.num_loader_threads=2",
        )
        rows = rows_of(run_training(bench, cache, f"b5-{name}", *words, predictor=None if bench.tiny else name))[1:]
        middle = lambda key, rows=rows: statistics.median(row.get(key, 0.0) for row in rows)  # noqa: E731
        yield rate(
            f"training of {name}, 8 windows",
            middle("samples_per_s"),
            "windows/s",
            more=f"loader wait {middle('loader_wait_share'):.1%}, copy wait {middle('copy_wait_share'):.1%}",
        )
    index = WindowIndex(cache.dataset.segments_of("train", cache.config.split), 8)
    for threads in (1, 2, 4):
        sampler, count, num_bytes = WindowSampler(len(index), 8, seed=0), 0, 0
        loader = WindowLoader(cache.dataset, index, cache.scaler, num_threads=threads)
        begun, limit = time.perf_counter(), bench.size(2.0, 0.2)
        for batch in loader.iterate(map(sampler.numbers, range(10**6))):
            count, num_bytes = count + 1, num_bytes + batch.tokens.nbytes
            if time.perf_counter() - begun > limit:
                break
        yield rate(
            f"loader alone, {threads} threads, from the page cache",
            num_bytes / (time.perf_counter() - begun) / 1e9,
            "GB/s",
        )
    step = TrainStep(bench, "ac300m", 1)
    step()
    folder = bench.folder / "b5/checkpoints"
    folder.mkdir()
    with contextlib.closing(BackgroundWriter(lambda it: save_checkpoint(folder, it))) as writer:
        if not bench.tiny:
            writer.make_room(
                step.model.state_dict(), step.optimizer.state_dict()
            )  # as a training does after its first step
            writer.join()
        for number in (1, 2):
            if not bench.tiny:
                torch.cuda.synchronize()
            begun = time.perf_counter()
            writer.save(Checkpoint(number, step.model.state_dict(), step.optimizer.state_dict(), {}, 1))
            step()
            if not bench.tiny:
                torch.cuda.synchronize()
            stalled = time.perf_counter() - begun
            writer.join()
            whole = time.perf_counter() - begun
            stalled -= seconds(step, bench.device, 3, warm=0)
            yield rate(
                f"checkpoint of ac300m, the {'first' if number == 1 else 'next'}: a step is delayed by",
                stalled,
                "s",
                0.3,
                more=f"written in {whole:.1f} s",
            )
    free()


def evaluation_and_plans(bench: Bench) -> Part:
    """B6: evaluating 32 windows, and seconds of one planned action."""
    free()
    step = TrainStep(bench, "ac300m", bench.size(32, 2))
    model, (tokens, actions, states) = LatentModel(step.model.eval()), step.window
    del step.optimizer

    @torch.no_grad()
    def evaluate() -> None:
        horizon = actions.shape[1] - 2
        model.both_ways(model.as_reps(tokens), actions, states, num_forced=3, num_context=3, horizon=horizon)

    taken = seconds(evaluate, bench.device, 1, warm=1)
    yield rate("evaluating 32 windows, float32", taken, "s", more=f"{peak_gib():.1f} GiB of 6.0")
    free()
    motion = build_motion(get_action_space("pose7"))
    context = Context(model.as_reps(tokens[0, :1]), np.zeros((0, 7)), np.zeros((1, 7)))
    for name in ("notebook", "paper"):
        settings = replace(SETTINGS[name], num_rounds=1, **({"num_samples": 8, "num_elites": 4} if bench.tiny else {}))
        free()
        taken = seconds(
            lambda s=settings: plan_actions(model, context, model.as_reps(tokens[0, 1:2])[0], motion, s),
            bench.device,
            1,
            warm=1,
        )
        whole = taken * SETTINGS[name].num_rounds
        yield rate(
            f"plan, settings {name}",
            whole,
            "s",
            16 if name == "paper" else 0,
            more=f"{peak_gib():.1f} GiB; {SETTINGS[name].num_rounds} rounds, one was timed",
        )


PARTS: dict[str, tuple[float, Callable[[Bench], Part]]] = {
    "E": (20, environment),
    **{name: check for name, check in CHECKS.items() if name != "C9"},
    "B1": (110, train_steps),
    "B3": (60, bare_encoder),
    "B4": (70, stage_one),
    "B5": (50, trainings),
    "B2": (25, attention_alone),
    "B6": (30, evaluation_and_plans),
    "C9": CHECKS["C9"],  # compiles longest
}


class OutOfTimeError(BaseException):
    """A part's limit has passed; no Exception, which torch's compiler would take for one of its own."""


def run_part(name: str, bench: Bench, lines: list[Line]) -> None:
    """Run one part within its limit; whatever it raises is a line, and those before it stay."""
    limit, part = PARTS[name]

    def stop(*_: object) -> None:
        raise OutOfTimeError(f"stopped after its {limit:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    begun = time.perf_counter()
    try:
        for line in part(bench):
            if bench.tiny and name[0] in "EB":
                line = (line[0], "", line[2], "")
            lines.append(Line(name, *line))
            show(lines[-1])
    except (Exception, OutOfTimeError) as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        stopped = isinstance(error, OutOfTimeError)
        lines.append(
            Line(
                name,
                "the rest" if stopped else "stopped",
                "",
                f"{type(error).__name__}: {error}".splitlines()[0][:200],
                "no time" if stopped else "error",
            )
        )
        show(lines[-1])
        if not stopped:
            traceback.print_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    print(f"{name} took {time.perf_counter() - begun:.0f} s", flush=True)
    free()


def show(line: Line) -> None:
    """Print one line."""
    print(f"{line.part:<3} {line.name:<70} {line.predicted:<16} {line.measured:<40} {line.verdict}", flush=True)


def write(out: Path, machine: dict[str, Any], lines: list[Line]) -> None:
    """Write gpu_check.json and gpu_check.md."""
    (out / "gpu_check.json").write_text(
        json.dumps({"machine": machine, "lines": [line._asdict() for line in lines]}, indent=2) + "\n"
    )
    cells = [" | ".join(str(cell).replace("|", "/") for cell in line) for line in lines]
    about = ", ".join(f"{name} {value}" for name, value in machine.items())
    head = f"{about}\n\n| part | what | predicted (H100) | measured | verdict |\n|---|---|---|---|---|\n"
    (out / "gpu_check.md").write_text(head + "".join(f"| {row} |\n" for row in cells))


def main(argv: list[str] | None = None) -> int:
    """Run what the command line names; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path, default=Path(), help="folder of gpu_check.json and gpu_check.md")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args(argv)
    device = torch.device(resolve_device("--device", options.device))
    options.out.mkdir(parents=True, exist_ok=True)
    machine = describe_machine(device) | {"cuda": torch.version.cuda, "cores": os.cpu_count()}
    if device.type == "cuda":
        machine |= {
            "cudnn": torch.backends.cudnn.version(),
            "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30),
        }
    print(machine, flush=True)
    lines: list[Line] = []
    begun, deadline = time.monotonic(), [0.0]

    def watch() -> None:
        while True:
            time.sleep(1)
            if time.monotonic() > deadline[0]:
                lines.append(Line("", "the program hung", "", "and was ended", "error"))
                write(options.out, machine, lines)
                os._exit(3)

    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_STATE_HOME"] = f"{folder}/state"
        for name in options.only:
            left = LIMIT_S - (time.monotonic() - begun)
            if left < 0.6 * PARTS[name][0]:
                lines.append(Line(name, "all of it", "", f"{left:.0f} s were left", "no time"))
                continue
            deadline[0] = time.monotonic() + PARTS[name][0] + GRACE_S
            if name == options.only[0]:
                threading.Thread(target=watch, daemon=True).start()
            run_part(name, Bench(device, Path(folder)), lines)
            write(options.out, machine, lines)
        deadline[0] = float("inf")
    write(options.out, machine, lines)
    print((options.out / "gpu_check.md").read_text())
    return int(any(line.verdict in ("WRONG", "error") for line in lines))


if __name__ == "__main__":
    sys.exit(main())
