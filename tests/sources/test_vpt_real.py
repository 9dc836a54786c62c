"""Claims of sources/vpt.py on real recordings: they are read whole, follow the measured laws, and a look-alike is refused."""

import itertools

import numpy as np
import pytest

from jepa_cache.actions import get_action_space
from jepa_cache.episode import Episode, Skipped
from jepa_cache.media.tar import pack_folder
from jepa_cache.media.video import open_video
from jepa_cache.sources import Unit, build_source
from jepa_cache.sources.parsers.vpt_controls import read_contractor
from jepa_cache.sources.vpt import check_yaw_law
from tests.makers import REAL_VPT

pytestmark = pytest.mark.skipif(not REAL_VPT.exists(), reason="no real recordings in ../shared/data/vpt")
LOGS = sorted(REAL_VPT.rglob("trimmed_*.jsonl"))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("shards")
    pack_folder(REAL_VPT, out)
    source = build_source("vpt", {})
    return [result for unit in source.list_units(["."], out) for result in source.iter_episodes(unit)]


def test_the_pair_is_read_with_its_445_frames_and_446_lines(results):
    (episode,) = [result for result in results if isinstance(result, Episode)]
    assert "shabby-viridian-beaver" in episode.key
    assert (episode.num_video_frames, len(episode.frame_ticks), len(episode.controls["tick"])) == (445, 445, 446)
    assert episode.notes == ("445 frames, 446 lines: the last 1 lines are not used",)
    with open_video(episode.video) as video:
        assert video.read(np.array([0, 444])).shape == (2, 360, 640, 3)


def test_the_look_alike_is_skipped_and_says_why(results):
    (skipped,) = [result for result in results if isinstance(result, Skipped)]
    assert "fearless-timber-seeker" in skipped.key
    assert "yaw does not follow the mouse in 4 of 4" in skipped.reason


@pytest.mark.parametrize("log", LOGS, ids=lambda path: path.stem)
def test_logs_follow_the_yaw_law_and_lose_their_stuck_attack(log):
    controls, notes, *_ = read_contractor(log.read_bytes())
    check_yaw_law(controls)
    assert notes == ()
    assert not controls["attack"][0], "all of them are stuck on the first line"
    outside = ~controls["gui"][:-1]
    error = np.diff(controls["yaw_deg"]) - 0.15 * controls["mouse_dx"][:-1]
    assert np.mean(np.abs(error[outside]) < 0.01) > 0.99


@pytest.mark.parametrize("log", LOGS, ids=lambda path: path.stem)
def test_outside_guis_turns_are_the_summed_mouse_over_whole_steps(log):
    controls = read_contractor(log.read_bytes()).controls
    anchors = np.arange(0, len(controls["tick"]), 4)
    actions = get_action_space("vpt36").aggregate(controls, anchors).actions.astype(np.float64)
    outside = np.array([not controls["gui"][a : b + 1].any() for a, b in itertools.pairwise(anchors)])
    error = np.abs(actions[:, 2] - 0.15 * actions[:, 0])
    assert np.mean(np.minimum(error, 360 - error)[outside] < 0.02) > 0.99


def test_the_four_logs_without_video_are_skipped_for_their_partner(tmp_path):
    from tests.makers import write_tar

    members = [(path.name, path.read_bytes()) for path in sorted((REAL_VPT / "logs_only").glob("*.jsonl"))]
    tar = write_tar(tmp_path / "a.tar", members)
    skipped = list(build_source("vpt", {}).iter_episodes(Unit("a.tar", (tar,))))
    assert len(skipped) == 4 and all("holds no" in result.reason and ".mp4" in result.reason for result in skipped)
