"""Chat and compare: one to four models side by side, the run's rewards beside their answers, votes that do not know whose answer it is."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr

from localrl.folder import read_run
from localrl.settings import UserError
from localrl.status import run_folders

from .. import html, jobs, talking, votes
from ..events import on_load
from ..place import Place
from ..servers import MOST, Servers
from ..talking import Judge, Said, Talk, Turn

TITLE, PATH = "Chat and compare", "/chat"
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
OWN_QUESTION = "A question of your own"
KIND = "compare"
SECONDS = 2.0
"""Between two looks at an export that runs."""
GO = """name => {
  const at = new URL(location.href);
  at.search = name ? '?run=' + encodeURIComponent(name) : '';
  if (at.href !== location.href) location.assign(at);
}"""
CSS = """
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(260px, 100%), 1fr)); gap: 12px; }
.column { border: 1px solid var(--border-color-primary); border-radius: 6px; padding: .6rem .8rem; min-width: 0; }
h2 { font-size: 1rem; font-weight: 600; margin: 0 0 .4rem; overflow-wrap: anywhere; }
pre.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font-family: var(--font-mono); font-size: .85rem; }
.question { border-left: 3px solid var(--border-color-primary); padding-left: .6rem; margin: .4rem 0; }
.who { font-size: .8rem; font-weight: 600; }
.answer { margin: .4rem 0 .8rem; } .facts { font-size: .8rem; margin: .3rem 0; font-variant-numeric: tabular-nums; }
.complaint, .notice { margin: .4rem 0; overflow-wrap: anywhere; }
"""
SERVERS = Servers()
"""Of this process: all tabs share them."""
TALKS: dict[str, Talk] = {}
"""Each run's last conversation: a page that is reloaded goes on with it."""


@dataclass(frozen=True)
class Parts:
    """The components."""

    run: gr.Dropdown
    said: gr.HTML
    models: gr.Dropdown
    blind: gr.Checkbox
    export: gr.Button
    exporting: gr.HTML
    timer: gr.Timer
    prompt: gr.Dropdown
    question: gr.Textbox
    ask: gr.Button
    stop: gr.Button
    again: gr.Button
    new: gr.Button
    picture: gr.HTML
    ballot: gr.Column
    choice: gr.Radio
    vote: gr.Button
    reveal: gr.Button
    tally: gr.HTML
    download: gr.DownloadButton
    system: gr.Textbox
    seed: gr.Number
    sampling: dict[str, Any]
    talk: gr.State


def build(place: Place) -> None:
    """The page."""
    gr.Markdown("# Chat and compare")
    parts = _parts()
    _wire(place, parts)


def _parts() -> Parts:
    """From top to bottom: whom, what, their answers, the vote, the settings."""
    run = gr.Dropdown([], label="Run: its prompts, rewards and exported models", interactive=True, elem_id="chat-run")
    said = gr.HTML(css_template=CSS, apply_default_css=False, padding=False, elem_id="chat-said")
    models = gr.Dropdown([], label=f"Models (1 to {MOST}, side by side)", multiselect=True, max_choices=MOST, interactive=True, elem_id="chat-models")
    blind = gr.Checkbox(False, label="Blind: columns are shuffled and without names until you vote", elem_id="chat-blind")
    export = gr.Button("Export what is missing", visible=False, elem_id="chat-export")
    exporting = gr.HTML(css_template=CSS, apply_default_css=False, padding=False, elem_id="chat-exporting")
    prompt = gr.Dropdown([OWN_QUESTION], value=OWN_QUESTION, label="Prompt", interactive=True, elem_id="chat-prompt")
    question = gr.Textbox(label="Question", lines=2, placeholder="What all of them are asked", elem_id="chat-question")
    with gr.Row():
        ask = gr.Button("Ask", variant="primary", min_width=90, scale=0, elem_id="chat-ask")
        stop = gr.Button("Stop", min_width=90, scale=0, elem_id="chat-stop")
        again = gr.Button("Regenerate", min_width=120, scale=0, elem_id="chat-again")
        new = gr.Button("New conversation", min_width=200, scale=0, elem_id="chat-new")
    picture = gr.HTML(talking.picture(Talk()), css_template=CSS, apply_default_css=False, elem_id="chat-picture")
    with gr.Column(visible=False, elem_id="chat-ballot") as ballot:
        choice = gr.Radio([], label="Which answer is the best?", elem_id="chat-choice")
        with gr.Row():
            vote = gr.Button("Vote and reveal", variant="primary", elem_id="chat-vote")
            reveal = gr.Button("Reveal without a vote", elem_id="chat-reveal")
    with gr.Accordion("Sampling and system prompt", open=False):
        system = gr.Textbox(label="System prompt", lines=2, elem_id="chat-system")
        seed = gr.Number(0, label="seed", info="The same for all columns; Regenerate adds 1.", precision=0, minimum=0, elem_id="chat-seed")
        with gr.Row():
            sampling = {name: _field(name, default, told) for name, default, told in talking.options()}
    with gr.Accordion("Votes so far", open=False):
        tally = gr.HTML(elem_id="chat-tally")
        gr.Markdown("The download has a line an answer: prompt, response, model, and for a worse one `chosen` and `rejected`. "
                    "`localrl train --from-log` takes it as it is.")
        download = gr.DownloadButton("Download votes as preferences", visible=False, elem_id="chat-download")
    return Parts(run, said, models, blind, export, exporting, gr.Timer(SECONDS, active=False), prompt, question, ask, stop, again, new, picture, ballot, choice,
                 vote, reveal, tally, download, system, seed, sampling, gr.State(None))  # fmt: skip


def _field(name: str, default: Any, told: str) -> Any:
    """A sampling setting's input, by the kind of its default."""
    if isinstance(default, tuple):
        return gr.Textbox(label=name, info=f"{told} One a line.".strip(), lines=1, elem_id=f"chat-{name}")
    return gr.Number(default, label=name, info=told or None, precision=0 if isinstance(default, int) else None, elem_id=f"chat-{name}")


def _folder(place: Place, run: str) -> Path | None:
    return place.inside(run) if run else None


def _judges(place: Place) -> Callable[[str], Judge]:
    """A run's prompts and rewards, read once. UserError if they cannot be."""

    @lru_cache(maxsize=4)
    def judge(run: str) -> Judge:
        return Judge(place.inside(run), place.root)

    return judge


def _wire(place: Place, parts: Parts) -> None:
    """All events. Asking, stopping and the rest do not wait for each other."""
    judge = _judges(place)
    _wire_opening(place, parts, judge)
    _wire_export(place, parts)
    fields = [*parts.sampling.values()]
    given = [parts.talk, parts.run, parts.models, parts.blind, parts.prompt, parts.question, parts.system, parts.seed, *fields]
    shown = [parts.talk, parts.said, parts.picture, parts.ballot, parts.choice, parts.question]

    def asked(talk: Talk | None, *values: Any) -> Iterator[list[Any]]:
        yield from _answers(place, judge, parts, talk or Talk(), values, again=False)

    def regenerated(talk: Talk | None, *values: Any) -> Iterator[list[Any]]:
        yield from _answers(place, judge, parts, talk or Talk(), values, again=True)

    for trigger, answer in ((parts.ask.click, asked), (parts.question.submit, asked), (parts.again.click, regenerated)):
        trigger(answer, given, shown, concurrency_limit=8, concurrency_id="chat-ask", **QUIET)

    def stopped(talk: Talk | None) -> None:
        if talk is not None:
            talk.stopped = True

    def fresh(talk: Talk | None) -> list[Any]:
        if talk is not None:
            talk.stopped = True
        new = Talk(run=talk.run if talk else "")
        TALKS.pop(new.run, None)
        return [new, "", talking.picture(new), gr.Column(visible=False), None, ""]

    parts.stop.click(stopped, parts.talk, None, queue=False, **QUIET)
    parts.new.click(fresh, parts.talk, shown, **QUIET)
    _wire_votes(place, parts)


def _answers(place: Place, judge: Callable[[str], Judge], parts: Parts, talk: Talk, values: tuple[Any, ...], again: bool) -> Iterator[list[Any]]:
    """One question to all columns: pictures as they write, then their rewards."""
    try:
        if talk.busy:
            raise UserError("the answers to the last question are still being written: press Stop first")
        system, settings, seed = _begin(judge, parts, talk, values, again)
    except UserError as error:
        yield [talk, html.complaint(error), gr.skip(), gr.skip(), gr.skip(), gr.skip()]
        return
    talk.busy, talk.stopped, talk.note, TALKS[talk.run] = True, False, "", talk
    try:
        for _ in talking.ask(talk, talking.models(place, _folder(place, talk.run)), SERVERS, system, settings, seed):
            yield [talk, "", talking.picture(talk), gr.Column(visible=False), gr.skip(), gr.skip()]
        if talk.run:
            yield [talk, html.notice("scoring ..."), talking.picture(talk), gr.skip(), gr.skip(), gr.skip()]
            prompts = [talk.prompt(column, len(talk.turns) - 1, system) for column in range(len(talk.models))]
            try:
                talk.note = judge(talk.run).score(talk.turns[-1], prompts)
            except UserError as error:
                talk.note = f"not scored: {error}"
    finally:
        talk.busy = False
    yield [talk, html.notice("stopped") if talk.stopped else "", talking.picture(talk), *_ballot(talk), ""]


def _ballot(talk: Talk) -> tuple[gr.Column, Any]:
    """What a vote is cast with, where there is one to cast."""
    votable = talk.blind and not talk.shown and len(talk.models) > 1 and len(talk.turns) == 1
    letters = talking.LETTERS[: len(talk.models)]
    choices = gr.Radio([*[(f"Model {letter}", letter) for letter in letters], ("Tie", "tie")], value=None) if votable else gr.skip()
    return gr.Column(visible=votable), choices


def _begin(judge: Callable[[str], Judge], parts: Parts, talk: Talk, values: tuple[Any, ...], again: bool) -> tuple[str, dict[str, Any], int]:
    """Put the question at the end of the talk. UserError for what is missing or out of range."""
    run, names, blind, row, question, system, seed, *fields = values
    if not names:
        raise UserError("no model is chosen: pick one to four above")
    if blind and len(names) < 2:
        raise UserError("blind with one model tells nothing: pick at least two")
    settings = talking.sampling(dict(zip(parts.sampling, fields, strict=True)))
    if seed is None or seed < 0:
        raise UserError(f"seed = {seed}: it is a whole number from 0 on")
    if again:
        if not talk.turns:
            raise UserError("there is nothing to regenerate yet: ask something first")
        if talk.voted or sorted(names) != sorted(talk.models):
            raise UserError("the models or the vote have changed: ask anew instead")
        seed = int(talk.about["seed"]) + 1
        talk.turns[-1].said = [Said() for _ in talk.models]
    else:
        if row == OWN_QUESTION and not (question or "").strip():
            raise UserError("there is no question: write one, or pick a held-out prompt")
        talk.run = run or ""
        talk.columns(names, blind)
        if row != OWN_QUESTION:
            content = judge(talk.run).prompts[int(row)].content
            talk.turns = [Turn(talking.said_last(content), content, int(row), [Said() for _ in names])]
        else:
            plain = bool(talk.run) and _plain(judge, talk.run)
            talk.turns.append(Turn(question, question if plain else None, None, [Said() for _ in names]))
    talk.about = {"run": talk.run, "seed": int(seed), "sampling": settings, "system": system}
    return system or "", settings, int(seed)


def _plain(judge: Callable[[str], Judge], run: str) -> bool:
    """Are the run's prompts texts, not chats? If its data cannot be read, a chat is taken for granted."""
    try:
        return judge(run).plain
    except UserError:
        return False


def _wire_opening(place: Place, parts: Parts, judge: Callable[[str], Judge]) -> None:
    """What a reload shows: the run of the address, its models, its prompts."""

    def opened(request: gr.Request) -> list[Any]:
        run = str(request.query_params.get("run", ""))
        runs = [place.shown(folder) for folder in run_folders(place.root)]
        complaint, system, settings = "", "", {}
        try:
            if run:
                settled = read_run(place.inside(run))
                system, rollout = settled.data.system_prompt or "", settled.rollout
                # what training sampled with, under the same names
                settings = {name: getattr(rollout, name) for name in parts.sampling if hasattr(rollout, name)} | {"max_tokens": rollout.max_completion_length}
        except UserError as error:
            complaint, run = html.complaint(error), ""
        known = talking.models(place, _folder(place, run))
        ready = [model.label for model in known if model.files is not None]
        first = ready if len(ready) <= 2 else [ready[0], [m.label for m in known if m.files and "/" not in m.label][-1] if run else ready[1]]
        shown = [(model.label if model.files else f"{model.label} (not exported yet)", model.label) for model in known]
        fields = [_filled(settings[name]) if name in settings else gr.skip() for name in parts.sampling]
        talk = talking.found_again(TALKS.get(run), run)
        named = talk.models if {*talk.models} <= {model.label for model in known} else []
        return [gr.Dropdown([("No run", ""), *runs], value=run), complaint, gr.Dropdown(shown, value=sorted(named) or [*dict.fromkeys(first)]),
                system, talking.told(place, run), _file_of_votes(place, run), talk, talk.blind, talking.picture(talk), *_ballot(talk), *fields]  # fmt: skip

    def prompts(run: str) -> Any:
        if not run:
            return gr.skip(), gr.skip()
        try:
            found = judge(run).prompts
        except UserError as error:
            return gr.skip(), html.notice(f"no held-out prompts to pick from: {error}")
        listed = [(f"{at + 1}. {talking.said_last(prompt.content)[:100]}", str(at)) for at, prompt in enumerate(found)]
        return gr.Dropdown([(OWN_QUESTION, OWN_QUESTION), *listed], value=OWN_QUESTION), gr.skip()

    shown = [parts.run, parts.said, parts.models, parts.system, parts.tally, parts.download, parts.talk, parts.blind, parts.picture, parts.ballot,
             parts.choice, *parts.sampling.values()]  # fmt: skip
    on_load(opened, None, shown, **QUIET).then(prompts, parts.run, [parts.prompt, parts.said], **QUIET)
    parts.run.input(None, parts.run, None, js=GO, **QUIET)


def _filled(value: Any) -> Any:
    """As its input has it."""
    return "\n".join(value) if isinstance(value, tuple | list) else value


def _wire_export(place: Place, parts: Parts) -> None:
    """One click for what is not exported yet."""

    def lacking(run: str, names: list[str]) -> list[str]:
        return [m.label for m in talking.models(place, _folder(place, run)) if m.files is None and m.label in names] if run else []

    def offered(run: str, names: list[str]) -> Any:
        missing = lacking(run, names)
        return gr.Button(f"Export {', '.join(missing)}" if missing else "Export what is missing", visible=bool(missing))

    def begun(run: str, names: list[str]) -> list[Any]:
        if not any(job.state == "running" for job in jobs.jobs(place, KIND, run)):
            jobs.start(place, KIND, talking.exporting(place, place.inside(run), lacking(run, names)), run)
        return [gr.Button(visible=False), html.notice("exporting, and checking what was exported ..."), gr.Timer(active=True)]

    def news(run: str, names: list[str]) -> list[Any]:
        job = next(iter(jobs.jobs(place, KIND, run)), None)
        if job is None or job.state == "running":
            last = [line.strip() for line in (job.output() if job else "").splitlines() if line.strip()][-1:]
            return [gr.skip(), html.notice("exporting, and checking what was exported ... " + "".join(last)[:200]), gr.skip(), gr.skip()]
        known = talking.models(place, _folder(place, run))
        shown = [(model.label if model.files else f"{model.label} (not exported yet)", model.label) for model in known]
        wrong = job.complaint()
        return [offered(run, names), html.complaint(f"not exported: {wrong}") if wrong else html.notice("exported: ask now"),
                gr.Timer(active=False), gr.Dropdown(shown, value=names)]  # fmt: skip

    given = [parts.run, parts.models]
    parts.models.change(offered, given, parts.export, **QUIET)
    parts.export.click(begun, given, [parts.export, parts.exporting, parts.timer], **QUIET)
    parts.timer.tick(news, given, [parts.export, parts.exporting, parts.timer, parts.models], **QUIET)


def _wire_votes(place: Place, parts: Parts) -> None:
    """The vote, the names, the count, the file."""

    def voted(talk: Talk | None, choice: str | None, system: str) -> list[Any]:
        try:
            if choice is None:
                raise UserError("no answer is chosen: pick the best one, or Tie")
            talking.vote(place, talk or Talk(), choice, system)
        except UserError as error:
            return [talk, html.complaint(error), gr.skip(), gr.skip(), gr.skip(), gr.skip()]
        assert talk is not None
        return [talk, html.notice("vote kept"), talking.picture(talk), gr.Column(visible=False), talking.told(place, talk.run), _file_of_votes(place, talk.run)]

    def revealed(talk: Talk | None) -> list[Any]:
        if talk is None:
            return [gr.skip()] * 6
        talk.shown = talk.voted = True
        return [talk, html.notice("revealed; no vote was kept"), talking.picture(talk), gr.Column(visible=False), gr.skip(), gr.skip()]

    shown = [parts.talk, parts.said, parts.picture, parts.ballot, parts.tally, parts.download]
    parts.vote.click(voted, [parts.talk, parts.choice, parts.system], shown, **QUIET)
    parts.reveal.click(revealed, parts.talk, shown, **QUIET)


def _file_of_votes(place: Place, run: str) -> gr.DownloadButton:
    """The preferences as a file, if there are any; outside of the workspace, since it is made anew for each who wants it."""
    rows = votes.preferences(votes.read(talking.votes_on(place, run))[0])
    if not rows:
        return gr.DownloadButton(visible=False)
    path = Path(tempfile.mkdtemp(prefix="localrl-votes-")) / "preferences.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return gr.DownloadButton(value=str(path), visible=True)
