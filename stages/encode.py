"""Stage one: encode recordings once into the feature cache.

    python stages/encode.py                      what the data set preset names
    python stages/encode.py shards               folders, tar files, globs, {000000..000123} ranges
    python stages/encode.py shards encoder=vitl encode.fps=4
    python stages/encode.py shards --workers 4   one process for each GPU of this machine
    python stages/encode.py shards --scheduler tcp://node:8786      workers of a Dask cluster

Writes outputs/encode/manifest.json. Stores that exist under the same recipe are found again, never made again.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from jepa_cache.cli.stage import parse_stage_arguments, run_stage  # noqa: E402
from jepa_cache.config.loading import data_base, manifest_path, recordings_base  # noqa: E402
from jepa_cache.encoding.run import describe_result, encode_dataset  # noqa: E402
from jepa_cache.store.remote import resolve_cache_root  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    """Run the stage with command line arguments."""
    arguments = parse_stage_arguments(
        ROOT,
        __doc__,
        argv,
        paths="tar shards, or folders, globs and ranges of them",
        workers={"type": int, "metavar": "N", "help": "processes on this machine"},
        scheduler={"metavar": "ADDRESS", "help": "workers of a Dask scheduler, such as tcp://node:8786"},
    )
    config, base = arguments.config, recordings_base(arguments.config, ROOT)
    output = manifest_path(config, ROOT)
    root = resolve_cache_root(config.cache.root, data_base(ROOT))
    workers = arguments.workers if arguments.scheduler is None else arguments.scheduler
    result = encode_dataset(config, arguments.paths, base=base, root=root, workers=workers, output=output)
    print(describe_result(result, root))
    print(f"wrote {config.outputs}/encode/manifest.json; next: python stages/fit_scaler.py{arguments.again}")


if __name__ == "__main__":
    run_stage(main)
