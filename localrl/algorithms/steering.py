"""Several gradients, one update: how far they agree, and the least change of the weights that lets every one of them profit.

Pure functions in float64 on the gradients' Gram matrix G (K, K), G_ij = <g_i, g_j>; nothing here sees a gradient itself.

    n_i = sqrt(G_ii),  cos_ij = G_ij / (n_i n_j),  wedge_ij = sqrt(G_ii G_jj - G_ij^2),  angle_ij = atan2(wedge_ij, G_ij)

For an update d = sum_k u_k g_k / n_k (u >= 0, unit gradients): p_k is the cosine of gradient k with d,

    dispersion D = (sum c)^2 / (K sum c^2), c = max(p, 0):  1 every gradient profits alike, 1 / K one takes all
    coherence    C = |d| / sum u:                           0 they cancel

`control` leaves the weights as they are while D >= dispersion, min p >= -tau and C >= coherence. Otherwise it walks, in 64ths, towards the
shortest vector between the unit gradients (the point of their simplex nearest to 0, which none of them is against; MGDA, arXiv 1810.04650)
and stops at the first that satisfies all it can. Thresholds are choices of this design, not of a paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, NamedTuple

import torch
from torch import Tensor

LARGEST = 12
"""Directions at most: the exact solution looks at 2^K subsets."""
GRID = 64
SILENT = 1e-6
"""A gradient shorter than this share of the longest says nothing this time."""
ALMOST = 1e-9
"""Of 1: what counts as rounding where two unit vectors are compared."""
DEPENDENT = 1e-12
"""Of 1: the same for squared lengths."""
MEMORY, SLOWDOWN, WINDOW = 10, 0.5, 20
"""Steps that an unstable region is remembered, the learning rate's factor meanwhile, steps that running medians look at."""


class Geometry(NamedTuple):
    """What a Gram matrix says of its vectors, pair by pair. All (K, K) but the first; 0 where a vector is 0."""

    norms: Tensor
    """(K,)"""
    cos: Tensor
    wedge: Tensor
    """Area of the parallelogram."""
    angle: Tensor
    """Degrees, 0 to 180."""


class Fit(NamedTuple):
    """How an update with weights u (K,) on unit gradients suits each of them."""

    p: Tensor
    """(K,) cosine of each with the update; 0 if they cancel."""
    dispersion: float
    coherence: float


@dataclass(frozen=True)
class Control:
    """What `control` decided and why. Figures are over the gradients that say something this time (`active`)."""

    weights: tuple[float, ...]
    """(K,) for the raw gradients; 0 where silent."""
    state: Literal["ok", "reweighted", "stationary", "unstable"]
    """ok: as given. reweighted: dispersion and tau are met. stationary: nothing between the gradients meets them. unstable: they cancel."""
    rate: float
    """Factor on the learning rate; 0: no update."""
    mix: float
    """How far towards the shortest vector, 0 to 1."""
    unit: tuple[float, ...]
    """(K,) weights on unit gradients, they add up to 1; 0 where silent."""
    active: tuple[bool, ...]
    """(K,)"""
    before: Fit
    """Under the given weights; p is (number of active,)."""
    after: Fit
    """Under the new ones."""
    conflicts: int
    """Pairs at more than 90 degrees."""
    energy: float
    """Sum over pairs of w_i w_j n_i n_j max(0, -cos): what the given weights lose to conflict."""
    norm: float
    """Length of the update's gradient, sum of weights[k] g_k."""

    def stats(self) -> dict[str, float]:
        """The step's metrics, and what `detect` wants to see again."""
        return {
            "steering/dispersion": self.after.dispersion, "steering/dispersion_before": self.before.dispersion,
            "steering/coherence": self.after.coherence, "steering/least_cosine": float(self.after.p.min()) if len(self.after.p) else 0.0,
            "steering/mix": self.mix, "steering/conflicts": float(self.conflicts), "steering/pairs": math.comb(sum(self.active), 2),
            "steering/conflict_energy": self.energy, "steering/norm": self.norm, "steering/state": float(STATES.index(self.state)),
        }  # fmt: skip


STATES = ("ok", "reweighted", "stationary", "unstable")


class Region(NamedTuple):
    """What the detector of unstable regions saw."""

    signs: tuple[str, ...]
    """Those of coherence, conflicts, turning, growth that hold now."""
    fired: bool
    """Two or more do."""
    rate: float
    """Factor on the learning rate: 0.5 for ten steps from the last alarm on, else 1."""

    def stats(self) -> dict[str, float]:
        """The step's metrics; `detect` counts the ten steps by them."""
        return {"steering/alarm": float(self.fired)}


# -- geometry -----------------------------------------------------------------------------------------------------------------


def geometry(gram: Tensor) -> Geometry:
    """(K, K) -> lengths and angles.

    >>> geometry(torch.tensor([[1.0, 0.0], [0.0, 4.0]])).angle[0, 1].item()
    90.0
    """
    gram = gram.double()
    norms = gram.diagonal().clamp(min=0).sqrt()
    both = norms[:, None] * norms
    cos = torch.where(both > 0, gram / torch.where(both > 0, both, 1.0), 0.0)
    wedge = (both**2 - gram**2).clamp(min=0).sqrt().fill_diagonal_(0)                     # by rounding alone it would be 1e-8 of n^2
    return Geometry(norms, cos, wedge, torch.where(both > 0, torch.atan2(wedge, gram).rad2deg(), 0.0))


def fit(u: Tensor, cos: Tensor) -> Fit:
    """(K,), (K, K) -> how an update with these weights on unit gradients suits each of them."""
    length = math.sqrt(max(0.0, float(u @ cos @ u)))
    if length <= ALMOST * float(u.sum()):
        return Fit(torch.zeros_like(u), 0.0, 0.0)
    p = cos @ u / length
    gains = p.clamp(min=0)
    spread = float(gains.sum()) ** 2 / (len(p) * float((gains**2).sum())) if bool((gains > 0).any()) else 0.0
    return Fit(p, spread, length / float(u.sum()))


def shortest(gram: Tensor) -> Tensor:
    """The weights u >= 0, sum u = 1, of the shortest vector sum u_k g_k, exactly. (K, K) -> (K,).

    Every subset of the vectors that does not hang together linearly has one candidate. Where several weights give the one shortest vector,
    the mean of their corner points is taken, so that the order of the vectors does not matter and equal ones get equal weights.

    >>> shortest(torch.tensor([[1.0, 0.0], [0.0, 4.0]]).double())
    tensor([0.8000, 0.2000], dtype=torch.float64)
    """
    count = len(gram)
    if count > LARGEST:
        raise ValueError(f"{count} directions, at most {LARGEST} are solved exactly")
    scale = float(gram.diagonal().max()) or 1.0
    found = torch.cat([_candidates(gram.double() / scale, size) for size in range(1, count + 1)])
    squares = torch.einsum("nk,kl,nl->n", found, gram.double() / scale, found)
    return found[squares <= squares.min() + DEPENDENT].mean(0)


def _candidates(gram: Tensor, size: int) -> Tensor:
    """Stationary points in the inside of every face with `size` corners. (K, K) -> (n, K)."""
    chosen = torch.tensor(list(combinations(range(len(gram)), size)))
    bordered = torch.ones(len(chosen), size + 1, size + 1, dtype=torch.float64)
    bordered[:, :size, :size] = gram[chosen[:, :, None], chosen[:, None]]
    bordered[:, size, size] = 0
    right = torch.zeros(len(chosen), size + 1, 1, dtype=torch.float64)
    right[:, size] = 1
    factors, pivots, _ = torch.linalg.lu_factor_ex(bordered)
    weights = torch.linalg.lu_solve(factors, pivots, right)[:, :size, 0]
    good = (factors.diagonal(dim1=1, dim2=2).abs().amin(1) > DEPENDENT) & (weights > ALMOST).all(1)
    return torch.zeros(int(good.sum()), len(gram), dtype=torch.float64).scatter_(1, chosen[good], weights[good])


# -- the controller -----------------------------------------------------------------------------------------------------------


def control(
    gram: Tensor,
    w0: Sequence[float],
    dispersion: float = 0.7,
    tau: float = 0.0,
    coherence: float = 0.05,
    bounds: tuple[float, float] | None = None,
) -> Control:
    """Weights for the raw gradients, from their Gram matrix (K, K) and the given ones w0 >= 0 (K,).

    `dispersion`: how evenly they must profit, `tau`: how far, as a cosine, the update may point against one, `coherence`: below it the region
    counts as unstable and the rate falls with it (to 0 below a tenth of it), `bounds`: least and most of weights[k] / w0[k]; with bounds the
    figures are those of the bounded weights, which may miss the goals. A direction whose w0 is 0 stays out.

    >>> found = control(torch.tensor([[100.0, 0.0], [0.0, 1.0]]), (0.5, 0.5))
    >>> found.state, [round(w, 3) for w in found.weights], round(found.before.dispersion, 3), round(found.after.dispersion, 3)
    ('reweighted', [0.454, 0.957], 0.599, 0.702)
    """
    given, shape = torch.tensor(list(w0), dtype=torch.float64), geometry(gram)
    if len(given) != len(gram) or bool((given < 0).any()):
        raise ValueError(f"weights {tuple(w0)} for {len(gram)} gradients")
    if not bool(torch.isfinite(gram).all()):
        return _silent(tuple(False for _ in w0))
    active = (shape.norms > SILENT * shape.norms.max()) & (given > 0)
    if not bool(active.any()):
        return _silent(tuple(active.tolist()))
    n, cos, w = shape.norms[active], shape.cos[active][:, active], given[active]
    mass = (w * n).sum()
    u0 = w * n / mass
    before = fit(u0, cos)
    u, mix, state, found = _least_change(u0, before, cos, dispersion, tau, coherence)
    if mix:
        w = u / n * mass
        if bounds is not None:
            w = w.clamp(given[active] * bounds[0], given[active] * bounds[1])
            u = w * n / (w * n).sum()
            found = fit(u, cos)
    rate = min(1.0, found.coherence / coherence) if state in ("stationary", "unstable") else 1.0
    weights, unit = (torch.zeros_like(given).masked_scatter(active, part) for part in (w, u))
    opposed = torch.triu(torch.outer(u0, u0) * mass**2 * (-cos).clamp(min=0), 1)
    return Control(
        tuple(weights.tolist()), state, rate if rate >= 0.1 else 0.0, mix, tuple(unit.tolist()), tuple(active.tolist()), before, found,
        int((torch.triu(cos, 1) < -ALMOST).sum()), float(opposed.sum()), math.sqrt(max(0.0, float(weights @ gram.double() @ weights))),
    )  # fmt: skip


def _least_change(
    u0: Tensor, before: Fit, cos: Tensor, dispersion: float, tau: float, coherence: float
) -> tuple[Tensor, float, Literal["ok", "reweighted", "stationary", "unstable"], Fit]:
    """The first u on the way from u0 to the shortest vector that meets the goals. -> u, how far, state, fit."""

    def meets(found: Fit) -> bool:
        return found.dispersion >= dispersion - ALMOST and float(found.p.min()) >= -tau - ALMOST

    if meets(before) and before.coherence >= coherence:
        return u0, 0.0, "ok", before
    goal = shortest(cos)
    for step in range(1, GRID + 1):
        u = (1 - step / GRID) * u0 + step / GRID * goal
        found = fit(u, cos)
        if meets(found):
            return u, step / GRID, "unstable" if found.coherence < coherence else "reweighted", found
    return goal, 1.0, "unstable" if found.coherence < coherence else "stationary", found


def _silent(active: tuple[bool, ...]) -> Control:
    """No gradient at all (or one that is not finite): nothing to steer, no update."""
    none = Fit(torch.zeros(0, dtype=torch.float64), 0.0, 0.0)
    zeros = tuple(0.0 for _ in active)
    return Control(zeros, "stationary", 0.0, 0.0, zeros, active, none, none, 0, 0.0, 0.0)


# -- unstable regions -----------------------------------------------------------------------------------------------------------


def detect(now: Mapping[str, float], past: Sequence[Mapping[str, float]], coherence: float = 0.05) -> Region:
    """Is this an unstable region? Two signs of four say so, and for ten steps from then on the learning rate is halved.

    coherence: the gradients cancel. conflicts: more than half of all pairs oppose each other. turning: the median cosine of an update with the
    one before is below -0.2. growth: the update's gradient is five times as long as the median. `now` and `past` (up to 20 steps, oldest
    first) are `Control.stats()` and `Region.stats()`, with "steering/turn" where it is known; medians want ten steps at least.
    """
    turns = _known([*past, now][-WINDOW:], "steering/turn")
    norms = _known(past[-WINDOW:], "steering/norm")
    holds = {
        "coherence": now.get("steering/coherence", 1.0) < coherence,
        "conflicts": now.get("steering/conflicts", 0.0) > now.get("steering/pairs", 0.0) / 2,
        "turning": len(turns) >= WINDOW // 2 and _median(turns) < -0.2,
        "growth": len(norms) >= WINDOW // 2 and now.get("steering/norm", 0.0) > 5 * _median(norms),
    }
    signs = tuple(name for name, true in holds.items() if true)
    fired = len(signs) >= 2
    recent = fired or any(step.get("steering/alarm", 0.0) > 0 for step in past[-(MEMORY - 1) :])
    return Region(signs, fired, SLOWDOWN if recent else 1.0)


def _known(steps: Sequence[Mapping[str, float]], name: str) -> list[float]:
    return [value for step in steps if math.isfinite(value := step.get(name, math.nan))]


def _median(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))


# -- clipping ---------------------------------------------------------------------------------------------------------------------


def clip_masks(ratio: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Where the clipped objective has a gradient: for positive advantages, and for negative ones. Any shape, the ratio's bounds -> two bool.

    min(ratio A, clip(ratio, low, high) A) looks at A's sign alone, so two backward passes serve any number of rewards.

    >>> [mask.tolist() for mask in clip_masks(torch.tensor([1.5, 1.0, 0.6]), 0.8, 1.28)]
    [[False, True, True], [True, True, False]]
    """
    return ratio <= high, ratio >= low
