"""Reward lab: put rewards together, try them on real completions before anything is trained, see what algorithms make of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import quote

import gradio as gr

from localrl.lab.blocks import Parameter, blocks
from localrl.lab.drafts import TEMPLATE, own_functions, save_code, save_set
from localrl.rewards import RewardSettings, RewardSpec
from localrl.settings import UserError

from .. import runs, trial_view, trials
from ..events import on_load
from ..html import complaint, notice, text
from ..look import DO
from ..place import Place
from ..trial_view import CSS
from ..trials import PASTE, RUN, SAMPLE, Asked, Item

TITLE, PATH = "Reward lab", "/lab"
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
SECONDS = 1.5
KEEP = """number => { const at = new URL(location.href); if (number) { at.search = '?try=' + number; history.replaceState(history.state, '', at); } }"""
EXAMPLE = '{"prompt": "What is 2 + 2?", "completions": ["4", "It is 5.", "four"], "answer": "4"}'


@dataclass(frozen=True)
class Results:
    """The components that show a trial, in the order in which `shown` has them."""

    body: gr.Column
    verdict: gr.HTML
    cards: gr.HTML
    levers: gr.HTML
    fakes: gr.HTML
    agreement: gr.HTML
    group: gr.Dropdown

    def all(self) -> list[Any]:
        """In order."""
        return [getattr(self, f.name) for f in fields(self)]


@dataclass(frozen=True)
class Form:
    """What is being put together."""

    items: gr.State
    """list[Item]"""
    shape: gr.State
    """Counts up whenever the cards must be drawn anew: a reward came, went, or all did."""
    limits: list[gr.Number]


def build(place: Place) -> None:
    """The page."""
    gr.Markdown("# Reward lab\nPut rewards together and see what they say of real completions, before a training run learns the wrong thing from them.")
    form = Form(gr.State([]), gr.State(0), [])
    number, seen = gr.Textbox("", visible=False, label="trial"), gr.State(0.0)        # not a State: the address is written in the browser
    said, opener = _compose(place, form)
    source = _source(place)
    with gr.Row():
        go = gr.Button("Try these rewards", variant="primary", elem_id="lab-try")
        stop = gr.Button("Stop", variant="stop", visible=False, elem_id="lab-stop")
    status = gr.HTML(css_template=CSS, elem_id="lab-status")
    results = _results(place, form, number)
    timer = gr.Timer(SECONDS, active=False)
    outputs = [status, stop, go, timer, seen, *results.all()]

    def begin(items: list[Item], *values: Any) -> list[Any]:
        asked = Asked(*values[: len(source)])
        try:
            begun = trials.begin(place, trials.settings_of(items, dict(zip(trials.limits(), values[len(source) :], strict=True))), asked)
        except (UserError, ValueError, TypeError) as error:
            return [gr.skip(), complaint(error), *[gr.skip()] * (len(outputs) - 1)]
        return [begun, *news(place, begun, items, 0.0, 0)]

    def opened(request: gr.Request) -> list[Any]:
        """What the address names: a trial, a run, a set; else the demo's rewards to start from."""
        return [*_opened(place, dict(request.query_params)), gr.Dropdown(choices=trials.known(place))]

    go.click(begin, [form.items, *source, *form.limits], [number, *outputs], **QUIET).then(None, number, None, js=KEEP, **QUIET)
    stop.click(lambda name: _stop(place, name), number, None, **QUIET)
    timer.tick(lambda name, items, mark, at: news(place, name, items, mark, at), [number, form.items, seen, results.group], outputs, **QUIET)
    loaded = on_load(opened, None, [form.items, form.shape, said, number, *source, *form.limits, opener], **QUIET)
    loaded.then(lambda name, items: news(place, name, items, 0.0, 0), [number, form.items], outputs, **QUIET)


def _opened(place: Place, query: dict[str, str]) -> list[Any]:
    """[rewards, shape, sentence, trial, *source, *limits]"""
    names, asked, number, wrong = [row.name for row in runs.rows(place)], Asked(SAMPLE, "preset: demo"), "", ""
    items, limits = trials.opened(place, "preset: demo")
    try:
        if query.get("try"):
            tried = trials.find(place, query["try"])
            (items, limits), asked, number = trials.settings_in(tried), trials.asked_in(tried), query["try"]
        elif query.get("run"):
            items, limits = trials.opened(place, f"run: {query['run']}")
            asked = Asked(RUN, f"run: {query['run']}", run=query["run"])
        elif query.get("rewards"):
            items, limits = trials.opened(place, f"set: {query['rewards']}")
    except UserError as error:
        wrong = complaint(error)
    bases = [choice for choice in trials.known(place) if not choice.startswith("set: ")]
    values = vars(asked) | {
        "base": gr.Dropdown(choices=bases, value=asked.base), "run": gr.Dropdown(choices=sorted({*names, *filter(None, [asked.run])}), value=asked.run or None),
    }  # fmt: skip
    return [items, _tick(), wrong, number, *(values[f.name] for f in fields(Asked)), *limits.values()]


def _tick() -> float:
    """Never the same twice."""
    import time

    return time.monotonic()


def news(place: Place, number: str, items: list[Item], mark: float, group: int | None) -> list[Any]:
    """[status, stop, go, timer, mark, *results]: what a trial has to show; results are left alone while they are as they were."""
    if not number:
        return ["", gr.Button(visible=False), gr.Button(visible=True), gr.Timer(active=False), 0.0, gr.Column(visible=False), *[gr.skip()] * 6]
    try:
        tried = trials.find(place, number)
        changed, state = tried.changed, tried.state
        parts = [gr.skip()] * 7 if changed == mark else _fresh(tried, items, group)
        status = _status(tried, state, bool(changed))
    except UserError as error:
        return [complaint(error), gr.Button(visible=False), gr.Button(visible=True), gr.Timer(active=False), mark, *[gr.skip()] * 7]
    running = state == "running"
    return [status, gr.Button(visible=running), gr.Button(visible=not running), gr.Timer(active=running), changed, *parts]


def _fresh(tried: trials.Tried, items: list[Item], group: int | None) -> list[Any]:
    trial = tried.trial
    if trial is None:
        return [gr.Column(visible=False), *[gr.skip()] * 6]
    prompts = trial_view.prompts(trial)
    group = group if group is not None and group < len(prompts) else 0
    weights = trials.weights_for(trial, items)
    return [
        gr.Column(visible=True), trial_view.verdict(trial, weights), trial_view.cards(trial), trial_view.levers(trial, weights, group),
        trial_view.fakes(trial, weights), trial_view.agreement(trial), gr.Dropdown(choices=prompts, value=group),
    ]  # fmt: skip


def _status(tried: trials.Tried, state: str, there: bool) -> str:
    job = tried.job
    last = "" if job is None else runs.last_line(job)
    match state:
        case "running":
            return notice(f"{'What the rewards say is below; gradients are still to come' if there else 'At work'}. {last}")
        case "stopped":
            return notice("Stopped. " + ("What the rewards had said is below." if there else
                          "Nothing was scored yet: if a reward hangs, lower its time limit and try again, the others then keep their values."))
        case "failed":
            return complaint((job.complaint() if job else "") or "its process is gone: try again")
    return ""


def _stop(place: Place, number: str) -> None:
    trials.find(place, number).stop()


# -- composing --------------------------------------------------------------------------------------------------------------------


def _compose(place: Place, form: Form) -> tuple[gr.HTML, gr.Dropdown]:
    """Section one: the rewards."""
    gr.Markdown("## 1. Rewards\nEach gives every completion a number. Their weighted sum is what a model learns to raise.")
    with gr.Row(elem_classes="low"):
        opener = gr.Dropdown([], label="Start from a set, a run or a preset", value=None, elem_id="lab-open")
        adder = gr.Dropdown(_choices(place), label="Add a reward", value=None, elem_id="lab-add")
    said = gr.HTML(css_template=CSS + DO, elem_id="lab-said")
    _cards(form)
    with gr.Accordion("Write your own in Python", open=False, elem_id="lab-code-fold"):
        gr.Markdown("TRL's signature: lists come in, one number a completion goes out (None: does not apply). Data columns come by their names. "
                    "It runs in a process of its own, with the limits below; saving does not run it.")
        code = gr.Code(TEMPLATE, language="python", label="Reward code", elem_id="lab-code", lines=10)
        with gr.Row(elem_classes="low"):
            name = gr.Textbox("mine", label="Save as rewards/NAME.py", elem_id="lab-code-name")
            keep = gr.Button("Save the file and add it", elem_id="lab-code-save")
    with gr.Accordion("Limits of the reward processes", open=False), gr.Row():
        for key, default in trials.limits().items():
            form.limits.append(gr.Number(default, label=key, info=_told(RewardSettings, key), elem_id=f"lab-limit-{key}"))
    with gr.Row(elem_classes="low"):
        title = gr.Textbox("", label="Keep this set as rewards/NAME.toml", placeholder="mine", elem_id="lab-set-name")
        save = gr.Button("Save the set", elem_id="lab-set-save")
    kept = gr.HTML(css_template=CSS + DO, elem_id="lab-kept")

    def opening(choice: str | None) -> list[Any]:
        if not choice:
            return [gr.skip()] * (3 + len(form.limits))
        try:
            items, values = trials.opened(place, choice)
        except UserError as error:
            return [gr.skip(), gr.skip(), complaint(error), *[gr.skip()] * len(form.limits)]
        return [items, _tick(), "", *values.values()]

    def adding(items: list[Item], choice: str | None) -> list[Any]:
        return [trials.added(items, choice), _tick(), None] if choice else [gr.skip()] * 3

    def keeping(items: list[Item], stem: str, source: str) -> list[Any]:
        try:
            paths = save_code(place.root, stem.strip(), source)
        except UserError as error:
            return [gr.skip(), gr.skip(), complaint(error), gr.skip()]
        there = {item["function"] for item in items}
        for path in (p for p in paths if p not in there):
            items = trials.added(items, path)
        shown = ", ".join(path.rpartition(":")[2] for path in paths)
        return [items, _tick(), notice(f"Saved: rewards/{stem.strip()}.py with {shown}."), gr.Dropdown(choices=_choices(place))]

    def saving(items: list[Item], stem: str, *values: Any) -> list[Any]:
        stem = stem.strip()
        try:
            save_set(place.root, stem, trials.settings_of(items, dict(zip(trials.limits(), values, strict=True))))
        except UserError as error:
            return [complaint(error), gr.skip()]
        return [_kept(stem), gr.Dropdown(choices=trials.known(place))]

    opener.input(opening, opener, [form.items, form.shape, said, *form.limits], **QUIET)
    adder.input(adding, [form.items, adder], [form.items, form.shape, adder], **QUIET)
    keep.click(keeping, [form.items, name, code], [form.items, form.shape, said, adder], **QUIET)
    save.click(saving, [form.items, title, *form.limits], [kept, opener], **QUIET)
    return said, opener


def _kept(stem: str) -> str:
    return (f'<div class="notice" role="status">Saved. <a class="do" href="/new?rewards={quote(stem)}">Train with it</a> '
            f"or in a terminal: <code>localrl train --rewards {text(stem)}</code></div>")


def _choices(place: Place) -> list[tuple[str, str]]:
    """(shown, function): built-in ones, and what lies in the workspace."""
    return [(f"{name}: {block.summary}"[:110], name) for name, block in blocks().items()] + [(f"own: {s}", p) for s, p in own_functions(place.root).items()]


def _cards(form: Form) -> None:
    """A card each reward, drawn anew when one comes or goes."""

    @gr.render(inputs=form.items, triggers=[form.shape.change])
    def draw(items: list[Item]) -> None:
        if not items:
            gr.Markdown("No rewards yet: add one above.")
        for item in items:
            with gr.Group(elem_id=f"lab-reward-{item['id']}"):
                _card(form, item, [trials.label(other) for other in items if other["id"] != item["id"]])


def _card(form: Form, item: Item, others: list[str]) -> None:
    block = blocks().get(item["function"])
    told = block.summary if block else item["function"].rpartition("/")[2]
    name = gr.Textbox(item["name"], label=f"Name of reward {item['id']}", placeholder=trials.label(item), info=told, interactive=True)
    _keeps(form, item, "name", name)
    with gr.Row():
        if block is None:
            args = gr.Textbox(item["args"], label="Arguments as JSON", interactive=True)
            _keeps(form, item, "args", args)
        else:
            for parameter in block.parameters:
                _keeps(form, item, parameter.name, _control(parameter, item["args"].get(parameter.name)), within=True)
        if others:
            given = gr.Dropdown([("always", ""), *others], value=item["given"] if item["given"] in others else "", label="Counts only given", interactive=True)
            least = gr.Number(item["at_least"], label="at least", interactive=True)
            _keeps(form, item, "given", given)
            _keeps(form, item, "at_least", least)
    gone = gr.Button(f"Remove {trials.label(item)}", size="sm", elem_id=f"lab-remove-{item['id']}")
    gone.click(lambda items: [[other for other in items if other["id"] != item["id"]], _tick()], form.items, [form.items, form.shape], **QUIET)


def _control(parameter: Parameter, value: Any) -> Any:
    """What a parameter is typed into."""
    name = parameter.name + ("" if parameter.required or parameter.default is not None else " (may be empty)")
    match parameter.kind:
        case "yes":
            return gr.Checkbox(bool(value), label=name, interactive=True)
        case "whole" | "number":
            return gr.Number(value, label=name, precision=0 if parameter.kind == "whole" else None, min_width=110, interactive=True)
        case "words":
            return gr.Textbox(value or "", label=f"{name}, with commas", min_width=140, interactive=True)
        case "json":
            return gr.Textbox(value or "", label=f"{name}, JSON", min_width=200, interactive=True)
    return gr.Textbox(value or "", label=name, min_width=110, interactive=True)


def _keeps(form: Form, item: Item, key: str, component: Any, within: bool = False) -> None:
    """What is typed goes into the form; the cards stay as they are. (`input`: a component that appears has not been typed into.)"""

    def kept(items: list[Item], value: Any) -> list[Item]:
        def changed(other: Item) -> Item:
            return {**other, "args": {**other["args"], key: value}} if within else {**other, key: value}

        return [changed(other) if other["id"] == item["id"] else other for other in items]

    component.input(kept, [form.items, component], form.items, **QUIET)


def _told(kind: type[RewardSettings] | type[RewardSpec], key: str) -> str:
    return " ".join((kind.model_fields[key].description or "").split())


# -- completions ------------------------------------------------------------------------------------------------------------------


def _source(place: Place) -> list[Any]:
    """Section two: which completions. The components in the order of `Asked`."""
    gr.Markdown("## 2. Completions\nThe untrained model's own answers show best what training would start from. They are kept: other rewards need no new ones.")
    kind = gr.Radio([*trials.SOURCES], value=SAMPLE, label="Score", elem_id="lab-source")
    base = gr.Dropdown([], label="Model, data and sampling as in", elem_id="lab-base")
    with gr.Column() as sampling:
        with gr.Row():
            count = gr.Number(8, label="Prompts", precision=0, minimum=1, maximum=512, elem_id="lab-prompts")
            each = gr.Number(8, label="Answers to each", precision=0, minimum=1, maximum=256, elem_id="lab-each")
        with gr.Accordion("Your own prompts", open=False):
            data = gr.Textbox("", label="Data file in this folder (JSONL, CSV, Parquet)", placeholder="mine.jsonl", elem_id="lab-data")
            typed = gr.Textbox("", label="Or type them, a line each", lines=3, elem_id="lab-typed",
                               info='A line may be JSON with columns: {"prompt": "2 + 2?", "answer": "4"}')
    run = gr.Dropdown([], label="Run, its newest step", visible=False, elem_id="lab-run")
    pasted = gr.Textbox("", label="JSON lines: prompt, completions, and columns for the rewards", lines=5, placeholder=EXAMPLE, visible=False,
                        elem_id="lab-pasted")
    gradients = gr.Checkbox(False, label="Also the rewards' gradients (slower): needed for directed weights", elem_id="lab-gradients")

    def chosen(which: str) -> list[Any]:
        return [gr.Dropdown(visible=which != RUN), gr.Column(visible=which == SAMPLE), gr.Dropdown(visible=which == RUN), gr.Textbox(visible=which == PASTE)]

    kind.change(chosen, kind, [base, sampling, run, pasted], **QUIET)
    parts = {"source": kind, "base": base, "data": data, "prompts": typed, "count": count, "each": each, "run": run, "pasted": pasted, "gradients": gradients}
    return [parts[f.name] for f in fields(Asked)]


# -- results ----------------------------------------------------------------------------------------------------------------------


def _results(place: Place, form: Form, number: gr.Textbox) -> Results:
    """Section three."""
    gr.Markdown("## 3. What they say\nWhat each reward says, whether they agree, how they can be cheated, and which answers each method would push up or down.")
    with gr.Column(visible=False, elem_id="lab-results") as body:
        verdict = _html("verdict")
        cards = _html("cards")
        gr.Markdown("### Weights, and what algorithms make of them\nMove a weight: nothing is run again.")
        sliders = gr.Row(elem_id="lab-weights")
        group = gr.Dropdown([], label="Prompt", elem_id="lab-group")
        levers = _html("levers")
        with gr.Accordion("Can they be cheated?", open=True):
            fakes = _html("fakes")
        with gr.Accordion("Do they agree?", open=False):
            agreement = _html("agreement")

    def again(items: list[Item], name: str, at: int | None) -> list[Any]:
        trial = trials.find(place, name).trial if name else None
        if trial is None:
            return [gr.skip()] * 3
        weights = trials.weights_for(trial, items)
        return [trial_view.verdict(trial, weights), trial_view.levers(trial, weights, at or 0), trial_view.fakes(trial, weights)]

    moved = [verdict, levers, fakes]
    group.input(again, [form.items, number, group], moved, **QUIET)
    with sliders:
        _weights(form, again, [number, group], moved)
    return Results(body, verdict, cards, levers, fakes, agreement, group)


def _html(name: str) -> gr.HTML:
    return gr.HTML(css_template=CSS, elem_id=f"lab-{name}")


def _weights(form: Form, again: Callable[..., list[Any]], inputs: list[Any], outputs: list[Any]) -> None:
    """A slider each reward."""

    @gr.render(inputs=form.items, triggers=[form.shape.change])
    def draw(items: list[Item]) -> None:
        with gr.Row():
            for item in items:
                weight = float(item["weight"] or 0)
                reach = max(2.0, 2 * abs(weight))
                slider = gr.Slider(-reach, reach, weight, step=0.05, label=f"Weight of {trials.label(item)}", interactive=True, min_width=200,
                                   elem_id=f"lab-weight-{item['id']}")
                slider.change(_moving(item["id"], again), [form.items, slider, *inputs], [form.items, *outputs], trigger_mode="always_last", **QUIET)


def _moving(which: int, again: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """A slider's event: its weight goes into the form, and what follows from it is computed."""

    def moved(items: list[Item], value: float, number: str, group: int | None) -> list[Any]:
        now = [{**item, "weight": value} if item["id"] == which else item for item in items]
        return [now, *again(now, number, group)]

    return moved
