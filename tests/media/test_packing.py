"""Claims of media/packing.py and of `jepa-cache pack`.

What is packed comes back byte for byte through the tar reader; the same folder gives the same bytes; what is not packed is
named; earlier tars are never overwritten or mixed with new ones unasked, and no incomplete tar is ever seen.
"""

import os

import pytest

from jepa_cache.cli.pack import pack
from jepa_cache.media.tar import expand_inputs, iter_samples, pack_folder

SUFFIXES = ("mp4", "jsonl")


def _write_pairs(folder, names):
    for index, name in enumerate(names):
        for suffix in SUFFIXES:
            path = folder / f"{name}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(os.fsencode(f"{name} {suffix} ") * (50 + index))


@pytest.fixture
def folder(tmp_path):
    _write_pairs(tmp_path / "in", ["10.0/b", "10.0/a", "c", "7.x/deep/d"])
    return tmp_path / "in"


def _read_all(tars):
    return [sample for tar in tars for sample in iter_samples(tar, SUFFIXES)]


def test_what_is_packed_comes_back(folder, tmp_path):
    report = pack_folder(folder, tmp_path / "out")
    samples = _read_all(report.tars)
    assert [sample.key for sample in samples] == ["10.0/a", "10.0/b", "7.x/deep/d", "c"]
    for sample in samples:
        assert sample.problem is None
        assert sample.members == {suffix: (folder / f"{sample.key}.{suffix}").read_bytes() for suffix in SUFFIXES}
    assert report.num_episodes == 4 and not report.left_out
    assert expand_inputs([str(tmp_path / "out")], tmp_path) == report.tars


def test_a_name_that_is_no_utf8_is_written_in_ascii(tmp_path):
    _write_pairs(tmp_path / "in", [os.fsdecode(b"caf\xe9")])
    report = pack_folder(tmp_path / "in", tmp_path / "out")
    assert [sample.key for sample in _read_all(report.tars)] == [r"caf\xe9"]
    assert rb"caf\xe9.mp4" in report.tars[0].read_bytes()


def test_the_same_folder_gives_the_same_bytes(folder, tmp_path):
    first = pack_folder(folder, tmp_path / "one", max_bytes=4500).tars
    for path in folder.rglob("*.mp4"):
        os.utime(path, (1, 1))
    second = pack_folder(folder, tmp_path / "two", max_bytes=4500).tars
    assert [path.name for path in first] == ["shard-000000.tar", "shard-000001.tar"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


@pytest.mark.parametrize("max_bytes", [2500, 2000, 1])
def test_tars_keep_their_limit_and_lose_nothing(folder, tmp_path, max_bytes):
    tars = pack_folder(folder, tmp_path / "out", max_bytes=max_bytes).tars
    assert len(_read_all(tars)) == 4
    for tar in tars:
        samples = list(iter_samples(tar, SUFFIXES))
        size_bytes = sum(len(part) for sample in samples for part in sample.members.values())
        assert size_bytes <= max_bytes or len(samples) == 1


def test_files_without_a_partner_are_named(folder, tmp_path):
    (folder / "10.0" / "lonely.mp4").write_bytes(b"x")
    (folder / "a.b.mp4").write_bytes(b"x")
    (folder / "notes-options.json").write_bytes(b"x")
    report = pack_folder(folder, tmp_path / "out")
    reasons = dict(report.left_out)
    assert list(reasons) == ["10.0/lonely.mp4", "a.b.mp4"]
    assert "no 10.0/lonely.jsonl" in reasons["10.0/lonely.mp4"] and "dot" in reasons["a.b.mp4"]
    assert report.num_episodes == 4


def test_links_out_of_the_folder_are_named_and_not_followed(folder, tmp_path):
    secret = tmp_path / "elsewhere.mp4"
    secret.write_bytes(b"not to be packed")
    (folder / "out.mp4").symlink_to(secret)
    (folder / "out.jsonl").write_bytes(b"{}\n")
    first = next(path for path in sorted(folder.rglob("*.mp4")) if path.is_file() and not path.is_symlink())
    (folder / "inside.mp4").symlink_to(first)
    (folder / "inside.jsonl").symlink_to(first.with_suffix(".jsonl"))
    report = pack_folder(folder, tmp_path / "out")
    reasons = dict(report.left_out)
    assert f"a link out of the folder, to {secret}" in reasons["out.mp4"]
    assert "no out.mp4" in reasons["out.jsonl"]
    assert report.num_episodes == 5 and all(b"not to be packed" not in tar.read_bytes() for tar in report.tars)


def test_doubly_dotted_and_upper_case_names_are_packed_under_safe_ones(tmp_path):
    for name in ("a..mp4", "a.JSONL"):
        (tmp_path / name).write_bytes(name.encode())
    (sample,) = _read_all(pack_folder(tmp_path, tmp_path / "out").tars)
    assert sample == ("a", {"mp4": b"a..mp4", "jsonl": b"a.JSONL"}, None)


def test_an_earlier_pack_is_refused_and_stays(folder, tmp_path):
    (tar,) = pack_folder(folder, tmp_path / "out").tars
    before = tar.read_bytes()
    _write_pairs(folder, ["new"])
    with pytest.raises(ValueError, match="--overwrite"):
        pack_folder(folder, tmp_path / "out")
    assert tar.read_bytes() == before


def test_overwriting_leaves_no_tar_of_the_earlier_pack(folder, tmp_path):
    assert len(pack_folder(folder, tmp_path / "out", max_bytes=1).tars) == 4
    report = pack_folder(folder, tmp_path / "out", overwrite=True)
    assert sorted((tmp_path / "out").iterdir()) == report.tars
    assert len(_read_all(report.tars)) == 4


def test_a_failure_leaves_whole_tars_only(folder, tmp_path, monkeypatch):
    from webdataset.writer import TarWriter

    write = TarWriter.write

    def fail_on_third(self, sample):
        if sample["__key__"] == "7.x/deep/d":
            raise OSError("no space left")
        return write(self, sample)

    monkeypatch.setattr(TarWriter, "write", fail_on_third)
    with pytest.raises(OSError, match="no space"):
        pack_folder(folder, tmp_path / "out", max_bytes=2500)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["shard-000000.tar"]
    assert all(sample.problem is None for sample in _read_all((tmp_path / "out").iterdir()))


def test_nothing_to_pack_is_an_error(tmp_path):
    (tmp_path / "a.mp4").touch()
    with pytest.raises(ValueError, match=r"<segment>\.mp4, <segment>\.jsonl"):
        pack_folder(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="is no folder"):
        pack_folder(tmp_path / "absent", tmp_path / "out")


def test_long_names_survive(tmp_path):
    name = "/".join(["x" * 90] * 4) + "/segment"
    _write_pairs(tmp_path / "in", [name])
    (sample,) = _read_all(pack_folder(tmp_path / "in", tmp_path / "out").tars)
    assert sample.key == name and sample.problem is None


def test_the_command_says_what_was_left_out_and_what_to_type_next(folder, tmp_path, capsys):
    (folder / "lonely.jsonl").write_bytes(b"x")
    pack(folder, tmp_path / "out")
    printed = capsys.readouterr().out
    assert "packed 4 recordings" in printed and "lonely.jsonl: there is no lonely.mp4" in printed
    assert printed.rstrip().splitlines()[-1] == (
        f"next: set `dataset: vpt` in params.yaml, then python stages/encode.py {tmp_path / 'out'}"
    )
