"""Doctor: what `localrl doctor` sees of this machine, and what it means."""

from __future__ import annotations

import json
from typing import Any

import gradio as gr

from .. import jobs
from ..events import on_load
from ..html import Markup, complaint, notice, table, text
from ..place import Place

TITLE, PATH = "Doctor", "/doctor"
KIND = "doctor"
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
WORDS = {"ok": ("good", "ok"), "warn": ("", "mind this"), "bad": ("bad", "does not work")}


def build(place: Place) -> None:
    """The page. The check is a command of its own: it may take down the process that it runs in."""
    gr.Markdown("# Doctor")
    gr.Markdown("What this machine has, whether it works, and what that means for training. `localrl doctor` says the same in a terminal.")
    again = gr.Button("Look again", min_width=140, scale=0, elem_id="doctor-again")
    said = gr.HTML(elem_id="doctor-said")
    timer = gr.Timer(1.0, active=False)

    def look() -> tuple[str, gr.Timer]:
        newest = next(iter(jobs.jobs(place, KIND)), None)
        return shown(newest), gr.Timer(active=newest is not None and newest.state == "running")

    def opened() -> tuple[str, gr.Timer]:
        if not jobs.jobs(place, KIND):
            jobs.start(place, KIND, ["doctor", "--json"])
        return look()

    def asked() -> tuple[str, gr.Timer]:
        if all(job.state != "running" for job in jobs.jobs(place, KIND)):
            jobs.start(place, KIND, ["doctor", "--json"])
        return look()

    on_load(opened, None, [said, timer], **QUIET)
    again.click(asked, None, [said, timer], **QUIET)
    timer.tick(look, None, [said, timer], **QUIET)


def shown(job: jobs.Job | None) -> str:
    """The findings as a table, what is wrong first."""
    if job is None or job.state == "running":
        return notice("Looking: some seconds.")
    try:
        findings = json.loads(job.output()[job.output().index("[") :])
    except ValueError:
        return complaint(job.complaint() or "the check said nothing that can be read: look again")
    order = ["bad", "warn", "ok"]
    rows = [
        (Markup(f'<span class="{WORDS[f["verdict"]][0]}">{text(WORDS[f["verdict"]][1])}</span>'), f["name"], f["value"], f["meaning"])
        for f in sorted(findings, key=lambda f: order.index(f["verdict"]))
    ]
    return table(("", "what", "found", "what it means"), rows)
