"""The pages in the browser."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from localrl.cli.app import app, say
from localrl.settings import UserError

INSTALL = 'pip install "localrl[ui]"'


@app.command()
def ui(
    folder: Annotated[Path, typer.Argument(help="Runs, data, rewards and models are looked for in here, and nowhere else.")] = Path("."),
    port: Annotated[int, typer.Option("--port", help="0: a free one.", min=0, max=65535)] = 0,
    browser: Annotated[bool, typer.Option(help="Open the browser.")] = True,
    share: Annotated[bool, typer.Option("--share-on-lan", help="Let other machines of the network in, with --password.")] = False,
    password: Annotated[str | None, typer.Option("--password", envvar="LOCALRL_PASSWORD", help="What others must know; at least 8 characters.")] = None,
) -> None:
    """Pages in the browser: define rewards, see the plan, train, watch, chat, compare, export. On this machine alone; Ctrl-C closes them, runs go on."""
    pages = load_pages()
    if share and len(password or "") < 8:
        raise UserError("--share-on-lan lets everybody who knows the password start runs, run reward code as you, read and delete what lies in this "
                        "folder: give one of at least 8 characters with --password, or in LOCALRL_PASSWORD")
    pages.open_pages(folder, port=port, browser=browser, share=share, password=password, say=say)


def load_pages() -> ModuleType:
    """The package of the pages: beside this one in a checkout, else as it was installed. UserError if gradio is missing."""
    if importlib.util.find_spec("gradio") is None or importlib.util.find_spec("plotly") is None:
        raise UserError(f"the pages need gradio and plotly: {INSTALL}")
    beside = Path(__file__).parent.parent.parent / "ui" / "__init__.py"
    if beside.is_file() and "localrl_ui" not in sys.modules:
        spec = importlib.util.spec_from_file_location("localrl_ui", beside, submodule_search_locations=[str(beside.parent)])
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["localrl_ui"] = module
        spec.loader.exec_module(module)
    return importlib.import_module("localrl_ui.start")
