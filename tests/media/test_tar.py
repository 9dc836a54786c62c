"""Claims of media/tar.py.

Samples are found by webdataset's key rule in whatever order the members lie, with every other member ignored; what cannot be
used is a named problem and nothing else is lost by it; a tar that ends early, or is no tar, never passes as a whole one; inputs
are expanded in a fixed order and a name that finds nothing is an error.
"""

import tarfile
import tracemalloc

import pytest

from jepa_cache.media.tar import expand_inputs, iter_samples
from tests.makers import write_tar

SUFFIXES = {"mp4", "jsonl"}


def _read(path):
    return list(iter_samples(path, SUFFIXES))


def _pairs(samples):
    return {sample.key: sample.members for sample in samples}


def test_members_come_back_by_key_and_suffix(tmp_path):
    tar = write_tar(
        tmp_path / "a.tar", [("a.mp4", b"video"), ("a.jsonl", b"lines"), ("b.mp4", b"v2"), ("b.jsonl", b"l2")]
    )
    assert _read(tar) == [
        ("a", {"mp4": b"video", "jsonl": b"lines"}, None),
        ("b", {"mp4": b"v2", "jsonl": b"l2"}, None),
    ]


def test_members_that_are_not_adjacent_are_brought_together(tmp_path):
    tar = write_tar(tmp_path / "a.tar", [("a.mp4", b"1"), ("b.jsonl", b"2"), ("b.mp4", b"3"), ("a.jsonl", b"4")])
    assert _pairs(_read(tar)) == {"a": {"mp4": b"1", "jsonl": b"4"}, "b": {"mp4": b"3", "jsonl": b"2"}}


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("a..mp4", "a"),
        ("a.MP4", "a"),
        ("./a.mp4", "a"),
        ("10.0/a.mp4", "10.0/a"),
        ("v1.2/x.y/a..mp4", "v1.2/x.y/a"),
    ],
)
def test_names_are_split_at_the_first_dot_of_the_base_name(tmp_path, name, key):
    assert _read(write_tar(tmp_path / "a.tar", [(name, b"1")])) == [(key, {"mp4": b"1"}, None)]


def test_the_key_rule_is_that_of_webdataset(tmp_path):
    import webdataset

    members = [("d.1/a.mp4", b"1"), ("d.1/a.jsonl", b"2"), ("b.mp4", b"3"), ("b.jsonl", b"4")]
    tar = write_tar(tmp_path / "a.tar", members)
    theirs = webdataset.WebDataset(str(tar), shardshuffle=False)
    assert _pairs(_read(tar)) == {s["__key__"]: {k: s[k] for k in ("mp4", "jsonl")} for s in theirs}


@pytest.mark.parametrize("name", ["a-options.json", "a.zip", "a.mcap", "._a.mp4", "README", "a.mp4.txt"])
def test_other_members_make_no_sample(tmp_path, name):
    tar = write_tar(tmp_path / "a.tar", [("a.mp4", b"1"), (name, b"x"), ("a.jsonl", b"2")])
    assert _read(tar) == [("a", {"mp4": b"1", "jsonl": b"2"}, None)]


@pytest.mark.parametrize("twin", ["a.mp4", "a..mp4", "./a.MP4"])
def test_a_member_that_is_there_twice_is_a_problem(tmp_path, twin):
    tar = write_tar(tmp_path / "a.tar", [("a.mp4", b"1"), ("b.mp4", b"3"), (twin, b"2")])
    twice, good = _read(tar)
    assert "more than one member" in twice.problem and not twice.members
    assert good == ("b", {"mp4": b"3"}, None)


def test_a_dot_inside_the_name_is_a_problem_and_no_other_key(tmp_path):
    samples = _read(write_tar(tmp_path / "a.tar", [("a.x.mp4", b"1"), ("a.jsonl", b"2")]))
    assert [sample.key for sample in samples] == ["a.x.mp4", "a"]
    assert "dot inside" in samples[0].problem


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_a_problem(tmp_path, kind):
    header = tarfile.TarInfo("a.mp4")
    header.type, header.linkname = kind, "/etc/passwd"
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(header)
    (sample,) = _read(tmp_path / "a.tar")
    assert "link" in sample.problem and not sample.members


@pytest.mark.parametrize("name", ["/tmp/a.mp4", "../a.mp4", "x/../../a.mp4"])
def test_names_outside_their_folder_are_a_problem_and_nothing_is_written(tmp_path, name):
    tar = write_tar(tmp_path / "inside" / "a.tar", [(name, b"1")])
    (sample,) = _read(tar)
    assert "absolute name" in sample.problem and not sample.members
    assert [path.name for path in tmp_path.rglob("*")] == ["inside", "a.tar"]


def test_folders_with_dots_in_the_tar_are_no_samples(tmp_path):
    header = tarfile.TarInfo("x.mp4")
    header.type = tarfile.DIRTYPE
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(header)
    assert _read(tmp_path / "a.tar") == []


@pytest.fixture
def whole(tmp_path):
    members = [(f"{key}.{suffix}", bytes([ord(key)]) * 3000) for key in "abc" for suffix in ("mp4", "jsonl")]
    return write_tar(tmp_path / "whole.tar", members)


def test_a_tar_cut_off_anywhere_gives_its_whole_samples_and_says_that_it_is_cut(whole, tmp_path):
    reference = _pairs(_read(whole))
    content = whole.read_bytes()
    end_of_members = 6 * (512 + 3072)
    for length in [*range(1024, end_of_members, 700), *range(512 + 3072, end_of_members + 1, 512 + 3072)]:
        cut = tmp_path / "cut.tar"
        cut.write_bytes(content[:length])
        samples = _read(cut)
        told = [sample for sample in samples if sample.problem and "cut off" in sample.problem]
        assert len(told) == 1, f"cut at {length}"
        assert told == [sample for sample in samples if sample.problem]
        for sample in samples:
            assert sample.problem or sample.members.items() <= reference[sample.key].items(), f"cut at {length}"


def test_a_damaged_header_is_a_problem_and_what_was_before_it_is_read(whole):
    content = bytearray(whole.read_bytes())
    header_of_second_sample = 2 * (512 + 3072)
    content[header_of_second_sample : header_of_second_sample + 100] = b"\xff" * 100
    whole.write_bytes(content)
    first, tail = _read(whole)
    assert first.key == "a" and first.problem is None
    assert tail.key == "whole.tar" and "damaged header" in tail.problem


def test_tars_that_were_joined_are_a_problem(whole, tmp_path):
    joined = tmp_path / "joined.tar"
    joined.write_bytes(whole.read_bytes() * 2)
    samples = _read(joined)
    assert len(samples) == 4 and "joined with cat" in samples[-1].problem


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty"),
        (b"no tar at all" * 100, "copy it again"),
        (b"\x1f\x8b\x08" + b"x" * 600, "compressed with gzip"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        (b"\n<HTML><body>Please log in", "HTML page"),
    ],
)
def test_what_is_no_tar_is_one_problem_under_its_name_that_says_what_it_is(tmp_path, content, words):
    (tmp_path / "a.tar").write_bytes(content)
    (sample,) = _read(tmp_path / "a.tar")
    assert sample.key == "a.tar" and "no uncompressed tar" in sample.problem and words in sample.problem


def test_one_sample_is_in_memory_at_a_time(tmp_path):
    size = 1 << 20
    tar = write_tar(tmp_path / "a.tar", [(f"{index}.mp4", bytes(size)) for index in range(12)])
    next(iter_samples(tar, SUFFIXES))  # Imports are not counted.
    tracemalloc.start()
    for sample in iter_samples(tar, SUFFIXES):
        assert len(sample.members["mp4"]) == size
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * size, f"{peak / size:.1f} samples were in memory at once"


@pytest.fixture
def folder(tmp_path):
    for name in ("b/x-000001.tar", "b/x-000000.tar", "a/y.tar", "a/.z.tar.tmp", "a/notes.txt", "[c]/q.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (["b"], ["b/x-000000.tar", "b/x-000001.tar"]),
        (["."], ["[c]/q.tar", "a/y.tar", "b/x-000000.tar", "b/x-000001.tar"]),
        (["b/x-{000000..000001}.tar"], ["b/x-000000.tar", "b/x-000001.tar"]),
        (["{a,b}"], ["a/y.tar", "b/x-000000.tar", "b/x-000001.tar"]),
        (["b/*.tar"], ["b/x-000000.tar", "b/x-000001.tar"]),
        (["*/x*.tar", "b/x-000000.tar", "a"], ["a/y.tar", "b/x-000000.tar", "b/x-000001.tar"]),
        (["[c]"], ["[c]/q.tar"]),
    ],
)
def test_inputs_are_expanded_sorted_and_each_once(folder, inputs, expected):
    assert expand_inputs(inputs, folder) == [folder / name for name in expected]


def test_absolute_inputs_do_not_start_from_the_base(folder, tmp_path):
    assert expand_inputs([str(folder / "a")], tmp_path / "elsewhere") == [folder / "a/y.tar"]


def test_a_tar_that_two_links_reach_counts_once(folder):
    (folder / "link").symlink_to(folder / "b", target_is_directory=True)
    assert len(expand_inputs(["b", "link"], folder)) == 2
    assert len(expand_inputs(["link"], folder)) == 2


@pytest.mark.parametrize("name", ["absent", "a/notes.txt", "b/*.zip", "absent-{0..3}.tar"])
def test_an_input_that_finds_nothing_names_itself_and_the_base(folder, name):
    with pytest.raises(ValueError) as error:
        expand_inputs(["b", name], folder)
    assert name in str(error.value) and str(folder) in str(error.value)


def test_a_gap_in_a_brace_range_is_an_error_that_names_it(folder):
    with pytest.raises(ValueError, match=r"nothing for b/x-000002\.tar"):
        expand_inputs(["b/x-{000000..000002}.tar"], folder)
