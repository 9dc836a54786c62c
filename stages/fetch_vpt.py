"""Download VPT contractor recordings that OpenAI publishes and pack them into tar shards.

    python stages/fetch_vpt.py INDEX --num 20 --dry-run      # how many bytes
    python stages/fetch_vpt.py INDEX --num 20                # the same command resumes after an interruption

INDEX is the path or URL of an index file: https://github.com/openai/Video-Pre-Training, "Contractor Demonstrations".
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from jepa_cache.cli.stage import run_stage  # noqa: E402
from jepa_cache.sources.parsers.vpt_downloads import fetch_vpt  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    """Run with command line arguments; exit code 1 when a recording could not be fetched."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", metavar="INDEX", help="path or URL of an index file")
    parser.add_argument("--num", type=int, default=20, help="number of recordings (default: %(default)s)")
    parser.add_argument("--start", type=int, default=0, help="position in the index of the first one (default: 0)")
    parser.add_argument("--out", type=Path, default=ROOT / "shards/vpt", help="folder of the tar shards")
    parser.add_argument("--dry-run", action="store_true", help="estimate the bytes and end")
    arguments = parser.parse_args(argv)
    if arguments.num < 1 or arguments.start < 0:
        raise ValueError(f"--num must be above 0 and --start not below; got {arguments.num} and {arguments.start}")
    failures = fetch_vpt(**vars(arguments))
    for key, reason in failures.items():
        print(f"failed: {key}: {reason}")
    if failures:
        sys.exit(f"{len(failures)} recordings could not be fetched; the same command tries them again")
    if not arguments.dry_run:
        print(f"next: set `dataset: vpt` in params.yaml, then python stages/encode.py {arguments.out}")


if __name__ == "__main__":
    run_stage(main)
