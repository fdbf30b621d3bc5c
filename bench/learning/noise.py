"""How much of a reward's gradient is signal: the cosine between its estimates from two independent batches of the (hardly trained) policy, and the
cosines between rewards, within a batch and between means of twelve.

    python -m bench.learning.noise
"""

from __future__ import annotations

from pathlib import Path

import torch

from bench.learning.balance import FIVE, trials
from bench.learning.memory import Watching
from bench.learning.trials import COMMON
from localrl.batch import Readout, collate
from localrl.config import load_run
from localrl.metrics import Clock
from localrl.policy.directions import decode
from localrl.prepare import anchor, open_rewards, prepare
from localrl.run import assemble
from localrl.train import accumulate, gather
from tests.memory.tracker import StorageTracker

BATCHES = 12


def main() -> None:
    """Print the three."""
    torch.set_num_threads(1)
    run = anchor(load_run("demo", None, [*COMMON[1:], *trials(FIVE)[3].settings]), Path.cwd())
    prepared = prepare(run, lambda text: None)
    found = []
    with open_rewards(run, prepared.data) as judges, assemble(prepared, judges, Watching(StorageTracker())) as room:  # type: ignore[arg-type]
        session = room.session
        directions = session.policy.directions
        assert directions is not None
        torch.manual_seed(1)
        for name, parameter in session.policy.model.named_parameters():
            if "lora_B" in name:                                     # from 0, A has no gradient yet
                parameter.data.normal_(std=0.01)
        for step in range(BATCHES):
            rollouts = gather(session, step, Clock(lambda phase: None, session.policy.device))
            batch = collate(rollouts, session.rewards.weights, run.rollout.max_completion_length, step)
            credit = session.algorithm.credit(batch, Readout())
            accumulate(session.algorithm, session.policy, batch, credit, session.plan.split(batch.sequence_length))
            found.append(torch.cat([decode(kept) for kept in directions._kept.values()], 1))
            directions.drop()
    each = torch.nn.functional.normalize(torch.stack(found), dim=2)   # (batches, rewards, parameters)
    apart = ~torch.eye(BATCHES, dtype=torch.bool)
    alike = {name: round((each[:, k] @ each[:, k].T)[apart].mean().item(), 2) for k, name in enumerate(FIVE)}
    mean = torch.nn.functional.normalize(torch.stack(found).mean(0), dim=1)
    print("the same reward, two batches:", alike)
    print(f"two rewards, means of {BATCHES} batches:\n", (mean @ mean.T).round(decimals=2))
    print("two rewards, one batch, spread of the cosine:\n", (each @ each.transpose(1, 2)).std(0).round(decimals=2))


if __name__ == "__main__":
    main()
