"""Claims, for every source whose units hold several recordings: the first ones can be had alone, as they are in the whole.

What lies behind them is not looked at; a unit that holds no more is taken as it is; a part never has the digest of the whole.
"""

import numpy as np
import pytest

from jepa_cache.encoding import subset
from jepa_cache.encoding.subset import take_recordings
from jepa_cache.encoding.units import UnitDigester
from jepa_cache.episode import Episode
from jepa_cache.media.tar import iter_samples, list_samples
from jepa_cache.media.tar_subset import copy_first_samples
from jepa_cache.media.video import open_video
from jepa_cache.sources import Head, build_source
from tests.droid_makers import CAMERAS, decode, droid_features, make_episode, to_example, to_jpeg, write_tfds
from tests.makers import make_vpt_pair, write_tar, write_vpt_tar
from tests.sources.lerobot_makers import CAMERA, write_v2, write_v3

LEROBOT = {"camera": CAMERA, "actions": ["action[lift]"], "states": ["observation.state"]}
SUFFIXES = ("mp4", "jsonl")


def write_vpt(folder):
    write_vpt_tar(folder / "a.tar", {f"s{seed}": make_vpt_pair(6, seed) for seed in range(3)})


def write_rlds(folder):
    episodes = [make_episode(seed, 12) for seed in range(3)]
    images = [
        {camera: [to_jpeg(frame) for frame in decode(episode.videos["wrist"])] for camera in CAMERAS}
        for episode in episodes
    ]
    examples = [to_example(*pair) for pair in zip(episodes, images, strict=True)]
    write_tfds(folder / "1.0.0", droid_features((48, 64), extras=False), [examples])


def write_lerobot(folder):
    write_v3(folder / "arm", [{0: 12, 1: 9, 2: 7}])


FORMS = {"vpt": (write_vpt, {}), "droid_rlds": (write_rlds, {}), "lerobot": (write_lerobot, LEROBOT)}


@pytest.fixture(params=FORMS)
def case(request, tmp_path):
    """(source, its only unit, of three recordings, an empty folder)."""
    write, options = FORMS[request.param]
    (tmp_path / "input").mkdir()
    (tmp_path / "head").mkdir()
    write(tmp_path / "input")
    source = build_source(request.param, options)
    (unit,) = source.list_units(["."], tmp_path / "input")
    return source, unit, tmp_path / "head"


@pytest.mark.parametrize("most", [1, 2])
def test_the_first_recordings_are_those_of_the_whole(case, most):
    source, unit, folder = case
    head = source.take_first(unit, most, folder)
    assert head.num_recordings == most and head.unit != unit
    parts, whole = list(source.iter_episodes(head.unit)), list(source.iter_episodes(unit))[:most]
    assert [item.key for item in parts] == [item.key for item in whole] and len(parts) == most
    for one, other in zip(parts, whole, strict=True):
        assert list(one.controls) == list(other.controls)
        assert all(np.array_equal(column, other.controls[name]) for name, column in one.controls.items())
        with open_video(one.video, first_frame=one.first_frame) as video:
            frames = video.read(np.arange(len(one.frame_ticks)))
        with open_video(other.video, first_frame=other.first_frame) as video:
            assert np.array_equal(frames, video.read(np.arange(len(other.frame_ticks))))


@pytest.mark.parametrize("most", [3, 10])
def test_a_unit_that_holds_no_more_is_taken_as_it_is(case, most):
    source, unit, folder = case
    assert source.take_first(unit, most, folder) == (unit, 3)
    assert not list(folder.iterdir())


def test_a_part_has_a_digest_of_its_own_and_the_same_in_every_run(case, monkeypatch, tmp_path):
    source, unit, _ = case
    digests = set()
    for run in range(2):
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / f"state{run}"))
        (part,), notes = take_recordings(source, [unit], 2)
        digests.add(UnitDigester()([part]).units[0].digest)
        assert "only the first 2 recordings" in notes[0]
    assert len(digests) == 1 and digests != {UnitDigester()([unit]).units[0].digest}


def test_a_part_is_made_once_and_again_when_its_recordings_change(case, monkeypatch):
    source, unit, _ = case
    made = take_recordings(source, [unit], 1)
    file, content = unit.files[0], unit.files[0].read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(type(source), "take_first", lambda *_: pytest.fail("made again"))
        assert take_recordings(source, [unit], 1) == made
    file.write_bytes(content)
    assert take_recordings(source, [unit], 1)[0] != made[0], "the time of the file is new"
    for path in made[0][0].files:
        if path.name == file.name:
            path.unlink()
    assert all(path.is_file() for path in take_recordings(source, [unit], 1)[0][0].files)


def test_what_lies_behind_the_first_recordings_is_not_looked_at(tmp_path):
    for write, pattern, name in ((write_vpt, "*.tar", "vpt"), (write_rlds, "*/*.tfrecord-*", "droid_rlds")):
        folder = tmp_path / name
        (folder / "head").mkdir(parents=True)
        write(folder)
        (file,) = folder.glob(pattern)
        source = build_source(name, {})
        (unit,) = source.list_units(["."], folder)
        content = bytearray(file.read_bytes())
        content[len(content) // 2 :] = b"\xff" * (len(content) - len(content) // 2)
        file.write_bytes(content)
        head = source.take_first(unit, 1, folder / "head")
        (episode,) = source.iter_episodes(head.unit)
        assert isinstance(episode, Episode) and head.num_recordings == 1


def test_units_behind_the_last_one_wanted_are_not_opened(tmp_path):
    write_v2(tmp_path / "arm", dict.fromkeys(range(4), 6))
    source = build_source("lerobot", LEROBOT)
    units = source.list_units(["."], tmp_path)
    for unit in units[2:]:
        for file in unit.files[:2]:
            file.unlink()
    taken, notes = take_recordings(source, units, 2)
    assert taken == units[:2] and "2 of 4 units were not read at all" in notes[0]


def test_a_unit_that_is_read_in_part_is_not_called_unread(monkeypatch):
    monkeypatch.setattr(subset, "_take", lambda source, unit, most: Head(object(), most))
    _, notes = take_recordings(object(), [object()], 2)
    assert notes == ("encode.max_episodes is 2: only the first 2 recordings are in here",)


def test_a_source_without_parts_counts_a_unit_as_one_recording(tmp_path):
    units = [object(), object(), object()]
    assert take_recordings(object(), units, 2)[0] == units[:2]
    assert take_recordings(object(), units, 3) == (units, ())


LONG = "x" * 200
TARS = {
    "plain": [("a.mp4", b"1"), ("a.jsonl", b"2"), ("b.mp4", b"3"), ("b.jsonl", b"4")],
    "mixed": [("a.mp4", b"1"), ("b.mp4", b"3"), ("a.jsonl", b"2"), ("b.jsonl", b"4")],
    "long names": [(f"{LONG}.mp4", b"1"), (f"{LONG}.jsonl", b"2"), ("b.mp4", b"3"), ("b.jsonl", b"4")],
    "other members": [("a.mp4", b"1"), ("a-options.json", b"{"), ("a.zip", b"z"), ("a.jsonl", b"2"), ("b.mp4", b"3")],
    "doubled": [("a.mp4", b"1"), ("a.mp4", b"1"), ("a.jsonl", b"2"), ("b.mp4", b"3")],
    "incomplete": [("a.mp4", b"1"), ("b.mp4", b"3"), ("b.jsonl", b"4"), ("c.mp4", b"5")],
}


@pytest.mark.parametrize("form", TARS)
def test_the_first_sample_of_a_tar_is_copied_with_all_its_members_and_faults(tmp_path, form):
    path = write_tar(tmp_path / "x.tar", TARS[form])
    whole = list(iter_samples(path, SUFFIXES))
    assert len(list_samples(path, SUFFIXES)) == len(whole)
    assert copy_first_samples(path, SUFFIXES, 1, tmp_path / "first.tar") == 1
    assert list(iter_samples(tmp_path / "first.tar", SUFFIXES)) == whole[:1]


def test_members_that_belong_to_no_sample_do_not_make_a_tar_longer(tmp_path):
    path = write_tar(
        tmp_path / "x.tar", [("a.mp4", b"1"), ("a.jsonl", b"2"), ("a-options.json", b"{"), ("README", b"")]
    )
    assert copy_first_samples(path, SUFFIXES, 1, tmp_path / "first.tar") is None
    assert not (tmp_path / "first.tar").exists()
