"""Memory that runs out at every allocation of a step in turn: the step must be the undisturbed one, in every phase of every kind of step.

The steps, and how an allocation is refused, are those of `tests/forced.py`; the tests take a sample of what this takes whole.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from pathlib import Path

from tqdm import tqdm

from tests.conftest import save_tiny
from tests.forced import CASES, MICRO_BATCH, SMALL, Forced, Undisturbed, a_bench, one_thread

RESULTS = Path(__file__).parent / "results"
EXACT = 2e-5
"""Largest difference of a tensor, relative to its length, that the order of sums in float32 may cause."""


def row(name: str, step: Undisturbed, found: list[Forced]) -> str:
    """What came of one kind of step, as a row of the table."""
    phases = ", ".join(f"{phase} {sum(f.phase == phase for f in found)}" for phase in dict.fromkeys(f.phase for f in found))
    wrong = sum(bool(f.gaps) or not f.same_rollouts or f.distance > EXACT for f in found)
    lost = sum(f.refused != 1 or f.retries != 1 for f in found)
    worst = f"{max(f.distance for f in found):.1e} | {max(f.again for f in found)}"
    return f"| {name} | {len(found)} of {step.allocations} ({phases}) | {lost} | {wrong} | {worst} |"


def main(arguments: list[str]) -> None:
    """Prints a row a kind of step as it is found, and writes the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory forced", description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="of so many allocations the first")
    asked = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    start, table = time.perf_counter(), [
        f"| step | allocations refused, one at a time | not survived with one retry | metrics, rollouts or tensors differ | largest difference of a tensor "
        f"| most tokens done again (micro-batch: {MICRO_BATCH}) |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    print("\n".join(table), flush=True)
    with tempfile.TemporaryDirectory() as folder, one_thread():
        save_tiny(Path(folder), "llama", **SMALL)
        for name, case in CASES.items():
            step = Undisturbed(a_bench(Path(folder), case))
            found = list(step.fail(tqdm(range(1, step.allocations + 1, asked.every), desc=name, leave=False)))
            table.append(row(name, step, found))
            print(table[-1], flush=True)
    RESULTS.mkdir(exist_ok=True)
    told = f"`python -m bench.memory forced --every {asked.every}`, {(time.perf_counter() - start) / 60:.0f} minutes"
    (RESULTS / "forced.md").write_text("\n".join([told, "", *table]) + "\n")


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
