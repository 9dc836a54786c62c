"""report.html.

Claims:
- it is made from the files in the folder alone: it says of every missing part that it is left out and how to get it;
- verdict, figures with their intervals, tables and pictures all arrive, the verdict first; pictures that no section knows too;
- names from the data cannot write into it; it has no script, no link and no address of another place;
- a browser with a screen of 360 pixels does not scroll it sideways, however wide its tables are;
- what is damaged is an error that names the file; what is too heavy or too long is named and left out.
"""

import csv
import json
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from jepa_cache.evaluation.page import MAX_PICTURE_BYTES, MAX_ROWS, build_page, merge_intervals, write_page
from jepa_cache.evaluation.run import MEASUREMENTS
from jepa_cache.webpage import STYLE
from tests.browser import measure_widths

EVIL = "<script>alert(1)</script>\"'><img src=http://evil>"
METRICS = {
    "encoder_trained": True,
    "comparable": True,
    "mode": "frame",
    "num_episodes": 10,
    "num_windows": 160,
    "num_fitted_steps": 3366,
    "val": {"teacher_forcing_l1": 0.45591, "rollout_l1": 0.53991, "gap_shuffled_actions": 0.14891, "odd_figure": 7.0},
    "val_ci": {"teacher_forcing_l1": [0.43, 0.47], "rollout_l1": [0.52, 0.56], "gap_shuffled_actions": [0.13, 0.16]},
}


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


def write_rows(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def bare(tmp_path):
    """An evaluation of which nothing but the metrics is there."""
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS))
    return tmp_path


@pytest.fixture
def whole(tmp_path):
    """An evaluation with everything, and evil names wherever the data gives names."""
    verdict = {
        "limits": {"answer": "some", "words": "what it cannot say"},
        "actions": {"answer": "yes", "words": f"it does, {EVIL}"},
        "copying": {"answer": "no", "words": "worse than copying"},
        "another_question": {"answer": "unclear", "words": "who knows"},
    }
    settings = {"dataset": EVIL, "encoder": EVIL, "predictor": EVIL, "train_steps": 600}
    metrics = METRICS | {"encoder_trained": False, "comparable": False, "verdict": verdict, "settings": settings}
    for name in ("energy", "distance", "noise", "probe"):
        metrics |= {name: {f"{name}_figure": 0.25}, f"{name}_ci": {f"{name}_figure": [0.2, 0.3]}}
    metrics["probe_notes"] = {EVIL: "no label here"}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    measured = {"measured": {"evaluate": {"horizon": 4, "measure": ["energy"], "energy_axes": None}}}
    (tmp_path / "settings.json").write_text(
        json.dumps(settings | {"predictor": {"name": EVIL}, "nested": {"a": {"b": [1, 2]}}} | measured)
    )
    (tmp_path / "measurements").mkdir()
    interval = {"l1": 0.512345, "l1_low": 0.5, "l1_high": 0.53}
    write_rows(tmp_path / "horizon.csv", [{"horizon": 1, "model": 0.5, "model_low": 0.4, "model_high": 0.6}])
    write_rows(tmp_path / "slices.csv", [{"slice": "episode", "value": EVIL} | interval for _ in range(MAX_ROWS + 5)])
    write_rows(tmp_path / "worst.csv", [{"rank": 1, "episode": f"{EVIL} {'x' * 400}", "camera": EVIL, "l1": 0.9}])
    for name in ("energy_ranks", "distance", "noise"):
        write_rows(tmp_path / f"measurements/{name}.csv", [{f"column_{number}": 0.123456 for number in range(40)}])
    write_rows(
        tmp_path / "measurements/probes.csv", [{"probe": EVIL, "value": 0.8, "low": 0.7, "high": 0.9, "baseline": 0.0}]
    )
    (tmp_path / "pictures").mkdir()
    for name in ("horizon", "actions", "strip1", "strip2", "energy_ranks", "energy_maps", "unheard_of"):
        Image.fromarray(np.zeros((40, 1600, 3), np.uint8)).save(tmp_path / f"pictures/{name}.png")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "pictures/rollout1.gif")
    return tmp_path


def test_every_part_arrives_with_its_interval_and_the_verdict_comes_first(whole):
    write_page(whole, MEASUREMENTS.values())
    page = Page((whole / "report.html").read_text())
    order = ["Verdict", "Figures", "Pictures", "Slices", "Worst windows"]
    assert page.headings[:5] == order and page.headings[-3:] == ["Every figure", "Settings", "Command"]
    for text in ("it does, ", "worse than copying", "Another question", "who knows", "random weights", "Clip mode"):
        assert text in page.text
    for text in (
        "0.4559",
        "0.43 to 0.47",
        "0.1489",
        "0.13 to 0.16",
        "odd_figure",
        "0.5123 [0.5, 0.53]",
        "0.8 [0.7, 0.9]",
    ):
        assert text in page.text
    assert all(f"{name}_figure" in page.text for name in ("energy", "distance", "noise", "probe"))
    assert page.text.index("it does, ") < page.text.index("worse than copying") < page.text.index("what it cannot say")
    assert "0.2 to 0.3" in page.text and "nested.a.b" in page.text and f"of {MAX_ROWS + 5} rows" in page.text
    assert "evaluate.horizon=4 'evaluate.measure=[\"energy\"]' evaluate.energy_axes=null" in page.text
    assert page.text.count("0.5123 [0.5, 0.53]") == MAX_ROWS, "and no more"
    images = page.all("img")
    assert len(images) == len(list((whole / "pictures").iterdir())) and all(image["alt"] for image in images)
    assert "Left out" not in page.text and "Not measured" not in page.text


def test_what_is_not_there_is_said_with_the_way_to_get_it(bare):
    page = Page(build_page(bare, MEASUREMENTS.values()))
    assert "0.4559" in page.text and "This evaluation gave none" in page.text and not page.all("img")
    for name in ("energy", "distances", "noise", "probes"):
        assert f"Not measured. python stages/evaluate.py 'evaluate.measure=[{name}]' measures it." in page.text
    assert "wrote no slices.csv" in page.text and "wrote no worst.csv" in page.text
    assert "no settings.json" in page.text and "There are none in pictures/" in page.text
    assert "random weights" not in page.text and "Clip mode" not in page.text


def test_names_in_the_data_cannot_write_into_the_page_and_nothing_is_loaded(whole):
    text = build_page(whole, MEASUREMENTS.values())
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "a", "object", "base"}
    assert all(image["src"].startswith("data:image/") for image in page.all("img"))
    assert not [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)]
    assert page.text.count(EVIL) >= MAX_ROWS and "url(" not in STYLE and "@import" not in STYLE
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'") and page.all("html")[0]["lang"] == "en"
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))


def test_a_phone_does_not_scroll_the_page_sideways(whole, bare, tmp_path):
    too_wide = "<!doctype html><div style='width: 500px'>this one does</div>"
    *widths, control = measure_widths([build_page(whole, MEASUREMENTS.values()), too_wide], 360, tmp_path)
    assert control >= 500, "else the measurement would see nothing"
    assert max(widths) <= 360


def test_pictures_that_are_too_heavy_are_named_and_the_page_stays_below_5_mb(whole):
    for name in ("strip1.png", "strip2.png", "rollout1.gif"):
        (whole / "pictures" / name).write_bytes(b"x" * (MAX_PICTURE_BYTES // 2))
    write_page(whole, MEASUREMENTS.values())
    page = Page((whole / "report.html").read_text())
    assert "Too heavy for this page: pictures/strip2.png" in page.text
    assert (whole / "report.html").stat().st_size < 5_000_000


def test_damaged_files_are_errors_that_name_them(bare, tmp_path):
    (bare / "worst.csv").write_text("rank,episode\n1,a,b\n")
    with pytest.raises(ValueError, match=r"line 2 of .*worst\.csv has 3 cells, its header 2; run"):
        write_page(bare, MEASUREMENTS.values())
    (bare / "metrics.json").write_text("{")
    with pytest.raises(ValueError, match=r"metrics\.json is no JSON .*run `python stages/evaluate\.py` again"):
        write_page(bare, MEASUREMENTS.values())
    with pytest.raises(ValueError, match=r"metrics\.json is missing.*run `python stages/evaluate\.py`"):
        write_page(tmp_path / "nowhere", MEASUREMENTS.values())
    assert not (bare / "report.html").exists()


def test_intervals_join_their_value_and_other_columns_stay():
    head, rows = merge_intervals(
        ["rank_bin_low", "rank_bin_high", "x", "x_low", "x_high", "name"],
        [["0.0", "0.1", "1.23456", "1.0", "2.0", "007"]],
    )
    assert head == ["rank bin low", "rank bin high", "x", "name"] and rows == [["0", "0.1", "1.235 [1, 2]", "007"]]
    assert merge_intervals(["x", "x_low", "x_high"], [["0.50000", "", ""]])[1] == [["0.5"]], "over one episode"
