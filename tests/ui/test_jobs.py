"""Commands in the background, and how runs stand: real processes, really killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from localrl.settings import UserError
from localrl.status import end, interrupt, look, run_folders
from ui import runs
from ui.jobs import Job, jobs, start
from ui.place import Place


def until(true: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait for it."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


def test_a_command_that_ends_and_one_that_fails(tmp_path: Path) -> None:
    place = Place.at(tmp_path)
    good, bad = start(place, "presets", ["presets"]), start(place, "plan", ["plan", "--preset", "qwen3"], subject="mine")
    until(lambda: good.state != "running" and bad.state != "running")
    assert (good.state, good.code, good.complaint()) == ("done", 0, "") and "qwen3-8b-16gb" in good.output()
    assert (bad.state, bad.code) == ("failed", 2) and bad.complaint().startswith("no preset 'qwen3'")
    assert [job.folder for job in jobs(place)] == [bad.folder, good.folder]                     # newest first, and found again by anybody
    assert jobs(place, "plan", "mine") == [bad] and not jobs(place, "plan", "other")
    assert good.command == "localrl presets"


def test_a_job_outlives_whoever_started_it_and_can_be_stopped(tmp_path: Path) -> None:
    code = f"from ui.jobs import start; from ui.place import Place; from pathlib import Path; print(start(Place.at(Path({str(tmp_path)!r})), 'x', {{}}).folder)"
    (tmp_path / "wait.py").write_text("import time; time.sleep(600)")
    args = "['train', 'rewards.functions=[\"wait.py:nothing\"]', 'log.dir=run']"
    told = subprocess.run([sys.executable, "-c", code.replace("{}", args)], capture_output=True, text=True, check=True)
    job = Job(Path(told.stdout.strip()))
    assert job.state == "running"
    until(lambda: len(psutil.Process(int(str(job.about["pid"]))).children()) == 1)
    job.kill()
    until(lambda: job.state == "failed")
    assert "killed" in job.complaint()


def test_a_number_that_another_process_has_now_is_no_job(tmp_path: Path) -> None:
    place = Place.at(tmp_path)
    folder = place.own("jobs", "00001-x")
    (folder / "job.json").write_text(json.dumps({"kind": "x", "argv": [], "pid": psutil.Process().pid, "created": 1.0}))
    assert Job(folder).state == "failed"
    Job(folder).kill()                                               # must not hit us


def beat(folder: Path, state: str, pid: int, ago: float = 0.0) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "run.toml").touch()
    (folder / "state.json").write_text(json.dumps({"pid": pid, "state": state, "step": 3, "steps": 9, "time": time.time() - ago, "message": ""}))


def test_how_runs_stand(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    hold = f"import time; from filelock import FileLock; lock = FileLock({str(folder / 'lock')!r}); lock.acquire(); print('held', flush=True); time.sleep(600)"
    beat(folder, "running", 1)
    process = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    beat(folder, "running", process.pid)
    assert look(folder).stands == "running" and look(folder).step == 3
    beat(folder, "running", process.pid, ago=1000)
    assert look(folder).stands == "silent"
    beat(folder, "stopped", 1)
    assert look(folder).stands == "running"                          # resumed, and not yet at its first step
    beat(folder, "running", process.pid)
    interrupt(folder)
    assert process.wait(20) == -signal.SIGINT
    process.stdout.close()
    assert look(folder).stands == "crashed" and not look(folder).resumable
    with pytest.raises(UserError, match="is not running"):
        interrupt(folder)
    for state in ("finished", "stopped", "failed"):
        beat(folder, state, 1)
        assert look(folder).stands == state
    (folder / "checkpoint-3").mkdir()
    assert look(folder).resumable and look(folder).saved == 3
    (folder / "state.json").write_text('{"pid": 1, "sta')            # a disk that was full
    assert look(folder).stands == "crashed"
    (folder / "state.json").write_text('{"pid": "one", "state": "stopped", "step": null}')
    assert look(folder).stands == "stopped" and look(folder).step == 0
    with pytest.raises(UserError, match="no run folder"):
        look(tmp_path)
    beat(tmp_path / "elsewhere" / "b", "finished", 1)
    beat(tmp_path / ".hidden" / "c", "finished", 1)
    assert [p.name for p in run_folders(tmp_path)] == ["b", "a"]


def test_one_that_hears_nothing_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, folder = Place.at(tmp_path), tmp_path / "runs" / "a"
    hold = "import signal, time; from filelock import FileLock; signal.signal(signal.SIGINT, signal.SIG_IGN); " \
           f"lock = FileLock({str(folder / 'lock')!r}); lock.acquire(); print('held', flush=True); time.sleep(600)"
    beat(folder, "running", 1)
    process = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    beat(folder, "running", process.pid, ago=1000)                   # before there was this process: the number is not the run's
    with pytest.raises(UserError, match="still loading: end it in a moment"):
        end(folder)
    beat(folder, "running", process.pid)
    with pytest.raises(UserError, match="runs and answers: stop it"):
        runs.kill(place, "runs/a")
    assert 'data-act="end"' not in runs.listed(runs.rows(place))
    monkeypatch.setattr("localrl.status.SILENT", 0.1)
    time.sleep(0.2)
    assert 'data-act="end"' in runs.listed(runs.rows(place))
    runs.stop(place, "runs/a")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    assert runs.kill(place, "runs/a") == "runs/a was ended; nothing was saved to go on from"
    assert process.wait(20) == -signal.SIGKILL and look(folder).stands == "crashed"


def test_looking_does_not_keep_a_run_from_starting(tmp_path: Path) -> None:
    from localrl.folder import RunFolder

    beat(tmp_path / "r", "stopped", 1)
    look_on = FileLock(tmp_path / "r" / "lock", thread_local=False)
    look_on.acquire()
    threading.Timer(0.2, look_on.release).start()
    RunFolder.reopen(tmp_path / "r").close()
