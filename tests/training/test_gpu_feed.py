"""What a training does on a GPU, shown on an emulated one (see tests/emulated_cuda.py).

Claims:
- batches arrive whole, of plain and of coded tokens, though copies are late and their buffers are filled again;
- training steps between rows and checkpoints copy nothing from ordinary memory, and wait for no more than the training step before;
- validations copy nothing from or to ordinary memory but their row, though they give windows another episode's actions;
- a checkpoint is copied without waiting, in page-locked memory that another thread has made before, and is that of its step though training goes on;
- losses are those of the CPU, of a compressed predictor too;
- another GPU than the current one, whose streams everything waits for, is refused.
"""

import tempfile
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from threading import current_thread

import pytest

from tests.emulated_cuda import emulated_cuda, on_emulated_cuda


@on_emulated_cuda
def test_batches_arrive_whole_though_their_copies_are_late():
    import torch

    from jepa_cache.data.loader import WindowLoader, to_device
    from jepa_cache.data.windows import WindowIndex
    from tests.caches import make_cache

    for dtype in ("float16", "int8"):
        with tempfile.TemporaryDirectory() as folder:
            cache = make_cache(Path(folder), f"encode.dtype={dtype}")
            index = WindowIndex(cache.dataset.segments_of("train", cache.config.split), 5)
            parts, numbers = (cache.dataset, index, cache.scaler), [[4 * n, 1, 7, n] for n in range(8)]
            expected = [to_device(WindowLoader(*parts).read(few), torch.device("cpu")) for few in numbers]
            for num_threads in (1, 3):
                with emulated_cuda() as counts:
                    loader = WindowLoader(*parts, num_threads=num_threads)
                    got = [
                        tuple(part + 0 for part in batch[:3])
                        for batch in loader.iterate(numbers, torch.device("cuda:0"))
                    ]
                    assert not counts.pageable
                    assert {thread.split("_")[0] for _, thread in counts.synchronisations} == {"load"}
                    got = [tuple(part.cpu() for part in parts) for parts in got]
                for batch, other in zip(expected, got, strict=True):
                    for part, name in zip(other, ("tokens", "actions", "states"), strict=True):
                        assert torch.equal(part, getattr(batch, name).to(part.dtype)), (dtype, num_threads, name)


@on_emulated_cuda
def test_a_training_waits_for_nothing_but_the_step_before_and_its_checkpoints_are_those_of_their_steps():
    import safetensors.torch
    import torch
    from accelerate.state import AcceleratorState

    from jepa_cache.training import trainer
    from jepa_cache.training.checkpoint import BackgroundWriter
    from tests.caches import make_cache, make_config
    from tests.training.runs import rows

    train_step, validate, waits, during, weights = trainer.train_step, trainer.validate, [], [], {}
    save, saved, made = BackgroundWriter.save, [], []
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("JEPA_RUNS_HOME", f"{folder}/runs")
        cache = make_cache(Path(folder))

        def train(device: str) -> trainer.TrainResult:
            words = ("train.num_steps=11", "train.log_every=5", "train.checkpoint_every=4", "train.validate_every=10")
            config = make_config(*words, f"train.device={device}", "train.keep_last=9", "train.loggers=[]")
            AcceleratorState._reset_state(reset_partial_state=True)
            out = Path(folder, device)
            return trainer.train(config, cache.dataset, cache.scaler, out / "run", base=out)

        on_cpu = train("cpu")
        with emulated_cuda() as counts:

            def watched(accelerator, model, *rest):
                waits.append(Counter(name for name, thread in counts.synchronisations if thread == "MainThread"))
                during.extend(counts.pageable if rest[-1] > 1 else ())
                counts.reset()
                report = train_step(accelerator, model, *rest)
                named = model.predictor.named_parameters()
                weights[rest[-1]] = {name: it.detach().inner.clone() for name, it in named}
                return report

            def watched_validate(*rest):
                before = len(counts.pageable), len(counts.synchronisations)
                row = validate(*rest)
                during.extend(counts.pageable[before[0] :])
                waited = [it for it in counts.synchronisations[before[1] :] if it[1] == "MainThread"]
                assert waited == [("tolist", "MainThread")], waited
                return row

            def watched_save(*given):
                before = made.count("MainThread")
                save(*given)
                saved.append(made.count("MainThread") - before)

            empty = torch.empty
            patch.setattr(torch, "empty", lambda *it, **how: (made.append(current_thread().name), empty(*it, **how))[1])
            patch.setattr(BackgroundWriter, "save", watched_save)
            patch.setattr(trainer, "train_step", watched)
            patch.setattr(trainer, "validate", watched_validate)
            on_gpu = train("cuda")
        assert not during
        assert saved == [0, 0, 0, 0] and made.count("checkpoint_0") > 20, (saved, Counter(made))
        for step, waited in enumerate(waits[2:], start=2):  # before step + 1
            assert waited["event.synchronize"] <= 1 + (step % 4 == 0 or step % 5 == 0), (step, waited)
            assert set(waited) <= {
                "event.synchronize",
                *(("tolist", "_local_scalar_dense") if step % 5 == 0 else ()),
            }, step
        for step in (4, 8):
            kept = safetensors.torch.load_file(on_gpu.run / f"checkpoints/step-{step:08d}/predictor.safetensors")
            assert all(torch.equal(kept[name], it) for name, it in weights[step].items()), step
        for one, other in zip(rows(on_cpu), rows(on_gpu), strict=True):
            for name in ("total", *(("val_jloss", "val_gap_shuffled_actions") if one["step"] == "10" else ())):
                assert float(one[name]) == pytest.approx(float(other[name]), rel=1e-5, abs=1e-6)  # another attention
        assert [row["copy_wait_share"] for row in rows(on_gpu)] == ["0.0"] * 3


@on_emulated_cuda
def test_a_compressed_predictor_is_fitted_and_trained_where_the_tokens_are():
    from accelerate.state import AcceleratorState

    from tests.caches import make_cache
    from tests.training.runs import rows, run

    found = []
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("JEPA_RUNS_HOME", f"{folder}/runs")
        cache = make_cache(Path(folder))
        for device in ("cpu", "cuda"):
            AcceleratorState._reset_state(reset_partial_state=True)
            words = (f"train.device={device}", "predictor=compressed", "train.num_steps=6", "train.loggers=[]")
            with emulated_cuda() if device == "cuda" else nullcontext():
                found.append(rows(run(cache, Path(folder, device), *words)))
    on_cpu, on_gpu = found
    for one, other in zip(on_cpu, on_gpu, strict=True):
        assert float(one["total"]) == pytest.approx(float(other["total"]), rel=1e-6)


@on_emulated_cuda
def test_another_gpu_than_the_current_one_is_refused():
    from jepa_cache.training.distributed import start_processes
    from tests.caches import make_config

    with emulated_cuda(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_TORCH_DEVICE", "cuda:1")
        with pytest.raises(
            ValueError, match=r"train\.device is 'auto', here cuda, but .* cuda:1; unset .*CUDA_VISIBLE_DEVICES=1"
        ):
            start_processes(make_config("train.device=auto").train)
