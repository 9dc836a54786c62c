"""Claims: params.yaml and presets resolve to typed values with a known origin; what cannot work is refused by name."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from jepa_cache.config.loading import REPOSITORY_ROOT, is_override, load_config
from jepa_cache.config.machine import resolve_device
from jepa_cache.config.parsing import ConfigError
from jepa_cache.config.schema import TrainConfig
from tests.workspace import SUITE_SETTINGS


def edit(root, old, new, file="params.yaml"):
    text = (root / file).read_text()
    assert old in text
    (root / file).write_text(text.replace(old, new, 1))


def test_null_means_as_the_preset_says_and_a_value_overrides_it(root):
    assert load_config(root).train.lr == 0.004
    config = load_config(root, ["train.lr=3e-4"])
    assert config.train.lr == pytest.approx(3e-4)
    assert config.origins["train.lr"] == "command line"
    assert config.origins["train.weight_decay"] == "configs/train/demo.yaml"


def test_an_int_passes_for_a_float_and_every_value_that_breaks_a_rule_is_named(root):
    lr = load_config(root, ["train.lr=1"]).train.lr
    assert (lr, type(lr)) == (1.0, float)
    with pytest.raises(
        ConfigError, match=r"train\.lr must be above 0; got 0(.|\n)*train\.metric is 'loss'; did you mean"
    ):
        load_config(root, ["train.lr=0", "train.metric=loss"])


def test_scientific_notation_without_a_dot_is_a_number(root):
    edit(root, "  lr: null", "  lr: 3e-4")
    assert load_config(root).train.lr == pytest.approx(3e-4)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("  seed: 0\n  init", "  sed: 0\n  init", r"unknown key 'sed'; did you mean 'seed'"),
        ("encoder: tiny", "encoder: vitll", r"no such preset; did you mean 'vitl'"),
        ("dataset: sample", "datset: sample", r"unknown key 'datset'; did you mean 'dataset'"),
        ("  batch_size: null     # encoder", "  batch_size: many  # encoder", r"batch_size must be of type int"),
        ("  lr: null", "  lr: true", r"lr must be of type float"),
        ("  schedule: null", "  schedule: wds", r"train.schedule is 'wds'; did you mean 'wsd'"),
    ],
)
def test_a_misspelt_key_or_wrong_type_is_refused_with_the_way_out(root, old, new, words):
    edit(root, old, new)
    with pytest.raises(ConfigError, match=words):
        load_config(root)


def test_an_unknown_key_in_a_preset_names_its_file(root):
    edit(root, "depth: 2", "dept: 2", "configs/predictor/tiny.yaml")
    with pytest.raises(
        ConfigError, match=r"configs/predictor/tiny.yaml has the unknown key 'dept'; did you mean 'depth'"
    ):
        load_config(root)


SEEDED = ("split", "train", "evaluate", "plan")
NOT_NEGATIVE = (
    "start_lr",
    "final_lr",
    "weight_decay",
    "final_weight_decay",
    "validate_every",
    "num_threads",
    "num_warmup",
)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.auto_steps=8", "train.auto_steps 8 needs a window of 9 steps"),
        ("train.num_steps=100", "exceed train.num_steps 100"),
        ("train.window_steps=1", "at least 2"),
        ("filter.idle_cut_end=10", "above 0 only with filter.drop_idle; got 10 with drop_idle false"),
        ("filter.min_steps=0", "filter.min_steps must be above 0"),
        ("split.val_share=1.5", r"split\.val_share must be at most 1 \(a share\); got 1\.5"),
        ("encode.weights=x.pt", "has seeded random weights"),
        ("evaluate.num_bootstrap=99", r"evaluate\.num_bootstrap must be at least 100 .*; got 99"),
        ("evaluate.measure=energy", r"measure must be a list of str; got 'energy' \(str\); write \[energy\]"),
        ("evaluate.measure=[energy,noise,energy]", r"evaluate\.measure names 'energy' 2 times; name it once"),
        ("train.loggers=[dvclive,dvclive]", r"train\.loggers names 'dvclive' 2 times"),
        ("plan.horizons=2", r"horizons must be a list of int; got 2 \(int\); write \[2\]"),
        ("plan.max_turn_deg=400.0", r"plan\.max_turn_deg must be at most 180 \(half a circle.*; got 400\.0"),
        ("plan.max_rotation_rad=3.2", r"plan\.max_rotation_rad must be at most 3\.14159 .*; got 3\.2"),
        ("plan.num_timed=2", r"'plan\.num_timed', which was removed: benchmarks/planner\.py times"),
        ("plan.max_turn_deg=.nan", r"max_turn_deg must be a finite number; got nan"),
        *((f"{section}.seed=-1", rf"{section}\.seed must not be below 0 .*; got -1") for section in SEEDED),
        *((f"{section}.seed={2**64}", rf"{section}\.seed must be below 4294967296 .*; got") for section in SEEDED),
        *((f"train.{key}=-1", rf"train\.{key} must not be below 0; got -1") for key in NOT_NEGATIVE),
        ("train.device=foo", r"train\.device is 'foo'; known: auto, cpu, cuda"),
        ("train.device=cuda:1", r"train\.device is 'cuda:1'; did you mean 'cuda'"),
        ("encode.device=gpu", r"encode\.device is auto, cpu, cuda or cuda:<number of the GPU>; got 'gpu'"),
        ("encode.dtype=float64", "encode.dtype is 'float64'"),
        *((f"encode.phases={it}", r"encode\.phases is .*; got") for it in ("[0, 0]", "[-1]", "[]", "every")),
        ("encode.cameras=[wrist, wrist]", r"encode\.cameras names 'wrist' 2 times"),
        ("encode.dtype=fp8", "known: bfloat16, float16, float8_e4m3, int4, int8"),
        ("evaluate.energy_samples=15", r"evaluate\.energy_samples must be a multiple of 10; got 15"),
        ("evaluate.energy_axes=[dx]", r"evaluate\.energy_axes names two different .*; got \['dx'\]"),
        ("train.batch_size=1.0", r"command line: train\.batch_size must be of type int; got 1\.0 \(float\)"),
        ("train.num_steps=true", r"train\.num_steps must be of type int; got True \(bool\)"),
        ("train.lr=1e-3 2", r"train\.lr must be of type float; got '1e-3 2' \(str\)"),
        ("train.lrr=1", "unknown parameter 'train.lrr'; did you mean 'train.lr'"),
        ("train=1", "is a section"),
        *(
            (f"cache.root={it}", r"cache\.root must be a path, a URL or null; got")
            for it in ("true", "1e30", "[]", "''")
        ),
    ],
)
def test_an_impossible_setting_is_refused_before_any_work(root, override, words):
    with pytest.raises(ConfigError, match=words):
        load_config(root, [override])


def test_a_gpu_that_is_not_there_is_refused_by_the_name_of_its_setting():
    assert [resolve_device("train.device", "auto", number) for number in (0, 1)] == ["cpu", "cuda"]
    assert (
        resolve_device("encode.device", "cuda:1", 2) == "cuda:1" and resolve_device("train.device", "cpu", 0) == "cpu"
    )
    for key, wanted, number in (("train.device", "cuda", 0), ("encode.device", "cuda:2", 2)):
        with pytest.raises(ConfigError, match=rf"{key} is '{wanted}', but torch finds {number} GPUs here"):
            resolve_device(key, wanted, number)


def test_a_window_longer_than_a_clip_is_refused_in_clip_mode(root):
    assert load_config(root, ["encode.mode=clip"]).encode.frames_per_clip == 16
    with pytest.raises(ConfigError, match=r"a segment is one clip of 4 steps.*train.window_steps is 8"):
        load_config(root, ["encode.mode=clip", "encode.frames_per_clip=8"])


def test_every_preset_in_the_repository_loads():
    for kind in ("dataset", "encoder", "predictor"):
        for path in (SUITE_SETTINGS / "configs" / kind).glob("*.yaml"):
            assert getattr(load_config(SUITE_SETTINGS, [f"{kind}={path.stem}"]), kind).name == path.stem


def test_recordings_where_the_presets_look_for_them_are_not_added_to_git():
    ignored = (REPOSITORY_ROOT / ".gitignore").read_text().splitlines()
    for path in (REPOSITORY_ROOT / "configs/dataset").glob("*.yaml"):
        for folder in load_config(SUITE_SETTINGS, [f"dataset={path.stem}"]).dataset.inputs:
            assert f"/{folder.split('/')[0]}/" in ignored, f"{path.name} reads {folder}"


def test_every_training_setting_stands_in_params_so_that_it_can_be_swept(root):
    for field in dataclasses.fields(TrainConfig):
        value = getattr(load_config(root).train, field.name)
        load_config(root, [f"train.{field.name}={json.dumps(value)}"])  # JSON is YAML


def test_the_suite_loads_settings_of_its_own_with_the_keys_of_the_checkout():
    read = YAML(typ="safe", pure=True).load
    settings = [read(root / "params.yaml") for root in (REPOSITORY_ROOT, SUITE_SETTINGS)]
    keys = [{key: list(part) if isinstance(part, dict) else None for key, part in it.items()} for it in settings]
    assert keys[0] == keys[1], "a setting that params.yaml gains or loses is one in tests/settings/params.yaml too"
    checkout = re.compile(r"load_config\((\)|overrides|ROOT|REPOSITORY_ROOT)|ROOT / .params\.yaml")
    tests = Path(__file__).parents[1]
    readers = {path.relative_to(tests) for path in tests.rglob("*.py") if checkout.search(path.read_text())}
    assert not readers, "load SUITE_SETTINGS: what an experiment left in params.yaml must not decide a test"


def test_paths_are_not_taken_for_overrides():
    assert is_override("train.lr=3e-4") and is_override("dataset=vpt")
    assert not is_override("shards") and not is_override("/data/date=2020/x.tar") and not is_override("./a=b.tar")


def test_a_broken_override_and_a_broken_file_are_named(root):
    with pytest.raises(ConfigError, match=r"train.lr=\[1"):
        load_config(root, ["train.lr=[1"])
    (root / "params.yaml").write_bytes(b"dataset: \xff\n")
    with pytest.raises(ConfigError, match=r"params\.yaml is no valid YAML"):
        load_config(root)
