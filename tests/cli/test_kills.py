"""Claims: real commands that are really killed (kill -9 at random moments), or that race each other, lose nothing.

After any number of killed encodes, clean-ups, repairs and exports the next one finishes with the bytes of an undisturbed root; no
temporary file of a dead process stays, and `verify` finds nothing. Encoders and clean-ups side by side make every unit once and take
nothing away. Every fault at every change to the disk is tests/encoding/test_crashes.py's; dead Dask workers are test_distribution.py's.
"""

import os
import random
import re
import shutil
import time

import pytest

from tests.cli.conftest import _write_checkout
from tests.encoded import all_files, make_tiny_tar
from tests.processes import Started

pytestmark = pytest.mark.long

TRIALS = int(os.environ.get("CAMPAIGN_TRIALS", "12"))  # of each kind
SEED = int(os.environ.get("CAMPAIGN_SEED", "0"))
UNITS = "abcd"
RECIPES = {
    "float16": [],
    "int4": ["encode.dtype=int4", "encode.fps=10"],
    "tubelet": ["encode.mode=tubelet"],
    "phases": ["encode.phases=[0, 2]", "encode.dtype=bfloat16"],
}
LONGEST_S = {"gc": 0.6, "repair": 1.5, "export": 0.8}


def files_of(root):
    return {name: content for name, content in all_files(root).items() if name != "in-use.lock"}


class Place:
    """Checkouts that share recordings, and what each recipe's undisturbed run makes in how many seconds."""

    def __init__(self, base):
        self.base, self.whole, self.seconds = base, {}, {}
        self.checkouts = [base / f"checkout-{number}" for number in range(4)]
        self.recordings = base / "recordings"
        for checkout in self.checkouts:
            checkout.mkdir()
            _write_checkout(checkout)
        for seed, name in enumerate(UNITS):
            make_tiny_tar(self.recordings, name, seed, num_frames=41)
        for recipe in RECIPES:
            for again in range(2):  # the second one is quicker
                begin = time.monotonic()
                self.run(base / f"whole-{again}/{recipe}", *self.encode(recipe))
                self.seconds[recipe] = time.monotonic() - begin
            self.whole[recipe] = files_of(base / f"whole-0/{recipe}")
            assert files_of(base / f"whole-1/{recipe}") == self.whole[recipe]

    def encode(self, recipe, units=UNITS):
        return ["stages/encode.py", *(self.recordings / f"{unit}.tar" for unit in units), *RECIPES[recipe]]

    def start(self, root, *argv, checkout=0):
        where, state = self.checkouts[checkout], self.base / "state"
        return Started(where, *argv, f"cache.root={root}", XDG_STATE_HOME=state)

    def run(self, root, *argv, checkout=0):
        started = self.start(root, *argv, checkout=checkout)
        assert started.wait() == 0, started.text

    def check(self, root, recipe, checkout=0):
        """The root is as an undisturbed one, to the last byte, and `verify` agrees."""
        assert files_of(root) == self.whole[recipe] and not list(root.rglob(".jepa-cache-*"))
        self.run(root, "jepa-cache", "verify", "--read-data", *RECIPES[recipe], checkout=checkout)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("kills"))


@pytest.fixture
def rng(request):
    return random.Random(f"{SEED} {request.node.name}")


def harm(root, what, rng, place):
    """Give a clean-up and a repair something to do."""
    if what == "gc":
        for path in root.glob("manifests/*.json"):
            if f"manifests/{path.name}" not in place.whole["float16"]:
                path.unlink()
    for kind in rng.sample(("tokens", "actions", "controls", "manifests"), 2) if what == "repair" else ():
        path = rng.choice(sorted(path for path in (root / kind).rglob("*") if path.is_file()))
        path.unlink() if rng.random() < 0.3 or kind == "controls" else path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize("what", [*RECIPES, "gc", "repair", "export"])
def test_what_was_killed_again_and_again_is_finished_by_the_next_one(place, rng, tmp_path, what):
    recipe, num_killed = what if what in RECIPES else "float16", 0
    for trial in range(TRIALS):
        root, out = tmp_path / f"{trial}", tmp_path / f"out-{trial}"
        command = {
            "gc": ["jepa-cache", "gc", "--delete", "--grace-days", "0"],
            "repair": ["jepa-cache", "verify", "--repair", "--read-data", place.recordings],
            "export": ["jepa-cache", "export", "cache", out],
        }.get(what, place.encode(recipe))
        if what not in RECIPES:
            shutil.copytree(place.base / "whole-0/float16", root)
            for other in ("tubelet", "float16") if what == "gc" else ("float16",):
                place.run(root, *place.encode(other))
            harm(root, what, rng, place)
        others = [place.start(root, *command) for _ in range(trial % 3)] if what in RECIPES else []
        for _ in range(rng.randint(1, 3)):
            started = place.start(root, *command)
            started.let_run(rng.uniform(0, LONGEST_S.get(what, place.seconds[recipe])))
            started.kill()
            num_killed += started.wait() == -9
        assert [other.wait() for other in others] == [0] * len(others), [other.text for other in others]
        place.run(root, *command)
        place.check(root, recipe)
        if what == "export":
            assert files_of(out).items() >= place.whole["float16"].items() and not list(out.rglob(".jepa-cache-*"))
    print(f"{what}: {num_killed} killed")
    assert what not in RECIPES or num_killed >= TRIALS // 2


def test_encoders_of_overlapping_sets_and_clean_ups_at_once_make_every_unit_once_and_take_nothing_away(
    place, rng, tmp_path
):
    num_refused = 0
    for trial in range(TRIALS):
        root, recipe = tmp_path / f"{trial}", rng.choice(list(RECIPES))
        sets = [sorted(rng.sample(UNITS, rng.randint(1, 4))) for _ in range(rng.randint(2, 4))]
        running = [place.start(root, *place.encode(recipe, names), checkout=it) for it, names in enumerate(sets)]
        root.mkdir(exist_ok=True)
        while trial % 2 and any(encoder.runs for encoder in running):
            clean_up = place.start(root, "jepa-cache", "gc", "--delete", "--grace-days", "0")
            code = clean_up.wait()
            assert code == 0 or "in use" in clean_up.text, clean_up.text
            num_refused += code
        for number, encoder in enumerate(running):
            while encoder.wait() != 0:
                assert trial % 2 and "a `jepa-cache gc --delete` is running" in encoder.text, encoder.text
                encoder = running[number] = place.start(root, *place.encode(recipe, sets[number]), checkout=number)
        found = [re.search(r"^encoded (\d+) of (\d+) units", encoder.text, re.MULTILINE) for encoder in running]
        made, wanted = sum(int(it[1]) for it in found if it), len(set().union(*sets)) * (1 + (recipe == "phases"))
        assert made == wanted or trial % 2, [encoder.text for encoder in running]
        assert not list(root.rglob(".jepa-cache-*"))
        for number in range(len(sets)):
            place.run(root, "jepa-cache", "verify", "--read-data", *RECIPES[recipe], checkout=number)
        place.run(root, *place.encode(recipe))
        assert place.whole[recipe].items() <= files_of(root).items()
    assert num_refused or TRIALS < 2
