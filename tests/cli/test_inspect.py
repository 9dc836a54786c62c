"""Claims of cli/inspect.py: a data set is described without encoding, and what is wrong in it is named.

Statistics are exact; a sound recording is not suspected, each fault is, also what stage one would skip; any source will do. Of many
recordings most give their headers only, and ten of each kind are printed.
"""

import io

import av
import numpy as np
import pytest

from jepa_cache.actions import get_action_space
from jepa_cache.cli import inspect as command
from jepa_cache.cli.inspect import inspect_units
from jepa_cache.config.loading import load_config
from jepa_cache.episode import Episode, Skipped
from jepa_cache.media.video import open_video
from jepa_cache.poses import POSE_CONTROLS
from jepa_cache.sources import Unit, build_source
from tests.cli.conftest import run
from tests.droid_makers import make_episode, write_raw
from tests.makers import make_rows, make_video, to_jsonl, write_vpt_tar
from tests.workspace import SUITE_SETTINGS

NUM_FRAMES = 50
VIDEO = make_video(NUM_FRAMES)
VPT36 = get_action_space("vpt36")
CONFIG = load_config(SUITE_SETTINGS, ["dataset=vpt", "encode.action_space=vpt36"])


def write(folder, pairs):
    """A tar shard of (video, rows or bytes)."""
    return write_vpt_tar(
        folder / "a.tar", {key: (v, to_jsonl(it) if isinstance(it, list) else it) for key, (v, it) in pairs.items()}
    )


def describe(folder, pairs, **options):
    source = build_source("vpt", {})
    return inspect_units(CONFIG, source, source.list_units([str(write(folder, pairs))], folder), name="vpt", **options)


def describe_one(folder, rows, video=VIDEO):
    (report,) = describe(folder, {"seg": (video, rows)})["recordings"]
    return report


def moving_rows(num_lines=NUM_FRAMES, seed=1):
    """Rows in which something is done on every tick, and yaw follows the mouse."""
    rows = make_rows(num_lines, seed)
    for row in rows:
        row["keyboard"]["keys"] = ["key.keyboard.w"]
    return follow(rows)


def follow(rows):
    yaw = 0.0
    for row in rows:
        row["yaw"], yaw = yaw, yaw + 0.15 * row["mouse"]["dx"] * (not row["isGuiOpen"])
    return rows


def changed(**fields):
    """Moving rows in which fields are set, deleted (None), or a function of the row."""
    rows = moving_rows()
    for row in rows:
        for name, value in fields.items():
            if value is None:
                del row[name]
            else:
                row[name] = value(row)
    return rows


def resting(every):
    """Rows of which every n-th one does nothing."""
    rows = moving_rows()
    for row in rows[::every]:
        row["keyboard"]["keys"], row["mouse"]["dx"], row["mouse"]["dy"] = [], 0.0, 0.0
    return follow(rows)


def video_of(frames):
    """A lossless video of frames [F, 48, 64, 3]."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=20, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def stuttering(every):
    frames = np.random.default_rng(0).integers(0, 256, (NUM_FRAMES, 6, 8, 3)).astype(np.uint8)
    frames = frames.repeat(8, axis=1).repeat(8, axis=2)
    return video_of(frames[index - index % every] for index in range(NUM_FRAMES))


def test_a_sound_recording_is_described_and_not_suspected(tmp_path):
    rows = follow(changed(isGuiOpen=lambda row: 10 <= row["tick"] < 20))
    report = describe_one(tmp_path, rows)
    expected = {
        **{"fps": 20, "container_fps": 20, "codec": "h264", "width": 64, "height": 48, "duration_s": 2.5},
        **{"num_frames": 50, "num_used_frames": 50, "num_ticks": 50, "tick_hz": 20.0, "missing": []},
        **{"gui_share": 0.2, "idle_share": 0.0, "equal_share": 0.0, "yaw_breach_share": 0.0, "suspicions": []},
    }
    assert {name: report[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("rows", "video", "words"),
    [
        (
            lambda: changed(yaw=lambda row: row["yaw"] + 33.0 * sum(row["tick"] >= turn for turn in (20, 30, 40))),
            VIDEO,
            ["yaw does not follow the mouse in 3 of", "line 20"],
        ),
        (
            lambda: changed(hotbar=None, milli=None, xpos=None),
            VIDEO,
            ["it holds no hotbar, milli, xpos_blocks", "stage one cannot use it: the recording holds no hotbar slot"],
        ),
        (moving_rows, make_video(NUM_FRAMES, fps=30), ["the container says 30 frames/s, its rows say 20"]),
        (
            lambda: changed(milli=lambda row: 10**9 + 100 * row["tick"]),
            VIDEO,
            ["clock counts 10.0 rows/s, its video 20.0"],
        ),
        (lambda: changed(milli=lambda row: 10**9 + 50 * row["tick"] + 4000 * (row["tick"] // 10)), VIDEO, []),  # lag
        (moving_rows, stuttering(2), ["of the decoded frames equal the one before though something moves"]),
        (moving_rows, stuttering(1), []),
        (lambda: resting(2), stuttering(2), []),  # between equal frames nothing is done
        (
            moving_rows,
            video_of(np.zeros((NUM_FRAMES, 48, 64, 3), np.uint8)),
            ["frames are flat", "equal the one before"],
        ),
        (lambda: moving_rows(28), VIDEO, ["22 of 50 frames have no row", "lasts only 1.4 s"]),
        (lambda: moving_rows(80), VIDEO, ["30 of 80 rows have no frame"]),
        (lambda: moving_rows(48), VIDEO, []),
        (lambda: resting(1), VIDEO, ["nothing is done in 100%"]),
        (lambda: moving_rows(10), make_video(10), ["lasts only 0.5 s"]),
    ],
)
def test_each_fault_is_suspected_by_itself(tmp_path, rows, video, words):
    text = "\n".join(describe_one(tmp_path, rows(), video)["suspicions"])
    assert all(part in text for part in words) and (words or not text), text


def test_a_video_that_breaks_later_is_suspected_a_copy_named_and_the_others_are_described(tmp_path):
    hole = VIDEO.index(b"mdat") + 4
    broken = VIDEO[:hole] + bytes(len(VIDEO[hole:]) // 2) + VIDEO[hole + len(VIDEO[hole:]) // 2 :]
    rows = moving_rows()
    report = describe(tmp_path, {"a": (broken, moving_rows(seed=2)), "b": (VIDEO, rows), "c": (VIDEO, rows)})
    found = {entry["key"]: entry["suspicions"] for entry in report["recordings"]}
    found |= {entry["key"]: [entry["reason"]] for entry in report["skipped"]}
    assert "decoded" in str(found["a"]) or "opened" in str(found["a"])
    assert (found["b"], found["c"]) == ([], ["its rows are those of b: a copy?"])


def test_column_statistics_are_those_of_the_actions_that_training_gets(tmp_path):
    report = describe(tmp_path, {f"seg{seed}": (VIDEO, moving_rows(seed=seed)) for seed in range(3)})
    source = build_source("vpt", {})
    (unit,) = source.list_units([str(tmp_path / "a.tar")], tmp_path)
    taken = (VPT36.aggregate(it.controls, it.frame_ticks[::4]).actions for it in source.iter_episodes(unit))
    rows, columns = np.concatenate(list(taken)).astype(np.float64), report["action_columns"]
    assert report["num_actions"] == len(rows) and [it["name"] for it in columns] == [it.name for it in VPT36.actions]
    expected = {"mean": rows.mean(0), "std": rows.std(0), "minimum": rows.min(0), "maximum": rows.max(0)}
    for name, values in (expected | {"zero_share": (rows == 0).mean(0)}).items():
        np.testing.assert_allclose([column[name] for column in columns], values, atol=1e-9, err_msg=name)


class Robot:
    """A source of another kind: no mouse, no GUI, a Skipped one in between, an angle in degrees."""

    recipe = {"source": "robot"}  # noqa: RUF012

    def iter_episodes(self, unit):
        yield Skipped("bad", "no camera")
        for seed, key in enumerate(("good", "degrees", "third")):
            poses = np.random.default_rng(seed).uniform(0, 0.5, (7, NUM_FRAMES))
            poses[3] *= 180 if key == "degrees" else 1
            controls = dict(zip(POSE_CONTROLS, poses, strict=True))
            yield Episode(key, VIDEO, 20.0, controls, np.arange(NUM_FRAMES), NUM_FRAMES)


def test_any_source_is_described_with_what_it_knows():
    config = load_config(SUITE_SETTINGS, ["dataset=droid_rlds"])
    report = inspect_units(config, Robot(), [Unit("shard", ())], name="robot", limit=3)
    first, second = report["recordings"]
    assert report["skipped"] == [{"unit": "shard", "key": "bad", "reason": "no camera"}]
    assert [first[it] for it in ("idle_share", "gui_share", "tick_hz", "suspicions")] == [None, None, None, []]
    assert [text.partition(" ")[0] for text in second["suspicions"]] == ["rx_rad"]
    assert len(report["action_columns"]) == 7


def test_of_many_recordings_most_are_described_by_their_headers_alone(tmp_path, monkeypatch):
    cut = VIDEO[: len(VIDEO) * 3 // 4]
    pairs = {f"{number:02}": (cut if number == 5 else VIDEO, moving_rows(seed=number)) for number in range(8)}
    whole = describe(tmp_path, pairs)
    opened = []
    monkeypatch.setattr(command, "NUM_FIRST_DECODED", 2)
    monkeypatch.setattr(command, "DECODED_EVERY", 3)
    monkeypatch.setattr(command, "open_video", lambda *a, **k: opened.append(1) or open_video(*a, **k))
    thinned = describe(tmp_path, pairs)
    decoded = [entry["decoded"] for entry in thinned["recordings"]]
    assert decoded == [number in (0, 1, 3, 6) for number in range(8) if number != 5] and len(opened) == 4
    assert thinned["action_columns"] == whole["action_columns"]
    assert [entry["key"] for entry in thinned["skipped"]] == [entry["key"] for entry in whole["skipped"]] == ["05"]
    for one, other in zip(thinned["recordings"], whole["recordings"], strict=True):
        assert {**one, "decoded": True, "equal_share": 0.0} == other


def test_the_true_rate_of_steps_is_said_where_the_requested_one_cannot_be_had(project):
    write(project, {"one": (VIDEO, moving_rows())})
    said = run("inspect", "dataset=vpt", project / "a.tar", "encode.fps=8", "encode.mode=tubelet").out
    assert "at 3.333 steps/s\nencode.fps: 8 Hz asked, 6.667 Hz made (1 of 3 frames at 20 Hz)" in said
    (report,) = run("inspect", "dataset=vpt", project / "a.tar", "encode.fps=5", "--json").document["data_sets"]
    assert report["step_hz"] == [5.0, 5.0] and not report["slower"]


def test_ten_of_each_kind_are_printed_and_the_rest_are_counted(project):
    pairs = {f"good{number}": (VIDEO, moving_rows(seed=number)) for number in range(12)}
    pairs |= {f"bad{number}": (VIDEO, b"{" * number) for number in range(1, 15)}
    write(project, {**pairs, "other": (b"", moving_rows())})
    lines = run("inspect", "dataset=vpt", project / "a.tar", "encode.fps=30").out.splitlines()
    assert sum(line.startswith("good") for line in lines) == 10 and "... and 2 more, see --json" in lines
    assert sum("stage one cannot use it: encode.fps 30 is above the video's 20 frames" in line for line in lines) == 10
    assert sum(line.startswith("skipped: bad") for line in lines) == 10
    assert [line for line in lines if "like these" in line] == [
        "suspicious: ... and 2 more like these, see --json",
        "skipped: ... and 4 more like these, see --json",
    ]
    assert any(line.startswith("skipped: other:") for line in lines)
    assert any("12 suspicious; 15 skipped" in line for line in lines)


def test_every_data_set_of_a_mixture_and_every_camera_has_a_report_of_its_own_and_notes_are_said(project):
    preset = (project / "configs/dataset/vpt.yaml").read_text()
    for name in ("a", "b"):
        (project / f"shards/{name}").mkdir(parents=True)
        write(project / f"shards/{name}", {f"{name}-seg": (VIDEO, moving_rows())})
        (project / f"configs/dataset/{name}.yaml").write_text(preset.replace("shards/vpt", f"shards/{name}"))
    (project / "configs/dataset/both.yaml").write_text(preset + "mixture: {a: 1.0, b: 3.0}\n")
    keys = {
        report["name"]: [entry["key"] for entry in report["recordings"]]
        for report in run("inspect", "dataset=both", "--json").document["data_sets"]
    }
    assert keys == {"a": ["a-seg"], "b": ["b-seg"]}
    assert "both is a mixture" in run("inspect", "dataset=both", "shards/a").err
    write_raw(project / "shards/droid_raw", make_episode(0, 60, num_frames=20, fps=5))
    given = ("dataset=droid_raw", "encode.cameras=[wrist, exterior_1]")
    reports = run("inspect", *given, "--json").document["data_sets"]
    assert [report["name"] for report in reports] == ["droid_raw, wrist", "droid_raw, exterior_1"]
    assert [entry["suspicions"] for report in reports for entry in report["recordings"]] == [[], []]
    assert ": video at 5 Hz: frames are placed on the 15 Hz rows by time" in run("inspect", *given).out
