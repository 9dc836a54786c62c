"""WebDataset tar shards: found by folders, globs and ranges, read one sample at a time, measured by headers, and packed."""

from __future__ import annotations

import glob
import os
import posixpath
import re
import tarfile
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from jepa_cache.config.machine import spell_name
from jepa_cache.files import atomic_file, remove_stale_temporaries

BLOCK_BYTES = 512
MAX_MEMBER_BYTES = 4 << 30
"""A member is held in memory as a whole; five minutes of 1280x720 video are below 1 GB."""

MAX_LINE_BYTES: Mapping[str, int] = {"jsonl": 1 << 20}
"""By suffix. Real VPT lines have up to 1.2 kB; a parsed line can take 30 times its bytes in memory."""

MAX_HEADER_BYTES = 1 << 20
HEAD_BYTES = 512
COMPRESSED = {b"\x1f\x8b": "gzip", b"(\xb5/\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2", b"PK\x03\x04": "zip"}
READ_BYTES = 1 << 20


class UnreadableFolderError(ValueError):
    """Folders among the inputs that cannot be listed; the message names them."""


class TarSample(NamedTuple):
    """The members of one key, by suffix; where `problem` is set, the sample must not be used and `members` is empty."""

    key: str
    members: dict[str, bytes]
    problem: str | None


class SamplePlaces(NamedTuple):
    """Where the members of one key lie: suffix to (offset, size) in bytes of the tar shard."""

    key: str
    places: dict[str, tuple[int, int]]
    problem: str | None


def iter_samples(path: Path, suffixes: Container[str]) -> Iterator[TarSample]:
    """Yield the samples of an uncompressed tar shard in the order in which their keys first appear.

    A key is the member's path up to the first dot of its base name, and the suffix is what follows, in lower case and
    without leading dots (`a..MP4` gives key `a`, suffix `mp4`). The members of one key need not be adjacent: the headers
    are read first, then each sample by its offsets. Nothing is ever written to disk.

    Only members whose suffix is in `suffixes` make samples. Reported as a problem, not used: a suffix that a key has
    twice, a link or device in a file's place, an absolute name or one with `..`, a name with a dot inside
    (`a.b.mp4`), members that are cut off, members above 4 GiB, and jsonl members with a line above 1 MiB. A tar that ends
    early, or goes on after its end mark, adds one last sample under the tar's own name that says so; a file that is no
    uncompressed tar at all gives that one alone. A name that is no UTF-8 is spelled as `spell_name` does.

    Args:
        path: The tar shard.
        suffixes: The suffixes that are wanted, in lower case.

    Cost: memory for one sample and for the list of members; the bytes of unwanted members are never read.

    Source: the key rule is webdataset's (`base_plus_ext`), whose own reader needs adjacent members.
    """
    with path.open("rb") as file:
        for key, places, problem in _read_index(path, file, suffixes):
            members: dict[str, bytes] = {}
            for suffix, (offset_bytes, size_bytes) in places.items() if problem is None else ():
                file.seek(offset_bytes)
                if suffix in MAX_LINE_BYTES and (line := _find_long_line(file, size_bytes, MAX_LINE_BYTES[suffix])):
                    problem = f"line {line} of its {suffix} is longer than {MAX_LINE_BYTES[suffix]} bytes"
                    members = {}
                    break
                file.seek(offset_bytes)
                members[suffix] = file.read(size_bytes)
            yield TarSample(key, members, problem)


def list_samples(path: Path, suffixes: Container[str]) -> list[SamplePlaces]:
    """The samples that `iter_samples` would yield, without their bytes. Cost: reads the headers only."""
    with path.open("rb") as file:
        return _read_index(path, file, suffixes)


def _read_index(path: Path, file: BinaryIO, suffixes: Container[str]) -> list[SamplePlaces]:
    size_bytes = os.fstat(file.fileno()).st_size
    places: dict[str, dict[str, tuple[int, int]]] = {}
    faults: dict[str, str] = {}
    end, problem, named = 0, None, False
    try:
        with open_headers(file) as tar:
            for member in iter_headers(tar):
                end = find_end(member)
                if (found := find_key(member, suffixes)) is None:
                    continue
                key, suffix = found
                fault = _find_fault(member, posixpath.normpath(spell_name(member.name)), size_bytes)
                if suffix not in suffixes:
                    fault = fault or f"member {key!r} has a dot inside its name; rename it without"
                named = named or member.offset_data + member.size > size_bytes
                of_key = places.setdefault(key, {})
                if suffix in of_key:
                    fault = fault or f"the tar holds more than one member {suffix!r} of this key"
                of_key[suffix] = (member.offset_data, member.size)
                if fault is not None:
                    faults.setdefault(key, fault)
    # tarfile lets the latter two out of bad pax headers.
    except (tarfile.TarError, ValueError, OverflowError) as error:
        problem = f"the tar is damaged or cut off after byte {end} of {size_bytes} ({error}); what followed is lost"
        if not places and end == 0:
            file.seek(0)
            what = describe_stand_in(file.read(HEAD_BYTES)) or f"copy it again, or make it anew ({error})"
            return [SamplePlaces(spell_name(path.name), {}, f"the file is no uncompressed tar: {what}")]
    samples = [SamplePlaces(key, of_key, faults.get(key)) for key, of_key in places.items()]
    if named:  # A member that was cut off is named by its own sample, and nothing can follow it.
        return samples
    problem = problem or _find_tail_problem(file, end, size_bytes)
    return samples if problem is None else [*samples, SamplePlaces(spell_name(path.name), {}, problem)]


def find_key(member: tarfile.TarInfo, suffixes: Container[str]) -> tuple[str, str] | None:
    """Key and suffix of a member that belongs to a sample; the whole name is the key where the suffix has a dot inside."""
    name = posixpath.normpath(spell_name(member.name))
    key, suffix = split_name(name)
    suffix = suffix.lower().lstrip(".") if suffix else ""
    if member.isdir() or suffix.rpartition(".")[2] not in suffixes:
        return None
    return (key if suffix in suffixes else name), suffix


def find_end(member: tarfile.TarInfo) -> int:
    """The byte behind a member and its padding."""
    if member.islnk() or member.issym():
        return member.offset_data
    return member.offset_data + -(-member.size // BLOCK_BYTES) * BLOCK_BYTES


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


def split_name(name: str) -> tuple[str | None, str | None]:
    """Key and suffix of a member: its path up to the first dot of its base name, and what follows; (None, None) without one.

    Source: webdataset's `base_plus_ext`, with which a test compares it. Importing webdataset imports torch: 3 s.
    """
    match = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", name)
    return (match[1], match[2]) if match else (None, None)


class HeaderFile:
    """A tar as `tarfile` sees it while headers are listed: a header that claims to be huge is refused, not read.

    A pax or long-name header may have any length, and tarfile reads it as a whole.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        """The next `size` bytes; a tarfile.ReadError where that is more than a header has."""
        if size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes; at most {MAX_HEADER_BYTES} are read")
        return self._file.read(size)


def _find_long_line(file: BinaryIO, size_bytes: int, max_bytes: int) -> int | None:
    """The number, counted from 1, of the first line longer than `max_bytes` in the next `size_bytes`; one block at a time."""
    number, length = 1, 0
    while size_bytes and (block := file.read(min(READ_BYTES, size_bytes))):
        size_bytes -= len(block)
        start = 0
        while (end := block.find(b"\n", start)) >= 0:
            if length + end - start > max_bytes:
                return number
            number, length, start = number + 1, 0, end + 1
        length += len(block) - start
        if length > max_bytes:
            return number
    return None


def open_headers(file: BinaryIO) -> tarfile.TarFile:
    """A tar whose headers are to be listed. Names are read as UTF-8 whatever the locale says: they become keys."""
    return tarfile.open(fileobj=HeaderFile(file), mode="r:", encoding="utf-8", errors="surrogateescape")


def iter_headers(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of a tar in their order, one header at a time."""
    while (member := tar.next()) is not None:
        if member.size < 0:  # Some Python versions would read the same header for ever.
            raise tarfile.ReadError(f"member {member.name!r} has a negative size")
        yield member


def _find_fault(member: tarfile.TarInfo, name: str, size_bytes: int) -> str | None:
    if not member.isreg() or member.issparse():
        return f"member {name!r} is a link, a device or a sparse file; only plain files are read"
    if name.startswith("/") or ".." in name.split("/"):
        return f"member {name!r} has an absolute name or one that leaves its folder"
    if member.offset_data + member.size > size_bytes:
        return (
            f"member {name!r} is cut off: it ends at byte {member.offset_data + member.size}, the tar at {size_bytes}; what "
            "followed is lost"
        )
    if member.size > MAX_MEMBER_BYTES:
        return f"member {name!r} has {member.size} bytes; at most {MAX_MEMBER_BYTES} are read into memory"
    return None


def _find_tail_problem(file: BinaryIO, end: int, size_bytes: int) -> str | None:
    """Check that an end mark and nothing else follows the last member; `tarfile` stops at a bad header silently."""
    if end + BLOCK_BYTES > size_bytes:
        return f"the tar has no end mark: it was cut off at byte {size_bytes}, and members may be lost"
    file.seek(end)
    while block := file.read(1 << 20):
        if np.frombuffer(block, np.uint8).any():
            return (
                f"after its last readable member (byte {end} of {size_bytes}) the tar goes on with data that is no "
                "member: a damaged header, or tars that were joined with cat. What follows is not read"
            )
    return None


def expand_inputs(inputs: Sequence[str], base: Path, suffix: str = ".tar") -> list[Path]:
    """Find the files that inputs name: folders (searched recursively), files, globs, `{000000..000123}` brace ranges.

    Args:
        inputs: Absolute, or relative to `base`; `~` is the home folder. Every name of a brace range must exist.
        base: The folder that relative inputs start from.
        suffix: The ending of the files that are wanted.

    Returns:
        The files, sorted by path, each once (a file that is reached by several names or links counts once). Hidden files
        are left out.

    Raises:
        ValueError: An input, or a name of its brace range, finds nothing, or is a file of another form.
    """
    from braceexpand import braceexpand

    found: dict[Path, Path] = {}
    for pattern in inputs:
        # A file or folder of exactly this name wins over reading its brackets as a pattern.
        literal = base / Path(pattern).expanduser()
        names = [pattern] if literal.exists() else list(braceexpand(pattern))
        missing = []
        for name in names:
            paths = _match_input(base / Path(name).expanduser(), suffix)
            if not paths:
                missing.append(name)
            for path in paths:
                found.setdefault(real_path(path), path)
        if missing:
            also = (
                f" (nothing for {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''})"
                if len(names) > 1
                else ""
            )
            raise ValueError(
                f"the input {pattern!r} finds no *{suffix} file{also}; relative inputs start from {base}. "
                f"Give a folder, a file, a glob in quotes or a brace range such as 'x-{{000000..000123}}{suffix}'"
            )
    return sorted(found.values())


def _match_input(path: Path, suffix: str) -> list[Path]:
    matches = [path] if path.exists() else [Path(match) for match in glob.glob(str(path), recursive=True)]  # noqa: PTH207
    files = []
    for match in matches:
        if match.is_dir():
            files += [folder / name for folder, _, names in walk(match) for name in names if name.endswith(suffix)]
        elif match.name.endswith(suffix):
            files.append(match)
    return files


def walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """`os.walk` of a folder, sorted, without hidden names; links are followed, as data folders on clusters often are links.

    Each folder comes once. Take names out of the second list to leave folders out.

    Raises:
        UnreadableFolderError: At the end, where folders could not be listed: nobody knows how many recordings lie in them.
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
        places = ", ".join(f"{error.filename} ({error.strerror})" for error in refused[:5])
        raise UnreadableFolderError(
            f"{len(refused)} folders below {folder} cannot be read, and what lies in them would be missing: {places}"
            f"{', ...' if len(refused) > 5 else ''}. Let them be read, or name the others as inputs"
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
