"""Claims of cli/doctor.py: the table is always whole and each fault says what to type.

Exit code 1 when something needed is missing; a network that is not there is a note.
"""

import json
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from jepa_cache.cli import doctor as command
from jepa_cache.cli.doctor import MISSING, NOTE, OK, check_everything, check_server
from jepa_cache.config.loading import REPOSITORY_ROOT
from tests.media.fake_bucket import serve
from tests.workspace import copy_settings

NAMES = ["libraries", "gpu", "decoder", "cache root", "DROID bucket", "Hugging Face hub"]


@pytest.fixture(autouse=True)
def web(monkeypatch):
    """A bucket and a hub on this machine."""
    with serve() as server:
        server.files |= {"droid": b"{}", "hub": b""}
        monkeypatch.setattr(command, "DROID_URL", f"{server.url}/droid")
        monkeypatch.setenv("HF_ENDPOINT", f"{server.url}/hub")
        yield server


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    copy_settings(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _run(*argv):
    app = typer.Typer()
    app.command()(command.doctor)
    return CliRunner().invoke(app, argv)


def test_this_machine_gets_a_line_of_each_kind_and_is_ready(checkout):
    result = _run("--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and report["ready"], report
    assert [finding["name"] for finding in report["findings"]] == NAMES


def test_the_table_shows_the_same_and_says_what_to_type(checkout, web):
    del web.files["droid"]
    result = _run()
    lines = result.stdout.splitlines()
    assert result.exit_code == 0 and lines[-1].startswith("ready: 0 missing")
    (line,) = [number for number, text in enumerate(lines) if text.startswith("DROID bucket")]
    assert "note" in lines[line] and "answers 404" in lines[line] and "-> check the network" in lines[line + 1]


def test_a_params_file_that_cannot_be_read_is_a_line_and_exit_code_1(checkout):
    (checkout / "params.yaml").write_text("dataset: [")
    result = _run()
    assert result.exit_code == 1 and "params.yaml" in result.stdout and "not ready: 1 missing" in result.stdout
    assert "decoder" in result.stdout


@pytest.mark.parametrize("check", ["check_libraries", "check_gpu", "check_decoders", "check_disk", "check_server"])
def test_a_check_that_fails_itself_is_a_line_and_the_others_are_there(monkeypatch, check):
    def fail(*_):
        raise RuntimeError("first line\nstack trace")

    monkeypatch.setattr(command, check, fail)
    findings = check_everything(REPOSITORY_ROOT)
    bad = [finding for finding in findings if "first line" in finding.found]
    assert bad and all(it.state == MISSING and "stack trace" not in it.found and it.todo for it in bad)
    assert [finding.name for finding in findings] == NAMES


def test_a_broken_torch_is_a_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (gpu,) = [finding for finding in check_everything(REPOSITORY_ROOT) if finding.name == "gpu"]
    assert gpu.state == MISSING and "torch" in gpu.found


@pytest.mark.parametrize(
    ("output", "state"),
    [
        ("jepa-cache 0.1 has requirement numpy>=2, but you have numpy 1.26.\n", MISSING),
        ("other 1.0 requires something, which is not installed.\n", NOTE),
        ("", NOTE),
    ],
)
def test_libraries_that_do_not_fit_are_named(monkeypatch, output, state):
    done = subprocess.CompletedProcess([], 1, output, "" if output else "x: No module named pip\n")
    monkeypatch.setattr(command.subprocess, "run", lambda *_, **__: done)
    finding = command.check_libraries()
    assert finding.state == state and (output.strip() or "No module named pip") in finding.found and finding.todo


def test_one_decoder_is_enough_and_one_that_returns_wrong_frames_is_not_believed(monkeypatch):
    real = command.video_module.open_video

    def without_decord(video, decoder):
        if decoder == "decord":
            raise ValueError("decord is not installed on this machine")
        return real(video, decoder)

    monkeypatch.setattr(command.video_module, "open_video", without_decord)
    finding = command.check_decoders()
    assert finding.state == OK and "pyav decode" in finding.found and "decord is not installed" in finding.found
    monkeypatch.setattr(command.video_module.Video, "read", lambda self, indices: np.zeros((8, 48, 64, 3)))
    assert command.check_decoders().state == MISSING


@pytest.mark.parametrize(("free", "state"), [(1 << 20, MISSING), (20 << 30, NOTE), (500 << 30, OK)])
def test_free_disk_is_judged_at_the_cache_root_that_need_not_exist(checkout, monkeypatch, free, state):
    monkeypatch.setenv("JEPA_CACHE_HOME", str(checkout / "not/yet"))
    monkeypatch.setattr(command.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free})())
    finding = command.check_disk(checkout)
    assert finding.state == state and str(checkout / "not/yet") in finding.found
    assert not (checkout / "not").exists() and (state == OK or "JEPA_CACHE_HOME" in finding.todo)


def test_a_cache_root_that_cannot_be_written_or_is_something_else_is_missing(checkout, monkeypatch):
    monkeypatch.setenv("JEPA_CACHE_HOME", str(checkout))
    (found,) = [finding for finding in check_everything(checkout) if finding.name == "cache root"]
    assert found.state == MISSING and "is no cache root: it holds" in found.found
    monkeypatch.setattr(command.os, "access", lambda *_: False)
    assert "not writable" in command.check_disk(checkout).found


def test_no_network_is_a_note_with_the_way_out(monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    for wrong in (url, "http://[bad"):
        finding = check_server("x", wrong, "do this")
        assert finding.state == NOTE and "not reached" in finding.found and finding.todo.endswith("do this")
    monkeypatch.setattr(command, "TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert check_server("x", f"http://127.0.0.1:{silent.getsockname()[1]}", "").state == NOTE
    released = threading.Event()
    monkeypatch.setattr(command, "_ask", lambda _: released.wait(10))
    assert check_server("x", "http://slow-name-server", "").found == "no answer in 0.2 s"
    released.set()
