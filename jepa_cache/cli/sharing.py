"""`jepa-cache pull`, and the upload of `export cache --to`: an exported cache at a URL that fsspec knows (hf://, s3://, gs://, file://)."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import typer
from tqdm import tqdm

from jepa_cache.cli.outcome import AsJson, Outcome, describe_bytes, report
from jepa_cache.config.loading import find_repository, load_config, manifest_path, preset_file
from jepa_cache.data.dataset import find_differences
from jepa_cache.files import OURS, atomic_file, file_digest
from jepa_cache.store.controls import iter_controls
from jepa_cache.store.layout import STORE_FILE, check_identity, check_store
from jepa_cache.store.manifest import Manifest, read_manifest, write_manifest
from jepa_cache.store.root import KINDS, MARKER, CacheRoot

README, CHECKSUMS = "README.md", "SHA256SUMS"
"""Of an exported root: what it is, and the sha256 of every other file."""
HUB = "hf://datasets/"
NAMES = {*KINDS, "manifests", "configs", README, CHECKSUMS, MARKER}
LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def open_url(url: str) -> tuple[Any, str]:
    """Fsspec's file system of a URL, and the path in it; a ValueError says which library or right is missing."""
    import fsspec

    try:
        files, path = fsspec.url_to_fs(url)
    except (ImportError, OSError, ValueError) as error:  # no library for the protocol, no such protocol
        raise ValueError(f"{url!r} cannot be used: {error}") from error
    return files, path.rstrip("/")


def list_others(folder: Path) -> list[str]:
    """Names in a folder that are none of an exported root, nor of an export or a pull that was killed in it."""
    return sorted({path.name for path in folder.iterdir() if not OURS.fullmatch(path.name)} - NAMES)


def preset_files(manifest: Manifest) -> list[str]:
    """The presets that a cache was made with, relative to a project: of its encoder, its data set, and the members of a mixture."""
    datasets = dict.fromkeys([manifest.dataset, *(part.dataset for part in manifest.parts)])
    return [preset_file("encoder", manifest.encoder), *(preset_file("dataset", name) for name in datasets)]


def check_arrived(path: Path, digest: str | None) -> dict[Path, str]:
    """The sha256 of every file of a store of this digest, or of a file of controls, after a comparison with what it says itself."""
    if digest is None:
        for _ in iter_controls(path):
            pass
        return {path: file_digest(path)}
    found = check_identity(path, check_store(path, read_data=True), digest)
    sums = {path / name: file.sha256 for name, file in found.files.items()}
    return {**sums, path / STORE_FILE: file_digest(path / STORE_FILE)}


def upload(folder: Path, url: str) -> None:
    """Send an exported root, its list of checksums last: what has one is whole. The hub gets it as one commit.

    Raises:
        ValueError: The URL cannot be written.
    """
    names = [name for _, name in read_sums(folder / CHECKSUMS)]
    try:
        if url.startswith(HUB):
            from huggingface_hub import HfApi

            owner, name, *below = url.removeprefix(HUB).strip("/").split("/")
            api = HfApi()
            api.create_repo(f"{owner}/{name}", repo_type="dataset", exist_ok=True)
            api.upload_folder(
                repo_id=f"{owner}/{name}", repo_type="dataset", folder_path=folder, path_in_repo="/".join(below) or None
            )
            return
        files, path = open_url(url)
        for parent in sorted({str(PurePosixPath(path, name).parent) for name in names}):
            files.makedirs(parent, exist_ok=True)
        for name in tqdm([*names, CHECKSUMS], desc="upload", unit="file", mininterval=0.5):
            files.put_file(str(folder / name), f"{path}/{name}")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{url} cannot be written ({type(error).__name__}: {error}); the same command goes on"
        ) from error


def read_sums(path: Path) -> list[tuple[str, str]]:
    """(sha256, name) of every file of an exported root; a ValueError for a name that could leave its folder, or is none of a root's."""
    listed = []
    for line in path.read_text(encoding="utf-8").splitlines():
        found = LINE.fullmatch(line)
        parts = PurePosixPath(found[2]).parts if found else ()
        if not parts or ".." in parts or "\\" in line or parts[0] not in NAMES:
            raise ValueError(f"{path} is no list of an exported cache: {line[:80]!r}")
        listed.append((found[1], found[2]))
    return listed


def pull(
    url: Annotated[
        str,
        typer.Argument(help="where an exported cache lies: hf://datasets/OWNER/NAME, s3://, gs://, https://, a folder"),
    ],
    out: Annotated[
        Path, typer.Argument(help="folder of the cache root to be made; one of an interrupted pull goes on")
    ],
    *,
    as_json: AsJson = False,
) -> None:
    """Get a cache that `jepa-cache export cache --to URL` shared, so that stage two trains from it without any encoder.

    Every byte is compared with its checksum. The manifest becomes encode/manifest.json of the outputs of the project around the present
    folder, and presets that the project lacks are put into it; presets and settings that differ from those of the cache are named.

    Exit code 0: pulled; 2: wrong usage, or a file is missing or damaged.
    """
    report(lambda: _pull(url, out), as_json=as_json)


def _pull(url: str, out: Path) -> Outcome:
    repository = find_repository(Path.cwd())
    config = load_config(repository)
    if out.exists() and list_others(out):
        raise ValueError(f"{out} holds something else than a pulled cache; name a new folder")
    files, path = open_url(url)
    sums = out / CHECKSUMS
    _fetch(files, f"{path}/{CHECKSUMS}", sums, url)
    listed, num_bytes = read_sums(sums), 0
    for digest, name in tqdm(listed, desc="pull", unit="file", mininterval=0.5):
        target = out / name
        if not target.is_file() or file_digest(target) != digest:
            _fetch(files, f"{path}/{name}", target, url)
            if (found := file_digest(target)) != digest:
                target.unlink()
                raise ValueError(
                    f"{url}/{name} is damaged: its sha256 is {found}, {CHECKSUMS} has {digest}; tell who shared it"
                )
        num_bytes += target.stat().st_size
    manifests = [out / name for _, name in listed if name.startswith("manifests/")]
    if len(manifests) != 1:
        raise ValueError(f"{url} lists {len(manifests)} manifests; an exported cache has one")
    manifest = read_manifest(manifests[0])
    root = CacheRoot(out)
    for part, entry in tqdm(manifest.stores, desc="check", unit="unit", mininterval=0.5):
        for key, digest in part.listed(entry):
            check_arrived(root.store(key), digest)
    notes = _place_presets(manifest, out, {name for _, name in listed}, repository)
    if lacking := [file for file in preset_files(manifest) if not (repository / file).is_file()]:
        raise ValueError(
            f"{lacking[0]}, with which the cache was made, is neither in {repository} nor in {url}, as an older release exported it; put there that "
            "of who made the cache, and type the same command again: what was fetched is kept"
        )
    names = {"dataset": manifest.dataset, "encoder": manifest.encoder}
    again = [f"{kind}={name}" for kind, name in names.items() if getattr(config, kind).name != name]
    told = find_differences(load_config(repository, again), manifest)
    write_manifest(manifest, [manifest_path(config, repository)])
    command = shlex.join(["python", "stages/fit_scaler.py", *again, f"cache.root={out}"])
    document = {
        "out": str(out),
        "num_bytes": num_bytes,
        "manifest": manifest.digest,
        "num_units": len(manifest.entries),
        "differences": told,
    }
    return Outcome(
        document,
        [
            f"pulled {len(manifest.entries)} units to {out}: {manifest.num_steps} steps, {describe_bytes(num_bytes)}, every byte checked",
            *(f"set as in the cache: {difference}" for difference in told),
            *notes,
            f"wrote {manifest_path(config, repository)}; next: {command}",
        ],
    )


def _place_presets(manifest: Manifest, out: Path, listed: Collection[str], repository: Path) -> list[str]:
    """Put the presets that came with a cache into the project, never over one that is there; what was done, and what differs.

    `listed` are the names of the list of checksums, none of which leaves its folder: a manifest from elsewhere may name any preset.
    """
    notes = []
    for file in preset_files(manifest):
        source, target = out / file, repository / file
        if file not in listed:
            continue
        if not target.exists():
            with atomic_file(target) as partial:
                shutil.copyfile(source, partial)
            notes.append(f"wrote {target}, which came with the cache")
        elif source.read_bytes() != target.read_bytes():
            notes.append(f"kept {target}, which is not as the one that came with the cache: {source}")
    return notes


def _fetch(files: Any, source: str, target: Path, url: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_file(target) as partial, files.open(source, "rb") as stream, partial.open("wb") as file:
            shutil.copyfileobj(stream, file, 1 << 20)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{url} lacks {target.name}, or cannot be read ({type(error).__name__}: {error}); it must be what `jepa-cache export cache --to` "
            "wrote. The same command goes on where this one stopped"
        ) from error
