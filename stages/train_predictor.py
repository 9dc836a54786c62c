"""Stage two: train the action-conditioned predictor from cached tokens.

    python stages/train_predictor.py
    python stages/train_predictor.py predictor=small train.lr=3e-4
    python stages/train_predictor.py --fresh

An interrupted training resumes under the same command. Writes outputs/train/run (weights, CSV) and outputs/train/live.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from jepa_cache.cli.stage import parse_stage_arguments, run_stage  # noqa: E402
from jepa_cache.config.loading import data_base, outputs_folder  # noqa: E402
from jepa_cache.training.signals import end_for_requeue, requeued_at_once  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    """Run the stage with command line arguments."""
    how = {"action": "store_true", "help": "forget this run's checkpoints and start over"}
    with requeued_at_once():
        arguments = parse_stage_arguments(ROOT, __doc__, argv, fresh=how)
        config = arguments.config

        from jepa_cache.data.dataset import open_dataset
        from jepa_cache.data.scaler import read_scaler
        from jepa_cache.data.windows import find_obstacle
        from jepa_cache.training.trainer import train

        dataset = open_dataset(config, ROOT)
        obstacle = find_obstacle(dataset, config)
        if obstacle is not None and config.split.val_share:
            raise ValueError(f"episodes: {obstacle}")
        outputs = outputs_folder(config, ROOT)
        scaler = read_scaler(outputs / "scaler/scaler.json")
        result = train(config, dataset, scaler, outputs / "train/run", base=data_base(ROOT), fresh=arguments.fresh)
    if result.stopped_by is not None:
        end_for_requeue(result.stopped_by, str(result.step))
    if result.weights is None:
        return  # another process than the first
    print(f"trained {result.num_trained} of {result.num_steps} training steps; checkpoints in {result.run}")
    if not dataset.manifest.encoder_trained:
        print("the encoder is untrained (random weights, or plain pixels): figures are relative, not results")
    following = (
        f"next: python stages/evaluate.py{arguments.again}"
        + (", or stages/act.py with the same settings" if config.dataset.has_simulator else "")
        if obstacle is None
        else "no episode is held out, so nothing can be evaluated"
    )
    print(f"wrote {config.outputs}/train/run/{result.weights.name}; {following}")


if __name__ == "__main__":
    run_stage(main)
