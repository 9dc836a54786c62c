"""Claims: the file and the example that docs/add_a_dataset.md shows work as they stand, under the contract test itself."""

import importlib.util
import inspect
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import jepa_cache.sources
from jepa_cache.episode import Episode, Skipped
from jepa_cache.sources import build_source
from tests.sources import examples, test_contract
from tests.sources.lerobot_makers import cached_video

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "add_a_dataset.md").read_text()
SOURCE, EXAMPLE = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The documented source under its name, and its example; gone after the test."""
    (tmp_path / "mp4_csv.py").write_text(SOURCE)
    name = "jepa_cache.sources.mp4_csv"
    spec = importlib.util.spec_from_file_location(name, tmp_path / "mp4_csv.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(jepa_cache.sources, "__path__", [*jepa_cache.sources.__path__, str(tmp_path)])
    namespace = dict(vars(examples))
    exec(EXAMPLE, namespace)
    example = namespace["mp4_csv"]()["pairs"]
    monkeypatch.setitem(test_contract.FOUND, "mp4_csv-pairs", ("mp4_csv", example))
    monkeypatch.setattr(test_contract, "list_sources", jepa_cache.sources.list_sources)
    example.write(tmp_path / "input", range(3))
    return build_source("mp4_csv", example.options), example, tmp_path / "input"


def list_tests(argument):
    return [
        name
        for name, function in vars(test_contract).items()
        if name.startswith("test_") and argument in function.__code__.co_varnames[:1]
    ]


@pytest.mark.parametrize("name", [*list_tests("case"), *list_tests("form")])
def test_the_documented_source_keeps_the_contract(installed, name, monkeypatch, tmp_path):
    """Run a test of the contract on its first argument and the fixtures that it names."""
    function = getattr(test_contract, name)
    names, by_form = inspect.signature(function).parameters, name in list_tests("form")
    fixtures = {"monkeypatch": monkeypatch, "tmp_path": tmp_path / "many" if by_form else tmp_path}
    function(
        "mp4_csv-pairs" if by_form else installed, **{known: fixtures[known] for known in fixtures if known in names}
    )


def test_the_documented_json_is_read(tmp_path):
    records = json.loads(re.search(r"```json\n(.*?)```", TEXT, re.DOTALL)[1])
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "a.mp4").write_bytes(cached_video(3, 0))
    source = build_source("mp4_json", {})
    (unit,) = source.list_units(["."], tmp_path)
    (episode,) = source.iter_episodes(unit)
    assert isinstance(episode, Episode)
    assert np.array_equal(episode.controls["state_0"], [0.31, 0.32, 0.34])
    assert episode.controls["success"].all()


def test_the_first_mistake_gives_the_documented_message(tmp_path):
    rows = [[0.0, 0.0]] * 120
    (tmp_path / "a.json").write_text(json.dumps({"fps": 30, "states": rows, "actions": rows}))
    (tmp_path / "a.mp4").write_bytes(cached_video(360, 0, 30))
    source = build_source("mp4_json", {})
    (item,) = [item for unit in source.list_units(["."], tmp_path) for item in source.iter_episodes(unit)]
    assert isinstance(item, Skipped)
    assert item.reason in TEXT
