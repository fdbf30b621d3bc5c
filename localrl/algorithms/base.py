"""What an algorithm is: its settings, two pure functions and a few declarations. The training loop knows only these."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Self

from torch import Tensor

from localrl.batch import Batch, Loss, Readout
from localrl.settings import Settings

Columns = frozenset[str]


class Steering(NamedTuple):
    """How the gradients of several directions become one update."""

    weights: tuple[float, ...]
    """One a direction: the update follows the sum of weights[d] * gradient[d]."""
    rate: float
    """Factor on the learning rate of this update; 0: no update."""
    stats: Mapping[str, float]
    """Metrics of the step; the last steps' come back as `past` the next time."""


class Picture(NamedTuple):
    """How some metrics are best shown to somebody who watches a run."""

    title: str
    caption: str
    """One sentence: what is seen, and what is good or bad about it."""
    metrics: tuple[str, ...]
    """Names; a `*` stands for any part, and where that part is a number it is that of a reward (`steering/0/weight`, `steering/0-1/angle`)."""
    form: Literal["lines", "matrix"] = "lines"
    """lines: over the steps. matrix: of pairs `i-j`, as they are now."""
    limits: tuple[str, ...] = ()
    """Settings of the algorithm that are drawn across: what the numbers are held against. One that is no number is left out."""


class Algorithm(Settings):
    """Base of every algorithm. A subclass in a file of its own in this folder is found, listed, tested and documented by itself.

    It carries a field `name: Literal["..."]`, which selects it in presets and on the command line.
    """

    name: str
    """Selects the algorithm."""

    learns_from_old: ClassVar[bool] = False
    """May rollouts of an earlier or a foreign policy take part without an importance correction?"""
    decouples_rewards: ClassVar[bool] = False
    """Is each reward normalised by itself, so that rewards which cancel in the sum still teach?"""
    needs_contrast: ClassVar[bool] = False
    """Does it learn nothing from a group whose rewards are all equal?"""
    learns_from_unfinished: ClassVar[bool] = False
    """May a response take part window by window, before it is finished and scored?"""
    needs_window: ClassVar[bool] = False
    """Is it nothing without `rollout.window`?"""
    reports: ClassVar[tuple[str, ...]] = ()
    """Names of the metrics that its losses and `observe` add, beyond those every run has."""
    pictures: ClassVar[tuple[Picture, ...]] = ()
    """How its metrics are best shown; of `reports` that are in none of them each gets a line of its own."""

    lab: ClassVar[tuple[tuple[str, Mapping[str, Any]], ...]] = ()
    """What may be compared before training: (name for people, settings) each. It then says in `deserved` what its credit holds of a rollout."""

    @property
    def group_size(self) -> int:
        """The least number of rollouts of one prompt that it can learn from."""
        return 2

    @property
    def corrects(self) -> bool:
        """Does it weigh rollouts by how likely they are under the policy, so that an older policy or another engine may have sampled them?"""
        return False

    def objection(self, window: int | None, rewards: int) -> str | None:
        """Why these settings cannot work with this `rollout.window` and so many rewards, in one sentence; None: they can."""
        return None

    def for_sampler(self, exact: bool) -> Self:
        """The same algorithm, told whether rollouts come from the very policy that learns from them."""
        return self

    @property
    def reads_before(self) -> Columns:
        """Columns that `credit` needs, read over the whole step without gradient (one more forward pass if not empty)."""
        return frozenset()

    @property
    def reads_during(self) -> Columns:
        """Columns that `loss` needs, read per micro-batch with gradient."""
        return frozenset({"logp"})

    @property
    def readings(self) -> tuple[Columns, ...]:
        """`reads_during` in parts that are read and differentiated one after the other, so that only one part's activations are there at a time.
        `loss` is then called with the columns of one part, and hands back that part's share."""
        return (self.reads_during,)

    @property
    def calibrates(self) -> Columns:
        """Columns of the untrained policy that `calibrate` wants once, before step 0. Empty: no calibration."""
        return frozenset()

    def calibrate(self, batch: Batch, readout: Readout) -> Self:
        """The same algorithm with what it measured on the untrained policy filled into its settings."""
        return self

    def credit(self, batch: Batch, readout: Readout) -> NamedTuple:
        """Who deserves what: the whole step, no gradient. Returns a NamedTuple of tensors with B rows (or None)."""
        raise NotImplementedError

    def loss(self, batch: Batch, readout: Readout, credit: Any) -> Loss:
        """One micro-batch, with gradient. Sums only, so that any split of a step gives the same gradient."""
        raise NotImplementedError

    def observe(self, batch: Batch, credit: Any) -> dict[str, float]:
        """Metrics of the whole step that the credit knows. Never read back as control."""
        return {}

    def token_weights(self, credit: Any) -> Tensor | None:
        """(B, T) how much each token of the step counts, for display; None: all the same."""
        return None

    def deserved(self, credit: Any, directed: Sequence[float] = ()) -> Tensor:
        """(B,) the advantages in a credit. `directed`: as the update has them with these weights of the directions."""
        raise NotImplementedError

    def directions(self, weights: Sequence[float]) -> tuple[float, ...]:
        """The gradients that are kept apart for `steer`, with these weights of the rewards: how each counts at first. Empty: the ordinary step."""
        return ()

    def steer(self, gram: Tensor, weights: Sequence[float], past: Sequence[Mapping[str, float]]) -> Steering:
        """From the gradients' inner products (D, D) float64, the rewards' weights and the `stats` of up to 20 steps before, to one update."""
        raise NotImplementedError

    def alarms(self, first: Mapping[str, float], recent: Sequence[Mapping[str, float]]) -> Iterator[tuple[str, str]]:
        """What a person should know: (key, sentence), each key told once a run. `first`: the first step's metrics, `recent`: up to 20 last ones."""
        yield from ()
