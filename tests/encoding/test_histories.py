"""Claim: after any history of encoding, kills, full disks, edits, flipped bits and clean-ups, what a manifest lists is right.

It reads back exactly what an undisturbed encode of the same recordings gives, or the store is reported by name. Nothing is
reported that was not harmed. An encode ends with the manifest of an undisturbed one, and a repair with its bytes.
"""

import functools
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from jepa_cache.encoding.verification import repair_manifest
from jepa_cache.store.check import check_units
from jepa_cache.store.collection import remove_unneeded
from jepa_cache.store.root import CacheRoot
from tests.encoded import make_tiny_tar, read_everything, run_stage_one, same_numbers, tiniest_config
from tests.faults import FaultyDisk, Killed

NAMES, CONTENTS = "ab", 3
CONFIGS = {
    "slow": tiniest_config(),
    "quick": tiniest_config(fps=10.0),
    "other actions": tiniest_config(action_space="vpt36"),
}


class Undisturbed:
    """What encodes without any fault give, in a root of their own."""

    def __init__(self, base):
        self.base, self.root = base, CacheRoot(base / "cache")
        self.tars = [make_tiny_tar(base / "tars", str(seed), seed) / f"{seed}.tar" for seed in range(CONTENTS)]

    @functools.cache  # noqa: B019
    def manifest(self, config, contents):
        folder = Path(tempfile.mkdtemp(dir=self.base))
        for content in contents:
            shutil.copy(self.tars[content], folder)
        return run_stage_one(folder, self.root, CONFIGS[config])

    @functools.cache  # noqa: B019
    def numbers(self, config, contents):
        return read_everything(self.root, self.manifest(config, contents))


class Histories(RuleBasedStateMachine):
    """One cache root and one folder of recordings, and what became of them."""

    undisturbed: Undisturbed

    def __init__(self):
        super().__init__()
        self.base = Path(tempfile.mkdtemp(dir=self.undisturbed.base))
        self.folder, self.root = self.base / "in", CacheRoot(self.base / "cache")
        self.folder.mkdir()
        self.tars, self.config = {}, "slow"
        self.listed = None  # the last manifest that was written, with the settings and recordings that it is of
        self.harmed = False  # something was damaged behind the program's back, and not repaired since

    def teardown(self):
        shutil.rmtree(self.base)

    @initialize(content=st.integers(0, CONTENTS - 1))
    def begin(self, content):
        self.put("a", content)
        self.encode()

    @rule(name=st.sampled_from(NAMES), content=st.integers(0, CONTENTS - 1))
    def put(self, name, content):
        """Append a tar shard, or edit one."""
        shutil.copy(self.undisturbed.tars[content], self.folder / f"{name}.tar")
        self.tars[name] = content

    @precondition(lambda self: self.tars)
    @rule(data=st.data())
    def remove(self, data):
        name = data.draw(st.sampled_from(sorted(self.tars)))
        del self.tars[name]
        (self.folder / f"{name}.tar").unlink()

    @rule(config=st.sampled_from(sorted(CONFIGS)))
    def choose(self, config):
        self.config = config

    @precondition(lambda self: self.tars)
    @rule()
    def encode(self):
        self._encode()
        assert not list(self.root.path.rglob(".jepa-cache-*"))

    @precondition(lambda self: self.tars)
    @rule(point=st.integers(0, 180), how=st.sampled_from(["kill", "half", "full", "readonly"]))
    def encode_disturbed(self, point, how):
        with FaultyDisk(self.root.path, point, how) as disk:
            try:
                self._encode()
            except (Killed, OSError, ValueError):
                assert disk.stopped

    def _encode(self):
        contents = frozenset(self.tars.values())
        try:
            manifest = run_stage_one(self.folder, self.root, CONFIGS[self.config])
        except ValueError as error:
            if not (self.harmed and str(self.root.path) in str(error)):
                raise
            return
        assert manifest.to_bytes() == self.undisturbed.manifest(self.config, contents).to_bytes()
        self.listed = manifest, self.config, contents

    def _files(self):
        return sorted(path for path in self.root.path.rglob("*") if path.is_file() and path.stat().st_size)

    @rule(position=st.integers(0, 10**9), bit=st.integers(0, 7))
    def flip(self, position, bit):
        if files := self._files():
            path = files[position % len(files)]
            content = bytearray(path.read_bytes())
            content[position % len(content)] ^= 1 << bit
            path.write_bytes(content)
            self.harmed = True

    @rule(position=st.integers(0, 10**9), whole=st.booleans())
    def lose(self, position, whole):
        if files := self._files():
            path = files[position % len(files)]
            store = next((folder for folder in path.parents if folder.suffix == ".zarr"), None)
            path.unlink() if store is None or not whole else shutil.rmtree(store)
            self.harmed = True

    @precondition(lambda self: self.root.path.is_dir())
    @rule()
    def clean_up(self):
        try:
            remove_unneeded(self.root, grace_days=0)
        except ValueError as error:
            assert self.harmed and "manifest" in str(error)
            return
        assert not list(self.root.path.rglob(".jepa-cache-*"))

    @precondition(lambda self: self.listed is not None)
    @rule()
    def repair(self):
        manifest, config, contents = self.listed
        findings = check_units(manifest.stores, self.root, read_data=True)
        assert not findings or self.harmed
        if contents <= set(self.tars.values()):
            given = {"base": self.folder, "root": self.root}
            assert repair_manifest(manifest, findings, CONFIGS[config], [str(self.folder)], **given).complete
            self._check_numbers(allow_errors=False)

    @invariant()
    def what_is_listed_reads_as_it_was_written_or_is_reported(self):
        if self.listed is not None:
            self._check_numbers(allow_errors=self.harmed)

    def _check_numbers(self, allow_errors):
        manifest, config, contents = self.listed
        try:
            found = read_everything(self.root, manifest)
        except ValueError as error:
            assert allow_errors and str(self.root.path) in str(error), error
            return
        for name, values in self.undisturbed.numbers(config, contents).items():
            assert same_numbers(values, found[name]), name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"))


# Of the faults that were planted to choose the number, thirty histories find no more than ten do.
@pytest.mark.parametrize(
    "given",
    [
        {"max_examples": 10, "stateful_step_count": 12, "derandomize": True},
        pytest.param({"max_examples": 300, "stateful_step_count": 30}, marks=pytest.mark.long),
    ],
    ids=["few", "many"],
)
def test_any_history_leaves_what_is_listed_right_or_reported(undisturbed, given):
    machine = type("Histories", (Histories,), {"undisturbed": undisturbed})
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    run_state_machine_as_test(machine, settings=settings(deadline=None, suppress_health_check=checks, **given))
