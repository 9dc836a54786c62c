"""Claims of cli/doctor.py and cli/readiness.py: the table is always whole, each fault says what to type, no secret is printed.

Exit code 1 when something needed is missing; a network that is not there is a note.
"""

import json
import socket
import sys
import threading

import pytest
import typer
from typer.testing import CliRunner

from jepa_cache.cli import doctor as doctor_module
from jepa_cache.cli import readiness
from jepa_cache.cli.doctor import doctor
from jepa_cache.cli.readiness import MISSING, NOTE, OK, Finding
from jepa_cache.config.loading import REPOSITORY_ROOT
from tests.media.fake_bucket import serve

NAMES = ("python", "libraries", "gpu", "decoder", "cache root", "DROID bucket", "Hugging Face hub")


@pytest.fixture(autouse=True)
def web(monkeypatch, tmp_path):
    """A bucket and a hub on this machine, and no credentials of whoever runs the tests."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "HF_TOKEN", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "gcloud"))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with serve() as server:
        server.files |= {"droid": b"{}", "hub": b""}
        monkeypatch.setattr(readiness, "DROID_URL", f"{server.url}/droid")
        monkeypatch.setenv("HF_ENDPOINT", f"{server.url}/hub")
        yield server


def _run(*argv):
    app = typer.Typer()
    app.command()(doctor)
    return CliRunner().invoke(app, argv)


def _write_project(root, dependencies, python=">=3.11"):
    (root / "pyproject.toml").write_text(
        f'[project]\nrequires-python = "{python}"\ndependencies = {json.dumps(dependencies)}\n'
        '[project.optional-dependencies]\ndev = ["no-such-optional>=2"]\n'
    )
    return root


def test_this_machine_gets_a_line_of_each_kind_and_is_ready():
    result = _run("--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and report["ready"], report
    assert [finding["name"] for finding in report["findings"] if finding["name"] in NAMES] == list(NAMES)
    (libraries,) = (finding["found"].split(", ") for finding in report["findings"] if finding["name"] == "libraries")
    assert len(set(libraries)) == len(libraries), "a library of two extras is named once"


def test_the_table_shows_the_same_and_says_what_to_type(web):
    del web.files["droid"]
    result = _run()
    assert result.exit_code == 0 and result.stdout.splitlines()[-1].startswith("ready: 0 missing")
    lines = result.stdout.splitlines()
    (line,) = [number for number, text in enumerate(lines) if text.startswith("DROID bucket")]
    assert "note" in lines[line] and "answers 404" in lines[line] and "-> " in lines[line + 1]


def test_something_needed_that_is_missing_is_exit_code_1(monkeypatch):
    monkeypatch.setattr(doctor_module, "check_everything", lambda *_: [Finding("x", MISSING, "gone", "type this")])
    result = _run()
    assert result.exit_code == 1 and "-> type this" in result.stdout and "not ready: 1 missing" in result.stdout
    assert _run("--json").exit_code == 1


def test_a_params_file_that_cannot_be_read_is_a_line(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "params.yaml").write_text("dataset: [")
    monkeypatch.chdir(tmp_path)
    result = _run()
    assert result.exit_code == 1 and "params.yaml" in result.stdout.splitlines()[0]
    assert "decoder" in result.stdout


@pytest.mark.parametrize(
    "check", ["check_python", "check_libraries", "check_gpu", "check_decoders", "check_disk", "check_hub"]
)
def test_a_check_that_fails_itself_is_a_line_and_the_others_go_on(monkeypatch, check):
    def fail(*_):
        raise RuntimeError("first line\nstack trace")

    monkeypatch.setattr(readiness, check, fail)
    findings = readiness.check_everything(REPOSITORY_ROOT, None)
    (bad,) = [finding for finding in findings if "first line" in finding.found]
    assert bad.state == MISSING and "stack trace" not in bad.found and bad.todo
    assert len({finding.name for finding in findings} & set(NAMES)) >= len(NAMES) - 1


def test_a_broken_torch_is_a_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (gpu,) = [finding for finding in readiness.check_everything(REPOSITORY_ROOT, None) if finding.name == "gpu"]
    assert gpu.state == MISSING and "torch" in gpu.found


def test_libraries_outside_their_bounds_are_named_with_the_command_that_installs_them(tmp_path):
    root = _write_project(tmp_path, ["numpy>=1.0", "scipy<0.1", "no-such-library>=1", "decord; sys_platform == 'none'"])
    found = {finding.name: finding for finding in readiness.check_libraries(root)}
    assert set(found) == {"libraries", "scipy", "no-such-library", "no-such-optional"}
    assert found["libraries"].found.startswith("numpy ") and found["libraries"].state == OK
    assert found["scipy"].state == MISSING and "<0.1 is needed" in found["scipy"].found
    assert found["no-such-library"].state == MISSING and "'no-such-library>=1'" in found["no-such-library"].todo
    assert found["no-such-optional"].state == NOTE


def test_a_python_outside_its_bounds_is_missing(tmp_path):
    (old,) = readiness.check_python(_write_project(tmp_path, [], python=">=99"))
    assert old.state == MISSING and ">=99 is needed" in old.found and old.todo
    assert readiness.check_python(REPOSITORY_ROOT)[0].state == OK


def _without(monkeypatch, *decoders):
    import jepa_cache.media.video as video_module

    true_open = video_module.open_video

    def open_video(video, decoder="auto", **options):
        if decoder in decoders:
            raise ValueError(f"{decoder} is not installed on this machine")
        return true_open(video, decoder, **options)

    monkeypatch.setattr(video_module, "open_video", open_video)


def test_one_decoder_is_enough(monkeypatch):
    _without(monkeypatch, "decord")
    good, bad = readiness.check_decoders()
    assert (good.state, bad.name, bad.state) == (OK, "decord", NOTE) and "pip install decord" in bad.todo


def test_no_decoder_is_missing(monkeypatch):
    _without(monkeypatch, "decord", "pyav")
    assert [finding.state for finding in readiness.check_decoders()] == [MISSING, MISSING]


def test_a_decoder_that_returns_wrong_frames_is_not_believed(monkeypatch):
    import jepa_cache.media.video as video_module

    monkeypatch.setattr(video_module.Video, "read", lambda self, indices: __import__("numpy").zeros((8, 48, 64, 3)))
    assert [finding.state for finding in readiness.check_decoders()] == [MISSING, MISSING]


@pytest.mark.parametrize(("free", "state"), [(1 << 20, MISSING), (20 << 30, NOTE), (500 << 30, OK)])
def test_free_disk_is_judged_at_the_cache_root_that_need_not_exist(tmp_path, monkeypatch, free, state):
    monkeypatch.setattr(readiness.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free})())
    (finding,) = readiness.check_disk(REPOSITORY_ROOT, str(tmp_path / "not/yet"))
    assert finding.state == state and str(tmp_path / "not/yet") in finding.found
    assert not (tmp_path / "not").exists()
    assert state == OK or "JEPA_CACHE_HOME" in finding.todo


def test_a_cache_root_that_cannot_be_written_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(readiness.os, "access", lambda *_: False)
    (finding,) = readiness.check_disk(REPOSITORY_ROOT, str(tmp_path))
    assert finding.state == MISSING and "not writable" in finding.found


def test_no_network_is_a_note_with_the_way_out():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    assert "not reached" in readiness.find_trouble(url)
    assert "not reached" in readiness.find_trouble("http://[bad")


def test_a_server_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(readiness, "TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert readiness.find_trouble(f"http://127.0.0.1:{silent.getsockname()[1]}") is not None
    released = threading.Event()
    monkeypatch.setattr(readiness, "_ask", lambda _: released.wait(10))
    assert readiness.find_trouble("http://slow-name-server") == "no answer in 0.2 s"
    released.set()


def test_credentials_are_told_of_and_never_shown(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    (tmp_path / "secret.json").write_text('{"private_key": "google_secret"}')
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "secret.json"))
    output = _run("--json").stdout
    assert "a token is set up" in output and "credentials named by GOOGLE_APPLICATION_CREDENTIALS" in output
    assert "hf_secret" not in output and "google_secret" not in output


def test_credentials_that_are_not_there_are_said_to_be_unneeded(monkeypatch, tmp_path):
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "gone.json"))
    (finding,) = readiness.check_droid()
    assert finding.state == NOTE and finding.todo.startswith("unset GOOGLE_APPLICATION_CREDENTIALS")


def test_a_hub_that_is_switched_off_is_not_asked(monkeypatch, web):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (finding,) = readiness.check_hub()
    assert finding.state == NOTE and finding.todo == "unset HF_HUB_OFFLINE" and web.requests == []


def test_a_folder_of_something_else_is_named_before_an_encode_refuses_it(tmp_path):
    (tmp_path / "notes.txt").touch()
    (finding,) = readiness.check_disk(REPOSITORY_ROOT, str(tmp_path))
    assert finding.state == MISSING and "is no cache root: it holds notes.txt" in finding.found
