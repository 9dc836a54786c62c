"""Claims of cli/inspect.py: a data set is described without encoding, and what is wrong in it is named.

Statistics are exact; a sound recording is not suspected, each fault is, also what stage one would skip; a page is self-contained and
cannot be hijacked by names in the data; any source will do. Of many recordings most give their headers only, and ten of each kind are
printed.
"""

import json
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from jepa_cache.actions import get_action_space
from jepa_cache.cli import inspect as command
from jepa_cache.cli.inspect import inspect, inspect_recording, inspect_units, render_page
from jepa_cache.episode import Episode, Skipped
from jepa_cache.media.video import open_video
from jepa_cache.poses import POSE_CONTROLS
from jepa_cache.sources import Unit, build_source
from tests.browser import measure_widths
from tests.droid_makers import make_episode, write_raw
from tests.makers import REAL_VPT, make_rows, make_video, to_jsonl, write_vpt_tar
from tests.workspace import copy_settings

NUM_FRAMES = 50
VIDEO = make_video(NUM_FRAMES)
VPT36 = get_action_space("vpt36")
needs_real = pytest.mark.skipif(not REAL_VPT.exists(), reason="no real recordings in ../shared/data/vpt")


def every_fourth(episode):
    return np.arange(0, len(episode.frame_ticks), 4)


def _report(tmp_path, pairs, *, space=VPT36, **options):
    tar = write_vpt_tar(tmp_path / "a.tar", pairs)
    source = build_source("vpt", {})
    return inspect_units(
        source, source.list_units([str(tar)], tmp_path), space, name="vpt", step_hz=5, plan=every_fourth, **options
    )


def _view(report):
    """A report by attributes."""
    recordings, columns = (
        [SimpleNamespace(**entry) for entry in report[name]] for name in ("recordings", "action_columns")
    )
    return SimpleNamespace(**{**report, "recordings": recordings, "columns": columns})


def _inspect(tmp_path, pairs, **options):
    return _view(_report(tmp_path, pairs, **options))


def _one(tmp_path, rows, video=VIDEO):
    (report,) = _inspect(tmp_path, {"seg": (video, to_jsonl(rows))}).recordings
    return report


def _moving_rows(num_lines=NUM_FRAMES, seed=1):
    """Rows in which something is done on every tick."""
    rows = make_rows(num_lines, seed)
    for row in rows:
        row["keyboard"]["keys"] = ["key.keyboard.w"]
    return rows


def _run(*argv):
    app = typer.Typer()
    app.command()(inspect)
    return CliRunner().invoke(app, [str(argument) for argument in argv])


def test_a_sound_recording_is_described_and_not_suspected(tmp_path):
    rows = _moving_rows()
    yaw = 0.0
    for row in rows:
        row["isGuiOpen"] = 10 <= row["tick"] < 20
        row["yaw"], yaw = yaw, yaw + 0.15 * row["mouse"]["dx"] * (not row["isGuiOpen"])
    report = _one(tmp_path, rows)
    assert report.suspicions == []
    assert (report.fps, report.container_fps, report.codec, report.width, report.height) == (20, 20, "h264", 64, 48)
    assert (report.num_frames, report.num_used_frames, report.num_ticks, report.duration_s) == (50, 50, 50, 2.5)
    assert (report.gui_share, report.idle_share, report.tick_hz) == (0.2, 0.0, 20.0)
    assert (report.equal_share, report.yaw_breach_share, report.missing) == (0.0, 0.0, [])


def test_yaw_that_leaves_the_mouse_now_and_then_is_suspected_with_its_first_line(tmp_path):
    rows = _moving_rows()
    for number in (20, 30, 40):
        for row in rows[number:]:
            row["yaw"] += 33.0
    (text,) = _one(tmp_path, rows).suspicions
    assert "yaw does not follow the mouse in 3 of" in text and "line 20" in text


def test_missing_fields_are_named(tmp_path):
    rows = _moving_rows()
    for row in rows:
        for name in ("hotbar", "milli", "xpos"):
            del row[name]
    report = _one(tmp_path, rows)
    assert set(report.missing) == {"hotbar", "milli", "xpos_blocks"}
    assert any("it holds no hotbar, milli, xpos_blocks" in text for text in report.suspicions)
    assert any(
        "action space vpt36 cannot describe it: the recording holds no hotbar slot" in t for t in report.suspicions
    )


def test_a_container_of_another_rate_is_suspected(tmp_path):
    (text,) = _one(tmp_path, _moving_rows(), make_video(NUM_FRAMES, fps=30)).suspicions
    assert "the container says 30 frames/s, its rows say 20" in text


def test_a_clock_of_another_rate_is_suspected_and_lag_is_not(tmp_path):
    rows = _moving_rows()
    for row in rows:
        row["milli"] = 1000 * 10**6 + 100 * row["tick"]
    (text,) = _one(tmp_path, rows).suspicions
    assert "its clock counts 10.0 rows/s, its video 20.0" in text
    for row in rows:
        row["milli"] = 10**9 + 50 * row["tick"] + 4000 * (row["tick"] // 10)
    assert _one(tmp_path, rows).suspicions == []


def _stuttering_video(every):
    import io

    import av

    frames = np.random.default_rng(0).integers(0, 256, (NUM_FRAMES, 48, 64, 3)).astype(np.uint8)
    frames = np.kron(frames[:, ::8, ::8], np.ones((1, 8, 8, 1))).astype(np.uint8)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=20, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(NUM_FRAMES):
            image = av.VideoFrame.from_ndarray(frames[index - index % every], format="rgb24")
            output.mux(stream.encode(image))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def test_duplicated_frames_are_suspected_only_where_something_moves(tmp_path):
    report = _one(tmp_path, _moving_rows(), _stuttering_video(2))
    assert report.equal_share == pytest.approx(0.5, abs=0.02) and "duplicated frames" in report.suspicions[0]
    assert _one(tmp_path, _moving_rows(), _stuttering_video(1)).equal_share == 0
    rows = _moving_rows()
    for row in rows[1::2]:  # Frames 0 and 1 are equal, 1 and 2 differ: nothing is done in the even rows.
        rows[row["tick"] - 1]["keyboard"]["keys"], rows[row["tick"] - 1]["mouse"]["dx"] = [], 0.0
        rows[row["tick"] - 1]["mouse"]["dy"] = 0.0
    yaw = 0.0
    for row in rows:
        row["yaw"], yaw = yaw, yaw + 0.15 * row["mouse"]["dx"]
    assert _one(tmp_path, rows, _stuttering_video(2)).equal_share == 0


def test_a_black_video_is_suspected(tmp_path):
    import io

    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=20)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(NUM_FRAMES):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
        output.mux(stream.encode(None))
    assert any("frames are flat" in text for text in _one(tmp_path, _moving_rows(), buffer.getvalue()).suspicions)


def test_frames_without_rows_and_rows_without_frames_are_suspected(tmp_path):
    assert "22 of 50 frames have no row" in str(_one(tmp_path, _moving_rows(28)).suspicions)
    assert "30 of 80 rows have no frame" in str(_one(tmp_path, _moving_rows(80)).suspicions)
    assert _one(tmp_path, _moving_rows(48)).suspicions == []


def test_a_recording_in_which_nothing_is_done_and_a_very_short_one_are_suspected(tmp_path):
    rows = make_rows(NUM_FRAMES)
    for row in rows:
        row["keyboard"]["keys"], row["mouse"]["dx"], row["mouse"]["dy"], row["yaw"] = [], 0.0, 0.0, 0.0
    assert "nothing is done in 100%" in _one(tmp_path, rows).suspicions[-1]
    assert "lasts only 0.5 s" in _one(tmp_path, _moving_rows(10), make_video(10)).suspicions[-1]


def test_a_video_that_breaks_later_is_suspected_and_the_others_go_on(tmp_path):
    hole = VIDEO.index(b"mdat") + 4
    broken = VIDEO[:hole] + bytes(len(VIDEO[hole:]) // 2) + VIDEO[hole + len(VIDEO[hole:]) // 2 :]
    lines = to_jsonl(_moving_rows())
    report = _inspect(tmp_path, {"a": (broken, lines), "b": (VIDEO, lines)})
    found = {entry.key: entry.suspicions for entry in report.recordings}
    found |= {entry["key"]: [entry["reason"]] for entry in report.skipped}
    assert "decoded" in str(found["a"]) or "opened" in str(found["a"])
    assert found["b"] == []


def test_column_statistics_are_those_of_the_actions_that_training_gets(tmp_path):
    pairs = {f"seg{seed}": (VIDEO, to_jsonl(_moving_rows(seed=seed))) for seed in range(3)}
    report = _inspect(tmp_path, pairs)
    source = build_source("vpt", {})
    (unit,) = source.list_units([str(tmp_path / "a.tar")], tmp_path)
    rows = np.concatenate(
        [VPT36.aggregate(e.controls, e.frame_ticks[::4]).actions for e in source.iter_episodes(unit)]
    ).astype(np.float64)
    assert report.num_actions == len(rows) and [c.name for c in report.columns] == [c.name for c in VPT36.actions]
    for name, statistic in (("mean", rows.mean(0)), ("std", rows.std(0)), ("zero_share", (rows == 0).mean(0))):
        np.testing.assert_allclose([getattr(column, name) for column in report.columns], statistic, atol=1e-9)
    np.testing.assert_array_equal([column.minimum for column in report.columns], rows.min(0))
    np.testing.assert_array_equal([column.maximum for column in report.columns], rows.max(0))
    inside = [(c.edges[0] <= rows[:, i]) & (rows[:, i] <= c.edges[-1]) for i, c in enumerate(report.columns)]
    assert [sum(column.counts) for column in report.columns] == [int(part.sum()) for part in inside]


def test_histogram_rows_are_thinned_evenly_in_bounded_memory_and_the_rest_stays_exact(monkeypatch):
    monkeypatch.setattr(command, "MAX_ROWS", 100)
    rows = command._ActionRows(get_action_space("vpt13"))
    values = np.arange(10_000, dtype=np.float32)[:, None] * np.ones(13, np.float32)
    for start in range(0, len(values), 7):
        rows.add(values[start : start + 7])
        assert sum(map(len, rows._kept)) <= 100
    kept = np.concatenate(rows._kept)[:, 0]
    assert set(np.diff(kept)) == {rows._stride} and kept[0] == 0
    assert (rows.columns()[0]["mean"], rows.columns()[0]["maximum"]) == (values[:, 0].mean(dtype=np.float64), 9999)


class _Robot:
    """A source of another kind: no mouse, no GUI, a Skipped one in between."""

    recipe = {"source": "robot"}  # noqa: RUF012

    @staticmethod
    def poses():
        return dict(zip(POSE_CONTROLS, np.random.default_rng(0).uniform(0, 0.5, (7, NUM_FRAMES)), strict=True))

    def iter_episodes(self, unit):
        controls = self.poses()
        yield Skipped("bad", "no camera")
        yield Episode("good", VIDEO, 20.0, controls, np.arange(NUM_FRAMES), NUM_FRAMES)
        yield Episode("second", VIDEO, 20.0, controls, np.arange(NUM_FRAMES), NUM_FRAMES)


def _describe_robot(robot, **options):
    space = get_action_space("pose7")
    units = [Unit("shard", ())]
    return _view(inspect_units(robot, units, space, name="robot", step_hz=5, plan=every_fourth, **options))


def test_any_source_is_described_with_what_it_knows():
    report = _describe_robot(_Robot())
    assert [entry.key for entry in report.recordings] == ["good", "second"]
    assert report.skipped == [{"unit": "shard", "key": "bad", "reason": "no camera"}]
    (first, _) = report.recordings
    assert (first.idle_share, first.gui_share, first.tick_hz, first.suspicions) == (None, None, None, [])
    assert len(report.columns) == 7
    limited = _describe_robot(_Robot(), limit=2)
    assert [entry.key for entry in limited.recordings] == ["good"]


def test_values_that_their_units_do_not_allow_are_suspected():
    degrees = [(name, np.degrees(it)) if name == "rx_rad" else (name, it) for name, it in _Robot.poses().items()]
    robot = _Robot()
    robot.poses = lambda: dict(degrees)
    report = _describe_robot(robot, limit=2)
    assert [text.partition(" ")[0] for text in report.recordings[0].suspicions] == ["rx_rad"]


def test_of_many_recordings_most_are_described_by_their_headers_alone(tmp_path, monkeypatch):
    lines, cut = to_jsonl(_moving_rows()), VIDEO[: len(VIDEO) * 3 // 4]
    pairs = {f"{number:02}": (cut if number == 5 else VIDEO, lines) for number in range(8)}
    whole = _inspect(tmp_path, pairs)
    opened = []
    monkeypatch.setattr(command, "NUM_FIRST_DECODED", 2)
    monkeypatch.setattr(command, "DECODED_EVERY", 3)
    monkeypatch.setattr(command, "open_video", lambda *a, **k: opened.append(1) or open_video(*a, **k))
    thinned = _inspect(tmp_path, pairs)
    assert [entry.decoded for entry in thinned.recordings] == [
        number in (0, 1, 3, 6) for number in range(8) if number != 5
    ]
    assert len(opened) == 4 and thinned.columns == whole.columns
    assert [entry["key"] for entry in thinned.skipped] == [entry["key"] for entry in whole.skipped] == ["05"]
    for one, other in zip(thinned.recordings, whole.recordings, strict=True):
        assert SimpleNamespace(**{**vars(one), "decoded": True, "equal_share": 0.0}) == other


def test_ten_of_each_kind_are_printed_and_the_rest_are_counted(tmp_path):
    pairs = {f"good{number}": (VIDEO, to_jsonl(_moving_rows())) for number in range(12)}
    pairs |= {f"bad{number}": (VIDEO, b"{" * number) for number in range(1, 15)}
    write_vpt_tar(tmp_path / "a.tar", {**pairs, "other": (b"", to_jsonl(_moving_rows()))})
    lines = _run("dataset=vpt", tmp_path, "encode.fps=30").output.splitlines()
    assert sum(line.startswith("good") for line in lines) == 10 and "... and 2 more, see --json" in lines
    assert sum("stage one skips it: encode.fps 30 is above the video's 20 frames" in line for line in lines) == 10
    assert sum(line.startswith("skipped: bad") for line in lines) == 10
    assert [line for line in lines if "like these" in line] == [
        "suspicious: ... and 2 more like these, see --json",
        "skipped: ... and 4 more like these, see --json",
    ]
    assert any(line.startswith("skipped: other:") for line in lines)
    assert any("12 suspicious; 15 skipped" in line for line in lines)


def test_a_phone_does_not_scroll_the_page_sideways(tmp_path):
    report = _report(tmp_path, {"long-" * 60: (VIDEO, to_jsonl(_moving_rows())), "b": (VIDEO, b"{")})
    assert report["action_columns"] and report["skipped"]
    (width,) = measure_widths([render_page(data_sets=[report])], 360, tmp_path)
    assert width <= 360


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_the_page_holds_pictures_and_histograms_and_loads_nothing(tmp_path):
    page = render_page(data_sets=[_report(tmp_path, {"seg": (VIDEO, to_jsonl(_moving_rows()))}, pictures=True)])
    tags = _Tags()
    tags.feed(page)
    images = [attrs["src"] for tag, attrs in tags.found if tag == "img"]
    assert len(images) == 1 and images[0].startswith("data:image/jpeg;base64,")
    assert sum(tag == "svg" for tag, _ in tags.found) == len(VPT36.actions)
    assert not {tag for tag, _ in tags.found} & {"script", "link", "iframe", "object"}
    assert "http:" not in page and "https:" not in page


def test_names_in_the_data_cannot_write_into_the_page(tmp_path):
    evil = "<script>alert(1)</script>\"'><img src=http://evil>"
    lines = to_jsonl(_moving_rows())
    report = _report(tmp_path, {evil.replace("/", ""): (VIDEO, lines), "b<b>": (VIDEO, b"{")})
    assert report["skipped"]
    tags = _Tags()
    tags.feed(render_page(data_sets=[report]))
    assert not [tag for tag, attrs in tags.found if tag == "script" or "evil" in str(attrs)]
    assert "&lt;b&gt;" in render_page(data_sets=[report])


def test_the_command_prints_tables_json_and_a_page(tmp_path):
    write_vpt_tar(tmp_path / "a.tar", {"good": (VIDEO, to_jsonl(_moving_rows())), "bad": (VIDEO, b"{")})
    result = _run("dataset=vpt", tmp_path, "--html", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    assert "skipped: bad: line 1 of 1 is no JSON" in result.output
    assert "1 recordings of vpt (source vpt)" in result.output and "mouse_dx" in result.output
    assert "good" in (tmp_path / "page.html").read_text()
    result = _run("dataset=vpt", tmp_path, "--json")
    (report,) = json.loads(result.stdout)["data_sets"]
    assert report["recordings"][0]["key"] == "good" and "picture" not in report["recordings"][0]
    assert report["skipped"][0]["key"] == "bad" and report["action_columns"][0]["counts"]


def test_a_folder_of_loose_pairs_is_read_and_its_lone_files_are_named(tmp_path):
    (tmp_path / "loose/10.0").mkdir(parents=True)
    for name in ("10.0/a.mp4", "b.mp4", "lone.mp4"):
        (tmp_path / "loose" / name).write_bytes(VIDEO)
    for name in ("10.0/a.jsonl", "b.jsonl"):
        (tmp_path / "loose" / name).write_bytes(to_jsonl(_moving_rows()))
    (report,) = json.loads(_run("dataset=vpt", tmp_path / "loose", "--json").stdout)["data_sets"]
    assert [entry["key"] for entry in report["recordings"]] == ["10.0/a", "b"]
    assert [(entry["key"], "no lone.jsonl" in entry["reason"]) for entry in report["skipped"]] == [("lone.mp4", True)]


def test_an_input_without_recordings_is_an_error(tmp_path):
    result = _run("dataset=vpt", tmp_path)
    assert isinstance(result.exception, ValueError) and "finds no" in str(result.exception)


@pytest.mark.parametrize("flags", [[], ["--batch"]])
def test_a_page_in_a_folder_that_is_not_there_is_refused_before_the_work(tmp_path, flags):
    result = _run("dataset=vpt", *flags, "--html", tmp_path / "nowhere/page.html")
    assert isinstance(result.exception, ValueError) and "there is no folder" in str(result.exception)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder with settings and presets of its own, in which the command is typed."""
    copy_settings(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_data_set_of_a_mixture_has_a_report_of_its_own(checkout):
    preset = (checkout / "configs/dataset/vpt.yaml").read_text()
    for seed, name in enumerate(("a", "b")):
        write_vpt_tar(checkout / f"shards/{name}/x.tar", {f"{name}-seg": (VIDEO, to_jsonl(_moving_rows(seed=seed)))})
        (checkout / f"configs/dataset/{name}.yaml").write_text(preset.replace("shards/vpt", f"shards/{name}"))
    (checkout / "configs/dataset/both.yaml").write_text(preset + "mixture: {a: 1.0, b: 3.0}\n")
    reports = json.loads(_run("dataset=both", "--json").stdout)["data_sets"]
    assert [(r["name"], [entry["key"] for entry in r["recordings"]]) for r in reports] == [
        ("a", ["a-seg"]),
        ("b", ["b-seg"]),
    ]
    assert reports[0]["action_columns"] != reports[1]["action_columns"]
    result = _run("dataset=both", "shards/a")
    assert isinstance(result.exception, ValueError) and "both is a mixture" in str(result.exception)


def test_every_camera_has_a_report_of_its_own_and_notes_are_said(checkout):
    write_raw(checkout / "shards/droid_raw", make_episode(0, 60, num_frames=20, fps=5))
    given = ("dataset=droid_raw", "encode.cameras=[wrist, exterior_1]")
    reports = json.loads(_run(*given, "--json").stdout)["data_sets"]
    assert [report["name"] for report in reports] == ["droid_raw, wrist", "droid_raw, exterior_1"]
    assert [entry["suspicions"] for report in reports for entry in report["recordings"]] == [[], []]
    assert ": video at 5 Hz: frames are placed on the 15 Hz rows by time" in _run(*given).output


@needs_real
def test_the_real_look_alike_is_flagged_as_no_vpt_and_says_why():
    (report,) = json.loads(_run("dataset=vpt", REAL_VPT / "counter_example", "--json").stdout)["data_sets"]
    assert report["recordings"] == []
    (skipped,) = report["skipped"]
    assert "fearless-timber-seeker" in skipped["key"]
    assert "this is no VPT contractor recording: yaw does not follow the mouse in 4 of 4" in skipped["reason"]


@needs_real
def test_the_real_recording_is_not_suspected():
    (report,) = json.loads(_run("dataset=vpt", REAL_VPT, "--json").stdout)["data_sets"]
    (recording,) = report["recordings"]
    assert recording["suspicions"] == [] and recording["codec"] == "mpeg4"
    assert (recording["num_frames"], recording["num_ticks"], recording["yaw_breach_share"]) == (445, 446, 0.0)
    assert round(recording["gui_share"], 2) == 0.35 and recording["equal_share"] == 0


def test_a_recording_whose_pictures_are_not_wanted_keeps_none(tmp_path):
    source = build_source("vpt", {})
    tar = write_vpt_tar(tmp_path / "a.tar", {"seg": (VIDEO, to_jsonl(_moving_rows()))})
    (unit,) = source.list_units([str(tar)], tmp_path)
    (episode,) = source.iter_episodes(unit)
    assert inspect_recording(episode, unit.name, decode=True, picture=False)["picture"] is None
    assert inspect_recording(episode, unit.name, decode=True, picture=True)["picture"].startswith("data:image/jpeg")
