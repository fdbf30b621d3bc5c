"""The command line: parse, call, print. A file for each kind of command; the order in which they register is that of `localrl --help`."""

from localrl.allocator import set_allocator
from localrl.cli.app import app
from localrl.quiet import quiet_libraries

# isort: off
from localrl.cli import training  # noqa: F401
from localrl.cli import lab  # noqa: F401
from localrl.cli import models  # noqa: F401
from localrl.cli import web  # noqa: F401
from localrl.cli import about  # noqa: F401

__all__ = ["app", "main"]


def main() -> None:
    """Entry point."""
    set_allocator()
    quiet_libraries()
    app()
