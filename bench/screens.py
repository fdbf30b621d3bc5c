"""Pictures of every page, 1440 and 390 pixels wide, light and dark, into `docs/ui/`: `python -m bench.screens`. Ten minutes on two cores.

A demo run is trained and exported in a workspace of its own, then the pages are opened in Chromium as a person would have them. Look at what comes of it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from tests.ui.conftest import CHROMIUM, QUIET, open_page, serving
from ui.app import PAGES

OUT = Path(__file__).parent.parent / "docs" / "ui"
WIDTHS = {1440: 1500, 390: 1800}
"""Pixels, and how much of a page's height is kept."""
TALK = "What is 27 + 46?"


def workspace(root: Path) -> None:
    """A run that has learned, and its export."""
    for command in (
        ["train", "--preset", "demo", "steps=30", "eval.limit=16", "eval.every=10", "log.save_steps=10", f"log.dir={root / 'runs' / 'sums'}"],
        ["export", str(root / "runs" / "sums"), "--type", "q8_0"],
        ["compare", str(root / "runs" / "sums"), "--prompts", "2"],                    # exports base and adapter
    ):
        subprocess.run([sys.executable, "-m", "localrl", *command], cwd=root, check=True)
    (root / "questions.jsonl").write_text('{"prompt": [{"role": "user", "content": "What is 27 + 46?"}], "answer": "73"}\n' * 40)


def tried(tab: Any) -> None:
    """Rewards on some completions."""
    tab.get_by_label("Name of reward 1").wait_for()
    tab.locator("#lab-try").click()
    tab.locator("#lab-results", has_text="correct").wait_for()
    tab.wait_for_timeout(1000)
    tab.locator("#lab-results").evaluate("it => it.scrollIntoView()")


def asked(tab: Any) -> None:
    """The same question to the base and to what was trained, which are chosen already."""
    tab.get_by_text("checkpoint-30").first.wait_for()
    tab.locator("#chat-new").click()                                 # the pages go on with the conversation before
    tab.wait_for_timeout(2000)                                       # it also empties the question
    tab.locator("#chat-question textarea").fill(TALK)
    tab.locator("#chat-ask").click()
    tab.locator("#chat-picture", has_text="tok/s").wait_for()
    tab.wait_for_timeout(3000)


def planned(tab: Any) -> None:
    """The plan is there."""
    tab.locator("#new-plan", has_text="fit").wait_for()


def examined(tab: Any) -> None:
    """The findings are there."""
    tab.locator("#doctor-said table").wait_for()


PREPARE: dict[str, Callable[[Any], None]] = {"/lab": tried, "/chat": asked, "/new": planned, "/doctor": examined}
"""What a person would have done on a page before it is worth a picture, by the page's path."""


def shoot(browser: Any, url: str, page: Any, width: int, dark: bool) -> None:
    """One picture, in few colours: they are many."""
    tab, watched = open_page(browser, width, WIDTHS[width], dark)
    tab.goto(f"{url}{page.PATH}?run=runs/sums&__theme={'dark' if dark else 'light'}")
    tab.get_by_role("heading", level=1, name=page.TITLE).wait_for()
    tab.wait_for_timeout(4000)
    if page.PATH in PREPARE:
        PREPARE[page.PATH](tab)
        tab.wait_for_timeout(1500)
    name = page.PATH.strip("/") or "runs"
    file = OUT / f"{name}-{width}-{'dark' if dark else 'light'}.png"
    tab.screenshot(path=file)
    tab.close()
    Image.open(file).convert("RGB").quantize(96, dither=Image.Dither.NONE).save(file, optimize=True)
    print(file.name, f"{file.stat().st_size / 1024:.0f} KiB", *watched.errors, flush=True)


def main() -> None:
    """All of them, or those of the pages that are named."""
    parser = argparse.ArgumentParser(prog="python -m bench.screens", description=__doc__)
    parser.add_argument("pages", nargs="*", help="paths, as in /live; all by default")
    parser.add_argument("--workspace", type=Path, help="one that an earlier run of this made")
    asked = parser.parse_args()
    if CHROMIUM is None:
        sys.exit("no Chromium on this machine: apt install chromium")
    OUT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as made, sync_playwright() as driver:
        root = asked.workspace or Path(made) / "sums"
        root.mkdir(exist_ok=True)
        if not (root / "runs" / "sums").is_dir():
            workspace(root)
        home = {"HOME": str(root.parent), "HF_HOME": ""}             # pictures show no machine's paths
        with serving(root, env=home) as served, driver.chromium.launch(executable_path=CHROMIUM, args=list(QUIET)) as browser:
            for page, width, dark in product(PAGES, WIDTHS, (False, True)):
                if not asked.pages or page.PATH in asked.pages:
                    shoot(browser, served.url, page, width, dark)


if __name__ == "__main__":
    main()
