"""A step in numbers, under the names that people know from TRL."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from localrl.algebra import group_moments, weighted_total
from localrl.batch import Batch

Metrics = dict[str, float]


@dataclass
class Clock:
    """Seconds of each phase of one step, and on a GPU its peak memory (bytes). A phase entered again is added to."""

    announce: Callable[[str], None]
    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.announce(phase)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peaks[phase] = max(self.peaks.get(phase, 0), torch.cuda.max_memory_allocated(self.device))
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def report(self, batch: Batch) -> Metrics:
        """Where the time went (`time/...`, seconds), how fast it sampled and learned (tokens/s), and each phase's peak (bytes)."""
        metrics = {f"time/{name}": value for name, value in self.seconds.items()} | {"time/step": sum(self.seconds.values())}
        metrics["tokens_per_second/rollout"] = batch.fresh.sum().item() / max(self.seconds["rollout"], 1e-9)
        metrics["tokens_per_second/learn"] = batch.sequence_length.sum().item() / max(self.seconds["learn"], 1e-9)
        return metrics | {f"memory/{name}": float(value) for name, value in self.peaks.items()}


def describe(batch: Batch, names: Sequence[str]) -> Metrics:
    """Rewards and completions of a step, and what its groups can teach.

    `frac_reward_zero_std`: share of groups whose totals are all equal, so that group-relative advantages are 0. `frac_reward_cancelling`:
    those among them in which single rewards do vary. `frac_unscored`: share of rollouts without any reward.
    """
    total = weighted_total(batch.rewards, batch.weights)
    length = batch.mask.sum(1).float()
    flat = group_moments(total, batch.group)[1] < 1e-6
    varied = (group_moments(batch.rewards, batch.group)[1] > 1e-6).any(1)
    metrics = {
        "reward": total.nanmean().item(),
        "reward_std": _std(total),
        "frac_reward_zero_std": _share_of_groups(flat, batch),
        "frac_reward_cancelling": _share_of_groups(flat & varied, batch),
        "frac_unscored": total.isnan().float().mean().item(),
        "completions/mean_length": length.mean().item(),
        "completions/min_length": length.min().item(),
        "completions/max_length": length.max().item(),
        "completions/clipped_ratio": (~batch.done).float().mean().item(),
        "num_tokens": float(batch.sequence_length.sum().item()),
    }
    for index, name in enumerate(names):
        column = batch.rewards[:, index]
        metrics[f"rewards/{name}/mean"] = column.nanmean().item() if not column.isnan().all() else math.nan
        metrics[f"rewards/{name}/std"] = _std(column)
    return metrics


def _std(values: torch.Tensor) -> float:
    known = values[~values.isnan()]
    return known.std().item() if len(known) > 1 else 0.0


def _share_of_groups(rows: torch.Tensor, batch: Batch) -> float:
    """Of a property that all rows of a group share."""
    size = torch.bincount(batch.group)[batch.group]
    return ((rows / size).sum() / len(batch.group.unique())).item()
