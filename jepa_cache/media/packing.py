"""A folder of recordings to WebDataset tar shards: the same folder always gives the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from jepa_cache.config.machine import spell_name
from jepa_cache.files import atomic_file, remove_stale_temporaries
from jepa_cache.media.tar import split_name

SUFFIXES = ("mp4", "jsonl")
"""One file of each makes an episode."""


class LeftOut(NamedTuple):
    """A file that was not packed, by its path inside the folder, and why."""

    name: str
    reason: str


class PackReport(NamedTuple):
    """What `pack_folder` did: the tar shards in order, the number and bytes of the packed episodes, the rest."""

    tars: list[Path]
    num_episodes: int
    size_bytes: int
    left_out: list[LeftOut]


def pack_folder(
    folder: Path,
    out: Path,
    *,
    prefix: str = "shard",
    max_bytes: int = 1 << 30,
    overwrite: bool = False,
) -> PackReport:
    """Pack files that belong together (`<segment>.mp4` and `<segment>.jsonl`) into `<prefix>-000000.tar` and so on.

    Episodes are found recursively and written in the order of their names, with fixed times and owners; a name that is no UTF-8
    is written as `spell_name` spells it. Each tar is written
    under a hidden temporary name and renamed when it is complete.

    Args:
        folder: Where the recordings lie; their folders become part of the episode's key.
        out: The folder for the tars; made if absent.
        prefix: Begins the tars' names.
        max_bytes: Most bytes of recordings in one tar; a single episode may exceed it. About 1 GB by default: some ten
            5-minute VPT segments, so a crash loses little and a folder of thousands stays a few hundred files.
        overwrite: Delete the tars of an earlier pack of this prefix first.

    Raises:
        ValueError: No complete episode is found, `max_bytes` is not positive, or `out` holds an earlier pack.
        OSError: A file cannot be read or written; the incomplete tar is removed.
    """
    if max_bytes <= 0:
        raise ValueError(f"a tar must hold something; got max_bytes={max_bytes}")
    episodes, left_out = find_episodes(folder, SUFFIXES)
    if not episodes:
        raise ValueError(
            f"no recording to pack in {folder}: an episode is one file each of "
            f"{', '.join(f'<segment>.{suffix}' for suffix in SUFFIXES)} side by side; {len(left_out)} files were left out"
            + (f" (first: {left_out[0].name}: {left_out[0].reason})" if left_out else "")
        )
    earlier = sorted(out.glob(f"{prefix}-[0-9][0-9][0-9][0-9][0-9][0-9].tar"))
    if earlier and not overwrite:
        raise ValueError(
            f"{out} already holds {len(earlier)} tar shards of an earlier pack ({earlier[0].name}, ...); "
            "pack into another folder, or pass --overwrite to replace them"
        )
    out.mkdir(parents=True, exist_ok=True)
    remove_stale_temporaries(out)
    # Removed before the first new one is written: a crash may leave too few tars, never a mixture of two packs.
    for tar in earlier:
        tar.unlink()
    groups = _group(episodes, max_bytes)
    tars = []
    total_bytes = sum(sum(path.stat().st_size for path in files.values()) for files in episodes.values())
    with tqdm(total=total_bytes, unit="B", unit_scale=True, desc="pack", disable=None) as bar:
        for number, keys in enumerate(groups):
            tars.append(out / f"{prefix}-{number:06d}.tar")
            _write_tar(tars[-1], {key: episodes[key] for key in keys}, bar)
    return PackReport(tars, len(episodes), total_bytes, left_out)


def find_episodes(folder: Path, suffixes: Sequence[str]) -> tuple[dict[str, dict[str, Path]], list[LeftOut]]:
    """Find the complete episodes below a folder, and the files of these suffixes that are part of none.

    Returns:
        Key to suffix to path, in the order of the keys; and the files that are left out, with the reason.

    Raises:
        ValueError: `folder` is no folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give the folder that holds the recordings")
    found: dict[str, dict[str, Path]] = {}
    left_out = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")):
        name = spell_name(path.relative_to(folder).as_posix())
        key, suffix = split_name(name)
        suffix = suffix.lower().lstrip(".") if suffix else ""
        if suffix.rpartition(".")[2] not in suffixes:
            continue
        if folder.resolve() not in path.resolve().parents:
            left_out.append(LeftOut(name, f"a link out of the folder, to {path.resolve()}: put a copy in its place"))
            continue
        if suffix not in suffixes:
            left_out.append(LeftOut(name, "a dot inside the name: WebDataset ends the key there; rename it without"))
        elif suffix in found.setdefault(key, {}):
            left_out.append(LeftOut(name, f"{found[key][suffix].name} has the same key and suffix"))
        else:
            found[key][suffix] = path
    episodes = {}
    for key, files in sorted(found.items()):
        missing = [suffix for suffix in suffixes if suffix not in files]
        if missing:
            reason = f"there is no {' and no '.join(f'{key}.{suffix}' for suffix in missing)} beside it"
            left_out += [LeftOut(spell_name(path.relative_to(folder).as_posix()), reason) for path in files.values()]
        else:
            episodes[key] = files
    return episodes, sorted(left_out)


def _group(episodes: dict[str, dict[str, Path]], max_bytes: int) -> list[list[str]]:
    groups: list[list[str]] = []
    used_bytes = 0
    for key, files in episodes.items():
        size_bytes = sum(path.stat().st_size for path in files.values())
        if not groups or used_bytes + size_bytes > max_bytes:
            groups.append([])
            used_bytes = 0
        groups[-1].append(key)
        used_bytes += size_bytes
    return groups


def _write_tar(path: Path, episodes: dict[str, dict[str, Path]], bar: tqdm) -> None:
    from webdataset.writer import TarWriter

    with (
        atomic_file(path) as temporary,
        temporary.open("wb") as file,
        # PAX: names longer than ustar's 256 characters, else the same bytes.
        TarWriter(file, user="user", group="user", mtime=0, encoder=False, format="PAX_FORMAT") as writer,
    ):
        for key, files in episodes.items():
            members = {suffix: member.read_bytes() for suffix, member in files.items()}
            bar.update(writer.write({"__key__": key, **members}))
