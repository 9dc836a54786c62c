"""Claims: recordings that are not found say the way out, from wherever the command was typed: render, pack, or name them in full."""

import pytest

from jepa_cache.encoding.units import check_rendered, list_units
from jepa_cache.sources import build_source, suggest_source
from tests.encoded import tiny_config


def _find(preset, base, *inputs):
    return list_units(build_source(preset.source, preset.source_options), preset, inputs, base)


@pytest.fixture
def vpt():
    return tiny_config().dataset


@pytest.fixture
def sample(vpt):
    return vpt.__class__(**{**vpt.__dict__, "name": "sample", "inputs": ("shards/sample",), "sample": {}})


@pytest.mark.parametrize("folder", [None, "shards/sample"])
def test_a_sample_that_was_never_rendered_names_the_stage_that_renders_it(sample, tmp_path, folder):
    if folder:
        (tmp_path / folder).mkdir(parents=True)  # what the stage leaves when another data set is chosen
    with pytest.raises(ValueError, match=r"not rendered yet: .*shards/sample holds no .*stages/sample\.py"):
        _find(sample, tmp_path)
    check_rendered(sample, ["elsewhere"], tmp_path)


def test_recordings_below_the_present_folder_are_pointed_at_by_their_full_name(vpt, tmp_path, monkeypatch):
    here, checkout = tmp_path / "data", tmp_path / "checkout"
    (here / "films").mkdir(parents=True)
    checkout.mkdir()
    monkeypatch.chdir(here)
    with pytest.raises(ValueError, match="finds no") as caught:
        _find(vpt, checkout, "films")
    assert caught.value.__notes__ == [f"{here / 'films'} is there: name it so, in full"]
    with pytest.raises(ValueError, match="finds no") as caught:
        _find(vpt, checkout, "nowhere")
    assert caught.value.__notes__ == [f"{checkout / 'nowhere'} does not exist"]
    (checkout / "droid_100").mkdir()
    with pytest.raises(ValueError, match="finds no") as caught:
        _find(vpt, checkout, "droid_1000")
    assert caught.value.__notes__ == [f"{checkout / 'droid_1000'} does not exist; did you mean 'droid_100'?"]
    (checkout / "films").mkdir()
    with pytest.raises(ValueError, match="finds no") as caught:
        _find(vpt, checkout, "films")
    assert not getattr(caught.value, "__notes__", []), "the folder that was meant is there, only empty"


def test_loose_pairs_name_the_command_that_packs_them(vpt, tmp_path):
    (tmp_path / "films" / "june").mkdir(parents=True)
    (tmp_path / "films" / "june" / "a.mp4").touch()
    with pytest.raises(ValueError, match="finds no") as caught:
        _find(vpt, tmp_path, "films")
    (note,) = caught.value.__notes__
    assert "a.mp4" in note and f"jepa-cache pack {tmp_path / 'films'} OUT" in note


@pytest.mark.parametrize(
    ("files", "reader"),
    [
        (["lab/day/episode/trajectory.h5", "lab/day/episode/recordings/MP4/1.mp4"], "dataset=droid_raw"),
        (["1.0.0/features.json", "1.0.0/x-train.tfrecord-00000-of-00001"], "dataset=droid_rlds"),
        (["mine/meta/info.json", "mine/videos/a.mp4", "mine/meta/episodes.jsonl"], "configs/dataset/lerobot.yaml"),
        (["day/a.mp4", "day/a.json"], "dataset=mp4_json"),
    ],
)
def test_a_folder_in_the_form_of_another_data_set_names_the_one_that_reads_it(vpt, tmp_path, files, reader):
    for file in files:
        path = tmp_path / "films" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with pytest.raises(ValueError, match="finds no") as caught:
        _find(vpt, tmp_path, "films")
    (note,) = caught.value.__notes__
    assert reader in note and "pack" not in note


def test_a_source_is_not_recommended_to_itself(tmp_path):
    (tmp_path / "trajectory.h5").touch()
    assert suggest_source(tmp_path, "droid_raw") is None
    assert "dataset=droid_raw" in suggest_source(tmp_path, "vpt")
