"""Who gets in, and what a page may do: seen from a real browser and from outside."""

from __future__ import annotations

import http.client
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from localrl.settings import UserError
from tests.ui.conftest import Served, serving
from ui.app import PAGES
from ui.place import Place


def ask(served: Served, path: str = "/", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """A plain request."""
    at = urlsplit(served.url)
    connection = http.client.HTTPConnection(str(at.hostname), at.port, timeout=30)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    found = answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    connection.close()
    return found


@pytest.mark.parametrize("shown", PAGES, ids=lambda p: p.TITLE)
def test_every_page_opens_and_asks_nobody_else(served: Served, page: Any, shown: Any) -> None:
    page.goto(served.url + shown.PATH)
    page.get_by_role("heading", level=1, name=shown.TITLE).wait_for()


def test_listens_on_this_machine_only(served: Served) -> None:
    import psutil

    listening = [c.laddr.ip for c in psutil.Process(served.process.pid).net_connections() if c.status == psutil.CONN_LISTEN]
    assert listening == ["127.0.0.1"]


def test_another_host_or_origin_gets_nothing(served: Served) -> None:
    assert ask(served)[0] == 200
    assert ask(served, Host="evil.example")[0] == 403
    assert ask(served, Origin="https://evil.example")[0] == 403
    assert ask(served, Origin=served.url)[0] == 200
    assert "frame-ancestors 'none'" in ask(served)[1]["content-security-policy"]


def test_files_of_the_machine_are_not_served(served: Served) -> None:
    (served.root / "secret.txt").write_text("secret")
    for path in (served.root / "secret.txt", Path("/etc/passwd"), Path(__file__)):
        for way in ("/gradio_api/file=", "/file="):
            assert ask(served, f"{way}{path}")[0] in (403, 404)


def test_the_network_wants_a_password(tmp_path: Path) -> None:
    told = subprocess.run([sys.executable, "-m", "localrl", "ui", str(tmp_path), "--share-on-lan"], capture_output=True, text=True, check=False, timeout=120)
    assert told.returncode == 2 and "run reward code as you" in told.stderr.replace("\n", " ") and "--password" in told.stderr
    with serving(tmp_path, "--share-on-lan", env={"LOCALRL_PASSWORD": "correct horse"}) as it:
        assert it.process.stdout is not None
        assert "whoever has the password" in it.process.stdout.readline()
        assert b"Runs" not in ask(it, "/config")[2] and ask(it, "/config")[0] == 401
        assert ask(it, Host="desk.local")[0] == 200               # the login form


def test_a_port_that_is_taken_and_a_folder_that_is_none(served: Served, tmp_path: Path) -> None:
    for arguments, said in (([str(tmp_path), "--port", str(urlsplit(served.url).port)], "0 for a free one"), ([str(tmp_path / "none")], "is no folder")):
        told = subprocess.run([sys.executable, "-m", "localrl", "ui", *arguments], capture_output=True, text=True, check=False, timeout=120)
        assert told.returncode == 2 and said in told.stderr.replace("\n", " "), told.stderr


def test_paths_stay_in_the_workspace(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "out")
    place = Place.at(tmp_path / "in")
    assert place.inside("data.jsonl") == tmp_path / "in" / "data.jsonl"
    for path in ("../out/x", "/etc/passwd", "link/x", "~/x"):
        with pytest.raises(UserError, match="lies outside"):
            place.inside(path)
