"""Learning from a log: responses and rewards that somebody wrote down earlier. Nothing is sampled.

A row has a prompt, its `response` (or `completion`), and `rewards` (an object or a list) or `reward` (a number); `done` says whether the
response came to its end. The completions that a run writes are such rows.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from localrl.batch import Prompt, Request, Rollout
from localrl.buffer.prompts import PromptStream
from localrl.data import CHUNK, PromptData, Tokenizer
from localrl.data.tables import shown
from localrl.sections import RolloutSettings
from localrl.settings import UserError

COLUMNS = frozenset({"response", "completion", "rewards", "reward", "done"})
"""What a log says of a response: no reward function may take it for something about the prompt."""
DONE = {"true": True, "1": True, "false": False, "0": False}
"""Spellings: JSON has truth values, CSV has none."""


class Log(NamedTuple):
    """A log, read."""

    rollouts: list[Rollout]
    """In the order of the file. Rows with the same prompt share one `Prompt`: the first row's."""
    names: tuple[str, ...]
    """Of the rewards, in the order of their first appearance."""
    notes: list[str]
    """What a person should know but need not put right."""


class _Row(NamedTuple):
    prompt: Prompt
    text: str
    done: bool
    rewards: dict[str, float]


def read_log(prompts: Sequence[Prompt], tokenizer: Tokenizer, end_token_id: int | None, max_completion_length: int) -> Log:
    """The rows of a log file, as `load_prompts` read them, become rollouts. Responses are cut at `max_completion_length` tokens.

    Raises UserError for a row without response or reward, and for one that cannot be understood.
    """
    rows = [_row(prompt) for prompt in sorted(prompts, key=lambda prompt: prompt.id)]
    scored = [row for row in rows if not all(map(math.isnan, row.rewards.values()))]
    names = tuple(dict.fromkeys(name for row in scored for name in row.rewards))
    if not scored:
        raise UserError(f"none of the log's {len(rows)} rows has a reward that is a number: a row needs rewards such as {{\"correct\": 1.0}}")
    notes = [f"{lacking} of {len(rows)} rows of the log have no reward and are left out"] if (lacking := len(rows) - len(scored)) else []
    first: dict[tuple[int, ...], Prompt] = {}
    counts: dict[int, int] = {}
    rollouts, cut = [], 0
    for row, whole in zip(scored, _tokens(scored, tokenizer, end_token_id), strict=True):
        prompt = first.setdefault(row.prompt.tokens, row.prompt)
        request = Request(prompt, counts.setdefault(prompt.id, 0))
        counts[prompt.id] += 1
        tokens = whole[:max_completion_length]
        cut += len(tokens) < len(whole)
        rewards = tuple(row.rewards.get(name, math.nan) for name in names)
        rollouts.append(Rollout(request, tokens, row.text, row.done and len(tokens) == len(whole), 0, rewards=rewards))
    if cut:
        notes.append(f"{cut} of {len(scored)} responses of the log are longer than rollout.max_completion_length = {max_completion_length} "
                     "tokens and are cut")
    return Log(rollouts, names, notes)


def without_log_columns(data: PromptData) -> PromptData:
    """The same prompts with only what holds of the prompt, whatever the response: for evaluation, where new responses are scored."""

    def bare(prompts: Sequence[Prompt]) -> list[Prompt]:
        return [replace(prompt, columns={name: value for name, value in prompt.columns.items() if name not in COLUMNS}) for prompt in prompts]

    return replace(data, train=bare(data.train), eval=bare(data.eval), columns=tuple(name for name in data.columns if name not in COLUMNS))


def _row(prompt: Prompt) -> _Row:
    place, columns = f"row {prompt.id + 1} of the log", prompt.columns
    text = next((columns[name] for name in ("response", "completion") if columns.get(name) is not None), None)
    if not isinstance(text, str):
        raise UserError(f"{place}: there is {shown(text) if text is not None else 'nothing'} in column response (or completion), "
                        "where the response's text is expected")
    try:
        text.encode()
    except UnicodeEncodeError as error:                       # JSON can hold half of a surrogate pair, no tokenizer can
        raise UserError(f"{place}: the response is not valid Unicode, character {error.start + 1} is {text[error.start]!a}") from error
    told = columns.get("done")
    done = DONE.get(str(told).lower()) if told not in (None, "") else True
    if done is None:
        raise UserError(f"{place}: done is {shown(told)}, it must be true or false")
    if not text and not (done and told not in (None, "")):     # at its end at once, if the log says so
        raise UserError(f"{place}: the response is empty: remove the row, or say \"done\": true if the model said nothing")
    return _Row(prompt, text, done, _rewards(columns, place))


def _rewards(columns: Any, place: str) -> dict[str, float]:
    """By name; NaN where the log has null."""
    given = columns.get("rewards")
    if given is None:
        given = {"reward": columns["reward"]} if "reward" in columns else {}
    elif isinstance(given, list):
        given = {f"reward_{number}": value for number, value in enumerate(given, 1)}
    if not isinstance(given, dict) or not given:
        raise UserError(f"{place}: there is no reward: it needs a number in column reward, or rewards such as {{\"correct\": 1.0}}")
    return {name: _number(value, f"{place}: the reward '{name}'") for name, value in given.items()}


def _number(value: Any, place: str) -> float:
    if value is None or value == "":
        return math.nan
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise UserError(f"{place} is {shown(value)}: it must be a number, or null where it does not apply") from None
    if math.isinf(number):
        raise UserError(f"{place} is infinite: it must be a number, or null where it does not apply")
    return number


def _tokens(rows: Sequence[_Row], tokenizer: Tokenizer, end: int | None) -> list[tuple[int, ...]]:
    """Each response's tokens, the end token included where it is done."""
    found: list[tuple[int, ...]] = []
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        for row, ids in zip(part, tokenizer([row.text for row in part], add_special_tokens=False)["input_ids"], strict=True):
            found.append((*ids, end) if row.done and end is not None and ids[-1:] != [end] else tuple(ids))
            if not found[-1]:
                raise UserError(f"row {row.prompt.id + 1} of the log: the response has no tokens: remove the row")
    return found


class LogBuffer:
    """Draws from a log, prompt by prompt. `least`: rows of one prompt that make a group worth drawing."""

    def __init__(self, log: Sequence[Rollout], rollout: RolloutSettings, seed: int, shuffle: bool, least: int) -> None:
        groups: dict[int, list[Rollout]] = {}
        for row in log:
            groups.setdefault(row.request.prompt.id, []).append(row)
        self.rollout = rollout
        self.groups = {prompt: group for prompt, group in groups.items() if len(group) >= least}
        if not self.groups:
            raise UserError(f"no prompt of the log has {least} responses, but the algorithm compares responses to one prompt: "
                            "add rows, or take an algorithm that learns from single responses")
        self.stream = PromptStream([group[0].request.prompt for group in self.groups.values()], seed, shuffle)
        self._left_out = len(groups) - len(self.groups)
        self._metrics: dict[str, float] = {}

    def requests(self, step: int) -> list[Request]:
        """Nothing."""
        return []

    def add(self, rollouts: Sequence[Rollout]) -> None:
        """Nothing is asked, so nothing comes."""
        assert not rollouts, "a log takes no rollouts"

    ready = True

    def draw(self, step: int) -> list[Rollout]:
        """Up to `num_generations` rows of each of `prompts_per_step` different prompts, or of all if there are fewer."""
        chance = random.Random(f"{self.stream.seed}-log-{step}")
        prompts: dict[int, Prompt] = {}
        while len(prompts) < min(self.rollout.prompts_per_step, len(self.groups)):
            prompts |= {prompt.id: prompt for prompt in self.stream.take(1)}
        groups = [self.groups[prompt] for prompt in prompts]
        drawn = [row for group in groups for row in chance.sample(group, min(len(group), self.rollout.num_generations))]
        self._metrics = {
            "buffer/size": float(sum(map(len, self.groups.values()))),
            "buffer/prompts": float(len(self.groups)),
            "buffer/left_out_prompts": float(self._left_out),
            "buffer/epoch": self.stream.position / len(self.groups),
        }
        return drawn

    def metrics(self) -> dict[str, float]:
        """`buffer/size` (rows), `buffer/prompts`, `buffer/left_out_prompts` (too few rows to compare), `buffer/epoch`."""
        return dict(self._metrics)

    def snapshot(self) -> object:
        """See `Buffer`."""
        return self.stream.position

    def rollback(self, snapshot: Any) -> None:
        """See `Buffer`."""
        self.stream.position = snapshot

    def state(self) -> dict[str, Any]:
        """See `Buffer`."""
        return {"position": self.stream.position}

    def restore(self, state: dict[str, Any]) -> None:
        """See `Buffer`."""
        self.stream.position = int(state["position"])
