"""report.html.

Claims:
- it is made from the files in the folder alone; a measurement that was not requested is named with the command that makes it;
- verdict, films, figures with their intervals, tables and pictures all arrive, the verdict first, and names of figures are words;
- names from the data cannot write into it; it has no script but its own, no link and no address of another place;
- a browser with a screen of 360 pixels does not scroll it sideways, however wide its tables are;
- in a browser its own script runs under its policy: a click on a column sorts the table, a second one the other way round.
"""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from jepa_cache.evaluation.metrics import write_json, write_table
from jepa_cache.evaluation.page import MAX_ROWS, read_table, shorten, spell, write_page
from jepa_cache.evaluation.run import MEASUREMENTS
from tests.browser import measure_widths, open_page

TYPED = " evaluate.horizon=4 outputs=outputs/b"
EVIL = "<script>alert(1)</script>\"'><img src=http://evil>"
FIGURES = {"teacher_forcing_l1": 0.45591, "rollout_l1": 0.53991, "teacher_forcing_cosine": 0.9, "rollout_cosine": 0.8}
QUESTIONS = ("actions", "readout", "actions_rollout", "timing", "copying", "baselines", "horizon", "limits")
GAP = {"gap_shuffled_actions_step4": 0.14891, "gain_shuffled_actions_step4_percent": 24.6, "odd_figure": 7.0}
SHOWN = ("horizon.png", "training.png", "energy_ranks.png", "energy_maps.png")
SPRITES = ("film1_1_tokens.png", "film1_2_tokens.png", "film1_1_frames.jpg")


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
    frames = SPRITES[2], None
    panels = [
        {
            "title": title,
            "tokens": tokens,
            "frames": file,
            "frame_words": [None, EVIL],
            "token_words": [None, "L1 0.512"],
        }
        | {"moves": [None, {"angle": 30.0, "length": 0.5, "words": EVIL}]}
        for title, tokens, file in zip(("What happened", "Foreseen"), SPRITES, frames, strict=False)
    ]
    film = {
        "title": "The median window",
        "reason": "as it is",
        "place": EVIL,
        "frame_shape": 0.5,
        "l1": [0.1, 0.2, 0.3],
    }
    reel = {"films": [film | {"panels": panels}], "num_steps": 2, "num_context_steps": 1, "token_shape": 1.0}
    write_json(reel, folder / "measurements/films.json")
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
    (folder / "pictures").mkdir(exist_ok=True)
    for name in (*SHOWN, *SPRITES):
        Image.fromarray(np.zeros((40, 1600, 3), np.uint8)).save(folder / "pictures" / name)
    write_page(folder, MEASUREMENTS.values(), TYPED)
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return write_folder(tmp_path_factory.mktemp("evaluation"))


def test_every_part_arrives_with_its_interval_and_the_verdict_comes_first(text):
    page = Page(text)
    assert page.headings[:3] == ["Verdict", "What it foresees", "Curves"]
    assert page.headings[-2:] == ["Figures", "Command"]
    places = [page.text.index(f"? yes answer to {name}, ") for name in QUESTIONS]
    assert places == sorted(places)
    for part in (
        *(
            "random weights",
            "Encoder: its maker.",
            "Clip mode",
            "0.4559",
            "0.4459 to 0.4659",
            "0.8 [0.7, 0.9]",
        ),
        *("shuffled actions, open-loop step 4", "0.1489", "24.59 to 24.61", "0.002"),
        *("0.57 [0.42, 0.72]", "R2, x", "0.6 to 0.8"),
        *("The median window", "0.1 with its actions", "L1 0.512", "nothing is foreseen yet", "seen 1", "foreseen +1"),
        *("no label here", "nested.a.b", "[1, 2]"),
        *(f"{name} figure" for name in ("energy", "distance", "noise", "probe")),
        f"of {MAX_ROWS + 5} rows",
        f"python stages/evaluate.py{TYPED}",
    ):
        assert part in page.text, part
    assert page.text.count("0.5123 [0.5, 0.53]") == MAX_ROWS, "and no more"
    images = page.all("img")
    assert len(images) == len(SHOWN) and all(image["alt"] for image in images)
    assert text.count("url(data:image/") == len(SPRITES), "each once, however often it is shown"
    assert "Not measured" not in page.text


def test_what_was_not_measured_is_said_with_the_way_to_get_it(tmp_path):
    page = Page(write_folder(tmp_path, measured=False, encoder_trained=True, comparable=True))
    for name in ("energy", "distances", "noise", "probes"):
        assert f", by python stages/evaluate.py{TYPED} 'evaluate.measure=[{name}]'" in page.text
    assert page.text.count("Not measured: ") == 4
    assert "random weights" not in page.text and "Clip mode" not in page.text


def test_names_in_the_data_cannot_write_into_the_page_and_nothing_is_loaded(text):
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"link", "iframe", "a", "object", "base"}
    assert len(page.all("script")) == 1 and page.all("script") == [{}]
    assert all(image["src"].startswith("data:image/") for image in page.all("img"))
    assert not [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)]
    assert page.text.count(EVIL) >= MAX_ROWS and "@import" not in text
    assert text.count("url(") == text.count("url(data:image/")
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    own = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
    assert policy.split("; ")[0] == "default-src 'none'" and policy.endswith(f"script-src 'sha256-{digest}'")
    assert page.all("html")[0]["lang"] == "en"
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))


def test_a_phone_does_not_scroll_the_page_sideways(text, tmp_path):
    too_wide = "<!doctype html><div style='width: 500px'>this one does</div>"
    *widths, control = measure_widths([text, too_wide], 360, tmp_path)
    assert control >= 500, "else the measurement would see nothing"
    assert max(widths) <= 360


def test_a_click_sorts_a_table_and_another_turns_it_round(text, tmp_path):
    """The policy lets no second script in, so the clicks are made by one whose hash is added to it."""
    click = (
        "const rows = () => [...document.querySelectorAll('table')].find(t => t.textContent.includes('sorted')).tBodies[0].rows;"
        "const head = [...document.querySelectorAll('thead th')].find(h => h.textContent === 'sorted');"
        "const order = () => [...rows()].map(row => row.cells[1].textContent).join(' ');"
        "const found = [order()]; head.click(); found.push(order()); head.click(); found.push(order());"
        "document.body.dataset.found = found.join(' | ');"
    )
    rows = "".join(f"<tr><th>x</th><td>{value}</td></tr>" for value in ("10", "-", "-2.5", "9 [1, 2]"))
    table = f"<table><thead><tr><th>name</th><th>sorted</th></tr></thead><tbody>{rows}</tbody></table>"
    digest = base64.b64encode(hashlib.sha256(click.encode()).digest()).decode()
    page = text.replace("script-src ", f"script-src 'sha256-{digest}' ").replace("</main>", f"{table}</main>")
    (tmp_path / "page.html").write_text(page.replace("</body>", f"<script>{click}</script></body>"), encoding="utf-8")
    shown = open_page(tmp_path / "page.html", tmp_path)
    assert 'data-found="10 - -2.5 9 [1, 2] | -2.5 9 [1, 2] 10 - | 10 9 [1, 2] -2.5 -"' in shown


def test_names_of_figures_are_words():
    assert spell("frechet_pooled_copy_last_step4") == (
        "Fréchet distance, mean token of a step, copy the last step, open-loop step 4"
    )
    assert spell("num_dims_token") == "principal components, single tokens"
    assert spell("inverse_dynamics_dyaw_r2") == "inverse dynamics dyaw, R2"
    assert spell("value") == "value" and spell("l1") == "L1"


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
