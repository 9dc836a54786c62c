"""Claims: rooms import downwards only and files in no circle; the lower rooms need no torch; dvc.yaml knows what each stage imports.

Every library that is imported is declared in pyproject.toml, and every needed one that is declared is imported.

Everything is read from the syntax tree, so an import inside a function counts too.
"""

import ast
import functools
import re
import sys
import tomllib
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "jepa_cache"

# Highest first. Rooms on one floor do not know each other.
FLOORS = (
    {"stages", "cli"},
    {"acting"},
    {"api"},
    {"training", "evaluation"},
    {"control"},
    {"encoding", "data"},
    {"sources", "store", "predictor", "encoder", "sample"},
    {"episode"},
    {"media"},
    {"actions", "devices"},
    {"config", "files", "poses", "ridge"},
)
# Where the code asks for it: stage scripts share cli/stage.py.
SAME_FLOOR = {("stages", "cli")}
WITHOUT_TORCH = ("sources", "store", "media", "sample", "episode", "actions", "poses", "config", "files")
STAGE_TWO = {"training", "predictor", "data", "evaluation", "control"}
STAGES = {name: name for name in ("sample", "encode", "fit_scaler", "evaluate", "act")} | {"train": "train_predictor"}


def floor_of(room):
    return next(level for level, rooms in enumerate(FLOORS) if room in rooms)


def python_files():
    return [*sorted(PACKAGE.rglob("*.py")), *sorted((ROOT / "stages").glob("*.py"))]


def room_of(path):
    if path.parent == ROOT / "stages":
        return "stages"
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@functools.cache
def imported_modules(path):
    modules = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the room"
            modules += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return modules


def test_imports_go_down_only():
    for path in python_files():
        room = room_of(path)
        rooms = {module.split(".")[1] for module in imported_modules(path) if module.startswith("jepa_cache.")}
        assert room != "__init__" or not rooms
        for other in rooms - {room}:
            below = floor_of(other) > floor_of(room) or (room, other) in SAME_FLOOR
            assert below, f"{path.relative_to(ROOT)} imports {other}, which is not below {room}"


def test_no_file_imports_itself_through_others():
    files = {str(path.relative_to(ROOT).with_suffix("")).replace("/", "."): path for path in python_files()}
    graph = {path: {files[name] for name in imported_modules(path) if name in files} for path in files.values()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names them


@pytest.mark.parametrize("room", WITHOUT_TORCH)
def test_the_lower_rooms_import_no_torch(room):
    files = (PACKAGE / room).rglob("*.py") if (PACKAGE / room).is_dir() else [PACKAGE / f"{room}.py"]
    for path in files:
        heavy = {module for module in imported_modules(path) if module.split(".")[0] in ("torch", "accelerate", "peft")}
        assert not heavy, f"{path} imports {heavy}"


def distribution_name(text):
    """Name of a requirement or distribution, in its one spelling."""
    return re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9_.-]+", text)[0]).lower()


def test_libraries_are_declared_as_they_are_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {distribution_name(text) for text in project["dependencies"]}
    optional = {distribution_name(text) for group in project["optional-dependencies"].values() for text in group}
    roots = {module.split(".")[0] for path in python_files() for module in imported_modules(path)}
    roots -= {*sys.stdlib_module_names, "jepa_cache"}
    providers = packages_distributions()
    found = {root: {distribution_name(name) for name in providers.get(root, [root])} for root in roots}
    found["distributed"].add("dask")  # dask[distributed]
    found["rerun"].add("rerun-sdk")  # not installed by `make test`
    undeclared = sorted(root for root, names in found.items() if not names & (needed | optional))
    assert not undeclared, f"imported, but not in pyproject.toml: {undeclared}"
    unused = needed - set().union(*found.values())
    assert not unused, f"needed by pyproject.toml, but imported nowhere: {sorted(unused)}"


def reachable_files(start):
    """Files of the package that a script imports, directly or through others."""
    found, todo = set(), [start]
    while todo:
        path = todo.pop()
        for module in imported_modules(path):
            if not module.startswith("jepa_cache"):
                continue
            base = ROOT / Path(*module.split("."))
            for candidate in (base.with_suffix(".py"), base / "__init__.py"):
                names = [candidate]
                if candidate == PACKAGE / "sources" / "__init__.py":  # its modules are found by name at run time
                    names = [candidate, *(PACKAGE / "sources").glob("*.py")]
                for name in names:
                    if name.is_file() and name not in found:
                        found.add(name)
                        todo.append(name)
    return found


@pytest.fixture(scope="module")
def pipeline():
    return YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())


@pytest.mark.parametrize("stage", STAGES)
def test_the_deps_of_a_stage_are_what_its_script_imports(pipeline, stage):
    deps = [ROOT / dep for dep in pipeline["stages"][stage]["deps"]]
    script = ROOT / "stages" / f"{STAGES[stage]}.py"
    assert script in deps
    reached = reachable_files(script) - {PACKAGE / "__init__.py", PACKAGE / "cli" / "__init__.py"}
    for path in reached:
        assert not {path, *path.parents}.isdisjoint(deps), f"stage {stage} imports {path}, which is not among its deps"
    for dep in (dep for dep in deps if dep.is_relative_to(PACKAGE)):
        assert any(dep in (file, *file.parents) for file in reached), f"stage {stage} never imports {dep}"


def test_encode_depends_on_nothing_of_stage_two(pipeline):
    encode = pipeline["stages"]["encode"]
    rooms = {Path(dep).parts[1].removesuffix(".py") for dep in encode["deps"] if dep.startswith("jepa_cache")}
    assert not rooms & STAGE_TWO
    sections = {key for key in encode["params"] if isinstance(key, str)}
    assert sections == {"dataset", "encoder", "cache", "encode"}
    reached = {room_of(path) for path in reachable_files(ROOT / "stages/encode.py")}
    assert not reached & STAGE_TWO


def test_only_the_ground_floor_renames_or_locks():
    """Else a file appears in pieces, or a lock outlives its process. `x.replace(y)` is Path's: that of str takes two."""
    found = []
    for path in set(python_files()) - {PACKAGE / "files.py"}:
        tree = ast.parse(path.read_text())
        found += [f"{path}: imports fcntl"] * ("fcntl" in imported_modules(path))
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
            if name == "rename" or (name == "replace" and len(call.args) == 1 and not call.keywords):
                found.append(f"{path}:{call.lineno} renames")
    assert not found, found


def test_package_folders_reexport_nothing():
    for path in PACKAGE.rglob("__init__.py"):
        if path.parent.name not in ("sources", "encoder"):  # a protocol and its registry
            assert len(ast.parse(path.read_text()).body) == 1, f"{path} holds more than a docstring"


def test_the_quick_suite_names_files_that_exist():
    listed = (
        re.search(r"^QUICK := ((?:.*\\\n)*.*)$", (ROOT / "Makefile").read_text(), re.M)[1].replace("\\", " ").split()
    )
    assert len(listed) > 10 and all((ROOT / path).exists() for path in listed), listed


def test_a_room_has_at_most_fourteen_files_and_a_file_at_most_six_hundred_lines():
    folders = [PACKAGE, *(path for path in PACKAGE.rglob("*") if path.is_dir() and path.name != "__pycache__")]
    rooms = {str(folder.relative_to(ROOT)): [*folder.glob("*.py")] for folder in folders}
    assert len(rooms) > 12
    for room, files in rooms.items():
        named = [path for path in files if path.name != "__init__.py"]
        assert len(named) <= 14, f"{room} has {len(named)} files: merge by idea"
        for path in files:
            assert len(path.read_text().splitlines()) <= 600, f"{path} is too long to be one idea"
    for path in (ROOT / "stages").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 60, f"{path} is no thin script"
