"""The pages of runs in a real browser, on real training processes: watched, reloaded, killed, resumed, stopped, deleted."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from localrl.status import look
from ui.jobs import Job, start
from ui.place import Place

from .conftest import Served, open_page
from .test_jobs import until

SMALL = ["rollout.prompts_per_step=2", "rollout.num_generations=4", "eval.limit=2", "eval.num_generations=2", "eval.every=0", "log.save_steps=5"]
ENDLESS = 100_000
LONG = 120.0
"""Seconds that loading a model may take on a busy machine."""
POINTS = """() => {
  const plot = document.querySelector('#chart-reward .plot'), data = (plot && plot.data) || [];
  return Math.max(0, ...data.filter(it => it.name === 'the total').map(it => it.x.length));
}"""
RANGE = "() => document.querySelector('#chart-reward .plot').layout.xaxis.range"


def train(root: Path, name: str, *more: str) -> Job:
    """A run that does not end by itself."""
    settings = ["train", "--preset", "demo", f"steps={ENDLESS}", *SMALL, *more, f"log.dir={root / 'runs' / name}"]
    return start(Place.at(root), "train", settings, f"runs/{name}")


@pytest.fixture
def ended(served: Served) -> Iterator[list[Job]]:
    """Jobs that must not outlive the test."""
    jobs: list[Job] = []
    yield jobs
    for folder in (served.root / ".localrl" / "jobs").glob("*"):
        Job(folder).kill()


def says(page: Any, where: str, words: str) -> None:
    page.wait_for_function("([at, words]) => (document.querySelector(at)?.innerText || '').includes(words)", arg=[where, words], timeout=LONG * 1000)


def test_an_empty_workspace_says_what_to_do_first(served: Served, page: Any) -> None:
    page.goto(served.url)
    says(page, "#runs-list", "No runs here yet")
    assert page.get_by_role("link", name="Start the demo run").get_attribute("href") == "/new"
    page.goto(served.url + "/live")
    says(page, "#live-none", "No runs here yet")
    page.goto(served.url + "/live?run=../../etc")
    says(page, "#live-none", "lies outside of")
    page.goto(served.url + "/live?run=runs/gone")
    says(page, "#live-none", "there is no run runs/gone")


def test_damaged_folders_and_runs_that_never_began_are_rows(served: Served, page: Any, trained_run: Path) -> None:
    where = served.root / "runs"
    for name in ("good", "future", "half", "<b>odd"):
        shutil.copytree(trained_run, where / name)
    with (where / "future" / "run.toml").open("a") as file:
        file.write("[of_tomorrow]\nwarp = 9\n")
    (where / "half" / "run.toml").unlink()
    with (where / "good" / "metrics.jsonl").open("a") as file:
        file.write('\x00{"step": 4, "rew\n{"step": 4')
    never = train(served.root, "never", "data.path=nowhere.jsonl")
    until(lambda: never.state == "failed", LONG)
    page.goto(served.url)
    says(page, "#runs-list", "of_tomorrow")
    shown = page.locator("#runs-list").inner_text()
    assert "run.toml is gone" in shown and "not started" in shown and never.complaint()[:40] in shown
    assert page.locator('[data-run="<b>odd"] h2').inner_text() == "runs/<b>odd" if page.locator('[data-run="<b>odd"]').count() else "runs/<b>odd" in shown
    assert page.locator('li[data-run="runs/good"] svg.spark').get_attribute("aria-label").startswith("reward from")
    page.get_by_role("button", name="Dismiss runs/never").click()
    page.wait_for_function("() => !document.querySelector('#runs-list').innerText.includes('runs/never')")
    page.goto(served.url + "/live?run=runs/future")
    says(page, "#live-header", "of_tomorrow")
    says(page, "#live-board", "Total reward")                        # its numbers are shown all the same
    page.goto(served.url + "/live?run=runs/good")
    says(page, "#live-panel", "damaged line")
    says(page, "#answers", "<answer>")


def test_completions_are_found_again(served: Served, page: Any, trained_run: Path) -> None:
    folder = served.root / "runs" / "read"
    shutil.copytree(trained_run, folder)
    page.goto(served.url + "/live?run=runs/read&step=1")
    says(page, "#answers-about", "Step 1:")
    rows = [json.loads(line) for line in (folder / "completions" / "step-000001.jsonl").read_text().splitlines()]
    assert page.locator("#answers article").count() == len(rows)
    assert page.locator("#answers .more").count() > 0                # tinted
    page.locator("#answers-later").click()
    says(page, "#answers-about", "Step 2:")
    page.wait_for_function("() => location.search.includes('step=2')")
    page.reload()
    says(page, "#answers-about", "Step 2:")
    page.locator("#answers-grouped input").uncheck()
    page.wait_for_function("() => document.querySelectorAll('#answers .group').length > 4")
    rows = [json.loads(line) for line in (folder / "completions" / "step-000002.jsonl").read_text().splitlines()]
    assert page.locator("#answers-about").inner_text().count(f"{len(rows)} of {len(rows)}") == 1          # filters that nobody set keep all
    page.locator("#answers-least input").fill("1")
    page.locator("#answers-least input").press("Tab")
    fit = sum(row["reward"] >= 1 for row in rows)
    says(page, "#answers-about", f"{fit} of {len(rows)} answers fit")
    page.locator("#answers-words textarea, #answers-words input").fill("no such words")
    page.locator("#answers-words textarea, #answers-words input").press("Enter")
    says(page, "#answers", "No answer fits")


def test_a_run_is_watched_killed_and_resumed(served: Served, browser: Any, page: Any, ended: list[Job]) -> None:
    folder, at = served.root / "runs" / "live", served.url + "/live?run=runs/live"
    train(served.root, "live")
    page.goto(at)
    says(page, "#live-header", "starting")
    says(page, "#live-header", "running")
    page.wait_for_function(f"() => ({POINTS})() >= 3", timeout=LONG * 1000)
    page.evaluate("() => Plotly.relayout(document.querySelector('#chart-reward .plot'), {'xaxis.range': [1, 2.5]})")
    page.locator('[data-key="more"] summary').click()
    page.locator("#chart-reward").scroll_into_view_if_needed()       # only what is in sight is drawn
    before = page.evaluate(POINTS)
    page.wait_for_function(f"() => ({POINTS})() > {before}", timeout=LONG * 1000)            # the curve grows,
    assert page.evaluate(RANGE) == [1, 2.5]                          # where the reader looks stays,
    assert page.locator('[data-key="more"]').get_attribute("open") is not None               # and what is open stays open
    says(page, "#answers", "reward")                                 # there were none when the page was opened
    page.reload()
    second, watched = open_page(browser, 390)
    second.goto(at)
    for tab in (page, second):
        says(tab, "#live-header", "running")
        tab.locator("#chart-reward").scroll_into_view_if_needed()
        tab.wait_for_function(f"() => ({POINTS})() > {before}", timeout=LONG * 1000)
    until(lambda: look(folder).saved is not None, LONG)
    pid = look(folder).pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    for tab in (page, second):
        says(tab, "#live-header", f"crashed: pid {pid} is gone")
    saved = look(folder).saved
    assert saved is not None and f"resume goes on from step {saved}" in page.locator("#live-header").inner_text()
    second.close()
    assert not watched.outward and not watched.errors
    page.locator("#live-steps input").fill(str(saved + 4))
    page.locator("#live-resume").click()
    says(page, "#live-header", "starting")
    says(page, "#live-header", "finished")
    page.wait_for_function(f"() => ({POINTS})() === {saved + 4}")    # rewound to the checkpoint, and on from there
    assert look(folder).stands == "finished" and len((folder / "metrics.jsonl").read_text().splitlines()) == saved + 4
    assert page.locator("#live-stop").is_hidden() and page.locator("#live-resume").is_visible()


def test_stop_resume_and_delete_from_the_list(served: Served, page: Any, ended: list[Job]) -> None:
    folder = served.root / "runs" / "listed"
    train(served.root, "listed")
    page.goto(served.url)
    says(page, 'li[data-run="runs/listed"]', "starting")
    says(page, 'li[data-run="runs/listed"]', "running")
    until(lambda: look(folder).step > 1, LONG)
    assert page.get_by_role("button", name="Delete runs/listed").count() == 0                # never one that runs
    page.get_by_role("button", name="Stop runs/listed").click()
    says(page, 'li[data-run="runs/listed"]', "stopped")
    saved = look(folder).saved
    assert saved is not None
    page.get_by_role("button", name="Resume runs/listed").click()
    page.wait_for_function("() => Number(document.querySelector('#runs-steps input')?.value) > 1")        # what is offered has come
    page.locator("#runs-steps input").fill("1")
    page.locator("#runs-steps input").press("Tab")
    page.locator("#runs-resume-go").click()
    says(page, "#runs-said", f"has done {saved} steps")
    page.locator("#runs-steps input").fill(str(saved + 2))
    page.locator("#runs-resume-go").click()
    says(page, 'li[data-run="runs/listed"]', "finished")
    assert look(folder).step == saved + 2
    assert page.get_by_role("link", name="Clone runs/listed").get_attribute("href") == "/new?from=runs/listed"
    page.get_by_role("button", name="Delete runs/listed").click()
    says(page, "#runs-delete", "cannot be brought back")
    page.locator("#runs-delete-keep").click()
    page.locator("#runs-delete").wait_for(state="hidden")
    assert folder.exists()
    page.get_by_role("button", name="Delete runs/listed").click()
    page.locator("#runs-delete-go").click()
    says(page, "#runs-said", "runs/listed is deleted")
    until(lambda: not folder.exists(), 10)
