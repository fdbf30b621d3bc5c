"""Runs: all of the workspace's, how they stand, and what can be done to them."""

from __future__ import annotations

from typing import Any

import gradio as gr

from localrl.settings import UserError
from localrl.status import look

from .. import runs
from ..events import on_load
from ..html import complaint, notice, text
from ..look import DO
from ..place import Place

TITLE, PATH = "Runs", "/"
SECONDS = 3.0
"""Between two looks at the workspace, while something runs."""
IDLE = 15.0
"""While nothing does: a run may be started elsewhere."""

CSS = """
ul.runs { list-style: none; margin: 0; padding: 0; display: grid; gap: 8px; }
ul.runs li { display: grid; grid-template-columns: minmax(190px, 1.3fr) 190px minmax(150px, 1fr) minmax(130px, 1fr) 250px; gap: 4px 16px;
  align-items: center; margin: 0; padding: .6rem .8rem; border: 1px solid var(--border-color-primary); border-radius: 6px; }
h2 { font-size: 1rem; font-weight: 600; margin: 0; overflow-wrap: anywhere; }
h2 a, .empty a { color: var(--link-text-color); text-decoration: underline; text-underline-offset: 2px; }
.name { display: flex; flex-wrap: wrap; gap: 2px 10px; align-items: center; }
.reward { display: flex; align-items: center; gap: 6px; font-variant-numeric: tabular-nums; }
.label { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.steps { display: grid; gap: 3px; font-size: .85rem; font-variant-numeric: tabular-nums; }
.about { font-size: .85rem; overflow-wrap: anywhere; }
.acts { display: flex; flex-wrap: wrap; gap: 6px; justify-content: flex-end; }
.said { grid-column: 1 / -1; margin: 0; font-size: .85rem; color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
.said.bad-said { color: var(--body-text-color); border-left: 3px solid #dc2626; padding-left: .5rem; }
.empty { max-width: 60ch; margin: 2rem auto; text-align: center; } .empty p { margin: .8rem 0; } .empty h2 { font-size: 1.3rem; }
@media (max-width: 900px) {
  ul.runs li { grid-template-columns: 1fr 1fr; } .name, .acts { grid-column: 1 / -1; } .acts { justify-content: flex-start; }
}
@media (max-width: 500px) { ul.runs li { grid-template-columns: 1fr; } }
"""
JS = """
element.addEventListener('click', event => {
  const button = event.target.closest('button[data-act]');
  if (button) trigger('click', { act: button.dataset.act, run: button.dataset.run });
});
"""
ASKED = "() => { for (const it of document.querySelectorAll('#runs-steps input, #runs-delete-keep')) if (it.offsetParent) it.focus(); }"
"""What was asked stands above the list, which may be long: go there."""


def build(place: Place) -> None:
    """The page."""
    gr.Markdown("# Runs")
    said = gr.HTML(elem_id="runs-said")
    chosen = gr.State("")
    with gr.Column(visible=False, elem_id="runs-resume") as resuming:
        resume_about = gr.HTML(padding=True)
        with gr.Row(elem_classes="low"):
            steps = gr.Number(label="Steps in all (more lengthens the run)", precision=0, minimum=1, min_width=260, scale=0, elem_id="runs-steps")
            go_on = gr.Button("Resume", variant="primary", min_width=140, scale=0, elem_id="runs-resume-go")
            leave = gr.Button("Not now", min_width=140, scale=0)
    with gr.Column(visible=False, elem_id="runs-delete") as deleting:
        delete_about = gr.HTML(padding=True)
        with gr.Row():
            gone = gr.Button("Delete for good", variant="stop", min_width=160, scale=0, elem_id="runs-delete-go")
            keep = gr.Button("Keep it", min_width=140, scale=0, elem_id="runs-delete-keep")
    listed = gr.HTML(css_template=CSS + DO, js_on_load=JS, apply_default_css=False, elem_id="runs-list")
    timer = gr.Timer(SECONDS)
    panels = [said, chosen, resuming, resume_about, steps, deleting, delete_about]
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

    def show() -> tuple[str, gr.Timer]:
        found = runs.rows(place)
        return runs.listed(found), gr.Timer(SECONDS if any(row.alive for row in found) else IDLE)

    def act(event: gr.EventData) -> tuple[Any, ...]:
        """A button in the list."""
        name, what = str(event.run), str(event.act)
        try:
            if what == "stop":
                return _told(notice(runs.stop(place, name)))
            if what == "end":
                return _told(notice(runs.kill(place, name)))
            if what == "dismiss":
                runs.dismiss(place, name)
                return _told("")
            if what == "resume":
                status = look(place.inside(name))
                about = f"<p><b>{text(name)}</b> goes on from its checkpoint of step {status.saved}.</p>"
                return "", name, gr.Column(visible=True), about, max(status.steps, status.saved or 0), gr.Column(visible=False), ""
            if what == "delete":
                mib = runs.size(place.inside(name)) / 2**20
                about = f"<p>Delete <b>{text(name)}</b> with its checkpoints, completions and exports ({mib:,.1f} MiB)? It cannot be brought back.</p>"
                return "", name, gr.Column(visible=False), "", None, gr.Column(visible=True), about
        except UserError as error:
            return _told(complaint(error))
        return _told("")

    def resume(name: str, count: float | None) -> tuple[Any, ...]:
        try:
            runs.resume(place, name, count)
        except UserError as error:
            return complaint(error), name, gr.Column(), gr.HTML(), count, gr.Column(), gr.HTML()
        return _told(notice(f"{name} goes on"))

    def delete(name: str) -> tuple[Any, ...]:
        try:
            return _told(notice(runs.delete(place, name)))
        except UserError as error:
            return _told(complaint(error))

    listed.click(act, None, panels, **quiet).then(None, js=ASKED, **quiet).then(show, None, [listed, timer], **quiet)
    go_on.click(resume, [chosen, steps], panels, **quiet).then(show, None, [listed, timer], **quiet)
    gone.click(delete, chosen, panels, **quiet).then(show, None, [listed, timer], **quiet)
    for button in (leave, keep):
        button.click(lambda: _told(""), None, panels, **quiet)
    timer.tick(show, None, [listed, timer], concurrency_limit=4, **quiet)
    on_load(show, None, [listed, timer], **quiet)


def _told(said: str) -> tuple[Any, ...]:
    """Say this, and close what was asked."""
    return said, "", gr.Column(visible=False), "", None, gr.Column(visible=False), ""

