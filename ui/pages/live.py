"""Live run: one run's state, curves, troubles and completions, followed while it trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from localrl.settings import UserError

from .. import completions, runs, watch
from ..board import board
from ..completions import ORDERS, TINTS, TOTAL, Wanted
from ..events import on_load
from ..html import complaint, notice, text
from ..look import DO
from ..place import Place
from ..tail import tail

TITLE, PATH = "Live run", "/live"
SECONDS = 2.0
"""Between two looks at a run that is alive."""
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

CSS = """
h2 { font-size: 1.15rem; font-weight: 600; margin: 0; overflow-wrap: anywhere; } p { margin: .3rem 0; }
.title { display: flex; flex-wrap: wrap; gap: 4px 12px; align-items: center; margin-bottom: .4rem; }
.told { color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.links { display: flex; flex-wrap: wrap; gap: 6px; margin-top: .5rem; }
.complaint, .notice { margin: .4rem 0; overflow-wrap: anywhere; }
ul { margin: .3rem 0 .3rem 1.2rem; list-style: disc; } summary { cursor: pointer; }
"""
ANSWERS = """
h3 { font-size: .95rem; font-weight: 600; margin: 0 0 .3rem; } h3 .quiet { font-weight: 400; }
.group { border: 1px solid var(--border-color-primary); border-radius: 6px; padding: .6rem .8rem; margin: 0 0 .8rem; min-width: 0; }
.asked { border-left: 3px solid var(--border-color-primary); padding-left: .6rem; margin-bottom: .5rem; }
.answer { padding: .5rem 0; border-top: 1px solid var(--border-color-primary); }
.chips { display: flex; flex-wrap: wrap; gap: 4px 8px; align-items: baseline; font-size: .8rem; margin-bottom: .3rem; font-variant-numeric: tabular-nums; }
.chip { border: 1px solid var(--border-color-primary); border-radius: 4px; padding: 0 .4rem; } .chip.main { border-color: #2563eb; }
.more { text-decoration: underline; text-underline-offset: 3px; } .less { text-decoration: underline dotted; text-underline-offset: 3px; }
.legend { font-size: .85rem; margin: 0 0 .5rem; } .rest summary { cursor: pointer; font-size: .85rem; margin: .3rem 0; }
"""
GO = """name => {
  const at = new URL(location.href);
  at.search = '?run=' + encodeURIComponent(name);
  if (name && at.href !== location.href) location.assign(at);
}"""
KEEP_STEP = """step => { const at = new URL(location.href); if (step) { at.searchParams.set('step', step); history.replaceState(history.state, '', at); } }"""


@dataclass(frozen=True)
class Parts:
    """The components that are told of news."""

    header: gr.HTML
    said: gr.HTML
    """What a button had to say; cleared when the run stands differently."""
    stop: gr.Button
    resume: gr.Row
    steps: gr.Number
    log: gr.HTML
    board: gr.HTML
    panel: gr.HTML
    details: gr.HTML
    timer: gr.Timer
    seen: gr.State
    """What was shown last: the version of the numbers, and how the run stood."""

    def all(self) -> list[Any]:
        """In the order in which `news` has them."""
        return [self.header, self.said, self.stop, self.resume, self.steps, self.log, self.board, self.panel, self.details, self.timer, self.seen]


def build(place: Place) -> None:
    """The page."""
    gr.Markdown("# Live run")
    picker = gr.Dropdown([], label="Run (newest first)", interactive=True, elem_id="live-picker")
    picker.input(None, picker, None, js=GO, **QUIET)
    name = gr.State("")
    with gr.Column(visible=False) as body:
        parts = _top(place, name)
        begin = _completions(place, name, parts.timer)
    nothing = gr.HTML(css_template=CSS + DO, elem_id="live-none")

    def opened(request: gr.Request) -> list[Any]:
        """The run that the address names, or what there is to choose from."""
        asked = str(request.query_params.get("run", ""))
        names = [row.name for row in runs.rows(place)]
        choices = gr.Dropdown(choices=names if asked in names or not asked else [asked, *names], value=asked or None)
        try:
            if asked:
                watch.view(place, asked)
                return [choices, asked, gr.Column(visible=True), "", *news(place, asked, None)]
            said = notice("Pick a run above.") if names else runs.EMPTY
        except UserError as error:
            said = complaint(error)
        return [choices, "", gr.Column(visible=False), said, *[gr.skip()] * (len(parts.all()) - 2), gr.Timer(active=False), None]

    loaded = on_load(opened, None, [picker, name, body, nothing, *parts.all()], **QUIET)
    begin(loaded)
    parts.timer.tick(lambda run, seen: news(place, run, seen), [name, parts.seen], parts.all(), concurrency_limit=4, **QUIET)


def news(place: Place, name: str, seen: dict[str, Any] | None) -> list[Any]:
    """What is to be shown anew. What has not changed is left alone, so that nothing a reader has open moves."""
    try:
        view = watch.view(place, name)
    except UserError as error:
        return [complaint(error), "", gr.Button(visible=False), gr.Row(visible=False), *[gr.skip()] * 5, gr.Timer(active=False), seen]
    row, before = view.row, seen or {}
    version, numbers = before.get("version"), [gr.skip()] * 3
    if view.there:
        followed = tail(view.folder)
        version = followed.read()
        if (version, row.stands) != (before.get("version"), before.get("stands")):
            numbers = [*watch.numbers(view, followed)]
    now = {"version": version, "stands": row.stands, "header": watch.header(view), "log": watch.log(row.job)}
    changed = now["stands"] != before.get("stands")
    steps = max(view.summary.steps, view.summary.step) if changed and view.summary is not None else None
    return [
        now["header"] if now["header"] != before.get("header") else gr.skip(), "" if changed else gr.skip(),
        gr.Button(visible=row.alive) if changed else gr.skip(), gr.Row(visible=row.resumable) if changed else gr.skip(),
        steps if steps is not None else gr.skip(), now["log"] if now["log"] != before.get("log") else gr.skip(), *numbers,
        gr.Timer(active=row.alive) if changed else gr.skip(), now,
    ]  # fmt: skip


def _top(place: Place, name: gr.State) -> Parts:
    """State and buttons, messages, troubles, charts."""
    header = gr.HTML(css_template=CSS + DO, apply_default_css=False, elem_id="live-header")
    said = gr.HTML(css_template=CSS, apply_default_css=False, elem_id="live-said")
    with gr.Row():
        stop = gr.Button("Stop and save", visible=False, min_width=170, scale=0, elem_id="live-stop")
    with gr.Row(visible=False, elem_id="live-resume-group", equal_height=False) as resume:
        steps = gr.Number(label="Steps in all (more lengthens the run)", precision=0, minimum=1, min_width=220, scale=0, elem_id="live-steps")
        go_on = gr.Button("Resume", variant="primary", min_width=140, scale=0, elem_id="live-resume")
    gr.Markdown("## Why is it not learning?")
    panel = gr.HTML(css_template=CSS, apply_default_css=False, elem_id="live-panel")
    with gr.Accordion("The numbers behind it", open=False, elem_id="live-details-box"):
        details = gr.HTML(css_template=CSS, apply_default_css=False, elem_id="live-details")
    with gr.Accordion("What it says", open=False, elem_id="live-log-box"):
        log = gr.HTML(css_template=CSS, apply_default_css=False, elem_id="live-log")
    charts = board("live-board")
    parts = Parts(header, said, stop, resume, steps, log, charts, panel, details, gr.Timer(SECONDS, active=False), gr.State(None))

    def stopped(run: str) -> str:
        try:
            return notice(runs.stop(place, run))
        except UserError as error:
            return complaint(error)

    def resumed(run: str, count: float | None, seen: dict[str, Any] | None) -> list[Any]:
        try:
            runs.resume(place, run, count)
        except UserError as error:
            return [gr.skip(), complaint(error), *[gr.skip()] * (len(parts.all()) - 2)]
        return news(place, run, seen)

    stop.click(stopped, name, said, **QUIET)
    go_on.click(resumed, [name, steps, parts.seen], parts.all(), **QUIET)
    return parts


# -- completions ----------------------------------------------------------------------------------------------------------------


def _completions(place: Place, name: gr.State, timer: gr.Timer) -> Callable[[Any], None]:
    """The browser of what the model wrote. Returns what is to be called with the page's load event."""
    gr.Markdown("## Completions")
    with gr.Row(elem_classes="low"):
        step = gr.Number(label="Step", precision=0, minimum=0, min_width=110, scale=0, elem_id="answers-step")
        earlier, later, newest = (gr.Button(word, min_width=90, scale=0, elem_id=f"answers-{word.lower()}") for word in ("Earlier", "Later", "Newest"))
    with gr.Row():
        reward = gr.Dropdown([TOTAL], value=TOTAL, label="Sort and filter by", min_width=150, elem_id="answers-reward")
        order = gr.Dropdown([*ORDERS], value="as sampled", label="Order", min_width=150, elem_id="answers-order")
        least = gr.Number(None, label="Reward at least", min_width=110, elem_id="answers-least")
        most = gr.Number(None, label="Reward at most", min_width=110, elem_id="answers-most")
        words = gr.Textbox("", label="With these words", min_width=150, elem_id="answers-words")
        tint = gr.Dropdown([*TINTS], value=TINTS[0], label="Tint tokens by", min_width=150, elem_id="answers-tint")
        grouped = gr.Checkbox(True, label="Group by prompt", min_width=150, elem_id="answers-grouped")
    about = gr.HTML(elem_id="answers-about")
    shown = gr.HTML(css_template=ANSWERS, apply_default_css=False, elem_id="answers")
    with gr.Row():
        page = gr.Number(1, label="Page", precision=0, minimum=1, min_width=110, scale=0, elem_id="answers-page")
    filters = [reward, order, least, most, words, tint, grouped]
    outputs = [step, reward, page, about, shown]

    def look(run: str, at: float | None, by: str, *rest: Any) -> list[Any]:
        order_, least_, most_, words_, tint_, grouped_, page_ = rest
        folder = place.inside(run) if run else place.root
        known = completions.steps(folder) if run else []
        chosen = completions.nearest(known, at)
        if chosen is None:
            return [None, gr.skip(), 1, "", notice("No completions yet: they are written with each step, unless log.completions=false.")]
        rows = completions.read(folder, chosen)
        names = [TOTAL, *completions.reward_names(rows)]
        by = by if by in names else TOTAL
        found = completions.show(rows, Wanted(by, least_, most_, order_, bool(grouped_), words_ or "", int(page_ or 1), tint_))
        pages = f"{found.pages} page{'s' * (found.pages > 1)}"
        told = f"{completions.numbered(known)} are there. Step {chosen:,}: {found.count} of {len(rows)} answers fit, {pages}."
        return [chosen, gr.Dropdown(choices=names, value=by), min(max(1, int(page_ or 1)), found.pages), f'<p class="quiet">{text(told)}</p>', found.html]

    def first(request: gr.Request, run: str, *rest: Any) -> list[Any]:
        asked = str(request.query_params.get("step", ""))
        return [None, None, *look(run, int(asked) if asked.isdigit() else None, *rest)]      # a number that was never told would be 0

    def appeared(run: str, at: float | None, *rest: Any) -> list[Any]:
        """The first completions of a run that had none."""
        return look(run, None, *rest) if run and at is None and completions.steps(place.inside(run)) else [gr.skip()] * len(outputs)

    def moved(by: int) -> Any:
        def go(run: str, at: float | None, *rest: Any) -> list[Any]:
            known = completions.steps(place.inside(run)) if run else []
            beyond = [s for s in known if (s > (at or 0) if by > 0 else s < (at or 0))]
            return look(run, (min(beyond) if by > 0 else max(beyond)) if beyond else at, *rest[:-1], 1)

        return go

    inputs = [name, step, *filters, page]
    for event in (step.submit, step.blur, page.submit, page.blur):
        event(look, inputs, outputs, **QUIET).then(None, step, None, js=KEEP_STEP, **QUIET)
    for part in filters:
        changed = part.submit if isinstance(part, gr.Textbox) else part.input
        changed(lambda *given: look(*given[:-1], 1), inputs, outputs, **QUIET)
    words.blur(lambda *given: look(*given[:-1], 1), inputs, outputs, **QUIET)
    for button, by in ((earlier, -1), (later, 1)):
        button.click(moved(by), inputs, outputs, **QUIET).then(None, step, None, js=KEEP_STEP, **QUIET)
    newest.click(lambda run, at, *rest: look(run, None, *rest[:-1], 1), inputs, outputs, **QUIET).then(None, step, None, js=KEEP_STEP, **QUIET)
    timer.tick(appeared, inputs, outputs, **QUIET)

    def begin(loaded: Any) -> None:
        loaded.then(first, [name, *filters, page], [least, most, *outputs], **QUIET)

    return begin
