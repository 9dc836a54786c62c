"""Every error message of the program, read from the syntax tree, as the list at the end of docs/troubleshooting.md.

python tests/docs/messages.py      writes the list anew
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/troubleshooting.md"
MARK = "<!-- From here on: made by `python tests/docs/messages.py`. -->"
ROOMS = {  # in the order in which a user meets them
    "stages": "Stage scripts",
    "cli": "The `jepa-cache` command",
    "config": "Settings",
    "sample": "Sample recordings",
    "sources": "Recordings",
    "media": "Tar shards, video, downloads",
    "episode": "Episodes",
    "actions": "Actions",
    "idle": "Ranges of ticks",
    "poses": "Poses",
    "vpt_actions": "VPT columns",
    "encoder": "Encoders and their weights",
    "encoding": "Stage one",
    "store": "The cache",
    "inspection": "Inspection",
    "data": "Stage two's input",
    "predictor": "Predictors and their weights",
    "training": "Training",
    "evaluation": "Evaluation and planning",
    "webpage": "Pages",
    "api": "From Python",
    "deployment": "From Python",
}
INTERNAL = {"AssertionError", "KeyError", "IndexError", "StopIteration", "AttributeError", "NotImplementedError"}

GIVE_REASONS = {"Skipped", "StoreDamagedError", "exit", "add_note"}  # besides what is raised


def room_of(path: Path) -> str:
    """Room of a source file; a module on the package's top level is a room of its own."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "stages" else parts[1]


def messages_of(path: Path) -> Iterator[str]:
    """Messages that a file raises or gives as a reason, with `...` for what is filled in; such without words of their own are left out."""
    for node in ast.walk(ast.parse(path.read_text())):
        call = node.exc if isinstance(node, ast.Raise) else node
        if not isinstance(call, ast.Call) or _name_of(call.func) in INTERNAL:
            continue
        if isinstance(node, ast.Raise) or _name_of(call.func) in GIVE_REASONS:
            for argument in call.args:
                text = re.sub(r"\s+", " ", _text(argument)).strip()
                if re.search(r"[a-z]{2,} [a-z]", text):
                    yield text


def _name_of(function: ast.expr) -> str:
    return getattr(function, "id", getattr(function, "attr", ""))


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return "..."


def write_list() -> str:
    """The list as Markdown: a section a room, a line a message."""
    files = [*sorted((ROOT / "stages").glob("*.py")), *sorted((ROOT / "jepa_cache").rglob("*.py"))]
    found: dict[str, list[str]] = {}
    for path in files:
        if path.name != "__init__.py" or path.parent.name == "sources":
            found.setdefault(room_of(path), []).extend(messages_of(path))
    lines = []
    for room in sorted(found, key=list(ROOMS).index):
        if found[room]:
            lines += ["", f"### {ROOMS[room]}", "", "```text", *sorted(set(found[room]), key=str.lower), "```"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(PAGE.read_text().partition(MARK)[0] + MARK + "\n" + write_list())
    print(f"wrote {PAGE.relative_to(ROOT)}")
