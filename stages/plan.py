"""Plan to recorded goal frames of held-out episodes, and compare with what was done.

    python stages/plan.py
    python stages/plan.py plan.settings=world_model plan.num_samples=null plan.num_rounds=null
    python stages/plan.py plan.settings=jump plan.num_samples=null plan.num_rounds=null 'plan.horizons=[2,4,8]'

Writes outputs/plan/metrics.json, timing.json, plans.csv and plans.png.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from jepa_cache.cli.stage import parse_stage_arguments, run_stage  # noqa: E402
from jepa_cache.config.loading import outputs_folder  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    """Run the stage with command line arguments."""
    config = parse_stage_arguments(ROOT, __doc__, argv).config

    from jepa_cache.evaluation.context import open_training
    from jepa_cache.evaluation.planning import describe_plans, plan_run

    dataset, weights = open_training(config, ROOT)
    metrics = plan_run(config, dataset, weights, outputs_folder(config, ROOT) / "plan")
    print(describe_plans(metrics))
    print(f"wrote {config.outputs}/plan/metrics.json, timing.json, plans.csv, plans.png; next: docs/planning.md")


if __name__ == "__main__":
    run_stage(main)
