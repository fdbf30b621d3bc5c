"""The chat page in a real browser, with real models: exported by a click, two columns, a blind vote, stop, hostile text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from .conftest import Served, serving

pytest.importorskip("llama_cpp")
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>"
SLOW = 300_000


def ask(page: Any, question: str) -> None:
    page.locator("#chat-question textarea").fill(question)
    page.locator("#chat-ask").click()


def choose(page: Any, *labels: str) -> None:
    """Pick models by their labels, in the list that opens."""
    box = page.locator("#chat-models input")
    for label in labels:
        box.click()
        page.get_by_role("option", name=label).first.click()
    page.keyboard.press("Escape")


def answered(page: Any, count: int) -> None:
    """Until so many columns have their length."""
    page.locator("#chat-picture .facts", has_text="tokens").nth(count - 1).wait_for(timeout=SLOW)
    page.locator("#chat-said", has_text="scoring").wait_for(state="detached", timeout=SLOW)


def blind_vote(page: Any) -> None:
    """Ask blind, vote, see the names."""
    page.locator("#chat-blind input").check()
    ask(page, f"What is 1 + 2? {HOSTILE}")
    page.locator("#chat-ballot").wait_for(timeout=SLOW)
    heads = page.locator("#chat-picture h2")
    assert heads.all_inner_texts() == ["Model A", "Model B"]
    assert page.locator("#chat-picture img, #chat-picture script").count() == 0
    assert HOSTILE in page.locator("#chat-picture").inner_text()
    page.get_by_role("radio", name="Model B").check()
    page.locator("#chat-vote").click()
    page.locator("#chat-picture h2", has_text="base").wait_for()
    assert sorted(heads.all_inner_texts()) == ["base", "checkpoint-3"]


def test_export_ask_vote(served: Served, page: Any, trained_run: Path) -> None:
    shutil.copytree(trained_run, served.root / "runs" / "tiny")
    page.goto(served.url + "/chat?run=runs/tiny")
    page.locator("#chat-prompt input").wait_for()
    choose(page, "base", "checkpoint-3")
    page.locator("#chat-export").click(timeout=SLOW)
    page.locator("#chat-exporting", has_text="exported: ask now").wait_for(timeout=SLOW)
    blind_vote(page)
    kept = (served.root / ".localrl" / "votes" / "runs%2Ftiny.jsonl").read_text().splitlines()
    assert len(kept) == 1 and json.loads(kept[0])["best"] == 1
    comes_back(page)
    goes_on(page)


def comes_back(page: Any) -> None:
    """A reload shows the conversation again, and who was whom."""
    before = page.locator("#chat-picture").inner_text()
    page.reload()
    page.locator("#chat-picture h2", has_text="base").wait_for()
    assert page.locator("#chat-picture").inner_text() == before
    assert page.locator("#chat-blind input").is_checked()


def goes_on(page: Any) -> None:
    """With names: a held-out prompt, the same again with another seed, then a question to what was said."""
    page.locator("#chat-blind input").uncheck()
    page.locator("#chat-prompt input").click()
    page.get_by_role("option", name="2. ").first.click()
    page.locator("#chat-ask").click()
    page.locator("#chat-picture .question", has_text=HOSTILE).first.wait_for(state="detached")
    answered(page, 2)
    first = page.locator("#chat-picture .answer").all_inner_texts()
    assert all("tokens" in text for text in first) and page.locator("#chat-picture .question").count() == 2
    page.locator("#chat-again").click()
    page.wait_for_function("was => [...document.querySelectorAll('#chat-picture .answer')].some((a, i) => a.innerText != was[i])", arg=first)
    answered(page, 2)
    page.locator("#chat-prompt input").click()
    page.get_by_role("option", name="A question of your own").first.click()
    ask(page, "And then?")
    page.locator("#chat-picture .question", has_text="And then?").nth(1).wait_for(timeout=SLOW)
    answered(page, 4)
    page.locator("#chat-new").click()
    page.locator("#chat-picture", has_text="Choose models and ask something").wait_for()


def test_a_run_outside_is_refused(served: Served, page: Any) -> None:
    page.goto(served.url + "/chat?run=../outside")
    page.locator("#chat-said .complaint", has_text="outside").wait_for()


def test_no_model_is_chosen(tmp_path: Path, page: Any) -> None:
    with serving(tmp_path) as it:
        page.goto(it.url + "/chat")
        page.locator("#chat-ask").click()
        page.locator("#chat-said .complaint", has_text="no model is chosen").wait_for()
        page.goto("about:blank")
