"""What a training promises, with the true parts on a tiny cache.

Claims:
- killed by SIGKILL at any file operation, the same command ends with the weights and the CSV of an uninterrupted run, bit for bit; so
  does it after a kill half-way through a checkpoint that is written while training goes on;
- a finished run is not trained again; --fresh starts over, also after a kill half-way through forgetting;
- a loss or gradient that is not finite stops the training and overwrites nothing, and reaches no checkpoint, though it is read later;
- a disk that is full while a checkpoint is written in the background ends the training with that message;
- checkpoints are those of their steps, though they are copied while the next one is computed;
- going on with another torch or on another device is said, and checkpoints that do not know where they were made are read;
- other settings, scaler, manifest or code are another run; reader threads and checkpoint spacing are not, and move no number;
- a run or an output folder that another process holds is refused, and free again when that process is gone, however it ended;
- a checkpoint of another run is refused, and one of the first release, which does not say whose it is, is read;
- `train.init` takes a run folder, a file or a run's id; weights of other sizes are refused, difference by difference;
- starting weights that the training itself would overwrite are refused, and stay;
- bfloat16 runs on the CPU; clip_norm bounds the applied gradient; accumulated batches equal one large batch;
- the CSV's rates are the schedule's, and its validations fall where `validate_every` says;
- a manifest made with other settings is refused.
"""

import json
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from jepa_cache.data.dataset import find_differences, open_dataset
from jepa_cache.store.recipe import canonical_json, fingerprint
from jepa_cache.training import trainer
from jepa_cache.training.checkpoint import BackgroundWriter
from jepa_cache.training.optim import warmup_stable_decay
from jepa_cache.training.run import held
from jepa_cache.training.trainer import train
from tests.caches import make_config
from tests.training import runs as other_processes
from tests.training.runs import bits, content, read_csv, rows, run

pytestmark = pytest.mark.usefixtures("runs")


# --- killed and resumed ---------------------------------------------------------------------------------------------------


@pytest.fixture
def train_at(cache, tmp_path):
    """Train in a process of its own, in a folder of tmp_path; returns how it ended."""

    def started(name: str, *words: str, kill_at: int | None = None) -> int:
        words = words if kill_at is None else (*words, f"kill_at={kill_at}")
        process = other_processes.start(cache, tmp_path / name, *words)
        code = process.wait()
        assert code in (0, -signal.SIGKILL), process.text
        return code

    return started


def outcome(folder: Path) -> tuple[tuple, list[dict[str, str]]]:
    return content(folder / "out/run/predictor.safetensors"), read_csv(folder / "out/run")


@pytest.mark.parametrize(
    ("words", "moments"),
    [((), range(3, 124, 15)), (("train.grad_accumulation=2", "train.checkpoint_every=3"), range(20, 131, 36))],
    ids=["plain", "accumulating"],
)
def test_killed_at_any_file_operation_the_same_command_ends_like_an_uninterrupted_run(
    train_at, tmp_path, words, moments
):
    train_at("whole", *words)
    expected, count = outcome(tmp_path / "whole"), int((tmp_path / "whole/count").read_text())
    assert len(expected[1]) == 6 and moments[-1] <= count < moments[-1] + 22, "the moments span the whole training"
    for moment in moments:
        name = f"at-{moment}"
        assert (train_at(name, *words, kill_at=moment), train_at(name, *words)) == (-signal.SIGKILL, 0)
        assert outcome(tmp_path / name) == expected, f"other weights or rows after a kill at file operation {moment}"
        (folder,) = (tmp_path / name).glob("runs/*/checkpoints")
        left = sorted(path.name for path in folder.iterdir())
        assert left[:2] == ["best", "latest"] and len(left) in (4, 5), f"{left} are left after file operation {moment}"


@pytest.mark.parametrize("write", [1, 2])
def test_killed_half_way_through_a_checkpoint_while_training_goes_on_it_ends_like_an_uninterrupted_run(
    train_at, tmp_path, write
):
    words = ("train.checkpoint_every=4", "train.validate_every=0", "train.log_every=6")
    for name, more in (("whole", ()), ("killed", (f"kill_in_write_at={write}",)), ("killed", ())):
        code = train_at(name, *words, *more)
        assert code == (-signal.SIGKILL if more else 0)
        if more:
            (folder,) = (tmp_path / name).glob("runs/*/checkpoints")
            published = sorted(path.name for path in folder.glob("step-*"))
            assert published == ["step-00000004"][: write - 1], "of a checkpoint that is half written nothing is seen"
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def test_killed_while_it_forgets_a_run_the_next_training_is_still_right(train_at, tmp_path):
    train_at("whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again", symlinks=True)
    for moment in (1, 3, 6, 12):
        assert (train_at("again", "fresh", kill_at=moment), train_at("again")) == (-signal.SIGKILL, 0)
        assert outcome(tmp_path / "again") == outcome(tmp_path / "whole"), f"killed at file operation {moment}"


# --- finished, fresh, other ----------------------------------------------------------------------------------------------


def test_a_finished_run_is_not_trained_again_and_its_results_are_written_again(cache, tmp_path, monkeypatch, capsys):
    first = run(cache, tmp_path)
    weights = content(first.weights)
    shutil.rmtree(tmp_path / "run")
    monkeypatch.setattr(trainer, "train_step", None)
    again = run(cache, tmp_path)
    assert (first.num_trained, again.num_trained) == (12, 0)
    assert content(again.weights) == weights and len(rows(again)) == 6
    assert "complete" in capsys.readouterr().out


def test_reader_threads_spacing_and_fresh_move_no_number_and_name_no_other_run(cache, tmp_path):
    plain = run(cache, tmp_path / "a")
    other = run(cache, tmp_path / "b", "train.num_loader_threads=3", "train.checkpoint_every=5", fresh=True)
    assert other.num_trained == 12 and other.run == plain.run
    assert content(other.weights) == content(plain.weights) and rows(other) == rows(plain)


# --- two at once ---------------------------------------------------------------------------------------------------------


def test_a_run_or_an_output_folder_that_another_holds_is_refused_before_it_touches_a_row(cache, tmp_path, runs):
    whole = run(cache, tmp_path)
    with held(whole.run, "held"):
        for fresh in (False, True):
            with pytest.raises(ValueError, match=rf"run {whole.run.name} is being trained by another.*train\.seed"):
                run(cache, tmp_path, fresh=fresh)
        assert (whole.run / "checkpoints/latest").exists()
        assert run(cache, tmp_path / "other", "train.seed=9").num_trained == 12
    with held(tmp_path / "new/run", "held"), pytest.raises(ValueError, match=r"another training writes to .*checkout"):
        run(cache, tmp_path / "new", "train.seed=8")
    assert not (tmp_path / "new/live").exists() and len([path for path in runs.iterdir() if path.is_dir()]) == 2
    assert run(cache, tmp_path).num_trained == 0
    assert not list(runs.glob("*.lock"))


def test_a_checkpoint_of_another_run_is_refused_and_one_that_does_not_say_whose_it_is_is_read(cache, tmp_path):
    one = run(cache, tmp_path)
    other = run(cache, tmp_path, "train.seed=9", "train.num_steps=20")
    shutil.copytree(other.run / "checkpoints/step-00000020", copied := one.run / "checkpoints/step-00000020")
    with pytest.raises(ValueError, match=rf"step-00000020 is of run {other.run.name}, not of {one.run.name}"):
        run(cache, tmp_path)
    shutil.rmtree(copied)
    state = json.loads((newest := one.run / "checkpoints/step-00000012/state.json").read_text())
    first_release = {key: state[key] for key in ("best", "num_threads", "sha256", "step")}
    del first_release["sha256"]["train.csv"]
    newest.write_bytes(canonical_json({**first_release, "digest": fingerprint(first_release)}))
    assert run(cache, tmp_path).num_trained == 0


# --- not finite ----------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_overwrites_nothing_and_names_the_windows(cache, tmp_path, runs, monkeypatch):
    kept = run(cache, tmp_path)
    monkeypatch.setattr(trainer, "rates_at", lambda *_: (1e36, 0.0))  # settings allow no such rate
    before = {path: path.read_bytes() for path in kept.weights.parent.iterdir()}
    wild = ("train.lr=1", "train.log_every=1")
    said = r"training step 2 the loss is nan.*nothing was overwritten, {}, and the windows .*failed-step-00000002-process-0"
    with pytest.raises(ValueError, match=said.format("there was no checkpoint yet")):
        run(cache, tmp_path, *wild)
    with pytest.raises(ValueError, match=said.format("the last checkpoint is .*step-00000001")):
        run(cache, tmp_path, *wild, "train.checkpoint_every=1")
    assert {path: path.read_bytes() for path in kept.weights.parent.iterdir()} == before
    (folder,) = (path for path in runs.iterdir() if path != kept.run)
    assert [path.name for path in sorted((folder / "checkpoints").glob("step-*"))] == ["step-00000001"]
    assert len((folder / "train.csv").read_text().splitlines()) == 2
    named = json.loads((folder / "failed-step-00000002-process-0.json").read_text())
    training = {segment.episode for segment in cache.dataset.segments_of("train", cache.config.split)}
    assert len(named) == 4 and {window["episode"] for window in named} <= training
    assert all(0 <= window["start"] <= 25 and window["num_steps"] == 5 for window in named)


@pytest.mark.parametrize("spoiled", [2, 3, 4])
@pytest.mark.parametrize("every", [1, 3])
def test_a_step_that_is_not_finite_reaches_no_checkpoint_and_is_the_one_that_is_named(
    cache, tmp_path, runs, monkeypatch, spoiled, every
):
    step = trainer.train_step

    def planted(accelerator, model, optimizer, *rest):
        report = step(accelerator, model, optimizer, *rest)
        if rest[-1] < spoiled:
            return report
        for group in optimizer.param_groups:
            group["params"][0].data.fill_(float("nan"))
        return report._replace(grad_norm=report.grad_norm * float("nan"))

    monkeypatch.setattr(trainer, "train_step", planted)
    with pytest.raises(ValueError, match=rf"at training step {spoiled} .* norm of its gradient nan"):
        run(cache, tmp_path, f"train.checkpoint_every={every}", "train.log_every=12", "train.validate_every=0")
    published = [path for path in runs.glob("*/checkpoints/step-*") if path.is_dir()]
    assert (
        max((int(path.name.removeprefix("step-")) for path in published), default=0) == (spoiled - 1) // every * every
    )
    for path in published:
        assert all(bool(t.isfinite().all()) for t in load_file(path / "predictor.safetensors").values())
    assert not (tmp_path / "run/predictor.safetensors").exists()


def test_a_full_disk_in_the_background_ends_the_training_at_the_next_step(cache, tmp_path, monkeypatch):
    done, step = [], trainer.train_step

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    def counted(*arguments):
        done.append(arguments[-1])
        time.sleep(0.2 * (len(done) > 2))  # so that the write of step 2 has ended by then
        return step(*arguments)

    monkeypatch.setattr(trainer, "save_checkpoint", full)
    monkeypatch.setattr(trainer, "train_step", counted)
    with pytest.raises(OSError, match="No space left"):
        run(cache, tmp_path, "train.checkpoint_every=2", "train.log_every=1")
    assert done == [1, 2, 3]


def test_checkpoints_are_those_of_their_steps_though_they_are_copied_when_the_next_step_wants_to_change_them(
    cache, tmp_path, monkeypatch
):
    def train() -> list[dict[str, bytes]]:
        result = run(cache, tmp_path, "train.checkpoint_every=3", "train.keep_last=9", fresh=True)
        return [bits(path) for path in sorted(result.run.glob("checkpoints/step-*/predictor.safetensors"))]

    plain, changing, take, settle = train(), threading.Event(), BackgroundWriter._take, BackgroundWriter.settle

    def settled(writer: BackgroundWriter) -> None:
        changing.set()
        settle(writer)
        changing.clear()

    monkeypatch.setattr(BackgroundWriter, "_take", lambda *given: (changing.wait(2), take(*given))[1])
    monkeypatch.setattr(BackgroundWriter, "settle", settled)
    assert len(plain) == 4 and train() == plain


def test_going_on_elsewhere_is_said_once(cache, tmp_path, capsys):
    kept = ("train.checkpoint_every=6", "train.keep_every=6")
    whole = run(cache, tmp_path, *kept)
    here = json.loads((whole.run / "checkpoints/step-00000012/state.json").read_text())["machine"]
    assert here == {"device": "cpu", "torch": torch.__version__}
    for machine, said in (
        (
            {**here, "torch": "2.6.0"},
            f"on another machine (torch: '2.6.0' -> '{torch.__version__}'), so not bit for bit",
        ),
        ({**here, "device": "NVIDIA H100"}, "on another machine (device: 'NVIDIA H100' -> 'cpu'), so not bit for bit"),
        (here, "resumes at training step 6 of 12; --fresh"),
        (None, "resumes at training step 6 of 12; --fresh"),
    ):
        for path in (whole.run / "checkpoints").glob("step-*"):
            if path.name > "step-00000006":
                shutil.rmtree(path)
        path = whole.run / "checkpoints/step-00000006/state.json"
        state = {name: it for name, it in json.loads(path.read_text()).items() if name not in ("digest", "machine")}
        state |= {"machine": machine} if machine else {}
        path.write_bytes(canonical_json({**state, "digest": fingerprint(state)}))
        capsys.readouterr()
        run(cache, tmp_path, *kept)
        assert said in capsys.readouterr().out


# --- train.init ----------------------------------------------------------------------------------------------------------

STILL = (
    *("train.num_steps=1", "train.num_warmup=0", "train.num_anneal=0"),
    *("train.lr=1e-12", "train.weight_decay=0", "train.seed=5"),
)


def test_init_may_not_name_the_file_that_the_training_overwrites(cache, tmp_path):
    first = run(cache, tmp_path)
    before = first.weights.read_bytes()
    (tmp_path / "link").symlink_to(first.weights.parent)
    for reference in (first.weights.parent, first.weights, "run", "link"):
        with pytest.raises(ValueError, match=r"overwrites at its end.*Copy the file elsewhere"):
            run(cache, tmp_path, *STILL, f"train.init={reference}")
    assert first.weights.read_bytes() == before
    assert run(cache, tmp_path, *STILL, f"train.init={first.run.name}").num_trained == 1


def test_init_takes_a_run_folder_a_file_and_the_id_of_a_run_and_means_the_same_run_by_each(cache, tmp_path):
    first = run(cache, tmp_path / "first")
    trained, started = load_file(first.weights), []
    by_content = first.weights.parent, first.weights, tmp_path / "first/run"
    for reference in (*by_content, first.run.name, first.run):
        started.append(run(cache, tmp_path / "second", *STILL, f"train.init={reference}"))
        weights = load_file(started[-1].weights)
        assert all(torch.allclose(weights[name], trained[name], atol=1e-9) for name in trained), reference
    assert len({result.run for result in started[: len(by_content)]}) == 1
    assert run(cache, tmp_path / "third", *STILL).run not in {result.run for result in started}


def test_init_that_names_nothing_or_other_sizes_says_so(cache, tmp_path):
    with pytest.raises(ValueError, match=r"train\.init='nothing' names no weights; tried .*nothing/predictor\.safeten"):
        run(cache, tmp_path, "train.init=nothing")
    (tmp_path / "run/adapter").mkdir(parents=True)
    (tmp_path / "run/adapter/adapter_config.json").touch()
    with pytest.raises(ValueError, match=rf"is a LoRA adapter.* take {tmp_path}/run/predictor.safetensors"):
        run(cache, tmp_path, f"train.init={tmp_path}/run/adapter")
    config = make_config("train.num_steps=6")
    wide = replace(config, predictor=replace(config.predictor, predictor_dim=24))
    other = train(wide, cache.dataset, cache.scaler, tmp_path / "wide/run", base=tmp_path)
    with pytest.raises(ValueError, match=r"predictor_embed\.weight is \[24, 8\] in the file, \[16, 8\] here") as error:
        run(cache, tmp_path, f"train.init={other.weights}")
    # All but the bias of predictor_proj.
    assert str(error.value).count("shape:") == len(load_file(other.weights)) - 1


# --- arithmetic ----------------------------------------------------------------------------------------------------------


def test_bfloat16_runs_on_the_cpu_and_is_close_to_float32(cache, tmp_path):
    exact = run(cache, tmp_path / "a")
    AcceleratorState._reset_state(reset_partial_state=True)
    rough = run(cache, tmp_path / "b", "train.precision=bfloat16")
    assert {tensor.dtype for tensor in load_file(rough.weights).values()} == {torch.float32}
    first, second = (float(rows(result)[0]["total"]) for result in (exact, rough))
    assert first != second, "bfloat16 gave float32's numbers"
    assert abs(first - second) < 0.05 * first  # bfloat16 keeps 8 bits


@pytest.mark.parametrize("accumulation", [1, 2])
def test_clip_norm_bounds_the_gradient_that_is_applied(cache, tmp_path, monkeypatch, accumulation):
    applied, build = [], trainer.build_optimizer

    def watched(model, **rates):
        optimizer = build(model, **rates)

        def look(*_: object) -> None:
            grads = [parameter.grad.flatten() for group in optimizer.param_groups for parameter in group["params"]]
            applied.append(float(torch.cat(grads).norm()))

        optimizer.register_step_pre_hook(look)
        return optimizer

    monkeypatch.setattr(trainer, "build_optimizer", watched)
    result = run(
        cache, tmp_path, "train.clip_norm=0.01", f"train.grad_accumulation={accumulation}", "train.log_every=1"
    )
    assert len(applied) == 12 and max(applied) <= 0.01 * (1 + 1e-4)
    assert min(float(row["grad_norm"]) for row in rows(result)) > 0.1, "the CSV shows the norm before clipping"


def test_two_accumulated_batches_of_four_equal_one_of_eight(cache, tmp_path):
    large = run(cache, tmp_path / "a", "train.batch_size=8")
    halves = run(cache, tmp_path / "b", "train.batch_size=4", "train.grad_accumulation=2")
    for one, other in zip(rows(large), rows(halves), strict=True):
        assert one["epoch"] == other["epoch"] and one["lr"] == other["lr"]
        for name in ("total", "jloss", "sloss", "grad_norm", "val_jloss", "val_sloss"):
            # Sums of other order: float32 rounding, which Adam's division enlarges.
            assert float(one[name] or 0) == pytest.approx(float(other[name] or 0), rel=1e-3), name


def test_rates_are_the_schedule_s_and_validations_fall_where_they_are_due(cache, tmp_path):
    result = run(cache, tmp_path, "train.log_every=4", "train.validate_every=5")
    rates = {"num_steps": 12, "num_warmup": 2, "num_anneal": 4, "start_lr": 0.001, "peak_lr": 0.003, "final_lr": 0.0}
    steps = [int(row["step"]) for row in rows(result)]
    assert steps == [4, 5, 8, 10, 12]
    assert [float(row["lr"]) for row in rows(result)] == [warmup_stable_decay(k, **rates) for k in steps]
    assert [int(row["step"]) for row in rows(result) if row["val_jloss"]] == [5, 10, 12]


# --- the manifest ---------------------------------------------------------------------------------------------------------


def test_a_manifest_made_with_other_settings_is_refused(cache):
    root = f"cache.root={cache.root.path}"
    config = make_config(root)
    assert len(open_dataset(config, cache.folder).segments) == 8
    for override in (
        *("dataset=vpt", "encoder=vitl", "encode.mode=tubelet", "encode.fps=4", "encode.action_space=vpt36"),
        *("encode.cameras=[wrist]", "encode.phases=[0,1]", "encode.pool=2"),
    ):
        with pytest.raises(ValueError, match=rf"other settings \({override.partition('=')[0]} is .*encode\.py"):
            open_dataset(make_config(root, override), cache.folder)
    other = replace(config.dataset, source_options={**config.dataset.source_options, "schema": "simple"})
    (words,) = find_differences(replace(config, members=((other, 1.0),)), cache.dataset.manifest)
    assert words == "source_options.schema of sample is 'simple', the manifest has 'contractor'"
