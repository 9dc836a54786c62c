"""DROID as a TFDS (RLDS) directory, and robot data sets of the same form by a key map; read without TensorFlow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from jepa_cache.config.parsing import nearest, parse_dataclass
from jepa_cache.config.paths import require, spell_name
from jepa_cache.episode import Episode, RecordingError, Skipped
from jepa_cache.media.images import FrameSequence
from jepa_cache.media.probe import probe_video
from jepa_cache.media.remote import BucketFile
from jepa_cache.media.tar import expand_inputs, real_path
from jepa_cache.poses import find_episode_key
from jepa_cache.sources import Unit
from jepa_cache.sources.droid_raw import build_controls
from jepa_cache.sources.parsers.placement import DROID_HZ
from jepa_cache.sources.parsers.tfrecords import (
    FEATURES_FILE,
    STEPS,
    Features,
    iter_records,
    list_bucket,
    parse_shard_name,
)

RECIPE_VERSION = 1
"""Raised whenever controls, frames or fps of an unchanged recording change."""

MAX_COUNTED = 10_000
"""Records of a shard that are counted as missing: shards of DROID hold some 50, and what lists them may be wrong."""

EXTRINSICS = {
    "exterior_1": "episode_metadata/extrinsics_exterior_cam_1",
    "exterior_2": "episode_metadata/extrinsics_exterior_cam_2",
}
"""Camera to the feature of its pose in the base frame (6 numbers, one per episode), used where the directory has it (DROID since 1.0.1).
None for the wrist camera: it moves, and 1.0.1 holds one pose for the whole episode; droid_raw has its pose in every row."""

SomeFeatures = Annotated[tuple[str, ...], Field(min_length=1)]


@dataclass(frozen=True)
class RldsOptions:
    """Options of the source. Features are named by their paths; the defaults are DROID's.

    Attributes:
        camera: A name in `cameras`. The two exterior ones are in no fixed order: each may stand left or right.
        split: Split of the TFDS directory.
        native_hz: Steps per second; TFDS does not say.
        cameras: Name to picture feature.
        pose: Features whose columns, one after the other, are the 7 of a pose: x, y, z (m), extrinsic xyz Euler angles
            (rad), gripper.
        command: The same of the commanded absolute pose; empty where there is none.
        joint_velocity_command: Feature of 7 commanded joint velocities (rad/s), for `idle`; null where there is none.
        success: Feature of a path or text that contains "success" in successful episodes, or of true and false; null
            where it is not known.
        episode_key: Features that together name an episode.
        gripper_one_is: What a gripper of 1 means: "closed" (DROID) or "open" (BridgeData), which is turned over.
    """

    camera: str = "exterior_1"
    split: str = "train"
    native_hz: Annotated[float, Field(gt=0)] = DROID_HZ
    cameras: dict[str, str] = field(
        default_factory=lambda: {
            "exterior_1": "steps/observation/exterior_image_1_left",
            "exterior_2": "steps/observation/exterior_image_2_left",
            "wrist": "steps/observation/wrist_image_left",
        }
    )
    pose: SomeFeatures = ("steps/observation/cartesian_position", "steps/observation/gripper_position")
    command: tuple[str, ...] = ("steps/action_dict/cartesian_position", "steps/action_dict/gripper_position")
    joint_velocity_command: str | None = "steps/action_dict/joint_velocity"
    success: str | None = "episode_metadata/file_path"
    episode_key: SomeFeatures = ("episode_metadata/recording_folderpath", "episode_metadata/file_path")
    gripper_one_is: Literal["closed", "open"] = "closed"

    def __post_init__(self) -> None:
        if self.camera not in self.cameras:
            raise ValueError(
                f"droid_rlds source: there is no camera {self.camera!r}{nearest(self.camera, list(self.cameras))}"
            )
        per_episode = [name for name in (*self.episode_key, self.success) if name and name.startswith(STEPS)]
        per_step = [name for name in self.cameras.values() if not name.startswith(STEPS)]
        if per_episode or per_step:
            raise ValueError(
                f"droid_rlds source: cameras are features of {STEPS}*, success and episode_key are of the episode; got "
                f"{(per_episode + per_step)[0]!r}"
            )


def build(options: Mapping[str, Any]) -> DroidRldsSource:
    """Make the source from the `source_options` of a preset; a ValueError for an unknown option or a wrong value."""
    return DroidRldsSource(parse_dataclass(RldsOptions, options, "source_options of droid_rlds"))


class DroidRldsSource:
    """Reads TFDS directories of episodes. A unit is a tfrecord shard with features.json.

    Frame t shows the state of step t, before its action. No picture is decoded here.
    """

    def __init__(self, options: RldsOptions) -> None:
        self.options = options
        settings = asdict(options)
        # Of the maps only what this camera reads: a change for another camera changes nothing here.
        self.picture = settings["cameras"] = options.cameras[options.camera]
        self.extrinsics = settings["extrinsics"] = EXTRINSICS.get(options.camera)
        self.recipe: dict[str, object] = {
            "source": "droid_rlds",
            "recipe_version": RECIPE_VERSION,
            **{name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()},
        }

    def list_units(self, inputs: Sequence[str], base: Path) -> list[Unit]:
        """Find tfrecord shards of the split: TFDS directories (or folders above them), files, globs, brace ranges, gs://.

        Shards that are not there are no error: a part of DROID can be used, but a line says how many there are.
        """
        require("tensorflow_datasets", "droid-rlds", "source droid_rlds")
        folders: dict[str, dict[Path | BucketFile, Path | BucketFile]] = {}
        for given in inputs:
            paths = list_bucket(given) if "://" in given else expand_inputs([given], base, "*.tfrecord-*")
            names = {path: name for path in paths if (name := parse_shard_name(path.name))}
            found = [path for path, name in names.items() if name.split == self.options.split]
            if not found:
                raise ValueError(
                    f"the input {given!r} finds no tfrecord shard of the split {self.options.split!r}; its splits are "
                    f"{', '.join(sorted({name.split for name in names.values()})) or 'none'}. Give a TFDS directory (the folder "
                    f"that holds {FEATURES_FILE}) or its tfrecord files"
                )
            for path in found:
                folders.setdefault(str(path).rpartition("/")[0], {}).setdefault(real_path(path), path)
        units, seen = [], set[Path | BucketFile]()
        for folder, shards in sorted(folders.items()):
            features = next(iter(shards.values())).with_name(FEATURES_FILE)
            if not features.is_file():
                raise ValueError(f"{folder} holds tfrecord shards but no {FEATURES_FILE}, which says what is in them")
            total = max(parse_shard_name(path.name).count for path in shards.values())
            if len(shards) < total:
                print(f"note: {folder} holds {len(shards)} of the {total} tfrecord shards of its split")
            new = [path for real, path in shards.items() if real not in seen]
            seen |= shards.keys()
            units += [Unit(spell_name("/".join(path.parts[-3:])), (path, features)) for path in sorted(new, key=str)]
        return units

    def iter_episodes(self, unit: Unit) -> Iterator[Episode | Skipped]:
        """Yield the episodes of a tfrecord shard in its order, one in memory at a time.

        Each record that dataset_info.json lists and the shard lacks, because it is short, damaged or no TFRecord file,
        is one skipped.
        """
        file_name, features = spell_name(unit.path.name), self._open_features(unit.files[1])
        num_records, keys = 0, set[str]()
        for record in iter_records(unit.path):
            key = f"{file_name}#{record.index}"
            num_records = record.index + 1
            try:
                if record.problem is not None:
                    raise RecordingError(record.problem)
                example = features.decode(record.data)
                text = "--".join(_to_text(example[part]) for part in self.options.episode_key)
                if (name := find_episode_key(text) or text.lstrip("/")) in keys:
                    raise RecordingError(
                        f"an earlier record of this shard has the same name, {name!r}; name more features in episode_key"
                    )
                keys.add(name)
                key = name
                yield self._read_episode(name, example)
            except ValueError as error:  # RecordingError and DecodeError, and columns that numpy cannot join.
                yield Skipped(key, str(error))
        shard = parse_shard_name(unit.path.name)
        expected = features.count_records(shard.split, shard.index) if shard else None
        for index in range(num_records, min(expected or 0, num_records + MAX_COUNTED)):
            reason = f"dataset_info.json lists {expected} records, the shard ends before this one; fetch it again"
            yield Skipped(f"{file_name}#{index}", reason)

    def name_skipped(self, unit: Unit, key: str) -> str:
        """A record that has no name of its own by the shard's present name; see `Source`."""
        shard, _, index = key.rpartition("#")
        return f"{spell_name(unit.path.name)}#{index}" if parse_shard_name(shard) else key

    def _open_features(self, path: Path | BucketFile) -> Features:
        options = self.options
        wanted = [self.picture, *options.pose, *options.command, *options.episode_key]
        wanted += [name for name in (options.joint_velocity_command, options.success) if name is not None]
        return Features(path, tuple(dict.fromkeys(wanted)), optional=(self.extrinsics,) if self.extrinsics else ())

    def _read_episode(self, key: str, example: Mapping[str, Any]) -> Episode:
        options = self.options
        lengths = {name: len(value) for name, value in example.items() if name.startswith(STEPS)}
        if len(set(lengths.values())) > 1:
            raise RecordingError(f"its features have different numbers of steps: {lengths}")
        num_steps = lengths[self.picture]
        if num_steps == 0:
            raise RecordingError("the episode has no steps")
        pictures = tuple(example[self.picture])
        if not all(isinstance(picture, bytes) for picture in pictures):
            raise RecordingError(f"{self.picture} holds no encoded pictures")
        video = FrameSequence(pictures, options.native_hz)
        info = probe_video(video)
        poses = _read_columns(example, num_steps, *options.pose)
        commands = _read_columns(example, num_steps, *options.command)
        if options.gripper_one_is == "open":
            for array in (poses, commands):
                if array is not None:
                    array[:, -1] = 1 - array[:, -1]
        controls = build_controls(
            poses,
            commands,
            _read_columns(example, num_steps, options.joint_velocity_command),
            _read_columns(example, num_steps, self.extrinsics),
            _read_success(example[options.success]) if options.success else None,
        )
        return Episode(
            key=key,
            video=video,
            fps=info.fps,
            controls=controls,
            frame_ticks=np.arange(info.num_frames, dtype=np.int64),
            num_video_frames=info.num_frames,
        )


def _read_columns(example: Mapping[str, Any], num_steps: int, *names: str | None) -> np.ndarray | None:
    """[M, C] float64: the columns of these features, one after the other; those of an episode are the same in every row.

    Names that are None or that the directory lacks give no column; None where none is left.
    """
    parts = []
    for name in (name for name in names if name in example):
        values = np.asarray(example[name], np.float64)
        values = values.reshape(num_steps, -1) if name.startswith(STEPS) else np.tile(values.ravel(), (num_steps, 1))
        parts.append(values)
    return np.concatenate(parts, axis=1) if parts else None


def _read_success(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if not isinstance(value, str | bytes):
        raise RecordingError(f"success must be a text, or true or false; got {repr(value)[:60]}")
    return "success" in _to_text(value)


def _to_text(value: Any) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
