"""What the options of a training promise, each with the true parts on a tiny cache.

Claims:
- epochs become the training steps that cover the windows so often;
- training ends after `patience` validations without a better metric, a restart knows it, and `select: best` hands on the best;
- a stop signal or Ctrl-C saves a checkpoint, and the same command resumes to the weights of an uninterrupted run;
- a second Ctrl-C ends at once, and a signal before the first training step ends with the exit code for a requeue, and words;
- checkpoints are copied to the remote folder, and a machine that knows nothing of the run resumes from there, bit for bit;
- rollouts start where the seed says, anew in each batch, also after a resume;
- validation's losses and gaps are those of the weights that it leaves, computed anew; one held-out episode has no other
  to be compared with;
- compressed predictors, float16 with its gradient scaler and 8-bit AdamW resume bit for bit;
- LoRA trains the adapters alone, resumes bit for bit, writes PEFT's files and the merged predictor, and needs starting weights;
- weights of another encoder's tokens are refused unless that is allowed, and then it is recorded;
- the preset's `residual` reaches the predictor and its card; with `use_extrinsics` the camera's pose decides predictions, in training, evaluation
  and plans; without one it is refused.
"""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jepa_cache.data.ablations import choose_donors
from jepa_cache.data.loader import WindowLoader
from jepa_cache.data.windows import WindowIndex, spread_windows
from jepa_cache.evaluation.planning import plan_run
from jepa_cache.evaluation.run import evaluate_run
from jepa_cache.predictor.checkpoints import CheckpointError, load_predictor, read_card
from jepa_cache.predictor.rollout import LatentModel, normalize_tokens
from jepa_cache.training import trainer
from jepa_cache.training.batches import VALIDATION_WINDOWS_PER_EPISODE
from jepa_cache.training.signals import REQUEUE_EXIT_CODE, stop_request
from jepa_cache.training.step import draw_rollout_start
from jepa_cache.training.trainer import TrainResult, train
from tests.caches import Cache, make_cache, make_config, no_pictures
from tests.training.runs import bits, rows, run

pytestmark = pytest.mark.usefixtures("runs")


@pytest.fixture(autouse=True)
def ctrl_c():
    """Ctrl-C as a terminal gives it, also where the suite runs in the background, whose shell ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def stop_at(step: int, monkeypatch, *signals: int) -> None:
    """SIGTERM, or what is given, arrives while this training step is computed."""
    original = trainer.train_step

    def signalled(*arguments):
        for number in (signals or (signal.SIGTERM,)) if arguments[-1] == step else ():
            os.kill(os.getpid(), number)
        return original(*arguments)

    monkeypatch.setattr(trainer, "train_step", signalled)


def assert_resumes_bit_for_bit(
    cache: Cache, tmp_path: Path, monkeypatch, *overrides: str, stop: int = signal.SIGTERM
) -> TrainResult:
    """Train whole, then again with a stop in the middle; both end alike."""
    whole = run(cache, tmp_path, *overrides)
    expected = bits(whole.weights), rows(whole)
    shutil.rmtree(whole.run)
    with monkeypatch.context() as patched:
        stop_at(7, patched, stop)
        stopped = run(cache, tmp_path, *overrides)
    assert (stopped.stopped_by, stopped.step, stopped.weights) == (signal.Signals(stop).name, 7, None)
    again = run(cache, tmp_path, *overrides)
    assert (again.num_trained, again.step) == (5, 12)
    assert (bits(again.weights), rows(again)) == expected
    return again


missing = importlib.util.find_spec("bitsandbytes") is None
needs_bitsandbytes = pytest.mark.skipif(missing, reason="bitsandbytes (an extra) is not installed")


@pytest.mark.parametrize(
    ("stop", "words"),
    [
        (signal.SIGTERM, ("train.rollout_start=random",)),
        (signal.SIGUSR1, ("predictor=compressed", "train.loss_exp=2.0")),
        pytest.param(signal.SIGINT, ("train.optimizer=adamw8bit",), marks=needs_bitsandbytes),
        (signal.SIGINT, ()),
    ],
    ids=["SIGTERM random", "SIGUSR1 compressed", "SIGINT adamw8bit", "SIGINT"],
)
def test_a_stop_signal_saves_and_the_same_command_resumes_bit_for_bit(cache, tmp_path, monkeypatch, stop, words):
    assert_resumes_bit_for_bit(cache, tmp_path, monkeypatch, "train.checkpoint_every=100", *words, stop=stop)


def test_a_second_ctrl_c_ends_at_once(cache, tmp_path, monkeypatch, runs):
    stop_at(7, monkeypatch, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(cache, tmp_path, "train.checkpoint_every=100")
    assert not list(runs.glob("*/checkpoints/step-00000007"))


def test_ctrl_c_that_the_shell_of_a_background_job_ignores_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_request() as request:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGUSR1)
        assert request.name == "SIGUSR1" and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


STAGE = Path(__file__).parents[2] / "stages/train_predictor.py"
LOADING = f"""
import os, runpy, signal, sys
import jepa_cache.config.loading as loading
load = loading.load_config
loading.load_config = lambda *_: os.kill(os.getpid(), signal.NAME) or load(*_)
sys.argv = [{str(STAGE)!r}]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_while_the_stage_loads_ends_with_words_and_the_exit_code_for_a_requeue(name: str):
    done = subprocess.run([sys.executable, "-c", LOADING.replace("NAME", name)], capture_output=True, text=True)
    assert done.returncode == REQUEUE_EXIT_CODE and "Traceback" not in done.stderr
    assert f"stopped by {name} while no training step was running; the same command resumes" in done.stderr


def test_a_csv_that_is_gone_or_was_changed_is_named_and_written_again_from_the_checkpoint(
    cache, tmp_path, monkeypatch, capsys
):
    settings = ("train.log_every=1", "train.keep_last=9")
    expected = rows(run(cache, tmp_path, *settings))
    with monkeypatch.context() as patched:
        stop_at(7, patched)
        stopped = run(cache, tmp_path, *settings, fresh=True)
    path = stopped.run / "train.csv"
    text = path.read_bytes()
    for harmed in (None, text[:90] + b"\xff\x00" + text[92:]):
        path.unlink() if harmed is None else path.write_bytes(harmed)
        capsys.readouterr()
        assert rows(run(cache, tmp_path, *settings)) == expected
        said = capsys.readouterr().out
        assert f"train.csv {'is gone' if harmed is None else 'was changed'}; its rows up to the checkpoint" in said
        for later in (8, 12):
            shutil.rmtree(stopped.run / f"checkpoints/step-{later:08d}")
    path.write_bytes(text)
    assert rows(run(cache, tmp_path, *settings)) == expected
    assert "train.csv" not in capsys.readouterr().out


def test_epochs_become_the_training_steps_that_cover_the_windows(cache, tmp_path):
    result = run(cache, tmp_path, "train.num_epochs=0.5", "train.batch_size=8")
    assert result.num_steps * 8 >= 65 > (result.num_steps - 1) * 8  # half of five episodes of 26 windows
    assert float(rows(result)[-1]["epoch"]) == pytest.approx(result.num_steps * 8 / 130)
    with pytest.raises(ValueError, match=r"num_warmup 2 \+ train\.num_anneal 4 exceed train\.num_steps 4"):
        run(cache, tmp_path, "train.num_epochs=0.1")


def test_training_ends_without_progress_and_the_best_weights_are_handed_on(cache, tmp_path, monkeypatch, capsys):
    validations = iter([3.0, 1.0, 2.0, 2.5, 0.1])

    def worsening(*_):
        value = next(validations)
        return {"val_total": value, "val_jloss": value, "val_sloss": value}

    monkeypatch.setattr(trainer, "validate", worsening)
    settings = ("train.validate_every=2", "train.patience=2", "train.select=best", "train.checkpoint_every=100")
    result = run(cache, tmp_path, *settings)
    assert result.step == 8 and read_card(result.weights)["step"] == 4
    assert bits(result.weights) == bits(result.run / "checkpoints/best/predictor.safetensors")
    assert bits(result.weights) != bits(result.run / "checkpoints/latest/predictor.safetensors")
    again = run(cache, tmp_path, *settings)
    assert again.num_trained == 0 and "complete" in capsys.readouterr().out
    last = run(cache, tmp_path, *settings[:2], "train.select=last", settings[3])
    assert last.run == result.run and read_card(last.weights)["step"] == 8


def test_a_machine_that_knows_nothing_of_a_run_resumes_from_its_uploads(cache, tmp_path, monkeypatch, capsys):
    whole = run(cache, tmp_path / "a", "train.checkpoint_every=3")
    expected = bits(whole.weights), rows(whole)
    remote = ("train.checkpoint_every=3", f"train.upload_to=file://{tmp_path}/remote", "train.upload_every_min=0")
    shutil.rmtree(whole.run)
    with monkeypatch.context() as patched:
        stop_at(8, patched)
        assert run(cache, tmp_path / "b", *remote).step == 8
    there = sorted(path.name for path in (tmp_path / "remote").glob("*/checkpoints/*"))
    assert there[-1] == "step-00000008" and len(there) <= 3
    shutil.rmtree(whole.run)
    again = run(cache, tmp_path / "c", *remote)
    assert "fetched the run's checkpoint from" in capsys.readouterr().out
    assert again.num_trained == 4 and (bits(again.weights), rows(again)) == expected


def test_an_upload_that_was_cut_short_is_no_checkpoint_and_a_folder_that_cannot_be_used_is_named(
    cache, tmp_path, capsys
):
    remote = f"train.upload_to=file://{tmp_path}/remote"
    first = run(cache, tmp_path, remote)
    shutil.rmtree(first.run)
    (newest,) = (tmp_path / "remote").glob("*/checkpoints/step-00000012")
    (newest / "state.json").unlink()
    assert run(cache, tmp_path, remote).num_trained == 4 and "step-00000008" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"train\.upload_to='nowhere://x' cannot be used: Protocol not known"):
        run(cache, tmp_path, "train.upload_to=nowhere://x")


def test_rollouts_start_where_the_seed_says_and_leave_room_for_all_their_steps():
    settings = make_config("train.rollout_start=random", "train.window_steps=8").train
    starts = [draw_rollout_start(settings, turn) for turn in range(200)]
    assert starts == [draw_rollout_start(settings, turn) for turn in range(200)]
    assert set(starts) == set(range(6))  # 8 steps: the last start leaves two to predict
    assert starts != [draw_rollout_start(replace(settings, seed=1), turn) for turn in range(200)]
    legacy = replace(settings, rollout="legacy")
    assert max(draw_rollout_start(legacy, turn) for turn in range(200)) == 5


def test_float16_trains_and_resumes_with_its_gradient_scaler(cache, tmp_path, monkeypatch):
    result = assert_resumes_bit_for_bit(cache, tmp_path, monkeypatch, "train.precision=float16")
    state = torch.load(result.run / "checkpoints/latest/optimizer.pt", weights_only=True)
    assert 0 < state["gradient_scaler"]["scale"] < 65536, "the first gradients overflow, so the scale has come down"


# --- validation ------------------------------------------------------------------------------------------------------------


def test_validation_compares_with_copying_and_with_the_actions_of_another_episode(cache, tmp_path):
    result = run(cache, tmp_path)
    row = rows(result)[-1]
    predictor, card = load_predictor(result.weights)
    index = WindowIndex(cache.dataset.segments_of("val", cache.config.split), card["window_steps"])
    numbers = spread_windows(index, VALIDATION_WINDOWS_PER_EPISODE)
    episodes = [index.segments[index[number].segment].episode for number in numbers]
    donors = choose_donors(episodes, seed=cache.config.train.seed)
    batch = WindowLoader(cache.dataset, index, cache.scaler).read(numbers)
    h = normalize_tokens(batch.tokens)
    errors = []
    with torch.no_grad():
        for actions in (batch.actions, batch.actions[donors]):
            predicted = LatentModel(predictor.eval()).teacher_forcing(h, actions, batch.states)
            errors.append(float((predicted - h[:, 1:]).abs().mean()))
    copied = float((h[:, :-1] - h[:, 1:]).abs().mean())
    assert float(row["val_jloss"]) == pytest.approx(errors[0], abs=1e-5)
    assert float(row["val_gap_copy_last"]) == pytest.approx(copied - errors[0], abs=1e-5)
    assert float(row["val_gap_shuffled_actions"]) == pytest.approx(errors[1] - errors[0], abs=1e-5)
    assert errors[1] != errors[0]


def test_one_held_out_episode_is_validated_without_another_to_compare_with(tmp_path):
    alone = make_cache(tmp_path, "split.seed=1")
    result = train(alone.config, alone.dataset, alone.scaler, tmp_path / "run", base=tmp_path)
    row = rows(result)[-1]
    assert row["val_jloss"] and not row["val_gap_copy_last"] and not row["val_gap_shuffled_actions"]


# --- LoRA -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(cache, tmp_path) -> Path:
    """Weights to start from."""
    return run(cache, tmp_path / "base", "train.num_steps=8").weights


LORA = ("train.lora_rank=2", "train.lora_dropout=0.1")


def test_lora_trains_the_adapters_alone_and_resumes_bit_for_bit(cache, tmp_path, base, monkeypatch):
    with pytest.raises(ValueError, match=r"train\.lora_rank is 2, but train\.init names no weights"):
        run(cache, tmp_path, *LORA)
    result = assert_resumes_bit_for_bit(cache, tmp_path, monkeypatch, *LORA, f"train.init={base}")
    kept = load_file(result.run / "checkpoints/latest/predictor.safetensors")
    assert all("lora_" in name for name in kept)
    before, after = load_file(base), load_file(result.weights)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    adapted = {f".{layer}.weight" for layer in ("qkv", "proj", "fc1", "fc2")}
    assert changed == {name for name in before if any(name.endswith(layer) for layer in adapted)}
    adapter = result.weights.parent / "adapter"
    assert {path.name for path in adapter.iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}
    run(cache, result.weights.parents[1], "train.num_steps=8")
    assert not adapter.exists(), "the adapter of an earlier training would be read as this one's"


# --- origin ---------------------------------------------------------------------------------------------------------------


def test_weights_of_another_encoder_are_refused_unless_allowed_and_that_is_recorded(cache, tmp_path, base):
    other = make_cache(tmp_path / "other", seed=7)
    start = make_config(f"train.init={base}", "train.num_steps=7")
    with pytest.raises(CheckpointError, match=r"tokens are those of encoder made:7.*trained on the tokens of made:0"):
        train(start, other.dataset, other.scaler, tmp_path / "run", base=tmp_path)
    allowed = replace(start, train=replace(start.train, allow_other_encoder=True))
    result = train(allowed, other.dataset, other.scaler, tmp_path / "run", base=tmp_path)
    assert read_card(result.weights)["description"]["origin"]["matches"] is False


def test_the_camera_s_pose_is_a_token_of_its_own_and_is_refused_where_there_is_none(cache, tmp_path):
    seeing = make_cache(tmp_path / "cache", "encode.action_space=pose7_extrinsics")
    few = ["plan.num_samples=10", "plan.num_rounds=1", "plan.horizons=[1]", "plan.starts_per_episode=1"]
    plain = make_config(
        "encode.action_space=pose7_extrinsics", "train.num_steps=4", "train.num_warmup=0", "train.num_anneal=0", *few
    )
    config = replace(plain, predictor=replace(plain.predictor, use_extrinsics=True, residual=True))
    with pytest.raises(
        ValueError, match=r"states of action space vpt13 hold no pose of the camera; set encode\.action_space=pose7_e"
    ):
        train(config, cache.dataset, cache.scaler, tmp_path / "refused", base=tmp_path)
    weights = train(config, seeing.dataset, seeing.scaler, tmp_path / "run", base=tmp_path).weights
    predictor, card = load_predictor(weights)
    assert card["architecture"]["residual"] and predictor.residual, "what the preset says reaches the predictor"
    assert card["architecture"]["use_extrinsics"] and predictor.num_conditioning_tokens == 3
    assert predictor.extrinsics_encoder.weight.count_nonzero() and predictor.state_encoder.in_features == 7
    with no_pictures():
        metrics = evaluate_run(config, seeing.dataset, weights, tmp_path / "evaluate")
    assert metrics["val"]["rollout_l1"] > 0
    plans = plan_run(config, seeing.dataset, weights, tmp_path / "plan")
    assert plans["searched"] == ["dx"] and plans["val"]["position_m_plan_h1"] >= 0
