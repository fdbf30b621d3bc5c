"""See the package's docstring."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

CLAIMS = ("steadier", "apart", "balance", "windows", "single", "stale")
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Run the claims asked for, or all, and write their tables and pictures."""
    parser = argparse.ArgumentParser(description="Do the algorithms do what their papers claim?")
    parser.add_argument("claims", nargs="*", choices=[*CLAIMS, []], help="default: all")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/learning"))
    asked = parser.parse_args()
    for name in asked.claims or CLAIMS:
        claim = importlib.import_module(f"bench.learning.{name}")
        text = claim.report(asked.seeds, asked.workers, asked.work.resolve(), RESULTS)
        (RESULTS / f"{name}.md").write_text(text)
        print(text, flush=True)


if __name__ == "__main__":
    main()
