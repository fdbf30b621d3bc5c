"""See the package's docstring. Every part is a file with `main(arguments)`, which is called with what follows its name."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

PARTS = ("truth", "overrun", "forced", "table")


def main() -> None:
    """Run the part that is named first, or every part that there is."""
    here = [name for name in PARTS if (Path(__file__).parent / f"{name}.py").exists()]
    if len(sys.argv) > 1 and sys.argv[1] not in here:
        sys.exit(f"python -m bench.memory [{' | '.join(here)}] [--help]")
    for name in sys.argv[1:2] or here:
        importlib.import_module(f"bench.memory.{name}").main(sys.argv[2:])


if __name__ == "__main__":
    main()
