"""Results of the reference implementation are reproduced, at the tolerances of tests/golden/README.md.

Claims:
- every file of the folder (tests/golden, or $JEPA_GOLDEN_DIR) is checked, chosen by its `kind` metadata, built from its `config`;
- a folder without files, a file that cannot be read, an unknown kind, and an expected tensor that no check knows are failures.
"""

import json
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from scipy.spatial.transform import Rotation
from torch import Tensor

from jepa_cache.actions import get_action_space
from jepa_cache.control.motion import build_motion
from jepa_cache.control.planner import Context, PlannerSettings, plan_actions
from jepa_cache.encoder.preprocess import CROP_RULES, CropRule, cut_ac
from jepa_cache.encoder.vit import VisionTransformer, VisionTransformer21
from jepa_cache.poses import integrate_pose, pose_actions, poses_in_camera_frame
from jepa_cache.predictor.model import ACPredictor
from jepa_cache.predictor.rollout import LatentModel
from jepa_cache.training.losses import world_model_loss
from jepa_cache.training.optim import (
    build_optimizer,
    cosine_weight_decay,
    set_rates,
    warmup_cosine,
    warmup_stable_decay,
)
from tests.official_files import prepare
from tests.predictor.makers import block_causal_mask

FOLDER = Path(os.environ.get("JEPA_GOLDEN_DIR") or Path(__file__).parent / "golden")
FILES = sorted(FOLDER.rglob("*.safetensors"))
# What the official constructors assume where a config does not say otherwise.
DEFAULTS = {
    "patch_size": 16,
    "tubelet_size": 2,
    "mlp_ratio": 4.0,
    "norm_eps": 1e-6,
    "auto_steps": 2,
    "loss_exp": 1.0,
    "normalize_reps": True,
}


class Golden:
    """One file: its metadata, its tensors by group ("param", "in", "out", "grad", "final"), and which expected ones were compared."""

    def __init__(self, path: Path) -> None:
        self.groups: dict[str, dict[str, Tensor]] = {}
        self.compared: set[str] = set()
        with safe_open(path, "pt") as file:
            self.metadata = dict(file.metadata() or {})
            for key in file.keys():  # noqa: SIM118 (no iteration)
                group, _, name = key.partition("/")
                self.groups.setdefault(group, {})[name] = file.get_tensor(key)
        self.config = json.loads(self.metadata.get("config") or "{}")

    def group(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of one group by the rest of their names."""
        return self.groups.get(name, {})

    def setting(self, name: str) -> object:
        """Return a config value, or what the official constructors assume."""
        return self.config[name] if name in self.config else DEFAULTS[name]

    def width(self, name: str, layer: str) -> int:
        """Return an input width from the config, or from the layer that takes it."""
        return self.config[name] if name in self.config else self.group("param")[f"{layer}.weight"].shape[1]

    def compare(self, name: str, got: Callable[[], Tensor] | Tensor, atol: float, *, group: str = "out") -> None:
        """Compare one tensor, if the file expects it; 1e-5 relative is allowed on top, for values that are not of order 1."""
        if name not in self.group(group):
            return
        expected = self.groups[group][name]
        self.compared.add(f"{group}/{name}")
        got = (got() if callable(got) else got).detach().to(expected.dtype)
        rtol = 1e-5 if expected.dtype == torch.float32 else 0.0
        if got.ndim != expected.ndim and got.numel() == expected.numel():
            got = got.reshape(expected.shape)
        torch.testing.assert_close(got, expected, atol=atol, rtol=rtol, msg=lambda text: f"{group}/{name}: {text}")

    def check_nothing_is_left(self) -> None:
        """Fail if a file expects something that was not looked at."""
        expected = {f"{group}/{name}" for group in ("out", "grad", "final") for name in self.group(group)}
        assert expected, "the file expects nothing"
        assert not expected - self.compared, f"never compared: {sorted(expected - self.compared)}"


def build_golden_encoder(golden: Golden) -> VisionTransformer | VisionTransformer21:
    config = golden.config
    build, options = VisionTransformer, {}
    if golden.metadata["kind"] == "encoder_v21":
        build, options = VisionTransformer21, {"positions": "rescaled" if config["interpolate_rope"] else "grid"}
    encoder = build(
        embed_dim=config["embed_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        # The parameters say it exactly; ViT-g's ratio of 48/11 does not survive every rounding.
        mlp_dim=golden.group("param")["blocks.0.mlp.fc1.weight"].shape[0],
        patch_size=golden.setting("patch_size"),
        tubelet_size=golden.setting("tubelet_size"),
        norm_eps=golden.setting("norm_eps"),
        **options,
    )
    encoder.load_state_dict(golden.group("param"), strict=True)
    return encoder.eval()


def build_golden_predictor(golden: Golden) -> ACPredictor:
    config = golden.config
    height, width = np.broadcast_to(config["img_size"], 2).tolist()
    patch = golden.setting("patch_size")
    predictor = ACPredictor(
        embed_dim=golden.width("embed_dim", "predictor_embed"),
        predictor_dim=config["predictor_embed_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        mlp_ratio=golden.setting("mlp_ratio"),
        action_dim=golden.width("action_dim", "action_encoder"),
        state_dim=golden.width("state_dim", "state_encoder")
        + uses_extrinsics(golden) * (golden.width("action_dim", "action_encoder") - 1),
        grid=(height // patch, width // patch),
        use_extrinsics=uses_extrinsics(golden),
        norm_eps=golden.setting("norm_eps"),
    )
    predictor.load_state_dict(golden.group("param"), strict=True)
    return predictor


def by_step(tokens: Tensor, num_steps: int) -> Tensor:
    """Give [..., T*N, E] its step axis."""
    return tokens.unflatten(-2, (num_steps, -1))


def uses_extrinsics(golden: Golden) -> bool:
    """Say whether the predictor has the extra conditioning token: as the config says, else if extrinsics are given."""
    return bool(golden.config.get("use_extrinsics", "extrinsics" in golden.group("in")))


def states_of(golden: Golden) -> Tensor:
    """Return the states, and behind them the extrinsics for a predictor that uses them."""
    given = golden.group("in")
    return torch.cat([given["states"], given["extrinsics"]], dim=-1) if uses_extrinsics(golden) else given["states"]


@torch.no_grad()
def check_encoder(golden: Golden) -> None:
    encoder = build_golden_encoder(golden)
    golden.compare("tokens", encoder(golden.group("in")["clip"]), 1e-4)


@torch.no_grad()
def check_encoder_per_frame(golden: Golden) -> None:
    encoder = build_golden_encoder(golden)
    clip = golden.group("in")["clip"]
    batch, _, num_frames = clip.shape[:3]
    single = clip.transpose(1, 2).flatten(0, 1)[:, :, None].expand(-1, -1, golden.setting("tubelet_size"), -1, -1)
    tokens = encoder(single).unflatten(0, (batch, num_frames)).flatten(1, 2)
    golden.compare("tokens_raw", tokens, 1e-4)
    golden.compare("tokens_normalized", F.layer_norm(tokens, tokens.shape[-1:], eps=1e-5), 1e-4)


@torch.no_grad()
def check_encoder_v21(golden: Golden) -> None:
    encoder = build_golden_encoder(golden)
    given = golden.group("in")
    assert list(encoder.levels) == json.loads(golden.metadata.get("hierarchical_layers", str(list(encoder.levels))))

    def encode_levels() -> Tensor:
        outputs: list[Tensor] = []
        for level in encoder.levels:
            encoder.blocks[level].register_forward_hook(lambda *given: outputs.append(given[-1]))
        encoder(given["clip"])
        return torch.cat([norm(output) for norm, output in zip(encoder.norms_block, outputs, strict=True)], dim=-1)

    golden.compare("tokens", lambda: encoder(given["clip"]), 1e-4)
    golden.compare("image_tokens", lambda: encoder(given["image"]), 1e-4)
    golden.compare("hierarchical_tokens", encode_levels, 1e-4)


@torch.no_grad()
def check_ac_predictor(golden: Golden) -> None:
    predictor = build_golden_predictor(golden)
    given = golden.group("in")
    tokens = by_step(given["tokens"], given["actions"].shape[1])
    out = predictor(tokens, given["actions"], states_of(golden)).tokens
    golden.compare("tokens", out.flatten(1, 2), 1e-4)


def check_mask(golden: Golden) -> None:
    for name, expected in golden.group("out").items():
        match = re.search(r"T(\d+)_H(\d+)_W(\d+)_A(\d+)", name)
        assert match, f"the name of mask {name} does not say its sizes"
        num_steps, rows, columns, conditioning = map(int, match.groups())
        golden.compared.add(f"out/{name}")
        assert torch.equal(block_causal_mask(num_steps, rows * columns + conditioning), expected.bool()), name


def parse_loss_case(case: str) -> tuple[int, float, bool]:
    """Read auto_steps, loss_exp and normalize_reps from a name such as auto2_exp1_norm1, exp1.5, exp1_5 or normTrue."""
    match = re.fullmatch(r"auto_?(\d+)_exp_?(\d+(?:[._p]\d+)?)_norm_?([01]|true|false)", case, re.IGNORECASE)
    assert match, f"loss case {case} does not say its settings"
    auto_steps, exponent, normalize = match.groups()
    return int(auto_steps), float(re.sub("[_p]", ".", exponent)), normalize.lower() in ("1", "true")


def check_loss(golden: Golden) -> None:
    predictor = build_golden_predictor(golden)
    given = golden.group("in")
    states = states_of(golden)
    tokens = by_step(given["tokens"], states.shape[1])
    names = sorted(golden.group("out"))
    cases = {name.rpartition("/")[0]: parse_loss_case(name.rpartition("/")[0]) for name in names}
    for auto_steps, loss_exp, normalize in golden.config.get("settings", []):
        assert (auto_steps, float(loss_exp), bool(normalize)) in cases.values(), "a setting without results"
    for case, (auto_steps, loss_exp, normalize) in cases.items():
        options = {"loss_exp": loss_exp, "auto_steps": auto_steps, "normalize_reps": normalize}
        predictor.zero_grad(set_to_none=True)
        losses = world_model_loss(predictor, tokens, given["actions"], states, **options)
        losses.total.backward()
        results = {"loss": losses.total, "jloss": losses.scalars["jloss"], "sloss": losses.scalars["sloss"]}
        results |= {"z_tf": losses.z_tf.flatten(1, 2), "z_ar": losses.z_ar.flatten(1, 2)}
        with torch.no_grad():
            legacy = world_model_loss(predictor, tokens, given["actions"], states, rollout="legacy", **options)
        results["legacy_sloss"] = legacy.scalars["sloss"]
        for name, result in results.items():
            golden.compare(f"{case}/{name}", result, 1e-4 if name.startswith("z_") else 1e-5)
        gradients = {name: parameter.grad for name, parameter in predictor.named_parameters()}
        for name in golden.group("grad"):
            if name.startswith(f"{case}/"):
                gradient = gradients[name.removeprefix(f"{case}/")]
                expected = golden.group("grad")[name]
                golden.compare(name, torch.zeros_like(expected) if gradient is None else gradient, 1e-4, group="grad")


def check_train_steps(golden: Golden) -> None:
    predictor = build_golden_predictor(golden)
    given = golden.group("in")
    lr_of, weight_decay_of = read_schedule(golden.config["optimization"])
    optimizer = build_optimizer(predictor, lr=lr_of(1), weight_decay=weight_decay_of(1))
    names = ("auto_steps", "loss_exp", "normalize_reps")
    seen: list[tuple[float, ...]] = []
    for index in range(given["tokens"].shape[0]):
        rates = lr_of(index + 1), weight_decay_of(index + 1)
        set_rates(optimizer, *rates)
        states = states_of(golden)[index]
        losses = world_model_loss(
            predictor,
            by_step(given["tokens"][index], states.shape[1]),
            given["actions"][index],
            states,
            **{name: golden.setting(name) for name in names},
        )
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        seen.append((*rates, *(losses.scalars[name].item() for name in ("jloss", "sloss")), losses.total.item()))
    for name, values in zip(("lr", "wd", "jloss", "sloss", "loss"), zip(*seen, strict=True), strict=True):
        golden.compare(name, torch.tensor(values, dtype=torch.float64), 1e-12 if name in ("lr", "wd") else 1e-4)
    final = predictor.state_dict()
    for name, weights in golden.group("final").items():
        if name.endswith("attn.qkv.bias"):
            # The gradient of the key part is zero up to rounding, which Adam turns into steps of arbitrary sign.
            golden.compared.add(f"final/{name}")
            for part in (0, 2):
                torch.testing.assert_close(final[name].chunk(3)[part], weights.chunk(3)[part], atol=1e-2, rtol=0.0)
        else:
            golden.compare(name, final[name], 1e-4, group="final")


# What a planner's config may say, under `planner` or beside it, and what the published search assumes where it does not.
PLANNER_DEFAULTS = {
    "rollout": None,  # these three are the noise's, where no setting says them
    "samples": None,
    "cem_steps": None,
    "topk": 10,
    "maxnorm": 0.05,
    "momentum_mean": 0.25,
    "momentum_std": 0.95,
    "momentum_mean_gripper": 0.15,
    "momentum_std_gripper": 0.15,
    "close_gripper": None,
    "fixed": None,
    "normalize_reps": True,
}
# Names of the searched columns, as files and as we call them, and their places among the 4 searched and the 7 of an action.
SEARCHED = {"x": "dx", "y": "dy", "z": "dz", "gripper": "dgripper"}
PLACES = {0: "dx", 1: "dy", 2: "dz", 3: "dgripper", 6: "dgripper"}


def read_planner_settings(config: dict) -> dict:
    """Return the settings of a search, wherever they stand; one under `planner` that is not known is a failure."""
    under = config.get("planner", {})
    renamed = {"axis": "fixed", "axes": "fixed", "fixed_axes": "fixed", "close_gripper_from": "close_gripper"}
    under = {renamed.get(name, name): value for name, value in under.items()}
    beside = {renamed.get(name, name): value for name, value in config.items() if name != "planner"}
    unread = sorted(under.keys() - PLANNER_DEFAULTS.keys())
    assert not unread, f"planner settings that are never read: {unread}"
    twice = sorted(name for name in under.keys() & beside.keys() if under[name] != beside[name])
    assert not twice, f"planner settings that are said twice and differ: {twice}"
    return PLANNER_DEFAULTS | {name: value for name, value in beside.items() if name in PLANNER_DEFAULTS} | under


def read_fixed(fixed: object) -> tuple[str, ...]:
    """Return our names of fixed columns, given as names or places, in a list or as {column: value}."""
    if isinstance(fixed, dict):
        assert not any(fixed.values()), f"columns can be fixed at 0 only; got {fixed}"
    names = []
    for column in fixed or ():
        place = str(column)
        name = PLACES.get(int(place)) if place.isdigit() else SEARCHED.get(place, place)
        assert name in SEARCHED.values(), f"fixed column {column!r} is none of those that are searched"
        names.append(name)
    return tuple(names)


def read_planner_context(given: dict[str, Tensor]) -> tuple[Context, Tensor]:
    """Return the context and the goal [N, E]; a batch axis of 1 and a joint axis of steps and tokens are allowed."""
    known = {"context_tokens", "context_state", "context_states", "context_actions", "goal_tokens", "noise"}
    assert not given.keys() - known, f"inputs that are never read: {sorted(given.keys() - known)}"
    goal = given["goal_tokens"].flatten(0, -3) if given["goal_tokens"].ndim > 2 else given["goal_tokens"][None]
    assert len(goal) == 1, f"one goal is expected; got {list(given['goal_tokens'].shape)}"
    (states,) = (given[name] for name in ("context_state", "context_states") if name in given)
    states = states.reshape(-1, states.shape[-1]).double().numpy()
    tokens = given["context_tokens"].reshape(-1, *goal.shape[1:])
    assert len(tokens) == len(states), f"context tokens of {len(tokens)} steps, but {len(states)} states"
    actions = np.zeros((len(states) - 1, states.shape[-1]))
    if "context_actions" in given:
        actions = given["context_actions"].reshape(-1, given["context_actions"].shape[-1]).double().numpy()
    return Context(tokens, actions, states), goal[0]


def build_planner_settings(search: dict, noise: np.ndarray) -> PlannerSettings:
    """Return our settings of a search; what no setting says follows from the noise [rounds, H, samples, columns]."""
    return PlannerSettings(
        horizon=search["rollout"] or noise.shape[1],
        num_samples=search["samples"] or noise.shape[2],
        num_elites=search["topk"],
        num_rounds=search["cem_steps"] or noise.shape[0],
        mean_momentum=search["momentum_mean"],
        std_momentum=search["momentum_std"],
        gripper_mean_momentum=search["momentum_mean_gripper"],
        gripper_std_momentum=search["momentum_std_gripper"],
        close_gripper_from=None if search["close_gripper"] is False else search["close_gripper"],
    )


def check_planner(golden: Golden) -> None:
    predictor = build_golden_predictor(golden).eval()
    given, search = golden.group("in"), read_planner_settings(golden.config)
    everything = build_motion(get_action_space("pose7"), max_step_m=search["maxnorm"])
    motion = build_motion(get_action_space("pose7"), max_step_m=search["maxnorm"], fixed=read_fixed(search["fixed"]))
    noise = given["noise"].double().numpy()
    if noise.shape[-1] == len(everything.names):  # drawn for all columns, fixed ones too
        noise = noise[..., [everything.names.index(name) for name in motion.names]]
    settings = build_planner_settings(search, noise)
    context, goal = read_planner_context(given)
    model = LatentModel(predictor, bool(search["normalize_reps"]))
    plan = plan_actions(model, context, goal, motion, settings, noise=noise)
    golden.compare("energies", torch.from_numpy(plan.energies), 1e-4)
    golden.compare("actions", torch.from_numpy(plan.found), 1e-4)


def read_schedule(case: dict) -> tuple[Callable[[int], float], Callable[[int], float]]:
    """Turn an official optimisation section, in epochs of `ipe` train steps, into the two schedules."""
    ipe = case["ipe"]
    num_steps = case["epochs"] * ipe
    rates = {"start_lr": case["start_lr"], "peak_lr": case["lr"], "final_lr": case["final_lr"]}
    sizes = {"num_steps": num_steps, "num_warmup": case["warmup"] * ipe}
    decay = {"start_weight_decay": case["weight_decay"], "final_weight_decay": case["final_weight_decay"]}

    def lr(k: int) -> float:
        if "anneal" not in case:
            return warmup_cosine(k, **sizes, **rates)
        return warmup_stable_decay(k, num_anneal=case["anneal"] * ipe, **sizes, **rates)

    return lr, lambda k: cosine_weight_decay(k, num_steps=num_steps, **decay)


def check_schedule(golden: Golden) -> None:
    for number, case in enumerate(golden.config["cases"]):
        for name, schedule in zip(("lr", "wd"), read_schedule(case), strict=True):
            calls = range(1, len(golden.group("out").get(f"case{number}/{name}", ())) + 1)
            got = torch.tensor([schedule(k) for k in calls], dtype=torch.float64)
            golden.compare(f"case{number}/{name}", got, 1e-12)


def compare_poses(golden: Golden, name: str, got: np.ndarray) -> None:
    """Compare poses in float64, if the file expects them: positions and gripper as they are, angles as rotation matrices."""
    if name not in golden.group("out"):
        return
    expected = golden.group("out")[name].numpy()
    golden.compared.add(f"out/{name}")
    assert got.shape == expected.shape and got.dtype == np.float64, name
    others = [0, 1, 2, *range(6, expected.shape[1])]
    np.testing.assert_allclose(got[:, others], expected[:, others], rtol=0, atol=1e-9, err_msg=name)
    turns = [Rotation.from_euler("xyz", poses[:, 3:6]).as_matrix() for poses in (got, expected)]
    np.testing.assert_allclose(*turns, rtol=0, atol=1e-9, err_msg=f"{name}: rotations")
    # Away from +-pi and from a middle angle of +-pi/2 the angles themselves are unique.
    angles = np.abs(expected[:, 3:6])
    unique = (angles < np.pi - 1e-3).all(axis=1) & (angles[:, 1] < np.pi / 2 - 1e-2)
    np.testing.assert_allclose(got[unique, 3:6], expected[unique, 3:6], rtol=0, atol=1e-9, err_msg=f"{name}: angles")


def check_poses(golden: Golden) -> None:
    given = golden.group("in")
    for trajectory in {name.rpartition("/")[0] for name in given}:
        states = given[f"{trajectory}/states"].numpy()
        actions = pose_actions(states)
        results = {"actions": actions, "next_states": integrate_pose(states[:-1], actions)}
        if f"{trajectory}/extrinsics" in given:
            seen = poses_in_camera_frame(states, given[f"{trajectory}/extrinsics"].numpy())
            results |= {"states_camera_frame": seen, "actions_camera_frame": pose_actions(seen)}
        for name, result in results.items():
            compare_poses(golden, f"{trajectory}/{name}", result)


def check_preprocess(golden: Golden) -> None:
    config, expected = golden.config, golden.group("out")
    colour = {name: tuple(config[name]) for name in ("mean", "std") if name in config}
    for key, frames in golden.group("in").items():
        case = key.rpartition("/")[0]
        if f"{case}/clip" in expected:
            options = config.get("ac", {}).get(case, {})
            rule = {"aspect_range": tuple(options["random_resize_aspect_ratio"])} if options else {}
            transform = CropRule(partial(cut_ac, **rule), in_levels=True)
            clip = prepare(transform, frames.numpy(), expected[f"{case}/clip"].shape[-1], **colour)
            golden.compare(f"{case}/clip", clip.transpose(0, 1), 1e-3)
        # The array path rounds to uint8 after cv2's fixed-point resize, hence one level of difference.
        for form, atol in (("array", 0.02), ("tensor", 1e-3)):
            name = f"{case}/clip_{form}_path"
            if name in expected:
                clip = prepare(CROP_RULES[f"eval_{form}"], frames.numpy(), expected[name].shape[-1], **colour)
                golden.compare(name, clip.transpose(0, 1), atol)


CHECKS: dict[str, Callable[[Golden], None]] = {
    "encoder": check_encoder,
    "encoder_per_frame": check_encoder_per_frame,
    "ac_predictor": check_ac_predictor,
    "mask": check_mask,
    "loss": check_loss,
    "train_steps": check_train_steps,
    "schedule": check_schedule,
    "poses": check_poses,
    "preprocess": check_preprocess,
    "planner": check_planner,
    "encoder_v21": check_encoder_v21,
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(FOLDER).as_posix())
def test_reference_results_are_reproduced(path: Path):
    golden = Golden(path)
    kind = golden.metadata.get("kind")
    assert kind in CHECKS, f"{path} has kind {kind!r}; known are {sorted(CHECKS)}"
    CHECKS[kind](golden)
    golden.check_nothing_is_left()


def test_the_folder_holds_files():
    assert FILES, f"no *.safetensors in {FOLDER}"
