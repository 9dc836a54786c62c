"""params.yaml, the presets it names and what overrides it (`key=value`, files of settings), read once and resolved into one Config.

`null` in a section of params.yaml means "as the preset says". Nothing outside this module reads yaml.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import operator
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_type_hints

from jepa_cache.config.parsing import ConfigError, check_keys, flatten, nearest, parse_dataclass
from jepa_cache.config.schema import (
    PREDICTOR_KINDS,
    TRAIN_DEFAULTS,
    Config,
    DatasetPreset,
    EncodeConfig,
    EncoderPreset,
    Settings,
    TrainConfig,
    check_config,
)

PACKAGE = Path(__file__).resolve().parents[1]
TEMPLATE = PACKAGE / "template"
"""What `jepa-cache init` writes; only an installed package has it (setup.py)."""
REPOSITORY_ROOT = TEMPLATE if TEMPLATE.is_dir() else PACKAGE.parent
"""Where settings come from outside every project: the checkout of this package, or what came with it."""

PRESETS = ("dataset", "encoder", "predictor")
OUTPUTS = "outputs"  # what dvc.yaml declares, and projects of earlier releases have
SECTIONS: dict[str, type[Any]] = {
    name: cls
    for name, cls in get_type_hints(Config).items()
    if isinstance(cls, type) and issubclass(cls, Settings) and name not in PRESETS
}
"""Sections of params.yaml, each with the dataclass that holds its rules."""

IS_ASSIGNMENT, IS_FILE = re.compile(r"^[A-Za-z_]\w*(\.\w+)*="), re.compile(r"\.ya?ml$")
"""What overrides look like; recordings are no YAML."""


def load_config(root: Path = REPOSITORY_ROOT, overrides: Sequence[str] = ()) -> Config:
    """Read params.yaml and the presets it names from `root`, apply overrides in their order and check everything.

    An override is `key=value` such as "train.lr=3e-4" (YAML), or the path of a .yaml file that says of some keys what params.yaml would.

    Raises:
        ConfigError: For an unknown key (with the nearest known one), a wrong type or an impossible combination.
    """
    if isinstance(overrides, str):
        raise ConfigError(
            f"overrides are a list of key=value and .yaml files; got {overrides!r}. Write [{overrides!r}]"
        )
    params = _read_yaml(root / "params.yaml")
    params.setdefault("outputs", OUTPUTS)
    typed: dict[str, str] = {}  # each key that is overridden, and where
    for override in overrides:
        typed |= _apply_override(params, override)
    check_keys(params, [*PRESETS, "outputs", *SECTIONS], "params.yaml")
    if lacking := [key for key in (*PRESETS, *SECTIONS) if key not in params]:
        raise ConfigError(f"params.yaml lacks the key {lacking[0]!r}; put it back (git diff params.yaml shows it)")
    if wrong := [key for key in SECTIONS if not isinstance(params[key], Mapping)]:
        raise ConfigError(f"params.yaml: {wrong[0]} must be a mapping; got {params[wrong[0]]!r}")

    origins = {"outputs": typed.get("outputs", "params.yaml")}
    if not isinstance(outputs := params["outputs"], str) or not outputs.strip():
        raise ConfigError(f"{origins['outputs']}: outputs must name a folder, such as {OUTPUTS}/b; got {outputs!r}")
    presets: dict[str, Any] = {}
    files = {kind: preset_file(kind, params[kind]) for kind in PRESETS}
    for kind in PRESETS:
        mapping = _read_preset(root, kind, params[kind], typed)
        presets[kind] = parse_dataclass(_preset_class(kind, mapping, files[kind]), mapping, files[kind])
        origins |= dict.fromkeys(flatten({kind: mapping}), files[kind])
        origins[f"{kind}.name"] = typed.get(kind, "params.yaml")

    # What a section's key gets where params.yaml holds null, and from which file.
    defaults: dict[str, dict[str, tuple[Any, str]]] = {name: {} for name in SECTIONS}
    for kind in ("dataset", "encoder"):  # what they and the section name alike
        shared = (field.name for field in dataclasses.fields(EncodeConfig) if hasattr(presets[kind], field.name))
        defaults["encode"] |= {name: (getattr(presets[kind], name), files[kind]) for name in shared}
    for name in ("actions", "states"):
        defaults["scaler"][name] = getattr(presets["dataset"], f"scale_{name}"), files["dataset"]
    given = {name: dict(params[name]) for name in SECTIONS}
    of_train = _read_preset(root, "train", given["train"].pop("preset", None), typed)
    train_file = preset_file("train", of_train.pop("name"))
    check_keys(of_train, [field.name for field in dataclasses.fields(TrainConfig)], train_file)
    defaults["train"] = {key: (value, "config/schema.py") for key, value in TRAIN_DEFAULTS.items()}
    defaults["train"]["loggers"] = (["dvclive"] if find_spec("dvclive") else [], "what is installed")
    defaults["train"] |= {key: (value, train_file) for key, value in of_train.items()}

    sections: dict[str, Any] = {}
    for name, cls in SECTIONS.items():
        own = {key: (value, typed.get(f"{name}.{key}", "params.yaml")) for key, value in given[name].items()}
        resolved = defaults[name] | {k: it for k, it in own.items() if it[0] is not None or k not in defaults[name]}
        origins |= {f"{name}.{key}": file for key, (_, file) in resolved.items()}
        values = {key: value for key, (value, _) in resolved.items()}
        if name == "train":
            _scale_schedule(values, of_train, {key for key, (_, file) in resolved.items() if file == train_file})
        sections[name] = parse_dataclass(cls, values, f"params.yaml: {name}", section=name, origins=origins)
    config = Config(
        **presets,
        **sections,
        outputs=outputs.rstrip("/") or outputs,
        members=_list_members(root, presets["dataset"]),
        origins=origins,
    )
    check_config(config)
    return config


def _scale_schedule(values: dict[str, Any], preset: Mapping[str, Any], untouched: Collection[str]) -> None:
    """Keep warm-up and anneal the preset's shares of the training where its length is set and they are not."""
    steps = values["num_steps"], preset.get("num_steps")
    if steps[0] != steps[1] and all(isinstance(count, int) and count > 0 for count in steps):
        for key in {"num_warmup", "num_anneal"} & {*untouched}:
            values[key] = round(values[key] * steps[0] / steps[1])


def _preset_class(kind: str, mapping: Mapping[str, Any], file: str) -> type[Any]:
    """The dataclass of a preset; a predictor says by its kind which of several it has."""
    if kind != "predictor":
        return {"dataset": DatasetPreset, "encoder": EncoderPreset}[kind]
    named = str(mapping.get("kind", "transformer"))  # files of earlier releases name none
    if named not in PREDICTOR_KINDS:
        raise ConfigError(f"{file}: kind is {named!r}{nearest(named, list(PREDICTOR_KINDS))}")
    return PREDICTOR_KINDS[named]


def preset_file(kind: str, name: str) -> str:
    """The file of a preset, relative to the repository."""
    return f"configs/{kind}/{name}.yaml"


def find_repository(folder: Path, *, read_only: bool = False) -> Path:
    """The checkout or project that `folder` lies in, known by its params.yaml and configs/.

    Raises:
        ConfigError: It lies in none. `read_only` takes the settings of the package then: nobody's outputs may be looked for below those.
    """
    for candidate in (folder, *folder.parents):
        if (candidate / "params.yaml").is_file() and (candidate / "configs").is_dir():
            return candidate
    if read_only:
        return REPOSITORY_ROOT
    raise ConfigError(
        f"{folder} lies in no project: neither it nor a folder above it holds params.yaml and configs/; cd into a project, or make one with "
        "`jepa-cache init FOLDER`"
    )


def data_base(root: Path = REPOSITORY_ROOT) -> Path:
    """Return the folder of relative data paths: $DVC_ROOT (the main checkout in temporary experiments), else `root`."""
    return Path(os.environ.get("DVC_ROOT") or root)


def outputs_folder(config: Config, root: Path = REPOSITORY_ROOT) -> Path:
    """Where the stages of a project leave and look for their results: `outputs`, relative to the project `root`.

    Raises:
        ConfigError: It can be no such folder; or DVC runs the stage, and dvc.yaml declares results in another one.
    """
    folder = root / Path(config.outputs).expanduser()
    if folder.is_file() or folder.resolve() in (root.resolve(), *root.resolve().parents):
        raise ConfigError(
            f"{config.origins['outputs']}: outputs is {config.outputs!r}, which is a file, the project itself or a folder around it; name a "
            f"folder of its own, such as {OUTPUTS}/b"
        )
    pipeline, declared = root / "dvc.yaml", rf"(?<![\w/.-])(\$\{{outputs\}}|{re.escape(config.outputs)})/"
    told = pipeline.read_text(encoding="utf-8") if os.environ.get("DVC_STAGE") and pipeline.is_file() else None
    if told is not None and not re.search(declared, told):
        raise ConfigError(
            f"{config.origins['outputs']}: outputs is {config.outputs!r}, but DVC runs this stage, and dvc.yaml declares its results in "
            f"another folder; set outputs to {OUTPUTS} (dvc keeps experiments apart by itself), or run the stages without dvc"
        )
    return folder


def manifest_path(config: Config, root: Path = REPOSITORY_ROOT) -> Path:
    """The manifest that stage one leaves, and all later stages read."""
    return outputs_folder(config, root) / "encode/manifest.json"


def recordings_base(config: Config, root: Path = REPOSITORY_ROOT) -> Path:
    """The folder of relative recordings: `root` for the rendered sample, which every workspace has of its own; else `data_base`."""
    return root if config.dataset.sample is not None else data_base(root)


def _list_members(root: Path, dataset: DatasetPreset) -> tuple[tuple[DatasetPreset, float], ...]:
    """The presets that a mixture names, each under the mixture's own sampling; else the preset itself."""
    members = []
    for name, weight in dataset.mixture.items():
        member = parse_dataclass(DatasetPreset, _read_preset(root, "dataset", name), preset_file("dataset", name))
        if member.mixture or member.action_space != dataset.action_space:
            raise ConfigError(
                f"{preset_file('dataset', dataset.name)}: {name} must be a data set of action space {dataset.action_space!r} and no "
                f"mixture itself; it has {member.action_space!r}"
            )
        members.append((member, weight))
    return tuple(members) or ((dataset, 1.0),)


def _read_preset(root: Path, kind: str, name: Any, typed: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any]:
    known = sorted(path.stem for path in (root / "configs" / kind).glob("*.yaml"))
    if name not in known:
        key = "train.preset" if kind == "train" else kind
        raise ConfigError(
            f"{typed.get(key, 'params.yaml')}: {key} is {name!r}, but configs/{kind} has no such preset{nearest(str(name), known)}"
        )
    preset = {**_read_yaml(root / preset_file(kind, name)), "name": name}
    if kind == "dataset" and str(preset.get("source")).endswith(".py"):  # a file of the project's own
        preset["source"] = str((root / preset["source"]).resolve())
    return preset


@functools.cache
def _parse_yaml(text: str) -> Any:
    """What a text says, parsed once a process: 40 ms for params.yaml and its presets. The caller copies what it changes."""
    from ruamel.yaml import YAML

    return YAML(typ="safe", pure=True).load(text)


def _read_yaml(path: Path) -> dict[str, Any]:
    from ruamel.yaml import YAMLError

    try:
        loaded = copy.deepcopy(_parse_yaml(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path} is missing; name a file of settings by its path from here, or run from a checkout (git status shows what is gone)"
        ) from error
    # Other than YAMLError: no UTF-8 and numbers of thousands of digits, and deep nesting.
    except (YAMLError, ValueError, RecursionError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        told = f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else str(error)
        raise ConfigError(f"{path} is no valid YAML: {told}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} must hold a mapping; got {'nothing' if loaded is None else type(loaded).__name__}")
    return loaded


def _apply_override(params: dict[str, Any], override: str) -> dict[str, str]:
    """Change `params` as a `key=value` or a file of settings says; each key that it names, and where."""
    from ruamel.yaml import YAMLError

    if IS_FILE.search(override) and not IS_ASSIGNMENT.match(override):
        place, settings = override, flatten(_read_yaml(Path(override)))
    else:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"an override has the form key=value, such as train.lr=3e-4; got {override!r}")
        try:
            place, settings = "command line", {key: copy.deepcopy(_parse_yaml(text))}
        except YAMLError as error:
            raise ConfigError(
                f"the value of {override!r} is no valid YAML; put it in quotes, or close its brackets"
            ) from error
    known = list(flatten(params))
    for key, value in settings.items():
        if key not in known:
            in_section = [name for name in known if name.endswith(f".{key}")]
            hint = nearest(in_section[0] if in_section else key, known)
            raise ConfigError(f"{place}: unknown parameter {key!r}{hint}")
        *parents, last = key.split(".")
        functools.reduce(operator.getitem, parents, params)[last] = value
    return dict.fromkeys(settings, place)


def split_arguments(arguments: Iterable[str] | None) -> tuple[list[str], list[str]]:
    """Command line arguments that are settings, `key=value` or a .yaml file of them; and the others, recordings as a rule."""
    settings, others = list[str](), list[str]()
    for argument in arguments or ():
        (settings if IS_ASSIGNMENT.search(argument) or IS_FILE.search(argument) else others).append(argument)
    return settings, others
