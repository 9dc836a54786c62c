"""`jepa-cache doctor`: what this machine has and lacks: GPU, decoders, cache root, simulated robot; `pip check` tells of libraries."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jepa_cache.cli.outcome import AsJson, Outcome, report
from jepa_cache.config.loading import data_base, find_repository, load_config
from jepa_cache.files import existing_folder
from jepa_cache.media.video import open_video
from jepa_cache.sample.robot import find_assets, import_mujoco
from jepa_cache.store.remote import resolve_cache_root

OK, NOTE, MISSING = "ok", "note", "missing"
MIN_FREE_BYTES, LOW_FREE_BYTES = 1 << 30, 50 << 30  # ViT-L tokens of one hour at 5 steps/s take 9 GiB.


class Finding(NamedTuple):
    """What a check found: `state` is "ok", "note" (works without it) or "missing"; `todo` says what to type."""

    state: str
    found: str
    todo: str = ""


def doctor(*, as_json: AsJson = False) -> None:
    """Say whether this machine is ready, and what to type where it is not; exit code 1 when something is missing."""
    report(lambda: _examine(find_repository(Path.cwd(), read_only=True)), as_json=as_json)


def _examine(root: Path) -> Outcome:
    findings, lines = check_everything(root), list[str]()
    for name, (state, found, todo) in findings.items():
        lines += [f"{name:<18}{state:<9}{found}", *[f"{'':<27}-> {todo}"] * bool(todo)]
    states = [finding.state for finding in findings.values()]
    ready = MISSING not in states
    told = f"{states.count(MISSING)} missing, {states.count(NOTE)} to know; settings of {root}"
    shown = [{"name": name, **finding._asdict()} for name, finding in findings.items()]
    return Outcome({"ready": ready, "findings": shown}, [*lines, f"{'' if ready else 'not '}ready: {told}"], ready)


def check_everything(root: Path) -> dict[str, Finding]:
    """Run every check; one that itself fails is a finding too, so that the table is always whole."""
    checks: dict[str, Callable[[], Finding]] = {
        "gpu": check_gpu,
        "decoder": check_decoders,
        "cache root": lambda: check_disk(root),
        "simulated robot": lambda: check_robot(needed=load_config(root).dataset.has_simulator),
    }
    findings = {}
    for name, check in checks.items():
        try:
            findings[name] = check()
        except Exception as error:  # The table must name it, whatever it is.
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]
            findings[name] = Finding(MISSING, reason, "mend what the line names, or report it")
    return findings


def check_gpu() -> Finding:
    """Whether torch sees a CUDA device; everything works without one, slowly."""
    import torch

    from jepa_cache.devices import has_bfloat16

    if not torch.cuda.is_available():
        found = f"torch {torch.__version__} sees no CUDA device; the CPU works, tens of times slower"
        todo = "nvidia-smi; if it lists a GPU, install a CUDA build of torch: https://pytorch.org/get-started/locally"
        return Finding(NOTE, found, todo)
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    names = [f"{device.name} ({device.total_memory / 2**30:.0f} GiB)" for device in devices]
    found = f"{', '.join(names)}; CUDA {torch.version.cuda}"
    if not has_bfloat16():
        return Finding(
            NOTE, f"{found}; it only imitates bfloat16", "set encode.compute_dtype and train.precision to float16"
        )
    return Finding(OK, found)


def check_decoders() -> Finding:
    """Encode a tiny clip, which every build of FFmpeg can, and decode it with each decoder: one must work."""
    import av

    buffer, working, faults = io.BytesIO(), [], []
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("mpeg4", rate=20)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(8):  # each brighter than the one before
            image = np.full((48, 64, 3), 30 * index, np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        output.mux(stream.encode(None))
    for decoder in ("pyav", "decord"):
        try:
            with open_video(buffer.getvalue(), decoder) as video:
                frames = video.read(np.arange(video.info.num_frames))
            if len(frames) != 8 or np.any(np.diff(frames.mean(axis=(1, 2, 3))) <= 0):
                raise ValueError(f"it returned {len(frames)} frames of 8, or not in order")
            working.append(decoder)
        except ValueError as error:  # Also of decord requested where it is not installed.
            faults.append(f"{decoder}: {error}")
    if not working:
        return Finding(MISSING, "; ".join(faults), "python -m pip install 'av>=13'")
    return Finding(OK, "; ".join((f"{' and '.join(working)} decode a clip made here", *faults)))


def check_disk(root: Path) -> Finding:
    """Free and writable space at the cache root, which need not exist yet; params.yaml names it."""
    cache = resolve_cache_root(load_config(root).cache.root, data_base(root))
    existing = existing_folder(cache.path)
    free_bytes = shutil.disk_usage(existing).free
    found = f"{free_bytes / 2**30:.0f} GiB free at {cache.path}"
    if cache.name != str(cache.path):
        found += f", for what is pulled from {cache.name}"
    todo = "export JEPA_CACHE_HOME=/a/larger/disk, or set cache.root in params.yaml"
    if not os.access(existing, os.W_OK | os.X_OK):
        return Finding(MISSING, f"{existing} is not writable", todo)
    if free_bytes < MIN_FREE_BYTES:
        return Finding(MISSING, found, todo)
    if cache.path.is_dir():
        cache.check_ours()
    if free_bytes < LOW_FREE_BYTES:
        return Finding(NOTE, f"{found}: about {free_bytes / 9 / 2**30:.0f} h of ViT-L tokens", todo)
    return Finding(OK, found)


def check_robot(*, needed: bool) -> Finding:
    """Whether the simulated robot can be drawn: MuJoCo, the model files and an OpenGL library; a note where the data set is another."""
    try:
        mujoco = import_mujoco()
        find_assets()
        mujoco.GLContext(16, 16).free()
    except Exception as error:  # What a missing or broken OpenGL library raises depends on the library.
        state = MISSING if needed else NOTE
        return Finding(state, f"{error}"[:200], "docs/robot.md says what it needs; in a checkout `make install-sim`")
    return Finding(OK, f"MuJoCo {mujoco.__version__} draws by {os.environ['MUJOCO_GL']}, the models are there")
