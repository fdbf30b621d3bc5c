"""Opened models: real llama.cpp on a real file, one that is cut short, one that is killed, and a UI that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from localrl.exports import Files
from localrl.settings import UserError
from ui.servers import Server, Servers

pytest.importorskip("llama_cpp")
ASKED = [{"role": "user", "content": "What is 1 + 2?"}]
SETTINGS = {"temperature": 1.0, "max_tokens": 24}


@pytest.fixture(scope="module")
def base(trained_run: Path) -> Path:
    """The base of a real run as GGUF, exported beside it."""
    out = trained_run.parent / "exported"
    command = [sys.executable, "-m", "localrl", "export", str(trained_run), "--what", "base", "--type", "f16", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return next(out.rglob("*.gguf"))


@pytest.fixture
def servers() -> Iterator[Servers]:
    """At most two, closed at the end."""
    found = Servers(most=2)
    yield found
    found.close()


def text(server: Server, seed: int) -> str:
    return "".join(piece.text for piece in server.answer(ASKED, SETTINGS, seed, lambda: False))


def test_shared_seeded_and_gone_at_the_end(servers: Servers, base: Path) -> None:
    with servers.use(Files(base)) as one, servers.use(Files(base)) as other:
        assert one is other
        assert text(one, 3) == text(one, 3) != ""
        *_, last = one.answer(ASKED, SETTINGS, 3, lambda: False)
        assert 0 < last.tokens <= 24
        command = psutil.Process(one.process.pid).cmdline()
        assert one.key not in " ".join(command)
    servers.close()
    assert not psutil.pid_exists(one.process.pid)


def test_a_killed_server_says_so_and_is_opened_anew(servers: Servers, base: Path) -> None:
    with servers.use(Files(base)) as one:
        os.killpg(one.process.pid, signal.SIGKILL)
        with pytest.raises(UserError, match=r"was killed .signal 9."):
            text(one, 0)
    with servers.use(Files(base)) as other:
        assert other is not one
        assert text(other, 0)


def test_a_file_cut_short(servers: Servers, base: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(base.read_bytes()[:200_000])
    with pytest.raises(UserError, match=r"cut\.gguf"), servers.use(Files(cut)):
        pass


def test_the_least_recently_used_makes_room(servers: Servers, tmp_path: Path) -> None:
    """Processes that never load will do."""
    paths = [tmp_path / f"{name}.gguf" for name in "abc"]
    for path in paths:
        path.write_bytes(b"GGUF")
    a, b = (servers._take(Files(path)) for path in paths[:2])
    a.used, b.used = 2.0, 1.0
    a.asked = b.asked = 1
    with pytest.raises(UserError, match="2 models are answering"):
        servers._take(Files(paths[2]))
    a.asked = b.asked = 0
    servers._take(Files(paths[2]))
    assert a in servers.open and b not in servers.open


def test_no_orphan_when_the_ui_is_killed(base: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from localrl.exports import Files; from ui.servers import Servers\n"
        "with Servers().use(Files(Path(sys.argv[1]))) as server: print(server.process.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(base)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 30
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE and time.monotonic() < end:
        time.sleep(0.2)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_stopped_in_the_middle(servers: Servers, base: Path) -> None:
    """The server is free for the next question at once."""
    with servers.use(Files(base)) as one:
        whole = text(one, 3)
        got: list[str] = []
        for piece in one.answer(ASKED, SETTINGS, 3, lambda: len("".join(got)) > 0):
            got.append(piece.text)
        assert 0 < len("".join(got)) < len(whole)
        assert text(one, 3) == whole
