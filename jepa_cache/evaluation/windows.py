"""Held-out windows through the predictor, the baselines and the action ablations: the error of every predicted step.

The baselines need no predictor: the last step, the training mean, a straight line, a regression on actions, and the preset `linear`
fitted without actions: what can be foretold from the tokens and states alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from jepa_cache.config.paths import default_num_threads
from jepa_cache.data.ablations import ABLATIONS, SHIFTED, action_ablations
from jepa_cache.data.dataset import CachedDataset, Segment
from jepa_cache.data.loader import Batch, WindowLoader
from jepa_cache.data.scaler import Scaler
from jepa_cache.data.windows import WindowIndex, count_episodes
from jepa_cache.evaluation.context import ChosenWindows, EvaluationContext, choose_windows
from jepa_cache.evaluation.metrics import BESIDE, MEASURES
from jepa_cache.evaluation.readout import Readout, fit_readout
from jepa_cache.predictor.compressed import CompressedPredictor, LinearPredictor
from jepa_cache.predictor.rollout import LatentModel
from jepa_cache.ridge import solve_sums, squared_error, sum_products

MODEL = "model"
COPY_LAST, MEAN, EXTRAPOLATION, REGRESSION = "copy_last", "mean", "extrapolation", "regression"
NO_ACTIONS = "no_actions"
BASELINES = (COPY_LAST, MEAN, EXTRAPOLATION, REGRESSION, NO_ACTIONS)
PREDICTIONS = (MODEL, *BASELINES, *ABLATIONS)

PIECE_STEPS = 16
BATCH_SIZE = 8
RIDGE = 1e-3  # penalty for each training row, of inputs with deviations near 1
# Of the model without actions, as of the preset `linear`; a compressed predictor's own number where it has one.
NUM_COMPONENTS = 64
COMPONENT_STEPS = 2048  # of the training episodes, that its components are fitted to
STEPS_PER_COMPONENT = 4  # at least
# Of the model without actions, for each pair of steps; one for all components, as that of each one's own variance was unstable.
RIDGES = tuple(10.0**power for power in range(-6, 2))
CPU = torch.device("cpu")
READOUT = "readout"


class Baselines(NamedTuple):
    """What was learned from the training episodes."""

    mean: Tensor  # [N, D] float32, of the tokens at each position
    change: Tensor  # [1+A+S, N, D] float32: the change of each token in one step is [1, actions, states] @ change
    num_steps: int  # that they were fitted on
    no_actions: LatentModel | None = None  # of a `LinearPredictor` that is given actions [B, T, 0]


def fit_baselines(
    dataset: CachedDataset,
    segments: Sequence[Segment],
    scaler: Scaler,
    model: LatentModel,
    *,
    step_length: int = 1,
    device: torch.device = CPU,
    no_actions: NoActionsFit | None = None,
) -> Baselines:
    """Mean over all steps and ridge regression over all pairs of steps `step_length` apart of the training episodes, in one pass.

    The regression has weights of its own for every channel of every token: h[t+1] - h[t] from the scaled action that leads
    from t to t+1, the scaled state at t, and 1. It sees no tokens.

    Cost: reads all tokens of the training episodes once (docs/evaluation_report.md has figures); memory [1+A+S, N, D] float64 (150 MB
    for 50 inputs at N=256, D=1408) and a batch of 136 steps, however many there are.
    """
    num_inputs = len(dataset.space.actions) + len(dataset.space.states) + 1
    shape = dataset.manifest.num_tokens, dataset.manifest.width
    exact = {"dtype": torch.float64, "device": device}
    total, num_steps = torch.zeros(shape, **exact), 0
    squares = torch.zeros(num_inputs, num_inputs, **exact)
    products = torch.zeros(num_inputs, shape[0] * shape[1], **exact)
    for length, alike in tqdm(
        _cut_pieces(segments, step_length).items(), desc="fitting baselines", delay=2, dynamic_ncols=True
    ):
        loader = WindowLoader(dataset, WindowIndex([piece for piece, _ in alike], length, (step_length,)), scaler)
        begins = torch.tensor([begins for _, begins in alike], device=device)
        numbers = range(len(alike))
        for batch in loader.iterate([numbers[first : first + BATCH_SIZE] for first in numbers[::BATCH_SIZE]], device):
            is_first = begins[batch.numbers]
            reps = model.as_reps(batch.tokens)
            total += reps[:, 1:].sum(dim=(0, 1)) + reps[is_first, 0].sum(dim=0)
            num_steps += reps[:, 1:].shape[:2].numel() + int(is_first.sum())
            inputs = _inputs(batch.actions, batch.states[:, :-1]).flatten(0, 1)
            squares += inputs.T.double() @ inputs.double()
            products += inputs.T @ (reps[:, 1:] - reps[:, :-1]).flatten(0, 1).flatten(1)
            if no_actions is not None:
                no_actions.add(reps, batch.states, [alike[number][0].episode for number in batch.numbers])
    if not squares[0, 0]:
        raise ValueError(
            f"none of the {len(segments)} training segments has two steps, so there is nothing to fit baselines on"
        )
    change = solve_sums(torch.cat([squares, products], dim=1), RIDGE)
    mean, fitted = (total / num_steps).float(), None
    if no_actions is not None:
        fitted = LatentModel(no_actions.solve(), model.normalize_reps)
    return Baselines(mean, change.float().unflatten(1, shape), num_steps, fitted)


class NoActionsFit:
    """Fits the preset `linear` without actions: components of a step's tokens, moved on by a ridge regression on [z, state].

    Components are fitted to every second training episode; the ridge and the kept share are chosen on the others, as tokens that the
    components were fitted to look easier to foretell than they are. The regression itself is of all pairs of steps.
    """

    def __init__(self, evaluation: EvaluationContext, segments: Sequence[Segment]) -> None:
        """Fit the components, by reading up to `COMPONENT_STEPS` steps a few times."""
        names = sorted({segment.episode for segment in segments})
        self._half = {name: place % 2 for place, name in enumerate(names)}
        manifest, given = evaluation.dataset.manifest, evaluation.model.predictor
        own = given.compressor.latent_dim if isinstance(given, CompressedPredictor) else NUM_COMPONENTS
        first = [segment for segment in segments if not self._half[segment.episode]]
        chosen = choose_windows(first, 1, COMPONENT_STEPS, limit=COMPONENT_STEPS)
        num_components = min(
            own, max(1, len(chosen.numbers) // STEPS_PER_COMPONENT), manifest.num_tokens * manifest.width
        )
        self._predictor = LinearPredictor(
            embed_dim=manifest.width,
            action_dim=0,
            state_dim=len(evaluation.dataset.space.states),
            grid=manifest.grid,
            num_components=num_components,
            whitening=0.0,
            use_states=getattr(given, "use_states", True),
            num_products=0,
        ).to(evaluation.device)
        title = "components without actions"
        self._predictor.compressor.fit(lambda: (h[:, 0] for _, _, h in evaluation.iter_windows(chosen, title)), 0.0)
        self._sums, self._residuals = [0.0, 0.0], [0.0, 0.0]  # by half

    @torch.no_grad()
    def add(self, h: Tensor, states: Tensor, episodes: Sequence[str]) -> None:
        """Take pairs of neighbouring steps in: h [B, T, N, D], states [B, T, S] and their episodes [B]."""
        compressor, core = self._predictor.compressor, self._predictor.core
        z = compressor.compress(h)
        rows = core.rows(z, states[:, :-1, :0], states)
        half = torch.tensor([self._half[name] for name in episodes], device=h.device)
        for number in (0, 1):
            self._sums[number] += sum_products(rows[half == number], z.shape[-1])
        own = half == 1
        rest = h[own] - compressor.expand(z[own])
        self._residuals[0] += float((rest[:, :-1] * rest[:, 1:]).sum(dtype=torch.float64))
        self._residuals[1] += float(rest[:, :-1].square().sum(dtype=torch.float64))

    @torch.no_grad()
    def solve(self) -> LinearPredictor:
        """The model that was fitted, on its device."""
        first, second = self._sums
        ridge = min(RIDGES, key=lambda ridge: squared_error(solve_sums(first, ridge), second))
        self._predictor.core.set_weights(solve_sums(first + second, ridge))
        products, squares = self._residuals
        self._predictor.kept_share.fill_(products / squares if squares else 0.0)
        return self._predictor.eval()


def _cut_pieces(segments: Sequence[Segment], step_length: int) -> dict[int, list[tuple[Segment, bool]]]:
    """Segments in pieces by their number of steps, and whether each begins one: any other begins with the last step of the one before.

    Of every `step_length`-th step, from each of the first ones on. So every step is in one piece as another than that first one, and
    every pair of steps that far apart in one.
    """
    pieces: dict[int, list[tuple[Segment, bool]]] = {}
    for segment in segments:
        for begin in range(segment.start, min(segment.start + step_length, segment.stop)):
            rows = range(begin, segment.stop, step_length)
            for first in range(0, max(len(rows) - 1, 1), PIECE_STEPS):
                own = rows[first : first + PIECE_STEPS + 1]
                piece = segment._replace(start=own[0], stop=own[-1] + 1)
                pieces.setdefault(len(own), []).append((piece, first == 0))
    return pieces


def _inputs(actions: Tensor, states: Tensor) -> Tensor:
    """[B, T, A] and [B, T, S] to [B, T, 1+A+S]."""
    return torch.cat([torch.ones_like(actions[..., :1]), actions, states], dim=-1)


@dataclass(frozen=True)
class WindowErrors:
    """Errors of every held-out window; NaN where a prediction does not exist, never for another reason."""

    episodes: list[str]  # key of each window's episode
    # Measure (`metrics.MEASURES`, and READOUT where something is read) to prediction (`PREDICTIONS`; of `metrics.BESIDE` the model alone)
    # to [windows, T-1], of steps 1 to T-1.
    teacher_forced: dict[str, dict[str, np.ndarray]]
    open_loop: dict[str, dict[str, np.ndarray]]  # the same to [windows, K], of the K steps after the context
    chosen: ChosenWindows
    num_fitted_steps: int  # training steps that the baselines `mean` and `regression` were fitted on: all there are
    readout: Readout = field(default_factory=Readout)

    @cached_property
    def one_step(self) -> dict[str, np.ndarray]:
        """Prediction to [windows], teacher-forced L1 over the steps of the window for which it exists."""
        return {name: mean_of_steps(values) for name, values in self.teacher_forced["l1"].items()}


def mean_of_steps(values: np.ndarray) -> np.ndarray:
    """[windows, steps] to [windows] float64: the mean over the steps that exist, NaN where none does."""
    exists = np.isfinite(values)
    sums = np.where(exists, values, 0.0).sum(axis=1, dtype=np.float64)
    return np.where(exists.any(axis=1), sums / np.maximum(exists.sum(axis=1), 1), np.nan)


@torch.no_grad()
def measure_windows(evaluation: EvaluationContext) -> WindowErrors:
    """Run the predictor, all baselines and all action ablations over windows spread evenly over the held-out episodes.

    In open loop the recorded states of the predicted steps are given, as in the training rollout; only tokens are fed
    back. Teacher forcing is measured over as many steps as a training window has, from the start of each window.
    """
    torch.set_num_threads(default_num_threads())
    settings, dataset, scaler = evaluation.config.evaluate, evaluation.dataset, evaluation.scaler
    ahead = slice(settings.num_context_steps, settings.num_context_steps + settings.horizon)
    num_steps = max(evaluation.window_steps, ahead.stop)
    chosen = choose_windows(
        evaluation.held_out_segments(), num_steps, settings.windows_per_episode, step_length=settings.step_length
    )
    ablations = action_ablations(dataset, scaler, *chosen, seed=settings.seed)
    training, device = evaluation.training_segments(), evaluation.device
    apart = settings.step_length
    without = NoActionsFit(evaluation, training) if count_episodes(training) > 1 else None
    fitting = {"step_length": apart, "device": device, "no_actions": without}
    baselines = fit_baselines(dataset, training, scaler, evaluation.model, **fitting)
    readout = fit_readout(evaluation)
    measures = MEASURES | ({READOUT: readout.error} if readout.columns else {})
    forced, rolled = (
        {measure: {name: np.full((len(chosen.numbers), steps), np.nan) for name in PREDICTIONS} for measure in measures}
        for steps in (evaluation.window_steps - 1, settings.horizon)
    )

    for measured, batch, h in evaluation.iter_windows(chosen, "evaluating"):
        replaced = {name: torch.from_numpy(values[measured]).to(device) for name, values in ablations.items()}
        for name, exists, one_step, open_loop in _predictions(evaluation, baselines, batch, h, replaced):
            true, rows = h[exists], np.arange(measured.start, measured.stop)[exists.cpu().numpy()]
            behind = slice(evaluation.window_steps - one_step.shape[1], evaluation.window_steps)
            for measure, error in measures.items():
                if name != MODEL and measure in BESIDE:
                    continue
                for into, predicted, steps in ((forced, one_step, behind), (rolled, open_loop, ahead)):
                    if predicted is None:
                        continue
                    values = error(predicted, true[:, steps])
                    if not torch.isfinite(values).all():
                        raise ValueError(
                            f"a prediction on held-out windows of {dataset.manifest.dataset} holds NaN or infinity, so no error can be "
                            "measured; the training has diverged (see outputs/train/run/train.csv): lower train.lr or set train.clip_norm"
                        )
                    found = into[measure][name]
                    found[rows, found.shape[1] - values.shape[1] :] = values.cpu().numpy()
    return WindowErrors(chosen.episodes, forced, rolled, chosen, baselines.num_steps, readout)


def _predictions(
    evaluation: EvaluationContext, baselines: Baselines, batch: Batch, h: Tensor, replaced: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor, Tensor, Tensor | None]]:
    """Everything in `PREDICTIONS` for one batch, one after the other, as each is as large as the tokens.

    Yields:
        Its name, the R windows that it exists for [B] bool, its last teacher-forced steps [R, up to T-1, N, D], and its open loop
        [R, K, N, D], or None where that does not exist.
    """
    settings, model, num_forced = evaluation.config.evaluate, evaluation.model, evaluation.window_steps - 1
    context, horizon = settings.num_context_steps, settings.horizon
    everything = torch.ones(len(h), dtype=torch.bool, device=h.device)
    past, last = h[:, :num_forced], h[:, context - 1]
    copied = last.unsqueeze(1).expand(-1, horizon, -1, -1)
    yield COPY_LAST, everything, past, copied
    yield MEAN, everything, baselines.mean.expand_as(past), baselines.mean.expand_as(copied)
    straight = [h[:, context - 2], last] if context >= 2 else []
    changes = torch.einsum("btp,pnd->btnd", _inputs(batch.actions, batch.states[:, :-1]), baselines.change)
    regressed = [last]
    for step in range(context - 1, context - 1 + horizon):
        regressed.append(model.as_reps(regressed[-1] + changes[:, step]))
        if straight:
            straight.append(model.as_reps(2 * straight[-1] - straight[-2]))
    rolled = torch.stack(straight[2:], dim=1) if straight else None
    yield EXTRAPOLATION, everything, model.as_reps(2 * past[:, 1:] - past[:, :-1]), rolled
    yield REGRESSION, everything, model.as_reps(past + changes[:, :num_forced]), torch.stack(regressed[1:], dim=1)
    counts = {"num_forced": num_forced, "num_context": context, "horizon": horizon}
    if baselines.no_actions is not None:
        both = baselines.no_actions.both_ways(h, batch.actions[..., :0], batch.states, **counts)
        yield NO_ACTIONS, everything, both.teacher_forced, both.open_loop
    for name, actions in {MODEL: batch.actions, **replaced}.items():
        exists = everything
        if name in SHIFTED:  # windows without a neighbour have no such actions
            exists = torch.isfinite(actions).flatten(1).all(dim=1)
        if exists.any():
            both = model.both_ways(h[exists], actions[exists], batch.states[exists], **counts)
            yield name, exists, both.teacher_forced, both.open_loop
