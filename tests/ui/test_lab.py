"""The reward lab in a real browser."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import PATIENCE, Served

HANGS = 'def hangs(completions, **kwargs):\n    """Never."""\n    while True:\n        pass\n'
PASTED = '{"prompt": "2 + 2?", "completions": ["It is 4", "5", "four", "<answer>4</answer>"], "answer": "4"}'


def opened(page: Any, served: Served, query: str = "") -> None:
    """The lab, ready to be used."""
    page.goto(f"{served.url}/lab{query}")
    page.wait_for_selector("#lab-reward-1")


def paste(page: Any, text: str) -> None:
    """Completions by hand."""
    page.get_by_label("Paste completions").check()
    page.fill("#lab-pasted textarea", text)


def start_from(page: Any, choice: str) -> None:
    """A set of rewards out of the list."""
    page.click("#lab-open input")
    page.fill("#lab-open input", choice)
    page.get_by_role("option", name=choice, exact=True).click()


def keep_set(served: Served, name: str, functions: list[Any], **limits: Any) -> None:
    """As a person's own file."""
    import tomli_w

    folder = served.root / "rewards"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.toml").write_text(tomli_w.dumps({"rewards": {"functions": functions, **limits}}))


def test_own_code_tried_weighed_and_saved(page: Any, served: Served) -> None:
    keep_set(served, "start", [{"function": "numeric_answer", "name": "right"}])
    opened(page, served, "?rewards=start")
    page.click("#lab-code-fold button")
    page.fill("#lab-code-name input, #lab-code-name textarea", "digits")
    page.click("#lab-code-save")
    page.wait_for_selector("#lab-reward-2")
    assert (served.root / "rewards" / "digits.py").read_text().startswith("def mine(")
    paste(page, PASTED)
    page.click("#lab-try")
    page.wait_for_selector("#lab-levers table")
    assert "try=" in page.url
    assert page.locator("#lab-levers tbody tr").count() == 4
    assert page.locator("#lab-cards svg").count() == 2
    assert "Histogram of mine" in page.locator("#lab-cards svg").nth(1).get_attribute("aria-label")
    before = page.inner_text("#lab-levers")
    page.fill("#lab-weight-2 input[type=number]", "-1.5")
    page.press("#lab-weight-2 input[type=number]", "Tab")
    page.wait_for_function("before => document.querySelector('#lab-levers').innerText !== before", arg=before)
    page.fill("#lab-set-name input, #lab-set-name textarea", "both")
    page.click("#lab-set-save")
    page.wait_for_selector("#lab-kept a[href='/new?rewards=both']")
    command = [sys.executable, "-m", "localrl", "train", "--rewards", "both", "--dry-run"]
    done = subprocess.run(command, cwd=served.root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "weight = -1.5" in (served.root / "rewards" / "both.toml").read_text()
    page.reload()                                                        # the address has it all
    page.wait_for_selector("#lab-levers table")
    assert page.inner_text("#lab-levers") == before


def test_a_reward_that_hangs_is_stopped_and_said(page: Any, served: Served) -> None:
    keep_set(served, "hanging", [{"function": "hangs.py:hangs"}, {"function": "regex", "args": {"pattern": "4"}}])
    (served.root / "rewards" / "hangs.py").write_text(HANGS)
    opened(page, served, "?rewards=hanging")
    paste(page, PASTED)
    page.click("#lab-try")
    page.wait_for_selector("#lab-stop")
    page.click("#lab-stop")
    page.get_by_text("Nothing was scored yet").wait_for()
    page.get_by_text("Limits of the reward processes").click()
    page.fill("#lab-limit-timeout input", "2")
    page.press("#lab-limit-timeout input", "Tab")
    page.click("#lab-try")
    page.get_by_text("reward 'hangs' took longer than rewards.timeout = 2 s").first.wait_for(timeout=2 * PATIENCE)
    assert page.locator("#lab-cards svg").count() == 1                   # the other one has its values


def test_what_is_wrong_is_said_where_one_looks(page: Any, served: Served) -> None:
    opened(page, served, "?try=99999")
    page.get_by_text("there is no trial 99999").wait_for()
    paste(page, "")
    page.click("#lab-try")
    page.get_by_text("there is nothing to score").wait_for()
    page.fill("#lab-set-name input, #lab-set-name textarea", "../out")
    page.click("#lab-set-save")
    page.get_by_text("'../out' cannot be a file's name here").wait_for()
    page.click("#lab-remove-1")
    page.wait_for_selector("#lab-reward-1", state="detached")
    start_from(page, "preset: demo")
    page.wait_for_selector("#lab-reward-1")


def test_completions_of_a_run(page: Any, served: Served, trained_run: Path) -> None:
    shutil.copytree(trained_run, served.root / "runs" / "tiny")
    opened(page, served, "?run=runs/tiny")
    page.click("#lab-try")
    page.wait_for_selector("#lab-levers table", timeout=2 * PATIENCE)
    rows = (served.root / "runs" / "tiny" / "completions" / "step-000003.jsonl").read_text().splitlines()
    assert json.loads(rows[0])["completion"].split()[0] in page.inner_text("#lab-levers")


def test_markup_of_a_model_is_shown_and_never_run(page: Any, served: Served) -> None:
    keep_set(served, "plain", [{"function": "regex", "args": {"pattern": "4"}}])
    opened(page, served, "?rewards=plain")
    paste(page, json.dumps({"prompt": "<img src=x onerror=alert(1)>", "completions": ["<img src=x onerror=alert(1)>", "4"]}))
    page.click("#lab-try")
    page.wait_for_selector("#lab-levers table")
    assert page.locator("#lab-levers img").count() == 0
    assert "<img src=x" in page.inner_text("#lab-levers")


@pytest.mark.parametrize("number", ["1x", "../00001", "99999"])
def test_a_trial_that_is_none(tmp_path: Path, number: str) -> None:
    from localrl.cli.web import load_pages

    load_pages()
    from localrl_ui import trials  # type: ignore[import-not-found]
    from localrl_ui.place import Place  # type: ignore[import-not-found]

    from localrl.settings import UserError

    with pytest.raises(UserError, match="there is no trial"):
        trials.find(Place.at(tmp_path), number)
