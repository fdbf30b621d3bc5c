"""Prompts: a file or a hub data set becomes rows, rows become tokenised prompts, some of which are held out for evaluation.

A prompt is text or a list of chat messages. As in TRL, text is tokenised as it stands, the way the tokenizer does by itself (with a
BOS where it has one), and messages go through the tokenizer's chat template, which writes its own special tokens, so that none is
added a second time. With a system prompt a text becomes a chat of two messages. Every other column goes to the rewards.

Left out: anything lazy. A prompt set for reinforcement learning is thousands of rows, not billions; reading it whole lets every mistake
in it be named before a model is loaded.
"""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field, field_validator

from localrl.batch import Message, Prompt
from localrl.data.tables import Table, first_line, read_table, shown
from localrl.settings import Settings, UserError, nearest

EVAL_ID = 1 << 32
"""Evaluation prompts from a file of their own are numbered from here, so that they collide with no training prompt."""
CHUNK = 512
"""Prompts that are tokenised between two reports of progress."""

Progress = Callable[[int, int], None]
"""Called with (prompts done, prompts in all)."""


class Tokenizer(Protocol):
    """What this room asks of a transformers tokenizer."""

    chat_template: Any
    eos_token: Any
    eos_token_id: Any

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Mapping[str, Any]:
        """{"input_ids": one list of ids a text}."""

    def apply_chat_template(self, conversation: list[Message], *, tokenize: bool, **kwargs: Any) -> Any:
        """With `tokenize=False`: the rendered text."""


class DataSettings(Settings):
    """Which prompts a run learns from, and how they are read."""

    path: str = Field(min_length=1)
    """A file (.jsonl, .json, .csv, .tsv, .parquet) or a data set on the hub, such as openai/gsm8k."""
    subset: str | None = None
    """The configuration of a hub data set, such as "main" of openai/gsm8k."""
    split: str = "train"
    """The split of a hub data set to train on."""
    eval_path: str | None = None
    """Prompts for evaluation: a file or a hub data set. None: `holdout` prompts are taken out of the training data."""
    eval_split: str = "test"
    """The split of a hub data set to evaluate on."""
    prompt_column: str = "prompt"
    """The column with the prompt: text, or a list of chat messages. All other columns go to the reward functions."""
    rename: dict[str, str] = Field(default={})
    """Columns to be called otherwise, old name = new name, for instance { question = "prompt" }."""
    system_prompt: str | None = None
    """Put in front of every prompt as a system message; a text prompt becomes a chat. A chat that has a system message keeps its own."""
    chat_template_kwargs: dict[str, Any] = Field(default={})
    """Passed on to the chat template, for instance { enable_thinking = false }."""
    from_log: bool = False
    """The file holds responses and rewards too (columns `response` or `completion`, and `rewards` or `reward`): learn from them, sample nothing."""
    holdout: int = Field(default=64, ge=0)
    """Prompts kept for evaluation when there is no eval_path; never more than a quarter of the data."""
    max_prompt_length: int = Field(default=512, ge=1)
    """Tokens that a prompt may have, chat template included."""
    overlong: Literal["refuse", "drop"] = "refuse"
    """What happens when a prompt is longer: refuse to start, or leave it out."""
    shuffle: bool = True
    """Train in a random order (by the seed) instead of the file's."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first this many rows of the training data."""

    @field_validator("chat_template_kwargs")
    @classmethod
    def _template_is_ours_to_call(cls, given: dict[str, Any]) -> dict[str, Any]:
        if taken := given.keys() & {"tokenize", "add_generation_prompt", "continue_final_message"}:
            raise ValueError(f"'{min(taken)}' follows from the messages and cannot be set")
        return given


@dataclass(frozen=True)
class PromptData:
    """What there is to learn from."""

    train: list[Prompt]
    """In the order of training."""
    eval: list[Prompt]
    """In the order of the file."""
    columns: tuple[str, ...]
    """The columns that the rewards can ask for, those of the evaluation data included."""
    notes: list[str]
    """What a person should know but need not put right."""


def load_prompts(
    settings: DataSettings, tokenizer: Tokenizer, seed: int, base_dir: Path, needed: int = 1, progress: Progress | None = None
) -> PromptData:
    """Read, check, render and tokenise the prompts. Raises UserError for whatever is wrong with the data.

    `Prompt.id` is the row's number in its file. The same seed holds out the same prompts and shuffles alike. Relative paths start at
    `base_dir`; `needed` prompts at least must be left to train on.
    """
    notes: list[str] = []
    table = _renamed(read_table(settings.path, settings.subset, settings.split, base_dir), settings)
    if settings.limit:
        table = Table(table.source, table.rows[: settings.limit], table.lines)
    prompts, columns = _prompts(table, settings, tokenizer, 0, notes, progress)
    chance = random.Random(seed)
    if settings.eval_path:
        other = _renamed(read_table(settings.eval_path, settings.subset, settings.eval_split, base_dir), settings)
        held, more = _prompts(other, settings, tokenizer, EVAL_ID, notes, progress)
        columns = tuple(dict.fromkeys(columns + more))
    else:
        own = [prompt.tokens if settings.from_log else prompt.id for prompt in prompts]    # a log has several responses to one prompt
        distinct = [*dict.fromkeys(own)]
        size = min(settings.holdout, len(distinct) // 4)
        if size < settings.holdout:
            notes.append(f"{size} of {len(distinct)} prompts are held out for evaluation, not data.holdout = {settings.holdout}: "
                         "at most a quarter of the data")
        chosen = {distinct[at] for at in chance.sample(range(len(distinct)), size)}
        first = {key: prompt for key, prompt in zip(reversed(own), reversed(prompts), strict=True) if key in chosen}
        held = sorted(first.values(), key=lambda prompt: prompt.id)
        prompts = [prompt for key, prompt in zip(own, prompts, strict=True) if key not in chosen]
    if len(prompts) < needed:
        raise UserError(f"{table.source} leaves {len(prompts)} prompts to train on, but a step needs {needed}: "
                        "add data, or lower data.holdout or the number of prompts a step")
    seen = {prompt.tokens for prompt in prompts}
    if twins := sum(prompt.tokens in seen for prompt in held):
        notes.append(f"{twins} of {len(held)} evaluation prompts are among the training prompts too: their rewards flatter")
    if settings.shuffle:
        chance.shuffle(prompts)
    return PromptData(prompts, held, columns, notes)


# --------------------------------------------------------------------------------------------------------------- checking


def _renamed(table: Table, settings: DataSettings) -> Table:
    """The same rows with `data.rename` done and the prompt column known to be there."""
    there = table.columns
    for old, new in settings.rename.items():
        if old not in there:
            raise UserError(f"data.rename: {table.source} has no column '{old}': {nearest(old, there)}")
        if new in there and new not in settings.rename:
            raise UserError(f"data.rename: {table.source} already has a column '{new}': rename or remove that one first")
    rows = [{settings.rename.get(key, key): value for key, value in row.items()} for row in table.rows]
    table = Table(table.source, rows, table.lines)
    if settings.prompt_column not in table.columns:
        raise UserError(f"{table.source} has no column '{settings.prompt_column}' for the prompts (columns: {', '.join(table.columns)}): "
                        "set data.prompt_column")
    return table


def _content(value: Any, place: str, column: str) -> str | list[Message]:
    """A prompt as text or messages. Raises UserError where it is neither."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise UserError(f"{place}: column '{column}' holds {shown(value)} where text or a list of chat messages is expected")
    messages: list[Message] = []
    for number, message in enumerate(value, 1):
        kept = {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else {}
        if not {"role", "content"} <= kept.keys() or not all(isinstance(v, str) for v in kept.values()):
            raise UserError(f"{place}: message {number} is {shown(message)} where {{\"role\": text, \"content\": text}} is expected")
        messages.append(kept)
    if messages[-1]["role"] not in ("user", "tool", "assistant"):
        raise UserError(f"{place}: the last message is of role '{messages[-1]['role']}', "
                        "it must be user or tool, or assistant if it is to be continued")
    return messages


def _plain(value: Any) -> Any:
    """A value as JSON can hold it. Raises TypeError where none comes near.

    >>> _plain({"day": datetime.date(2020, 1, 2), "n": (1, 2)})
    {'day': '2020-01-02', 'n': [1, 2]}
    """
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    raise TypeError(type(value).__name__)


def _reward_columns(table: Table, settings: DataSettings, notes: list[str]) -> dict[str, list[Any]]:
    """The columns for the rewards, each with a value a row; None where a row lacks it."""
    columns: dict[str, list[Any]] = {}
    for name in table.columns:
        if name == settings.prompt_column:
            continue
        try:
            columns[name] = [_plain(row.get(name)) for row in table.rows]
        except TypeError as error:
            notes.append(f"column '{name}' of {table.source} is left out: values of type {error} cannot be given to rewards")
            continue
        if lacking := sum(name not in row for row in table.rows):
            notes.append(f"column '{name}' is missing in {lacking} of {len(table.rows)} rows of {table.source}: rewards see None there")
    return columns


# ------------------------------------------------------------------------------------------------------------- tokenising


def _prompts(
    table: Table, settings: DataSettings, tokenizer: Tokenizer, first: int, notes: list[str], progress: Progress | None
) -> tuple[list[Prompt], tuple[str, ...]]:
    """The table's prompts, numbered from `first`, and the columns for the rewards."""
    columns = _reward_columns(table, settings, notes)
    contents = [_content(row.get(settings.prompt_column), table.place(at), settings.prompt_column) for at, row in enumerate(table.rows)]
    contents = [_with_system(content, settings.system_prompt) for content in contents]
    if tokenizer.chat_template and any(isinstance(content, str) for content in contents):
        notes.append(f"prompts of {table.source} are plain text and do not go through the model's chat template: "
                     "give chat messages, or set data.system_prompt, if the model is to answer as in a chat")
    prompts: list[Prompt] = []
    for start in range(0, len(contents), CHUNK):
        rows = range(start, min(start + CHUNK, len(contents)))
        tokens = _tokenised([contents[row] for row in rows], [table.place(row) for row in rows], tokenizer, settings)
        prompts += [Prompt(first + row, ids, contents[row], {name: values[row] for name, values in columns.items()})
                    for row, ids in zip(rows, tokens, strict=True)]
        if progress:
            progress(rows.stop, len(contents))
    return _short_enough(prompts, table, first, settings, notes), tuple(columns)


def _with_system(content: str | list[Message], system: str | None) -> str | list[Message]:
    if system is None:
        return content
    messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
    return messages if messages[0]["role"] == "system" else [{"role": "system", "content": system}, *messages]


def _tokenised(
    contents: Sequence[str | list[Message]], places: Sequence[str], tokenizer: Tokenizer, settings: DataSettings
) -> list[tuple[int, ...]]:
    """Token ids of each prompt. Texts and chats are tokenised apart: only the first get the tokenizer's own special tokens."""
    ids: dict[int, tuple[int, ...]] = {}
    for chat in (False, True):
        mine = [at for at, content in enumerate(contents) if isinstance(content, list) == chat]
        texts = [_sound(render(contents[at], tokenizer, places[at], settings.chat_template_kwargs), places[at]) for at in mine]
        for at, text, tokens in zip(mine, texts, tokenizer(texts, add_special_tokens=not chat)["input_ids"] if texts else (), strict=True):
            # A tokenizer that ends every text (add_eos_token) would have the model continue after the end.
            ended = not chat and tokens[-1:] == [tokenizer.eos_token_id] and not text.endswith(str(tokenizer.eos_token))
            ids[at] = tuple(tokens[:-1] if ended else tokens)
    return [ids[at] for at in range(len(contents))]


def _sound(text: str, place: str) -> str:
    if not text.strip():
        raise UserError(f"{place}: the prompt is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:                       # JSON can hold half of a surrogate pair, no tokenizer can
        raise UserError(f"{place}: the prompt is not valid Unicode, character {error.start + 1} is {text[error.start]!a}") from error
    return text


def render(content: str | list[Message], tokenizer: Tokenizer, place: str, template_kwargs: Mapping[str, Any]) -> str:
    """The text that the model continues. A chat whose last message is the assistant's is continued within that message."""
    if isinstance(content, str):
        return content
    # jinja2 comes with transformers' chat templates, but only chats need it.
    import jinja2

    if not tokenizer.chat_template:
        raise UserError(f"{place}: the prompt is a chat, but the model's tokenizer has no chat template: "
                        "use an instruct model or text prompts")
    goes_on = content[-1]["role"] == "assistant"
    try:
        text = tokenizer.apply_chat_template(
            content, tokenize=False, add_generation_prompt=not goes_on, continue_final_message=goes_on, **template_kwargs
        )
    except (jinja2.TemplateError, ValueError) as error:
        raise UserError(f"{place}: the model's chat template refuses the messages: {first_line(error)}") from error
    return str(text)


def _short_enough(prompts: list[Prompt], table: Table, first: int, settings: DataSettings, notes: list[str]) -> list[Prompt]:
    limit = f"data.max_prompt_length = {settings.max_prompt_length}"
    long = [prompt for prompt in prompts if len(prompt.tokens) > settings.max_prompt_length]
    if not long:
        return prompts
    longest = max(len(prompt.tokens) for prompt in long)
    if settings.overlong == "refuse":
        raise UserError(f"{table.place(long[0].id - first)}: the prompt has {len(long[0].tokens)} tokens, the limit is {limit} "
                        f"({len(long)} of {len(prompts)} prompts are longer, the longest has {longest}): "
                        'raise it, or set data.overlong = "drop"')
    if len(long) == len(prompts):
        raise UserError(f"every prompt of {table.source} is longer than {limit} tokens (the longest has {longest}): raise it")
    notes.append(f"{len(long)} of {len(prompts)} prompts of {table.source} are left out: longer than {limit} tokens")
    return [prompt for prompt in prompts if len(prompt.tokens) <= settings.max_prompt_length]
