"""Encoder and world model for programs that deploy them: frames to tokens, and frames, states and a goal to actions.

What goes in is what a camera and a robot or game give: uint8 frames, states and actions in their own units. Settings come from
params.yaml and the presets, as in `python stages/encode.py`; weights from the files that training or `jepa-cache export predictor` wrote.
Letters besides the project's: C steps of a context, G frames of one step (1 in frame mode, a tubelet's in tubelet mode).
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jepa_cache.actions import ActionSpace, Column, get_action_space
from jepa_cache.config.loading import data_base, find_repository, load_config
from jepa_cache.config.paths import default_num_threads
from jepa_cache.config.schema import Config, EncodeConfig
from jepa_cache.control.cost_model import CostModel
from jepa_cache.control.costs import LAST, SIMPLE_COSTS, Cost, choose_cost, load_costs
from jepa_cache.control.motion import Motion, build_motion
from jepa_cache.control.planner import SETTINGS, Context, Plan, PlannerSettings, Rollout, plan_actions, warn_of_reach
from jepa_cache.data.recorded import Recorded, find_recorded
from jepa_cache.data.scaler import scaler_from_json
from jepa_cache.encoder.frozen import FrozenEncoder, to_stored
from jepa_cache.encoding.groups import open_encoder, token_recipe
from jepa_cache.encoding.task import load_encoder
from jepa_cache.predictor.checkpoints import CAMERAS_FIELD, STEP_HZ_FIELD, Predictor, load_predictor
from jepa_cache.predictor.model import ACPredictor
from jepa_cache.predictor.rollout import AUTOCAST, LatentModel
from jepa_cache.store.quantisation import get_codec
from jepa_cache.store.recipe import recipe_changes

log = logging.getLogger(__name__)

RECIPE_FIELD = "tokens_recipe"
"""Of a predictor's card: the recipe of the tokens that it was trained on."""
RATES_APART = 0.05  # share by which rates of recordings may differ without a word
MAX_SEEN = 256  # steps whose tokens a world model keeps: goals and contexts are given again and again


class Encoder:
    """A frozen encoder that turns frames into the tokens that a cache of the same settings holds. Never trains, writes no file."""

    def __init__(self, frozen: FrozenEncoder, encode: EncodeConfig, identity: str) -> None:
        """Wrap an encoder that is on its device already; `identity` is that of its weights. `Encoder.load` does it all."""
        self._frozen, self._encode = frozen, encode
        self.recipe = _comparable_recipe(token_recipe(encode, frozen.preset, {}, identity))

    @classmethod
    def load(cls, name: str, overrides: Sequence[str] = ()) -> Encoder:
        """Load an encoder preset with its weights.

        On a CPU sets the number of torch threads of this process to that of stage one: another number may change the last bits of tokens.
        `overrides` are those of `stages/encode.py`, such as "encode.weights=vitl.pt"; all else is as params.yaml of the working
        folder's checkout says.

        Raises:
            ValueError: Unknown names, settings that do not fit, or weights that cannot be had or are not those of the preset.
        """
        root = find_repository(Path.cwd(), read_only=True)
        chosen = overrides if isinstance(overrides, str) else [f"encoder={name}", *overrides]
        return cls.open(load_config(root, chosen), data_base(root))

    @classmethod
    def open(cls, config: Config, base: Path) -> Encoder:
        """The same for settings that are loaded; relative weights are meant from `base`."""
        opened = open_encoder(config, base)
        if opened.preset.random_seed is not None:
            log.warning(
                "encoder %r has seeded random weights: for trying things out, not for results", config.encoder.name
            )
        frozen = load_encoder(opened, config.encode, default_num_threads(), with_gpu=torch.get_num_threads())
        return cls(frozen, config.encode, opened.identity)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._frozen.device

    @property
    def frames_per_step(self) -> int:
        """G: frames that one step is made of; in clip mode those of a tubelet, though whole clips have to be given."""
        return 1 if self._encode.mode == "frame" else self._frozen.preset.tubelet_size

    def tokens(self, frames: np.ndarray) -> Tensor:
        """Encode frames as stage one does: crop, encoder, cast to the stored dtype.

        Equal to the cache bit for bit when the frames of an episode are given whole, on the same machine and kind of device. Fewer at a
        time, and the matrices have other shapes, which may change the last bits. Of a cache that stores codes (int8 ...), these are
        the values before they were coded.

        Args:
            frames: [F, h, w, 3] uint8 RGB of any size, in the order of time, at the cache's true rate (`WorldModel.fps`). F is a multiple of G; in
                clip mode of `encode.frames_per_clip`.

        Returns:
            [F / G, N, D] float32 on the encoder's device; before any layer norm.
        """
        _check_frames("frames", frames)
        group = self._encode.frames_per_clip if self._encode.mode == "clip" else self.frames_per_step
        if len(frames) == 0 or len(frames) % group:
            raise ValueError(
                f"{self._encode.mode} mode encodes frames in groups of {group}; got {len(frames)} frames. Give a multiple of {group}"
            )
        size, parts, cast = group * self._encode.batch_size, [], get_codec(self._encode.dtype).cast
        for start in range(0, len(frames), size):
            pixels = self._frozen.preprocess(frames[start : start + size]).unflatten(0, (-1, group))
            stored = torch.from_numpy(to_stored(self._frozen.encode(pixels).flatten(0, 1), cast))
            parts.append(stored.view(getattr(torch, cast)))
        return torch.cat(parts).to(self.device).float()


class WorldModel:
    """A trained predictor with the encoder whose tokens it reads: plans from what is seen now to what should be seen."""

    def __init__(
        self,
        encoder: Encoder,
        predictor: Predictor,
        card: Mapping[str, Any],
        costs: Mapping[str, Cost] = SIMPLE_COSTS,
        precision: str = "float32",
    ) -> None:
        """Put all together; `WorldModel.load` reads them and checks that they fit.

        `fps` is the rate of frames, Hz, at which most training steps came; `step_hz` the least, middle and greatest rate of steps in the
        training recordings, None for weights of older versions, of which `fps` is the requested rate.
        """
        self.costs, self._card = dict(costs), card
        self._encoder = encoder
        self._model = LatentModel(predictor.to(encoder.device).eval(), bool(card["normalize_reps"]), precision)
        self._scaler = scaler_from_json(card["scaler"])
        self.space: ActionSpace = get_action_space(card["action_space"])
        self._scaler.check_columns(self.space)
        self.step_hz, self.fps = _find_rates(card, encoder.frames_per_step)
        self.window_steps: int = card["window_steps"]
        self.recorded: Recorded | None = find_recorded(card)
        self._seen: OrderedDict[bytes, Tensor] = OrderedDict()

    @classmethod
    def load(cls, weights: str | Path, encoder: Encoder, *, precision: str = "float32") -> WorldModel:
        """Load a trained predictor (outputs/train/run/predictor.safetensors, or what `jepa-cache export predictor` wrote).

        A transformer may run in `precision` bfloat16 or float16: half the memory of a plan, and a few times the speed on a GPU.

        Raises:
            ValueError: The precision is unknown; the file is missing, damaged or has no card, or the weights were trained on tokens of
                another encoder or other settings (every difference is named), or in clip mode.
        """
        if not isinstance(encoder, Encoder):
            raise ValueError(f'the second argument is an Encoder; got {encoder!r}. Load one: Encoder.load("tiny")')
        predictor, card = load_predictor(Path(weights))
        if precision not in (AUTOCAST if isinstance(predictor, ACPredictor) else ("float32",)):
            raise ValueError(
                f"precision is one of {', '.join(AUTOCAST)}, and float32 where no transformer is loaded; got {precision!r}"
            )
        trained_on = _comparable_recipe(card[RECIPE_FIELD])
        if differing := recipe_changes(trained_on, encoder.recipe):
            raise ValueError(
                f"{weights} was trained on other tokens than this encoder gives, which would be noise to it ({'; '.join(differing)}; trained "
                f"on -> given). It was encoder preset {card['encoder']!r}: load that one, with overrides such as encode.pool=2 as then"
            )
        if card["mode"] == "clip":
            raise ValueError(
                f"{weights} was trained in clip mode, where the tokens of a step have seen later frames; there are none of those when a plan is "
                "made. Train on a cache of encode.mode=frame or tubelet"
            )
        if card.get(CAMERAS_FIELD):
            raise ValueError(
                f"{weights} was trained on steps of joined cameras ({', '.join(card[CAMERAS_FIELD])}); a world model sees one camera. Train with "
                "cache.join_cameras=false for it, or measure these with stages/evaluate.py and stages/plan.py"
            )
        costs = load_costs(Path(weights), card, predictor, encoder.device)
        return cls(encoder, predictor, card, costs, precision)

    def plan(
        self,
        frames: np.ndarray,
        states: np.ndarray | None,
        goal: np.ndarray,
        *,
        actions: np.ndarray | None = None,
        settings: str | PlannerSettings = "notebook",
        motion: Motion | None = None,
        base_action: np.ndarray | None = None,
        cost: str | Cost = "tokens",
        seed: int = 0,
    ) -> Plan:
        """Search for the actions after which the goal is seen; carry out the first one, look, and plan again.

        Args:
            frames: [C * G, h, w, 3] uint8 RGB: the steps so far, the present one last, at `self.fps` and from the camera of the cache. At
                most `window_steps` steps were ever seen in training.
            states: [C, S] of these steps (None for weights trained without), in the units of the action space (docs/action_spaces.md).
            goal: [h, w, 3] or [G, h, w, 3] uint8 RGB of the step to be reached.
            actions: [C-1, A] between the steps; needed where C is above 1.
            settings: Name in `planner.SETTINGS`, or your own.
            motion: What may move, from `build_motion(self.space, ...)`; by default that of the published settings.
            base_action: [A] for the columns that are not searched (keys, slot); by default the last of `actions` in spaces of views, zeros for
                poses and where there is no last one.
            cost: How far predicted steps are from the goal, by its name or a `control.costs.Cost`.
            seed: Of the samples.

        Returns:
            Unscaled actions [H, A], states [H+1, S] where they lead, and energies [rounds, samples].
        """
        named, motion = self.choose_settings(settings), motion or self.build_motion(settings)
        goal = goal[None] if isinstance(goal, np.ndarray) and goal.ndim == 3 else goal
        context, aim = self._look(frames, goal, states, actions, "actions")
        if base_action is None and self.holds and len(context.actions):
            base_action = context.actions[-1]
        if base_action is not None:
            base_action = self.check_values("base_action", base_action, self.space.actions)
        cost = self.choose_cost(cost)
        return self.search(context, aim, named, motion, cost=cost, base_action=base_action, seed=seed)

    def energies(
        self,
        frames: np.ndarray,
        goal: np.ndarray,
        actions: np.ndarray,
        states: np.ndarray | None = None,
        *,
        taken: np.ndarray | None = None,
        cost: str | Cost = "tokens",
        motion: Motion | None = None,
        batch_size: int | None = None,
    ) -> np.ndarray:
        """Score candidate actions: how far from the goal does the predictor see them end? For searches of your own, in every action space.

        Axes in front (contexts, goals) broadcast against each other: one frame and many goals, or many of both.

        Args:
            frames: [.., C * G, h, w, 3] uint8 RGB as for `plan`: the steps so far, the present one last.
            goal: [.., h, w, 3] uint8 RGB, in tubelet mode [.., G, h, w, 3].
            actions: [.., S, H, A] unscaled: S candidates of H steps. For a predictor of mixed step lengths one step may be the sum of several.
            states: [.., C, S]; None only for weights that were trained without (`scaler.states=ignore`).
            taken: [.., C-1, A] between the steps; needed where C is above 1.
            cost: A name, or a `control.costs.Cost`.
            motion: By which states follow where H is above 1; by default that of the space. Not needed for H = 1 or without states.
            batch_size: Candidates of one context that go through the predictor at once; by default as many as 4 GiB are enough for.

        Returns:
            [.., S] float32, lower is nearer.

        Raises:
            ValueError: A shape does not fit, a number is not finite, or states are needed and not given.
        """
        actions = self._check_candidates(actions)
        goal = goal[..., None, :, :, :] if self.frames_per_step == 1 and isinstance(goal, np.ndarray) else goal
        context, goals = self._look(frames, goal, states, taken, "taken")
        rollout = self._roll(context, actions, motion)
        energies = rollout.energies(actions, goals, self.choose_cost(cost), batch_size)
        if not np.isfinite(energies).all():
            raise ValueError(
                f"{int((~np.isfinite(energies)).sum())} of {energies.size} energies are not finite, so nothing can be ranked; the largest action is "
                f"{np.abs(actions).max():g}: give actions on the scale of the recorded ones, or look for NaN in the weights"
            )
        return energies

    def predict(
        self,
        frames: np.ndarray,
        states: np.ndarray | None,
        actions: np.ndarray,
        *,
        taken: np.ndarray | None = None,
        motion: Motion | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """Tokens that are foreseen after each of some actions, normalised as the predictor reads them.

        Arguments are those of `energies`; `actions` may also be one candidate [H, A] of one context.

        Returns:
            [.., S, H, N, E] float32 on the encoder's device, or [H, N, E].
        """
        alone = np.ndim(actions) == 2
        actions = self._check_candidates(np.asarray(actions)[None] if alone else actions)
        context = self._read_context(frames, states, taken, "taken")
        tokens = self._roll(context, actions, motion).predict(actions, batch_size)
        return tokens[0] if alone else tokens

    def _check_candidates(self, actions: np.ndarray) -> np.ndarray:
        actions = np.asarray(actions, np.float64)
        if actions.ndim < 3:
            raise ValueError(
                f"actions must be [.., samples, horizon, {len(self.space.actions)}]; got {list(actions.shape)}"
            )
        return self.check_values("actions", actions, self.space.actions, *actions.shape[:-1])

    def _roll(self, context: Context, actions: np.ndarray, motion: Motion | None) -> Rollout:
        """The rollouts of candidates [.., S, H, A] from a context."""
        integrate = None  # one step needs no states after it
        if actions.shape[-2] > 1:  # any states do for a predictor without
            integrate = (motion or self.build_motion()).integrate if self.uses_states else (lambda states, _: states)
        return Rollout(self._model, context, integrate, scaler=self._scaler)

    def _look(
        self, frames: np.ndarray, goal: np.ndarray, states: np.ndarray | None, taken: np.ndarray | None, name: str
    ) -> tuple[Context, Tensor]:
        """What is known from frames [.., C * G, h, w, 3], and the goal's tokens [.., N, E]; `name` is that of the actions `taken`."""
        _check_frames("frames", frames)
        _check_frames("goal", goal)
        if goal.shape[-4] != self.frames_per_step:
            raise ValueError(f"a goal is one step, hence {self.frames_per_step} frames; got {goal.shape[-4]}")
        if frames.shape[-3:] != goal.shape[-3:]:
            raise ValueError(
                f"a goal is a picture of the same camera and size: frames are {list(frames.shape[-3:])}, the goal is {list(goal.shape[-3:])}"
            )
        return self._read_context(frames, states, taken, name), self.see_goal(goal)

    def _read_context(
        self, frames: np.ndarray, states: np.ndarray | None, taken: np.ndarray | None, name: str
    ) -> Context:
        _check_frames("frames", frames)
        if frames.shape[-4] < self.frames_per_step:
            raise ValueError(
                f"a context is at least one step, hence {self.frames_per_step} frames; got {frames.shape[-4]}. Give the present frame last"
            )
        tokens = self.see(frames)
        *lead, num_steps = tokens.shape[:-2]
        if taken is None and num_steps > 1:
            raise ValueError(f"{num_steps} steps have {num_steps - 1} actions between them; give them as `{name}`")
        taken = np.zeros((*lead, num_steps - 1, len(self.space.actions))) if taken is None else taken
        taken = self.check_values(name, taken, self.space.actions, *lead, num_steps - 1)
        return Context(tokens, taken, self.check_states(states, *lead, num_steps))

    def see_goal(self, goal: np.ndarray) -> Tensor:
        """Tokens [.., N, E] of goals [.., G, h, w, 3], one step each; one colour throughout is refused, as no picture of a scene."""
        if (goal == goal[..., :1, :1, :]).all():
            raise ValueError(
                f"the goal is one colour throughout, {goal[..., 0, 0, :].ravel()[:3].tolist()}: no picture of a scene"
            )
        return self.see(goal)[..., 0, :, :]

    def cost_model(
        self, block: int, low: float | np.ndarray, high: float | np.ndarray, cost: str | Cost = "tokens", **options: Any
    ) -> CostModel:
        """This world model as a `Costable` of stable-worldmodel, whose solvers call `get_cost(info_dict, action_candidates)`.

        The arguments and options are those of `control.cost_model.CostModel`.
        """
        return CostModel(self, block, low, high, cost, **options)

    def see(self, frames: np.ndarray) -> Tensor:
        """Tokens [.., T, N, E] of frames [.., T * G, h, w, 3] uint8 RGB as the predictor reads them; steps seen lately are not encoded again."""
        _check_frames("frames", frames)
        group = self.frames_per_step
        if frames.shape[-4] % group:
            raise ValueError(f"steps are {group} frames each; got {frames.shape[-4]} frames")
        steps = frames.reshape(-1, group, *frames.shape[-3:])
        keys = [hashlib.sha256(repr(step.shape).encode() + step.tobytes()).digest() for step in steps]
        for key, step in zip(keys, steps, strict=True):
            if key not in self._seen:
                self._seen[key] = self._model.as_reps(self._encoder.tokens(step))[0]
            self._seen.move_to_end(key)
        tokens = torch.stack([self._seen[key] for key in keys])
        while len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)
        return tokens.reshape(*frames.shape[:-4], frames.shape[-4] // group, *tokens.shape[1:])

    def search(self, context: Context, goal: Tensor, settings: PlannerSettings, motion: Motion, **options: Any) -> Plan:
        """`control.planner.plan_actions` with this world's predictor and scaler; `goal` is tokens [N, E] of `see`."""
        return plan_actions(self._model, context, goal, motion, settings, scaler=self._scaler, **options)

    @property
    def frames_per_step(self) -> int:
        """G: frames that one step is made of."""
        return self._encoder.frames_per_step

    @property
    def uses_states(self) -> bool:
        """Whether the predictor was trained with states."""
        return not self._scaler.states.ignores_all

    @property
    def holds(self) -> bool:
        """Whether columns that no plan searches stay as they were (keys, slot), as opposed to 0."""
        return self.space.motion is not None and self.space.motion.holds

    def choose_settings(self, settings: str | PlannerSettings) -> PlannerSettings:
        """Settings by their name in `planner.SETTINGS`, or your own."""
        named = SETTINGS.get(settings) if isinstance(settings, str) else settings
        if not isinstance(named, PlannerSettings):
            raise ValueError(
                f"unknown planner settings {settings!r}; known: {', '.join(SETTINGS)}, or give a PlannerSettings of your own"
            )
        return named

    def build_motion(self, settings: str | PlannerSettings | None = None, **changes: Any) -> Motion:
        """What may move: `control.motion.build_motion` of this space and recordings, with the step and reach of settings."""
        defaults = {} if settings is None else self.choose_settings(settings).limits
        warn_of_reach(changes.get("reach") or defaults.get("reach", 1.0), self._card)
        return build_motion(self.space, recorded=self.recorded, defaults=defaults, **changes)

    def choose_cost(self, cost: str | Cost, steps: str = LAST) -> Cost:
        """A cost by its name, of the last predicted step or as the sum over all (`steps="sum"`); or your own, as it is."""
        return choose_cost(self.costs, cost, steps)

    def check_states(self, states: np.ndarray | None, *steps: int) -> np.ndarray:
        """States [*steps, S] as float64; None is allowed, and becomes zeros, for a predictor that was trained without."""
        if states is None and not self.uses_states:
            return np.zeros((*steps, len(self.space.states)))
        if states is None:
            raise ValueError(
                f"this predictor reads states ({', '.join(column.name for column in self.space.states)}): give them, or train one that does "
                "not, with scaler.states=ignore"
            )
        return self.check_values("states", states, self.space.states, *steps)

    def check_values(self, name: str, values: np.ndarray, columns: Sequence[Column], *steps: int) -> np.ndarray:
        """Values [*steps, columns] as float64; another shape is refused, and keys and slots that are neither 0 nor 1."""
        values, shape = np.asarray(values, np.float64), [*steps, len(columns)]
        if list(values.shape) != shape:
            raise ValueError(f"{name} must be {shape} in action space {self.space.name!r}; got {list(values.shape)}")
        switches = np.array([column.kind != "continuous" for column in columns])
        wrong = ~np.isfinite(values) | (switches & ~np.isin(values, (0, 1)))
        if wrong.any():
            column = columns[int(np.argwhere(wrong)[0][-1])]
            raise ValueError(
                f"{name}: column {column.name} of action space {self.space.name!r} is {column.kind} and holds "
                f"{'0 or 1' if column.kind != 'continuous' else 'a finite number'}; got {values[wrong][0]:g}. Columns that are not searched "
                "keep what is given, so give what holds now (0 where nothing is pressed); docs/action_spaces.md names the columns"
            )
        return values


def _check_frames(name: str, frames: np.ndarray) -> None:
    is_array = isinstance(frames, np.ndarray)
    if not is_array or frames.ndim < 4 or frames.dtype != np.uint8 or frames.shape[-1] != 3 or 0 in frames.shape[-3:]:
        got = f"{frames.dtype} {list(frames.shape)}" if is_array else type(frames).__name__
        raise ValueError(
            f"{name} must be a numpy array of uint8 RGB frames, [frames, height, width, 3]; got {got}. Of a list take np.stack(...), of a "
            "torch tensor on any device .cpu().numpy(), of a single frame frame[None]"
        )


def _find_rates(card: Mapping[str, Any], frames_per_step: int) -> tuple[tuple[float, float, float] | None, float]:
    """`step_hz` and `fps` of a world model; says where one rate is not the whole truth."""
    if STEP_HZ_FIELD not in card:
        asked = card[RECIPE_FIELD]["sampling"]["fps"]
        log.warning(
            "the weights do not say how often steps came (an older version wrote them), so fps is the requested %g Hz. Every ceil(video rate / %g)-th "
            "frame was taken, such as 5 Hz for 8 of a 10 Hz video: work out yours from the recordings' rate, or train again",
            asked,
            asked,
        )
        return None, asked
    least, middle, greatest = card[STEP_HZ_FIELD]
    if greatest > (1 + RATES_APART) * least:
        log.warning(
            "steps of the training recordings came at %.4g to %.4g Hz, and no rate of frames fits them all; fps is the middle one, %.4g Hz. "
            "An encode.fps by which all videos' rates can be divided gives one rate",
            least * frames_per_step,
            greatest * frames_per_step,
            middle * frames_per_step,
        )
    return (least, middle, greatest), middle * frames_per_step


def _comparable_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What of a token recipe decides the tokens of given frames: not where these came from, nor their rate, nor what decoded them."""
    kept = {key: value for key, value in recipe.items() if key not in ("source", "decoder", "sampling")}
    return kept | {"sampling": {key: recipe["sampling"][key] for key in ("mode", "frames_per_clip")}}
