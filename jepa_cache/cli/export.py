"""`jepa-cache export`: take the stores of a manifest, each checked where it arrived, or a trained predictor elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from jepa_cache.cli.outcome import AsJson, Checkout, Outcome, Overrides, describe_bytes, open_checkout, report
from jepa_cache.cli.sharing import CHECKSUMS, README, check_arrived, list_others, preset_files, upload
from jepa_cache.files import atomic_file, file_digest, publish_folder, temporary_folder
from jepa_cache.store.layout import STORE_FILE, StoreDamagedError, check_store
from jepa_cache.store.manifest import Manifest, why_held_back, write_manifest
from jepa_cache.store.root import MARKER, CacheRoot, RefusedError

UNKNOWN = "unknown"

export = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Take something out, to carry elsewhere.")


@export.command("cache")
def export_cache(
    out: Annotated[Path, typer.Argument(help="folder of the new root; absent or empty")],
    overrides: Overrides = None,
    *,
    manifest: Annotated[Path | None, typer.Option(help="other than encode/manifest.json of the outputs")] = None,
    to: Annotated[
        str | None, typer.Option(help="URL that gets a copy of OUT: hf://datasets/OWNER/NAME, s3://, gs://, file://")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Copy everything that a manifest lists into OUT as a root of its own, with the manifest, presets, a README and checksums.

    With --to URL it is sent there too, for `jepa-cache pull URL`: others then train from it without encoding.

    Every byte of the copy is compared with its checksum; an interrupted export is finished by the same command. Use the
    result with cache.root=OUT; its README.md says how. To export less, encode less: the stores are found again.

    Exit code 0: exported; 1: refused (OUT holds something else); 2: wrong usage, or a store is missing or damaged.
    """
    report(lambda: _export(open_checkout(overrides), out, manifest, to), as_json=as_json)


class ExportFormat(StrEnum):
    """What is written."""

    OFFICIAL = "official"  # .pt that vjepa2's own loaders take
    SAFETENSORS = "safetensors"  # with a JSON card beside it


@export.command("predictor")
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
    """Write a trained predictor as vjepa2's own loaders take it, or as safetensors with a JSON card."""
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
    heads = _copy_heads(Path(run).parent / "predictor.safetensors" if merge else _find_weights(run, "RUN"), out)
    held += f", and its costs {', '.join(heads)}" if heads else ""
    num_weights = sum(tensor.numel() for tensor in state.values())
    print(f"wrote {out}: {held} ({len(state)} tensors, {num_weights:,} weights in the predictor)")
    for line in differs_from_official_class(card["architecture"]) if official else ():
        print(f"note: {line}")


def _export(checkout: Checkout, out: Path, path: Path | None, url: str | None) -> Outcome:
    if checkout.paths:
        raise ValueError(f"export takes one folder, and key=value or FILE.yaml; got {checkout.paths[0]!r} as well")
    if path is None and (reason := why_held_back(checkout.manifest_path)) is not None:
        raise ValueError(reason)
    manifest, root = checkout.read_manifest(path), checkout.root
    if lacking := [file for file in preset_files(manifest) if not (checkout.repository / file).is_file()]:
        raise ValueError(
            f"{lacking[0]}, with which the cache was made, is not here, and who gets it needs it; put it back"
        )
    with root.shared_lock():
        files = export_manifest(manifest, root, out, checkout.repository)
    if url is not None:
        upload(out, url)
    document = {
        "out": str(out),
        "manifest": manifest.digest,
        "num_units": len(manifest.entries),
        "num_episodes": sum(entry.num_episodes for entry in manifest.entries),
        "num_steps": manifest.num_steps,
        "num_bytes": sum(file.stat().st_size for file in files),
        "num_files": len(files) + 1,
    }
    return Outcome(
        document,
        [
            "exported {num_units} units to {out}: {num_episodes} episodes, {num_steps} steps, ".format(**document)
            + f"{describe_bytes(document['num_bytes'])}, every byte checked",
            f"{out / README} says how to use it; fill in the licence of the recordings before you pass it on",
            *([f"uploaded to {url}; next: jepa-cache pull {url} FOLDER on another machine"] if url is not None else []),
        ],
    )


def export_manifest(manifest: Manifest, root: CacheRoot, out: Path, repository: Path) -> dict[Path, str]:
    """Copy everything that a manifest lists into a new root, and check every byte of the copy; the manifest comes last.

    The presets that it names go along as far as the project `repository` has them.

    The caller holds the shared lock of `root`. RefusedError where `out` holds something else than an unfinished export of
    this manifest. Returns the sha256 of every file.
    """
    _check_target(out, root, manifest)
    target, sums = CacheRoot(out), {}
    target.check_writable()
    target.remove_stale_temporaries()
    for part, entry in tqdm(manifest.stores, desc="export", unit="unit", mininterval=0.5):
        for key, digest in part.listed(entry):
            final = target.store(key)
            try:
                found = check_arrived(final, digest)  # of an export that was interrupted
            except StoreDamagedError:
                target.remove(final)
                with root.pulled([root.store(key)]):
                    found = _copy(root.store(key), final, digest)
            sums |= found
    for source in (repository / file for file in preset_files(manifest)):
        if source.is_file():
            final = out / source.relative_to(repository)
            with atomic_file(final) as path:
                shutil.copyfile(source, path)
            sums[final] = file_digest(final)
    with atomic_file(out / README) as path:
        path.write_text(_write_readme(manifest))
    write_manifest(manifest, [target.manifest(manifest.digest)])
    sums |= {path: file_digest(path) for path in (out / MARKER, out / README, target.manifest(manifest.digest))}
    with atomic_file(out / CHECKSUMS) as path:
        path.write_text("".join(f"{digest}  {file.relative_to(out)}\n" for file, digest in sorted(sums.items())))
    return sums


def _check_target(out: Path, root: CacheRoot, manifest: Manifest) -> None:
    """Refuse to export where something else lies."""
    if out.resolve() == root.path or root.path in out.resolve().parents:
        raise RefusedError(f"{out} lies in the cache root {root.path} itself; choose another folder")
    if out.exists() and not out.is_dir():
        raise RefusedError(f"{out} is a file; choose a folder")
    others = list_others(out) if out.is_dir() else []
    others += sorted({path.name for path in (out / "manifests").glob("*.json")} - {f"{manifest.digest}.json"})
    if others:
        raise RefusedError(
            f"{out} is not empty: it holds {others[0]}, which is not of this export; choose another folder, or remove it"
        )


def _copy(source: Path, final: Path, digest: str | None) -> dict[Path, str]:
    if source.is_file():
        with atomic_file(final) as path:
            shutil.copyfile(source, path)
    else:
        with temporary_folder(final) as folder:
            for name in (*check_store(source).files, STORE_FILE):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, folder / name)
            publish_folder(folder, final)
    try:
        return check_arrived(final, digest)
    except StoreDamagedError as error:
        CacheRoot(final.parents[2]).remove(final)
        check_arrived(source, digest)  # names what is damaged there
        raise OSError(f"{final} was not written as {source} was read; try again, or another disk") from error


def _write_readme(manifest: Manifest) -> str:
    recipe, trained = manifest.recipe, manifest.encoder_trained
    num_episodes = sum(entry.num_episodes for entry in manifest.entries)
    return f"""---
license: unknown
tags: [jepa-cache, world-model, {manifest.dataset}]
---

# Tokens of data set {manifest.dataset}, encoder {manifest.encoder} ({"trained" if trained else "UNTRAINED"})

A cache root of jepa-cache, exported from another one.

| | |
|---|---|
| units, episodes, steps | {len(manifest.entries)}, {num_episodes}, {manifest.num_steps} |
| tokens of a step | {manifest.num_tokens} x {manifest.width} |
| mode, rate | {manifest.mode}, {recipe.get("sampling", {}).get("fps", UNKNOWN)} Hz at most |
| action space | {manifest.action_space} |
| encoder weights | {recipe["encoder"]["weights"] if "encoder" in recipe else UNKNOWN} |
| licence of the encoder weights | {manifest.encoder_origin or f"{UNKNOWN}: fill in" if trained else "none: seeded random weights, or plain pixels"} |
| licence and origin of the recordings | {UNKNOWN}: fill in before you pass this on |

`manifests/{manifest.digest}.json` holds the recipes, the `store.json` of each store what it was made with, and `{CHECKSUMS}` the sha256
of every file (`sha256sum -c {CHECKSUMS}`). The stores are Zarr v3 with Parquet tables beside; they open without jepa-cache.

Use it in a checkout or project (`jepa-cache init`) whose settings (`dataset`, `encoder`, `encode.*`) are those of the recipe; `configs/` holds
the presets, which `pull` puts into a project that lacks them. From a URL:

    jepa-cache pull URL FOLDER
    python stages/fit_scaler.py dataset={manifest.dataset} encoder={manifest.encoder} cache.root=FOLDER
    python stages/train_predictor.py dataset={manifest.dataset} encoder={manifest.encoder} cache.root=FOLDER

Of a copy, `manifests/{manifest.digest}.json` is outputs/encode/manifest.json of the checkout, and FOLDER is the copy itself.
"""


def _copy_heads(weights: Path, out: Path) -> list[str]:
    """Copy the heads of costs that lie beside given weights beside the exported ones; their names. Others of that name go."""
    from jepa_cache.predictor.heads import HEADS, head_path

    copied = []
    for name in HEADS:
        source, target = head_path(weights, name), head_path(out, name)
        if source.is_file() and source.resolve() != target.resolve():
            with atomic_file(target) as partial:
                shutil.copyfile(source, partial)
            copied.append(name)
        elif not source.is_file():
            target.unlink(missing_ok=True)
    return copied


def _find_weights(reference: str, argument: str) -> Path:
    from jepa_cache.training.run import resolve_init

    try:
        return resolve_init(reference, Path.cwd())
    except ValueError as error:
        raise ValueError(f"{argument} {reference!r} names no weights; {str(error).partition('; ')[2]}") from error


def _read_predictor(run: Path, base: str | None, *, merge: bool) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """The weights under their official names, and the model card; both strictly of one architecture."""
    from jepa_cache.predictor.checkpoints import build_predictor, find_card, load_predictor, load_start_weights
    from jepa_cache.predictor.lora import CONFIG_FILE, load_adapter, merged_state, read_adapter_card

    if merge and base is None:
        raise ValueError("--merge needs --base WEIGHTS: the file that the adapter's training started from (train.init)")
    if base is not None and not merge:
        raise ValueError("--base belongs to --merge: it names the weights under a LoRA adapter")
    if merge:
        card = read_adapter_card(run)
        predictor = build_predictor(card["architecture"])
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
