"""params.yaml, the presets it names and `key=value` overrides, read once and resolved into one Config.

`null` in a section of params.yaml means "as the preset says". Nothing outside this module reads yaml.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jepa_cache.config.parsing import ConfigError, check_keys, nearest, parse_dataclass
from jepa_cache.config.schema import (
    CacheConfig,
    Config,
    DatasetPreset,
    EncodeConfig,
    EncoderPreset,
    EvaluateConfig,
    FilterConfig,
    PlanConfig,
    PredictorPreset,
    ScalerConfig,
    SplitConfig,
    TrainConfig,
    check_config,
)

REPOSITORY_ROOT = Path(__file__).resolve().parents[2]

SECTIONS = {
    "cache": CacheConfig,
    "encode": EncodeConfig,
    "split": SplitConfig,
    "filter": FilterConfig,
    "scaler": ScalerConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "plan": PlanConfig,
}
"""Sections of params.yaml, each with the dataclass that holds its rules."""

T = TypeVar("T")


def load_config(root: Path = REPOSITORY_ROOT, overrides: Sequence[str] = ()) -> Config:
    """Read params.yaml and the presets it names, apply `key=value` overrides and check everything.

    Args:
        root: Folder that holds params.yaml and configs/.
        overrides: Such as "train.lr=3e-4"; values are YAML.

    Raises:
        ConfigError: For an unknown key (with the nearest known one), a wrong type or an impossible combination.
    """
    params = _read_yaml(root / "params.yaml")
    where = dict.fromkeys(_flatten(params), "params.yaml")
    for override in overrides:
        key = _apply_override(params, override)
        where[key] = "command line"

    names = ("dataset", "encoder", "predictor")
    check_keys(params, [*names, *SECTIONS], "params.yaml")
    for key in (*names, *SECTIONS):
        if key not in params:
            raise ConfigError(f"params.yaml lacks the key {key!r}; put it back (git diff params.yaml shows it)")

    reader = _Resolver(root, where)
    dataset = reader.preset(DatasetPreset, "dataset", params["dataset"])
    encoder = reader.preset(EncoderPreset, "encoder", params["encoder"])
    predictor = reader.preset(PredictorPreset, "predictor", params["predictor"])
    values = {name: params[name] for name in SECTIONS}
    preset = None
    if isinstance(params["train"], Mapping):
        preset = params["train"].get("preset")
        values["train"] = {key: value for key, value in params["train"].items() if key != "preset"}
    train_file, train_mapping = reader.preset_mapping("train", preset)
    dataset_file, encoder_file = f"configs/dataset/{dataset.name}.yaml", f"configs/encoder/{encoder.name}.yaml"
    of_dataset = ("fps", "mode", "frames_per_clip", "action_space", "cameras", "phases")
    of_encoder = ("weights", "single_frame", "compute_dtype", "batch_size")
    defaults: dict[str, dict[str, tuple[Any, str]]] = {
        "encode": {
            **{key: (getattr(dataset, key), dataset_file) for key in of_dataset},
            **{key: (getattr(encoder, key), encoder_file) for key in of_encoder},
        },
        "scaler": {key: (getattr(dataset, f"scale_{key}"), dataset_file) for key in ("actions", "states")},
        "train": {key: (value, train_file) for key, value in train_mapping.items()},
    }
    sections = {name: reader.section(cls, name, values[name], defaults.get(name, {})) for name, cls in SECTIONS.items()}
    cache = sections.pop("cache")
    config = Config(
        dataset=dataset,
        encoder=encoder,
        predictor=predictor,
        **sections,
        cache_root=cache.root,
        verify_checksums=cache.verify_checksums,
        members=_members(reader, dataset),
        origins=reader.origins,
    )
    check_config(config)
    return config


def find_repository(folder: Path) -> Path:
    """The checkout that `folder` lies in, known by its params.yaml and configs/; else the one this package lies in."""
    for candidate in (folder, *folder.parents):
        if (candidate / "params.yaml").is_file() and (candidate / "configs").is_dir():
            return candidate
    return REPOSITORY_ROOT


def data_base(root: Path = REPOSITORY_ROOT) -> Path:
    """Return the folder of relative data paths: $DVC_ROOT (the main checkout in temporary experiments), else `root`."""
    return Path(os.environ.get("DVC_ROOT") or root)


def recordings_base(config: Config, root: Path = REPOSITORY_ROOT) -> Path:
    """Return the folder of relative recordings.

    It is the workspace for the rendered sample, a DVC out that every workspace has of its own; else `data_base`.
    """
    return root if config.dataset.sample is not None else data_base(root)


def _members(reader: _Resolver, dataset: DatasetPreset) -> tuple[tuple[DatasetPreset, float], ...]:
    """The presets that a mixture names, each under the mixture's own sampling; else the preset itself."""
    if not dataset.mixture:
        return ((dataset, 1.0),)
    members = []
    for name, weight in dataset.mixture.items():
        if weight <= 0:
            raise ConfigError(
                f"configs/dataset/{dataset.name}.yaml: the weight of {name} must be above 0; got {weight}"
            )
        file, mapping = reader.preset_mapping("dataset", name)
        member = parse_dataclass(DatasetPreset, {**mapping, "name": name}, file)
        if member.mixture or member.action_space != dataset.action_space:
            raise ConfigError(
                f"configs/dataset/{dataset.name}.yaml: {name} must be a data set of action space {dataset.action_space!r} and no "
                f"mixture itself; it has {member.action_space!r}"
            )
        members.append((member, weight))
    return tuple(members)


class _Resolver:
    """Reads presets below `root` and notes for every resolved value which file it came from."""

    def __init__(self, root: Path, where: Mapping[str, str]) -> None:
        self.root = root
        self.where = where
        self.origins: dict[str, str] = {}

    def preset_mapping(self, kind: str, name: Any) -> tuple[str, dict[str, Any]]:
        folder = self.root / "configs" / kind
        known = sorted(path.stem for path in folder.glob("*.yaml"))
        if name not in known:
            key = "train.preset" if kind == "train" else kind
            raise ConfigError(
                f"params.yaml: {key} is {name!r}, but configs/{kind} has no such preset{nearest(str(name), known)}"
            )
        return f"configs/{kind}/{name}.yaml", _read_yaml(folder / f"{name}.yaml")

    def preset(self, cls: type[T], kind: str, name: Any) -> T:
        file, mapping = self.preset_mapping(kind, name)
        if mapping.get("name", name) != name:
            raise ConfigError(f"{file} calls itself {mapping['name']!r}; a preset is named by its file")
        for key, value in mapping.items():
            nested = value if isinstance(value, dict) and value else {None: None}
            self.origins.update({f"{kind}.{key}" + (f".{inner}" if inner else ""): file for inner in nested})
        self.origins[f"{kind}.name"] = self.where.get(kind, "params.yaml")
        return parse_dataclass(cls, {"name": name, **mapping}, file)

    def section(self, cls: type[T], name: str, values: Any, defaults: Mapping[str, tuple[Any, str]]) -> T:
        if not isinstance(values, Mapping):
            raise ConfigError(f"params.yaml: {name} must be a mapping; got {values!r}")
        known = [field.name for field in dataclasses.fields(cls)]
        check_keys(values, [*known, *(["preset"] if name == "train" else [])], f"params.yaml: {name}")
        for key, (_, file) in defaults.items():
            check_keys({key: None}, known, file)
        resolved = {key: value for key, (value, _) in defaults.items()}
        self.origins.update({f"{name}.{key}": file for key, (_, file) in defaults.items()})
        for key, value in values.items():
            if value is not None or key not in defaults:
                resolved[key] = value
                self.origins[f"{name}.{key}"] = self.where.get(f"{name}.{key}", "params.yaml")
        return parse_dataclass(cls, resolved, f"params.yaml: {name}", section=name, origins=self.origins)


def _read_yaml(path: Path) -> dict[str, Any]:
    from ruamel.yaml import YAML, YAMLError

    try:
        loaded = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path} is missing; run from a checkout of the repository (git status shows what is gone)"
        ) from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no valid YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} must hold a mapping; got {'nothing' if loaded is None else type(loaded).__name__}")
    return loaded


def _apply_override(params: dict[str, Any], override: str) -> str:
    from ruamel.yaml import YAML, YAMLError

    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"an override has the form key=value, such as train.lr=3e-4; got {override!r}")
    *parents, last = key.split(".")
    section: Any = params
    for depth, name in enumerate([*parents, last]):
        if not isinstance(section, dict) or name not in section:
            known = sorted(_flatten(params))
            raise ConfigError(f"unknown parameter {key!r}{nearest(key, known)}")
        if depth < len(parents):
            section = section[name]
    if isinstance(section[last], dict):
        raise ConfigError(
            f"{key!r} is a section, not a parameter; set one of its keys, such as {key}.{next(iter(section[last]))}=..."
        )
    try:
        section[last] = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise ConfigError(
            f"the value of {override!r} is no valid YAML; put it in quotes, or close its brackets"
        ) from error
    return key


def is_override(argument: str) -> bool:
    """Whether a command line argument is a `key=value` override rather than a path."""
    return re.match(r"^[A-Za-z_]\w*(\.\w+)*=", argument) is not None


def _flatten(mapping: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in mapping.items():
        keys += _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else [f"{prefix}{key}"]
    return keys
