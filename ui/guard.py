"""`python guard.py ARGV...` is `localrl ARGV...` that ends with whoever started it: at the end of its stdin, which comes however that process dies."""

import os
import runpy
import signal
import sys
import threading


def main() -> None:
    """In a session of its own, so that what the command starts ends with it."""
    threading.Thread(target=_watch, daemon=True).start()
    sys.argv = ["localrl", *sys.argv[1:]]
    runpy.run_module("localrl", run_name="__main__")


def _watch() -> None:
    while os.read(0, 1024):
        pass
    os.killpg(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
