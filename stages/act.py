"""Act in the simulator that the recordings were made in: to goal pictures, with several trainings, beside controls; and a film of it.

    python stages/act.py
    python stages/act.py act.task=push act.look=unseen 'act.seeds=[3, 4, 5]'

Trains stage two for each of `act.seeds` (what is trained already is taken). Writes outputs/act/metrics.json, and in outputs/act/run
episodes.csv, report.html, film.gif, film.mp4 and film.png. Does nothing but say so for data sets without a simulator. docs/acting.md.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from jepa_cache.cli.stage import parse_stage_arguments, run_stage  # noqa: E402
from jepa_cache.config.loading import data_base, outputs_folder  # noqa: E402
from jepa_cache.files import full_disk_named  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    """Run the stage with command line arguments."""
    config = parse_stage_arguments(ROOT, __doc__, argv).config
    outputs = outputs_folder(config, ROOT)
    out = outputs / "act"

    from jepa_cache.acting.simulator import open_simulator, write_nothing

    simulator = open_simulator(config)
    if simulator is None:
        reason = f"dataset {config.dataset.name!r} has no simulator"
        write_nothing(out, reason)
        print(f"{reason}: nothing to act in; dataset=sample_robot has a simulator")
        return

    from jepa_cache.acting.run import act_run, describe_acting, train_seeds
    from jepa_cache.api import Encoder
    from jepa_cache.data.dataset import open_dataset
    from jepa_cache.data.scaler import read_scaler

    dataset, scaler = open_dataset(config, ROOT), read_scaler(outputs / "scaler/scaler.json")
    with full_disk_named(out):
        weights = train_seeds(config, dataset, scaler, out / "seeds", base=data_base(ROOT))
        encoder = Encoder.open(config, data_base(ROOT))
        metrics = act_run(config, dataset, encoder, weights, simulator, out)
    print(describe_acting(metrics))
    film = ", film" if config.act.num_filmed else ""
    print(
        f"wrote {config.outputs}/act/metrics.json, run/episodes.csv{film}; next: open {config.outputs}/act/run/report.html"
    )


if __name__ == "__main__":
    run_stage(main)
