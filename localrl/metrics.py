"""A step in numbers, under the names that people know from TRL."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from localrl.algebra import group_moments, weighted_total
from localrl.batch import Batch, Readout
from localrl.memory.reality import compare
from localrl.memory.work import Phase

Metrics = dict[str, float]


CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
RESET_PEAK = "5"
"""What Linux takes for: the largest resident memory is what it is now."""


@dataclass
class Clock:
    """Seconds of each phase of one step and its peak memory (bytes): what the allocator handed out on a GPU, what the process held on a CPU
    under Linux. A phase entered again is added to."""

    announce: Callable[[str], None]
    device: torch.device
    planned: Mapping[Phase, int] = field(default_factory=dict)
    """Bytes that the plan expects of each of its phases (`localrl.memory.reality.tensors`)."""
    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    reserved: dict[str, int] = field(default_factory=dict)
    """On a GPU: what the allocator took from the card."""

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.announce(phase)
        watching = self._begin()
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
        if watching:
            self._end(phase)

    def memory(self) -> Metrics:
        """`memory/<phase>` (bytes), on a GPU `memory/<phase>_reserved`, and where the phase is planned `_planned` (bytes) and `_ratio`."""
        peaks = {f"memory/{name}": float(value) for name, value in self.peaks.items()}
        return peaks | {f"memory/{name}_reserved": float(value) for name, value in self.reserved.items()} | compare(self.planned, self.peaks)

    def report(self, batch: Batch, sampling: Metrics) -> Metrics:
        """Where the time went (`time/...`, seconds), how fast it sampled and learned (tokens/s), and each phase's memory."""
        metrics = {f"time/{name}": value for name, value in self.seconds.items()} | {"time/step": sum(self.seconds.values())}
        if generated := sampling.get("rollout/tokens"):
            metrics["tokens_per_second/rollout"] = generated / max(self.seconds["rollout"], 1e-9)
        metrics["tokens_per_second/learn"] = batch.sequence_length.sum().item() / max(self.seconds["learn"], 1e-9)
        return metrics | self.memory()

    def _begin(self) -> bool:
        """Forget earlier peaks. Whether there will be one to read."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return True
        try:
            CLEAR_REFS.write_text(RESET_PEAK)
        except OSError:                                             # no Linux, or a container that forbids it
            return False
        return True

    def _end(self, phase: str) -> None:
        if self.device.type == "cuda":
            self.peaks[phase] = max(self.peaks.get(phase, 0), torch.cuda.max_memory_allocated(self.device))
            self.reserved[phase] = max(self.reserved.get(phase, 0), torch.cuda.max_memory_reserved(self.device))
        elif peak := peak_resident():
            self.peaks[phase] = max(self.peaks.get(phase, 0), peak)


def peak_resident() -> int | None:
    """Bytes: the most that this process has held since the last reset, under Linux."""
    try:
        lines = STATUS.read_text(errors="replace").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


def most_memory(metrics: Mapping[str, float]) -> float | None:
    """Bytes: the step's peak; None: it was not measured.

    >>> most_memory({"memory/learn": 7.0, "memory/learn_planned": 9.0, "memory/others": 8.0})
    7.0
    """
    derived, other = ("_planned", "_ratio", "_reserved"), ("memory/others", "memory/oom_retries")
    peaks = [value for name, value in metrics.items() if name.startswith("memory/") and name not in other and not name.endswith(derived)]
    return max(peaks, default=None)


def describe(batch: Batch, names: Sequence[str]) -> Metrics:
    """Rewards and completions of a step, and what its groups can teach. Of finished rollouts; those that go on are counted only.

    `frac_reward_zero_std`: share of groups whose totals are all equal, so that group-relative advantages are 0. `frac_reward_cancelling`:
    those among them in which single rewards do vary. `frac_unscored`: share of rollouts without any reward.
    """
    metrics = {"num_tokens": float(batch.sequence_length.sum().item())}
    if batch.more is not None:
        metrics["completions/unfinished"] = batch.more.float().mean().item()
        if not batch.finished.any():
            return metrics
        batch = batch[batch.finished.nonzero().squeeze(1)]
    total = weighted_total(batch.rewards, batch.weights)
    length = batch.mask.sum(1).float()
    flat = group_moments(total, batch.group)[1] < 1e-6
    varied = (group_moments(batch.rewards, batch.group)[1] > 1e-6).any(1)
    metrics |= {
        "reward": total.nanmean().item(),
        "reward_std": _std(total),
        "frac_reward_zero_std": _share_of_groups(flat, batch),
        "frac_reward_cancelling": _share_of_groups(flat & varied, batch),
        "frac_unscored": total.isnan().float().mean().item(),
        "completions/mean_length": length.mean().item(),
        "completions/min_length": length.min().item(),
        "completions/max_length": length.max().item(),
        "completions/clipped_ratio": (~batch.done).float().mean().item(),
    }
    for index, name in enumerate(names):
        column = batch.rewards[:, index]
        metrics[f"rewards/{name}/mean"] = column.nanmean().item() if not column.isnan().all() else math.nan
        metrics[f"rewards/{name}/std"] = _std(column)
    return metrics


def mismatch(batch: Batch, logp: Tensor) -> Metrics:
    """How far the sampler is from the policy when the step begins, over the tokens just written. (B, T) -> numbers; none if nobody knows.

    Of the differences of log-probabilities (nats): `sampler/mean_difference` and `sampler/p99_difference`, absolute. `sampler/kl`: k3 estimate of
    KL(sampler || policy). `sampler/ess`: effective sample size of the tokens' importance weights, as a share of the tokens; 1: nothing to correct.
    `sampler/age`: updates of the policy since.
    """
    if batch.sampler is None:
        return {}
    difference = (logp - batch.sampler)[batch.fresh].cpu().double()
    if not len(difference) or difference.isnan().any():
        return {}
    weight = difference.exp()
    return {
        "sampler/mean_difference": difference.abs().mean().item(),
        "sampler/p99_difference": _quantile(difference.abs(), 0.99),
        "sampler/kl": (weight - 1 - difference).mean().item(),
        "sampler/ess": (weight.mean().square() / weight.square().mean()).item(),
        "sampler/age": (batch.age[:, None] * batch.fresh).sum().item() / batch.fresh.sum().item(),
    }


def _quantile(values: Tensor, share: float) -> float:
    """The entry below which that share of them lies. (n,), n >= 1. (torch.quantile takes 16 million at most.)"""
    return values.kthvalue(max(1, math.ceil(share * len(values)))).values.item()


def mean_entropy(readout: Readout, share: Tensor) -> dict[str, Tensor]:
    """A micro-batch's share of the step's mean `entropy` (nats a token), where it is known. `share` (B, T) sums to 1 over the step."""
    return {} if readout.entropy is None else {"entropy": (share * readout.entropy.detach()).sum()}


def _std(values: torch.Tensor) -> float:
    known = values[~values.isnan()]
    return known.std().item() if len(known) > 1 else 0.0


def _share_of_groups(rows: torch.Tensor, batch: Batch) -> float:
    """Of a property that all rows of a group share."""
    size = torch.bincount(batch.group)[batch.group]
    return ((rows / size).sum() / len(batch.group.unique())).item()
