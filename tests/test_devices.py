"""What all stages promise of the device that they compute on.

Claims:
- a GPU that is not there is refused by the name of its setting; neither TF32 nor cuDNN's attention is used unless asked for;
- a card that imitates bfloat16 is named, with the setting that asks for it, by all three stages; training tells which card it is on;
- an encoder in a user's own program leaves the number of torch threads alone where it computes on a GPU.
"""

import pytest
import torch

from jepa_cache.config.parsing import ConfigError
from jepa_cache.devices import resolve_device
from tests.emulated_cuda import emulated_cuda, on_emulated_cuda


def test_a_gpu_that_is_not_there_is_refused_by_the_name_of_its_setting(monkeypatch):
    for num_gpus, meant in ((0, ["cpu", "cpu"]), (2, ["cuda", "cpu"])):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=num_gpus: there > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda there=num_gpus: there)
        assert [resolve_device("train.device", wanted) for wanted in ("auto", "cpu")] == meant
    assert resolve_device("encode.device", "cuda") == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for key in ("train.device", "encode.device"):
        with pytest.raises(ConfigError, match=rf"{key} is 'cuda', but torch finds no GPU here"):
            resolve_device(key, "cuda")


def test_a_device_is_used_without_the_tf32_that_a_container_switched_on(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.set_float32_matmul_precision("high")
    resolve_device("train.device", "cpu")
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32


def test_cudnn_attention_is_admitted_by_the_environment_alone(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", (admitted := []).append)
    resolve_device("train.device", "cpu")
    monkeypatch.setenv("JEPA_ATTENTION", "cudnn")
    resolve_device("train.device", "cpu")
    monkeypatch.setenv("JEPA_ATTENTION", "fastest")
    with pytest.raises(ConfigError, match="JEPA_ATTENTION is flash or cudnn; got 'fastest'"):
        resolve_device("train.device", "cpu")
    assert admitted == [False, True]


@on_emulated_cuda
def test_a_card_that_imitates_bfloat16_is_named_by_all_stages():
    import contextlib
    import io
    import logging
    import tempfile
    from pathlib import Path

    from jepa_cache.encoding.groups import open_encoder
    from jepa_cache.encoding.task import load_encoder
    from jepa_cache.evaluation.context import open_evaluation
    from tests.caches import make_cache, make_config
    from tests.encoded import tiniest_config
    from tests.training.runs import run

    logging.getLogger("jepa_cache").addHandler(logging.StreamHandler(said := io.StringIO()))
    asked = ("train.device=cuda", "train.precision=bfloat16", "evaluate.precision=bfloat16", "train.num_steps=6")
    encode = tiniest_config(device="cuda", compute_dtype="bfloat16")
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch, emulated_cuda():
        patch.setenv("JEPA_RUNS_HOME", f"{folder}/runs")
        patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
        cache = make_cache(Path(folder))
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            load_encoder(open_encoder(encode, Path(folder)), encode.encode, 1)
            weights = run(cache, Path(folder), *asked, "train.loggers=[]").weights
            open_evaluation(make_config(*asked), cache.dataset, weights)
    told = [line.partition(", slowly")[0] for line in said.getvalue().splitlines()]
    assert told == ["emulated only imitates bfloat16"] * 3
    for setting in ("encode.compute_dtype", "train.precision", "evaluate.precision"):
        assert f"set {setting}=float16" in said.getvalue()
    assert "; cuda (emulated), 1 torch threads" in printed.getvalue()


@on_emulated_cuda
def test_an_encoder_of_a_users_program_leaves_its_torch_threads_alone_on_a_gpu():
    from pathlib import Path

    from jepa_cache.api import Encoder
    from jepa_cache.encoding.groups import open_encoder
    from jepa_cache.encoding.task import load_encoder
    from tests.encoded import tiniest_config

    config = tiniest_config(device="cuda")
    with emulated_cuda():
        torch.set_num_threads(3)
        assert Encoder.open(config, Path()).device.type == "cuda" and torch.get_num_threads() == 3
        load_encoder(open_encoder(config, Path()), config.encode, 2)  # as stage one does
        assert torch.get_num_threads() == 1
