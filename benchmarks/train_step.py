"""The predictor's train step against the plain way of computing the same, paired in one process.

    python benchmarks/train_step.py                              # small, base (2 blocks), ac300m (1 block): 10 minutes alone on a core
    python benchmarks/train_step.py small --auto-steps 4
    python benchmarks/train_step.py small --window-steps 16 --repeats 3
    python benchmarks/train_step.py ac300m --blocks 24 --batch 8 --device cuda --dtypes bfloat16
    python benchmarks/train_step.py small --encoder vitg --variants ours
    python benchmarks/train_step.py ac300m --batch 8 --variants ours+checkpointing lora+checkpointing --dtypes bfloat16 --embed-dim 1408
    python benchmarks/train_step.py ac300m --grid 24 --variants ours+checkpointing --dtypes bfloat16   # V-JEPA 2.1 at 384 px

A train step is forward, backward and AdamW on random tokens: teacher forcing over T-1 steps and a rollout, L1, 16x16 patches a step unless
--grid says otherwise.
The plain way (benchmarks/reference_predictor.py) has a dense mask, rotary angles at every call, a rollout computed from scratch and AdamW
one tensor at a time. Both have the same weights; their losses are compared before anything is timed.

Variants alternate; the first turn is not counted. "gain" is the median over turns of plain / ours in the same turn, with its range.
Seconds are the process's CPU time on a CPU (other work on the machine then disturbs less), elapsed time on a GPU.
Useful work counts every matrix product that the result needs once: attention over the causal half only, no recomputation.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
import torch._dynamo  # noqa: E402 (activation checkpointing imports it, which would be counted as memory of the step)
from reference_predictor import ReferencePredictor, reference_loss  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from jepa_cache.config.loading import load_config  # noqa: E402
from jepa_cache.config.schema import EncoderPreset, PredictorPreset  # noqa: E402
from jepa_cache.encoder.vit import VisionTransformer  # noqa: E402
from jepa_cache.predictor.lora import add_lora  # noqa: E402
from jepa_cache.predictor.model import ACPredictor  # noqa: E402
from jepa_cache.training.losses import world_model_loss  # noqa: E402
from jepa_cache.training.optim import build_optimizer  # noqa: E402

ACTIONS = STATES = 7
BLOCKS = {"base": 2, "ac300m": 1}  # measured on a CPU; all blocks are alike
VARIANTS = ("plain", "ours", "lora", "plain+checkpointing", "ours+checkpointing", "lora+checkpointing")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PARTS = {
    "linear layers": ("aten::mm", "aten::addmm"),
    "attention": (
        "scaled_dot_product",
        "aten::bmm",
        "aten::baddbmm",
        "aten::_softmax",
        "_efficient_attention",
        "_flash_attention",
    ),
}


class Case(NamedTuple):
    """One size under one setting."""

    name: str
    preset: PredictorPreset
    blocks: int
    embed_dim: int
    window_steps: int
    auto_steps: int
    batch: int
    device: torch.device
    side: int  # of the grid of patches

    @property
    def num_tokens(self) -> int:
        """Patches of a step."""
        return self.side**2

    @property
    def length(self) -> int:
        """Tokens of a step with its action and state."""
        return self.num_tokens + 2


def build_step(case: Case, variant: str) -> Callable[[], float]:
    """Make a train step of one variant, such as `ours float32`, `plain bfloat16` or `lora+checkpointing bfloat16`; it returns its loss."""
    who, dtype = variant.split()
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "embed_dim": case.embed_dim,
        "predictor_dim": case.preset.predictor_dim,
        "depth": case.blocks,
        "num_heads": case.preset.num_heads,
        "action_dim": ACTIONS,
        "state_dim": STATES,
        "grid": (case.side, case.side),
    }
    who, _, checkpointing = who.partition("+")
    ours = ACPredictor(**sizes, activation_checkpointing=bool(checkpointing))
    shapes = ((case.num_tokens, case.embed_dim), (ACTIONS,), (STATES,))
    steps = (case.window_steps, case.window_steps - 1, case.window_steps)
    window = [torch.randn(case.batch, n, *shape).to(case.device) for n, shape in zip(steps, shapes, strict=True)]
    if who != "plain":
        if who == "lora":
            ours = add_lora(ours, rank=16, alpha=32.0, dropout=0.0, rslora=True)
        model = ours.to(case.device)
        optimizer: torch.optim.Optimizer = build_optimizer(model, lr=1e-4, weight_decay=0.04)
    else:
        model = ReferencePredictor(**sizes, max_steps=case.window_steps, activation_checkpointing=bool(checkpointing))
        model.load_state_dict(ours.state_dict())
        model = model.to(case.device)
        model.mask = model.mask.to(case.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.04)

    def step() -> float:
        with torch.autocast(case.device.type, DTYPES[dtype], enabled=dtype != "float32"):
            if who != "plain":
                loss = world_model_loss(model, *window, auto_steps=case.auto_steps).total
            else:
                loss = reference_loss(model, *window, case.auto_steps)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def seconds(device: torch.device) -> float:
    """Process CPU time, or elapsed time once the GPU has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that one call takes."""
    start = seconds(device)
    call()
    return seconds(device) - start


def take_turns(steps: dict[str, Callable[[], float]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every variant in every turn but the first."""
    turns: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            taken = timed(step, device)
            if turn:
                turns[name].append(taken)
    return turns


def useful_gflop(case: Case, blocks: int) -> float:
    """10^9 floating-point operations of the products that a train step needs: forward, and twice that backward."""
    width, hidden = case.preset.predictor_dim, int(case.preset.predictor_dim * case.preset.mlp_ratio)
    num_forced, num_fed = case.window_steps - 1, min(case.auto_steps, case.window_steps - 1) - 1
    num_tokens = (num_forced + num_fed) * case.length
    linear = (
        blocks * num_tokens * 2 * width * (4 * width + 2 * hidden)
        + (num_forced + num_fed) * case.num_tokens * 4 * case.embed_dim * width
    )
    prefixes = [*range(1, num_forced + 1), *range(2, num_fed + 2)]
    scores = case.length**2 * sum(prefixes)
    return 3 * case.batch * (linear + blocks * 4 * width * scores) / 1e9


def product_rate(dtype: torch.dtype, device: torch.device, size: int = 1536) -> float:
    """10^9 operations per second of a square matrix product, the best of several."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: a @ b, device) for _ in range(8)) / 1e9


def time_per_part(step: Callable[[], float], device: torch.device) -> dict[str, float]:
    """Share of the operators' own time by part; products inside the attention's backward pass count as attention."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as record:
        step()
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    shares: dict[str, float] = dict.fromkeys([*PARTS, "the rest"], 0.0)
    for event in record.key_averages():
        part = next(
            (p for p, names in PARTS.items() if any(n == event.key or (n[0] != "a" and n in event.key) for n in names)),
            "the rest",
        )
        shares[part] += getattr(event, key)
    total = sum(shares.values())
    return {part: share / total for part, share in shares.items()}


def peak_mib(case: Case, variant: str) -> float:
    """Memory that train steps take above a built model: of the GPU, or measured in a process of its own."""
    if case.device.type == "cuda":
        step = build_step(case, variant)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(), step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    arguments = [case.preset.name, "--blocks", case.blocks, "--batch", case.batch, "--window-steps", case.window_steps]
    arguments += [
        "--auto-steps",
        case.auto_steps,
        "--embed-dim",
        case.embed_dim,
        "--grid",
        case.side,
        "--peak-of",
        variant,
    ]
    command = [sys.executable, __file__, *map(str, arguments)]
    # Freed tensors go back to the system at once: else what malloc keeps of them is counted, twice the tensors at 8 windows.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
    return float(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


def own_peak_mib(case: Case, variant: str) -> float:
    """Growth of this process's memory over two train steps, gradients and optimiser state included."""
    step = build_step(case, variant)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: importing took more than is held now
    before = memory_mib("VmRSS")
    step(), step()
    return memory_mib("VmHWM") - before


def memory_mib(field: str) -> float:
    """One field of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def encoder_seconds_per_frame(preset: EncoderPreset, dtype: str, device: torch.device) -> float:
    """Seconds of one frame through an encoder of this size with meaningless weights: one block of it measured, the rest reckoned.

    Decoding and cropping the frame are not in it.
    """
    sizes = {
        "embed_dim": preset.embed_dim,
        "num_heads": preset.num_heads,
        "mlp_dim": preset.mlp_dim,
        "patch_size": preset.patch_size,
    }
    frames = torch.randn(4, 3, preset.tubelet_size, preset.resolution, preset.resolution, device=device)
    taken = []
    for depth in (1, 3):
        encoder = VisionTransformer(**sizes, depth=depth, tubelet_size=preset.tubelet_size).to(device)
        with torch.no_grad(), torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32"):
            taken.append(min(timed(lambda encoder=encoder: encoder(frames), device) for _ in range(4)) / len(frames))
    per_block = (taken[1] - taken[0]) / 2
    return taken[0] + (preset.depth - 1) * per_block


def encoder_gflop_per_frame(preset: EncoderPreset) -> float:
    """10^9 operations of one frame's forward pass."""
    n, dim = preset.num_tokens, preset.embed_dim
    block = 2 * n * dim * (4 * dim + 2 * preset.mlp_dim) + 4 * n * n * dim
    return (preset.depth * block + 2 * n * dim * 3 * preset.tubelet_size * preset.patch_size**2) / 1e9


def report(case: Case, options: argparse.Namespace) -> None:
    """Measure one size and print its lines."""
    print(
        f"\n{case.name}: {case.blocks} of {case.preset.depth} blocks {case.preset.predictor_dim} wide, batch {case.batch}, T={case.window_steps}, "
        f"auto_steps {case.auto_steps}, E={case.embed_dim}, {case.side} x {case.side} patches"
    )
    steps = {
        f"{name} {dtype}": build_step(case, f"{name} {dtype}") for dtype in options.dtypes for name in options.variants
    }
    losses = {name: step() for name, step in steps.items()}
    turns = take_turns(steps, options.repeats, case.device)
    for name, taken in turns.items():
        dtype = name.split()[1]
        rate, work = product_rate(DTYPES[dtype], case.device), useful_gflop(case, case.blocks)
        middle = statistics.median(taken)
        parts = ", ".join(f"{part} {share:.0%}" for part, share in time_per_part(steps[name], case.device).items())
        print(
            f"  {name:<15} {middle * 1e3:7.0f} ms [{min(taken) * 1e3:.0f}, {max(taken) * 1e3:.0f}]  loss {losses[name]:.6f}  peak {peak_mib(case, name):5.0f} MiB  "
            f"{work / middle:4.0f} of {rate:4.0f} GFLOP/s = {work / middle / rate:.0%}  ({parts})",
            flush=True,
        )
    for slow, fast in [(a, b) for b in turns for a in turns if a.startswith("plain") and b.startswith("ours")]:
        gains = [a / b for a, b in zip(turns[slow], turns[fast], strict=True)]
        print(f"  gain of {fast} over {slow}: {statistics.median(gains):.2f} [{min(gains):.2f}, {max(gains):.2f}]")
    if options.encoder:
        report_caching(
            case,
            options,
            {name.split()[1]: statistics.median(t) for name, t in turns.items() if name.startswith("ours")},
        )


def report_caching(case: Case, options: argparse.Namespace, ours: dict[str, float]) -> None:
    """Print what encoding every window again would cost beside this train step, measured and by arithmetic."""
    preset = load_config(ROOT, [f"encoder={options.encoder}"]).encoder
    for dtype, taken in ours.items():
        whole = taken * case.preset.depth / case.blocks
        online = case.batch * case.window_steps * encoder_seconds_per_frame(preset, dtype, case.device)
        work = useful_gflop(case, case.preset.depth)
        ceiling = 1 + case.batch * case.window_steps * encoder_gflop_per_frame(preset) / work
        print(
            f"  cached against online, {preset.name}, {dtype}: encoding the window {online:.2f} s + train step {whole:.2f} s against {whole:.2f} s: "
            f"{1 + online / whole:.2f}x; {ceiling:.2f}x by arithmetic alone"
        )


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=["small", "base", "ac300m"], help="presets of configs/predictor")
    parser.add_argument("--window-steps", type=int, default=8)
    parser.add_argument("--auto-steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--blocks", type=int, help="blocks to measure; all of small, 2 of base, 1 of ac300m")
    parser.add_argument("--embed-dim", type=int, help="E; the encoder's where one is named, else 1024")
    parser.add_argument("--grid", type=int, default=16, help="side of the grid of patches of a step")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--encoder", help="preset of configs/encoder: compare cached with online training")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["plain", "ours"])
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    encoder_dim = load_config(ROOT, [f"encoder={options.encoder}"]).encoder.embed_dim if options.encoder else 1024
    for name in options.sizes:
        preset = load_config(ROOT, [f"predictor={name}"]).predictor
        blocks = options.blocks or min(BLOCKS.get(name, preset.depth), preset.depth)
        case = Case(
            name,
            preset,
            blocks,
            options.embed_dim or encoder_dim,
            options.window_steps,
            options.auto_steps,
            options.batch,
            torch.device(options.device),
            options.grid,
        )
        if options.peak_of:
            print(own_peak_mib(case, options.peak_of))
            return
        report(case, options)


if __name__ == "__main__":
    main()
