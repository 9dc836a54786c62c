"""Makers of DROID episodes in the RLDS and the raw form, from made poses and frames or from the real ones where they are."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np
from PIL import Image

from tests.makers import make_video

REAL_DROID = Path(__file__).resolve().parents[2] / "shared" / "data" / "droid"
REAL_BRIDGE = REAL_DROID.parent / "other" / "bridge_rlds" / "1.0.0"
"""Optional folders of real recordings; a test that needs them skips where they are absent."""

CAMERAS = ("exterior_1", "exterior_2", "wrist")
SERIALS = {"exterior_1": "24400334", "exterior_2": "22246076", "wrist": "18026681"}
FEATURE_OF = {
    "exterior_1": "exterior_image_1_left",
    "exterior_2": "exterior_image_2_left",
    "wrist": "wrist_image_left",
}


@dataclass(frozen=True)
class Recorded:
    """One episode before it is laid out: M rows, and an mp4 per camera."""

    name: str
    poses: np.ndarray  # [M, 7]
    commands: np.ndarray  # [M, 7]
    joint_velocities: np.ndarray  # [M, 7], commanded
    success: bool
    videos: dict[str, bytes]

    def thin(self, stride: int) -> Recorded:
        """Every stride-th row, the videos as they are."""
        rows = {name: getattr(self, name)[::stride] for name in ("poses", "commands", "joint_velocities")}
        return replace(self, **rows)


def read_real(limit: int | None = None) -> list[Recorded]:
    """The real episodes: 15 Hz rows with 5 Hz videos, every 3rd row has a frame."""
    files = sorted((REAL_DROID / "annotation").glob("*/*.json"))[:limit]
    episodes = []
    for file in files:
        data = json.loads(file.read_text())
        columns = {key: np.array(value) for key, value in data.items() if key.startswith(("observation", "action"))}
        videos = REAL_DROID / "videos" / file.parent.name / file.stem
        episodes.append(
            Recorded(
                f"{file.parent.name}-{file.stem}",
                _join(columns, "observation.state"),
                _join(columns, "action"),
                columns["action.joint_velocity"],
                bool(data["success"]),
                {camera: (videos / f"{index}.mp4").read_bytes() for index, camera in enumerate(CAMERAS)},
            )
        )
    return episodes


def _join(columns, prefix):
    return np.concatenate(
        (columns[f"{prefix}.cartesian_position"], columns[f"{prefix}.gripper_position"].reshape(-1, 1)), axis=1
    )


def make_episode(
    seed: int = 0,
    num_rows: int = 24,
    *,
    num_frames: int | None = None,
    fps: int = 15,
    size: tuple[int, int] = (48, 64),
    success: bool = True,
) -> Recorded:
    """An episode whose first Euler angle crosses pi, at rest in its second third; the cameras see different things."""
    rng = np.random.default_rng(seed)
    poses = np.cumsum(rng.normal(0, 0.01, (num_rows, 7)), axis=0)
    poses[:, 3] = (poses[:, 3] + np.pi + 0.02 + np.pi) % (2 * np.pi) - np.pi
    poses[:, 6] = rng.random(num_rows)
    velocities = rng.normal(0, 0.3, (num_rows, 7))
    velocities[num_rows // 3 : 2 * num_rows // 3] = velocities[num_rows // 3]
    frames = num_rows if num_frames is None else num_frames
    videos = {camera: make_video(frames, 10 * seed + i, fps=fps, size=size) for i, camera in enumerate(CAMERAS)}
    commands = np.concatenate((poses[1:], poses[-1:])) + rng.normal(0, 0.001, poses.shape)
    return Recorded(f"made-{seed}", poses, commands, velocities, success, videos)


def decode(video: bytes) -> list[np.ndarray]:
    """All frames of an mp4, RGB."""
    with av.open(io.BytesIO(video)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def to_jpeg(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def droid_features(size: tuple[int, int], *, extras: bool = False):
    """The features of a DROID TFDS directory; `extras` are those that 1.0.1 added."""
    import tensorflow_datasets as tfds

    kinds = tfds.features

    def tensors(widths: Mapping[str, int]) -> dict:
        return {name: kinds.Tensor(shape=(width,), dtype=np.float64) for name, width in widths.items()}

    widths = {"cartesian_position": 6, "joint_position": 7, "gripper_position": 1}
    images = {name: kinds.Image(shape=(*size, 3), encoding_format="jpeg") for name in FEATURE_OF.values()}
    commands = tensors({**widths, "joint_velocity": 7})
    step = {
        "is_last": kinds.Scalar(np.bool_),
        "language_instruction": kinds.Text(),
        "observation": kinds.FeaturesDict({**images, **tensors(widths)}),
        "action_dict": kinds.FeaturesDict(commands),
        **tensors({"action": 7}),
    }
    metadata = {"file_path": kinds.Text(), "recording_folderpath": kinds.Text()}
    if extras:
        metadata |= tensors({f"extrinsics_{name}": 6 for name in ("wrist_cam", "exterior_cam_1", "exterior_cam_2")})
    return kinds.FeaturesDict({"steps": kinds.Dataset(step), "episode_metadata": kinds.FeaturesDict(metadata)})


def to_example(
    episode: Recorded, images: dict[str, list[bytes]], *, extrinsics: dict[str, np.ndarray] | None = None
) -> dict:
    """One RLDS episode; its file paths as in the release."""
    steps = []
    for row, (pose, command) in enumerate(zip(episode.poses, episode.commands, strict=True)):
        joints = {"joint_position": np.zeros(7)}
        pictures = {FEATURE_OF[camera]: images[camera][row] for camera in CAMERAS}
        observation = {"cartesian_position": pose[:6], "gripper_position": pose[6:], **joints, **pictures}
        given = {"cartesian_position": command[:6], "gripper_position": command[6:], **joints}
        steps.append(
            {
                "is_last": row == len(episode.poses) - 1,
                "language_instruction": "put it",
                "action": np.full(7, 99.0),
                "observation": observation,
                "action_dict": {**given, "joint_velocity": episode.joint_velocities[row]},
            }
        )
    outcome = "success" if episode.success else "failure"
    folder = f"/nfs/r2d2/ILIAD/{outcome}/2023-04-21/{episode.name}"
    metadata = {"file_path": f"{folder}/trajectory.h5", "recording_folderpath": f"{folder}/recordings/MP4"}
    if extrinsics is not None:
        metadata |= {f"extrinsics_{name}": value for name, value in extrinsics.items()}
    return {"steps": steps, "episode_metadata": metadata}


def frame_record(data: bytes) -> bytes:
    """TFRecord framing, written from its description."""
    from jepa_cache.sources.parsers.tfrecords import mask_crc32c

    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", mask_crc32c(length)) + data + struct.pack("<I", mask_crc32c(data))


def write_tfds(folder: Path, features, shards: Sequence[Sequence[dict]]) -> Path:
    """A TFDS directory in the form of the real BridgeData one; without TensorFlow."""
    folder.mkdir(parents=True)
    features.save_config(str(folder))
    for index, examples in enumerate(shards):
        records = [frame_record(features.serialize_example(example)) for example in examples]
        path = folder / f"r2d2_faceblur-train.tfrecord-{index:05d}-of-{len(shards):05d}"
        path.write_bytes(b"".join(records))
    split = {"name": "train", "shardLengths": [str(len(examples)) for examples in shards]}
    info = {"fileFormat": "tfrecord", "name": "r2d2_faceblur", "splits": [split], "version": "1.0.0"}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def write_raw(root: Path, episode: Recorded, *, lab: str = "ILIAD", stereo: bool = False) -> Path:
    """An episode's folder as the raw release has it."""
    import h5py

    outcome = "success" if episode.success else "failure"
    inside = f"{outcome}/2023-04-21/{episode.name}"
    folder = root / lab / inside
    videos = folder / "recordings" / "MP4"
    videos.mkdir(parents=True)
    metadata = {"uuid": f"{lab}+abc+{episode.name}", "lab": lab, "success": episode.success}
    metadata["hdf5_path"] = f"{inside}/trajectory.h5"
    for camera, short in zip(CAMERAS, ("ext1", "ext2", "wrist"), strict=True):
        serial = SERIALS[camera]
        (videos / f"{serial}{'-stereo' if stereo else ''}.mp4").write_bytes(episode.videos[camera])
        metadata |= {f"{short}_cam_serial": serial, f"{short}_mp4_path": f"{inside}/recordings/MP4/{serial}.mp4"}
    metadata["left_mp4_path"] = metadata["ext2_mp4_path"]
    (folder / f"metadata_{metadata['uuid']}.json").write_text(json.dumps(metadata))
    with h5py.File(folder / "trajectory.h5", "w") as file:
        for group, poses in (("observation/robot_state", episode.poses), ("action", episode.commands)):
            file[f"{group}/cartesian_position"] = poses[:, :6]
            file[f"{group}/gripper_position"] = poses[:, 6]
        file["action/joint_velocity"] = episode.joint_velocities
        for index, serial in enumerate(SERIALS.values()):
            cameras = np.tile([0.1 * index, 0.4, 0.3, -2.0, 0.1, 0.2 * index], (len(episode.poses), 1))
            file[f"observation/camera_extrinsics/{serial}_left"] = cameras
        file["observation/timestamp/skip_action"] = np.arange(len(episode.poses)) % 5 == 4
    return folder
