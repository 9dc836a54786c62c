"""What an evaluation holds: trained weights, the cached episodes that they never saw, and the way through their windows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from jepa_cache.config.loading import outputs_folder
from jepa_cache.config.schema import TRAIN_DEFAULTS, Config
from jepa_cache.data.dataset import TRAIN, VAL, CachedDataset, Segment, open_dataset
from jepa_cache.data.loader import Batch, WindowLoader, to_device
from jepa_cache.data.scaler import Scaler, scaler_from_json
from jepa_cache.data.windows import Window, WindowIndex, spread_windows
from jepa_cache.devices import name_device, resolve_device, warn_of_bfloat16
from jepa_cache.predictor.checkpoints import CAMERAS_FIELD, load_predictor, read_card
from jepa_cache.predictor.model import ACPredictor
from jepa_cache.predictor.rollout import LatentModel
from jepa_cache.store.recipe import canonical_json

# They move no weight, so weights may differ in them; `keep_ranges` is known by its content, which the segments show.
OF_THE_MACHINE = (
    "activation_checkpointing",
    "deterministic",
    "device",
    "keep_ranges",
    "log_every",
    "num_threads",
    "validate_every",
)


@dataclass(frozen=True)
class EvaluationContext:
    """A trained model with the data set it is measured on; every measurement takes one."""

    model: LatentModel  # its predictor in eval mode, on its device
    config: Config  # its evaluate, split and filter sections count
    dataset: CachedDataset
    scaler: Scaler  # the one it was trained with
    window_steps: int  # T of its training windows

    @property
    def device(self) -> torch.device:
        """Where the predictor is."""
        return next(self.model.predictor.parameters()).device

    @property
    def features(self) -> str:
        """What the figures are of, for pictures: data set and encoder, and whether that was trained."""
        manifest = self.dataset.manifest
        untrained = "" if manifest.encoder_trained else " (untrained: figures are relative)"
        return f"dataset {manifest.dataset}, encoder {manifest.encoder}{untrained}"

    def training_segments(self) -> list[Segment]:
        """Segments of the training episodes, cut by the filters."""
        return self.dataset.segments_of(TRAIN, self.config.split, self.config.filter)

    def held_out_segments(self) -> list[Segment]:
        """Segments of the held-out episodes, cut by the filters."""
        return self.dataset.segments_of(VAL, self.config.split, self.config.filter)

    def iter_windows(self, chosen: ChosenWindows, title: str) -> Iterator[tuple[slice, Batch, Tensor]]:
        """Read windows batch by batch onto the predictor's device, with a progress bar.

        Yields:
            The rows of the batch among the chosen windows; the batch, on the device; and its tokens h [B, T, N, D] as the model
            sees them.
        """
        numbers, size = chosen.numbers, self.config.evaluate.batch_size
        chunks = [numbers[start : start + size] for start in range(0, len(numbers), size)]
        batches = WindowLoader(self.dataset, chosen.index, self.scaler).iterate(chunks, self.device)
        first = 0
        for batch in tqdm(batches, total=len(chunks), desc=title, unit="batch", dynamic_ncols=True):
            rows = slice(first, first + len(batch.numbers))
            yield rows, batch, self.model.as_reps(batch.tokens)
            first = rows.stop

    def read_windows(self, index: WindowIndex, numbers: Sequence[int]) -> tuple[Batch, Tensor]:
        """Read a few windows at once, as `iter_windows` does."""
        batch = to_device(WindowLoader(self.dataset, index, self.scaler).read(numbers), self.device)
        return batch, self.model.as_reps(batch.tokens)


class Picture(NamedTuple):
    """A file in pictures/, what it shows, and what to look for; a wide one scrolls on a phone."""

    name: str
    alt: str
    caption: str
    wide: bool = False


class Measurement(NamedTuple):
    """An optional measurement with all that the report says of it; the registry is `run.MEASUREMENTS`."""

    name: str  # in `evaluate.measure`
    section: str  # of metrics.json; `<section>_ci` holds its intervals
    # Writes tables and pictures, returns sections of metrics.json.
    run: Callable[[EvaluationContext, Path], dict[str, Any]]
    heading: str  # of its part of report.html
    explanation: str  # what its figures show and what to look for
    tables: tuple[str, ...] = ()  # in measurements/, that the report shows
    pictures: tuple[Picture, ...] = ()  # in pictures/, that the report shows
    # Refuses settings that cannot work, before anything is measured.
    check: Callable[[EvaluationContext], None] | None = None


class ChosenWindows(NamedTuple):
    """Some of the windows of an index, in the order in which they are measured."""

    index: WindowIndex
    numbers: list[int]

    @property
    def windows(self) -> list[Window]:
        """Where each lies."""
        return [self.index[number] for number in self.numbers]

    @property
    def segments(self) -> list[Segment]:
        """The segment that each lies in."""
        return [self.index.segments[window.segment] for window in self.windows]

    @property
    def episodes(self) -> list[str]:
        """Key of each window's episode."""
        return [segment.episode for segment in self.segments]


def spread(values: Sequence[Any], count: int) -> list[Any]:
    """Up to `count` of some values, evenly spread, the ends included."""
    picks = np.linspace(0, len(values) - 1, min(count, len(values))).round().astype(int)
    return [values[pick] for pick in picks]


def choose_windows(
    segments: Sequence[Segment], num_steps: int, per_episode: int, *, step_length: int = 1, limit: int | None = None
) -> ChosenWindows:
    """Choose windows of `num_steps` steps, `step_length` apart, evenly spread over each episode, and over all where `limit` are fewer."""
    index = WindowIndex(segments, num_steps, (step_length,))
    numbers = spread_windows(index, per_episode)
    return ChosenWindows(index, numbers if limit is None else spread(numbers, limit))


def open_training(config: Config, root: Path) -> tuple[CachedDataset, Path]:
    """The cached features and the weights that earlier stages left in a checkout's outputs; refuses those of other settings."""
    weights = outputs_folder(config, root) / "train/run/predictor.safetensors"
    dataset = open_dataset(config, root)
    check_settings(config, weights)
    return dataset, weights


def open_evaluation(config: Config, dataset: CachedDataset, weights: Path) -> EvaluationContext:
    """Load trained weights and their scaler; refuses those that were trained on other features, actions or episodes."""
    predictor, card = load_predictor(weights)
    for name, then, now in (
        ("tokens recipe", card["tokens_fingerprint"], dataset.manifest.fingerprint),
        ("cameras joined into a step (cache.join_cameras)", card.get(CAMERAS_FIELD), list(dataset.cameras) or None),
        ("action space", card["action_space"], dataset.space.name),
        ("split, which decides what was held out,", card["description"]["split"], dataset.describe_split(config.split)),
    ):
        if then != now:
            message = f"{weights} was trained with {name} {then}, but now it is {now}; train again, or set it as then"
            raise ValueError(message)
    device = resolve_device("train.device", config.train.device)
    print(f"predictor of training step {card['step']} on {name_device(device)}")
    precision = config.evaluate.precision if isinstance(predictor, ACPredictor) else "float32"
    warn_of_bfloat16("evaluate.precision", precision, device)
    model = LatentModel(predictor.to(device).eval(), card["normalize_reps"], precision)
    return EvaluationContext(model, config, dataset, scaler_from_json(card["scaler"]), card["window_steps"])


def check_settings(config: Config, weights: Path) -> None:
    """Refuse weights of another training: those of an earlier run still lie there when the requested one was interrupted."""
    if not weights.is_file():
        raise ValueError(f"{weights} is missing; run `python stages/train_predictor.py` first")
    description = read_card(weights)["description"]
    description["train"] = {**TRAIN_DEFAULTS, **description["train"]}
    sections = {section: asdict(getattr(config, section)) for section in ("predictor", "train", "split", "filter")}
    now = json.loads(canonical_json(sections))  # as the card has them
    differing = [
        f"{section}.{key} was {then!r}, now it is {now[section].get(key)!r}"
        for section in now
        for key, then in description[section].items()
        if key not in OF_THE_MACHINE and now[section].get(key) != then
    ]
    if differing:
        raise ValueError(
            f"{weights} is of another training ({'; '.join(differing)}); run `python stages/train_predictor.py` with these "
            "settings, or evaluate with those (a .yaml file of them, given to every stage, keeps them together)"
        )
