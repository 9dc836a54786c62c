"""Claims of cli/doctor.py: the table is always whole and each fault says what to type.

Exit code 1 when something needed is missing.
"""

import sys

import numpy as np

from jepa_cache.cli import doctor as command
from jepa_cache.cli.doctor import MISSING, NOTE, OK, check_everything
from jepa_cache.media.video import Video
from tests.cli.conftest import run

NAMES = ["gpu", "decoder", "cache root", "simulated robot"]


def test_this_machine_gets_a_line_of_each_kind_that_says_what_to_type(project, monkeypatch):
    monkeypatch.setattr(command, "LOW_FREE_BYTES", 1 << 60)
    result, table = run("doctor", "--json"), run("doctor")
    report = result.document
    assert (result.code, table.code) == (0, 0) and report["ready"], report
    assert [finding["name"] for finding in report["findings"]] == NAMES
    lines = table.out.splitlines()
    (line,) = [number for number, text in enumerate(lines) if text.startswith("cache root")]
    assert lines[-1].startswith("ready: 0 missing")
    assert "note" in lines[line] and "-> export JEPA_CACHE_HOME" in lines[line + 1]


def test_a_check_that_fails_itself_is_a_line_the_others_are_there_and_the_exit_code_is_1(project, monkeypatch):
    def fail(*_):
        raise RuntimeError("first line\nstack trace")

    monkeypatch.setattr(command, "check_decoders", fail)
    monkeypatch.setitem(sys.modules, "torch", None)
    (project / "params.yaml").write_text("dataset: [")
    findings, result = check_everything(project), run("doctor")
    assert list(findings) == NAMES and findings["decoder"][:2] == (MISSING, "RuntimeError: first line")
    assert findings["gpu"].state == MISSING and "torch" in findings["gpu"].found
    assert result.code == 1 and "params.yaml" in result.out and "not ready: 4 missing" in result.out


def test_one_decoder_is_enough_and_one_that_returns_wrong_frames_is_not_believed(monkeypatch):
    real = command.open_video

    def without_decord(video, decoder):
        if decoder == "decord":
            raise ValueError("decord is not installed on this machine")
        return real(video, decoder)

    monkeypatch.setattr(command, "open_video", without_decord)
    finding = command.check_decoders()
    assert finding.state == OK and "pyav decode" in finding.found and "decord is not installed" in finding.found
    monkeypatch.setattr(Video, "read", lambda self, indices: np.zeros((8, 48, 64, 3)))
    assert command.check_decoders().state == MISSING


def test_the_cache_root_is_judged_by_free_disk_rights_and_what_lies_there_and_need_not_exist(project, monkeypatch):
    monkeypatch.setenv("JEPA_CACHE_HOME", str(project / "not/yet"))
    for free, state in ((1 << 20, MISSING), (20 << 30, NOTE), (500 << 30, OK)):
        monkeypatch.setattr(command.shutil, "disk_usage", lambda _, free=free: type("Usage", (), {"free": free})())
        finding = command.check_disk(project)
        assert finding.state == state and str(project / "not/yet") in finding.found
        assert not (project / "not").exists() and (state == OK or "JEPA_CACHE_HOME" in finding.todo)
    monkeypatch.setenv("JEPA_CACHE_HOME", str(project))
    found = check_everything(project)["cache root"]
    assert found.state == MISSING and "is no cache root: it holds" in found.found
    monkeypatch.setattr(command.os, "access", lambda *_: False)
    assert "not writable" in command.check_disk(project).found
