"""The losses on held-out windows while a training runs."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from jepa_cache.training.feed import Feed
from jepa_cache.training.processes import sum_over_processes
from jepa_cache.training.stepping import Objective


@torch.no_grad()
def validate(objective: Objective, feed: Feed, accelerator: Accelerator) -> dict[str, float]:
    """Mean losses over a few windows of every held-out episode, shared out among the processes.

    Returns:
        `val_total`, `val_jloss`, `val_sloss`, and of a mixture `val_jloss.<data set>`.
    """
    objective.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    by_dataset = torch.zeros(2, len(feed.datasets), dtype=torch.float64)  # sums and counts
    for batch in feed.validation_batches():
        losses = objective(batch.tokens, batch.actions, batch.states)
        sums += torch.stack([losses.jloss, losses.sloss]).double().cpu() * len(batch.tokens)
        if len(feed.datasets) > 1:
            owners = torch.from_numpy(feed.datasets_of(batch.numbers, held_out=True))
            by_dataset[0].index_add_(0, owners, losses.jloss_by_window.double().cpu())
            by_dataset[1].index_add_(0, owners, torch.ones(len(owners), dtype=torch.float64))
    objective.train()
    flat = torch.cat([sums, by_dataset.flatten()]).to(accelerator.device, torch.float32)
    flat = (
        sum_over_processes(accelerator, flat).double().cpu()
        if accelerator.num_processes > 1
        else torch.cat([sums, by_dataset.flatten()])
    )
    jloss, sloss = (flat[:2] / len(feed.validation)).tolist()
    row = {"val_total": jloss + sloss, "val_jloss": jloss, "val_sloss": sloss}
    if len(feed.datasets) > 1:
        totals, counts = flat[2:].view(2, -1).tolist()
        row |= {
            f"val_jloss.{name}": total / count
            for name, total, count in zip(feed.datasets, totals, counts, strict=True)
            if count
        }
    return row
