"""A real browser on the real pages: the command as a person starts it, in a workspace of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
PATIENCE = 60_000
"""Milliseconds that a page may take on a busy machine."""


@dataclass
class Served:
    """The pages of one workspace."""

    root: Path
    url: str
    process: subprocess.Popen[str]


@contextmanager
def serving(root: Path, *options: str, env: dict[str, str] | None = None) -> Iterator[Served]:
    """`localrl ui ROOT`, while it is open."""
    it = _serve(root, *options, env=env)
    assert it.process.stdout is not None
    try:
        yield it
    finally:
        it.process.terminate()
        it.process.wait(20)
        it.process.stdout.close()


def _serve(root: Path, *options: str, env: dict[str, str] | None = None) -> Served:
    """Until it says where it listens."""
    process = subprocess.Popen(
        [sys.executable, "-m", "localrl", "ui", str(root), "--no-browser", *options], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "COLUMNS": "400", **(env or {})},
    )  # fmt: skip
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if found := re.search(r"localrl: (http://\S+)", line):
            return Served(root, found[1], process)
    raise AssertionError("".join(said))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The pages on a new workspace, one for each test file."""
    with serving(tmp_path_factory.mktemp("workspace")) as it:
        yield it


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory, trained_run: Path) -> Iterator[Served]:
    """The pages on a workspace with a run, one for each test file."""
    root = tmp_path_factory.mktemp("shown")
    shutil.copytree(trained_run, root / "runs" / "tiny")
    with serving(root) as it:
        yield it


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Debian's Chromium, driven by Playwright."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))


@dataclass
class Watched:
    """What a page did beside what it was asked."""

    outward: list[str]
    told: list[str]

    @property
    def errors(self) -> list[str]:
        """But for streams that were cut off by the next page, or by the end of the server."""
        return [text for text in self.told if not any(cut in text for cut in ("AbortError", "Connection errored out", "ERR_CONNECTION_REFUSED"))]


def open_page(browser: Any, width: int = 1440, height: int = 900, dark: bool = False) -> tuple[Any, Watched]:
    """A new tab, in a profile of its own. Whatever it asks of other machines, and every error it reports, is kept."""
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light")
    page.set_default_timeout(PATIENCE)
    watched = Watched([], [])
    page.on("request", lambda r: None if r.url.startswith(("data:", "blob:")) or "//127.0.0.1:" in r.url else watched.outward.append(r.url))
    page.on("pageerror", lambda e: watched.told.append(str(e)))
    page.on("console", lambda m: watched.told.append(m.text) if m.type == "error" else None)
    return page, watched


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A tab; at its end it must have asked nothing of any other machine and reported no error."""
    page, watched = open_page(browser)
    yield page
    page.close()
    assert not watched.outward
    assert not watched.errors


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of the embedded model, three steps and two checkpoints. Copy it, do not change it (`shutil.copytree`)."""
    root = tmp_path_factory.mktemp("trained")
    small = ["rollout.prompts_per_step=4", "rollout.num_generations=4", "eval.limit=4", "eval.num_generations=2", "log.save_steps=2"]
    command = [sys.executable, "-m", "localrl", "train", "--preset", "demo", "steps=3", *small, f"log.dir={root / 'tiny'}"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return root / "tiny"
