"""What the chat page does, without the page: which models there are, one question to all of them, what the answers were worth."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from localrl.comparison.entries import BASE, Wanted, wanted
from localrl.engines.files import facts
from localrl.engines.llama_cpp import Sampling
from localrl.exports import Files, adapter_of, base_of
from localrl.folder import checkpoints, read_run
from localrl.settings import UserError

from . import html, votes
from .place import OWN, Place
from .servers import Servers

LETTERS = "ABCD"
SKIPPED = {"node_modules", "__pycache__"}
PAUSE = 0.2
"""Seconds between two pictures of answers that are being written."""
ENOUGH = 8
"""Tokens from which on a speed says something: short answers come in one piece."""
Asked = str | list[dict[str, str]]


@dataclass(frozen=True)
class Model:
    """Something that can be opened, or could if it were exported."""

    label: str
    files: Files | None


def models(place: Place, folder: Path | None) -> list[Model]:
    """A run's base, its checkpoints and its merged files; then all other GGUF files. A damaged one is listed: opening it says what is wrong."""
    found: list[Model] = []
    if folder is not None:
        base = _readable(base_of, folder)
        found.append(Model(BASE, Files(base) if base else None))
        for checkpoint in checkpoints(folder):
            adapter = _readable(adapter_of, checkpoint)
            found.append(Model(checkpoint.name, Files(base, adapter) if base and adapter else None))
    known = {p.resolve() for model in found if model.files for p in (model.files.model, model.files.adapter) if p}
    for path in _ggufs(place.root):
        if path.resolve() not in known and path.resolve().is_relative_to(place.root) and not _is_adapter(path):
            found.append(Model(place.shown(path), Files(path)))
    return found


def _readable(of: Any, folder: Path) -> Path | None:
    """None if a file in `export/` is damaged, too: the export page tells of it."""
    try:
        found: Path | None = of(folder)
    except UserError:
        return None
    return found


def _ggufs(root: Path, depth: int = 6) -> Iterator[Path]:
    if depth == 0:
        return
    try:
        entries = sorted(root.iterdir())
    except OSError:
        return
    for path in entries:
        if path.name.startswith(".") or path.name in SKIPPED or path.suffix == ".parts" or path.name == OWN:
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _ggufs(path, depth - 1)
        elif path.suffix == ".gguf" and ("-of-" not in path.stem or path.stem.split("-of-")[0].endswith("-00001")):
            yield path


def _is_adapter(path: Path) -> bool:
    try:
        return facts(path).get("general.type") == "adapter"
    except UserError:
        return False


def exporting(place: Place, folder: Path, labels: Sequence[str]) -> list[str]:
    """The command that exports the base and adapters that lack, with one loading of the model, and tries them on one prompt."""
    found: list[Wanted] = wanted(folder, checkpoints(folder)[-1] if checkpoints(folder) else folder, labels)
    return ["compare", place.shown(folder), *[one.label for one in found], "--prompts", "1"]


def options() -> list[tuple[str, Any, str]]:
    """(name, default, help) of every sampling setting, from the class that has them."""
    source = inspect.getsource(Sampling).splitlines()
    told = {}
    for one, following in zip(source, [*source[1:], ""], strict=True):
        name = one.strip().split(":")[0]
        told[name] = following.strip().strip('"') if following.strip().startswith('"""') else ""
    return [(f.name, f.default, told.get(f.name, "")) for f in dataclasses.fields(Sampling)]


def sampling(values: Mapping[str, Any]) -> dict[str, Any]:
    """As a request has it. UserError for a value out of range, or for none."""
    given: dict[str, Any] = {}
    for name, default, _ in options():
        value = values[name]
        if isinstance(default, tuple):
            given[name] = tuple(line for line in str(value or "").split("\n") if line)
        elif value is None:
            raise UserError(f"{name} is empty: it is usually {default:g}")
        elif isinstance(default, int) and value != int(value):
            raise UserError(f"{name} = {value:g}: it is a whole number")
        else:
            given[name] = type(default)(value)
    return dataclasses.asdict(Sampling(**given))


@dataclass
class Said:
    """One answer, as far as it is written."""

    text: str = ""
    tokens: int = 0
    seconds: float = 0.0
    """From the first token to the last."""
    done: bool = False
    ended: bool = False
    wrong: str = ""
    rewards: dict[str, float] = field(default_factory=dict)

    @property
    def facts(self) -> str:
        """Length and speed, in words."""
        if not self.ended or self.wrong:
            return ""
        speed = f", {(self.tokens - 1) / self.seconds:,.0f} tok/s" if self.tokens >= ENOUGH and self.seconds > 0 else ""
        return f"{self.tokens} tokens{speed}" + ("" if self.done else ", not at its end")


@dataclass
class Turn:
    """One question and every column's answer to it."""

    question: str
    prompt: Asked | None
    """A held-out prompt as the data have it; None: the question goes on with the conversation."""
    row: int | None
    """Which held-out prompt it is."""
    said: list[Said]


@dataclass
class Talk:
    """A tab's conversation. Each column goes on with its own answers."""

    run: str = ""
    models: list[str] = field(default_factory=list)
    """In the order of the columns, shuffled if blind."""
    blind: bool = False
    shown: bool = True
    """Names stand above the columns."""
    turns: list[Turn] = field(default_factory=list)
    voted: bool = False
    stopped: bool = False
    busy: bool = False
    about: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    def columns(self, names: Sequence[str], blind: bool) -> None:
        """Begin anew if other models are asked, or after a blind vote: a new shuffle then."""
        if sorted(names) == sorted(self.models) and blind == self.blind and not (blind and self.voted):
            return
        self.models, self.blind, self.shown, self.voted = [*names], blind, not blind, False
        self.turns = []
        if blind:
            random.SystemRandom().shuffle(self.models)

    def name(self, column: int) -> str:
        """What stands above a column."""
        return self.models[column] if self.shown else f"Model {LETTERS[column]}"

    def prompt(self, column: int, turn: int, system: str) -> Asked:
        """All that this column is asked, its own answers included."""
        opening = self.turns[turn].prompt
        if opening is not None:
            return opening
        begun = next((t for t in range(turn, -1, -1) if self.turns[t].prompt is not None), None)
        first = None if begun is None else self.turns[begun].prompt
        if isinstance(first, str):
            return self.turns[turn].question                         # a plain text has no turns
        messages = [*first] if first is not None else [{"role": "system", "content": system}] if system.strip() else []
        for at in range(0 if begun is None else begun, turn):
            if at != begun:
                messages.append({"role": "user", "content": self.turns[at].question})
            messages.append({"role": "assistant", "content": self.turns[at].said[column].text})
        return [*messages, {"role": "user", "content": self.turns[turn].question}]


def found_again(talk: Talk | None, run: str) -> Talk:
    """The conversation for a page that is opened: one of its own, so that two tabs do not write into each other's. What is being written elsewhere is
    taken as far as it is."""
    if talk is None:
        return Talk(run=run)
    mine = copy.deepcopy(talk)
    mine.busy = mine.stopped = False
    for said in (said for turn in mine.turns for said in turn.said):
        said.ended = True
    return mine


def ask(talk: Talk, known: Sequence[Model], servers: Servers, system: str, settings: Mapping[str, Any], seed: int) -> Iterator[None]:
    """The last turn's answers, all columns at once; a step whenever there is more to see. What goes wrong in a column stands there."""
    files = {model.label: model.files for model in known}
    turn = talk.turns[-1]
    threads = []
    for column, name in enumerate(talk.models):
        prompt = talk.prompt(column, len(talk.turns) - 1, system)
        threads.append(threading.Thread(target=_fill, args=(turn.said[column], files.get(name), servers, prompt, settings, seed, talk), daemon=True))
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        yield
        time.sleep(PAUSE)


def _fill(said: Said, files: Files | None, servers: Servers, prompt: Asked, settings: Mapping[str, Any], seed: int, talk: Talk) -> None:
    try:
        if files is None:
            raise UserError("not exported yet: export it above, then ask again")
        with servers.use(files, lambda: talk.stopped) as server:
            begun = 0.0
            for piece in () if talk.stopped else server.answer(prompt, settings, seed, lambda: talk.stopped):
                if piece.text:
                    said.text += piece.text
                    begun = begun or time.monotonic()
                    said.seconds = time.monotonic() - begun
                said.done = said.done if piece.done is None else piece.done
                said.tokens = piece.tokens or said.tokens
    except UserError as error:
        said.wrong = str(error)
    finally:
        said.ended = True


# -- rewards ------------------------------------------------------------------------------------------------------------------


class Judge:
    """A run's prompts and rewards. Not for several threads at once: it has a lock for that."""

    def __init__(self, folder: Path, base: Path) -> None:
        from localrl.data import load_prompts
        from localrl.policy.load import load_tokenizer
        from localrl.prepare import with_demo_data

        self.run, self.base, self.lock = read_run(folder), base, threading.Lock()
        self.tokenizer = load_tokenizer(self.run.model)
        data = load_prompts(with_demo_data(self.run.data), self.tokenizer, self.run.seed, base)
        self.prompts = (data.eval or data.train)[:LISTED]
        self.plain = isinstance(self.prompts[0].content, str)

    def score(self, turn: Turn, prompts: Sequence[Asked]) -> str:
        """Fill in the rewards of the answers that ended; a sentence on what could not be had. UserError if no reward works."""
        from localrl.batch import Prompt, Request, Rollout
        from localrl.rewards import Rewards

        said = [(one, prompt) for one, prompt in zip(turn.said, prompts, strict=True) if one.ended and not one.wrong and one.text]
        settings, note = self._fitting(turn.row is not None)
        if not said or settings is None:
            return note
        columns = self.prompts[turn.row].columns if turn.row is not None else {}
        rollouts = []
        for one, content in said:
            ids = tuple(self.tokenizer([one.text], add_special_tokens=False)["input_ids"][0])
            rollouts.append(Rollout(Request(Prompt(turn.row or 0, (), content, columns)), ids, one.text, one.done, 0))
        with self.lock, Rewards(settings, self.base) as rewards:
            for (one, _), scored in zip(said, rewards.score(rollouts), strict=True):
                one.rewards = dict(zip(rewards.names, scored.rewards, strict=True))
            return " ".join([note, *rewards.report().messages]).strip()

    @cache  # noqa: B019 (a judge lives as long as the pages)
    def _fitting(self, held_out: bool) -> tuple[Any, str]:
        """The run's rewards; for a person's own question those that need no column of the data, and which those are not."""
        from localrl.rewards import Rewards

        if not self.run.rewards.functions:
            return None, "This run has no rewards."
        if held_out:
            return self.run.rewards, ""
        kept, lost = [], []
        for spec in self.run.rewards.functions:
            alone = self.run.rewards.model_copy(update={"functions": (spec.model_copy(update={"given": None}),)})
            with Rewards(alone, self.base) as rewards:
                try:
                    rewards.check_columns(())
                    kept.append(spec)
                except UserError:
                    lost.append(spec.label)
        names = {spec.label for spec in kept}
        kept = [spec for spec in kept if spec.given is None or spec.given in names]
        note = f"A question of your own is not scored by {', '.join(lost)}: that needs columns of the data." if lost else ""
        return (self.run.rewards.model_copy(update={"functions": tuple(kept)}) if kept else None), note


LISTED = 100
"""Held-out prompts that are offered."""


def said_last(content: Asked) -> str:
    """A prompt for people."""
    return content if isinstance(content, str) else content[-1]["content"]


# -- votes --------------------------------------------------------------------------------------------------------------------


def vote(place: Place, talk: Talk, choice: str, system: str) -> None:
    """Keep what was liked best, by its letter, or a tie. UserError if there is nothing to choose from."""
    if not talk.turns or talk.busy:
        raise UserError("there is nothing to vote on yet: ask something first, and wait for the answers")
    if talk.voted or not talk.blind or talk.shown:
        raise UserError("one vote an answer, before the names are shown: ask again" if talk.blind else "votes are taken blind: choose Blind, then ask")
    turn = talk.turns[-1]
    if len(talk.models) < 2 or any(said.wrong or not said.text for said in turn.said):
        raise UserError("a vote needs at least two models, and an answer from each")
    answers = tuple(
        votes.Answer(name, said.text, said.done, {k: v for k, v in said.rewards.items() if math.isfinite(v)})
        for name, said in zip(talk.models, turn.said, strict=True)
    )
    best = None if choice == "tie" else LETTERS.index(choice)
    # the last turn's prompt as all were asked it: with more than one turn, each column's own history differs, so that only the first is comparable
    if len(talk.turns) > 1:
        raise UserError("a vote is on answers to the same prompt, and these conversations differ by now: press New conversation and ask again")
    votes.keep(votes_on(place, talk.run), votes.Vote(talk.prompt(0, 0, system), answers, best, {**talk.about, "time": time.time()}))
    talk.voted = talk.shown = True


def votes_on(place: Place, run: str) -> Path:
    """The file of a run's votes, and of those without a run."""
    return votes.file_of(place, place.inside(run) if run else place.root / "no run")


def told(place: Place, run: str) -> str:
    """The votes so far, counted."""
    found, bad = votes.read(votes_on(place, run))
    if not found:
        return '<p class="quiet">No votes yet.</p>'
    rows = [
        (pair.first, pair.second, pair.wins, pair.ties, pair.losses, f"{pair.share:.0%} ({pair.interval[0]:.0%} to {pair.interval[1]:.0%})")
        for pair in votes.tally(found)
    ]
    caption = f"{len(found)} votes. Share: how often the first was liked better, a tie counting half; in brackets the 95 % interval (Wilson). " \
              "While it holds 50 %, the votes do not tell which is better."
    lost = html.notice(f"{bad} lines of the file of votes cannot be read and are left out") if bad else ""
    return lost + html.table(("First", "Second", "First better", "Ties", "Second better", "Share of the first"), rows, (2, 3, 4, 5), caption)


# -- the picture --------------------------------------------------------------------------------------------------------------


def picture(talk: Talk) -> str:
    """All columns. What models say is text, never markup."""
    if not talk.turns:
        return '<p class="quiet">Choose models and ask something: every one gets the same prompt and the same seed.</p>'
    columns = []
    for column in range(len(talk.models)):
        parts = [f"<h2>{html.text(talk.name(column))}</h2>"]
        for turn in talk.turns:
            said = turn.said[column]
            parts.append(f'<div class="question"><span class="who">You</span><pre class="text">{html.text(turn.question)}</pre></div>')
            waiting = '<p class="quiet">opens or waits its turn ...</p>' if not said.ended and not said.text else ""
            parts.append(f'<div class="answer">{waiting}<pre class="text">{html.text(said.text)}</pre>{html.complaint(said.wrong)}')
            if talk.shown:                                           # rewards and speed would sway a blind vote
                marks = [html.text(f"{name} {value:.2f}" if math.isfinite(value) else f"{name} -") for name, value in said.rewards.items()]
                parts.append(f'<p class="facts">{" &middot; ".join([*([html.text(said.facts)] if said.facts else []), *marks])}</p>')
            parts.append("</div>")
        columns.append(f'<section class="column" aria-label="{html.text(talk.name(column))}">{"".join(parts)}</section>')
    return f'<div class="columns">{"".join(columns)}</div>' + html.notice(talk.note)
