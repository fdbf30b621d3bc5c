"""Completions to try rewards on, with the columns that rewards may ask for: as rollouts, and as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from localrl.batch import Prompt, Request, Rollout
from localrl.config import Run
from localrl.data import EVAL_ID, read_table, render
from localrl.folder import read_lines, read_run
from localrl.settings import UserError

KEPT = ("prompt", "completion", "completions")
MOST = 4096
"""Completions at most: a lab is no training step."""


class Tokenizer(Protocol):
    """What is needed of one."""

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Samples:
    """Completions in groups of one prompt each."""

    rollouts: tuple[Rollout, ...]
    limit: int
    """The longest response that the run allows, tokens."""
    source: str
    """Where they are from, for people."""

    @property
    def columns(self) -> set[str]:
        """What rewards can ask for beside the usual."""
        return {name for rollout in self.rollouts for name in rollout.request.prompt.columns}


def as_row(rollout: Rollout) -> dict[str, Any]:
    """One rollout as plain values, rewards apart."""
    prompt = rollout.request.prompt
    return {
        "prompt_id": prompt.id, "sample": rollout.request.sample, "prompt": prompt.content, "prompt_ids": list(prompt.tokens), "completion": rollout.text,
        "token_ids": list(rollout.tokens), "done": rollout.done, "columns": dict(prompt.columns),
    }  # fmt: skip


def of_row(row: Mapping[str, Any]) -> Rollout:
    """The way back from `as_row`."""
    prompt = Prompt(int(row["prompt_id"]), tuple(row["prompt_ids"]), row["prompt"], row["columns"])
    return Rollout(Request(prompt, int(row["sample"])), tuple(row["token_ids"]), row["completion"], bool(row["done"]), 0)


def pasted(text: str, tokenizer: Tokenizer, limit: int) -> Samples:
    """What a person pasted or put in a file: JSON lines (or one JSON list) of `prompt` and `completions`, other keys are columns for the rewards.

    UserError with the line for whatever is wrong.
    """
    groups = [_group(number, place, item) for number, (place, item) in enumerate(_items(text))]
    rollouts = [rollout for prompt, texts in groups for rollout in _rollouts(prompt, texts, tokenizer)]
    return Samples(_few(rollouts), limit, f"{len(rollouts)} given completions to {len(groups)} prompts")


def _items(text: str) -> list[tuple[str, Any]]:
    if not text.strip():
        raise UserError('there is nothing to score: give lines such as {"prompt": "2 + 2?", "completions": ["4", "5"], "answer": "4"}')
    try:
        if text.lstrip().startswith("["):
            return [(f"item {number}", item) for number, item in enumerate(json.loads(text), 1)]
        return [(f"line {number}", json.loads(line)) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    except ValueError as error:
        raise UserError(f'no JSON ({error}): give lines such as {{"prompt": "2 + 2?", "completions": ["4", "5"], "answer": "4"}}') from None
    except RecursionError:
        raise UserError("no JSON that can be read: it is nested too deeply") from None


def _group(number: int, place: str, item: Any) -> tuple[Prompt, list[str]]:
    if not isinstance(item, dict) or "prompt" not in item:
        raise UserError(f'{place}: an object with "prompt" and "completions" is wanted')
    content, texts = item["prompt"], item.get("completions", [item["completion"]] if "completion" in item else None)
    chat = isinstance(content, list) and content and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in content
    )
    if not isinstance(content, str) and not chat:
        raise UserError(f'{place}: "prompt" must be text, or a list of {{"role": text, "content": text}}')
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise UserError(f'{place}: "completions" must be a list of texts with at least one')
    return Prompt(number, (), content, {key: value for key, value in item.items() if key not in KEPT}), texts


def _rollouts(prompt: Prompt, texts: Sequence[str], tokenizer: Tokenizer) -> list[Rollout]:
    return [Rollout(Request(prompt, sample), tokens_of(text, tokenizer), text, True, 0) for sample, text in enumerate(texts)]


def tokens_of(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """A response's tokens, without special ones."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _few(rollouts: Sequence[Rollout]) -> tuple[Rollout, ...]:
    if not rollouts:
        raise UserError("there are no completions in it")
    if len(rollouts) > MOST:
        raise UserError(f"{len(rollouts)} completions, the limit is {MOST}: give fewer")
    return tuple(rollouts)


def of_run(folder: Path, tokenizer: Tokenizer, most: int = 512) -> Samples:
    """What a run's last step wrote down, `most` completions at most, whole groups; columns are looked up in its data. UserError if there is none."""
    run = read_run(folder)
    files = sorted((folder / "completions").glob("step-*.jsonl"))
    if not files:
        raise UserError(f"{folder} has no completions yet: wait for its first step, or let it keep them (log.completions)")
    columns = data_columns(run)
    found: list[Rollout] = []
    for row in read_lines(files[-1])[:most]:
        prompt = Prompt(int(row["prompt_id"]), (), row["prompt"], columns.get(int(row["prompt_id"]), {}))
        tokens = tuple(row["token_ids"]) if row.get("token_ids") else tokens_of(row["completion"], tokenizer)
        found.append(Rollout(Request(prompt, int(row["sample"])), tokens, row["completion"], bool(row["done"]), 0))
    return Samples(_few(found), run.rollout.max_completion_length, f"{len(found)} completions of {folder.name}, {files[-1].stem}")


def data_columns(run: Run) -> dict[int, dict[str, Any]]:
    """Prompt id -> its columns, of a run's data."""
    from localrl.prepare import with_demo_data

    data = with_demo_data(run.data)
    found: dict[int, dict[str, Any]] = {}
    for first, path, split in ((0, data.path, data.split), (EVAL_ID, data.eval_path, data.eval_split)):
        if path:
            rows = read_table(path, data.subset, split, Path.cwd()).rows
            found |= {first + at: _columns(row, data.rename, data.prompt_column) for at, row in enumerate(rows)}
    return found


def _columns(row: Mapping[str, Any], rename: Mapping[str, str], prompt: str) -> dict[str, Any]:
    named = {rename.get(key, key): value for key, value in row.items()}
    return {key: value for key, value in named.items() if key != prompt}


def with_prompt_tokens(rollouts: Iterable[Rollout], tokenizer: Any, template: Mapping[str, Any]) -> list[Rollout]:
    """Rollouts whose prompts are tokenised, as a model that reads them wants it."""
    from dataclasses import replace

    known: dict[int, Prompt] = {}
    for rollout in rollouts:
        prompt = rollout.request.prompt
        if not prompt.tokens and prompt.id not in known:
            text = render(prompt.content, tokenizer, "a prompt", template)
            ids = tokenizer(text, add_special_tokens=isinstance(prompt.content, str))["input_ids"]
            known[prompt.id] = replace(prompt, tokens=tuple(ids))
    return [replace(r, request=replace(r.request, prompt=known.get(r.request.prompt.id, r.request.prompt))) for r in rollouts]
