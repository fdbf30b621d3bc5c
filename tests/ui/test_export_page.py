"""Exports from the page: a real one to its report, a cancelled one, one that failed; what can be downloaded and what cannot."""

from __future__ import annotations

import http.client
import json
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from localrl.settings import UserError
from tests.ui.conftest import PATIENCE, Served
from ui import exporting
from ui.place import Place

pytest.importorskip("llama_cpp")


def get(served: Served, path: str) -> tuple[int, bytes]:
    at = urlsplit(served.url)
    connection = http.client.HTTPConnection(str(at.hostname), at.port, timeout=60)
    connection.request("GET", path)
    answer = connection.getresponse()
    found = answer.status, answer.read()
    connection.close()
    return found


def test_from_the_page_to_a_proven_file(shown: Served, page: Any) -> None:
    page.goto(f"{shown.url}/export?run=runs/tiny")
    page.get_by_text("Nothing has been exported yet").wait_for()
    page.get_by_text("localrl export runs/tiny --what merged --type q8_0 --merge auto").wait_for()
    page.locator("#export-merge input").click()
    page.get_by_role("option", name="dequantized").click()
    page.get_by_text("--merge dequantized").wait_for()
    page.locator("#export-go").click()
    page.locator("#export-progress", has_text="under way").wait_for()
    page.locator("#export-progress", has_text="done, and proven").wait_for(timeout=6 * PATIENCE)
    made = page.locator("#export-files section").first
    assert "passed its self-check" in made.inner_text() and "localrl chat runs/tiny/export/" in made.inner_text()
    made.get_by_text("What was compared").click()
    assert "logits" in made.inner_text() and "FAILED" not in made.inner_text()
    (file,) = (shown.root / "runs/tiny/export").glob("*.gguf")
    address = next(a for a in [link.get_attribute("href") for link in made.get_by_role("link").all()] if a and a.endswith(".gguf"))
    status, content = get(shown, address)
    assert status == 200 and content == file.read_bytes()
    page.reload()                                                    # everything is in files
    page.locator("#export-files section", has_text=file.name).wait_for()
    other = address.replace(file.name, "run.toml")
    assert get(shown, other)[0] == 404 and get(shown, address.replace("/download/", "/download/0"))[0] == 404


def test_cancelled_leaves_nothing_half_written(shown: Served, page: Any) -> None:
    page.goto(f"{shown.url}/export?run=runs/tiny")
    before = set((shown.root / "runs/tiny/export").glob("*")) if (shown.root / "runs/tiny/export").exists() else set()
    page.locator("#export-types").get_by_label("f32").check()
    page.get_by_text("q8_0,f32").wait_for()
    page.locator("#export-go").click()
    page.locator("#export-cancel").click(timeout=PATIENCE)
    page.locator("#export-progress", has_text="cancelled").wait_for(timeout=2 * PATIENCE)
    assert set((shown.root / "runs/tiny/export").glob("*")) == before


def test_what_cannot_be_exported_is_said_before(shown: Served, page: Any, tmp_path: Path) -> None:
    (shown.root / "runs" / "bare").mkdir(parents=True)
    shutil.copy(shown.root / "runs/tiny/run.toml", shown.root / "runs/bare/run.toml")
    page.goto(f"{shown.url}/export?run=runs/bare")
    page.locator("#export-said", has_text="has no checkpoint yet").wait_for()
    place = Place.at(shown.root)
    for types, what, said in (([], "merged", "no type is chosen"), (["q9"], "merged", "'q9' is not offered"), (["f16"], "all", "'all' is not offered")):
        with pytest.raises(UserError, match=said):
            exporting.begin(place, "runs/tiny", "", what, types, "auto")
    with pytest.raises(UserError, match="was removed since"):
        exporting.begin(place, "runs/tiny", "checkpoint-999", "adapter", ["f16"], "auto")


def test_a_file_that_failed_shows_what_differs(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "x" / "export"
    folder.mkdir(parents=True)
    (folder / "x-merged-f16.gguf.failed").write_bytes(b"GGUF")
    row = {"name": "logits", "passed": False, "value": "0.3", "limit": "1e-4", "detail": "<script>alert(1)</script>", "warns": False}
    (folder / "x-merged-f16.gguf.failed.check.json").write_text(json.dumps({"what": "merged", "dtype": "f16", "checks": [row], "rewards": {}}))
    (folder / "old.gguf").write_bytes(b"GGUF")
    (folder / "old.gguf.check.json").write_text("{half")
    said = exporting.listed(Place.at(tmp_path), "runs/x")
    assert "do not use it" in said and "FAILED" in said and "&lt;script&gt;" in said and "<script>" not in said
    assert "no report lies beside it" in said


def test_estimates_are_the_real_size_within_a_fifth(shown: Served) -> None:
    """Of the embedded model, most of whose weights are of the type that was asked for."""
    said = exporting.estimates(shown.root / "runs" / "tiny", "merged")
    assert "f16" in said and "1.9x" in said
    for path in (shown.root / "runs/tiny/export").glob("*q8_0.gguf"):
        about = exporting._parameters("demo", None, 16, "all-linear", 0.0)[0] * exporting.bits("q8_0") / 8
        assert about == pytest.approx(path.stat().st_size, rel=0.2)


def test_links_are_for_exports_of_this_workspace_only(tmp_path: Path) -> None:
    place = Place.at(tmp_path)
    (tmp_path / "runs/x/export").mkdir(parents=True)
    for name in ("runs/x/export/a.gguf", "runs/x/run.md", "runs/x/export/key.pem"):
        (tmp_path / name).write_text("x")
    for name, served in (("runs/x/export/a.gguf", True), ("runs/x/run.md", False), ("runs/x/export/key.pem", False), ("../export/x.gguf", False)):
        assert (exporting.file_of(place, exporting._token(name), name) is not None) == served, name
    assert exporting.file_of(place, "0" * 32, "runs/x/export/a.gguf") is None
