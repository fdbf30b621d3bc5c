"""The doctor's page says what the command says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.ui.conftest import PATIENCE, Served
from ui.jobs import Job
from ui.pages import doctor


def test_the_page_says_what_the_command_found(served: Served, page: Any) -> None:
    page.goto(f"{served.url}/doctor")
    page.locator("#doctor-said table").wait_for(timeout=3 * PATIENCE)
    said = page.locator("#doctor-said").inner_text()
    (job,) = [Job(folder) for folder in (served.root / ".localrl/jobs").iterdir() if folder.name.endswith("doctor")]
    findings = json.loads(job.output())
    assert len(findings) > 8 and all(finding["name"] in said for finding in findings)
    page.reload()
    page.locator("#doctor-said table").wait_for()
    assert len([*(served.root / ".localrl/jobs").iterdir()]) == 1    # a look at the page is no new check


def test_a_check_that_died_is_said(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(json.dumps({"pid": 1, "created": 0.0}))
    (tmp_path / "rc").write_text("-4")
    assert "signal 4" in doctor.shown(Job(tmp_path))
