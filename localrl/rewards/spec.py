"""What a person says about rewards."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, field_validator, model_validator

from localrl.settings import Settings


class RewardSpec(Settings):
    """One reward: which function, how much it counts, what it is told.

    A bare string stands for the function alone.

    >>> RewardSpec.model_validate("my_rewards.py:is_polite").label
    'is_polite'
    """

    function: str = Field(min_length=1)
    """A built-in (exact_answer, numeric_answer, math_answer, regex, tagged_format, json_schema, length_target, overlong_penalty,
    repetition_penalty), or one of your own: my_rewards.py:function, package.module:function, package.module.function."""
    name: str | None = Field(default=None, pattern=r"^[\w.-]+$")
    """What it is called in the metrics; by default the function's name."""
    weight: float = 1.0
    """How much it counts beside the others; a negative weight turns a reward into a penalty."""
    args: dict[str, Any] = Field(default={})
    """Fixed keyword arguments of the function, for instance { column = "solution" }."""

    given: str | None = None
    """Counts only where the reward of this name is at least `at_least`, and is 0 elsewhere: for what is easily had without the point (GDPO,
    arXiv 2601.05242, conditioned rewards), for instance brevity given correctness."""
    at_least: float = 1.0
    """See `given`."""

    @model_validator(mode="before")
    @classmethod
    def _bare_string(cls, given: Any) -> Any:
        return {"function": given} if isinstance(given, str) else given

    @property
    def label(self) -> str:
        """The name in the metrics.

        >>> [RewardSpec(function=f).label for f in ("regex", "a.b.c", "a.b:c", "dir/r.py:c")]
        ['regex', 'c', 'c', 'c']
        """
        return self.name or re.split(r"[:.]", self.function)[-1]


class RewardSettings(Settings):
    """Which rewards there are, and what their processes may take."""

    functions: tuple[RewardSpec, ...] = ()
    """The reward functions, each with its weight and its arguments."""
    timeout: float = Field(default=60.0, gt=0, le=3600)
    """Seconds that one function may take over all completions of a step; after that its process is killed and the values are missing."""
    start_timeout: float = Field(default=120.0, gt=0, le=3600)
    """Seconds that a reward's module may take to be imported."""
    memory: float = Field(default=4.0, ge=0.05, le=1024)
    """GiB of main memory that one worker process may hold, its children included; beyond that it is killed."""
    workers: int = Field(default=4, ge=1, le=64)
    """At most this many worker processes; rewards in different processes run at the same time."""

    @property
    def names(self) -> tuple[str, ...]:
        """The rewards' names in the metrics, in the order of `Rollout.rewards`."""
        return tuple(spec.label for spec in self.functions)

    @property
    def weights(self) -> tuple[float, ...]:
        """In the same order."""
        return tuple(spec.weight for spec in self.functions)

    @field_validator("functions")
    @classmethod
    def _names_differ(cls, functions: tuple[RewardSpec, ...]) -> tuple[RewardSpec, ...]:
        labels = [spec.label for spec in functions]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"two rewards are called '{twice[0]}': give one of them a name of its own")
        for spec in functions:
            if spec.given is not None and (spec.given not in labels or spec.given == spec.label):
                others = ", ".join(label for label in labels if label != spec.label) or "there is none"
                raise ValueError(f"reward '{spec.label}' has given = '{spec.given}', which is no other reward: {others}")
        return functions
