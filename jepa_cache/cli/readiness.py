"""What a machine needs for this project, checked one thing at a time; used by `jepa-cache doctor`."""

from __future__ import annotations

import importlib.metadata
import io
import os
import platform
import shutil
import sys
import threading
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

OK, NOTE, MISSING = "ok", "note", "missing"
TIMEOUT_S = 5.0
MIN_FREE_BYTES, LOW_FREE_BYTES = 1 << 30, 50 << 30  # ViT-L tokens of one hour at 5 steps/s take 9 GiB.
DROID_URL = "https://storage.googleapis.com/gresearch/robotics/droid/1.0.1/dataset_info.json"
HUB_URL = "https://huggingface.co"


class Finding(NamedTuple):
    """One line of the table: `state` is "ok", "note" (works without it) or "missing"; `todo` says what to type."""

    name: str
    state: str
    found: str
    todo: str = ""


def check_everything(root: Path, cache_root: str | None) -> list[Finding]:
    """Run every check; one that itself fails is a finding too, so that the table is always whole.

    Args:
        root: The checkout, whose pyproject.toml holds the bounds of the libraries.
        cache_root: `cache.root` of params.yaml.
    """
    checks: list[tuple[str, Callable[[], Iterable[Finding]]]] = [
        ("python", lambda: check_python(root)),
        ("libraries", lambda: check_libraries(root)),
        ("gpu", check_gpu),
        ("decoder", check_decoders),
        ("disk", lambda: check_disk(root, cache_root)),
        ("DROID bucket", check_droid),
        ("Hugging Face hub", check_hub),
    ]
    findings: list[Finding] = []
    for name, check in checks:
        try:
            findings += check()
        except Exception as error:  # The table must name it, whatever it is.
            text = str(error).splitlines()
            reason = f"{type(error).__name__}: {text[0] if text else ''}"[:200]
            findings.append(Finding(name, MISSING, reason, "report this, with the line on the left"))
    return findings


def read_bounds(root: Path) -> tuple[str, list[tuple[str, bool]]]:
    """The Python bound and the requirements (text, needed) of the project: of the checkout, else of what is installed."""
    file = root / "pyproject.toml"
    if file.is_file():
        project = tomllib.loads(file.read_text())["project"]
        optional = [text for group in project.get("optional-dependencies", {}).values() for text in group]
        needed = [(text, True) for text in project["dependencies"]]
        return project["requires-python"], needed + [(text, False) for text in optional]
    metadata = importlib.metadata.metadata("jepa-cache")
    requirements = importlib.metadata.requires("jepa-cache") or []
    return metadata["Requires-Python"], [(text, "extra ==" not in text) for text in requirements]


def check_python(root: Path) -> list[Finding]:
    """The running Python against requires-python."""
    from packaging.specifiers import SpecifierSet

    bound, version = read_bounds(root)[0], platform.python_version()
    if SpecifierSet(bound).contains(version, prereleases=True):
        return [Finding("python", OK, f"{version} ({sys.executable})")]
    return [Finding("python", MISSING, f"{version}; {bound} is needed", "make install PYTHON=python3.12")]


def check_libraries(root: Path) -> list[Finding]:
    """Every library against its bounds; those in order share one line."""
    from packaging.requirements import Requirement

    findings, good = [], []
    for text, needed in read_bounds(root)[1]:
        requirement = Requirement(text)
        # The marker of an extra is false here, but its libraries are looked at, as optional ones.
        if requirement.marker is not None and "extra" not in text and not requirement.marker.evaluate():
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        if version is not None and requirement.specifier.contains(version, prereleases=True):
            if (line := f"{requirement.name} {version}") not in good:  # a library may belong to several extras
                good.append(line)
            continue
        found = "not installed" if version is None else f"{version} is installed"
        bound = f"; {requirement.specifier} is needed" if str(requirement.specifier) else ""
        todo = f"python -m pip install '{requirement.name}{requirement.specifier}'"
        findings.append(Finding(requirement.name, MISSING if needed else NOTE, found + bound, todo))
    return [Finding("libraries", OK, ", ".join(good)), *findings] if good else findings


def check_gpu() -> list[Finding]:
    """Whether torch sees a CUDA device; everything works without one, slowly."""
    import torch

    if not torch.cuda.is_available():
        build = f"torch {torch.__version__} sees no CUDA device"
        todo = "nvidia-smi; if it lists a GPU, install a CUDA build of torch: https://pytorch.org/get-started/locally"
        return [Finding("gpu", NOTE, f"{build}; the CPU works, tens of times slower", todo)]
    names = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        names.append(f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB)")
    return [Finding("gpu", OK, f"{', '.join(names)}; CUDA {torch.version.cuda}")]


def check_decoders() -> list[Finding]:
    """Encode a tiny clip and decode it with each decoder: one that works is needed."""
    from jepa_cache.media.video import open_video

    clip = make_clip()
    findings, working = [], []
    for decoder, todo in (("pyav", "python -m pip install 'av>=13'"), ("decord", "python -m pip install decord")):
        try:
            with open_video(clip, decoder) as video:
                frames = video.read(np.arange(video.info.num_frames))
            brightness = frames.mean(axis=(1, 2, 3))
            if len(frames) != 8 or np.any(np.diff(brightness) <= 0):
                raise ValueError(f"it returned {len(frames)} frames of 8, or not in order")
        except ValueError as error:  # DecodeError, and decord asked for where it is not installed, are ValueErrors.
            findings.append(Finding(decoder, NOTE, str(error), todo))
        else:
            working.append(decoder)
    if not working:
        return [finding._replace(state=MISSING) for finding in findings]
    return [Finding("decoder", OK, f"{' and '.join(working)} decode a clip made here"), *findings]


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


def check_disk(root: Path, cache_root: str | None) -> list[Finding]:
    """Free and writable space at the cache root, which need not exist yet."""
    from jepa_cache.config.loading import data_base
    from jepa_cache.config.machine import existing_folder
    from jepa_cache.store.remote import resolve_cache_root

    cache = resolve_cache_root(cache_root, data_base(root))
    path = cache.path
    existing = existing_folder(path)
    free_bytes = shutil.disk_usage(existing).free
    found = f"{free_bytes / 2**30:.0f} GiB free at {path}" + (
        f", for what is pulled from {cache.name}" if cache.name != str(path) else ""
    )
    todo = "export JEPA_CACHE_HOME=/a/larger/disk, or set cache.root in params.yaml"
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return [Finding("cache root", MISSING, f"{existing} is not writable", todo)]
    if path.is_dir():
        try:
            cache.check_ours()
        except ValueError as error:
            return [Finding("cache root", MISSING, str(error), todo)]
    if free_bytes < MIN_FREE_BYTES:
        return [Finding("cache root", MISSING, found, todo)]
    if free_bytes < LOW_FREE_BYTES:
        return [Finding("cache root", NOTE, f"{found}: about {free_bytes / 9 / 2**30:.0f} h of ViT-L tokens", todo)]
    return [Finding("cache root", OK, found)]


def check_droid() -> list[Finding]:
    """Reach of the public DROID bucket, and whether Google credentials are set up (none are needed)."""
    configured = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
    default = Path(os.environ.get("CLOUDSDK_CONFIG") or "~/.config/gcloud").expanduser()
    has_default = (default / "application_default_credentials.json").is_file()
    named = "credentials named by GOOGLE_APPLICATION_CREDENTIALS" if configured else "default credentials"
    credentials = named if configured or has_default else "no credentials, none are needed"
    if configured and not Path(configured).is_file():
        return [
            Finding(
                "DROID bucket",
                NOTE,
                "GOOGLE_APPLICATION_CREDENTIALS names a file that is not there",
                "unset GOOGLE_APPLICATION_CREDENTIALS (the bucket is public)",
            )
        ]
    trouble = find_trouble(DROID_URL)
    if trouble is None:
        return [Finding("DROID bucket", OK, f"reached; {credentials}")]
    todo = "check the network or proxy (https_proxy), or copy the data and name the local folder as input"
    return [Finding("DROID bucket", NOTE, f"{trouble}; {credentials}", todo)]


def check_hub() -> list[Finding]:
    """Reach of the Hugging Face hub, and whether a token is set up; public weights need none."""
    from huggingface_hub import constants, get_token

    token = "a token is set up" if get_token() else "no token, public files need none"
    if constants.HF_HUB_OFFLINE:
        return [Finding("Hugging Face hub", NOTE, f"switched off by HF_HUB_OFFLINE; {token}", "unset HF_HUB_OFFLINE")]
    trouble = find_trouble(os.environ.get("HF_ENDPOINT") or HUB_URL)
    if trouble is None:
        return [Finding("Hugging Face hub", OK, f"reached; {token}")]
    todo = (
        "check the network or proxy (https_proxy), set HF_ENDPOINT to a mirror, or name a file with encode.weights=PATH"
    )
    return [Finding("Hugging Face hub", NOTE, f"{trouble}; {token}", todo)]


def find_trouble(url: str) -> str | None:
    """Ask a server for a header; None when it answers, else what went wrong in a few words. Takes 10 s at most."""
    answers: list[str | None] = []
    # A thread, because looking up a host's name knows no timeout.
    asking = threading.Thread(target=lambda: answers.append(_ask(url)), daemon=True)
    asking.start()
    asking.join(2 * TIMEOUT_S)
    return answers[0] if answers else f"no answer in {2 * TIMEOUT_S:g} s"


def _ask(url: str) -> str | None:
    try:
        request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "jepa-cache-doctor"})
        with urllib.request.urlopen(request, timeout=TIMEOUT_S):
            return None
    except urllib.error.HTTPError as error:
        error.close()
        return f"answers {error.code}"
    except Exception as error:  # URLError, timeouts, TLS, bad proxies and bad URLs share no base class.
        return f"not reached ({type(error).__name__}: {getattr(error, 'reason', error)})"[:160]
