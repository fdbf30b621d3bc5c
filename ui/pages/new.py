"""New run: a form made from the settings' schema, with its command line, its memory plan and its data beside it."""

from __future__ import annotations

import json
from typing import Any

import gradio as gr

from localrl.algorithms import ALGORITHMS
from localrl.config import Run, presets
from localrl.config import build as build_of
from localrl.settings import UserError

from .. import drafts, form, preview
from ..events import on_load
from ..html import complaint, notice, text
from ..jobs import Job, jobs
from ..look import DO
from ..place import Place
from ..planned import CSS as PLAN_CSS
from ..planned import Planner

TITLE, PATH = "New run", "/new"
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
FIRST = (
    "name", "model.path", "model.quantization", "data.path", "data.prompt_column", "rewards.functions", "algorithm.name", "steps", "optim.learning_rate",
    "rollout.prompts_per_step", "rollout.num_generations", "rollout.max_completion_length",
)  # fmt: skip
"""What a person decides first; everything else is folded away by section."""
CARDS = ("", "8GiB", "10GiB", "12GiB", "16GiB", "24GiB", "RTX 3060", "RTX 4060 Ti", "RTX 4080", "RTX 4090", "RTX 5080", "RTX 5090")
THIS = "this machine"
GO = "name => { if (name) window.location.href = '/live?run=' + encodeURIComponent(name); }"
ABOUT = {
    "": "Run", "model": "Model", "adapter": "Adapter (LoRA)", "data": "Data", "rewards": "Rewards: limits of their processes", "algorithm": "Algorithm",
    "rollout": "Rollouts: how responses are sampled", "replay": "Replay: learning from older rollouts", "search": "Search: sampling beside the trainer",
    "optim": "Optimiser", "memory": "Memory: what the plan would set itself", "eval": "Evaluation", "export": "Export", "log": "Run folder",
}  # fmt: skip


def first(items: list[form.Item], made: dict[form.Item, Any]) -> dict[str, Any]:
    """What matters, into `made`. Returns a group for each algorithm's own settings."""
    with gr.Row():
        for item in items:
            if item.key in FIRST and item.key not in ("rewards.functions", "algorithm.name"):
                section = item.section if item.section in ("model", "data") else ""          # both have a path
                made[item] = form.component(item, min_width=220, label=f"{section} {item.name}".strip().replace("_", " "))
    rewards = next(item for item in items if item.key == "rewards.functions")
    made[rewards] = form.component(rewards, label="reward functions, one a line")
    chosen = next(item for item in items if item.key == "algorithm.name")
    made[chosen] = form.component(chosen, label="algorithm")
    groups: dict[str, Any] = {}
    for name in ALGORITHMS:
        with gr.Accordion(f"Settings of {name}", open=False, visible=name == chosen.default) as groups[name]:
            _rows([item for item in items if item.algorithm == name], made)
    return groups


def others(items: list[form.Item], made: dict[form.Item, Any]) -> dict[str, Any]:
    """Everything else, into `made`. Returns an accordion for each section."""
    sections: dict[str, Any] = {}
    for section in dict.fromkeys(item.section for item in items if not item.algorithm):
        rest = [item for item in items if item.section == section and not item.algorithm and item not in made]
        if rest:
            with gr.Accordion(ABOUT.get(section, section.capitalize()), open=False) as sections[section]:
                _rows(rest, made)
    return sections


def _rows(items: list[form.Item], made: dict[form.Item, Any]) -> None:
    with gr.Row():
        for item in items:
            made[item] = form.component(item, min_width=300)


def applies(section: str, algorithm: str) -> bool:
    """Would anything in this section do something with that algorithm? As it declares itself."""
    kind = ALGORITHMS[algorithm]
    if section in ("replay", "search"):
        return kind.learns_from_old or kind(name=algorithm).for_sampler(exact=False).corrects
    return True


def build(place: Place) -> None:
    """The page."""
    items, planner = form.items(), Planner(place)
    gr.Markdown("# New run")
    with gr.Row():
        preset = gr.Dropdown(label="Start from a preset", choices=[*presets()], value=drafts.default_preset(), elem_id="new-preset",
                             info="demo runs on any machine in minutes; the others name the card that they fit")
        judged = gr.Dropdown(label="Rewards of a set", choices=[""], value="", elem_id="new-rewards", allow_custom_value=True,
                             info="made and tried in the Reward lab; kept as rewards/NAME.toml")
        card = gr.Dropdown(label="Plan for", choices=[(c or THIS, c) for c in CARDS], value="", elem_id="new-card", allow_custom_value=True,
                           info="a size, or a card's name: RTX 4080")
    said = gr.HTML(elem_id="new-said")
    made: dict[form.Item, Any] = {}
    groups = first(items, made)
    gr.Markdown("## Data")
    with gr.Row(elem_classes="low"):
        files = gr.Dropdown(label="Data files in this folder", choices=[], elem_id="new-files", scale=2)
        upload = gr.UploadButton("Upload a file", file_types=[*preview.KINDS], elem_id="new-upload", scale=0, min_width=160)
    rows = gr.HTML(elem_id="new-preview")
    gr.Markdown("## Memory")
    busy = gr.HTML(elem_id="new-busy")
    plan = gr.HTML(css_template=PLAN_CSS, apply_default_css=False, elem_id="new-plan")
    gr.Markdown("## Start")
    with gr.Row():
        go = gr.Button("Start", variant="primary", min_width=160, scale=0, elem_id="new-start")
        check = gr.Button("Check everything first", min_width=200, scale=0, elem_id="new-check")
    begun_html = gr.HTML(css_template=DO, apply_default_css=False, elem_id="new-begun")
    with gr.Accordion("The same as a command line, and as a file", open=False, elem_id="new-same"):
        line = gr.Code(label="Command line", language=None, interactive=False, wrap_lines=True, elem_id="new-command")
        file = gr.Code(label="TOML, for --config", interactive=False, elem_id="new-toml")
    gr.Markdown("## Everything else")
    sections = others(items, made)
    parts = [made[item] for item in items]
    base, begun, leads, checked, last = gr.State(drafts.default_preset()), gr.State(""), gr.Textbox(visible=False), gr.State(""), gr.State("")
    timer, waiting = gr.Timer(0.7, active=False), gr.Timer(1.0, active=False)

    def visible(algorithm: str) -> list[Any]:
        return [*(gr.Accordion(visible=name == algorithm) for name in groups), *(gr.Accordion(visible=applies(name, algorithm)) for name in sections)]

    def filled(run: Run, of: str) -> list[Any]:
        return [*form.fill(run, items), *visible(run.algorithm.name), of, ""]

    loads = [*parts, *groups.values(), *sections.values(), base, said]

    def opened(request: gr.Request) -> list[Any]:
        asked = {key: str(request.query_params.get(key, "")) for key in ("from", "preset", "rewards")}
        lists = [gr.Dropdown(choices=["", *drafts.reward_sets(place)], value=asked["rewards"]), gr.Dropdown(choices=preview.data_files(place))]
        of = asked["preset"] or ("" if asked["from"] else drafts.default_preset())
        try:
            return [*filled(drafts.beginning(place, asked["preset"], asked["from"], asked["rewards"]), of), *lists]
        except UserError as error:
            return [*[gr.skip()] * (len(loads) - 1), complaint(error), *lists]

    def chose(name: str) -> list[Any]:
        return filled(drafts.beginning(place, name), name)

    def set_chosen(name: str, *values: Any) -> list[Any]:
        try:
            run = build_run(values)
            return filled(drafts.with_rewards(run, place, name) if name else run, str(values[-1]))
        except UserError as error:
            return [*[gr.skip()] * (len(loads) - 1), complaint(error)]

    def build_run(values: Any) -> Run:
        return build_of(form.collect(items, values[: len(items)]))

    def looked(before: str, of: str, asked_card: str, request: gr.Request, *values: Any) -> list[Any]:
        """Whatever changed: is it a run, how is it said elsewhere, and does it fit?"""
        try:
            run = build_run(values)
        except UserError as error:
            return [complaint(error), gr.skip(), gr.skip(), "", gr.skip(), ""]
        key = json.dumps([run.model_dump(mode="json"), asked_card])
        if key == before:
            return ["", *[gr.skip()] * 4, before]
        planner.ask(str(request.session_hash), run, asked_card)
        told = notice("Working out the plan: seconds; up to half a minute for a model that was never planned.")
        return ["", drafts.command(run, of, items), drafts.toml_of(run), told, gr.Timer(active=True), key]

    def planned(request: gr.Request) -> list[Any]:
        found = planner.look(str(request.session_hash))
        if found is None:
            return [gr.skip()] * 3
        return [found, gr.Timer(active=False), ""]

    def peeked(name: str, column: str) -> str:
        if not name or name == "demo":
            return notice("The embedded task: sums, and a reward for the right one.") if name else ""
        try:
            return preview.preview(place, name, column)
        except UserError as error:
            known = (place.root / name).exists() or name.endswith(preview.KINDS)
            return complaint(error) if known or name.startswith((".", "/", "~")) else notice(f"{name}: a data set of the hub, read when the run is checked")

    def took(upload_: Any) -> list[Any]:
        try:
            name = preview.take(place, upload_, upload_)
            return [gr.Dropdown(choices=preview.data_files(place), value=name), name, ""]
        except UserError as error:
            return [gr.skip(), gr.skip(), complaint(error)]

    def started(*values: Any) -> list[Any]:
        try:
            name = drafts.begin(place, build_run(values))
        except UserError as error:
            return [complaint(error), "", gr.Timer(active=False)]
        return [notice(f"Starting {name}: checking data, rewards and memory, then loading the model."), name, gr.Timer(active=True)]

    def checks(*values: Any) -> list[Any]:
        try:
            job = drafts.check(place, build_run(values))
        except UserError as error:
            return [complaint(error), "", gr.Timer(active=False)]
        return [notice("Checking everything short of loading weights."), job.folder.name, gr.Timer(active=True)]

    def waited(name: str, job_name: str) -> list[Any]:
        """Until the run has a folder, or a check has ended."""
        if name:
            state, why = drafts.started(place, name)
            if state == "starting":
                return [gr.skip()] * 5
            told = complaint(f"{name} did not start: {why}") if state == "failed" else notice(f"{name} has begun.")
            return [told, "", gr.skip(), gr.Timer(active=False), name if state == "there" else ""]
        job = next((job for job in jobs(place, "check") if job.folder.name == job_name), None)
        if job is None or job.state == "running":
            return [gr.skip()] * 5
        return [_checked(job), gr.skip(), "", gr.Timer(active=False), ""]

    known = {item.key: made[item] for item in items if not item.algorithm}
    data, column, algorithm = known["data.path"], known["data.prompt_column"], known["algorithm.name"]
    asked = [last, base, card]
    answers = [said, line, file, busy, timer, last]
    on_load(opened, None, [*loads, judged, files], **QUIET).then(looked, [*asked, *parts], answers, **QUIET).then(peeked, [data, column], rows, **QUIET)
    preset.input(chose, preset, loads, **QUIET).then(looked, [*asked, *parts], answers, **QUIET)
    judged.input(set_chosen, [judged, *parts, base], loads, **QUIET).then(looked, [*asked, *parts], answers, **QUIET)
    algorithm.input(visible, algorithm, [*groups.values(), *sections.values()], **QUIET)
    gr.on([part.change for part in parts] + [card.change], looked, [*asked, *parts], answers, trigger_mode="always_last", **QUIET)
    gr.on([data.change, column.change], peeked, [data, column], rows, trigger_mode="always_last", **QUIET)
    files.input(lambda name: name, files, data, **QUIET)
    upload.upload(took, upload, [files, data, said], **QUIET)
    timer.tick(planned, None, [plan, timer, busy], **QUIET)
    go.click(started, parts, [begun_html, begun, waiting], concurrency_limit=1, **QUIET)
    check.click(checks, parts, [begun_html, checked, waiting], **QUIET)
    waiting.tick(waited, [begun, checked], [begun_html, begun, checked, waiting, leads], **QUIET)
    leads.change(None, leads, None, js=GO, **QUIET)


def _checked(job: Job) -> str:
    """What a dry run said: the first prompt as the model sees it among it."""
    head = notice("Everything checked, nothing was written.") if job.state == "done" else complaint(job.complaint())
    return f'{head}<details open><summary>What it said</summary><pre class="text" tabindex="0">{text(job.output())}</pre></details>'
