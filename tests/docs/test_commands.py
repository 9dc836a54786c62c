"""The manual's commands.

Claims:
- every command in README.md and docs/ names a script, command, target, option and setting that exists, whether it is run or not;
- so does every file of settings that a page shows: a yaml block that begins with its name;
- every link to a file of the repository leads somewhere, and every page is in the list of pages;
- (long) every block that does not say why not runs, page by page, in a checkout with a smaller sample.
"""

import re
import shlex
import tempfile
from functools import cache
from itertools import groupby, pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import typer

from jepa_cache.cli.main import COMMANDS, build_app
from jepa_cache.config.loading import load_config, split_arguments
from tests.workspace import ROOT, SUITE_SETTINGS, Workspace

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCED = re.compile(r"(?:^<!-- not run: ([^\n]+) -->\n+)?^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """Commands that belong together: a ```bash block, or the lines of a transcript that begin with `$ `."""

    page: str
    line: int
    commands: list[str]
    not_run: str | None
    transcript: bool  # which shows exit codes other than 0 too


def find_blocks():
    """Every block of every page, in reading order; commands with continuation lines joined and without comments."""
    for page in PAGES:
        text = page.read_text()
        for found in FENCED.finditer(text):
            not_run, kind, body = found.groups()
            assert kind not in ("sh", "shell", "console"), f"{page}: call it bash, so that it is not overlooked"
            shown = "\n".join(line[2:] for line in body.splitlines() if line.startswith("$ "))
            if kind == "bash" or (not kind and shown):
                joined = re.sub(r"\\\n\s*", "", body if kind == "bash" else shown)
                lines = (re.sub(r"(^|\s)#.*$", "", line).strip() for line in joined.splitlines())
                line = text.count("\n", 0, found.start(3)) + 1
                yield Block(str(page.relative_to(ROOT)), line, [it for it in lines if it], not_run, kind != "bash")


BLOCKS = list(find_blocks())
SHOWN = tempfile.TemporaryDirectory()
# Programs that are not ours; what they are given is not checked.
OTHERS = {"source", "export", "mkdir", "sed", "gsutil", "cd", "dask", "srun", "scontrol", "exit", "git", "pip", "if"}
OTHERS |= {"unset", "jq"}
DVC = {"repro", "exp", "queue", "metrics", "plots", "push", "pull", "checkout", "params"}
STAGE_OPTIONS = {"encode": {"--workers", "--scheduler"}, "train_predictor": {"--fresh"}}


@cache
def settings_file(name: str) -> str:
    """The path of a file of settings, the repository's or one that a page shows."""
    path = ROOT / name
    if not path.is_file():
        block = re.compile(rf"^```yaml\n(# {name}\b.*?)^```$", re.M | re.S)
        (text,) = [text for page in PAGES for text in block.findall(page.read_text())]
        path = Path(SHOWN.name) / name
        path.write_text(text)
    return str(path)


@cache
def console_options(command: str, sub: str | None) -> set[str]:
    group = typer.main.get_command(build_app(command)).commands[command]
    chosen = group.commands[sub] if sub else group
    return {option for parameter in chosen.params for option in (*parameter.opts, *parameter.secondary_opts)} | {
        "--help"
    }


def check_settings(words: list[str], added: set[str]) -> None:
    """Every key exists and its values are of its kind, all of a command together; lists after a comma are grids of single values."""
    grids = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            grids.append([settings_file(word)])
        elif not (key == "encoder" and value in added):
            grids.append([f"{key}={single}" for single in ([value] if value.startswith("[") else value.split(","))])
    for number in range(max(map(len, grids), default=0)):
        load_config(SUITE_SETTINGS, [grid[min(number, len(grid) - 1)] for grid in grids])


def check_command(command: str, added: set[str] = frozenset()) -> None:
    words = shlex.split(command.split("|")[0].split("&&")[0].split(">")[0].rstrip("&; "))
    while words and (re.fullmatch(r"\w+=.*", words[0])):
        words.pop(0)
    if not words or words[0] in OTHERS or words[0].startswith("#"):
        return
    first, rest = words[0], words[1:]
    if first == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert all(word in targets or "=" in word for word in rest), command
    elif first == "jepa-cache":
        if rest and rest[0] == "--help":
            return
        assert rest and rest[0] in COMMANDS, command
        sub = rest[1] if rest[0] == "export" else None
        options = {word.split("=")[0] for word in rest if word.startswith("--")}
        assert options <= console_options(rest[0], sub), command
        check_settings(split_arguments(rest)[0], added)
    elif first == "dvc":
        assert rest and rest[0] in DVC, command
        check_settings([after for word, after in pairwise(rest) if word == "-S"], added)
    elif first in ("python", "torchrun", "accelerate"):
        scripts = [word for word in rest if word.endswith(".py")]
        assert len(scripts) == 1, command
        script = ROOT / scripts[0]
        assert script.is_file(), command
        given = rest[rest.index(scripts[0]) + 1 :]
        if script.parent.name == "stages" and script.stem != "fetch_vpt":
            options = {word.split("=")[0] for word in given if word.startswith("--")}
            assert options <= STAGE_OPTIONS.get(script.stem, set()) | {"--help"}, command
            check_settings(split_arguments(given)[0], added)
    else:
        pytest.fail(f"{command!r} starts with a program that is not known here")


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.page}:{block.line}")
def test_commands_name_what_exists(block: Block):
    added = set()  # presets: `add-encoder SOURCE NAME`, or a shipped one's own name, with its resolution
    for command in block.commands:
        if (words := command.split())[:2] == ["jepa-cache", "add-encoder"]:
            name, pixels = words[2], words[-1] if "--resolution" in words else ""
            added |= {words[3]} if words[3:] and not words[3].startswith("-") else {name, name + pixels}
    for command in block.commands:
        check_command(command, added)


def test_a_command_that_does_not_exist_is_found():
    for wrong in (
        "jepa-cache estimat",
        "jepa-cache estimate --fast",
        "python stages/encode.py encode.fsp=4",
        "make dem",
        "dvc exp run -S train.lrr=1",
    ):
        with pytest.raises((AssertionError, ValueError)):
            check_command(wrong)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


def test_every_page_is_in_the_list_of_pages():
    listed = (ROOT / "docs/README.md").read_text()
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert not [name for name in pages if f"({name})" not in listed]


# --- run ------------------------------------------------------------------------------------------------------------------

RUN = [block for block in BLOCKS if block.not_run is None]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    workspace = Workspace(tmp_path_factory.mktemp("docs"))
    workspace.run("dvc", "repro")
    workspace.run("git", "add", "-A")
    workspace.run("git", "commit", "-qm", "results")
    return workspace


@pytest.mark.long
@pytest.mark.parametrize("page", [name for name, _ in groupby(RUN, key=lambda block: block.page)])
def test_the_commands_of_a_page_run(checkout, page):
    for block in RUN:
        if block.page != page:
            continue
        for command in block.commands:
            output, code = checkout.call(["bash", "-c", command])
            assert "Traceback" not in output, f"{block.page}:{block.line}: {command}\n{output[-3000:]}"
            # A transcript may show what a command says of a cache that is not as it should be.
            assert code in ((0, 1) if block.transcript else (0,)), (
                f"{block.page}:{block.line}: {command} ended with {code}\n{output[-3000:]}"
            )
    checkout.run("git", "checkout", "-q", "--", ".")
    checkout.run("dvc", "checkout", "-q", "--force")
