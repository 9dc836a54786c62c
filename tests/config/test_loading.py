"""Claims: params.yaml and presets resolve to typed values with a known origin; what cannot work is refused by name."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from jepa_cache.cli.stage import describe_error
from jepa_cache.config.loading import REPOSITORY_ROOT, load_config, split_arguments
from jepa_cache.config.parsing import ConfigError, parse_dataclass
from jepa_cache.config.schema import TrainConfig
from tests.workspace import SUITE_SETTINGS, copy_settings


@pytest.fixture
def root(tmp_path):
    """A folder with params.yaml and configs/."""
    return copy_settings(tmp_path)


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
    assert config.origins["encoder.name"] == "params.yaml"
    edit(root, "  lr: null", "  lr: 3e-4")  # no dot: YAML 1.1 would call it a string
    assert load_config(root).train.lr == pytest.approx(3e-4)
    config = load_config(root, ["train.lr=1", "plan.horizons=[1, 4]"])
    assert (type(config.train.lr), config.plan.horizons) == (float, (1, 4)), (
        "an int passes for a float, a list for a tuple"
    )


def test_a_file_of_settings_overrides_in_its_place_and_is_named(root):
    mine = root / "mine.yaml"
    mine.write_text("predictor: small\ntrain: {lr: 0.5, weight_decay: , step_lengths: [1, 2]}\nplan.horizons: [7]\n")
    config = load_config(root, ["train.weight_decay=1", str(mine), "train.lr=0.25"])
    assert (config.predictor.name, config.train.step_lengths, config.plan.horizons) == ("small", (1, 2), (7,))
    assert config.train.lr == 0.25 and config.train.weight_decay == load_config(root).train.weight_decay
    names = ("predictor.name", "train.step_lengths", "train.lr", "train.weight_decay", "plan.seed")
    origins = [str(mine), str(mine), "command line", "configs/train/demo.yaml", "params.yaml"]
    assert [config.origins[name] for name in names] == origins
    assert load_config(root, [str(mine), "train.lr=0.25"]).train == config.train, "one run, however it is typed"
    for text, words in (
        ("train: {lrr: 1}", r"unknown parameter 'train\.lrr'; did you mean 'train\.lr'"),
        ("train: {lr: -1}", r"train\.lr must be above 0; got -1"),
        ("encoder: vitll", r"encoder is 'vitll', .*did you mean 'vitl'"),
        ("- 1", "must hold a mapping; got list"),
        ("train: [", "is no valid YAML"),
    ):
        mine.write_text(text)
        with pytest.raises(ConfigError, match=f"{mine}:? {words}"):
            load_config(root, [str(mine)])
    with pytest.raises(ConfigError, match=r"nowhere\.yaml is missing; name a file of settings by its path from here"):
        load_config(root, ["nowhere.yaml"])


def test_warm_up_and_anneal_keep_their_shares_of_a_training_whose_length_is_set(root):
    def told(*overrides):
        train = load_config(root, overrides).train
        return [train.num_warmup, train.num_anneal]

    assert told() == told("train.num_steps=600") == [50, 180]
    assert told("train.num_steps=100") == [8, 30]
    assert told("train.num_steps=1200", "train.num_warmup=7") == [7, 360]
    edit(root, "  num_steps: null", "  num_steps: 60")
    assert told() == [5, 18]


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("params.yaml", "  seed: 0\n  init", "  sed: 0\n  init", r"unknown key 'sed'; did you mean 'seed'"),
        ("params.yaml", "encoder: tiny", "encoder: vitll", r"no such preset; did you mean 'vitl'"),
        ("params.yaml", "dataset: sample", "datset: sample", r"unknown key 'datset'; did you mean 'dataset'"),
        ("params.yaml", "dataset: sample", "dataset: vpt\ndataset: vpt", r"YAML: line \d+, column 1: found dup.*\)$"),
        ("params.yaml", "dataset: sample", "dataset: \xff", r"params\.yaml is no valid YAML"),
        ("params.yaml", "dataset: sample", f"dataset: {'[' * 999}", r"params\.yaml is no valid YAML"),
        ("params.yaml", "  seed: 0\n  init", f"  seed: {'9' * 5000}\n  init", r"params\.yaml is no valid YAML"),
        ("configs/predictor/tiny.yaml", "depth: 2", "dept: 2", "tiny.yaml has .* key 'dept'; did you mean 'depth'"),
        ("configs/predictor/tiny.yaml", "depth: 2\n", "", r"predictor/tiny\.yaml lacks the key 'depth'"),
        ("configs/predictor/tiny.yaml", "depth: 2\n", "depth: [\n", r"tiny\.yaml is no valid YAML"),
    ],
)
def test_a_wrong_file_is_refused_with_the_way_out(root, file, old, new, words):
    text = (root / file).read_text()
    assert old in text
    (root / file).write_bytes(text.replace(old, new, 1).encode("latin-1"))
    with pytest.raises(ConfigError, match=words):
        load_config(root)


def test_a_section_that_is_missing_or_no_mapping_is_refused(root):
    whole = (root / "params.yaml").read_text()
    for section, words in (("", "lacks the key 'scaler'"), ("scaler: [1]\n", r"scaler must be a mapping; got \[1\]")):
        (root / "params.yaml").write_text(re.sub(r"\nscaler:.*\n(  .*\n)+", f"\n{section}", whole))
        with pytest.raises(ConfigError, match=words):
            load_config(root)


def test_every_number_in_params_has_bounds_that_stop_a_slip_of_the_keyboard():
    config = load_config(SUITE_SETTINGS)
    for section in ("encode", "split", "filter", "train", "evaluate", "plan"):
        values = dataclasses.asdict(getattr(config, section))
        for key in [key for key, value in values.items() if type(value) in (int, float)]:
            for slip, words in ((-10, r"must be (at least|above)"), (10**20, r"must be (at most|below)")):
                with pytest.raises(ConfigError, match=rf"^params: {section}\.{key} {words} .*; got {slip}$"):
                    parse_dataclass(type(getattr(config, section)), {**values, key: slip}, "params", section=section)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("train.auto_steps=8", "train.auto_steps must be below train.window_steps 8; got 8"),
        ("filter.idle_cut_end=10", "above 0 only with filter.drop_idle true; got 10 without"),
        ("encode.weights=x.pt", "has seeded random weights"),
        ("predictor=compressed train.compile=flex", "train.compile=flex is for transformers; predictor 'compressed' is compressed"),
        ("encoder=pixels encode.compile=true", "encode.compile is for V-JEPA's blocks, got kind pixels"),
        ("evaluate.measure=energy", r"measure must be a list, such as \[a, b\]; got 'energy'"),
        ("evaluate.measure=[energy,noise,energy]", r"evaluate\.measure names 'energy' more than once"),
        ("plan.horizons=2", r"horizons must be a list.*; got 2"),
        *((f"plan.horizons={it}", r"plan\.horizons .*; got|plan\.horizons names 1") for it in ("[]", "[1, 1]")),
        ("evaluate.probes=[inverse_dynamic]", "did you mean 'inverse_dynamics'"),
        ("plan.num_timed=2", r"'plan\.num_timed', which was removed: benchmarks/planner\.py times"),
        ("plan.max_turn_deg=.nan", r"max_turn_deg must be a finite number; got nan"),
        ("train.device=cuda:1", r"train\.device must .*CUDA_VISIBLE_DEVICES=1.*; got 'cuda:1'"),
        ("encode.device=gpu", r"encode\.device must be auto, cpu or cuda .*; got 'gpu'"),
        *((f"encode.phases={it}", r"encode\.phases .*; got") for it in ("[0, 0]", "[-1]", "[]", "every")),
        ("train.compile=yes", "train.compile is 'yes'; known: false, flex, true"),
        ("encode.dtype=fp8", "encode.dtype is 'fp8'; known: bfloat16, float16, float8_e4m3, int4, int8"),
        ("evaluate.energy_samples=15", r"evaluate\.energy_samples must be a multiple of 10; got 15"),
        *((f"evaluate.energy_axes={it}", r"evaluate\.energy_axes .*; got \['dx'") for it in ("[dx]", "[dx, dx]")),
        ("train.batch_size=1.0", r"command line: train\.batch_size must be a valid integer; got 1\.0"),
        ("train.lr=1e-3 2", r"train\.lr must be a valid number; got '1e-3 2'"),
        ("train.lr=0 train.metric=loss", r"lr must be above 0; got 0(.|\n)*train\.metric is 'loss'; did you mean"),
        ("dataset=vptt", r"command line: dataset is 'vptt', .*did you mean 'vpt'"),
        ("train.num_steps=20 train.num_warmup=50", r"exceed train\.num_steps 20; .* train\.num_warmup=2 train\.num_anneal=6"),
        ("train.lrr=1", "unknown parameter 'train.lrr'; did you mean 'train.lr'"),
        ("train.lr=[1", r"train\.lr=\[1"),
        *((f"outputs={it}", r"command line: outputs must name a folder.*; got") for it in ("", "[a]", "1", "' '")),
        ("train=1", r"unknown parameter 'train'; did you mean 'train\."),
        *((f"cache.root={it}", r"cache\.root must .*; got") for it in ("true", "1e30", "[]", "''", r'"/a\0b"')),
        ("encode.mode=clip encode.frames_per_clip=8", r"a segment is one clip of 4 steps.*train.window_steps is 8"),
        ("encode.mode=clip encode.frames_per_clip=15", "encode.frames_per_clip 15 must be a multiple of tubelet_size 2"),
        ("encoder=vitl encode.single_frame=image", "needs a V-JEPA 2.1 encoder .*; got encoder 'vitl' of kind vjepa2"),
        ("encoder=vitl384_v21 encode.single_frame=image encode.mode=tubelet", "and frame mode; got .*'tubelet'"),
        ("encoder=vitl384_v21 encode.pool=5", r"patches on a side, 24 must be a multiple of encode.pool 5"),
    ],
)  # fmt: skip
def test_an_impossible_setting_is_refused_before_any_work(overrides, words):
    with pytest.raises(ConfigError, match=words):
        load_config(SUITE_SETTINGS, re.split(r" (?=\w+[.=])", overrides))


@pytest.mark.parametrize(
    ("line", "other", "words"),
    [
        ("rope: paired", "rope: tiled", r"rope of encoder 'vitl384_v21', kind vjepa2_1, is 'tiled'; .*paired"),
        ("positions: rescaled", "positions: index", r"positions of encoder 'vitl384_v21'.* is 'index'; .*rescaled"),
        ("depth: 24", "depth: 32", r"depth of encoder 'vitl384_v21', kind vjepa2_1, is 32; known: 12, 24, 40, 48"),
        ("embed_dim: 1024", "embed_dim: 1000", r"embed_dim 1000 must be a multiple of num_heads 16"),
        ("kind: vjepa2_1", "kind: vjepa21", r"vitl384_v21\.yaml: kind is 'vjepa21'; did you mean 'vjepa2_1'"),
        ("kind: vjepa2_1", "kind: vjepa2", r"rope of encoder 'vitl384_v21', kind vjepa2, is 'paired'; .*tiled"),
        ("random_seed: null", "random_seed: 0", r"one of weights and random_seed(.|\n)*no seeded random weights"),
        ("single_frame: doubled", "single_frame: once", r"vitl384_v21\.yaml: single_frame is 'once'.*doubled, image"),
    ],
)
def test_a_preset_that_fits_no_released_weights_is_refused(root, line, other, words):
    edit(root, f"\n{line}", f"\n{other}", "configs/encoder/vitl384_v21.yaml")
    with pytest.raises(ConfigError, match=words):
        load_config(root, ["encoder=vitl384_v21"])


@pytest.mark.parametrize("kind", ["dataset", "encoder", "predictor", "train.preset"])
def test_every_preset_in_the_repository_loads(kind):
    for path in (REPOSITORY_ROOT / "configs" / kind.partition(".")[0]).glob("*.yaml"):
        extra = ["encode.mode=clip"] if "clip" in path.stem else []
        config = load_config(SUITE_SETTINGS, [f"{kind}={path.stem}", *extra])
        for folder in config.dataset.inputs if kind == "dataset" else ():
            ignored = (REPOSITORY_ROOT / ".gitignore").read_text().splitlines()
            assert f"/{folder.split('/')[0]}/" in ignored, f"git would take the recordings that {path.name} reads"
        if path.stem.endswith("_v21"):
            assert (config.encode.grid_of(config.encoder), config.encode.single_frame) == ((24, 24), "doubled")
            pooled = dataclasses.replace(config.encode, pool=2)
            assert pooled.num_tokens_of(config.encoder) == config.encoder.num_tokens // 4 == 144


def test_every_training_setting_stands_in_params_so_that_it_can_be_swept(root):
    train = load_config(root).train
    values = {field.name: getattr(train, field.name) for field in dataclasses.fields(TrainConfig)}
    config = load_config(root, [f"train.{name}={json.dumps(value)}" for name, value in values.items()])
    assert config.train == train  # JSON is YAML


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
    settings, paths = ["train.lr=3e-4", "dataset=vpt", "../mine.yaml"], ["shards", "/data/date=2020/x.tar", "./a=b.tar"]
    assert split_arguments([*paths, *settings]) == (settings, paths)


def test_several_broken_rules_are_lines_of_one_message_as_the_terminal_shows_it():
    with pytest.raises(ConfigError) as refused:
        load_config(SUITE_SETTINGS, ["train.batch_size=1e20", "train.lr=1e30"])
    assert [line.split()[2] for line in describe_error(refused.value).splitlines()] == ["train.batch_size", "train.lr"]
    assert "\\n" not in describe_error(refused.value)
