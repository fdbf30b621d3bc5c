"""From a command line to a page that is open."""

from __future__ import annotations

import socket
import webbrowser
from collections.abc import Callable
from pathlib import Path

from localrl.sockets import open_socket

from .place import Place
from .server import serve


def open_pages(folder: Path, *, port: int, browser: bool, share: bool, password: str | None, say: Callable[[str], None]) -> None:
    """Serve the pages until Ctrl-C. UserError if the folder is none or the port is taken."""
    place = Place.at(folder)
    with open_socket("0.0.0.0" if share else "127.0.0.1", port) as bound:
        from .app import application  # seconds of imports: not before what can be checked at once

        app = application(place, loopback=not share, password=password)
        at = f"http://127.0.0.1:{bound.getsockname()[1]}"

        def ready() -> None:
            say(f"localrl: {at}  (folder {place.root}; Ctrl-C closes the pages, runs go on)")
            if share:
                say(f"open to the network at http://{_address()}:{bound.getsockname()[1]}, unencrypted: whoever has the password can start runs, "
                    "run reward code as you, read and delete what lies in this folder")
            if browser:
                webbrowser.open(at)

        serve(app, bound, ready)


def _address() -> str:
    """This machine's in the network, as far as it knows; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return socket.gethostname()
        return str(probe.getsockname()[0])
