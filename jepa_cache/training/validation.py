"""The losses on held-out windows while a training runs, and what they say beside copying and beside another's actions."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

from jepa_cache.data.loader import Batch
from jepa_cache.predictor.rollout import l1_error
from jepa_cache.training.feed import Feed
from jepa_cache.training.losses import Losses
from jepa_cache.training.processes import sum_over_processes
from jepa_cache.training.stepping import Objective


@torch.no_grad()
def validate(objective: Objective, feed: Feed, accelerator: Accelerator) -> dict[str, float]:
    """Mean losses over a few windows of every held-out episode, shared out among the processes.

    Returns:
        `val_total`, `val_jloss`, `val_sloss`, and of a mixture `val_jloss.<data set>`. With two held-out episodes or more also
        the gaps of the evaluation, teacher-forced, but as means over windows: `val_gap_copy_last` and
        `val_gap_shuffled_actions`, L1 of these less L1 of the predictor.
    """
    objective.eval()
    sums, gaps = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    by_dataset = torch.zeros(2, len(feed.datasets), dtype=torch.float64)  # sums and counts
    for batch in feed.validation_batches():
        losses = objective(batch.tokens, batch.actions, batch.states)
        sums += torch.stack([losses.jloss, losses.sloss]).double().cpu() * len(batch.tokens)
        if feed.compares:
            gaps += _sum_gaps(objective, batch, losses, feed.shuffled_actions(batch.numbers))
        if len(feed.datasets) > 1:
            owners = torch.from_numpy(feed.datasets_of(batch.numbers, held_out=True))
            by_dataset[0].index_add_(0, owners, losses.jloss_by_window.double().cpu())
            by_dataset[1].index_add_(0, owners, torch.ones(len(owners), dtype=torch.float64))
    objective.train()
    flat = torch.cat([sums, gaps, by_dataset.flatten()])
    if accelerator.num_processes > 1:
        flat = sum_over_processes(accelerator, flat.to(accelerator.device, torch.float32)).double().cpu()
    jloss, sloss = (flat[:2] / len(feed.validation)).tolist()
    row = {"val_total": jloss + sloss, "val_jloss": jloss, "val_sloss": sloss}
    if feed.compares:
        names = ("val_gap_copy_last", "val_gap_shuffled_actions")
        row |= dict(zip(names, (flat[2:4] / len(feed.validation)).tolist(), strict=True))
    if len(feed.datasets) > 1:
        totals, counts = flat[4:].view(2, -1).tolist()
        row |= {
            f"val_jloss.{name}": total / count
            for name, total, count in zip(feed.datasets, totals, counts, strict=True)
            if count
        }
    return row


def _sum_gaps(objective: Objective, batch: Batch, losses: Losses, shuffled: Tensor) -> Tensor:
    """[2] float64: L1 of copying and of the predictor with `shuffled` actions [B, T-1, A], less its own, over the windows."""
    h = objective.as_reps(batch.tokens)
    own = l1_error(losses.z_tf, h[:, 1:])
    others = l1_error(h[:, :-1], h[:, 1:]), l1_error(objective.predict(h, shuffled, batch.states), h[:, 1:])
    return torch.stack([(other - own).mean(dim=1).double().sum() for other in others]).cpu()
