"""Rewards: named functions that say how good a completion is, and the worker processes in which they run.

The signature is TRL's, unchanged: `f(prompts=, completions=, completion_ids=, **dataset_columns, **kwargs) -> list[float | None]`,
plain or `async`. None: does not apply to this completion. Whatever a function does (raise, hang, crash, eat the memory, return
nonsense) costs a missing value, a count and one clear message, never the run and never a silent zero.

    spec.py      what a person says about rewards          pool.py      `Rewards`: functions, processes, scores, what went wrong
    builtin.py   the functions that come along             process.py   one process that can be killed, seen from outside
    worker.py    the same process, seen from inside        wire.py      the bytes between the two
    logged.py    rewards that a log of responses brings

The names below are looked up on first use: a worker imports this package too, and must not pay for pydantic or torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from localrl.rewards.logged import LoggedRewards, Scores
    from localrl.rewards.pool import Health, Report, Rewards
    from localrl.rewards.spec import RewardSettings, RewardSpec

__all__ = ["Health", "LoggedRewards", "Report", "RewardSettings", "RewardSpec", "Rewards", "Scores"]

_HOME = {"Health": "pool", "LoggedRewards": "logged", "Scores": "logged", "Report": "pool", "Rewards": "pool", "RewardSettings": "spec", "RewardSpec": "spec"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
