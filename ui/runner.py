"""Runs one command and keeps its exit code: `python runner.py FOLDER COMMAND...`. A file of its own, so that a job outlives the UI that began it."""

import signal
import subprocess
import sys
from pathlib import Path


def main() -> None:
    """FOLDER gets `output.log` as it grows and `rc` at the end, whole or not at all."""
    folder, command = Path(sys.argv[1]), sys.argv[2:]
    for number in (signal.SIGINT, signal.SIGTERM):          # they are for the command, which shares this process group
        signal.signal(number, signal.SIG_IGN)
    with (folder / "output.log").open("ab") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=_as_usual)
        code = process.wait()
    (folder / ".rc.part").write_text(str(code))
    (folder / ".rc.part").rename(folder / "rc")


def _as_usual() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


if __name__ == "__main__":
    main()
