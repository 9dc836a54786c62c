"""Measure the trained predictor on held-out episodes, against baselines and with its actions taken away.

    python stages/evaluate.py

Writes outputs/evaluate/report.html, to be opened in a browser, and what it is made of: metrics.json, tables (*.csv)
and pictures/; summary.json has the few figures that `dvc exp show` lists. docs/evaluation_report.md explains them.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from jepa_cache.cli.stage import parse_stage_arguments, run_stage  # noqa: E402
from jepa_cache.config.loading import outputs_folder  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    """Run the stage with command line arguments."""
    parsed = parse_stage_arguments(ROOT, __doc__, argv)
    config = parsed.config

    from jepa_cache.evaluation.context import open_training
    from jepa_cache.evaluation.run import describe_metrics, evaluate_run

    dataset, weights = open_training(config, ROOT)
    metrics = evaluate_run(config, dataset, weights, outputs_folder(config, ROOT) / "evaluate", parsed.again)
    print(describe_metrics(metrics, config.evaluate.horizon))
    print(
        f"wrote {config.outputs}/evaluate/report.html, metrics.json, tables, pictures/; next: open report.html; jepa-cache compare --all"
    )


if __name__ == "__main__":
    run_stage(main)
