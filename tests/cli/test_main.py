"""Claims of cli/main.py: each command is imported alone and without torch; its help says its exit codes; --json is one document."""

import json
import subprocess
import sys

import pytest
import typer

from jepa_cache.cli.main import COMMANDS, build_app, main

CACHE_COMMANDS = ("estimate", "status", "verify", "gc")
HEAVY = ("torch", "zarr", "tensorflow_datasets", "tensorflow", "scipy", "matplotlib", "webdataset", "h5py")


def test_looking_at_the_cache_imports_no_torch(checkout):
    """In one process, as imports stay; each of the three ends with its own exit code."""
    script = f"""
import sys
from jepa_cache.cli.main import build_app
for arguments in (["status", {str(checkout.recordings)!r}], ["gc"], ["estimate", {str(checkout.recordings)!r}]):
    try:
        build_app(arguments[0])(arguments)
    except SystemExit as end:
        assert not end.code, (arguments, end.code)
    heavy = [name for name in {HEAVY!r} if name in sys.modules]
    assert not heavy, (arguments, heavy)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize("command", CACHE_COMMANDS)
def test_help_says_the_exit_codes_and_not_the_docstring_of_arguments(checkout, command):
    result = checkout.run(command, "--help")
    words = " ".join(result.out.split())
    assert result.code == 0 and "Exit code 0:" in words and "; 2:" in words and "--json" in words
    assert "Args:" not in words


@pytest.mark.parametrize(
    ("old", "new"),
    [("repair", "jepa-cache verify --repair"), ("plan", "jepa-cache estimate"), ("encode", "python stages/encode.py")],
)
def test_a_command_that_has_another_name_says_which(monkeypatch, capsys, old, new):
    monkeypatch.setattr(sys, "argv", ["jepa-cache", old, "shards"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and f"type `{new}`" in capsys.readouterr().err


def test_help_of_export_says_the_exit_codes(checkout):
    words = " ".join(checkout.run("export", "cache", "--help").out.split())
    assert "Exit code 0:" in words and "--json" in words and "Args:" not in words


@pytest.mark.parametrize("command", [*CACHE_COMMANDS, "export"])
def test_an_unknown_setting_is_one_message_and_exit_code_2(checkout, command, tmp_path):
    arguments = [command, *(["cache", tmp_path / "out"] if command == "export" else [])]
    result = checkout.run(*arguments, "encode.fpx=4", "--json")
    assert result.code == 2 and "did you mean 'encode.fps'" in result.document["error"]
    assert result.err.count("error: ") == 1 and "Traceback" not in result.err


def test_json_is_the_only_thing_on_stdout_whatever_is_told_on_the_way(checkout):
    """Listing units says on stdout that dataset 'sample' was given other recordings."""
    result = checkout.run("status", checkout.recordings, "dataset=sample", "--json")
    assert json.loads(result.out) == result.document
    assert "these are other recordings" in result.err and "these are other" not in result.out


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_registered_alone_and_a_wrong_word_registers_all(name):
    alone, everything = (typer.main.get_command(build_app(only)) for only in (name, "wrong"))
    assert set(alone.commands) == {name} and set(everything.commands) == set(COMMANDS)


def test_commands_work_from_any_folder_of_the_checkout(checkout, monkeypatch):
    monkeypatch.chdir(checkout.folder / "configs/encoder")
    assert checkout.run("verify").code == 0


def test_what_the_machine_refuses_is_one_message_with_what_was_added_to_it(monkeypatch, tmp_path):
    def fail() -> None:
        error = PermissionError(f"no writing in {tmp_path}")
        error.add_note("while packing")
        raise error

    monkeypatch.setattr("jepa_cache.cli.main.build_app", lambda _: fail)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == f"error: no writing in {tmp_path}\n  while packing"
