"""What a training promises about the device that it runs on.

Claims:
- what `accelerate config` or `accelerate launch` left in the environment changes no bit: precision and compilation are those of the settings;
- a number or switch of a launcher that is none, and a rank that its launch does not have, are refused by name before processes are waited for;
- FSDP, DeepSpeed and the like, another device than the settings', FlexAttention on a CPU, and two processes with one GPU are refused in words;
- a compiled training keeps the graphs of its blocks whole between several processes, and lets the compiler measure nothing where it is
  `train.deterministic`;
- `train.deterministic` switches torch's deterministic kernels on for the training alone, and moves no bit on a CPU;
- a GPU whose memory is full ends a stage in one message that names the settings.
"""

import pytest
import torch
from accelerate.state import AcceleratorState

from jepa_cache.cli.stage import run_stage
from jepa_cache.devices import repeatable
from jepa_cache.training import trainer
from jepa_cache.training.distributed import check_own_gpus
from tests.training.runs import bits, content, rows, run

pytestmark = pytest.mark.usefixtures("runs")

HOSTILE = {
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_DYNAMO_BACKEND": "inductor",
    "ACCELERATE_DYNAMO_MODE": "max-autotune",
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "true",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_DOWNCAST_BF16": "true",
    "ACCELERATE_USE_FSDP": "false",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1",
}


def test_what_accelerate_left_in_the_environment_changes_no_bit(cache, tmp_path, monkeypatch):
    plain = run(cache, tmp_path / "plain")
    AcceleratorState._reset_state(reset_partial_state=True)
    for name, value in HOSTILE.items():
        monkeypatch.setenv(name, value)
    again = run(cache, tmp_path / "hostile", fresh=True)
    assert again.num_trained == 12
    assert content(plain.weights) == content(again.weights) and rows(plain) == rows(again)


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG", "SAGEMAKER"])
def test_an_environment_that_would_shard_the_predictor_is_refused(cache, tmp_path, monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ValueError, match=rf"ACCELERATE_USE_{name} is set, but .*DDP.*accelerate config"):
        run(cache, tmp_path)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ("WORLD_SIZE=x", "WORLD_SIZE must be an integer; got 'x'"),
        ("LOCAL_RANK=", "LOCAL_RANK must be an integer; got ''"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS=1.5", ".*_STEPS must be an integer; got '1.5'"),
        ("ACCELERATE_TORCH_DEVICE=gpu", "ACCELERATE_TORCH_DEVICE must be cpu or cuda; got 'gpu'"),
        ("ACCELERATE_USE_CPU=maybe", "ACCELERATE_USE_CPU must be true or false; got 'maybe'"),
        ("RANK=3 WORLD_SIZE=2 LOCAL_RANK=0", "RANK must be below WORLD_SIZE, .*; got 3 of 2"),
        (
            "RANK=0 WORLD_SIZE=2 LOCAL_RANK=1 LOCAL_WORLD_SIZE=1",
            "LOCAL_RANK must be below LOCAL_WORLD_SIZE, .*; got 1 of 1",
        ),
    ],
)
def test_what_no_launcher_can_mean_is_refused_by_name(cache, tmp_path, monkeypatch, variables, said):
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda **_: pytest.fail("waits for others"))
    for name, _, value in (word.partition("=") for word in f"{variables} MASTER_ADDR=127.0.0.1 MASTER_PORT=1".split()):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=rf"^the environment variable {said}.*torchrun.*unset"):
        run(cache, tmp_path)


def test_another_device_than_the_settings_is_refused(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cuda")
    with pytest.raises(
        ValueError, match=r"train\.device is 'cpu', here cpu, but Accelerate.* cuda; unset ACCELERATE_USE"
    ):
        run(cache, tmp_path)


def test_flex_attention_is_refused_on_a_cpu_before_anything_is_trained(cache, tmp_path):
    with pytest.raises(ValueError, match=r"train\.compile=flex needs a GPU: .* Set it to false or true"):
        run(cache, tmp_path, "train.compile=flex")
    assert not list(tmp_path.iterdir())


def test_compiled_blocks_are_not_split_at_the_buckets_of_ddp_and_tuned_only_where_bits_may_change(
    cache, tmp_path, monkeypatch
):
    import torch._inductor.config as inductor

    dynamo, seen = torch._dynamo.config, []
    monkeypatch.setattr(dynamo, "optimize_ddp", True)
    monkeypatch.setattr(inductor, "deterministic", False)
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda block: seen.append((dynamo.optimize_ddp, inductor.deterministic))
    )
    for wanted in (True, False):
        run(cache, tmp_path / str(wanted), "train.compile=true", "train.num_steps=6", f"train.deterministic={wanted}")
        assert set(seen) == {(False, wanted)}
        seen.clear()


def test_two_processes_with_one_gpu_are_refused_by_their_numbers():
    check_own_gpus(["a GPU-1", "a GPU-2", "b GPU-1"])
    with pytest.raises(
        ValueError, match=r"processes 1, 3 have one GPU \(a GPU-2\).*--nproc-per-node.*--gpus-per-task=1"
    ):
        check_own_gpus(["a GPU-1", "a GPU-2", "b GPU-1", "a GPU-2"])


@pytest.mark.parametrize("wanted", ["auto", "true", "false"])
def test_deterministic_kernels_are_for_the_training_alone_and_move_no_bit_on_a_cpu(
    cache, tmp_path, monkeypatch, wanted
):
    plain, seen, step = run(cache, tmp_path / "auto"), [], trainer.train_step

    def watched(*arguments):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return step(*arguments)

    monkeypatch.setattr(trainer, "train_step", watched)
    again = run(cache, tmp_path / "wanted", f"train.deterministic={wanted}", fresh=True)
    assert set(seen) == {wanted == "true"} and not torch.are_deterministic_algorithms_enabled()
    assert bits(plain.weights) == bits(again.weights)
    for wanted, device, on in (("auto", "cuda", True), ("auto", "cpu", False), (False, "cuda", False)):
        with repeatable(torch.device(device), wanted):
            assert torch.are_deterministic_algorithms_enabled() == on


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has\na second line"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_full_gpu_is_one_message_that_names_the_settings_and_other_errors_keep_their_traceback(error):
    def fail(with_this):
        raise with_this

    with pytest.raises(RuntimeError, match="illegal"):
        run_stage(lambda: fail(RuntimeError("CUDA error: an illegal memory access was encountered")))
    with pytest.raises(SystemExit) as ended:
        run_stage(lambda: fail(error))
    text = str(ended.value)
    assert text.startswith("error: the GPU's memory is full (CUDA ") and "a second line" not in text
    for setting in ("train.batch_size", "grad_accumulation", "activation_checkpointing", "encode.batch_size"):
        assert setting in text
    assert "evaluate.batch_size" in text
