"""Which prompts come next, and which rollouts are learned from.

On-policy training is the degenerate buffer: what a step adds is what it draws, once. A whole response is the degenerate window. The loop
knows `Buffer` only; one of four kinds stands behind it.
"""

from __future__ import annotations

from collections.abc import Sequence

from localrl.batch import Prompt, Rollout
from localrl.buffer.base import Buffer
from localrl.buffer.groups import GroupBuffer
from localrl.buffer.log import Log, LogBuffer, read_log, without_log_columns
from localrl.buffer.prompts import PromptStream
from localrl.buffer.replay import ReplayBuffer
from localrl.buffer.slots import SlotBuffer
from localrl.config import Run
from localrl.settings import UserError, nearest

__all__ = [
    "Buffer", "GroupBuffer", "Log", "LogBuffer", "PromptStream", "ReplayBuffer", "SlotBuffer", "make_buffer", "read_log", "without_log_columns",
]  # fmt: skip


def make_buffer(
    run: Run, prompts: Sequence[Prompt], *, weights: Sequence[float], reward_names: Sequence[str], group_size: int, log: Sequence[Rollout] | None = None
) -> Buffer:
    """The kind that the settings ask for. `weights` and `reward_names`: one a reward; `group_size`: the fewest rollouts of a prompt that the
    algorithm learns from; `log`: learn from these (then `prompts` are not used). Raises UserError for a filter on an unknown reward."""
    least = min(group_size, 2)
    if log is not None:
        return LogBuffer(log, run.rollout, run.seed, run.data.shuffle, least)
    stream = PromptStream(prompts, run.seed, run.data.shuffle)
    if run.replay.capacity:
        filters = [(_index(filter.reward, reward_names), filter.at_least) for filter in run.replay.filters]
        return ReplayBuffer(stream, run.rollout, run.replay, weights, filters, least, asynchronous=run.search.processes > 0)
    if run.rollout.window:
        return SlotBuffer(stream, run.rollout)
    return GroupBuffer(stream, run.rollout, weights, each_reward=run.algorithm.decouples_rewards)


def _index(reward: str, names: Sequence[str]) -> int:
    if reward not in names:
        raise UserError(f"replay.filters: there is no reward '{reward}': {nearest(reward, names)}")
    return list(names).index(reward)
