"""`jepa-cache export predictor`: a trained predictor for other programs."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class ExportFormat(StrEnum):
    """What is written."""

    OFFICIAL = "official"  # .pt that vjepa2's own loaders take
    SAFETENSORS = "safetensors"  # with a JSON card beside it


def export_predictor(
    run: Annotated[
        str, typer.Argument(help="outputs/train, a weights file with a card, or the folder of a LoRA adapter")
    ],
    out: Annotated[Path, typer.Argument(help="file to write: .pt, or .safetensors with --format safetensors")],
    *,
    form: Annotated[ExportFormat, typer.Option("--format", help="layout of the file")] = ExportFormat.OFFICIAL,
    encoder: Annotated[
        Path | None, typer.Option(help="weights file of the frozen encoder, to be added (official format only)")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="RUN is a LoRA adapter: merge it into --base")] = False,
    base: Annotated[str | None, typer.Option(help="weights that the adapter was trained on (train.init)")] = None,
) -> None:
    """Write a trained predictor as vjepa2's own loaders take it, or as safetensors with a JSON card.

    Args:
        run: What is exported.
        out: File to write; an existing one is replaced.
        form: Layout of the file.
        encoder: Weights file of the frozen encoder, checked against the one that the predictor was trained with.
        merge: Merge a LoRA adapter into its base, in float32.
        base: Weights under the adapter.

    Raises:
        ValueError: A file is missing, damaged or does not belong to the others; or the arguments contradict each other.
    """
    from safetensors import SafetensorError

    from jepa_cache.predictor.export import differs_from_official_class, export_official, export_safetensors

    official = form is ExportFormat.OFFICIAL
    suffixes = (".pt", ".pth", ".tar") if official else (".safetensors",)
    if out.suffix not in suffixes:
        raise ValueError(f"--format {form.value} writes {' or '.join(suffixes)} files; got {out}")
    if encoder is not None and not official:
        raise ValueError("--encoder adds the encoder to the official format only; drop one of --encoder and --format")
    state, card = _read_predictor(Path(run), base, merge=merge)
    encoder_state = None if encoder is None else _read_encoder(encoder, card)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if official:
            export_official(state, card, out, encoder_state)
            held = "predictor" if encoder_state is None else "predictor, encoder and target_encoder"
        else:
            held = f"predictor, and {export_safetensors(state, card, out)}"
    except (OSError, SafetensorError, RuntimeError) as error:  # RuntimeError: how torch tells of a full disk
        raise ValueError(f"{out} cannot be written: {error}") from error
    num_weights = sum(tensor.numel() for tensor in state.values())
    print(f"wrote {out}: {held} ({len(state)} tensors, {num_weights:,} weights in the predictor)")
    for line in differs_from_official_class(card["architecture"]) if official else ():
        print(f"note: {line}")


def _find_weights(reference: str, argument: str) -> Path:
    from jepa_cache.training.run import resolve_init

    try:
        return resolve_init(reference, Path.cwd())
    except ValueError as error:
        raise ValueError(f"{argument} {reference!r} names no weights; {str(error).partition('; ')[2]}") from error


def _read_predictor(run: Path, base: str | None, *, merge: bool) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """The weights under their official names, and the model card; both strictly of one architecture."""
    from jepa_cache.predictor.checkpoints import find_card, load_predictor, load_start_weights
    from jepa_cache.predictor.lora import CONFIG_FILE, load_adapter, merged_state, read_adapter_card
    from jepa_cache.predictor.model import ACPredictor

    if merge and base is None:
        raise ValueError("--merge needs --base WEIGHTS: the file that the adapter's training started from (train.init)")
    if base is not None and not merge:
        raise ValueError("--base belongs to --merge: it names the weights under a LoRA adapter")
    if merge:
        card = read_adapter_card(run)
        predictor = ACPredictor(**card["architecture"])
        load_start_weights(predictor, _find_weights(base, "--base"))
        return merged_state(load_adapter(predictor, run)), card
    if (run / CONFIG_FILE).is_file():
        raise ValueError(
            f"{run} holds a LoRA adapter, which is no predictor by itself; add --merge --base WEIGHTS with the weights that its training "
            "started from (train.init)"
        )
    path = _find_weights(str(run), "RUN")
    if find_card(path) is None:
        raise ValueError(
            f"{path} has no card that says what predictor it holds; name what a finished training wrote, such as outputs/train"
        )
    predictor, card = load_predictor(path)
    return predictor.state_dict(), card


def _read_encoder(path: Path, card: Mapping[str, Any]) -> Mapping[str, Any]:
    from jepa_cache.encoder.checkpoints import load_state
    from jepa_cache.predictor.checkpoints import ENCODER_FIELD
    from jepa_cache.store.recipe import file_digest

    if ENCODER_FIELD not in card:
        raise ValueError("the predictor's card does not say which encoder it was trained with, so none can be added")
    trained_with = str(card[ENCODER_FIELD])
    kind, _, rest = trained_with.partition(":")
    digest, _, entry = rest.partition("#")
    if kind != "file":
        raise ValueError(
            f"this predictor was trained on tokens of {trained_with}: weights that no file holds. Drop --encoder"
        )
    found = file_digest(path)
    if found != digest:
        raise ValueError(
            f"{path} (sha256 {found}) is not the encoder that this predictor was trained with ({trained_with}); tokens of another encoder "
            "are noise to it. Name the file that encode.weights named"
        )
    return load_state(path, entry or None)
