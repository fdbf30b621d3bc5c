"""What an algorithm is: its settings, two pure functions and a few declarations. The training loop knows only these."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, Self

from localrl.batch import Batch, Loss, Readout
from localrl.settings import Settings

Columns = frozenset[str]


class Algorithm(Settings):
    """Base of every algorithm. A subclass in a file of its own in this folder is found, listed, tested and documented by itself.

    It carries a field `name: Literal["..."]`, which selects it in presets and on the command line.
    """

    name: str
    """Selects the algorithm."""

    learns_from_cut: ClassVar[bool] = True
    """May rollouts that the length limit cut take part?"""
    learns_from_old: ClassVar[bool] = False
    """May rollouts of an earlier or a foreign policy take part without an importance correction?"""
    decouples_rewards: ClassVar[bool] = False
    """Is each reward normalised by itself, so that rewards which cancel in the sum still teach?"""
    group_size: ClassVar[int] = 2
    """The least number of rollouts of one prompt that it can learn from."""
    reports: ClassVar[tuple[str, ...]] = ()
    """Names of the metrics that its losses and `observe` add, beyond those every run has."""

    @property
    def reads_before(self) -> Columns:
        """Columns that `credit` needs, read over the whole step without gradient (one more forward pass if not empty)."""
        return frozenset()

    @property
    def reads_during(self) -> Columns:
        """Columns that `loss` needs, read per micro-batch with gradient."""
        return frozenset({"logp"})

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
