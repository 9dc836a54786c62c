"""Claims of media/wheel.py: a wheel is fetched once by pip and checked by its digest.

What keeps it from being had is one message with the way out, and leaves nothing behind.
"""

import hashlib
import subprocess
import zipfile

import pytest

from jepa_cache.media import wheel
from jepa_cache.media.remote import DownloadError, downloads_folder
from jepa_cache.media.wheel import fetch_wheel

NAME = "our_models"
FILES = {
    f"{NAME}/__init__.py": b"raise SystemExit('code was run')",
    f"{NAME}-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: our-models\nVersion: 1.0\nRequires-Dist: nowhere\n",
    f"{NAME}-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    f"{NAME}-1.0.dist-info/RECORD": b"",
}


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes for its only index, with one wheel; gives the wheel's digest."""
    path = tmp_path / "index" / f"{NAME}-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
    monkeypatch.setenv("JEPA_DOWNLOADS", str(tmp_path / "downloads"))
    for key, value in {"CONFIG_FILE": "/dev/null", "NO_INDEX": "1", "FIND_LINKS": str(path.parent)}.items():
        monkeypatch.setenv(f"PIP_{key}", value)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def kept_files():
    return [path for path in downloads_folder().rglob("*") if path.is_file()]


def test_a_wheel_is_fetched_once_and_found_offline(index, monkeypatch, capsys):
    path = fetch_wheel("our-models", "1.0", index)
    assert kept_files() == [path] and str(path) in capsys.readouterr().out
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was asked again"))
    assert fetch_wheel("our-models", "1.0", index) == path


def test_a_damaged_wheel_is_named_and_fetched_again(index, capsys):
    path = fetch_wheel("our-models", "1.0", index)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"x")
    assert fetch_wheel("our-models", "1.0", index).read_bytes() == whole
    assert f"{path} is not taken: its sha256 is" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "digest", "settings", "words"),
    [
        ("our-models", "0" * 64, {}, r"the index gave our_models-1\.0.* with sha256 .*Nothing of it is used\. Try again"),
        ("no-models", "0" * 64, {}, r"no-models 1\.0 cannot be fetched: ERROR: .*pip download --no-deps no-models==1\.0.*downloads/wheels/0"),
        (
            "no-models",
            "0" * 64,
            {"NO_INDEX": "0", "INDEX_URL": "http://127.0.0.1:9/simple"},
            r"the package index is not reached: .*[Rr]efused.*PIP_INDEX_URL.*put the \.whl into",
        ),
    ],
)  # fmt: skip
def test_what_the_index_does_not_give_is_one_message_and_leaves_nothing(
    index, monkeypatch, name, digest, settings, words
):
    monkeypatch.setattr(wheel, "NUM_RETRIES", 1)
    for key, value in settings.items():
        monkeypatch.setenv(f"PIP_{key}", value)
    with pytest.raises(DownloadError, match=words):
        fetch_wheel(name, "1.0", digest)
    assert not kept_files()


def test_a_python_without_pip_is_told(index, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, stderr="/usr/bin/python: No module named pip\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(DownloadError, match=r"cannot be fetched: .*No module named pip"):
        fetch_wheel("our-models", "1.0", index)


def test_a_folder_that_cannot_be_made_is_told_before_anything_is_fetched(index, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("JEPA_DOWNLOADS", str(tmp_path / "file"))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was asked"))
    with pytest.raises(DownloadError, match=r"cannot be kept in .*: File exists\..*JEPA_DOWNLOADS"):
        fetch_wheel("our-models", "1.0", index)
