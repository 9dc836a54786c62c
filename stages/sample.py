"""Render the synthetic sample recordings: first-person walks in the VPT contractor form, packed as tar shards.

    python stages/sample.py

Writes shards/sample/*.tar and shards/sample/index.json. With another data set chosen it writes an empty index and ends.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from jepa_cache.cli.stage import parse_stage_arguments, run_stage  # noqa: E402
from jepa_cache.config.parsing import parse_dataclass  # noqa: E402
from jepa_cache.sample.build import build_sample  # noqa: E402
from jepa_cache.sample.player import SampleConfig  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    """Run the stage with command line arguments."""
    config = parse_stage_arguments(ROOT, __doc__, argv).config
    out = ROOT / "shards/sample"
    if config.dataset.sample is None:
        out.mkdir(parents=True, exist_ok=True)
        if not (out / "index.json").exists():  # DVC wants the out to be there
            (out / "index.json").write_text('{"synthetic": true, "tars": []}\n')
        print(f"dataset is {config.dataset.name!r}: no sample to render; next: python stages/encode.py")
        return
    sample = parse_dataclass(SampleConfig, config.dataset.sample, f"configs/dataset/{config.dataset.name}.yaml: sample")
    index = build_sample(out, sample, num_workers=min(2, os.cpu_count() or 1))
    print(f"wrote {index.relative_to(ROOT)}; next: python stages/encode.py")


if __name__ == "__main__":
    run_stage(main)
