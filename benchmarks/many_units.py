"""A data set of ten thousand units of one episode each: what every command waits for before it does its own work.

    python benchmarks/many_units.py                       # 10,000 units; making them takes some minutes, once
    python benchmarks/many_units.py --units 1000 --folder /tmp/many --profile evaluate

The fakes are pairs of mp4 and json (nobody decodes them) whose stores this project's own writers wrote, 10 steps of 4 tokens each. Nothing
is to be encoded. "first batch" and what follows open the data set anew; "evaluate" stands for everything but the predictor's passes.
"""

import argparse
import contextlib
import cProfile
import io
import json
import os
import pstats
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TQDM_DISABLE"] = "1"

import numpy as np  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from tqdm import tqdm  # noqa: E402

from jepa_cache.actions import get_action_space  # noqa: E402
from jepa_cache.cli.outcome import Checkout  # noqa: E402
from jepa_cache.cli.status import collect_status  # noqa: E402
from jepa_cache.config.loading import load_config  # noqa: E402
from jepa_cache.data.ablations import action_ablations  # noqa: E402
from jepa_cache.data.dataset import TRAIN, CachedDataset  # noqa: E402
from jepa_cache.data.scaler import fit_scaler, read_scaler, write_scaler  # noqa: E402
from jepa_cache.encoding.actions import ensure_actions  # noqa: E402
from jepa_cache.encoding.groups import EncodingGroup, group_units_by_recipe, open_encoder  # noqa: E402
from jepa_cache.encoding.run import encode_dataset  # noqa: E402
from jepa_cache.evaluation import figures, metrics, run, windows  # noqa: E402
from jepa_cache.evaluation.context import EvaluationContext, choose_windows  # noqa: E402
from jepa_cache.evaluation.energy import ActionPool  # noqa: E402
from jepa_cache.predictor.rollout import LatentModel  # noqa: E402
from jepa_cache.sources import Unit  # noqa: E402
from jepa_cache.store import layout  # noqa: E402
from jepa_cache.store.controls import publish_controls  # noqa: E402
from jepa_cache.store.manifest import read_manifest  # noqa: E402
from jepa_cache.store.root import CacheRoot  # noqa: E402
from jepa_cache.store.writer import TokenWriter, table  # noqa: E402
from jepa_cache.training.batches import TrainingData  # noqa: E402

NUM_STEPS, TICKS_PER_STEP = 10, 4
SETTINGS = (
    "dataset=mp4_json",
    "encoder=tiny",
    "encode.pool=2",
    "train.window_steps=8",
    "train.device=cpu",
    "evaluate.measure=[]",
)


class Place:
    """A folder as a checkout, its recordings and a cache root."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, CacheRoot(folder / "cache")
        self.config = load_config(ROOT, [*SETTINGS])
        self.manifest = folder / "outputs/encode/manifest.json"
        self.scaler = folder / "outputs/scaler/scaler.json"
        self.space = get_action_space(self.config.encode.action_space)

    def groups(self) -> list[EncodingGroup]:
        """What stage one would encode: one group."""
        return group_units_by_recipe(self.config, open_encoder(self.config, self.folder), [], self.folder)

    def make(self, num_units: int) -> None:
        """Write recordings and stores, unless it was done before; without waiting for the disk, as nothing here must outlive a crash."""
        made = self.folder / f"made-{num_units}"
        if made.exists():
            return
        recordings = self.folder / "data/mp4_json"
        for number in range(num_units):
            path = recordings / f"session-{number // 100:04d}/episode-{number:06d}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"no video %d" % number)
            path.with_suffix(".json").write_text(json.dumps({"fps": 20, "number": number}))
        (group,) = self.groups()
        with (
            mock.patch("jepa_cache.files.sync"),
            mock.patch("jepa_cache.store.controls.remove_stale_temporaries"),
            mock.patch("jepa_cache.store.writer.remove_stale_temporaries"),
        ):
            for unit in tqdm(group.units, desc="making", unit="unit", disable=False):
                if not group.tokens(self.root, unit).exists():
                    self._write(group, unit)
        made.touch()

    def _write(self, group: EncodingGroup, unit: Unit) -> None:
        rng = np.random.default_rng(int(unit.digest[:8], 16))
        num_tokens, width = self.config.encode.num_tokens_of(self.config.encoder), self.config.encoder.embed_dim
        ticks = NUM_STEPS * TICKS_PER_STEP
        controls = {f"{kind}_{column}": rng.normal(size=ticks) for kind in ("action", "state") for column in range(2)}
        publish_controls(group.controls(self.root, unit), [(unit.name, controls)])
        steps = {field.name: np.zeros(NUM_STEPS) for field in layout.STEPS_SCHEMA} | {"gui": np.zeros(NUM_STEPS, bool)}
        steps["frame"] = steps["tick"] = np.arange(NUM_STEPS) * TICKS_PER_STEP
        segments = {"segment": [0], "episode": [unit.name], "start": [0], "stop": [NUM_STEPS], "step_hz": [5.0]}
        card = {"recipe": group.recipe, "num_segments": 1, "num_episodes": 1, "skipped": [], "notes": []}
        store = group.tokens(self.root, unit)
        with TokenWriter(store, num_tokens=num_tokens, width=width, dtype=self.config.encode.dtype) as writer:
            writer.append(rng.normal(size=(NUM_STEPS, num_tokens, width)).astype(np.float16))
            writer.publish(table(layout.STEPS_SCHEMA, steps), table(layout.SEGMENTS_SCHEMA, segments), card, {})
        ensure_actions(self.root, group, unit)

    # --- what is measured

    def encode(self) -> None:
        """As stages/encode.py."""
        result = encode_dataset(self.config, [], base=self.folder, root=self.root, output=self.manifest)
        assert result.num_encoded == 0

    def status(self) -> None:
        """As `jepa-cache status`."""
        outcome = collect_status(Checkout(self.folder, self.config, [], self.folder, self.root))
        assert outcome.fine, outcome.lines

    def open(self) -> CachedDataset:
        """As every command of stage two begins."""
        return CachedDataset(read_manifest(self.manifest), self.root, base=self.folder)

    def fit_scaler(self) -> None:
        """As stages/fit_scaler.py."""
        dataset = self.open()
        write_scaler(
            fit_scaler(dataset, dataset.segments_of(TRAIN, self.config.split), self.config.scaler), self.scaler
        )

    def first_batch(self) -> None:
        """As stages/train_predictor.py until the first batch is there."""
        data = TrainingData(self.config, self.open(), read_scaler(self.scaler), Accelerator(cpu=True))
        next(data.batches(0, 2))

    def evaluate(self) -> None:
        """The parts of stages/evaluate.py that depend on the number of episodes, with made errors in place of a predictor's."""
        dataset, scaler, settings = self.open(), read_scaler(self.scaler), self.config.evaluate
        evaluation = EvaluationContext(LatentModel(None), self.config, dataset, scaler, self.config.train.window_steps)
        segments, num_steps = evaluation.held_out_segments(), evaluation.window_steps
        index, numbers = chosen = choose_windows(segments, num_steps, settings.windows_per_episode)
        step = Timer(f"{len(numbers)} windows")
        step("open, split, spread")
        action_ablations(dataset, scaler, index, numbers, seed=settings.seed)
        step("ablations")
        windows.fit_baselines(dataset, evaluation.training_segments(), scaler, evaluation.model)
        step("baselines")
        rng, episodes = np.random.default_rng(0), chosen.episodes
        made = {
            kind: {
                measure: {name: rng.random((len(numbers), length)) for name in windows.PREDICTIONS}
                for measure in metrics.MEASURES
            }
            for kind, length in (("teacher_forced", evaluation.window_steps - 1), ("open_loop", settings.horizon))
        }
        errors = windows.WindowErrors(episodes, **made, chosen=chosen, num_fitted_steps=0)
        step("made errors")
        found = figures.build_figures(errors, settings)
        figures.summarize(found, errors, dataset)
        step("figures")
        for measure in metrics.MEASURES:
            figures.step_table(found, figures.OPEN_LOOP, measure)
        figures.step_table(found, figures.TEACHER_FORCING, first_column="num_seen")
        step("tables")
        run.episode_table(errors)
        step("episodes.csv")
        facts = figures.describe_windows(evaluation, errors)
        step("facts")
        figures.slice_table(facts, errors, settings)
        figures.worst_table(facts, errors)
        step("slices")
        pool, rng = (
            ActionPool(dataset, evaluation.training_segments() + evaluation.held_out_segments()),
            np.random.default_rng(0),
        )
        for number in numbers:
            segment = index.segments[index[number].segment]
            pool.draw(99, np.zeros(len(self.space.actions)), segment, rng)
        step("drawn actions")


class Timer:
    """Prints what each step of a measurement took."""

    def __init__(self, text: str) -> None:
        self._then = time.perf_counter()
        print(f"  {text}")

    def __call__(self, name: str) -> None:
        """Print the seconds since the last call."""
        now = time.perf_counter()
        print(f"    {name:<22} {now - self._then:>8.2f} s", flush=True)
        self._then = now


@contextlib.contextmanager
def folder_for(given: Path | None) -> Iterator[Path]:
    """The folder that was named, which stays, or a temporary one."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def measure(name: str, work: Callable[[], object], *, profile: bool) -> None:
    """Print what one command takes, of the clock and of the processor."""
    profiler = cProfile.Profile() if profile else contextlib.nullcontext()
    begun, used = time.perf_counter(), time.process_time()
    with profiler:
        work()
    print(
        f"{name:<14} {time.perf_counter() - begun:>8.2f} s, {time.process_time() - used:>8.2f} s of processor time",
        flush=True,
    )
    if profile:
        text = io.StringIO()
        pstats.Stats(profiler, stream=text).sort_stats("cumulative").print_stats(45)
        print(text.getvalue())


def main() -> None:
    """Make the data set and print the table."""
    names = ("encode", "status", "open", "fit_scaler", "first_batch", "evaluate")
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("commands", nargs="*", default=[], help=f"of {', '.join(names)}; default: all")
    parser.add_argument("--units", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, help="keep the data set here, for another time")
    parser.add_argument("--profile", action="store_true", help="where the time goes, too")
    arguments = parser.parse_args()
    with folder_for(arguments.folder) as folder:
        os.environ["XDG_STATE_HOME"] = str(folder / "state")
        place = Place(folder)
        place.make(arguments.units)
        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {arguments.units} units")
        for name in arguments.commands or names:
            measure(name, getattr(place, name), profile=arguments.profile)


if __name__ == "__main__":
    main()
