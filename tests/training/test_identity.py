"""Which training a command means.

Claims:
- every setting, weight, episode, scaler number and line of code that decides a training decides its run, and nothing else does;
- the id is the same in another workspace and process; runs lie in $JEPA_RUNS_HOME or the state folder.
"""

import dataclasses
import shutil
from pathlib import Path

import pytest

import jepa_cache
from jepa_cache.config.schema import TrainConfig
from jepa_cache.training import run as run_module
from jepa_cache.training import trainer
from jepa_cache.training.run import CODE, RESUME_SAFE_SETTINGS, code_digest, describe_run, run_folder
from tests.caches import Cache, make_cache


def run_of(cache: Cache, *, init: Path | None = None, ranges: Path | None = None, **changes: object) -> str:
    parts = {"config": cache.config, "manifest": cache.dataset.manifest, "scaler": cache.scaler} | changes
    return run_folder(describe_run(**parts, init=init, ranges=ranges)).name


def other(value: object) -> object:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int | float) else f"{value}x"


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(TrainConfig)])
def test_each_train_setting_decides_the_run_unless_it_moves_no_number(cache, name):
    changed = dataclasses.replace(cache.config.train, **{name: other(getattr(cache.config.train, name))})
    config = dataclasses.replace(cache.config, train=changed)
    assert (run_of(cache, config=config) == run_of(cache)) == (name in RESUME_SAFE_SETTINGS)


def test_predictor_split_scaler_and_manifest_decide_the_run_and_evaluation_does_not(cache):
    def of_section(name: str, **changes: object) -> str:
        section = dataclasses.replace(getattr(cache.config, name), **changes)
        return run_of(cache, config=dataclasses.replace(cache.config, **{name: section}))

    states = cache.scaler.states
    moved = dataclasses.replace(states, mean=(states.mean[0] + 1e-9, *states.mean[1:]))
    (part,) = cache.dataset.manifest.parts
    fewer = dataclasses.replace(part, entries=part.entries[:1])
    runs = {
        run_of(cache),
        of_section("predictor", depth=2),
        of_section("predictor", mlp_ratio=3.0),
        of_section("split", seed=3),
        run_of(cache, scaler=dataclasses.replace(cache.scaler, states=moved)),
        run_of(cache, manifest=dataclasses.replace(cache.dataset.manifest, parts=(fewer,))),
    }
    assert len(runs) == 6
    assert of_section("evaluate", horizon=9, seed=4) == run_of(cache)


def test_the_content_of_the_initial_weights_decides_the_run_and_their_name_does_not(cache, tmp_path):
    for name, content in (("a", b"one"), ("b", b"one"), ("c", b"two")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (run_of(cache, init=tmp_path / name) for name in "abc")
    assert a == b and len({a, c, run_of(cache)}) == 3


def with_filters(cache: Cache, **changes: object):
    return dataclasses.replace(cache.config, filter=dataclasses.replace(cache.config.filter, **changes))


def test_every_filter_decides_the_run_and_of_a_list_of_ranges_only_its_content(cache, tmp_path):
    runs = {run_of(cache)}
    names = [field.name for field in dataclasses.fields(cache.config.filter) if field.name != "keep_ranges"]
    runs |= {run_of(cache, config=with_filters(cache, **{n: other(getattr(cache.config.filter, n))})) for n in names}
    assert len(runs) == 1 + len(names)
    listed = []
    for name, content in (("a", "{}"), ("b", "{}"), ("c", '{"e": []}')):
        (tmp_path / name).write_text(content)
        listed.append(run_of(cache, config=with_filters(cache, keep_ranges=name), ranges=tmp_path / name))
    assert listed[0] == listed[1] and len({*listed, *runs}) == len(runs) + 2


def test_training_reads_the_ranges_that_its_filter_names(cache, tmp_path, monkeypatch):
    (tmp_path / "ranges.json").touch()
    seen = []

    def describe(*arguments, **_):
        seen.extend(arguments)
        raise InterruptedError

    segments = cache.dataset.segments_of("train", cache.config.split)
    monkeypatch.setattr(run_module, "describe_run", describe)
    monkeypatch.setattr(trainer, "check_scaler", lambda *_: None)
    monkeypatch.setattr(cache.dataset, "segments_of", lambda *_: segments)
    config = with_filters(cache, keep_ranges="ranges.json")
    with pytest.raises(InterruptedError):
        trainer.train(config, cache.dataset, cache.scaler, tmp_path, base=tmp_path)
    assert seen[-1] == tmp_path / "ranges.json"


def test_an_edit_of_the_code_that_trains_is_another_run_and_of_other_code_is_not(cache, tmp_path, monkeypatch):
    original, package = code_digest(), tmp_path / "jepa_cache"
    shutil.copytree(Path(jepa_cache.__file__).parent, package)
    monkeypatch.setattr(jepa_cache, "__file__", str(package / "__init__.py"))
    assert code_digest() == original
    for edited in ("encoding/run.py", "evaluation/run.py", "cli/stage.py"):
        with (package / edited).open("a") as file:
            file.write("# edited\n")
    assert code_digest() == original
    seen = {original}
    for name in CODE:
        path = package / name if name.endswith(".py") else next(iter(sorted((package / name).glob("[a-z]*.py"))))
        with path.open("a") as file:
            file.write("# edited\n")
        seen.add(code_digest())
    assert len(seen) == 1 + len(CODE)


def test_runs_lie_in_the_folder_of_the_environment_or_beside_the_digest_table(cache, tmp_path, monkeypatch):
    description = describe_run(cache.config, cache.dataset.manifest, cache.scaler, None)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    default = run_folder(description)
    assert default.parent == tmp_path / "state/jepa-cache/runs"
    monkeypatch.setenv("JEPA_RUNS_HOME", str(tmp_path / "elsewhere"))
    assert run_folder(description) == tmp_path / "elsewhere" / default.name


def test_another_workspace_with_the_same_features_means_the_same_run(cache, tmp_path):
    again = make_cache(tmp_path)
    assert run_of(again) == run_of(cache)
