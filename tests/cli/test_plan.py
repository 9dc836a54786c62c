"""Claims of `jepa-cache plan`: its steps, bytes and files are those that come out, in every stored dtype; no video is read.

It refuses what the disk cannot hold, gives hours only at a rate that was measured here or given, and changes nothing.
"""

import json
import shutil
from types import SimpleNamespace

import pytest

from jepa_cache.cli import plan
from jepa_cache.encoding import planning
from jepa_cache.media import probe as headers
from jepa_cache.store.root import MARKER
from tests.makers import make_video, make_vpt_pair, write_vpt_tar

TOLERANCE = 0.02


def _plan(checkout, *arguments):
    return checkout.run("plan", "--json", checkout.recordings, *arguments)


def _count(checkout):
    files = {name: content for name, content in checkout.files().items() if not name.startswith("manifests")}
    del files[MARKER]  # the root's own
    tokens = sum(len(content) for name, content in files.items() if name.startswith("tokens/"))
    return tokens, sum(map(len, files.values())), len(files)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_what_is_planned_is_what_comes_out(fresh, dtype):
    override = f"encode.dtype={dtype}"
    planned = _plan(fresh, override)
    assert planned.code == 0 and not fresh.root.path.exists()
    fresh.encode(override)
    manifest, (tokens, total, num_files) = fresh.manifest, _count(fresh)
    assert planned.document["all"] == planned.document["to_do"]
    assert planned.document["all"]["steps"] == planned.document["all"]["frames"] == manifest.num_steps
    assert planned.document["all"]["episodes"] == sum(entry.num_episodes for entry in manifest.entries)
    sizes = planned.document["bytes"][dtype]
    # Three tiny stores, half of whose bytes are JSON and tables; at real widths test_sizing.py holds it to a thousandth.
    assert sizes["tokens"] == pytest.approx(tokens, rel=2 * TOLERANCE)
    assert sizes["total"] == pytest.approx(total, rel=2 * TOLERANCE)
    assert sizes["files"] == num_files
    assert planned.document["disk"]["needed_bytes"] >= sizes["total"]
    after = _plan(fresh, override)
    assert after.document["to_do"]["steps"] == 0 and after.document["done"]["units"] == 3
    assert after.document["disk"]["needed_bytes"] == 0
    assert after.document["all"]["steps"] == manifest.num_steps
    assert after.document["bytes"][dtype]["tokens"] == pytest.approx(tokens, rel=2 * TOLERANCE)


@pytest.mark.parametrize("mode", ["tubelet", "clip"])
def test_other_modes_are_planned_as_they_come_out(fresh, mode):
    settings = [f"encode.mode={mode}", "encode.frames_per_clip=4", "train.window_steps=2", "train.auto_steps=1"]
    settings += ["evaluate.num_context_steps=1", "evaluate.horizon=1"]
    planned = _plan(fresh, *settings).document["all"]
    fresh.encode(*settings)
    assert planned["steps"] == fresh.manifest.num_steps


def test_only_headers_of_videos_are_read(fresh, monkeypatch):
    """Of a video of a megabyte, whose header lies at its end, not more than a few buffers."""
    video = make_video(200, 3, size=(240, 320), codec="mpeg4", options={"b": "50000000", "g": "1"})
    write_vpt_tar(fresh.recordings / "big.tar", {"big": (video, b"{}\n")})
    read = []
    close = headers.FilePart.close

    def closed(self):
        if not self.closed:
            read.append((self.num_read, self._num_bytes))
        close(self)

    monkeypatch.setattr(headers.FilePart, "close", closed)
    monkeypatch.setattr(
        "jepa_cache.sources.vpt.VptSource.iter_episodes", lambda *_: pytest.fail("recordings were read")
    )
    monkeypatch.setattr("jepa_cache.media.video.open_video", lambda *_: pytest.fail("a video was opened"))
    document = _plan(fresh).document
    assert document["all"]["episodes"] == 5 and len(read) == 5
    num_read, num_bytes = max(read, key=lambda it: it[1])
    assert num_bytes > 1 << 20 and num_read < 3 * headers.BUFFER_BYTES


def test_recordings_that_cannot_be_used_are_counted_as_such(fresh):
    write_vpt_tar(fresh.recordings / "bad.tar", {"no": (b"no video", b"{}\n"), "good": make_vpt_pair(20, 5)})
    document = _plan(fresh).document
    assert (document["all"]["unusable"], document["all"]["episodes"]) == (1, 5)


def test_many_units_are_estimated_from_some_and_that_is_told(fresh, monkeypatch):
    monkeypatch.setattr(planning, "MAX_HEADERS", 2)
    exact = sum(n // 4 + (n % 4 > 0) for n in (45, 38, 41, 60))
    result = _plan(fresh)
    assert result.document["estimated"] and result.document["all"]["units"] == 3
    assert result.document["all"]["steps"] == pytest.approx(exact, rel=0.4)
    assert "estimated by bytes from 2 of them" in fresh.run("plan", fresh.recordings).out


def test_a_folder_of_videos_is_planned_from_headers_and_tables(fresh, monkeypatch):
    folder = fresh.folder / "pairs"
    folder.mkdir()
    for number, num_frames in enumerate((30, 47)):
        (folder / f"{number}.mp4").write_bytes(make_video(num_frames, number, fps=10))
        rows = [[0.0, float(i)] for i in range(num_frames)]
        (folder / f"{number}.json").write_text(json.dumps({"fps": 10, "states": rows, "actions": rows}))
    monkeypatch.setattr("jepa_cache.media.video.open_video", lambda *_: pytest.fail("a video was opened"))
    result = fresh.run("plan", "--json", folder, "dataset=mp4_json", "encode.fps=5")
    assert result.document["all"]["steps"] == 15 + 24 and result.document["all"]["episodes"] == 2


def test_what_the_disk_cannot_hold_is_refused(fresh, monkeypatch):
    needed = _plan(fresh).document["disk"]["needed_bytes"]
    for free, code in ((needed, 0), (needed - 1, 1)):
        monkeypatch.setattr(
            "jepa_cache.cli.plan.shutil.disk_usage", lambda _, free=free: type("Usage", (), {"free": free})()
        )
        result = _plan(fresh)
        assert result.code == code and result.document["fits"] == (code == 0)
    text = fresh.run("plan", fresh.recordings).out
    assert "refused: it does not fit" in text and "encode.dtype" in text


def test_only_what_is_missing_must_fit(checkout):
    whole = _plan(checkout).document
    assert whole["disk"]["needed_bytes"] == 0
    shutil.rmtree(checkout.tokens(0))
    document = _plan(checkout).document
    num_steps = checkout.manifest.entries[0].num_steps
    assert document["to_do"]["steps"] == num_steps and document["all"] == whole["all"]
    assert 0 < document["disk"]["needed_bytes"] < document["bytes"]["float16"]["tokens"]


def test_hours_come_from_a_measured_or_given_rate_and_are_empty_else(fresh, checkout):
    unknown = _plan(fresh).document
    assert unknown["rate"] == {"frames_per_s": None, "measured": None, "hours": None}
    given = _plan(fresh, "--frames-per-s", "10").document
    assert given["rate"]["hours"] == pytest.approx(given["to_do"]["frames"] / 10 / 3600)
    fresh.encode()
    measured = _plan(fresh, "encode.phases=[1]").document
    rate = measured["rate"]["measured"]
    assert (rate["encoder"], rate["device"], rate["resolution"]) == ("tiny", "cpu", 64)
    assert rate["num_frames"] == fresh.manifest.num_steps
    assert measured["rate"]["hours"] == pytest.approx(
        measured["to_do"]["frames"] / (rate["num_frames"] / rate["elapsed_s"]) / 3600
    )
    assert _plan(fresh, "encode.compute_dtype=bfloat16").document["rate"]["hours"] is None
    assert not list(fresh.root.path.rglob("*rate*"))


def test_a_short_run_does_not_replace_the_rate_of_a_longer_one(checkout):
    from jepa_cache.config.loading import load_config
    from jepa_cache.encoding.pipeline import Timing
    from jepa_cache.encoding.rates import find_rate, record_rate

    config = load_config(checkout.folder)
    for num_frames, elapsed_s, kept in (
        (100, 5.0, 100),
        (7, 1.0, 100),
        (300, 30.0, 300),
        (400, 12.0, 400),
        (9, 2.0, 400),
    ):
        record_rate(config, Timing(num_frames=num_frames, elapsed_s=elapsed_s))
        assert find_rate(config).num_frames == kept
    record_rate(config, None)
    record_rate(config, Timing())
    assert find_rate(config).num_frames == 400


def test_break_even_is_the_build_over_what_one_run_would_encode(fresh):
    document = _plan(fresh).document
    entry = document["break_even"]
    assert entry["frames"] == document["all"]["frames"]
    assert entry["frames_touched_per_run"] == 600 * 32 * 8  # configs/train/demo.yaml
    assert entry["runs"] == pytest.approx(entry["frames"] / entry["frames_touched_per_run"])
    assert entry["build_flops"] == pytest.approx(entry["frames"] * document["encoder_flops"]["per_frame"])
    assert entry["gain_per_run"] > 1
    larger = _plan(fresh, "predictor=small").document["break_even"]
    assert larger["runs"] == entry["runs"] and larger["gain_per_run"] < entry["gain_per_run"]


def test_no_recordings_cannot_be_planned(fresh):
    result = fresh.run("plan", "--json", fresh.folder / "nowhere")
    assert result.code == 2 and "finds no *.tar file" in result.document["error"]


def test_a_gain_too_small_to_see_is_not_called_one_time_fewer():
    runs = SimpleNamespace(online=1e3, predictor=1e9, build=1e3)
    entry = {"runs": 1.0, "predictor": "base", "frames_touched_per_run": 10, "frames": 10}
    for gain, words in ((1.000001, "less than 0.5 % fewer operations"), (1.24, "1.24 times fewer operations")):
        assert words in plan._describe_break_even({**entry, "gain_per_run": gain}, runs)[-1]
