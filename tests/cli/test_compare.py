"""`jepa-cache compare`, on evaluations that are written by hand and committed with DVC.

Claims:
- a difference is called one only when the interval of the paired differences over shared episodes leaves 0 out: pairs show what
  the intervals of the two runs do not, and noise is no difference;
- runs of other tokens, windows, splits or filters are shown apart with the reason, exit code 1;
- settings that differ are named, and those that move no number are not;
- --all lists what lies in a project, what was committed and DVC's experiments, the best first; what cannot be read is named;
- a run is found by file, folder, checkout, git revision; one whose weights are newer, one that is none, or damaged, is one message that names it,
  exit code 2.
"""

import csv
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

from jepa_cache.cli.compare import KIND, compare_runs
from jepa_cache.evaluation.metrics import bootstrap_mean, unguard_cell, write_table
from jepa_cache.predictor.checkpoints import save_state
from jepa_cache.store.recipe import canonical_json
from tests.cli.conftest import run
from tests.workspace import copy_settings

NUM_EPISODES = 12
BASE = np.linspace(0.3, 0.9, NUM_EPISODES)  # episodes differ far more than runs do


def settings_of(**changes):
    """As evaluation/run.py writes them; `changes` with __ for dots."""
    settings = {
        "run": "r",
        "step": 10,
        "dataset": "vpt",
        "encoder": "vitl",
        "encoder_trained": True,
        "mode": "frame",
        "tokens_fingerprint": "t",
        "train": {"lr": 1e-3, "seed": 0, "num_threads": 1},
        "measured": {
            "filter": {"drop_gui": False},
            "split": {"val_share": 0.2, "seed": 0},
            "evaluate": {"horizon": 4, "num_context_steps": 3, "windows_per_episode": 2, "batch_size": 32},
            "window_steps": 8,
            "normalize_reps": True,
        },
    }
    for name, value in changes.items():
        *path, last = name.split("__")
        place = settings
        for part in path:
            place = place[part]
        place[last] = value
    return settings


def write_run(folder, errors, *, first=0, num_windows=2, trained=True, **changes):
    """An evaluation of episodes `first`, `first` + 1, ... with these open-loop errors; teacher forcing has half of each."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"episode-{number:02d}" for number in range(first, first + len(errors))]
    columns = {"copy_last_l1": np.full(len(errors), 0.8), "teacher_forcing_l1": errors / 2, "rollout_l1": errors}
    estimates = {
        name: bootstrap_mean(values, num_resamples=200, seed=0)
        for name, values in {**columns, "gap_copy_last": 0.1 * errors, "gap_zero_actions": 0 * errors}.items()
    }
    metrics = {
        "encoder_trained": trained,
        "comparable": True,
        "mode": "frame",
        "num_episodes": len(errors),
        "num_windows": num_windows * len(errors),
        "val": {name: estimate.mean for name, estimate in estimates.items()},
        "val_ci": {name: [estimate.low, estimate.high] for name, estimate in estimates.items()},
        "verdict": {"actions": {"answer": "yes", "words": "uses its actions"}},
    }
    (folder / "metrics.json").write_bytes(canonical_json(metrics))
    (folder / "settings.json").write_bytes(canonical_json(settings_of(**changes)))
    with (folder / "episodes.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["episode", "num_windows", *columns])
        writer.writerows([name, num_windows, *values] for name, *values in zip(names, *columns.values(), strict=True))
    return folder


def compare(*arguments, fails=0):
    """Run the command; its JSON document, and what it prints without --json."""
    told, result = (run("compare", *arguments, *extra) for extra in ([], ["--json"]))
    assert told.code == result.code == fails, told
    return result.document, told.out


def test_an_evaluation_of_other_weights_than_those_beside_it_is_refused(tmp_path):
    """By the checkout and by the folder of weights; the folder of the evaluation itself may always be compared."""
    evaluation, weights = write_run(tmp_path / "outputs/evaluate", BASE), tmp_path / "outputs/train/run"
    weights.mkdir(parents=True)
    for step in (10, 20):
        save_state({"weight": torch.zeros(1)}, weights / "predictor.safetensors", {"run": "r", "step": step})
        for name in (tmp_path, weights) if step == 20 else ():
            with pytest.raises(ValueError, match="another training run than these weights"):
                compare_runs([str(name)])
        for name in (evaluation,) if step == 20 else (tmp_path, weights, evaluation):
            assert compare_runs([str(name)]).document["groups"]


KEYS = ["=cmd|' /C calc'!A0", "+1", "-x", "@SUM(A1)", "\tx", "'=quoted", "''-x", "'plain", "plain", "-0.5"]


def test_no_cell_begins_a_formula_and_every_key_is_read_back_as_it_was(tmp_path):
    write_table([{"episode": key, "rollout_l1": -0.5} for key in KEYS], tmp_path / "episodes.csv")
    with (tmp_path / "episodes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [unguard_cell(row["episode"]) for row in rows] == KEYS and {row["rollout_l1"] for row in rows} == {"-0.5"}
    cells = [row["episode"] for row in rows if row["episode"][0] in "=+-@\t\r"]
    assert cells == ["+1", "-0.5"], "numbers"
    for name, key in (("old", "=x"), ("new", "'=x")):  # as written before cells were guarded, and since
        table = write_run(tmp_path / name, BASE) / "episodes.csv"
        header, first, *rest = table.read_text().splitlines()
        table.write_text("\n".join([header, ",".join([key, *first.split(",")[1:]]), *rest, ""]))
    document, _ = compare(tmp_path / "old", tmp_path / "new")
    assert document["groups"][0]["paired"][0]["rollout_l1"]["num_episodes"] == NUM_EPISODES


def test_pairs_show_a_difference_that_intervals_do_not_and_noise_is_none(tmp_path):
    rng = np.random.default_rng(0)
    one = write_run(tmp_path / "one", BASE)
    better = write_run(tmp_path / "better", BASE - 0.01 + 0.004 * rng.normal(size=NUM_EPISODES))
    same = write_run(tmp_path / "same", BASE - 0.002 + rng.permutation(np.linspace(-0.02, 0.02, NUM_EPISODES)))
    document, text = compare(one, better, same)
    (group,) = document["groups"]
    figures = [run["figures"]["rollout_l1"]["interval"] for run in group["runs"]]
    assert figures[0][0] < figures[1][1] and figures[1][0] < figures[0][1], "the two intervals overlap"
    words = {pair["run"]: pair["rollout_l1"]["words"] for pair in group["paired"]}
    assert words == {str(better): "better", str(same): "no difference shown"}
    pair = group["paired"][0]["rollout_l1"]
    assert pair["low"] < pair["mean"] < pair["high"] < 0 and pair["num_episodes"] == NUM_EPISODES
    assert f"{better} against {one}, open loop: better, difference -0.0" in text and "yes" in text
    document, _ = compare(better, one)
    assert document["groups"][0]["paired"][0]["teacher_forcing_l1"]["words"] == "worse"
    document, _ = compare(one, write_run(tmp_path / "other batch size", BASE + 1e-7))
    pair = document["groups"][0]["paired"][0]["rollout_l1"]
    assert pair["low"] > 0 and pair["words"] == "no difference shown"


def test_only_shared_episodes_are_paired_five_are_too_few_and_an_empty_cell_is_no_figure(tmp_path):
    one = write_run(tmp_path / "one", BASE)
    for count, words in ((5, "too few episodes"), (6, "better")):
        few = write_run(tmp_path / f"{count}", BASE[:count] - 0.05)
        pair = compare(one, few)[0]["groups"][0]["paired"][0]["rollout_l1"]
        assert pair["num_episodes"] == count and pair["high"] < 0 and pair["words"] == words
    later = write_run(tmp_path / "later", BASE[4:] - 0.05, first=4)
    last = write_run(tmp_path / "last", BASE[:3], first=NUM_EPISODES - 1)
    pairs = [pair["rollout_l1"] for pair in compare(one, later, last, fails=1)[0]["groups"][0]["paired"]]
    assert pairs[0]["num_episodes"] == NUM_EPISODES - 4 and pairs[0]["mean"] == pytest.approx(-0.05)
    assert pairs[1] == {"words": "cannot be told", "reason": "fewer than two shared episodes"}
    lines = (later / "episodes.csv").read_text().splitlines()
    lines[1] = lines[1].rpartition(",")[0] + ","
    (later / "episodes.csv").write_text("\n".join(lines) + "\n")
    assert f"paired over {NUM_EPISODES - 5} episodes" in compare(one, later)[1]


def test_runs_of_another_kind_are_shown_apart_with_the_reason(tmp_path):
    one = write_run(tmp_path / "one", BASE)
    same = write_run(tmp_path / "same", BASE, measured__evaluate__step_length=1)  # older ones know no other
    for name in (*KIND, "measured.filter.drop_gui"):
        other = write_run(tmp_path / "other", BASE - 0.2, **{name.replace(".", "__"): "another"})
        document = compare_runs([str(run) for run in (one, other, same)]).document
        groups = [[run["run"] for run in group["runs"]] for group in document["groups"]]
        assert groups == [[str(one), str(same)], [str(other)]] and not document["groups"][1]["paired"]
        assert document["groups"][1]["apart"].endswith(f"another in {other}") and name in document["groups"][1]["apart"]
    _, text = compare(one, other, same, fails=1)
    assert "not comparable with" in text and "another" in text


def test_settings_that_differ_are_named_and_those_that_move_no_number_are_not(tmp_path):
    one = write_run(tmp_path / "one", BASE)
    other = write_run(
        tmp_path / "other",
        BASE,
        train__lr=3e-4,
        train__num_threads=2,
        measured__evaluate__batch_size=8,
        run="s",
        trained=False,
    )
    document, text = compare(one, other)
    (group,) = document["groups"]
    assert [run["settings"] for run in group["runs"]] == [{"train.lr": 1e-3}, {"train.lr": 3e-4}]
    assert f"train.lr: 0.001 in {one}, 0.0003 in {other}" in text
    settings = {"train__compile": True, "train__loggers": ["dvclive", "wandb"]}
    _, shown = compare(one, write_run(tmp_path / "more", BASE, **settings))
    for words in (f"train.compile: null in {one}, true in {tmp_path / 'more'}", "[dvclive, wandb] in"):
        assert words in shown
    assert not re.search(r"None|True|'", shown), "settings are shown as YAML has them, not as Python has"
    assert "random weights" not in text
    assert "random weights" in compare(other)[1]


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("metrics.json", "{", "no evaluation"),
        ("metrics.json", '{"val": {}}', "no evaluation of this program (it lacks 'teacher_forcing_l1')"),
        ("metrics.json", "[]", "no evaluation"),
        *(
            (
                "metrics.json",
                f'{{"val": {{"teacher_forcing_l1": 1, "rollout_l1": {bad}}}, "val_ci": {{"teacher_forcing_l1": [0, 1]}}}}',
                "no evaluation of this program",
            )
            for bad in ('"abc"', "NaN")
        ),
        ("metrics.json", None, "holds no evaluation"),
        (
            "episodes.csv",
            "episode,num_windows,rollout_l1\nx,2,0.5.\n",
            "no evaluation of this program (could not convert",
        ),
        ("episodes.csv", None, "episodes.csv"),
        (
            "episodes.csv",
            "episode,num_windows,rollout_l1\nx,2,0.5\n",
            "no evaluation of this program (it lacks 'copy_last_l1')",
        ),
        ("settings.json", "{}", "no evaluation of this program (it lacks 'dataset')"),
        ("settings.json", "[]", "no evaluation of this program"),
    ],
)
def test_what_is_no_evaluation_is_one_message(tmp_path, file, content, words):
    one, other = write_run(tmp_path / "one", BASE), write_run(tmp_path / "other", BASE)
    (other / file).unlink()
    if content is not None:
        (other / file).write_text(content)
    assert words in compare(one, other, fails=2)[0]["error"]
    assert "named twice" in compare(one, one, fails=2)[0]["error"]
    assert "holds no evaluation" in compare(one / "episodes.csv", fails=2)[0]["error"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("episode-00,3,0.8,1,1\n", "episode-00 has 3 windows"),
        ("episode-00,2,9,1,1\n", "episode-00 is another recording"),
    ],
)
def test_why_two_runs_cannot_be_paired_is_said(tmp_path, content, words):
    one, other = write_run(tmp_path / "one", BASE), write_run(tmp_path / "other", BASE)
    (other / "episodes.csv").write_text(f"episode,num_windows,copy_last_l1,teacher_forcing_l1,rollout_l1\n{content}")
    document, text = compare(one, other, fails=1)
    assert words in document["groups"][0]["paired"][0]["rollout_l1"]["reason"] and words in text


def test_all_runs_of_a_project_are_a_table_the_best_first_and_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    root = copy_settings(tmp_path / "project")
    monkeypatch.chdir(root)
    assert "no evaluation was found" in compare("--all", fails=2)[0]["error"]
    write_run(root / "outputs/evaluate", BASE)
    many = {f"train__{name}": 1 for name in ("lr", "seed", "patience", "clip_norm")}
    write_run(root / "outputs/better/evaluate", BASE - 0.1, **many)
    write_run(root / "kept/evaluate", BASE + 0.1, predictor={"name": "small", "depth": 3})
    write_run(root / "copy/evaluate", BASE)
    write_run(root / "other/evaluate", BASE - 0.2, encoder="vitg")
    old = write_run(root / "old/evaluate", BASE + 0.2, num_windows=3)
    elsewhere = write_run(tmp_path / "elsewhere", BASE + 0.3)
    (root / "damaged/evaluate").mkdir(parents=True)
    (root / "damaged/evaluate/metrics.json").write_text("{")
    document, text = compare("--all", elsewhere)
    first, second = document["groups"]
    order = ["outputs/better", "copy, outputs", "kept", "old", str(elsewhere)]
    assert [run["run"] for run in first["runs"]] == order and [run["run"] for run in second["runs"]] == ["other"]
    assert "encoder: " in second["apart"] and second["apart"] in text
    words = [pair["rollout_l1"]["words"] for pair in first["paired"]]
    assert words == ["worse", "worse", "cannot be told", "worse"] and "has 3 windows in old" in text
    assert re.search(r"^not shown: .*damaged/evaluate/episodes.csv", text, re.MULTILINE)
    table = [re.split(r"  +", line) for line in text.splitlines()[1:7]]
    assert {len(row) for row in table} == {6}
    assert "depth" not in text and "predictor=small" in table[3][-1] and "and 1 more" in table[2][-1]
    (root / "params.yaml").write_text(
        (root / "params.yaml").read_text().replace("outputs: outputs ", f"outputs: {tmp_path}/far ")
    )
    shutil.copytree(old, tmp_path / "far/evaluate")
    assert "../far, old" in [run["run"] for run in compare("--all")[0]["groups"][0]["runs"]]


def test_revisions_are_read_through_dvc_and_missing_ones_are_named(tmp_path, monkeypatch):
    from dvc.repo import Repo

    repository = tmp_path / "checkout"
    write_run(repository / "outputs/evaluate", BASE)
    copy_settings(repository)
    (repository / "dvc.yaml").write_text(
        "stages:\n  evaluate:\n    cmd: 'true'\n    metrics: [outputs/evaluate/metrics.json]\n"
        "    outs: [outputs/evaluate/episodes.csv, outputs/evaluate/settings.json]\n"
    )
    git = lambda *a: subprocess.run(["git", *a], cwd=repository, check=True, capture_output=True)  # noqa: E731
    git("init", "-q")
    git("config", "user.email", "test@example.com")
    git("config", "user.name", "test")
    monkeypatch.chdir(repository)
    with Repo.init(str(repository)) as repo:
        git("add", "params.yaml", "dvc.yaml")
        git("commit", "-qm", "before the first run")
        document, _ = compare("--all")
        assert document["unread"] == [] and [run["run"] for run in document["groups"][0]["runs"]] == ["outputs"]
        repo.commit(force=True)
        git("add", "-A")
        git("commit", "-qm", "one")
        git("tag", "one")
        for file in ("metrics.json", "episodes.csv", "settings.json"):
            (repository / "outputs/evaluate" / file).unlink()
        write_run(repository / "outputs/evaluate", BASE - 0.05, train__lr=3e-4)
        repo.commit(force=True)
        repo.experiments.save(name="saved")
        write_run(repository / "outputs/evaluate", BASE + 0.05, train__lr=1e-2)
    (group,) = compare("--all")[0]["groups"]
    assert [run["run"] for run in group["runs"]] == ["saved", "HEAD", "outputs"]
    repo.checkout(force=True)
    document, _ = compare("one", ".")
    (group,) = document["groups"]
    assert [run["run"] for run in group["runs"]] == ["one", "."]
    assert group["paired"][0]["rollout_l1"]["mean"] == pytest.approx(-0.05)
    assert group["runs"][0]["settings"] == {"train.lr": 1e-3}
    error = compare("none-such", ".", fails=2)[0]["error"]
    assert "none-such is no file or folder" in error and "dvc exp list" in error
    git("checkout", "-q", "--orphan", "bare")
    git("rm", "-qf", "--cached", "-r", "dvc.lock", "dvc.yaml")
    git("commit", "-qm", "bare")
    assert "has no outputs/evaluate/metrics.json" in compare("bare", fails=2)[0]["error"]
    shutil.rmtree(repository / ".dvc/cache")
    assert "is not in the DVC cache" in compare("one", fails=2)[0]["error"]
