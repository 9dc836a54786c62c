"""Which training a command means.

Claims:
- every setting, weight, episode, scaler number and line of code that decides a training decides its run, and nothing else does;
- the id is the same in another workspace; runs lie in $JEPA_RUNS_HOME or the state folder.
"""

import copy
import dataclasses
import shutil
from pathlib import Path

import pytest

import jepa_cache
from jepa_cache.config.schema import FilterConfig, TrainConfig
from jepa_cache.training.run import CODE, RESUME_SAFE_SETTINGS, code_digest, describe_run, run_folder
from tests.caches import Cache, make_cache


@pytest.fixture
def run_of(cache):
    """The id of the run that the tiny cache's settings mean, with changes to one section or to other parts."""

    def identify(section: str = "train", *, start: Path | None = None, base: Path = Path(), **changes) -> str:
        dataset = copy.copy(cache.dataset)
        dataset.manifest = changes.pop("manifest", dataset.manifest)
        parts = {"config": cache.config, "dataset": dataset, "scaler": changes.pop("scaler", cache.scaler)}
        changed = dataclasses.replace(getattr(cache.config, section), **changes)
        parts["config"] = dataclasses.replace(parts["config"], **{section: changed})
        return run_folder(describe_run(**parts, init=start, base=base)).name

    return identify


def other(value: object) -> object:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int | float) else f"{value}x"


def test_each_setting_decides_the_run_unless_it_moves_no_number(cache, run_of):
    for section, kind in (("train", TrainConfig), ("filter", FilterConfig)):
        for name in {field.name for field in dataclasses.fields(kind)} - {"keep_ranges"}:
            changed = run_of(section, **{name: other(getattr(getattr(cache.config, section), name))})
            assert (changed == run_of()) == (name in RESUME_SAFE_SETTINGS), name


def test_predictor_split_scaler_and_manifest_decide_the_run_and_evaluation_does_not(cache, run_of):
    states = cache.scaler.states
    moved = dataclasses.replace(states, mean=(states.mean[0] + 1e-9, *states.mean[1:]))
    (part,) = cache.dataset.manifest.parts
    fewer = dataclasses.replace(part, entries=part.entries[:1])
    runs = {
        run_of(),
        run_of("predictor", depth=2),
        run_of("predictor", mlp_ratio=3.0),
        run_of("split", seed=3),
        run_of(scaler=dataclasses.replace(cache.scaler, states=moved)),
        run_of(manifest=dataclasses.replace(cache.dataset.manifest, parts=(fewer,))),
    }
    assert len(runs) == 6
    assert run_of("evaluate", horizon=9, seed=4) == run_of()


def test_of_files_the_content_decides_the_run_and_the_name_does_not(run_of, tmp_path):
    for name, content in (("a", "{}"), ("b", "{}"), ("c", '{"e": []}')):
        (tmp_path / name).write_text(content)
    for runs in (
        [run_of(start=tmp_path / name) for name in "abc"],
        [run_of("filter", base=tmp_path, keep_ranges=name) for name in "abc"],
    ):
        assert runs[0] == runs[1] and len({*runs, run_of()}) == 3


def test_an_edit_of_the_code_that_trains_is_another_run_and_of_other_code_is_not(tmp_path, monkeypatch):
    original, package = code_digest(), tmp_path / "jepa_cache"
    shutil.copytree(Path(jepa_cache.__file__).parent, package)
    monkeypatch.setattr(jepa_cache, "__file__", str(package / "__init__.py"))
    seen = {original}
    for name in ("encoding/run.py", "evaluation/run.py", "cli/stage.py", *CODE):
        path = package / name if name.endswith(".py") else next(iter(sorted((package / name).glob("[a-z]*.py"))))
        with path.open("a") as file:
            file.write("# edited\n")
        seen.add(code_digest())
        assert name in CODE or seen == {original}
    assert len(seen) == 1 + len(CODE)


def test_runs_lie_in_the_folder_of_the_environment_or_beside_the_digest_table(cache, tmp_path, monkeypatch):
    description = describe_run(cache.config, cache.dataset, cache.scaler, None, tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    default = run_folder(description)
    assert default.parent == tmp_path / "state/jepa-cache/runs"
    monkeypatch.setenv("JEPA_RUNS_HOME", str(tmp_path / "elsewhere"))
    assert run_folder(description) == tmp_path / "elsewhere" / default.name


def test_another_workspace_with_the_same_features_means_the_same_run(run_of, tmp_path):
    again: Cache = make_cache(tmp_path)
    assert run_of(manifest=again.dataset.manifest, scaler=again.scaler) == run_of()
