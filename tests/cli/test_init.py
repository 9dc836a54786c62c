"""Claims of `jepa-cache init` and setup.py: what is installed without a checkout brings presets and stages with it, and `init` writes a project.

A project works with a source of its own beside its params.yaml.
"""

import filecmp
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from jepa_cache.cli.main import PROJECT, init
from jepa_cache.config.loading import REPOSITORY_ROOT
from jepa_cache.sources import build_source
from tests.sources.lerobot_makers import cached_video

DOCUMENTED = re.findall(r"```python\n(.*?)```", (REPOSITORY_ROOT / "docs/add_a_dataset.md").read_text(), re.DOTALL)[0]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """What a wheel holds, in a folder, and a function that runs its command from there, out of sight of the checkout."""
    folder = tmp_path_factory.mktemp("site")
    build = [
        sys.executable,
        "setup.py",
        "-q",
        "build",
        "--build-base",
        folder / "base",
        "build_py",
        "--build-lib",
        folder / "lib",
    ]
    subprocess.run(build, cwd=REPOSITORY_ROOT, check=True, capture_output=True, timeout=120)
    command = [sys.executable, "-P", "-c", "from jepa_cache.cli.main import main; main()"]

    def run(*arguments, cwd):
        environment = {
            **os.environ,
            "PYTHONPATH": str(folder / "lib"),
            "GIT_CONFIG_GLOBAL": os.devnull,
            "HOME": str(cwd),
        }
        return subprocess.run(
            [*command, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
        )

    return folder / "lib", run


def files_below(folder):
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"
    )


def test_the_package_holds_the_project_as_the_checkout_has_it(installed):
    template = installed[0] / "jepa_cache/template"
    assert {path.name for path in template.iterdir()} == {Path(name).parts[0] for name in PROJECT}
    for name in PROJECT:
        ours, theirs = REPOSITORY_ROOT / name, template / name
        if ours.is_dir():
            assert files_below(theirs) == files_below(ours)
            _, *differing = filecmp.cmpfiles(ours, theirs, files_below(ours), shallow=False)
            assert differing == [[], []]
        else:
            assert theirs.read_bytes() == ours.read_bytes()


def test_an_installed_package_makes_a_project_and_works_in_it_with_a_source_of_its_own(installed, tmp_path):
    run = installed[1]
    outside = run("status", cwd=tmp_path)
    assert (
        outside.returncode == 2
        and "lies in no project" in outside.stderr
        and "jepa-cache init FOLDER" in outside.stderr
    )
    made = run("init", "mine", cwd=tmp_path)
    project = tmp_path / "mine"
    assert made.returncode == 0 and "next: cd mine && dvc repro" in made.stdout, made.stderr
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=project, capture_output=True, text=True, check=True
    ).stdout.split()
    assert sorted(tracked) == sorted(name for name in files_below(project) if not name.startswith(".git/"))
    again = run("init", "mine", cwd=tmp_path)
    assert again.returncode == 1 and "holds params.yaml, dvc.yaml" in again.stderr
    (project / "mp4_csv.py").write_text(DOCUMENTED)
    preset = (project / "configs/dataset/mp4_json.yaml").read_text().replace("source: mp4_json", "source: mp4_csv.py")
    (project / "configs/dataset/mine.yaml").write_text(preset)
    (project / "clips").mkdir()
    (project / "clips/one.mp4").write_bytes(cached_video(24, 0, 10))
    rows = "".join(f"{row / 10},{row},{row},0.1,0.1\n" for row in range(24))
    (project / "clips/one.csv").write_text(f"time_s,x_m,y_m,dx_m,dy_m\n{rows}")
    told = run("inspect", "clips", "dataset=mine", cwd=project)
    assert told.returncode == 0 and "1 recordings of mine (source mp4_csv)" in told.stdout, told.stdout + told.stderr
    stage = run("encode", "--help", cwd=project)
    assert stage.returncode == 0 and "python stages/encode.py" in stage.stdout


def test_a_project_asks_for_no_file_of_the_package_and_means_what_the_checkout_means(tmp_path, capsys):
    init(tmp_path / "new")
    stages = YAML(typ="safe").load((tmp_path / "new/dvc.yaml").read_text())["stages"]
    theirs = YAML(typ="safe").load((REPOSITORY_ROOT / "dvc.yaml").read_text())["stages"]
    assert set(stages) == set(theirs)
    for name, stage in stages.items():
        assert stage["deps"] == [path for path in theirs[name]["deps"] if not path.startswith("jepa_cache/")]
        assert {**stage, "deps": 0} == {**theirs[name], "deps": 0}
    for name in sorted({*PROJECT} - {"dvc.yaml", "configs", "stages"}):
        assert (tmp_path / "new" / name).read_bytes() == (REPOSITORY_ROOT / name).read_bytes()
    assert "with a first commit" in capsys.readouterr().out


def test_an_experiment_changes_one_line_of_a_projects_settings(tmp_path):
    """`dvc exp run -S` writes params.yaml anew, by the function called here; it has the form already in which DVC writes."""
    overrides = pytest.importorskip("dvc.utils.hydra", reason="DVC is not installed")
    init(tmp_path / "new")
    path = tmp_path / "new/params.yaml"
    before = path.read_text().splitlines()
    overrides.apply_overrides(str(path), ["split.seed=7"])
    after = path.read_text().splitlines()
    assert len(before) == len(after) and sum(map(str.__ne__, before, after)) == 1


def test_a_source_file_that_is_missing_or_no_source_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(ValueError, match="there is no source file"):
        build_source(str(tmp_path / "gone.py"), {})
    (tmp_path / "empty_source.py").touch()
    with pytest.raises(ValueError, match=r"has no function build\(options\)"):
        build_source(str(tmp_path / "empty_source.py"), {})
    Path(tmp_path / "json.py").touch()
    with pytest.raises(ValueError, match="another module is called 'json'"):
        build_source(str(tmp_path / "json.py"), {})
    command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; import json; json.dumps(1)"]
    subprocess.run(command, check=True)  # a process of the same search path finds the library
