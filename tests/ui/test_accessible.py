"""axe on every page, with a run in it, wide and light, narrow and dark: nothing that it calls serious or critical."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import pytest

from tests.ui.conftest import Served, open_page
from ui.app import PAGES

AXE = (files("axe_playwright_python") / "axe.min.js").read_text("utf-8")
BAD = ("serious", "critical")
SCREENS = {"wide, light": (1440, False), "narrow, dark": (390, True)}


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("one", PAGES, ids=lambda p: p.TITLE)
def test_nothing_serious(shown: Served, browser: Any, one: Any, screen: str) -> None:
    width, dark = SCREENS[screen]
    page, watched = open_page(browser, width, 1200, dark)
    page.goto(f"{shown.url}{one.PATH}?run=runs/tiny&__theme={'dark' if dark else 'light'}")
    page.get_by_role("heading", level=1, name=one.TITLE).wait_for()
    page.wait_for_timeout(3000)                                      # what loads after the page
    page.evaluate(AXE)
    found = page.evaluate("axe.run()")["violations"]
    page.close()
    told = [f"{v['impact']} {v['id']}: {[node['html'][:160] for node in v['nodes'][:3]]}" for v in found if v["impact"] in BAD]
    assert not told, "\n".join(told)
    assert not watched.outward
    assert not watched.errors
