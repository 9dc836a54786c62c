"""Claims: real commands that are really killed (kill -9 at random moments), or that race each other, lose nothing.

After any number of killed encodes, clean-ups, repairs and exports the next one finishes with the bytes of an undisturbed root; no
temporary file and no lock of a dead process stays, and `verify` finds nothing. Encoders side by side make every unit once. An export
beside an encode or a clean-up is whole, or says why it is not and leaves nothing that could be taken for one.
"""

import os
import random
import re
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cli.conftest import _write_checkout
from tests.encoded import all_files, make_tiny_tar
from tests.processes import Commands, wait_until

pytestmark = pytest.mark.long

TRIALS = int(os.environ.get("CAMPAIGN_TRIALS", "12"))  # of each kind
SEED = int(os.environ.get("CAMPAIGN_SEED", "0"))
UNITS = "abcd"
RECIPES = {
    "float16": [],
    "int8": ["encode.dtype=int8"],
    "int4": ["encode.dtype=int4", "encode.fps=10"],
    "tubelet": ["encode.mode=tubelet"],
    "phases": ["encode.phases=[0, 2]", "encode.dtype=bfloat16"],
}


class Place(NamedTuple):
    """A checkout, the commands, and what each recipe's undisturbed run makes and how long it takes."""

    base: Path
    checkout: Path
    commands: Commands
    roots: dict[str, dict[str, bytes]]
    seconds: dict[str, float]

    def start(self, root, *argv, checkout=None):
        where = checkout or self.checkout
        if argv[0] == "encode":
            argv = ["stages/encode.py", str(self.checkout / "recordings"), *argv[1:]]
        else:
            argv = ["jepa-cache", *argv]
        return self.commands.start(where, *argv, f"cache.root={root}", XDG_STATE_HOME=self.base / "state")

    def run(self, root, *argv, checkout=None, code=0):
        started = self.start(root, *argv, checkout=checkout)
        assert started.wait() == code, started.text
        return started.text

    def check(self, root, expected, recipe, checkout=None):
        """The root is as an undisturbed one, to the last byte, and `verify` agrees."""
        assert files_of(root) == expected
        assert [str(path) for path in root.rglob(".jepa-cache-*")] == []
        self.run(root, "verify", "--read-data", *RECIPES[recipe], checkout=checkout)

    def check_published(self, root, recipe):
        """Whatever a kill left under its final name is whole: a store has all of its files, each as undisturbed."""
        found = {name: content for name, content in files_of(root).items() if ".jepa-cache-" not in name}
        places = {place_of(name) for name in found}
        assert found == {name: it for name, it in self.roots[recipe].items() if place_of(name) in places}
        return len(places)


def place_of(name):
    """The store that a file is in; a file that is in none is its own."""
    head, suffix, _ = name.partition(".zarr/")
    return head + suffix


def files_of(root):
    return {name: content for name, content in all_files(root).items() if name != "in-use.lock"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    base = tmp_path_factory.mktemp("kills")
    checkout = base / "checkout"
    for folder in (checkout, base / "out"):
        folder.mkdir()
    _write_checkout(checkout)
    for seed, name in enumerate(UNITS):
        make_tiny_tar(checkout / "recordings", name, seed, num_frames=41)
    with Commands(base / "out") as commands:
        place = Place(base, checkout, commands, {}, {})
        for recipe, overrides in RECIPES.items():
            for again in range(2):  # the second one is quicker
                begin = time.monotonic()
                place.run(base / f"whole-{again}" / recipe, "encode", *overrides)
                place.seconds[recipe] = time.monotonic() - begin
            place.roots[recipe] = files_of(base / f"whole-0/{recipe}")
            assert files_of(base / f"whole-1/{recipe}") == place.roots[recipe]
        yield place


@pytest.fixture
def rng(request):
    return random.Random(f"{SEED} {request.node.name}")


def kill_sometime(place, rng, seconds, *arguments, group=False, **options):
    """Start a command and kill it at a random moment; whether it was alive then."""
    started = place.start(*arguments, **options)
    wait_until(rng.uniform(0, seconds), started)
    started.kill(group=group)
    return started.wait() == -9


@pytest.mark.parametrize("recipe", RECIPES)
def test_killed_encodes_hold_up_none_beside_them_and_are_made_good_by_the_next_one(place, rng, tmp_path, recipe):
    num_killed = num_published = 0
    for trial in range(TRIALS):
        root, encode = tmp_path / f"{trial}", ["encode", *RECIPES[recipe]]
        others = [place.start(root, *encode) for _ in range(trial % 3)]
        for _ in range(rng.randint(1, 3)):
            num_killed += kill_sometime(place, rng, place.seconds[recipe], root, *encode)
            num_published += 0 if others else place.check_published(root, recipe)
        assert [other.wait() for other in others] == [0] * len(others), [other.text for other in others]
        place.run(root, *encode)
        place.check(root, place.roots[recipe], recipe)
    print(f"{recipe}: {num_killed} killed, {num_published} places published before")
    assert num_killed >= TRIALS // 2


def test_killed_encodes_with_workers_leave_no_worker_and_are_made_good(place, rng, tmp_path):
    for trial in range(max(1, TRIALS // 4)):
        root, recipe = tmp_path / f"{trial}", rng.choice(list(RECIPES))
        arguments = [root, "encode", "--workers", "2", *RECIPES[recipe]]
        started = place.start(*arguments)
        wait_until(rng.uniform(3, 14), started)
        started.kill(group=trial % 2 == 1)
        started.wait()
        place.run(root, "encode", *RECIPES[recipe])
        end = time.monotonic() + 60
        while is_group_alive(started.pid):
            assert time.monotonic() < end, "a worker outlives its killed encode"
            time.sleep(0.1)
        place.run(root, *arguments[1:]) if trial == 0 else place.run(root, "encode", *RECIPES[recipe])
        place.check(root, place.roots[recipe], recipe)


def is_group_alive(pid):
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


def repair(place):
    return ["verify", "--repair", "--read-data", place.checkout / "recordings"]


def damage(root, rng, kinds=("tokens", "actions", "controls", "manifests")):
    """Flip a byte of a random file, or remove a whole store; of one unit at most of each kind."""
    for kind in rng.sample(kinds, rng.randint(1, len(kinds))):
        files = sorted(path for path in (root / kind).rglob("*") if path.is_file())
        path = rng.choice(files)
        if rng.random() < 0.3 or kind == "controls":  # whose digest is of its values: not every flip is noticed
            path.unlink()
        else:
            content = bytearray(path.read_bytes())
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            path.write_bytes(content)


def forget(root, kept):
    """Take every other manifest out of a root, so that a clean-up has something to remove."""
    for path in root.glob("manifests/*.json"):
        if f"manifests/{path.name}" not in kept:
            path.unlink()


@pytest.mark.parametrize("what", ["gc", "repair", "export"])
def test_killed_clean_ups_repairs_and_exports_are_finished_by_the_next_one(place, rng, tmp_path, what):
    whole, expected, num_killed = tmp_path / "whole", place.roots["float16"], 0
    shutil.copytree(place.base / "whole-0/float16", whole)
    for recipe in ("int8", "float16") if what == "gc" else ("float16",):
        place.run(whole, "encode", *RECIPES[recipe])
    if what == "export":
        place.run(whole, "export", "cache", tmp_path / "exported")
    for trial in range(TRIALS):
        root, out = whole if what == "export" else tmp_path / f"{trial}", tmp_path / f"out-{trial}"
        if root != whole:
            shutil.copytree(whole, root)
        if what == "gc":
            command, longest_s = ["gc", "--delete", "--grace-days", "0"], 0.6
            forget(root, expected)
        elif what == "repair":
            command, longest_s = repair(place), 1.5
            damage(root, rng)
        else:
            command, longest_s = ["export", "cache", out], 0.8
        for _ in range(rng.randint(1, 3)):
            num_killed += kill_sometime(place, rng, longest_s, root, *command)
            if what == "gc":
                place.run(root, "verify")  # what the manifest lists was never touched
        place.run(root, *command)
        if what == "export":
            assert all_files(out) == all_files(tmp_path / "exported") and not list(out.rglob(".jepa-cache-*"))
        place.check(root, expected, "float16")
    print(f"{what}: {num_killed} killed")


def num_encoded(text):
    found = re.search(r"^encoded (\d+) of (\d+) units", text, re.MULTILINE)
    return int(found[1]) if found else 0


@pytest.fixture(scope="module")
def checkouts(place):
    """Four more checkouts, so that every process has outputs of its own."""
    copies = []
    for number in range(4):
        copies.append(place.base / f"checkout-{number}")
        copies[-1].mkdir()
        _write_checkout(copies[-1])
    return copies


def test_encoders_of_the_same_and_of_overlapping_sets_make_every_unit_once(place, checkouts, rng, tmp_path):
    for trial in range(TRIALS):
        root, recipe = tmp_path / f"{trial}", rng.choice(list(RECIPES))
        num_parts = 2 if recipe == "phases" else 1
        sets = [rng.sample(UNITS, rng.randint(1, 4)) if trial % 2 else UNITS for _ in range(rng.randint(2, 4))]
        running = []
        for names, checkout in zip(sets, checkouts, strict=False):
            tars = [place.checkout / f"recordings/{name}.tar" for name in sorted(names)]
            argv = ["stages/encode.py", *tars, *RECIPES[recipe], f"cache.root={root}"]
            running.append(place.commands.start(checkout, *argv, XDG_STATE_HOME=place.base / "state"))
            time.sleep(rng.choice([0, 0, 0.3]))
        assert [process.wait() for process in running] == [0] * len(running), [process.text for process in running]
        made = sum(num_encoded(process.text) for process in running)
        assert made == len(set().union(*sets)) * num_parts, [process.text for process in running]
        assert not list(root.rglob(".jepa-cache-*"))
        for number in range(len(sets)):
            place.run(root, "verify", "--read-data", checkout=checkouts[number])
        place.run(root, "encode", *RECIPES[recipe])
        assert place.roots[recipe].items() <= files_of(root).items()


def test_a_clean_up_beside_running_encodes_takes_nothing_away(place, checkouts, rng, tmp_path):
    refused = {"gc": 0, "encode": 0}
    for trial in range(TRIALS):
        root, recipe = tmp_path / f"{trial}", rng.choice(list(RECIPES))
        encoders = dict.fromkeys(checkouts[: rng.randint(1, 3)])
        for checkout in encoders:
            encoders[checkout] = place.start(root, "encode", *RECIPES[recipe], checkout=checkout)
        root.mkdir(exist_ok=True)
        while any(Path(f"/proc/{it.pid}/exe").exists() for it in encoders.values()):
            clean_up = place.start(root, "gc", "--delete", "--grace-days", "0")
            code = clean_up.wait()
            assert code == 0 or (code == 1 and "in use" in clean_up.text), clean_up.text
            refused["gc"] += code
        for checkout, encoder in encoders.items():
            while encoder.wait() != 0:
                assert "a `jepa-cache gc --delete` is running" in encoder.text, encoder.text
                refused["encode"] += 1
                encoder = place.start(root, "encode", *RECIPES[recipe], checkout=checkout)
        place.check(root, place.roots[recipe], recipe, checkout)
    print(f"refused: {refused}")
    assert refused["gc"]
