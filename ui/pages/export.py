"""Export: a run as GGUF for llama.cpp and Ollama, with what its self-check found."""

from __future__ import annotations

from typing import Any

import gradio as gr

from localrl.folder import checkpoints
from localrl.settings import UserError

from .. import exporting, runs
from ..events import on_load
from ..html import complaint, notice
from ..jobs import jobs
from ..look import DO
from ..place import Place

TITLE, PATH = "Export", "/export"
SECONDS = 2.0
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
NEWEST = "the newest checkpoint"
CSS = """
.made { border: 1px solid var(--border-color-primary); border-radius: 6px; padding: .6rem .9rem; margin: 0 0 .8rem; }
.made h3 { font-size: 1rem; margin: 0 0 .3rem; overflow-wrap: anywhere; } .made p { margin: .3rem 0; } .made summary { cursor: pointer; padding: .3rem 0; }
pre.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font-size: .85rem; }
"""
GO = "name => { if (name) window.location.search = '?run=' + encodeURIComponent(name); }"
WHAT = {"merged": "merged: one file with everything", "adapter": "adapter: small, goes on its base", "base": "base: as it was before training"}


def build(place: Place) -> None:
    """The page."""
    gr.Markdown("# Export")
    gr.Markdown("A file for llama.cpp, Ollama and others. It is loaded back and compared with the trained model, rewards included, before it gets its name.")
    picker = gr.Dropdown(label="Run (newest first)", choices=[], elem_id="export-run", allow_custom_value=True)
    picker.input(None, picker, None, js=GO, **QUIET)
    name, said = gr.State(""), gr.HTML(elem_id="export-said")
    with gr.Column(visible=False) as body:
        with gr.Row():
            checkpoint = gr.Dropdown(label="Of", choices=[NEWEST], value=NEWEST, elem_id="export-checkpoint")
            what = gr.Dropdown(label="What", choices=[(WHAT.get(w, w), w) for w in exporting.WHATS], value=exporting.WHATS[0], elem_id="export-what")
            merge = gr.Dropdown(
                label="Merged into", choices=[*exporting.MERGES], value=exporting.MERGES[0], elem_id="export-merge",
                info="auto: both the weights that were trained on and the original ones are tried, and the better is kept",
            )  # fmt: skip
        types = gr.CheckboxGroup(
            label="Types", choices=[*exporting.TYPES], value=["q8_0"], elem_id="export-types", info="Several give a file each; smaller ones lose more."
        )
        with gr.Accordion("How large, how fast?", open=False):
            sizes = gr.HTML(elem_id="export-sizes")
        line = gr.Code(label="The same in a terminal", language=None, interactive=False, wrap_lines=True, elem_id="export-command")
        with gr.Row():
            go = gr.Button("Export", variant="primary", min_width=160, scale=0, elem_id="export-go")
            cancel = gr.Button("Cancel", visible=False, min_width=140, scale=0, elem_id="export-cancel")
        under_way = gr.HTML(elem_id="export-progress")
        gr.Markdown("## Files")
        files = gr.HTML(css_template=CSS + DO, apply_default_css=False, elem_id="export-files")
    timer, seen = gr.Timer(SECONDS, active=False), gr.State(None)
    watched = [under_way, cancel, files, timer, seen]

    def look(run: str, before: Any) -> list[Any]:
        """What has changed since it was looked at last."""
        if not run:
            return [gr.skip()] * 5
        newest = next(iter(jobs(place, exporting.KIND, run)), None)
        alive = newest is not None and newest.state == "running"
        now = (exporting.progress(newest), alive, exporting.listed(place, run))
        old = before or (None, None, None)
        return [
            now[0] if now[0] != old[0] else gr.skip(), gr.Button(visible=alive) if alive != old[1] else gr.skip(),
            now[2] if now[2] != old[2] else gr.skip(), gr.Timer(active=alive), now,
        ]  # fmt: skip

    def opened(request: gr.Request) -> list[Any]:
        asked = str(request.query_params.get("run", ""))
        names = [row.name for row in runs.rows(place) if row.summary is not None]
        choices = gr.Dropdown(choices=names, value=asked or None)
        if not asked:
            told = notice("Pick a run above.") if names else notice("There is no run yet: start one under New run.")
            return [choices, "", told, gr.Column(visible=False), gr.skip(), gr.skip(), *[gr.skip()] * 5]
        try:
            folder = place.inside(asked)
            if objection := exporting.objection(folder):
                raise UserError(objection)
            kept = [NEWEST, *(path.name for path in reversed(checkpoints(folder)))]
            table = exporting.estimates(folder, exporting.WHATS[0])
        except UserError as error:
            return [choices, "", complaint(error), gr.Column(visible=False), gr.skip(), gr.skip(), *[gr.skip()] * 5]
        return [choices, asked, "", gr.Column(visible=True), gr.Dropdown(choices=kept, value=NEWEST), table, *look(asked, None)]

    def told(run: str, which: str, kind: str, chosen: list[str], into: str) -> tuple[str, Any, str]:
        source = run if which == NEWEST else f"{run}/{which}"
        return exporting.command(source, kind, chosen, into), gr.Dropdown(visible=kind == "merged"), exporting.estimates(place.inside(run), kind) if run else ""

    def started(run: str, which: str, kind: str, chosen: list[str], into: str, before: Any) -> list[Any]:
        try:
            exporting.begin(place, run, "" if which == NEWEST else which, kind, chosen, into)
        except UserError as error:
            return [complaint(error), *[gr.skip()] * 5]
        return ["", *look(run, before)]

    def cancelled(run: str, before: Any) -> list[Any]:
        for job in jobs(place, exporting.KIND, run):
            job.interrupt()
        return look(run, before)

    on_load(opened, None, [picker, name, said, body, checkpoint, sizes, *watched], **QUIET).then(
        told, [name, checkpoint, what, types, merge], [line, merge, sizes], **QUIET)
    for part in (checkpoint, what, types, merge):
        part.change(told, [name, checkpoint, what, types, merge], [line, merge, sizes], **QUIET)
    go.click(started, [name, checkpoint, what, types, merge, seen], [said, *watched], **QUIET)
    cancel.click(cancelled, [name, seen], watched, **QUIET)
    timer.tick(look, [name, seen], watched, concurrency_limit=4, **QUIET)
