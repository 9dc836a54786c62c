"""Sources: one module per data set, the only place that knows a data set's quirks; found by their file names.

A module `jepa_cache/sources/<name>.py` is a source when it has `build(options) -> Source`, and so is a file of a user's own that a preset
names by its path. What several of them share lies in `parsers/`; files that begin with an underscore are no sources either.
"""

from __future__ import annotations

import importlib
import itertools
import os
import pkgutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

from jepa_cache.config.parsing import nearest
from jepa_cache.config.paths import spell_name
from jepa_cache.episode import Episode, Skipped
from jepa_cache.media.remote import BucketFile


class Unit(NamedTuple):
    """One unit of input, the unit of crash safety: normally one tar shard. `name` is for messages only.

    Without tar shards, a unit is of files that belong together whatever else is added: an episode's folder, say.
    """

    name: str
    files: tuple[Path | BucketFile, ...]
    digest: str = ""  # sha256 of its content; empty as a source lists it

    @property
    def path(self) -> Path | BucketFile:
        """The first file; the only one of a tar shard."""
        return self.files[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in self.files)


class Source(Protocol):
    """A data set's reader.

    One whose keys of skipped recordings hold names of files or folders may also have `name_skipped(unit, key) -> str`:
    what the recording is called now, where a store was made under an earlier name. One whose units are the files of one recording may
    have `split_files(files) -> list`, the files of each recording of a unit that `encode.episodes_per_unit` has joined.

    Attributes:
        recipe: The source's name, its RECIPE_VERSION and every option that changes controls or frames; JSON types only.
    """

    recipe: dict[str, object]

    def list_units(self, inputs: Sequence[str], base: Path) -> list[Unit]:
        """Find the units that `inputs` name, in a fixed order: folders, files, globs and brace ranges, relative to `base`.

        Raises:
            ValueError: An input that finds nothing, or something that is no unit of this source.
        """
        ...

    def iter_episodes(self, unit: Unit) -> Iterator[Episode | Skipped]:
        """Yield the recordings of one unit in its order, one in memory at a time; a bad one as Skipped, others go on.

        What it yields follows from the unit's files alone: who looks at frames later knows no name of the unit.

        What its bytes show (no tar, cut off, fewer recordings than are listed) is yielded as Skipped, once for each
        recording that is known to be missing: it is then a property of the content and kept with it.

        Raises:
            ValueError, OSError: The unit cannot be read, or not to its end; tried again in every run.
        """
        ...


def find_obstacle(unit: Unit) -> str | None:
    """Why a unit must not even be opened: a file that is gone, or a pipe or device, which would be waited for for ever."""
    try:
        for file in unit.files:
            if not file.is_file():
                what = "is a link to a file that is not there" if file.is_symlink() else "is no plain file, or is gone"
                return f"{spell_name(file.name)} {what}"
    except OSError as error:  # a folder on the way that may not be entered
        return describe_unreadable(error)
    return None


def describe_unreadable(error: Exception) -> str:
    """Why a unit cannot be read, without a path: it goes into the manifest."""
    if isinstance(error, OSError):
        name = spell_name(Path(os.fsdecode(error.filename)).name) if isinstance(error.filename, str | bytes) else "it"
        return f"{name} cannot be read: {error.strerror or error}"
    return spell_name(str(error))


def iter_recordings(source: Source, unit: Unit) -> Iterator[Episode | Skipped]:
    """The recordings of a unit; where it cannot be read, or not to its end, the last one is skipped under the unit's name."""
    if (obstacle := find_obstacle(unit)) is not None:
        yield Skipped(unit.name, obstacle)
        return
    try:
        yield from source.iter_episodes(unit)
    except (ValueError, OSError) as error:
        yield Skipped(unit.name, describe_unreadable(error))


def iter_as_stored(source: Source, unit: Unit, episodes: Sequence[str], skipped: Sequence[str]) -> Iterator[Episode]:
    """The episodes of a unit under the keys that a store has of them; without those that it lacks, or that cannot be told.

    `episodes` are the keys of the store's recordings in the order of the unit, `skipped` those of what was skipped when it was made.
    """
    left = list(episodes)
    for recording in source.iter_episodes(unit):
        if isinstance(recording, Episode) and (key := take_key(recording.key, left, skipped)) is not None:
            yield replace(recording, key=key)


def take_key(key: str, left: list[str], skipped: Sequence[str]) -> str | None:
    """What a store calls a recording that is called `key` now; None where it holds none such, or that cannot be told.

    A store keeps the first names. Folders may have others since, but a unit of the same digest has its recordings in the same order: of
    equal last parts, such as `ep00` of two folders, the first is the first that is `left`. Not so where one of them was skipped:
    then the whole key decides. Where one is left and none was skipped, there is no doubt. Removes from `left` what is found and all before it.
    """
    last = _last_part(key)
    alone = len(left) == 1 and not skipped
    doubtful = last in map(_last_part, skipped)
    for place, known in enumerate(left):
        if alone or known == key or (not doubtful and _last_part(known) == last):
            del left[: place + 1]
            return known
    return None


def _last_part(key: str) -> str:
    return key.rpartition("/")[2]


def list_sources() -> list[str]:
    """Names of all sources, sorted; imports none of them."""
    return sorted(
        module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg and module.name[0] != "_"
    )


def build_source(name: str, options: Mapping[str, Any]) -> Source:
    """Make the source of the module `name`, or of the file `name` where it ends in .py, with the options of a data set preset.

    Raises:
        ValueError: An unknown source or option (the nearest known one is named), or a wrong value.
    """
    if name.endswith(".py"):
        return _import_file(Path(name)).build(dict(options))
    known = list_sources()
    if name not in known:
        raise ValueError(f"there is no source called {name!r}{nearest(name, known)}")
    return importlib.import_module(f"{__name__}.{name}").build(dict(options))


def _import_file(path: Path) -> ModuleType:
    """Import a file by its own name, so that worker processes, which have the same search path, find what it defines."""
    if not path.is_file():
        raise ValueError(f"there is no source file {path}; a path is meant from the folder of params.yaml")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # last: what lies beside it hides no library
    module = importlib.import_module(path.stem)
    if module.__file__ != str(path):
        raise ValueError(f"another module is called {path.stem!r} ({module.__file__}); give {path} a name of its own")
    if not hasattr(module, "build"):
        raise ValueError(f"{path} has no function build(options), which makes the source")
    return module


MAX_ENTRIES = 20_000
"""Names that are looked at: a raw release has millions, and what it is shows in the first of them."""

PACKING = (
    "`jepa-cache pack {folder} OUT` makes tar shards of .mp4 + .jsonl pairs such as {file} for dataset=vpt; "
    "docs/add_a_dataset.md says what other videos need"
)
FORMS = {
    "trajectory.h5": "droid_raw",
    "*.tfrecord-*": "droid_rlds",
    "meta/info.json": "lerobot",
    "*.tar": "vpt",
    "*.jsonl": "",
    "*.json": "mp4_json",
    "*.mp4": "",
}
"""Pattern of a file to the source that reads its form, empty where the files must be packed; the most telling form first."""


def suggest_source(folder: Path, source: str) -> str | None:
    """What reads the files in a folder, by their names; None where nothing is known to, or it is `source` itself."""
    walked = (Path(parent, name) for parent, _, names in os.walk(folder) for name in sorted(names))
    files = list(itertools.islice(walked, MAX_ENTRIES))
    with_videos = any(file.suffix == ".mp4" for file in files)
    for pattern, reader in FORMS.items():
        file = next((file for file in files if file.match(pattern)), None)
        if file is not None and (with_videos or not pattern.startswith("*.json")):
            words = (
                "dataset={reader} (see configs/dataset/{reader}.yaml) reads files such as {file}" if reader else PACKING
            )
            return (
                None if reader == source else words.format(file=file.relative_to(folder), folder=folder, reader=reader)
            )
    return None
