"""The settings choose the kind."""

from __future__ import annotations

from typing import Any

import pytest

from localrl.algorithms import ALGORITHMS
from localrl.batch import Prompt
from localrl.buffer import GroupBuffer, LogBuffer, ReplayBuffer, SlotBuffer, make_buffer
from localrl.config import Run, build
from localrl.sections import ReplaySettings, SearchSettings
from localrl.settings import UserError
from tests.buffer.rollouts import rollout, settings

PROMPTS = [Prompt(i, (i,), "") for i in range(4)]


def run(**sections: Any) -> Run:
    """Sections are put in unchecked: whether they go together with an algorithm is the settings' business."""
    base = build({"data": {"path": "x.jsonl"}, "rewards": {"functions": [{"function": "exact_answer"}]}, "algorithm": {"name": next(iter(ALGORITHMS))}})
    return base.model_copy(update=sections)


@pytest.mark.parametrize(
    ("sections", "kind"),
    [
        ({}, GroupBuffer),
        ({"rollout": settings(2, 2, window=8)}, SlotBuffer),
        ({"replay": ReplaySettings(capacity=4)}, ReplayBuffer),
        ({"replay": ReplaySettings(capacity=4), "search": SearchSettings(processes=1)}, ReplayBuffer),
    ],
)
def test_the_kind_follows_from_the_settings(sections: dict[str, Any], kind: type) -> None:
    buffer = make_buffer(run(**sections), PROMPTS, weights=(1.0,), reward_names=("right",), group_size=4)
    assert type(buffer) is kind
    if isinstance(buffer, ReplayBuffer):
        assert buffer.least == 2 and buffer.asynchronous is ("search" in sections)


def test_a_log_is_learned_from_whatever_else_is_set() -> None:
    log = [rollout(0, [1]), rollout(0, [2], sample=1)]
    assert isinstance(make_buffer(run(), [], weights=(1.0,), reward_names=("right",), group_size=2, log=log), LogBuffer)


def test_filters_find_their_reward_by_name() -> None:
    replay = ReplaySettings.model_validate({"capacity": 4, "filters": [{"reward": "safe", "at_least": 0.5}]})
    buffer = make_buffer(run(replay=replay), PROMPTS, weights=(1.0, 1.0), reward_names=("right", "safe"), group_size=1)
    assert isinstance(buffer, ReplayBuffer) and buffer.filters == ((1, 0.5),) and buffer.least == 1
    with pytest.raises(UserError, match="no reward 'safe': did you mean 'safer'"):
        make_buffer(run(replay=replay), PROMPTS, weights=(1.0,), reward_names=("safer",), group_size=1)
