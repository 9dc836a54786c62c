"""report.html.

Claims:
- it is made from the files in the folder alone; a measurement that was not requested is named with the command that makes it;
- verdict, figures with their intervals, tables and pictures all arrive, the verdict first;
- names from the data cannot write into it; it has no script, no link and no address of another place;
- a browser with a screen of 360 pixels does not scroll it sideways, however wide its tables are.
"""

import json
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from jepa_cache.evaluation.metrics import write_table
from jepa_cache.evaluation.page import MAX_ROWS, read_table, shorten, write_page
from jepa_cache.evaluation.run import MEASUREMENTS
from tests.browser import measure_widths

EVIL = "<script>alert(1)</script>\"'><img src=http://evil>"
FIGURES = {"teacher_forcing_l1": 0.45591, "rollout_l1": 0.53991, "teacher_forcing_cosine": 0.9, "rollout_cosine": 0.8}
QUESTIONS = ("actions", "readout", "actions_rollout", "timing", "copying", "baselines", "horizon", "limits")
GAP = {"gap_shuffled_actions_step4": 0.14891, "gain_shuffled_actions_step4_percent": 24.6, "odd_figure": 7.0}
DRAWN = ("horizon", "actions", "strip1", "strip2", "energy_ranks", "energy_maps")
PICTURES = (*(f"{name}.png" for name in DRAWN), "rollout1.gif")


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.headings = [], "", []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data
        if self.tags and self.tags[-1][0] == "h2" and data.strip():
            self.headings.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def write_folder(folder, *, measured=True, **changes):
    """An evaluation with everything, and evil names wherever the data gives names; its page as text."""
    val = FIGURES | GAP
    metrics = {
        "encoder_trained": False,
        "comparable": False,
        "mode": "clip",
        "num_episodes": 10,
        "num_windows": 160,
        "num_fitted_steps": 3366,
        "val": val,
        "val_ci": {name: [value - 0.01, value + 0.01] for name, value in val.items()},
        "p_value": {"gap_shuffled_actions_step4": 0.002},
        "verdict": {name: {"answer": "yes", "words": f"answer to {name}, {EVIL}"} for name in QUESTIONS},
        "settings": {"dataset": EVIL, "encoder": EVIL, "predictor": EVIL},
    } | changes
    for name in ("energy", "distance", "noise", "probe") if measured else ():
        metrics |= {name: {f"{name}_figure": 0.25}, f"{name}_ci": {f"{name}_figure": [0.2, 0.3]}}
    if measured:
        metrics |= {"readout": {"r2_x": 0.7}, "readout_ci": {"r2_x": [0.6, 0.8]}, "readout_notes": {"columns": EVIL}}
        metrics["probe_notes"] = {EVIL: "no label here"}
    settings = {
        "dataset": EVIL,
        "encoder": "tiny",
        "encoder_origin": "its maker",
        "predictor": {"name": "small"},
        "nested": {"a": {"b": [1, 2]}},
    }
    settings["measured"] = {"evaluate": {"horizon": 4, "measure": ["energy"], "energy_axes": None}}
    for name, content in (("metrics", metrics), ("settings", settings)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    interval = {"l1": 0.512345, "l1_low": 0.5, "l1_high": 0.53}
    slices = [{"slice": "episode", "value": EVIL} | interval for _ in range(MAX_ROWS + 5)]
    worst = [{"rank": 1, "episode": f"{EVIL} {'x' * 400}", "camera": EVIL, "l1": 0.9}]
    probes = [{"probe": EVIL, "value": 0.8, "low": 0.7, "high": 0.9, "baseline": 0.0}]
    tables = {"slices": slices, "worst": worst, "horizon": [{"horizon": 1, "model": 0.5}]}
    tables["above"] = [
        {"against": EVIL, "tokens_percent": 0.57, "tokens_percent_low": 0.42, "tokens_percent_high": 0.72}
    ]
    tables |= {
        "measurements/noise": [{f"column_{number}": 0.123456 for number in range(40)}],
        "measurements/probes": probes,
    }
    for name, rows in tables.items():
        write_table(rows, folder / f"{name}.csv")
    (folder / "pictures").mkdir()
    for name in PICTURES:
        Image.fromarray(np.zeros((40, 1600, 3), np.uint8)).save(folder / "pictures" / name)
    write_page(folder, MEASUREMENTS.values())
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return write_folder(tmp_path_factory.mktemp("evaluation"))


def test_every_part_arrives_with_its_interval_and_the_verdict_comes_first(text):
    page = Page(text)
    order = ["Verdict", "Pictures", "Figures", "Slices", "Worst windows"]
    assert page.headings[:5] == order and page.headings[-1] == "Command"
    places = [page.text.index(f"? yes answer to {name}, ") for name in QUESTIONS]
    assert places == sorted(places)
    for part in (
        *(
            "random weights",
            "Encoder: its maker.",
            "Clip mode",
            "0.4559",
            "0.4459 to 0.4659",
            "odd_figure",
            "0.8 [0.7, 0.9]",
        ),
        *("shuffled actions, open-loop step 4", "0.1489", "24.59 to 24.61", "0.002"),
        *("0.57 [0.42, 0.72]", "r2_x", "0.6 to 0.8"),
        *("no label here", "nested.a.b", "[1, 2]"),
        *(f"{name}_figure" for name in ("energy", "distance", "noise", "probe")),
        f"of {MAX_ROWS + 5} rows",
        "predictor=small evaluate.horizon=4 'evaluate.measure=[\"energy\"]' evaluate.energy_axes=null",
    ):
        assert part in page.text, part
    assert page.text.count("0.5123 [0.5, 0.53]") == MAX_ROWS, "and no more"
    images = page.all("img")
    assert len(images) == len(PICTURES) and all(image["alt"] for image in images)
    assert "Not measured" not in page.text


def test_what_was_not_measured_is_said_with_the_way_to_get_it(tmp_path):
    page = Page(write_folder(tmp_path, measured=False, encoder_trained=True, comparable=True))
    for name in ("energy", "distances", "noise", "probes"):
        assert f"Not measured. python stages/evaluate.py 'evaluate.measure=[{name}]' measures it." in page.text
    assert "random weights" not in page.text and "Clip mode" not in page.text


def test_names_in_the_data_cannot_write_into_the_page_and_nothing_is_loaded(text):
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "a", "object", "base"}
    assert all(image["src"].startswith("data:image/") for image in page.all("img"))
    assert not [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)]
    assert page.text.count(EVIL) >= MAX_ROWS and "url(" not in text and "@import" not in text
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'") and page.all("html")[0]["lang"] == "en"
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))


def test_a_phone_does_not_scroll_the_page_sideways(text, tmp_path):
    too_wide = "<!doctype html><div style='width: 500px'>this one does</div>"
    *widths, control = measure_widths([text, too_wide], 360, tmp_path)
    assert control >= 500, "else the measurement would see nothing"
    assert max(widths) <= 360


def test_intervals_join_their_value_and_values_are_shown_short(tmp_path):
    rows = [
        {"rank_bin_low": 0.0, "x": 1.23456, "x_low": 1.0, "x_high": 2.0, "name": "007"},
        {"rank_bin_low": 0.5, "x": 0.5, "x_low": None, "x_high": None, "name": "=x"},
    ]
    write_table(rows, tmp_path / "table.csv")
    table = read_table(tmp_path / "table.csv")
    assert table.head == ["rank bin low", "x", "name"] and table.num_rows == 2
    assert table.rows == [["0", "1.235 [1, 2]", "007"], ["0.5", "0.5", "=x"]]
    assert read_table(tmp_path / "none.csv") is None
    assert [shorten(value) for value in (3, True, None, "", "e", [1])] == ["3", "true", "-", "-", "e", "[1]"]
