"""The whole way in a real browser, on a CPU: rewards tried and kept, a run made of them, watched, reloaded, exported, and asked beside its base."""

from __future__ import annotations

import time
from typing import Any

import pytest

from localrl.folder import read_run
from localrl.status import look
from tests.ui.conftest import PATIENCE, Served, open_page

pytest.importorskip("llama_cpp")

SMALL = {"steps": "4", "rollout-prompts_per_step": "4", "rollout-num_generations": "4", "eval-limit": "4", "eval-num_generations": "2"}


def until_finished(served: Served, name: str) -> None:
    end = time.monotonic() + 300
    while look(served.root / name).stands != "finished":
        assert time.monotonic() < end, look(served.root / name)
        time.sleep(0.5)


def test_from_rewards_to_an_answer(served: Served, page: Any, browser: Any) -> None:
    # The Reward lab: the demo's rewards, tried on completions of the untrained model, kept as a set.
    page.goto(f"{served.url}/lab")
    page.get_by_label("Name of reward 1").wait_for()
    page.locator("#lab-prompts input").fill("4")
    page.locator("#lab-each input").fill("4")
    page.locator("#lab-try").click()
    page.locator("#lab-results", has_text="correct").wait_for(timeout=5 * PATIENCE)
    page.locator("#lab-set-name input, #lab-set-name textarea").first.fill("sums")
    page.locator("#lab-set-save").click()
    page.wait_for_function("() => document.querySelector('#lab-kept').innerText.includes('sums')", timeout=2 * PATIENCE)
    assert (served.root / "rewards" / "sums.toml").is_file()

    # A new run from that set.
    page.goto(f"{served.url}/new?rewards=sums")
    page.locator("#new-plan", has_text="It fits").wait_for(timeout=5 * PATIENCE)
    page.get_by_role("button", name="Evaluation").click()
    for key, value in SMALL.items():
        page.locator(f"#set-run-{key} input, #set-run-{key} textarea").first.fill(value)
    page.locator("#new-start").click()

    # Watched live, reloaded in the middle, and seen from a second tab.
    page.wait_for_url("**/live?run=runs%2Fdemo-001", timeout=5 * PATIENCE)
    page.reload()
    second, _ = open_page(browser)
    second.goto(f"{served.url}/")
    second.get_by_role("link", name="runs/demo-001", exact=True).wait_for()
    second.close()
    until_finished(served, "runs/demo-001")
    assert [spec.label for spec in read_run(served.root / "runs/demo-001").rewards.functions] == ["correct", "format", "brevity"]
    page.locator("#live-header", has_text="finished").wait_for(timeout=2 * PATIENCE)

    # Exported as base and adapter, and proven.
    for what in ("base", "adapter"):
        page.goto(f"{served.url}/export?run=runs/demo-001")
        page.locator("#export-command", has_text="--type q8_0").wait_for()
        page.locator("#export-what input").click()
        page.get_by_role("option", name=f"{what}:").click()
        page.locator("#export-command", has_text=f"--what {what}").wait_for()
        page.locator("#export-go").click()
        page.locator("#export-files section", has_text=f"demo-{what}-q8_0.gguf").filter(has_text="passed its self-check").first.wait_for(timeout=8 * PATIENCE)

    # And asked, beside what it was before.
    page.goto(f"{served.url}/chat?run=runs/demo-001")
    page.locator("#chat-models").get_by_text("checkpoint-4").wait_for()                 # the base and what was trained are chosen already
    page.locator("#chat-question textarea").fill("What is 12 + 34?")
    page.locator("#chat-ask").click()
    page.wait_for_function("() => document.querySelector('#chat-picture').innerText.split('tok/s').length === 3", timeout=5 * PATIENCE)
