"""What scores say: who teaches, who agrees with whom, what each algorithm makes of them. Arithmetic on a trial; nothing is run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

import torch

from localrl.algorithms import ALGORITHMS
from localrl.algorithms.base import Algorithm
from localrl.batch import Batch, Readout, Rollout, collate
from localrl.evaluate import total
from localrl.lab.trial import Trial
from localrl.metrics import describe

BINS = 12


@dataclass(frozen=True)
class Summary:
    """One reward on all completions."""

    name: str
    values: tuple[float, ...]
    """Those that there are."""
    missing: int
    mean: float
    std: float
    """Of the population; both NaN without values."""
    flat: float
    """Share of groups in which it says the same of all."""
    seconds: float
    """Of its call over all completions."""
    trouble: str

    def histogram(self, bins: int = BINS) -> list[tuple[float, float, int]]:
        """(from, to, how many), evenly between the least and the greatest; a single bar where all are equal."""
        return histogram(self.values, bins)


def histogram(values: Sequence[float], bins: int = BINS) -> list[tuple[float, float, int]]:
    """
    >>> histogram([0.0, 0.0, 1.0], 2)
    [(0.0, 0.5, 2), (0.5, 1.0, 1)]
    >>> histogram([3.0, 3.0])
    [(3.0, 3.0, 2)]
    """
    if not values:
        return []
    low, high = min(values), max(values)
    width = (high - low) / bins
    if not width or not math.isfinite(width):
        return [(low, high, len(values))]
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int((value - low) / width))] += 1
    return [(low + at * width, low + (at + 1) * width, count) for at, count in enumerate(counts)]


def batch_of(trial: Trial, weights: Sequence[float]) -> Batch:
    """The trial as the batch that training would make of it."""
    return collate(trial.rollouts, weights, trial.limit)


def summaries(trial: Trial) -> list[Summary]:
    """Each reward by itself."""
    groups = grouped(trial)
    found = []
    for at, name in enumerate(trial.names):
        values = tuple(r.rewards[at] for r in trial.rollouts if not math.isnan(r.rewards[at]))
        flat = [max(own) - min(own) < 1e-6 if (own := [r.rewards[at] for r in group if not math.isnan(r.rewards[at])]) else True for group in groups]
        mean, std = (fmean(values), pstdev(values)) if values else (math.nan, math.nan)
        seconds = trial.health[name].seconds if name in trial.health else 0.0
        found.append(Summary(name, values, len(trial.rollouts) - len(values), mean, std, fmean(flat), seconds, trial.troubles.get(name, "")))
    return found


def grouped(trial: Trial) -> list[list[Rollout]]:
    """The completions of each prompt."""
    groups: dict[int, list[Rollout]] = {}
    for rollout in trial.rollouts:
        groups.setdefault(rollout.request.prompt.id, []).append(rollout)
    return list(groups.values())


def signal(trial: Trial, weights: Sequence[float]) -> dict[str, float]:
    """As a training step would report it: `reward`, `reward_std`, `frac_reward_zero_std`, `frac_reward_cancelling`, `frac_unscored`, ..."""
    return describe(batch_of(trial, weights), trial.names)


def correlations(trial: Trial) -> list[list[float | None]]:
    """Pearson's, of each two rewards over the completions that have both; None where one of them does not vary."""
    columns = [[r.rewards[at] for r in trial.rollouts] for at in range(len(trial.names))]
    return [[correlation(a, b) for b in columns] for a in columns]


def correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """
    >>> correlation([0., 1., 2.], [5., 3., 1.]), correlation([0., 1.], [2., 2.])
    (-1.0, None)
    """
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if not math.isnan(x) and not math.isnan(y)]
    if len(pairs) < 2:
        return None
    mean_x, mean_y = fmean(x for x, _ in pairs), fmean(y for _, y in pairs)
    across = sum((x - mean_x) * (y - mean_y) for x, y in pairs)
    size = math.sqrt(sum((x - mean_x) ** 2 for x, _ in pairs)) * math.sqrt(sum((y - mean_y) ** 2 for _, y in pairs))
    return None if size < 1e-12 else max(-1.0, min(1.0, round(across / size, 12)))


@dataclass(frozen=True)
class Advantages:
    """What one algorithm makes of the scores."""

    label: str
    values: tuple[float, ...]
    """One a completion; empty: not to be had, `note` says why."""
    weights: tuple[float, ...]
    """That it gives the rewards; where they follow from gradients, not the given ones."""
    note: str = ""


def advantages(trial: Trial, weights: Sequence[float]) -> list[Advantages]:
    """Of every algorithm that shows itself in the lab, by its own functions."""
    batch = batch_of(trial, weights)
    return [_advantages(label, algorithm, batch, trial, weights) for label, algorithm in variants()]


def variants() -> list[tuple[str, Algorithm]]:
    """(name for people, algorithm): what the algorithms declare, those that need no gradients first."""
    found = [(label, kind(**{"name": name, **values})) for name, kind in ALGORITHMS.items() for label, values in kind.lab]
    exact = [(label, algorithm.for_sampler(exact=True)) for label, algorithm in found]
    return sorted(exact, key=lambda item: (bool(item[1].directions((1.0, 1.0))), item[1].decouples_rewards))


def steered() -> Algorithm | None:
    """The one whose weights follow from gradients, if there is one."""
    return next((algorithm for _, algorithm in variants() if algorithm.directions((1.0, 1.0))), None)


def _advantages(label: str, algorithm: Algorithm, batch: Batch, trial: Trial, weights: Sequence[float]) -> Advantages:
    credit = algorithm.credit(batch, Readout())
    if not algorithm.directions(weights):
        alone = "with one reward there is nothing to direct" if algorithm.directions((1.0, 1.0)) else ""
        return Advantages(label, tuple(algorithm.deserved(credit).tolist()), tuple(weights), alone)
    if trial.gram is None:
        return Advantages(label, (), (), "needs the rewards' gradients: try again with gradients")
    steering = algorithm.steer(signed_gram(trial.gram, weights), weights, [])
    given = tuple(w * (-1.0 if own < 0 else 1.0) for w, own in zip(steering.weights, weights, strict=False))
    note = "" if steering.rate else "the gradients cancel: this update would be left out"
    return Advantages(label, tuple(algorithm.deserved(credit, steering.weights).tolist()), given, note)


def signed_gram(gram: Sequence[Sequence[float]], weights: Sequence[float]) -> torch.Tensor:
    """The Gram matrix with the gradients of penalties turned, and those of weight 0 gone."""
    signs = torch.tensor([float((w > 0) - (w < 0)) for w in weights], dtype=torch.float64)
    return torch.tensor(gram, dtype=torch.float64) * torch.outer(signs, signs)


@dataclass(frozen=True)
class Probe:
    """Answers that deserve nothing, beside real ones."""

    kind: str
    rewards: tuple[float, ...]
    """Mean of each; NaN: none."""
    total: float
    beats: bool
    """It earns more than real answers to the same prompts do on average."""


def probed(trial: Trial, weights: Sequence[float]) -> list[Probe]:
    """Each kind of probe against real answers to the same prompts. A total counts only rewards that there are for both."""
    found = []
    for kind, rollouts in trial.probes.items():
        asked = {r.request.prompt.id for r in rollouts}
        real = [r for r in trial.rollouts if r.request.prompt.id in asked]
        fake, honest = means(rollouts, len(weights)), means(real, len(weights))
        both = [not math.isnan(f) and not math.isnan(h) for f, h in zip(fake, honest, strict=True)]
        kept = [(total([f for f, ok in zip(m, both, strict=True) if ok], [w for w, ok in zip(weights, both, strict=True) if ok])) for m in (fake, honest)]
        found.append(Probe(kind, fake, kept[0], kept[0] > kept[1] + 1e-9))
    return found


def means(rollouts: Sequence[Rollout], count: int) -> tuple[float, ...]:
    """Of each reward over the completions that have it.

    >>> means([], 2)
    (nan, nan)
    """
    columns = [[r.rewards[at] for r in rollouts if not math.isnan(r.rewards[at])] for at in range(count)]
    return tuple(fmean(column) if column else math.nan for column in columns)


def warnings(trial: Trial, weights: Sequence[float]) -> list[str]:
    """What a person should know before training with these rewards and weights."""
    found = list(trial.messages)
    stats = signal(trial, weights)
    flat, cancelling = stats["frac_reward_zero_std"], stats["frac_reward_cancelling"]
    if max(len(group) for group in grouped(trial)) < 2:
        found.append("one completion a prompt: methods that compare answers to one prompt need at least two")
    elif flat > 0.8:
        found.append(f"{flat:.0%} of the prompts teach nothing where answers are compared, for all their answers get the same: take easier or harder prompts, "
                     "or a reward with more steps between bad and good")
    if cancelling > 0:
        found.append(f"in {cancelling:.0%} of the groups the rewards differ but cancel in the sum: normalise them apart, or change their weights")
    if better := [probe for probe in probed(trial, weights) if probe.beats]:
        kinds = ", ".join(f"'{probe.kind}' ({probe.total:.3g})" for probe in better)
        found.append(f"answers that deserve nothing earn more than real ones do: {kinds}; a model will find that out, so let a reward ask for the content")
    for a, b, r in _twins(trial):
        found.append(f"'{a}' and '{b}' say the same (correlation {r:.2f}): one of them is enough")
    return found


def _twins(trial: Trial) -> list[tuple[str, str, float]]:
    table = correlations(trial)
    return [
        (trial.names[i], trial.names[j], r)
        for i in range(len(table)) for j in range(i) if (r := table[i][j]) is not None and r > 0.99
    ]  # fmt: skip
