"""Claims of cli/main.py, outcome.py and stage.py: each command is imported alone and without torch; its help says its exit codes.

Outside every project what reads or writes one is refused, though the package lies in a checkout. --json is one document; no name from somebody's
files moves the cursor or forges a line of a terminal.
"""

import json
import subprocess
import sys

import pytest
import typer

from jepa_cache.api import Encoder
from jepa_cache.cli.main import COMMANDS, STAGES, build_app, main
from jepa_cache.cli.outcome import Outcome, report
from jepa_cache.cli.stage import parse_stage_arguments, run_stage
from jepa_cache.config.paths import printable
from jepa_cache.data.episodes import Dataset
from jepa_cache.store.manifest import read_manifest
from tests.workspace import SUITE_SETTINGS

HEAVY = ("torch", "zarr", "tensorflow_datasets", "tensorflow", "scipy", "matplotlib", "webdataset", "h5py")


def test_looking_at_the_cache_imports_no_torch_and_what_needs_no_cache_no_table_either(checkout):
    """In one process, as imports stay; each ends with its own exit code."""
    script = f"""
import sys
from jepa_cache.cli.main import build_app
folder = {str(checkout.recordings)!r}
for arguments in (["--help"], ["params"], ["status", folder], ["gc"], ["estimate", folder]):
    try:
        build_app(arguments[0])(arguments)
    except SystemExit as end:
        assert not end.code, (arguments, end.code)
    heavy = [name for name in {HEAVY!r} if name in sys.modules]
    heavy += [name for name in ("pyarrow", "numpy") if name in sys.modules and arguments[0] in ("--help", "params")]
    assert not heavy, (arguments, heavy)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize("command", ["estimate", "status", "verify", "gc", "inspect", "export cache"])
def test_help_says_the_exit_codes_and_an_unknown_setting_is_one_message_and_code_2(checkout, command, tmp_path):
    result = checkout.run(*command.split(), "--help")
    words = " ".join(result.out.split())
    assert result.code == 0 and "Exit code 0:" in words and "; 2:" in words and "--json" in words
    out = [tmp_path / "out"] if command == "export cache" else []
    result = checkout.run(*command.split(), *out, "encode.fpx=4", "--json")
    assert result.code == 2 and "did you mean 'encode.fps'" in result.document["error"]
    assert result.err.count("error: ") == 1 and "Traceback" not in result.err


OF_A_PROJECT = [
    *("params", "status", "estimate", "verify", "gc", "inspect", "compare --all", "add-encoder dino_small"),
    *("export cache out", "pull file:///nowhere out", *STAGES),
]


@pytest.mark.parametrize("command", OF_A_PROJECT)
def test_outside_every_project_a_command_is_refused_in_words_and_writes_nothing(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["jepa-cache", *command.split()])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code and not list(tmp_path.iterdir())
    told = f"{capsys.readouterr().err}{end.value.code}"  # with a text as its code Python prints that, and ends with 1
    assert f"{tmp_path} lies in no project" in told and "`jepa-cache init FOLDER`" in told and "Traceback" not in told


def test_outside_every_project_help_and_what_needs_none_work(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="lies in no project"):
        Dataset.open()
    assert Encoder.load("tiny", ["encode.device=cpu"]).frames_per_step == 1
    for command, words in (("encode --help", "stages/encode.py"), ("pull --help", "Usage:"), ("doctor", "settings of")):
        monkeypatch.setattr(sys, "argv", ["jepa-cache", *command.split()])
        with pytest.raises(SystemExit):
            main()
        assert words in capsys.readouterr().out


def test_json_is_the_only_thing_on_stdout_whatever_is_told_on_the_way(checkout):
    """Listing units says on stdout that dataset 'sample' was given other recordings."""
    result = checkout.run("status", checkout.recordings, "dataset=sample", "--json")
    assert json.loads(result.out) == result.document
    assert "these are other recordings" in result.err and "these are other" not in result.out


def test_every_command_has_its_function_and_its_help_whichever_is_typed(checkout):
    words = checkout.run("--help").out
    for name in COMMANDS:
        group = typer.main.get_command(build_app(name))
        assert set(group.commands) == {*COMMANDS, *STAGES}
        assert group.commands[name].params or group.commands[name].commands
        assert f"\n  {name} " in words
    assert all(f"\n  {name} " in words for name in STAGES)
    assert checkout.run("stauts").code == 2


def test_commands_work_from_any_folder_of_the_checkout(checkout, monkeypatch):
    monkeypatch.chdir(checkout.folder / "configs/encoder")
    assert checkout.run("verify").code == 0


NAME = "a\x1b]0;title\x07\x1b[2K\r\x9b1A\u202egpj.\udcff"
SHOWN = r"a\x1b]0;title\x07\x1b[2K\r\x9b1A\u202egpj.\udcff"


def test_control_characters_are_written_out_and_nothing_else_is_changed(capsys):
    assert printable(NAME) == SHOWN
    assert printable("one\ntwo\tthree") == r"one\ntwo\tthree" and printable("one\ntwo", keep="\n") == "one\ntwo"
    for plain in ("Überraschung/東京 \N{SLIGHTLY SMILING FACE}.mp4", r"C:\\x1b", "=cmd|' /C calc'!A0"):
        assert printable(plain) == plain
    run_stage(lambda: print(f"skipped: {NAME}\n\tindented"))
    assert capsys.readouterr().out == f"skipped: {SHOWN}\n\tindented\n" and not hasattr(sys.stdout, "_stream")


def test_an_error_is_one_message_whose_lines_continue_indented_and_repeats_settings(tmp_path, monkeypatch, capsys):
    def fail():
        error = PermissionError(f"{NAME} is bad\nerror: all is lost:\n  one\n  two")
        error.add_note("while packing")
        raise error

    monkeypatch.setattr("jepa_cache.cli.main.build_app", lambda _: fail)
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code == rf"error: {SHOWN} is bad\nerror: all is lost:" + "\n  one\n  two\n  while packing"
    monkeypatch.setattr("sys.argv", ["fit_scaler.py", "mine.yaml", "shards", "train.note=a b"])
    with pytest.raises(SystemExit, match=r"run `python stages/encode\.py mine\.yaml 'train\.note=a b'` first"):
        run_stage(lambda: read_manifest(tmp_path / "manifest.json"))
    with pytest.raises(typer.Exit) as ended:
        report(fail, as_json=False)
    assert ended.value.exit_code == 2 and SHOWN in capsys.readouterr().err


@pytest.mark.parametrize("as_json", [False, True])
def test_a_report_shows_one_line_for_each_of_its_lines(capsys, as_json):
    def work():
        print(f"note: {NAME}")
        return Outcome({"name": NAME}, [f"{NAME}\nall is well"])

    report(work, as_json=as_json)
    out, err = capsys.readouterr()
    assert f"note: {SHOWN}\n" in (err if as_json else out) and "\x1b" not in out + err
    assert as_json or out.splitlines()[1] == rf"{SHOWN}\nall is well"


def test_a_stage_takes_overrides_and_what_it_says_it_takes(capsys):
    def parse(*argv, **given):
        return parse_stage_arguments(SUITE_SETTINGS, "A stage.", argv, **given)

    plain = parse("train.lr=5e-3", "dataset=vpt")
    assert (plain.config.train.lr, plain.config.dataset.name, plain.paths) == (5e-3, "vpt", [])
    options = {"workers": {"type": int}, "scheduler": {}}
    mixed = parse("a.tar", "--workers", "2", "encode.fps=4", "/data/b=c.tar", paths="tar shards", **options)
    assert (mixed.config.encode.fps, mixed.paths, mixed.workers) == (4, ["a.tar", "/data/b=c.tar"], 2)
    for argv, given, words in (
        (["shards"], {}, "unexpected argument 'shards'"),
        (["--workers", "2", "--scheduler", "x"], options, "--workers and --scheduler exclude each other"),
    ):
        with pytest.raises(SystemExit):
            parse(*argv, **given)
        assert words in capsys.readouterr().err
