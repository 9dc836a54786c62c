"""Download VPT contractor recordings that OpenAI publishes and pack them into tar shards.

    python stages/fetch_vpt.py INDEX --num 20 --dry-run      # how many bytes
    python stages/fetch_vpt.py INDEX --num 20                # the same command goes on after an interruption

INDEX is the path or URL of an index file: https://github.com/openai/Video-Pre-Training, "Contractor Demonstrations".
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from jepa_cache.cli.stage import run_stage  # noqa: E402
from jepa_cache.sources import _vpt_fetch as fetch  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    """Run with command line arguments; exit code 1 when a recording could not be had."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", metavar="INDEX", help="path or URL of an index file")
    parser.add_argument("--num", type=int, default=20, help="number of recordings (default: %(default)s)")
    parser.add_argument("--start", type=int, default=0, help="place in the index of the first one (default: 0)")
    parser.add_argument("--out", type=Path, default=ROOT / "shards/vpt", help="folder of the tar shards")
    parser.add_argument("--options", action="store_true", help="keep each segment's -options.json as well")
    parser.add_argument("--dry-run", action="store_true", help="estimate the bytes and end")
    arguments = parser.parse_args(argv)
    if arguments.num < 1 or arguments.start < 0:
        raise ValueError(f"--num must be above 0 and --start not below; got {arguments.num} and {arguments.start}")

    recordings = fetch.read_index(arguments.index, arguments.out / fetch.STAGING)
    chosen = recordings[arguments.start : arguments.start + arguments.num]
    present = fetch.packed_keys(arguments.out)
    missing = [recording for recording in chosen if recording.key not in present]
    print(f"{len(recordings)} recordings in the index, {len(chosen)} chosen, {len(chosen) - len(missing)} at hand")
    suffixes = ("mp4", "jsonl", "options") if arguments.options else ("mp4", "jsonl")
    estimate = fetch.estimate_bytes(missing, suffixes)
    print(f"to download: about {estimate.total_bytes / 1e9:.2f} GB, from the sizes of {estimate.num_asked} recordings")
    fetch.check_disk(arguments.out, estimate.total_bytes)
    failures = estimate.failures
    if not arguments.dry_run:
        report = fetch.fetch_recordings(chosen, arguments.out, options=arguments.options)
        failures = report.failures
        print(
            f"packed {len(report.fetched)} recordings ({report.size_bytes / 1e6:.1f} MB) as {len(report.tars)} tar shards"
        )
    for failure in failures:
        print(f"failed: {failure.key}: {failure.reason}")
    if failures:
        sys.exit(f"{len(failures)} recordings could not be had; the same command tries them again")
    if not arguments.dry_run:
        print(f"next: set `dataset: vpt` in params.yaml, then python stages/encode.py {arguments.out}")


if __name__ == "__main__":
    run_stage(main)
