"""Claims: no name from somebody's files moves the cursor or forges a line of a terminal, on stdout, in errors and in reports."""

import sys

import pytest

from jepa_cache.cli.outcome import Outcome, report
from jepa_cache.cli.stage import run_stage
from jepa_cache.config.terminal import printable

NAME = "a\x1b]0;title\x07\x1b[2K\r\x9b1A\u202egpj.\udcff"
SHOWN = r"a\x1b]0;title\x07\x1b[2K\r\x9b1A\u202egpj.\udcff"


def test_control_characters_are_written_out_and_nothing_else_is_changed():
    assert printable(NAME) == SHOWN
    assert printable("one\ntwo\tthree") == r"one\ntwo\tthree" and printable("one\ntwo", keep="\n") == "one\ntwo"
    for plain in ("Überraschung/東京 \N{SLIGHTLY SMILING FACE}.mp4", r"C:\\x1b", "=cmd|' /C calc'!A0"):
        assert printable(plain) == plain


def test_a_stage_prints_no_control_character(capsys):
    run_stage(lambda: print(f"skipped: {NAME}\n\tindented"))
    assert capsys.readouterr().out == f"skipped: {SHOWN}\n\tindented\n" and not hasattr(sys.stdout, "_stream")


def test_an_error_is_one_message_whose_lines_continue_indented(capsys):
    def fail():
        raise ValueError(f"{NAME} is bad\nerror: all is lost:\n  one\n  two")

    with pytest.raises(SystemExit) as raised:
        run_stage(fail)
    assert raised.value.code == rf"error: {SHOWN} is bad\nerror: all is lost:" + "\n  one\n  two"
    with pytest.raises(BaseException, match="2"):  # typer.Exit, the code of a check that could not be made
        report(fail, as_json=False)
    assert SHOWN in capsys.readouterr().err


@pytest.mark.parametrize("as_json", [False, True])
def test_a_report_shows_one_line_for_each_of_its_lines(capsys, as_json):
    def work():
        print(f"note: {NAME}")
        return Outcome({"name": NAME}, [f"{NAME}\nall is well"])

    report(work, as_json=as_json)
    out, err = capsys.readouterr()
    assert f"note: {SHOWN}\n" in (err if as_json else out) and "\x1b" not in out + err
    assert as_json or out.splitlines()[1] == rf"{SHOWN}\nall is well"
