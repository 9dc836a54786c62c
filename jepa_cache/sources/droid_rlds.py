"""DROID as a TFDS (RLDS) directory, and robot data sets of the same form by a key map; read without TensorFlow."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jepa_cache.config.parsing import nearest, parse_dataclass
from jepa_cache.episode import Episode, Skipped
from jepa_cache.idle import find_episode_key
from jepa_cache.media.images import FrameSequence
from jepa_cache.media.video import probe_video
from jepa_cache.sources import Unit
from jepa_cache.sources._droid_rows import NATIVE_HZ, RecordingError, Rows, build_controls
from jepa_cache.sources._tfrecords import FEATURES_FILE, Features, iter_records, parse_shard_name, read_path

RECIPE_VERSION = 1
"""Raised whenever controls, frames or fps of an unchanged recording change."""

GRIPPERS = ("closed", "open")


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
        extrinsics: Name of a camera to the feature of its pose in the base frame (6 numbers, one per episode), used where the
            directory has it (DROID since 1.0.1). The wrist camera moves, so it has none.
        success: Feature of a path or text that contains "success" in successful episodes; null where it is not known.
        episode_key: Features that together name an episode.
        gripper_one_is: What a gripper of 1 means: "closed" (DROID) or "open" (BridgeData), which is turned over.
    """

    camera: str = "exterior_1"
    split: str = "train"
    native_hz: float = NATIVE_HZ
    cameras: dict[str, str] = field(
        default_factory=lambda: {
            "exterior_1": "steps/observation/exterior_image_1_left",
            "exterior_2": "steps/observation/exterior_image_2_left",
            "wrist": "steps/observation/wrist_image_left",
        }
    )
    pose: tuple[str, ...] = ("steps/observation/cartesian_position", "steps/observation/gripper_position")
    command: tuple[str, ...] = ("steps/action_dict/cartesian_position", "steps/action_dict/gripper_position")
    joint_velocity_command: str | None = "steps/action_dict/joint_velocity"
    extrinsics: dict[str, str] = field(
        default_factory=lambda: {
            "exterior_1": "episode_metadata/extrinsics_exterior_cam_1",
            "exterior_2": "episode_metadata/extrinsics_exterior_cam_2",
        }
    )
    success: str | None = "episode_metadata/file_path"
    episode_key: tuple[str, ...] = ("episode_metadata/recording_folderpath", "episode_metadata/file_path")
    gripper_one_is: str = "closed"

    def __post_init__(self) -> None:
        """Check the values."""
        if self.camera not in self.cameras:
            raise ValueError(
                f"droid_rlds source: there is no camera {self.camera!r}{nearest(self.camera, list(self.cameras))}"
            )
        if self.gripper_one_is not in GRIPPERS:
            raise ValueError(f"droid_rlds source: gripper_one_is must be closed or open; got {self.gripper_one_is!r}")
        if not self.native_hz > 0:
            raise ValueError(f"droid_rlds source: native_hz must be positive; got {self.native_hz}")
        if not self.pose or not self.episode_key:
            raise ValueError("droid_rlds source: pose and episode_key must each name at least one feature")


def build(options: Mapping[str, Any]) -> DroidRldsSource:
    """Make the source from the `source_options` of a preset.

    Raises:
        ValueError: An unknown option (the nearest known one is named) or a wrong value.
    """
    return DroidRldsSource(parse_dataclass(RldsOptions, options, "source_options of droid_rlds"))


class DroidRldsSource:
    """Reads TFDS directories of episodes; holds its options and nothing else. A unit is a tfrecord shard with features.json.

    Frame t shows the state of step t, before its action. The pictures of other cameras are never decoded, nor are any here.
    """

    def __init__(self, options: RldsOptions) -> None:
        """Hold the options."""
        self.options = options
        settings = asdict(options)
        # Of the maps only what this camera reads: a change for another camera changes nothing here.
        settings["cameras"] = options.cameras[options.camera]
        settings["extrinsics"] = options.extrinsics.get(options.camera)
        self.recipe: dict[str, object] = {
            "source": "droid_rlds",
            "recipe_version": RECIPE_VERSION,
            **{name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()},
        }

    def list_units(self, inputs: Sequence[str], base: Path) -> list[Unit]:
        """Find tfrecord shards of the split: TFDS directories (or folders above them), files, globs, brace ranges, gs://.

        Shards that are not there are no error: a part of DROID can be used, but a line says how many there are.

        Raises:
            ValueError: An input finds no shard, or a shard has no features.json beside it.
        """
        shards: dict[Path, Path] = {}
        for given in inputs:
            paths = _list_remote(given) if "://" in given else _list_local(given, base)
            found = [
                path for path in paths if (name := parse_shard_name(path.name)) and name.split == self.options.split
            ]
            if not found:
                splits = sorted({name.split for path in paths if (name := parse_shard_name(path.name))})
                there = f"; its splits are {', '.join(splits)}" if splits else ""
                raise ValueError(
                    f"the input {given!r} finds no tfrecord shard of the split {self.options.split!r}{there}. Give a TFDS "
                    f"directory (the folder that holds {FEATURES_FILE}) or its tfrecord files; relative inputs start from {base}"
                )
            for path in found:
                shards.setdefault(path if "://" in given else path.resolve(), path)
        by_folder: dict[Path, list[Path]] = {}
        for path in sorted(shards.values()):
            by_folder.setdefault(path.parent, []).append(path)
        for folder, paths in by_folder.items():
            if not (folder / FEATURES_FILE).exists():
                raise ValueError(f"{folder} holds tfrecord shards but no {FEATURES_FILE}, which says what is in them")
            total = max(parse_shard_name(path.name).count for path in paths)
            if len(paths) < total:
                print(f"note: {folder} holds {len(paths)} of the {total} tfrecord shards of its split")
        return [
            Unit("/".join(path.parts[-3:]), (path, path.parent / FEATURES_FILE))
            for paths in by_folder.values()
            for path in paths
        ]

    def iter_episodes(self, unit: Unit) -> Iterator[Episode | Skipped]:
        """Yield the episodes of a tfrecord shard in its order, one in memory at a time.

        Skipped, with the reason: a damaged record, one that does not fit features.json, an episode without steps, with a
        picture that is none, or with the name of an earlier one; and, once, what a damaged or short shard lacks.

        Raises:
            ValueError: The file is no TFRecord file, or the directory lacks a feature that the options name.
        """
        path = unit.files[0]
        features = self._open_features(path.parent)
        num_records, keys = 0, set()
        for record in iter_records(path):
            name = f"{path.name}#{record.index}"
            num_records = record.index + 1
            if record.problem is not None:
                yield Skipped(name, record.problem)
                continue
            try:
                example = features.decode(record.data)
            except ValueError as error:
                yield Skipped(name, str(error))
                continue
            key = self._name_episode(example)
            if key in keys:
                yield Skipped(name, f"an earlier record of this shard has the same name, {key!r}")
                continue
            keys.add(key)
            try:
                yield self._read_episode(features, key, example)
            except ValueError as error:  # RecordingError and DecodeError, and columns that numpy cannot join.
                yield Skipped(key, str(error))
        shard = parse_shard_name(path.name)
        expected = features.count_records(shard.split, shard.index) if shard else None
        if expected is not None and num_records < expected:
            yield Skipped(
                f"{path.name}#{num_records}",
                f"the shard holds {num_records} records where dataset_info.json lists {expected}; fetch it again",
            )

    def _open_features(self, folder: Path) -> Features:
        options = self.options
        wanted = [options.cameras[options.camera], *options.pose, *options.command, *options.episode_key]
        wanted += [name for name in (options.joint_velocity_command, options.success) if name is not None]
        extrinsics = options.extrinsics.get(options.camera)
        return Features(folder, tuple(dict.fromkeys(wanted)), optional=(extrinsics,) if extrinsics else ())

    def _name_episode(self, example: Mapping[str, Any]) -> str:
        name = "--".join(_to_text(read_path(example, part)) for part in self.options.episode_key)
        return find_episode_key(name) or name.lstrip("/")

    def _read_episode(self, features: Features, key: str, example: Mapping[str, Any]) -> Episode:
        options = self.options
        steps = example["steps"]
        if not steps:
            raise RecordingError("the episode has no steps")
        video = FrameSequence(
            tuple(_read(example, step, options.cameras[options.camera]) for step in steps), options.native_hz
        )
        info = probe_video(video)
        poses = _read_columns(example, steps, options.pose)
        commands = _read_columns(example, steps, options.command) if options.command else None
        if options.gripper_one_is == "open":
            for array in (poses, commands):
                if array is not None:
                    array[:, -1] = 1 - array[:, -1]
        joints, success = options.joint_velocity_command, options.success
        extrinsics = options.extrinsics.get(options.camera)
        rows = Rows(
            poses,
            commands,
            _read_columns(example, steps, (joints,)) if joints else None,
            _read_columns(example, steps, (extrinsics,)) if extrinsics in features.names else None,
            "success" in _to_text(read_path(example, success)) if success else None,
        )
        return Episode(
            key=key,
            video=video,
            fps=info.fps,
            controls=build_controls(rows),
            frame_ticks=np.arange(info.num_frames, dtype=np.int64),
            num_video_frames=info.num_frames,
        )


def _read(example: Mapping[str, Any], step: Mapping[str, Any], name: str) -> Any:
    """A feature of a step, or of the whole episode."""
    return read_path(step, name.removeprefix("steps/")) if name.startswith("steps/") else read_path(example, name)


def _read_columns(example: Mapping[str, Any], steps: Sequence[Mapping[str, Any]], names: Sequence[str]) -> np.ndarray:
    """[M, C] float64: the columns of these features, one after the other."""
    parts = [np.array([np.ravel(_read(example, step, name)) for step in steps], np.float64) for name in names]
    return np.concatenate(parts, axis=1)


def _to_text(value: Any) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def _list_local(given: str, base: Path) -> list[Path]:
    from braceexpand import braceexpand

    literal = base / Path(given).expanduser()
    found: list[Path] = []
    for name in [given] if literal.exists() else braceexpand(given):
        path = base / Path(name).expanduser()
        for match in [path] if path.exists() else [Path(match) for match in glob.glob(str(path), recursive=True)]:  # noqa: PTH207
            # glob.glob, not Path.rglob: links to folders are followed, as data folders on clusters often are links.
            inside = glob.glob(f"{glob.escape(str(match))}/**/*.tfrecord-*", recursive=True)  # noqa: PTH207
            found += [Path(name) for name in inside] if match.is_dir() else [match]
    return found


def _list_remote(given: str) -> list[Path]:
    """The files of a TFDS directory on gs://; etils reads them through gcsfs or TensorFlow, whichever is there."""
    from etils import epath

    try:
        return list(epath.Path(given).iterdir())
    except ImportError as error:
        raise ValueError(
            f"{given} cannot be read without gcsfs: type `pip install gcsfs`, or copy the directory with "
            f"`gsutil -m cp -r {given} DIR` and give DIR"
        ) from error
    except Exception as error:
        raise ValueError(
            f"{given} cannot be listed ({type(error).__name__}: {error}). Is the network reachable, and is it the folder that "
            f"holds {FEATURES_FILE}? Or copy it with `gsutil -m cp -r {given} DIR` and give DIR"
        ) from error
