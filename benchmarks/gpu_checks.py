"""What must hold on a GPU: checks C1 to C9 of benchmarks/gpu_check.py, which tests/gpu/test_checks.py runs under the marker `gpu`.

Each check is a function of a `Bench` that yields lines (name, what is promised, what was found, "ok" or "WRONG"). On a CPU all is tiny.
"""

import contextlib
import gc
import io
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.reference_predictor import ReferencePredictor, reference_loss
from jepa_cache.cli.stage import run_stage
from jepa_cache.config.loading import load_config
from jepa_cache.config.schema import Config
from jepa_cache.data.loader import TokenScales, dequantise
from jepa_cache.devices import repeatable
from jepa_cache.encoder.vit import VisionTransformer
from jepa_cache.encoding.run import encode_dataset
from jepa_cache.encoding.verification import compare_online
from jepa_cache.evaluation.planning import plan_run
from jepa_cache.evaluation.run import evaluate_run
from jepa_cache.media.tar import pack_folder
from jepa_cache.predictor.layers import block_causal_attention
from jepa_cache.predictor.lora import add_lora
from jepa_cache.predictor.model import ACPredictor
from jepa_cache.store import quantisation
from jepa_cache.store.root import CacheRoot
from jepa_cache.training import trainer
from jepa_cache.training.losses import Objective
from jepa_cache.training.optim import build_optimizer
from jepa_cache.training.trainer import TrainResult
from tests import caches, test_golden
from tests.makers import make_rows, make_video, to_jsonl
from tests.workspace import SUITE_SETTINGS

ROOT = Path(__file__).resolve().parents[1]
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
}
ENCODERS = {
    "ViT-L": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "mlp_dim": 4096},
    "ViT-g": {"embed_dim": 1408, "depth": 40, "num_heads": 22, "mlp_dim": 6144},
}


@dataclass(frozen=True)
class Bench:
    """Where it runs and how large; on a CPU everything is tiny."""

    device: torch.device
    folder: Path

    @property
    def tiny(self) -> bool:
        """Whether only the script is tried."""
        return self.device.type == "cpu"

    def size(self, real: Any, tiny: Any) -> Any:
        """One of two sizes."""
        return tiny if self.tiny else real


Part = Iterator[tuple[str, str, str, str]]  # name, predicted, measured, verdict


def holds(name: str, right: bool, measured: str = "", predicted: str = "") -> tuple[str, str, str, str]:
    """A line of a check."""
    return name, predicted, measured, "ok" if right else "WRONG"


def rate(
    name: str, measured: float, unit: str, predicted: float = 0.0, *, more: str = "", low: bool = True
) -> tuple[str, str, str, str]:
    """A line of a figure: `low` is better, or high; predicted for an H100 where it is not 0."""
    slower = predicted and (measured > 1.25 * predicted if low else measured < predicted / 1.25)
    shown = f"{measured:,.3g} {unit}" + (f" ({more})" if more else "")
    return (
        name,
        f"{predicted:,.4g} {unit}" if predicted else "",
        shown,
        ("slower" if slower else "ok") if predicted else "",
    )


def relative_error(got: Tensor, exact: Tensor) -> float:
    """L2 of the difference over that of what is right."""
    exact = exact.double().cpu()
    return float((got.double().cpu() - exact).norm() / exact.norm())


def seconds(call: Callable[[], object], device: torch.device, repeats: int = 10, *, warm: int = 2) -> float:
    """Median seconds of a call, the device's work included."""
    taken = []
    for turn in range(warm + repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if turn >= warm:
            taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def free() -> None:
    """Give unused memory of the GPU back, and begin to measure its peak anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    """What tensors took at most since `free`."""
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


def bits_differ(one: Tensor, other: Tensor) -> int:
    """How many numbers of two tensors are not the same."""
    return int((one != other).sum())


class TrainStep:
    """A predictor with optimiser and random windows [B, 8, N, E]."""

    def __init__(
        self,
        bench: Bench,
        name: str,
        batch: int,
        *,
        plain: bool = False,
        checkpointing: bool = False,
        compiled: str = "",
        lora: bool = False,
        embed_dim: int = 1408,
    ) -> None:
        preset = load_config(SUITE_SETTINGS, [f"predictor={name}"]).predictor
        side, steps, embed_dim = bench.size(16, 2), bench.size(8, 4), bench.size(embed_dim, 16)
        sizes = {
            "embed_dim": embed_dim,
            "predictor_dim": bench.size(preset.predictor_dim, 24),
            "depth": bench.size(preset.depth, 2),
        }
        sizes |= {"num_heads": bench.size(preset.num_heads, 2), "action_dim": 7, "state_dim": 7, "grid": (side, side)}
        torch.manual_seed(0)
        with bench.device:
            if plain:
                model: nn.Module = ReferencePredictor(**sizes, max_steps=steps, activation_checkpointing=checkpointing)
                model.mask = model.mask.to(bench.device)
            else:
                model = ACPredictor(**sizes, activation_checkpointing=checkpointing)
            self.window = [
                torch.randn(batch, n, *shape)
                for n, shape in ((steps, (side**2, embed_dim)), (steps - 1, (7,)), (steps, (7,)))
            ]
        if lora:
            model = add_lora(model, rank=16, alpha=32.0, dropout=0.0, rslora=True)
        self.model, self.plain, self.device = model.to(bench.device), plain, bench.device
        self.optimizer = build_optimizer(self.model, lr=1e-4, weight_decay=0.04)
        settings = {"loss_exp": 1.0, "auto_steps": 2, "normalize_reps": True, "rollout": "fixed"}
        self.objective = Objective(self.model, SimpleNamespace(**settings, precision="bfloat16"), bench.device)
        if compiled == "whole":
            nn.Module.compile(self.model)
        elif compiled:  # block by block
            self.model.compile(flex=compiled == "flex")

    def loss(self) -> Tensor:
        """The loss of the window, in the precision that is set."""
        if self.plain:
            return reference_loss(self.model, *self.window, 2)[0]
        return self.objective(*self.window).total

    def __call__(self) -> Tensor:
        """One training step; its loss, on the device."""
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def make_cache(bench: Bench, name: str, grid: int, width: int, *overrides: str) -> caches.Cache:
    """A made data set of eight episodes of grid x grid tokens."""
    caches.GRID, caches.WIDTH = (grid, grid), width
    return caches.make_cache(bench.folder / name, f"train.device={bench.device.type}", "train.loggers=[]", *overrides)


def run_training(
    bench: Bench, cache: caches.Cache, name: str, *overrides: str, predictor: str | None = None, fresh: bool = False
) -> TrainResult:
    """A training of its own folder of runs, quietly."""
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["JEPA_RUNS_HOME"] = str(bench.folder / name / "runs")
    config = caches.make_config(f"train.device={bench.device.type}", "train.loggers=[]", *overrides)
    if predictor is not None:
        config = replace(config, predictor=load_config(SUITE_SETTINGS, [f"predictor={predictor}"]).predictor)
    out = bench.folder / name / "out"
    with contextlib.redirect_stdout(io.StringIO()):
        return trainer.train(config, cache.dataset, cache.scaler, out / "run", base=out, fresh=fresh)


def run_apart(home: Path, *arguments: object, **env: object) -> str:
    """Run Python with arguments in a process of its own, below the folder `home`; returns what it printed."""
    home.mkdir(exist_ok=True)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path} | {name: str(value) for name, value in env.items()}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=env, cwd=home, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stdout[-1000:]}{done.stderr[-3000:]}"
    return done.stdout


def cut_off(bench: Bench, name: str, step: int) -> None:
    """Take the checkpoint of a training step away, as if the training had been killed before it."""
    (folder,) = (bench.folder / name / "runs").glob("*/checkpoints")
    shutil.rmtree(folder / f"step-{step:08d}")


def rows_of(result: TrainResult) -> list[dict[str, float]]:
    """The CSV of a training."""
    head, *lines = (result.run / "train.csv").read_text().split()
    return [{key: float(it) for key, it in zip(head.split(","), line.split(","), strict=True) if it} for line in lines]


def make_encoder(bench: Bench, name: str, depth: int | None = None) -> VisionTransformer:
    """A V-JEPA 2 encoder with random weights."""
    sizes = dict(bench.size(ENCODERS[name], {"embed_dim": 48, "depth": 2, "num_heads": 4, "mlp_dim": 96}))
    with bench.device:
        return (
            VisionTransformer(**sizes | ({"depth": depth} if depth else {}))
            .to(bench.device)
            .eval()
            .requires_grad_(False)
        )


def make_stage_one(
    bench: Bench, name: str, frames: list[int], *overrides: str, sizes: dict[str, int] | None = None
) -> tuple[Config, Path]:
    """Settings and a folder of tar shards: one recording of each number of frames, every frame sampled; equal numbers, equal recordings."""
    size, pairs = bench.size((360, 640), (48, 64)), bench.folder / name / "pairs"
    pairs.mkdir(parents=True)
    videos = {count: make_video(count, size=size, options={"g": "10", "preset": "ultrafast"}) for count in set(frames)}
    for number, count in enumerate(frames):
        (pairs / f"made-{number}.mp4").write_bytes(videos[count])
        (pairs / f"made-{number}.jsonl").write_bytes(to_jsonl(make_rows(count, number)))
    pack_folder(pairs, bench.folder / name / "tars")
    words = ("dataset=vpt", "encoder=tiny", "encode.fps=20", f"encode.device={bench.device.type}")
    config = load_config(SUITE_SETTINGS, [*words, *overrides])
    if sizes:
        config = replace(config, encoder=replace(config.encoder, name="made", **sizes))
    return config, bench.folder / name / "tars"


def attend_densely(q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
    """Attention over whole steps by a mask and plain products."""
    step_of_key = torch.arange(k.shape[2], device=k.device) // length
    step_of_query = step_of_key[-q.shape[2] :]
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    return scores.masked_fill(step_of_key > step_of_query[:, None], float("-inf")).softmax(-1) @ v


# --- checks ---------------------------------------------------------------------------------------------------------------


def golden_files(bench: Bench) -> Part:
    """C1: results of the reference implementation in float32, and gradients in bfloat16, compiled too: what `train.compile` waits for."""
    for name in ("encoder_square_2f", "predictor_t4_a7_s7", "predictor_t6_a13_s2"):
        golden = test_golden.Golden(test_golden.FOLDER / f"{name}.safetensors")
        given = {key: it.to(bench.device) for key, it in golden.group("in").items()}
        with torch.no_grad():
            if name.startswith("encoder"):
                got = test_golden.build_golden_encoder(golden).to(bench.device)(given["clip"])
            else:
                tokens = test_golden.by_step(given["tokens"], given["actions"].shape[1])
                got = (
                    test_golden.build_golden_predictor(golden)
                    .to(bench.device)(tokens, given["actions"], given["states"])
                    .tokens.flatten(1, 2)
                )
        worst = float((got.cpu() - golden.group("out")["tokens"]).abs().max())
        yield holds(f"{name}, float32", worst <= 1e-4, f"{worst:.1e}", "<= 1e-4")
    exact, plain, ours = (TrainStep(bench, "small", 2, plain=plain, embed_dim=256) for plain in (True, True, False))
    # Compiling takes a minute on a CPU, which has no backward pass of FlexAttention.
    ways = (
        {}
        if bench.tiny
        else {
            f"train.compile={way}": TrainStep(bench, "small", 2, embed_dim=256, compiled=way)
            for way in ("true", "flex")
        }
    )
    for step in (exact, plain, *ways.values()):
        step.model.load_state_dict(ours.model.state_dict())
        step.window = ours.window
    exact.model.double()
    exact.window = [it.double() for it in exact.window]
    with torch.autocast(bench.device.type, enabled=False):
        exact.loss().backward()
    right = {name: it.grad for name, it in exact.model.named_parameters() if it.grad is not None}
    errors = {}
    for name, step in {"plain": plain, "ours": ours, **ways}.items():
        with torch.autocast(bench.device.type, torch.bfloat16):
            loss = step.loss()
        loss.backward()
        grads = dict(step.model.named_parameters())
        got, expected = (
            torch.cat([it.flatten() for it in each]) for each in ([grads[name].grad for name in right], right.values())
        )
        errors[name] = relative_error(got, expected)
    allowed = errors.pop("plain")
    for name, error in errors.items():
        yield holds(
            f"bfloat16 gradients against float64, over the plain way's error: {name}",
            error <= 1.25 * allowed,
            f"{error:.3g} / {allowed:.3g}",
            "<= 1.25",
        )


def prefix_attention(bench: Bench) -> Part:
    """C2: attention over prefixes against a dense mask, outputs on memory that holds NaN."""
    length = bench.size(258, 6)
    for name, backend in BACKENDS.items():
        if bench.tiny and name != "flash":
            continue
        worst, where = 0.0, ""
        for heads, steps, past in [(heads, steps, 0) for heads in (4, 6, 12, 16) for steps in (1, 2, 5, 8)] + [
            (16, 1, 4),
            (16, 3, 5),
        ]:
            shape = (2, heads, steps * length, 64), (2, heads, (past + steps) * length, 64)
            q, k, v = (
                torch.randn(it, device=bench.device, dtype=torch.bfloat16) for it in (shape[0], shape[1], shape[1])
            )
            gradient = torch.randn_like(q)
            poison = torch.full((8, *k.shape), float("nan"), device=bench.device, dtype=torch.bfloat16)
            del poison
            got = [it.clone().requires_grad_() for it in (q, k, v)]
            with sdpa_kernel([backend], set_priority=True):
                out, _ = block_causal_attention(*got, tokens_per_step=length, num_past_steps=past)
                out.backward(gradient)
            exact = [it.float().requires_grad_() for it in (q, k, v)]
            dense = attend_densely(*exact, length)
            dense.backward(gradient.float())
            errors = [
                relative_error(out, dense),
                *(relative_error(a.grad, b.grad) for a, b in zip(got, exact, strict=True)),
            ]
            if not max(errors) <= worst:  # also of NaN
                worst, where = max(errors), f"{heads} heads, {steps} + {past} steps"
        yield holds(
            f"{name}: output, dQ, dK, dV, worst relative error", worst <= 0.01, f"{worst:.2g} at {where}", "<= 0.01"
        )


def equal_bits(bench: Bench) -> Part:
    """C3: the same training twice, and killed and resumed, with and without deterministic kernels; and what these cost."""
    cache = make_cache(bench, "c3", bench.size(16, 2), 64)
    size = None if bench.tiny else "small"
    words = SIX_STEPS
    for wanted in ("true", "false"):
        results = [
            run_training(bench, cache, f"c3-{wanted}-{turn}", *words, f"train.deterministic={wanted}", predictor=size)
            for turn in "ab"
        ]
        again = load_file(results[1].weights)
        cut_off(bench, f"c3-{wanted}-b", 6)
        resumed = run_training(bench, cache, f"c3-{wanted}-b", *words, f"train.deterministic={wanted}", predictor=size)
        whole, other = load_file(results[0].weights), load_file(resumed.weights)
        for what, weights in (("twice", again), ("resumed at step 3 of 6", other)):
            differ, promised = (
                sum(bits_differ(whole[name], weights[name]) for name in whole),
                wanted == "true" or bench.tiny,
            )
            text = f"{differ:,} of {sum(it.numel() for it in whole.values()):,} weights differ"
            yield (
                holds(f"deterministic {wanted}: {what}", not differ, text, "equal bits")
                if promised
                else (f"deterministic {wanted}: {what}", "", text, "")
            )
        assert resumed.num_trained == 3
    step = TrainStep(bench, "small", 8, embed_dim=1024)
    for wanted in (False, True):
        with repeatable(bench.device, wanted):
            yield rate(f"step of small, deterministic {str(wanted).lower()}", 1e3 * seconds(step, bench.device), "ms")


SIX_STEPS = (
    *("train.num_steps=6", "train.num_warmup=1", "train.num_anneal=1", "train.validate_every=0"),
    *("train.checkpoint_every=3", "train.keep_last=9", "train.precision=bfloat16"),
)


def compiled_bits(bench: Bench) -> Part:
    """C9: compiled trainings, killed and resumed by another process, which compiles anew; on a CPU nothing is compiled: that takes minutes."""
    make_cache(bench, "c9", bench.size(16, 2), 64)
    for way in ("true",) if bench.tiny else ("true", "flex"):
        home, results = bench.folder / f"c9-{way}", []
        words = [bench.folder / "c9", home, *SIX_STEPS, f"train.compile={way}", f"train.device={bench.device.type}"]
        words += ["train.deterministic=true", "train.loggers=[]", f"cache.root={bench.folder}/c9/cache"]
        for turn in "ab":
            env = {"JEPA_RUNS_HOME": home / "runs", "TORCHINDUCTOR_CACHE_DIR": home / turn}
            env |= bench.size({}, {"TORCH_COMPILE_DISABLE": 1})
            said = run_apart(home, "-m", "tests.training.process", *words, *bench.size(["predictor=small"], []), **env)
            assert ("resumes at training step 3 of 6" in said) == (turn == "b"), said
            results.append(load_file(home / "out/run/predictor.safetensors"))
            cut_off(bench, home.name, 6)
        whole, resumed = results
        differ = sum(bits_differ(whole[it], resumed[it]) for it in whole)
        text = f"{differ:,} of {sum(it.numel() for it in whole.values()):,} weights differ"
        yield holds(f"train.compile={way}: resumed at step 3 of 6", not differ, text, "equal bits")


def places_in_a_batch(bench: Bench) -> Part:
    """C4: whether a frame's bits depend on its batch; stage one against encoding again."""
    encoder, side, many = make_encoder(bench, "ViT-L", depth=bench.size(4, 2)), bench.size(256, 32), bench.size(64, 4)
    frames = torch.randn(many, 3, 2, side, side, device=bench.device)
    with torch.no_grad(), torch.autocast(bench.device.type, torch.bfloat16):
        alone = encoder(frames[:1])
        moved = [bits_differ(encoder(frames.roll(place, 0))[place], alone[0]) for place in range(many)]
        yield (
            "bits of a frame at every place of a batch of 64, against alone",
            "",
            f"at {sum(map(bool, moved))} of {many} places some differ",
            "",
        )
        whole = encoder(frames)
        for size in (1, 7, many - 1):
            differ = sum(bits_differ(a, b) for a, b in zip(whole[:size], encoder(frames[:size]), strict=True))
            yield f"numbers that differ in a batch of {size}", "", f"{differ:,}", ""
        others = torch.cat([frames[many // 2 :], torch.randn_like(frames[: many // 2])])  # new places and neighbours
        differ = bits_differ(encoder(others)[: many - many // 2], whole[many // 2 :])
        yield (
            "encode.fill_batches: numbers that differ among others in a full batch",
            "0",
            f"{differ:,}: {'leave it off' if differ else 'may be switched on'}",
            "",
        )
    filled = [] if differ else [("float16", "encode.fill_batches=true")]
    for dtype, *words in [("float16",), ("bfloat16",), ("int8",), *filled]:
        name = " ".join([dtype, *words])
        config, tars = make_stage_one(
            bench, f"c4-{name}", [40, 70], f"encode.dtype={dtype}", "encode.compute_dtype=bfloat16", *words
        )
        root = CacheRoot(bench.folder / f"c4-{name}/cache")
        with contextlib.redirect_stdout(io.StringIO()):
            manifest = encode_dataset(config, [str(tars)], base=bench.folder, root=root).manifest
            found = compare_online(manifest, config, [str(tars)], root, base=bench.folder, num_steps=32, seed=0)
        yield holds(
            f"stage one against encoding again, {name}",
            found.describe()["bit_equal"] and not found.wrong,
            f"{len(found.steps)} steps",
            "bit for bit",
        )


def codes_and_optimiser(bench: Bench) -> Part:
    """C5: stored codes as numpy decodes them, and AdamW as on a CPU."""
    steps = np.random.default_rng(0).standard_normal((16, 64, 128)).astype(np.float16)
    for name in ("int8", "float8_e4m3", "int4"):
        channels = quantisation.measure_channels([steps], 128)
        codes, scales = map(np.stack, zip(*(quantisation.encode(step, name, channels) for step in steps), strict=True))
        stored = torch.from_numpy(codes[None].view(np.uint8)).view(
            getattr(torch, quantisation.get_codec(name).torch_dtype)
        )
        rows = [torch.from_numpy(it[None]).to(bench.device) for it in (scales, channels.scales, channels.means)]
        got = dequantise(stored.to(bench.device), TokenScales(*rows, quantisation.get_codec(name))).cpu().numpy()
        right = np.stack(
            [quantisation.decode(code, name, scale, channels) for code, scale in zip(codes, scales, strict=True)]
        )
        yield holds(
            f"{name} decoded", np.array_equal(got[0], right), f"{int((got[0] != right).sum())} differ", "numpy's bits"
        )
    weights = []
    for device in (torch.device("cpu"), bench.device):
        torch.manual_seed(0)
        module = nn.Linear(256, 256).to(device)
        optimizer = build_optimizer(module, lr=1e-2, weight_decay=0.04)
        for turn in range(5):
            for parameter in module.parameters():
                wave = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) + turn)
                parameter.grad = wave.view(parameter.shape).float().to(device)
            optimizer.step()
        weights.append(module.weight.detach().cpu())
    yield holds(
        "AdamW after 5 steps against a CPU",
        torch.allclose(*weights, rtol=1e-5, atol=1e-7),
        f"{float((weights[0] - weights[1]).abs().max()):.1e}",
        "<= 1e-5",
    )


def whole_trainings(bench: Bench) -> Part:
    """C6: training in every precision, evaluation, plans, a signal, and checkpoints that go on on another device."""
    space = ("dataset=droid_raw", "encode.action_space=pose7")
    cache = make_cache(bench, "c6", 2, 8, *space)
    base = run_training(bench, cache, "c6-float32", *space)
    limit = rows_of(base)[-1]["total"]
    adapters = ("train.precision=bfloat16", f"train.init={base.weights}", "train.lora_rank=4", "train.lora_dropout=0.1")
    cases = {"bfloat16": ("train.precision=bfloat16",), "float16": ("train.precision=float16",), "LoRA": adapters}
    cases |= {name: (f"predictor={name}", "train.costs=[readout,time]") for name in ("compressed", "linear")}
    for name, words in cases.items():
        loss = rows_of(run_training(bench, cache, f"c6-{name}", *space, *words))[-1]["total"]
        yield holds(f"training, {name}", loss < 1.5 * limit, f"loss {loss:.3f}, float32 {limit:.3f}")
    quick = ("plan.num_samples=10", "plan.num_rounds=2", "plan.horizons=[1]", "plan.starts_per_episode=1")
    config = caches.make_config(f"train.device={bench.device.type}", "train.loggers=[]", *space, *quick)
    with caches.no_pictures(), contextlib.redirect_stdout(io.StringIO()):
        metrics = evaluate_run(config, cache.dataset, base.weights, bench.folder / "c6/evaluate")
        plan_run(config, cache.dataset, base.weights, bench.folder / "c6/plan")
    error = metrics["val"]["rollout_l1"]
    yield holds("evaluation and plans", np.isfinite(error), f"rollout L1 {error:.3f}")
    words = (*space, "train.device=auto", "train.checkpoint_every=6", "train.keep_every=6")
    whole = rows_of(run_training(bench, cache, "c6-moved", *words))[-1]["total"]
    for where, hidden in (("the CPU", True), ("this device", False)):
        cut_off(bench, "c6-moved", 12)
        with mock.patch.object(torch.cuda, "is_available", lambda: False) if hidden else contextlib.nullcontext():
            result = run_training(bench, cache, "c6-moved", *words)
        loss = rows_of(result)[-1]["total"]
        right = result.num_trained == 6 and abs(loss - whole) < 1e-2 * whole
        yield holds(f"gone on on {where} from training step 6", right, f"loss {loss:.4f}, undisturbed {whole:.4f}")
    step = trainer.train_step

    def signalled(*arguments: Any) -> Any:
        if arguments[-1] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    with mock.patch.object(trainer, "train_step", signalled):
        stopped = run_training(bench, cache, "c6-stopped", *space)
    right = (stopped.stopped_by, stopped.step) == ("SIGTERM", 3)
    yield holds("SIGTERM saves and stops", right, f"{stopped.stopped_by} at training step {stopped.step}")


def one_process_of_several(bench: Bench) -> Part:
    """C7: under torchrun, with what `accelerate config` may leave in the environment."""
    cache = make_cache(bench, "c7", 2, 8)
    expected = run_training(bench, cache, "c7-here", f"cache.root={bench.folder}/c7/cache")
    home = bench.folder / "c7-torchrun"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    words = ["-m", "tests.training.process", bench.folder / "c7", home, f"cache.root={bench.folder}/c7/cache"]
    words += [f"train.device={bench.device.type}", "train.loggers=[]"]
    hostile = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_BACKEND": "inductor"}
    run_apart(home, *launcher, *words, JEPA_RUNS_HOME=home / "runs", **hostile)
    losses = [[row["total"] for row in rows_of(expected)]]
    losses.append([row["total"] for row in rows_of(expected._replace(run=next((home / "runs").glob("*/"))))])
    yield holds(
        "under torchrun, ACCELERATE_MIXED_PRECISION=bf16 moves no loss",
        losses[0] == losses[1],
        f"{losses[1][-1]:.6f}",
        f"{losses[0][-1]:.6f}",
    )


def full_memory(bench: Bench) -> Part:
    """C8: out of memory on purpose."""

    def fill() -> None:
        if bench.tiny:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 PiB")
        torch.empty(2**50, dtype=torch.uint8, device=bench.device)

    try:
        run_stage(fill)
        text = ""
    except SystemExit as ended:
        text = str(ended.code)
    yield holds(
        "a full GPU names the settings",
        all(name in text for name in ("train.batch_size", "encode.batch_size", "evaluate.batch_size")),
        text.splitlines()[0] if text else "",
    )


CHECKS: dict[str, tuple[float, Callable[[Bench], Part]]] = {
    "C1": (90, golden_files),
    "C2": (30, prefix_attention),
    "C3": (40, equal_bits),
    "C4": (30, places_in_a_batch),
    "C5": (10, codes_and_optimiser),
    "C6": (50, whole_trainings),
    "C7": (50, one_process_of_several),
    "C8": (5, full_memory),
    "C9": (120, compiled_bits),
}
"""Seconds that each may take, and what it is."""
