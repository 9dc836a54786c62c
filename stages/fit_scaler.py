"""Fit the means and deviations of actions and states over the training episodes.

    python stages/fit_scaler.py

Writes outputs/scaler/scaler.json.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from jepa_cache.cli.stage import parse_stage_arguments, run_stage  # noqa: E402
from jepa_cache.config.loading import outputs_folder  # noqa: E402
from jepa_cache.data.dataset import TRAIN, VAL, open_dataset  # noqa: E402
from jepa_cache.data.scaler import fit_scaler, write_scaler  # noqa: E402
from jepa_cache.data.windows import LEAST_FOR_YES, count_episodes, find_obstacle  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    """Run the stage with command line arguments."""
    arguments = parse_stage_arguments(ROOT, __doc__, argv)
    config = arguments.config
    dataset = open_dataset(config, ROOT)
    segments, held_out = (dataset.segments_of(split, config.split, config.filter) for split in (TRAIN, VAL))
    if obstacle := find_obstacle(dataset, config):
        print(f"episodes: {obstacle}")
    scaler = fit_scaler(dataset, segments, config.scaler)
    write_scaler(scaler, outputs_folder(config, ROOT) / "scaler/scaler.json")
    whole = dataset.segments_of(TRAIN, config.split)
    if (num_steps := sum(run.stop - run.start for run in whole)) != scaler.num_train_steps:
        print(
            f"filters: {scaler.num_train_steps} of {num_steps} steps are left, in {count_episodes(segments)} of {count_episodes(whole)} episodes"
        )
    num_training, num_held_out = count_episodes(segments), count_episodes(held_out)
    needs = f": evaluate needs 2, a verdict of yes {LEAST_FOR_YES}" if num_held_out < LEAST_FOR_YES else ""
    print(
        f"fitted on {scaler.num_train_steps} steps of {num_training} training episodes; {num_held_out} are held out{needs}"
    )
    print(f"wrote {config.outputs}/scaler/scaler.json; next: python stages/train_predictor.py{arguments.again}")


if __name__ == "__main__":
    run_stage(main)
