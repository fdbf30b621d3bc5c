"""`python -m bench.memory.ship`: find again the lines that travel with the presets, so that their models are planned at once. Minutes.

To be run when `localrl.simulate.provider.VERSION` counts up, a preset changes, or a test finds that newer libraries need other memory. What no plan asks
for any more goes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from localrl.config import Run, load_run, presets
from localrl.memory.cards import Card
from localrl.planning import model_config, plan_on
from localrl.simulate.provider import shipped

CARDS = ("8GiB", "10GiB", "12GiB", "16GiB", "24GiB")


def places(run: Run) -> Iterator[tuple[Card, torch.dtype]]:
    """Where a preset is likely to be planned: the demo on a CPU too."""
    for card in CARDS:
        yield Card.of(card, "cuda"), torch.bfloat16
    if run.model.path == "demo":
        yield Card.of("16GiB", "cpu"), torch.float32


def main() -> None:
    """Old ones go first: a plan reads what is there."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["LOCALRL_CACHE"] = cache
        for old in shipped().glob("*.json"):
            old.unlink()
        for name in presets():
            run = load_run(name)
            for card, dtype in places(run):
                plan = plan_on(run, model_config(run), card, dtype)
                print(f"{name} on {card.name} ({card.device}): {'fits' if plan.fits else 'does not fit'}", flush=True)
        shipped().mkdir(exist_ok=True)
        found = sorted(Path(cache, "lines").glob("*.json"))
        for file in found:
            shutil.copyfile(file, shipped() / f"{file.stem.split('-')[0]}.json")
        print(f"{len(found)} files, {sum(file.stat().st_size for file in found) / 1024:.0f} KiB, in {shipped()}")


if __name__ == "__main__":
    main()
