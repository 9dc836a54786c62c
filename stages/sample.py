"""Render the synthetic sample recordings: walks in the VPT contractor form, or episodes of a simulated robot in DROID's raw form.

    python stages/sample.py
    python stages/sample.py dataset=sample_robot

Writes shards/sample/ or shards/sample_robot/, each with an index.json, and leaves the other as it is. With another data set
chosen it renders nothing and ends.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from jepa_cache.cli.stage import parse_stage_arguments, run_stage  # noqa: E402
from jepa_cache.config.parsing import ConfigError, parse_dataclass  # noqa: E402

# By the source that reads them.
FOLDERS = {"vpt": ROOT / "shards/sample", "droid_raw": ROOT / "shards/sample_robot"}


def main(argv: list[str] | None = None) -> None:
    """Run the stage with command line arguments."""
    arguments = parse_stage_arguments(ROOT, __doc__, argv)
    dataset = arguments.config.dataset
    for out in FOLDERS.values():
        out.mkdir(parents=True, exist_ok=True)
        if not (out / "index.json").exists():  # DVC wants the outs to be there
            (out / "index.json").write_text('{"synthetic": true, "tars": [], "episodes": []}\n')
    if dataset.sample is None:
        print(f"dataset is {dataset.name!r}: no sample to render; next: python stages/encode.py{arguments.again}")
        return
    if dataset.source not in FOLDERS:
        known = " or ".join(FOLDERS)
        raise ConfigError(
            f"configs/dataset/{dataset.name}.yaml: sample needs source {known}; set it to null for {dataset.source}"
        )
    if dataset.source == "vpt":  # each imported where it is wanted, by the workers too
        from jepa_cache.sample.build import build_sample as build
        from jepa_cache.sample.player import SampleConfig as Sample
    else:
        from jepa_cache.sample.robot_episodes import RobotSampleConfig as Sample
        from jepa_cache.sample.robot_episodes import build_robot_sample as build
    settings = parse_dataclass(Sample, dataset.sample, f"configs/dataset/{dataset.name}.yaml: sample")
    index = build(FOLDERS[dataset.source], settings, num_workers=min(2, os.cpu_count() or 1))
    print(f"wrote {index.relative_to(ROOT)}; next: python stages/encode.py{arguments.again}")


if __name__ == "__main__":
    run_stage(main)
