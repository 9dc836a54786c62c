"""Claims of media/tar.py and `jepa-cache pack`.

Samples are found by webdataset's key rule in whatever order the members lie; what cannot be used is a named problem and nothing
else is lost by it; a tar that ends early, or is no tar, never passes as a whole one. Inputs are expanded in a fixed order and a name
that finds nothing is an error. What is packed comes back byte for byte, the same folder gives the same bytes, what is not
packed is named, and earlier tars are never overwritten or mixed with new ones unasked.
"""

import os
import tarfile
import tracemalloc

import pytest

from jepa_cache.cli.preparation import pack
from jepa_cache.media import tar as tar_module
from jepa_cache.media.tar import SUFFIXES, expand_inputs, iter_samples, pack_folder
from tests.makers import write_tar


def _read(path):
    return list(iter_samples(path, SUFFIXES))


def _pairs(samples):
    return {sample.key: sample.members for sample in samples}


def _write_header(path, kind, name="a.mp4"):
    header = tarfile.TarInfo(name)
    header.type, header.linkname = kind, "/etc/passwd"
    with tarfile.open(path, "w") as tar:
        tar.addfile(header)
    return path


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("a..mp4", "a"),
        ("a.MP4", "a"),
        ("./a.mp4", "a"),
        ("v1.2/x.y/a..mp4", "v1.2/x.y/a"),
        (os.fsdecode(b"caf\xe9.mp4"), r"caf\xe9"),
    ],
)
def test_names_are_split_at_the_first_dot_of_the_base_name(tmp_path, name, key):
    assert _read(write_tar(tmp_path / "a.tar", [(name, b"1")])) == [(key, {"mp4": b"1"}, None)]


def test_members_are_brought_together_by_webdatasets_key_rule_and_others_are_ignored(tmp_path):
    import webdataset

    members = [("d.1/a.mp4", b"1"), ("d.1/a.jsonl", b"2"), ("b.mp4", b"3"), ("b.jsonl", b"4")]
    tar = write_tar(tmp_path / "a.tar", members)
    theirs = webdataset.WebDataset(str(tar), shardshuffle=False)
    expected = {sample["__key__"]: {suffix: sample[suffix] for suffix in SUFFIXES} for sample in theirs}
    assert _pairs(_read(tar)) == expected
    others = [(name, b"x") for name in ("a-options.json", "a.zip", "._a.mp4", "README", "a.mp4.txt")]
    assert _pairs(_read(write_tar(tmp_path / "mixed.tar", [*members[::2], *others, *members[1::2]]))) == expected
    assert _read(_write_header(tmp_path / "folder.tar", tarfile.DIRTYPE, "x.mp4")) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.mp4", "more than one member"),
        ("a..mp4", "more than one member"),
        ("./a.MP4", "more than one member"),
        ("a.x.mp4", "dot inside"),
        ("/tmp/a.mp4", "absolute name"),
        ("../a.mp4", "leaves its folder"),
        ("x/../../a.mp4", "leaves its folder"),
    ],
)
def test_a_member_of_an_unusable_name_is_a_problem_of_its_key_alone(tmp_path, name, words):
    tar = write_tar(tmp_path / "inside" / "a.tar", [("a.mp4", b"1"), ("b.mp4", b"3"), (name, b"2")])
    samples = _read(tar)
    (bad,) = [sample for sample in samples if sample.problem]
    assert words in bad.problem and not bad.members
    assert ("b", {"mp4": b"3"}, None) in samples
    assert [path.name for path in tmp_path.rglob("*")] == ["inside", "a.tar"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_devices_and_members_too_large_for_memory_are_a_problem(tmp_path, kind, monkeypatch):
    (sample,) = _read(_write_header(tmp_path / "a.tar", kind))
    assert "only plain files are read" in sample.problem and not sample.members
    monkeypatch.setattr(tar_module, "MAX_MEMBER_BYTES", 1000)
    first, second = _read(write_tar(tmp_path / "x.tar", [("a.mp4", b"v" * 1001), ("b.mp4", b"v" * 1000)]))
    assert "at most 1000 are read" in first.problem and not first.members and second.problem is None


@pytest.fixture
def whole(tmp_path):
    members = [(f"{key}.{suffix}", bytes([ord(key)]) * 3000) for key in "abc" for suffix in SUFFIXES]
    return write_tar(tmp_path / "whole.tar", members)


def test_a_tar_cut_off_anywhere_gives_its_whole_samples_and_says_that_it_is_cut(whole, tmp_path):
    reference = _pairs(_read(whole))
    content = whole.read_bytes()
    end_of_members = 6 * (512 + 3072)
    for length in [*range(1024, end_of_members, 700), *range(512 + 3072, end_of_members + 1, 512 + 3072)]:
        cut = tmp_path / "cut.tar"
        cut.write_bytes(content[:length])
        samples = _read(cut)
        told = [sample for sample in samples if sample.problem]
        assert len(told) == 1 and "cut off" in told[0].problem, f"cut at {length}"
        for sample in samples:
            assert sample.problem or sample.members.items() <= reference[sample.key].items(), f"cut at {length}"


def test_a_damaged_header_and_joined_tars_are_a_problem_and_what_was_before_is_read(whole):
    content = bytearray(whole.read_bytes())
    whole.write_bytes(content * 2)
    samples = _read(whole)
    assert len(samples) == 4 and "joined with cat" in samples[-1].problem
    header_of_second_sample = 2 * (512 + 3072)
    content[header_of_second_sample : header_of_second_sample + 100] = b"\xff" * 100
    whole.write_bytes(content)
    first, tail = _read(whole)
    assert first.key == "a" and first.problem is None
    assert tail.key == "whole.tar" and "damaged header" in tail.problem


def test_one_sample_is_in_memory_at_a_time(tmp_path):
    size = 1 << 20
    tar = write_tar(tmp_path / "a.tar", [(f"{index}.mp4", bytes(size)) for index in range(8)])
    next(iter_samples(tar, SUFFIXES))  # Imports are not counted.
    tracemalloc.start()
    for sample in iter_samples(tar, SUFFIXES):
        assert len(sample.members["mp4"]) == size
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * size, f"{peak / size:.1f} samples were in memory at once"


@pytest.fixture
def inputs(tmp_path):
    for name in ("b/x-000001.tar", "b/x-000000.tar", "a/y.tar", "a/.z.tar.tmp", "a/notes.txt", "[c]/q.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["."], ["[c]/q.tar", "a/y.tar", "b/x-000000.tar", "b/x-000001.tar"]),
        (["b/x-{000000..000001}.tar"], ["b/x-000000.tar", "b/x-000001.tar"]),
        (["{a,b}"], ["a/y.tar", "b/x-000000.tar", "b/x-000001.tar"]),
        (["*/x*.tar", "b/x-000000.tar", "a"], ["a/y.tar", "b/x-000000.tar", "b/x-000001.tar"]),
        (["[c]"], ["[c]/q.tar"]),
    ],
)
def test_inputs_are_expanded_sorted_and_each_once(inputs, given, expected):
    assert expand_inputs(given, inputs, "*.tar") == [inputs / name for name in expected]
    absolute = [str(inputs / name) for name in given]
    assert expand_inputs(absolute, inputs / "elsewhere", "*.tar") == [inputs / name for name in expected]
    (inputs / "b2").symlink_to(inputs / "b", target_is_directory=True)
    assert len(expand_inputs(["b", "b2"], inputs, "*.tar")) == 2, "each once, by whichever name"


@pytest.mark.parametrize("name", ["absent", "a/notes.txt", "b/*.zip", "absent-{0..3}.tar", "b/x-{000000..000002}.tar"])
def test_an_input_that_finds_nothing_names_itself_the_gap_and_the_base(inputs, name):
    with pytest.raises(ValueError) as error:
        expand_inputs(["b", name], inputs, "*.tar")
    assert name in str(error.value) and str(inputs) in str(error.value)
    assert "{0000" not in name or "nothing for b/x-000002.tar" in str(error.value)


def _write_pairs(folder, names):
    for index, name in enumerate(names):
        for suffix in SUFFIXES:
            path = folder / f"{name}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(os.fsencode(f"{name} {suffix} ") * (50 + index))


LONG = "/".join(["x" * 90] * 4) + "/segment"


@pytest.fixture
def folder(tmp_path):
    _write_pairs(tmp_path / "in", ["10.0/b", "10.0/a", "c", LONG])
    return tmp_path / "in"


@pytest.mark.parametrize("max_bytes", [4500, 2500, 1])
def test_what_is_packed_comes_back_within_the_limit_and_the_same_folder_gives_the_same_bytes(
    folder, tmp_path, max_bytes
):
    tars, num_episodes, _, skipped = pack_folder(folder, tmp_path / "one", max_bytes=max_bytes)
    assert num_episodes == 4 and not skipped and expand_inputs(["one"], tmp_path, "*.tar") == tars
    keys = []
    for samples in map(_read, tars):
        keys += [sample.key for sample in samples]
        assert len(samples) == 1 or sum(len(part) for it in samples for part in it.members.values()) <= max_bytes
        assert all(sample.problem is None for sample in samples)
        for sample in samples:
            assert sample.members == {suffix: (folder / f"{sample.key}.{suffix}").read_bytes() for suffix in SUFFIXES}
    assert keys == ["10.0/a", "10.0/b", "c", LONG]
    for path in folder.rglob("*.mp4"):
        os.utime(path, (1, 1))
    again = pack_folder(folder, tmp_path / "two", max_bytes=max_bytes).tars
    assert [path.read_bytes() for path in tars] == [path.read_bytes() for path in again]


def test_what_is_not_packed_is_named_and_links_out_of_the_folder_are_not_followed(folder, tmp_path, capsys):
    secret = tmp_path / "elsewhere.mp4"
    secret.write_bytes(b"not to be packed")
    (folder / "out.mp4").symlink_to(secret)
    _write_pairs(folder, [os.fsdecode(b"caf\xe9")])
    for name in ("10.0/lonely.mp4", "a.b.mp4", "notes-options.json", "dotted..mp4", "dotted.JSONL"):
        (folder / name).write_bytes(name.encode())
    for suffix in SUFFIXES:
        (folder / f"inside.{suffix}").symlink_to(folder / f"c.{suffix}")
    pack(folder, tmp_path / "out")
    (tar,) = (tmp_path / "out").iterdir()
    samples = _pairs(_read(tar))
    assert samples["dotted"] == {"mp4": b"dotted..mp4", "jsonl": b"dotted.JSONL"}
    assert samples["inside"] == samples["c"] and r"caf\xe9" in samples and len(samples) == 7
    assert secret.read_bytes() not in tar.read_bytes() and rb"caf\xe9.mp4" in tar.read_bytes()
    printed = capsys.readouterr().out
    assert "packed 7 recordings" in printed and "skipped 3 files" in printed
    for words in (
        "10.0/lonely.mp4: there is no 10.0/lonely.jsonl",
        "a.b.mp4: a dot",
        "out.mp4: a link out of the folder",
    ):
        assert words in printed
    assert printed.rstrip().endswith(f"then python stages/encode.py {tmp_path / 'out'}")


def test_an_earlier_pack_is_refused_and_overwriting_leaves_no_tar_of_it(folder, tmp_path):
    earlier = pack_folder(folder, tmp_path / "out", max_bytes=1).tars
    before = [tar.read_bytes() for tar in earlier]
    with pytest.raises(ValueError, match="--overwrite"):
        pack_folder(folder, tmp_path / "out")
    assert len(before) == 4 and [tar.read_bytes() for tar in earlier] == before
    tars = pack_folder(folder, tmp_path / "out", overwrite=True).tars
    assert list((tmp_path / "out").iterdir()) == tars and len(_read(tars[0])) == 4


def test_a_failure_leaves_the_folder_as_it_was(folder, tmp_path, monkeypatch):
    from webdataset.writer import TarWriter

    def fail_on_the_last(self, sample, write=TarWriter.write):
        return write(self, sample) if sample["__key__"] != LONG else 1 / 0

    earlier = pack_folder(folder, tmp_path / "out", max_bytes=1).tars
    before = [tar.read_bytes() for tar in earlier]
    monkeypatch.setattr(TarWriter, "write", fail_on_the_last)
    with pytest.raises(ZeroDivisionError):
        pack_folder(folder, tmp_path / "out", max_bytes=2500, overwrite=True)
    assert sorted((tmp_path / "out").iterdir()) == earlier and [tar.read_bytes() for tar in earlier] == before


def test_nothing_to_pack_is_an_error(tmp_path):
    (tmp_path / "a.mp4").touch()
    with pytest.raises(ValueError, match=r"an episode is <segment>\.mp4 and .*there is no a\.jsonl"):
        pack_folder(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="is no folder"):
        pack_folder(tmp_path / "absent", tmp_path / "out")
