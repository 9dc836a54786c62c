"""`jepa-cache params` and `jepa-cache add-encoder`: where each setting comes from; a preset for an image encoder."""

from __future__ import annotations

import re
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from jepa_cache.config.loading import data_base, find_repository, load_config

PRESET = """\
# {model_type} from {reference}, an image encoder of the transformers library; frame mode only.
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
compute_dtype: bfloat16
batch_size: 64          # frames per forward
weights: {reference}
weights_entry: null
weights_sha256: null   # empty: computed and recorded at first use
random_seed: null
"""
SIZES = ("embed_dim", "depth", "num_heads", "mlp_dim", "patch_size")


def add_encoder(
    source: Annotated[str, typer.Argument(help="folder of a saved model, or hf://owner/repo[@revision]")],
    name: Annotated[str, typer.Argument(help="of the preset: configs/encoder/NAME.yaml")],
    *,
    resolution: Annotated[int | None, typer.Option(help="pixels, in place of the model's own")] = None,
) -> None:
    """Write configs/encoder/NAME.yaml for a frozen image encoder (DINOv2, DINOv3, I-JEPA, ViT, ...).

    Sizes come from the model's config, preprocessing from its preprocessor_config.json. The model is not run, and one that
    needs code of its own is refused.

    Args:
        source: Folder of a saved model, or hf://owner/repo[@revision].
        name: Of the preset.
        resolution: Pixels, in place of the model's own; the short side grows in proportion.

    Raises:
        ValueError: The model cannot be used, the name is taken, or the resolution is no multiple of the patch.
    """
    # Not above: transformers' files are of no concern to `params`, which is to be quick.
    from jepa_cache.encoder.image import model_files, read_model, read_preprocessing, resolve_model

    root = find_repository(Path.cwd())
    path = root / "configs/encoder" / f"{name}.yaml"
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise ValueError(f"a preset's name has letters, digits, '_', '-' and '.'; got {name!r}")
    if path.exists():
        raise ValueError(f"{path.relative_to(root)} exists; choose another name, or remove it")
    folder = resolve_model(source, base=data_base(root))
    model_files(folder)
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
    reference = source if source.startswith("hf://") else str(folder.resolve())
    text = PRESET.format(
        model_type=model.model_type,
        reference=reference,
        num_tokens=num_tokens,
        kib=num_tokens * model.sizes["embed_dim"] * 2 / 1024,
        **model.sizes,
        **fields,
    )
    path.write_text(text)
    print(f"{model.model_type}: {num_tokens} tokens a frame, {model.sizes['embed_dim']} wide")
    print(
        f"wrote {path.relative_to(root)}; next: jepa-cache estimate encoder={name}, python stages/encode.py encoder={name}"
    )


def params(
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as train.lr=3e-4")] = None,
) -> None:
    """Print the resolved settings and where each comes from."""
    config = load_config(find_repository(Path.cwd()), overrides or [])
    values: dict[str, Any] = {}
    for section, settings in vars(config).items():
        if is_dataclass(settings):
            for key, value in asdict(settings).items():
                nested = value.items() if isinstance(value, dict) else ()
                values |= {f"{section}.{key}.{inner}": it for inner, it in nested} or {f"{section}.{key}": value}
    values |= {"cache.root": config.cache_root, "cache.verify_checksums": config.verify_checksums}
    width = max(map(len, values))
    for key, value in values.items():
        shown = repr(value) if isinstance(value, str) else str(value)
        print(f"{key:<{width}}  {shown:<40}  {config.origins.get(key, '')}")
