"""The closing summary of stage one in words."""

from __future__ import annotations

from jepa_cache.encoding.run import EncodeResult
from jepa_cache.store.root import CacheRoot

MAX_SHOWN = 10  # implausible values


def describe_result(result: EncodeResult, root: CacheRoot) -> str:
    """What was made, how long it took, what limited it, and where it lies."""
    manifest, timing = result.manifest, result.timing
    num_episodes = sum(entry.num_episodes for entry in manifest.entries)
    lines = [f"note: {note}" for note in (*manifest.notes, *result.notes)]
    lines += [f"implausible: {text}" for text in result.implausible[:MAX_SHOWN]]
    if len(result.implausible) > MAX_SHOWN:
        lines.append(f"implausible: and {len(result.implausible) - MAX_SHOWN} more, see `jepa-cache inspect`")
    if timing is None:
        lines.append(
            f"nothing to encode: all {result.num_units} units are in the cache under recipe {manifest.fingerprint}"
        )
    else:
        lines.append(
            f"encoded {result.num_encoded} of {result.num_units} units: {timing.num_episodes} episodes, "
            f"{timing.num_frames} frames, {timing.num_bytes / 1e6:.1f} MB of tokens in {timing.elapsed_s:.1f} s "
            f"({timing.num_frames / max(timing.elapsed_s, 1e-9):.0f} frames/s)"
        )
        lines.append(
            f"limit: {timing.limit} (waited {timing.decode_s:.1f} s for decoding, spent {timing.encode_s:.1f} s in the "
            f"encoder, waited {timing.write_s:.1f} s for the disk)"
        )
    lines.append(
        f"cache: {num_episodes} episodes, {manifest.num_steps} steps of {manifest.num_tokens} x {manifest.width} tokens, "
        f"{len(manifest.skipped)} skipped, in {root.name}"
    )
    if not manifest.comparable:
        lines.append(
            "clip mode: early steps have seen later frames, so scores are not comparable with frame or tubelet mode"
        )
    return "\n".join(lines)
