"""`jepa-cache doctor`: what pip and torch cannot tell of a machine: GPU, decoders, cache root, and reach of the servers."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer

from jepa_cache.config.loading import data_base, find_repository, load_config
from jepa_cache.config.machine import existing_folder
from jepa_cache.media import video as video_module
from jepa_cache.store.remote import resolve_cache_root

OK, NOTE, MISSING = "ok", "note", "missing"
TIMEOUT_S = 5.0
MIN_FREE_BYTES, LOW_FREE_BYTES = 1 << 30, 50 << 30  # ViT-L tokens of one hour at 5 steps/s take 9 GiB.
DROID_URL = "https://storage.googleapis.com/gresearch/robotics/droid/1.0.1/dataset_info.json"
HUB_URL = "https://huggingface.co"
WIDTH = 110


class Finding(NamedTuple):
    """One line of the table: `state` is "ok", "note" (works without it) or "missing"; `todo` says what to type."""

    name: str
    state: str
    found: str
    todo: str = ""


def doctor(*, as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """Say whether this machine is ready, and what to type where it is not; exit code 1 when something needed is missing.

    Args:
        as_json: Print JSON instead of the table.
    """
    findings = check_everything(find_repository(Path.cwd()))
    missing = [finding for finding in findings if finding.state == MISSING]
    if as_json:
        print(json.dumps({"ready": not missing, "findings": [finding._asdict() for finding in findings]}, indent=2))
    else:
        print_table(findings)
        notes = sum(finding.state == NOTE for finding in findings)
        print(f"{'not ready' if missing else 'ready'}: {len(missing)} missing, {notes} to know")
    if missing:
        raise typer.Exit(1)


def print_table(findings: list[Finding]) -> None:
    """Print a line per finding, and under it what to type."""
    name_width = max(len(finding.name) for finding in findings)
    indent = " " * (name_width + 10)
    for finding in findings:
        first, *others = textwrap.wrap(finding.found, WIDTH - len(indent), break_on_hyphens=False) or [""]
        print(f"{finding.name:<{name_width}}  {finding.state:<8}{first}")
        for line in (*others, *([f"-> {finding.todo}"] if finding.todo else [])):
            print(f"{indent}{line}")


def check_everything(root: Path) -> list[Finding]:
    """Run every check; one that itself fails is a finding too, so that the table is always whole."""
    checks: dict[str, Callable[[], Finding]] = {
        "libraries": check_libraries,
        "gpu": check_gpu,
        "decoder": check_decoders,
        "cache root": lambda: check_disk(root),
        "DROID bucket": lambda: check_server("DROID bucket", DROID_URL, "copy the data and name the folder as input"),
        "Hugging Face hub": lambda: check_server(
            "Hugging Face hub",
            os.environ.get("HF_ENDPOINT") or HUB_URL,
            "set HF_ENDPOINT to a mirror, or name a file with encode.weights=PATH",
        ),
    }
    findings = []
    for name, check in checks.items():
        try:
            findings.append(check())
        except Exception as error:  # The table must name it, whatever it is.
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]
            findings.append(Finding(name, MISSING, reason, "mend what the line names, or report it"))
    return findings


def check_libraries() -> Finding:
    """Whether the installed libraries fit each other and this Python, by `pip check`."""
    python = f"Python {sys.version.split()[0]} ({sys.executable})"
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "check"], capture_output=True, text=True
    )
    lines = done.stdout.splitlines() or done.stderr.splitlines()[-1:]
    if done.returncode:
        ours = [line for line in lines if line.lower().startswith("jepa-cache ")]
        found = f"{python}; {'; '.join(ours or lines)}"
        return Finding("libraries", MISSING if ours else NOTE, found, "make install, then python -m pip check")
    return Finding("libraries", OK, f"{python}; pip finds no conflict")


def check_gpu() -> Finding:
    """Whether torch sees a CUDA device; everything works without one, slowly."""
    import torch

    if not torch.cuda.is_available():
        found = f"torch {torch.__version__} sees no CUDA device; the CPU works, tens of times slower"
        todo = "nvidia-smi; if it lists a GPU, install a CUDA build of torch: https://pytorch.org/get-started/locally"
        return Finding("gpu", NOTE, found, todo)
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    names = [f"{device.name} ({device.total_memory / 2**30:.0f} GiB)" for device in devices]
    return Finding("gpu", OK, f"{', '.join(names)}; CUDA {torch.version.cuda}")


def check_decoders() -> Finding:
    """Encode a tiny clip and decode it with each decoder: one that works is needed."""
    clip, working, faults = make_clip(), [], []
    for decoder in ("pyav", "decord"):
        try:
            with video_module.open_video(clip, decoder) as video:
                frames = video.read(np.arange(video.info.num_frames))
            if len(frames) != 8 or np.any(np.diff(frames.mean(axis=(1, 2, 3))) <= 0):
                raise ValueError(f"it returned {len(frames)} frames of 8, or not in order")
            working.append(decoder)
        except ValueError as error:  # Also of decord requested where it is not installed.
            faults.append(f"{decoder}: {error}")
    if not working:
        return Finding("decoder", MISSING, "; ".join(faults), "python -m pip install 'av>=13'")
    return Finding("decoder", OK, "; ".join((f"{' and '.join(working)} decode a clip made here", *faults)))


def make_clip() -> bytes:
    """Eight 64x48 frames that grow brighter, as MPEG-4 in mp4: every build of FFmpeg can make that."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("mpeg4", rate=20)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(8):
            image = np.full((48, 64, 3), 30 * index, np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def check_disk(root: Path) -> Finding:
    """Free and writable space at the cache root, which need not exist yet; params.yaml names it."""
    cache = resolve_cache_root(load_config(root).cache_root, data_base(root))
    existing = existing_folder(cache.path)
    free_bytes = shutil.disk_usage(existing).free
    place = (
        f" {cache.path}" if cache.name == str(cache.path) else f" {cache.path}, for what is pulled from {cache.name}"
    )
    found, state = f"{free_bytes / 2**30:.0f} GiB free at{place}", OK
    if not os.access(existing, os.W_OK | os.X_OK):
        found, state = f"{existing} is not writable", MISSING
    elif free_bytes < MIN_FREE_BYTES:
        state = MISSING
    elif free_bytes < LOW_FREE_BYTES:
        found, state = f"{found}: about {free_bytes / 9 / 2**30:.0f} h of ViT-L tokens", NOTE
    if cache.path.is_dir() and state != MISSING:
        cache.check_ours()
    todo = "export JEPA_CACHE_HOME=/a/larger/disk, or set cache.root in params.yaml"
    return Finding("cache root", state, found, "" if state == OK else todo)


def check_server(name: str, url: str, way_out: str) -> Finding:
    """Ask a server for a header; what is not reached is a note. Takes 10 s at most."""
    answers: list[str] = []
    # A thread, because looking up a host's name knows no timeout.
    asking = threading.Thread(target=lambda: answers.append(_ask(url)), daemon=True)
    asking.start()
    asking.join(2 * TIMEOUT_S)
    trouble = answers[0] if answers else f"no answer in {2 * TIMEOUT_S:g} s"
    if not trouble:
        return Finding(name, OK, "reached")
    return Finding(name, NOTE, trouble, f"check the network or proxy (https_proxy), or {way_out}")


def _ask(url: str) -> str:
    """What goes wrong, in a few words; nothing when the server answers."""
    try:
        request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "jepa-cache-doctor"})
        with urllib.request.urlopen(request, timeout=TIMEOUT_S):
            return ""
    except urllib.error.HTTPError as error:
        error.close()
        return f"answers {error.code}"
    except Exception as error:  # URLError, timeouts, TLS, bad proxies and bad URLs share no base class.
        return f"not reached ({type(error).__name__}: {getattr(error, 'reason', error)})"[:160]
