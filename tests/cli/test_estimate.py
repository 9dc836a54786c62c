"""Claims of `jepa-cache estimate`: its steps are those that come out, its bytes within 5 %, in every stored dtype; no video is read.

It refuses what the disk cannot hold and changes nothing.
"""

import io
import json
import shutil
import tarfile
from collections import Counter

import pytest

from jepa_cache.cli import estimate
from jepa_cache.store.root import MARKER
from tests.cli.conftest import CLIPS
from tests.makers import make_video, write_vpt_tar


def _estimate(checkout, *arguments):
    return checkout.run("estimate", "--json", checkout.recordings, *arguments)


@pytest.mark.parametrize(("dtype", "mode"), [("float16", "clip"), ("int8", "frame"), ("int4", "tubelet")])
def test_what_is_estimated_is_what_comes_out(fresh, dtype, mode):
    settings = (f"encode.dtype={dtype}", f"encode.mode={mode}", *CLIPS)
    document = _estimate(fresh, *settings).document
    assert not fresh.root.path.exists() and document["all"] == document["to_do"]
    fresh.encode(*settings)
    manifest, files = fresh.manifest, fresh.files()
    sizes = [len(content) for name, content in files.items() if not name.startswith("manifests") and name != MARKER]
    tokens = sum(len(content) for name, content in files.items() if name.startswith("tokens/"))
    assert document["all"]["steps"] == manifest.num_steps
    assert document["all"]["frames"] == manifest.num_steps * (1 if mode == "frame" else 2)
    assert document["all"]["episodes"] == sum(entry.num_episodes for entry in manifest.entries)
    estimated = document["bytes"][dtype]
    # Three tiny stores, half of whose bytes are JSON and tables: at real widths it is nearer.
    assert estimated["tokens"] == pytest.approx(tokens, rel=0.05)
    assert estimated["total"] == pytest.approx(sum(sizes), rel=0.05) and estimated["files"] == len(sizes)
    assert document["disk"]["needed_bytes"] >= estimated["total"]
    after = _estimate(fresh, *settings).document
    assert after["to_do"]["steps"] == after["disk"]["needed_bytes"] == 0 and after["done"]["units"] == 3
    assert (after["all"], after["bytes"]) == (document["all"], document["bytes"])


def test_only_headers_of_videos_are_read(fresh, monkeypatch):
    """Of a video of a megabyte, whose header lies at its end, not more than a few buffers."""
    video = make_video(200, 3, size=(240, 320), codec="mpeg4", options={"b": "50000000", "g": "1"})
    write_vpt_tar(fresh.recordings / "big.tar", {"big": (video, b"{}\n")})
    num_read = Counter()

    def counted(file, size=-1):
        content = io.BufferedReader.read(file, size)
        num_read[file.name] += len(content)
        return content

    monkeypatch.setattr(tarfile.ExFileObject, "read", counted, raising=False)
    monkeypatch.setattr(
        "jepa_cache.sources.vpt.VptSource.iter_episodes", lambda *_: pytest.fail("recordings were read")
    )
    monkeypatch.setattr("jepa_cache.media.video.open_video", lambda *_: pytest.fail("a video was opened"))
    document = _estimate(fresh).document
    assert document["all"]["episodes"] == 5
    assert len(video) > 1 << 20 and 0 < max(num_read.values()) < 192 << 10


def test_many_units_are_estimated_from_some_and_that_is_told(fresh, monkeypatch):
    monkeypatch.setattr(estimate, "MAX_HEADERS", 2)
    exact = sum(n // 4 + (n % 4 > 0) for n in (45, 38, 41, 60))
    result = _estimate(fresh)
    assert result.document["estimated"] and result.document["all"]["units"] == 3
    assert result.document["all"]["steps"] == pytest.approx(exact, rel=0.4)
    assert "estimated by bytes from 2 of them" in fresh.run("estimate", fresh.recordings).out


def test_a_folder_of_videos_is_estimated_from_headers_and_tables(fresh, monkeypatch):
    folder = fresh.folder / "pairs"
    folder.mkdir()
    for number, num_frames in enumerate((30, 47)):
        (folder / f"{number}.mp4").write_bytes(make_video(num_frames, number, fps=10))
        rows = [[0.0, float(i)] for i in range(num_frames)]
        (folder / f"{number}.json").write_text(json.dumps({"fps": 10, "states": rows, "actions": rows}))
    monkeypatch.setattr("jepa_cache.media.video.open_video", lambda *_: pytest.fail("a video was opened"))
    result = fresh.run("estimate", "--json", folder, "dataset=mp4_json", "encode.fps=5")
    assert result.document["all"]["steps"] == 15 + 24 and result.document["all"]["episodes"] == 2


def test_what_the_disk_cannot_hold_is_refused(fresh, monkeypatch):
    needed = _estimate(fresh).document["disk"]["needed_bytes"]
    for free, code in ((needed, 0), (needed - 1, 1)):
        monkeypatch.setattr(
            "jepa_cache.cli.estimate.shutil.disk_usage", lambda _, free=free: type("Usage", (), {"free": free})()
        )
        result = _estimate(fresh)
        assert result.code == code and result.document["fits"] == (code == 0)
    text = fresh.run("estimate", fresh.recordings).out
    assert "refused: it does not fit" in text and "encode.dtype" in text


def test_only_what_is_missing_must_fit(checkout):
    whole = _estimate(checkout).document
    assert whole["disk"]["needed_bytes"] == 0
    shutil.rmtree(checkout.tokens(0))
    document = _estimate(checkout).document
    num_steps = checkout.manifest.entries[0].num_steps
    assert document["to_do"]["steps"] == num_steps and document["all"] == whole["all"]
    assert 0 < document["disk"]["needed_bytes"] < document["bytes"]["float16"]["tokens"]


def test_hours_come_from_a_given_rate_and_runs_from_the_frames_that_one_touches(fresh):
    assert _estimate(fresh).document["hours"] is None
    document = _estimate(fresh, "--frames-per-s", "10").document
    frames = document["to_do"]["frames"]
    assert document["hours"] == pytest.approx(frames / 10 / 3600)
    touched = 600 * 32 * 8  # configs/train/demo.yaml
    assert document["break_even"] == {"frames_touched_per_run": touched, "runs": pytest.approx(frames / touched)}
    assert not fresh.root.path.exists()
