"""Which encoder's tokens a predictor's weights were trained on, and whether a cache holds those.

A predictor reads the tokens of one encoder only: of another one, even of the same size, they are noise to it. Third parties report that
the encoder inside vjepa2-ac-vitg.pt differs from vitg.pt, so the names of files and presets prove nothing; identities do.
An identity is what the recipe of a cache says of its weights: `file:<sha256>#<entry>`, `file:<sha256>` or `random:<sha256>`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from jepa_cache.predictor.checkpoints import OFFICIAL_SUFFIXES, CheckpointError, find_card, read_official

ENCODER_ENTRIES = ("encoder", "target_encoder")
"""Both are the frozen encoder that the predictor of the same file was trained on: a copy and the one that made the targets."""
ENCODER_FIELD = "encoder_weights"
"""Of a card: the identity of the encoder in the recipe of the cache that the predictor was trained on."""


class EncoderMatch(NamedTuple):
    """What a run records of its starting weights."""

    cache: str
    """Identity of the encoder that made the cache's tokens."""
    file: tuple[str, ...]
    """Identities of the encoder that the weights belong to; empty where the file does not say."""
    matches: bool
    """False only where the caller allowed it."""


def encoder_identities(path: Path, digest: Callable[[Path], str]) -> tuple[str, ...]:
    """Name the encoder that a predictor's weights belong to, as the recipe of a cache names it.

    An official file says it by holding the encoder; a file of this project by its card.

    Args:
        path: weights as `checkpoints.read_state` takes them.
        digest: gives a file's hex sha256, possibly remembered from an earlier run; asked only where the file holds an encoder.

    Returns:
        Every identity under which a cache of that encoder may be known; empty where the file does not say.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    if path.suffix in OFFICIAL_SUFFIXES:
        entries = [entry for entry in ENCODER_ENTRIES if read_official(path).get(entry)]
        held = [f"file:{digest(path)}#{entry}" for entry in entries]
    else:
        held = []
    named = (find_card(path) or {}).get(ENCODER_FIELD)
    return (*held, *([named] if isinstance(named, str) else []))


def check_encoder(
    path: Path, cache_weights: str, *, digest: Callable[[Path], str], allow_other: bool = False
) -> EncoderMatch:
    """Refuse to combine a predictor's weights with a cache of another encoder's tokens.

    Args:
        path: the predictor's weights.
        cache_weights: identity of the encoder in the cache's recipe (`recipe["encoder"]["weights"]`).
        digest: see `encoder_identities`.
        allow_other: combine them all the same; what is returned says so and belongs into the run's record.

    Raises:
        CheckpointError: they do not belong together, or the file does not say, and `allow_other` is not set.
    """
    found = encoder_identities(path, digest)
    if cache_weights in found:
        return EncoderMatch(cache_weights, found, True)
    if not allow_other:
        said = (
            f"those weights were trained on the tokens of {' or '.join(found)}"
            if found
            else "the file holds a predictor alone and does not say which encoder it was trained with"
        )
        raise CheckpointError(
            f"the predictor weights {path} may not be trained on this cache: its tokens are those of encoder {cache_weights}, but {said}. "
            "Tokens of another encoder are noise to a predictor. Encode with the encoder that belongs to it (for the released file: "
            "encoder=ac_vitg with encode.weights naming that same file), or set train.allow_other_encoder: true, which is recorded"
        )
    return EncoderMatch(cache_weights, found, False)
