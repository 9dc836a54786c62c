"""WebDataset tar shards: found by folders, globs and ranges, read one sample at a time by their headers, and packed."""

from __future__ import annotations

import fnmatch
import glob
import os
import posixpath
import re
import tarfile
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from jepa_cache.config.paths import spell_name
from jepa_cache.files import atomic_file, replaced_files

MAX_MEMBER_BYTES = 4 << 30
"""A member is held in memory as a whole; five minutes of 1280x720 video are below 1 GB."""

HEAD_BYTES = 512
COMPRESSED = {b"\x1f\x8b": "gzip", b"(\xb5/\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2", b"PK\x03\x04": "zip"}


Member = TypeVar("Member", bytes, tarfile.TarInfo)


class TarSample(NamedTuple, Generic[Member]):
    """The members of one key, by suffix, or their headers; where `problem` is set, they must not be used."""

    key: str
    members: dict[str, Member]
    problem: str | None


def iter_samples(path: Path, suffixes: Container[str]) -> Iterator[TarSample[bytes]]:
    """Yield the samples of an uncompressed tar shard in the order in which their keys first appear.

    The members of one key need not be adjacent: the headers are read first, then each sample by its offsets. Members of
    other suffixes make no samples. A problem: a suffix that a key has twice, a link or device in a file's place, an
    absolute name or one with `..`, a name with a dot inside (`a.b.mp4`), a member that is cut off or above 4 GiB. A tar
    that ends early, or goes on after its end mark, adds one last sample under the tar's own name that says so; a file that
    is no uncompressed tar gives that one alone. A name that is no UTF-8 is spelled as `spell_name` does. `suffixes` are
    in lower case.

    Cost: memory for one sample and for the headers; the bytes of unwanted members are never read.
    """
    samples = list_samples(path, suffixes)
    with path.open("rb") as file:
        for key, headers, problem in samples:
            members = {}
            for suffix, header in headers.items() if problem is None else ():
                file.seek(header.offset_data)
                members[suffix] = file.read(header.size)
            yield TarSample(key, members, problem)


def list_samples(path: Path, suffixes: Container[str]) -> list[TarSample[tarfile.TarInfo]]:
    """The samples that `iter_samples` would yield, without their bytes. Cost: reads the headers only."""
    size_bytes = path.stat().st_size
    headers: dict[str, dict[str, tarfile.TarInfo]] = {}
    problems: dict[str, str] = {}
    end, problem, cut_off = 0, None, False
    try:
        # Names are read as UTF-8 whatever the locale says: they become keys.
        with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as tar:
            while (member := tar.next()) is not None:
                if member.size < 0:  # Some Python versions would read the same header for ever.
                    raise tarfile.ReadError(f"member {member.name!r} has a negative size")
                end, name = tar.offset, posixpath.normpath(spell_name(member.name))
                if member.isdir() or (found := split_name(name, suffixes)) is None:
                    continue
                key, suffix = found
                fault = _find_fault(member, name, size_bytes)
                if suffix not in suffixes:
                    fault = fault or f"member {key!r} has a dot inside its name; rename it without"
                if suffix in headers.setdefault(key, {}):
                    fault = fault or f"the tar holds more than one member {suffix!r} of this key"
                headers[key][suffix] = member
                cut_off |= member.offset_data + member.size > size_bytes
                if fault is not None:
                    problems.setdefault(key, fault)
    except (tarfile.TarError, ValueError, OverflowError) as error:  # Bad pax headers give the latter two.
        problem = f"the tar is damaged or cut off after byte {end} of {size_bytes} ({error}); what followed is lost"
        if end == 0:
            with path.open("rb") as file:
                what = describe_stand_in(file.read(HEAD_BYTES)) or f"copy it again, or pack it again ({error})"
            return [TarSample(spell_name(path.name), {}, f"the file is no uncompressed tar: {what}")]
    samples = [TarSample(key, of_key, problems.get(key)) for key, of_key in headers.items()]
    # A member that was cut off is named by its own sample, and nothing can follow it.
    if not cut_off and (problem := problem or _find_tail_problem(path, end, size_bytes)) is not None:
        samples.append(TarSample(spell_name(path.name), {}, problem))
    return samples


def split_name(name: str, suffixes: Container[str]) -> tuple[str, str] | None:
    """Key and suffix of a file that belongs to a sample, else None; a suffix with a dot inside has the whole name as key.

    The key is the path up to the first dot of the base name, the suffix what follows, in lower case and without leading
    dots (`a..MP4` gives key `a`, suffix `mp4`).

    Source: webdataset's `base_plus_ext`, with which a test compares it. Importing webdataset imports torch: 3 s.
    """
    match = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", name)
    suffix = match[2].lower().lstrip(".") if match else ""
    if match is None or suffix.rpartition(".")[2] not in suffixes:
        return None
    return (match[1] if suffix in suffixes else name), suffix


def _find_fault(member: tarfile.TarInfo, name: str, size_bytes: int) -> str | None:
    end = member.offset_data + member.size
    if not member.isreg() or member.issparse():
        return f"member {name!r} is a link, a device or a sparse file; only plain files are read"
    if name.startswith("/") or ".." in name.split("/"):
        return f"member {name!r} has an absolute name or one that leaves its folder"
    if end > size_bytes:
        return f"member {name!r} is cut off: it ends at byte {end}, the tar at {size_bytes}; what followed is lost"
    if member.size > MAX_MEMBER_BYTES:
        return f"member {name!r} has {member.size} bytes; at most {MAX_MEMBER_BYTES} are read into memory"
    return None


def _find_tail_problem(path: Path, end: int, size_bytes: int) -> str | None:
    """Check that an end mark and nothing else follows the last member; `tarfile` stops at a bad header silently."""
    if end + tarfile.BLOCKSIZE > size_bytes:
        return f"the tar has no end mark: it was cut off at byte {size_bytes}, and members may be lost"
    with path.open("rb") as file:
        file.seek(end)
        while block := file.read(1 << 20):
            if np.frombuffer(block, np.uint8).any():
                return (
                    f"after its last readable member (byte {end} of {size_bytes}) the tar goes on with data that is no "
                    "member: a damaged header, or tars that were joined with cat. What follows is not read"
                )
    return None


def describe_stand_in(head: bytes) -> str | None:
    """What a file is that begins so and often lies in the place of data, and the way out; None where nothing is known."""
    if not head:
        return "it is empty; copy it again"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the data; fetch it with `git lfs pull`"
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "it is an HTML page (of an error, or a login?); download it again"
    packed = next((name for magic, name in COMPRESSED.items() if head.startswith(magic)), None)
    return packed and f"it is compressed with {packed}; decompress it first"


def expand_inputs(inputs: Sequence[str], base: Path, *patterns: str) -> list[Path]:
    """Find the files that inputs name: folders (searched recursively), files, globs, `{000000..000123}` brace ranges.

    Relative inputs start from `base`, and `~` is the home folder. `patterns` are of the files' names, e.g. "*.tar".

    Returns:
        The files, sorted by path, each once, by however many names or links it is reached, and no hidden ones.

    Raises:
        ValueError: An input, or a name of its brace range, finds nothing, or is a file of another form.
    """
    from braceexpand import braceexpand

    found: dict[Path, Path] = {}
    folders: dict[Path, Path] = {}  # each without links: they are few, and of ten thousand files each takes its time
    for text in inputs:
        # A file or folder of exactly this name wins over reading its brackets as a pattern.
        names = [text] if (base / Path(text).expanduser()).exists() else list(braceexpand(text))
        missing = []
        for name in names:
            paths = list(_iter_matches(base / Path(name).expanduser(), patterns))
            missing += [] if paths else [name]
            for path in paths:
                if (folder := folders.get(path.parent)) is None:
                    folder = folders[path.parent] = real_path(path.parent)
                found.setdefault(real_path(path) if path.is_symlink() else folder / path.name, path)
        if missing:
            also = f" (nothing for {', '.join(missing[:5])}{', ...' if missing[5:] else ''})" if len(names) > 1 else ""
            raise ValueError(
                f"the input {text!r} finds no {' or '.join(patterns)} file{also}; relative inputs start from {base}. "
                f"Give a folder, a file, a glob in quotes or a brace range such as 'x-{{000000..000123}}{patterns[0][1:]}'"
            )
    return sorted(found.values())


def _iter_matches(path: Path, patterns: Sequence[str]) -> Iterator[Path]:
    for match in [path] if path.exists() else [Path(match) for match in glob.glob(str(path), recursive=True)]:  # noqa: PTH207
        files = [folder / name for folder, _, names in walk(match) for name in names] if match.is_dir() else [match]
        yield from (file for file in files if any(fnmatch.fnmatchcase(file.name, pattern) for pattern in patterns))


def walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """`os.walk` of a folder, sorted, without hidden names; links are followed, as data folders on clusters often are links.

    Each folder comes once. Take names out of the second list to skip folders.

    Raises:
        ValueError: At the end, where folders could not be listed: nobody knows how many recordings lie in them.
    """
    refused: list[OSError] = []
    seen: set[tuple[int, int]] = set()
    for parent, below, names in os.walk(folder, followlinks=True, onerror=refused.append):
        status = Path(parent).stat()
        if (status.st_dev, status.st_ino) in seen:
            below.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        below[:] = sorted(name for name in below if not name.startswith("."))
        yield Path(parent), below, sorted(name for name in names if not name.startswith("."))
    if refused:
        paths = ", ".join(f"{error.filename} ({error.strerror})" for error in refused[:5])
        raise ValueError(
            f"{len(refused)} folders below {folder} cannot be read, and what lies in them would be missing: {paths}. Let them "
            "be read, or name the others as inputs"
        )


def real_path(path: Path) -> Path:
    """`path` without links. A link that leads back to itself stays as it is, where `Path.resolve` of Python 3.11 and 3.12 stops.

    A file of a bucket has no links and stays as it is.
    """
    return Path(os.path.realpath(path)) if isinstance(path, Path) else path


def is_file_name(path: Path) -> bool:
    """Whether a name stands for a file, also one that is not there: a link that leads nowhere is lost data, not nothing."""
    return os.path.lexists(path) and not path.is_dir()


SUFFIXES = ("mp4", "jsonl")
"""One file of each makes an episode."""


class PackReport(NamedTuple):
    """What `pack_folder` did: the tar shards in order, the packed episodes and their bytes, and what was skipped and why."""

    tars: list[Path]
    num_episodes: int
    size_bytes: int
    skipped: list[str]


def pack_folder(folder: Path, out: Path, *, max_bytes: int = 1 << 30, overwrite: bool = False) -> PackReport:
    """Pack files that belong together (`<segment>.mp4` and `<segment>.jsonl`) into `shard-000000.tar` and so on.

    Episodes are written in the order of their names, with fixed times and owners: the same folder gives the same bytes.
    Folders become part of the episode's key. One tar holds at most `max_bytes` of recordings, or a single larger one: 1 GB
    are some ten 5-minute VPT segments, so a crash loses little and a folder of thousands stays a few hundred files.
    All tars appear at once, with `overwrite` in place of those of an earlier pack.

    Raises:
        ValueError: No complete episode is found, or `out` holds an earlier pack.
        OSError: A file cannot be read or written; `out` is then as it was.
    """
    episodes, skipped = _find_episodes(folder)
    if not episodes:
        raise ValueError(
            f"no recording to pack in {folder}: an episode is <segment>.mp4 and <segment>.jsonl side by side; "
            f"{len(skipped)} files were skipped {skipped[:1]}"
        )
    pattern = f"shard-{'[0-9]' * 6}.tar"
    if (earlier := sorted(out.glob(pattern))) and not overwrite:
        raise ValueError(
            f"{out} already holds {len(earlier)} tar shards of an earlier pack ({earlier[0].name}, ...); "
            "pack into another folder, or pass --overwrite to replace them"
        )
    sizes = {key: sum(path.stat().st_size for path in files.values()) for key, files in episodes.items()}
    groups: list[list[str]] = []
    used_bytes = 0
    for key, size_bytes in sizes.items():
        if not groups or used_bytes + size_bytes > max_bytes:
            groups.append([])
            used_bytes = 0
        groups[-1].append(key)
        used_bytes += size_bytes
    tars = [out / f"shard-{number:06d}.tar" for number in range(len(groups))]
    with replaced_files(out, tars[0].name, [pattern]) as fresh:
        for tar, keys in zip(tqdm(tars, unit="tar", desc="pack", disable=None), groups, strict=True):
            write_tar(fresh / tar.name, {key: episodes[key] for key in keys})
    return PackReport(tars, len(episodes), sum(sizes.values()), skipped)


def _find_episodes(folder: Path) -> tuple[dict[str, dict[str, Path]], list[str]]:
    """Key to suffix to path of the complete episodes below a folder, in order; and what is part of none, with the reason."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give the folder that holds the recordings")
    found: dict[str, dict[str, Path]] = {}
    skipped = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")):
        name = spell_name(path.relative_to(folder).as_posix())
        if (split := split_name(name, SUFFIXES)) is None:
            continue
        key, suffix = split
        if folder.resolve() not in path.resolve().parents:
            skipped.append(f"{name}: a link out of the folder, to {path.resolve()}: put a copy in its place")
        elif suffix not in SUFFIXES:
            skipped.append(f"{name}: a dot inside the name: WebDataset ends the key there; rename it without")
        elif suffix in found.setdefault(key, {}):
            skipped.append(f"{name}: {found[key][suffix].name} has the same key and suffix")
        else:
            found[key][suffix] = path
    alone = {key: files for key, files in found.items() if len(files) < len(SUFFIXES)}
    for key, files in alone.items():
        for suffix, path in files.items():
            other = next(it for it in SUFFIXES if it != suffix)
            name = spell_name(path.relative_to(folder).as_posix())
            skipped.append(f"{name}: there is no {key}.{other} beside it")
    return {key: found[key] for key in sorted(found.keys() - alone.keys())}, sorted(skipped)


def write_tar(path: Path, episodes: Mapping[str, Mapping[str, Path]]) -> None:
    """Write one tar shard of these files, by key and suffix; it gets its name when it is complete."""
    from webdataset.writer import TarWriter

    with (
        atomic_file(path) as temporary,
        temporary.open("wb") as file,
        # PAX: names longer than ustar's 256 characters, else the same bytes.
        TarWriter(file, user="user", group="user", mtime=0, encoder=False, format="PAX_FORMAT") as writer,
    ):
        for key, files in episodes.items():
            writer.write({"__key__": key, **{suffix: member.read_bytes() for suffix, member in files.items()}})
