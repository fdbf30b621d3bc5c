"""Plans against budgets that are enforced: an allocation past the budget is refused with torch.OutOfMemoryError.

For each random configuration a budget is drawn between the least that any plan needs and what the roomiest plan takes, the plan chooses its
knobs for it, and a whole step is done for real within it, every response as long as may be. Counted: refusals (a plan that said "fits" and did
not), steps that did not end, and the share of the budget that the fullest phase used. A share below 95 % is the work's own doing where the
plan does everything at once already, or where one more row would not fit.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from bench.memory.cases import UNBOUNDED, Case, draw, model_of
from bench.memory.truth import model_tensors, policy_tensors, scored, worst_requests
from localrl.batch import Readout, collate
from localrl.config import Run
from localrl.engines.torch import TorchEngine
from localrl.memory.cards import Card
from localrl.memory.knobs import Search
from localrl.memory.plan import MemoryPlan
from localrl.oom import Limits
from localrl.planning import plan_on
from localrl.policy.policy import Policy
from localrl.simulate.phases import LATE, calibrated
from localrl.train import accumulate
from tests.oom import Scarce

RESULTS = Path(__file__).parent / "results"
ENOUGH = 0.95


@dataclass(frozen=True)
class Outcome:
    """One configuration within its budget."""

    what: str
    budget: int
    peak: int
    refused: int
    """Allocations."""
    error: str
    """How the step ended early; empty: it did not."""
    bound: str
    """Why it could not use more; empty: it could have."""

    @property
    def share(self) -> float:
        """Of the budget."""
        return self.peak / self.budget


def free(run: Run, case: Case) -> Run:
    """The same run with every knob left to the plan."""
    memory = run.memory.model_copy(update={
        "micro_batch_tokens": None, "gradient_checkpointing": None, "head_chunk": None, "mlp_tile": None, "offload": None,
        "kv_cache": "int8" if case.int8_cache else None,
    })  # fmt: skip
    return run.model_copy(update={"memory": memory, "rollout": run.rollout.model_copy(update={"concurrent": None})})


def a_budget(plan: MemoryPlan, source: random.Random) -> int:
    """Between the least that a plan for this work can need and the most that it would take."""
    least = Search(plan.card, plan.shape, plan.work, {k: v for k, v in plan.asked.items() if v is not None}, plan.sources)
    low, high = max(least.peaks(least.least).values()), plan.phases[plan.worst]
    return round(low + (high - low) * source.uniform(0.02, 1.02))


def why_no_more(plan: MemoryPlan) -> str:
    """What keeps the plan from using more of its card."""
    search, choice, work = Search(plan.card, plan.shape, plan.work, plan.asked, plan.sources), plan.choice, plan.work
    step = work.rollouts * work.longest
    at_once, in_a_wave = choice.micro_batch_tokens >= step, choice.concurrent >= work.rollouts
    if at_once and in_a_wave:
        return "everything at once"
    if plan.worst in ("load", "export"):
        return "loading or exporting takes more"
    rows = choice.micro_batch_tokens // work.longest + 1
    wider = replace(choice, micro_batch_tokens=min(step, rows * work.longest))
    another = not at_once and all(search.fit(phase, wider) for phase in ("scoring", "backward"))
    groups = work.num_generations if choice.concurrent >= work.num_generations else 1
    more = not in_a_wave and search.fit("rollout", replace(choice, concurrent=min(work.rollouts, choice.concurrent + groups)))
    return "" if another or more else "one more row or group would not fit"


def try_it(case: Case, folder: Path, source: random.Random) -> Outcome | None:
    """None: a case that no budget bounds."""
    run, config, dtype = free(case.run(folder), case), case.config(), getattr(torch, case.dtype)
    roomy = plan_on(run, config, Card.budget(UNBOUNDED), dtype)
    plan = plan_on(run, config, Card.budget(a_budget(roomy, source)), dtype)
    if not plan.fits:
        return None
    with model_of(case, folder):
        memory, error = within(case, run, plan)
    return Outcome(case.what, plan.card.usable, memory.peak, memory.failures, error, why_no_more(plan))


def within(case: Case, run: Run, plan: MemoryPlan) -> tuple[Scarce, str]:
    """One step under the budget. Loading is not refused: a file's pages are no allocations."""
    algorithm, choice = calibrated(run.algorithm.for_sampler(exact=run.own_samples)), plan.choice
    weights = run.rewards.weights
    policy = Policy.create(
        run, critic="value" in algorithm.reads_before | algorithm.reads_during, checkpointing=choice.gradient_checkpointing, head_chunk=choice.head_chunk,
        directions=algorithm.directions(weights), kept_as=choice.directions, mlp_tile=choice.mlp_tile, offload=choice.offload,
    )  # fmt: skip
    policy.tokenizer.eos_token = None
    policy.model.generation_config.eos_token_id = policy.model.get_base_model().generation_config.eos_token_id = None
    engine = TorchEngine(policy.model, policy.tokenizer, run.rollout, 0, kv_cache=choice.kv_cache)
    policy.limits = engine.limits = Limits()
    uneven, whole = worst_requests(case, policy), case.requests()
    memory = Scarce(most=plan.card.usable)
    memory.adopt([*model_tensors(policy.model), *policy_tensors(policy)])
    try:
        with memory:
            rollouts = engine.generate(uneven, 0, settings=run.rollout.model_copy(update={"concurrent": choice.concurrent}))
            batch = collate([scored(rollout, i, case.rewards, whole[i]) for i, rollout in enumerate(rollouts)], weights, case.response, LATE)
            parts = plan.split(batch.sequence_length)
            readout = policy.read_whole(batch, algorithm.reads_before, parts) if algorithm.reads_before else Readout()
            credit = algorithm.credit(batch, readout)
            for number in range(policy.directions.passes if policy.directions else 1):
                accumulate(algorithm, policy, batch, credit, parts)
                if policy.directions is not None and number == 0:
                    policy.directions.gram()
                    policy.turn([1.0] * policy.directions.count, {})
            policy.update()
    except Exception as error:                                       # whatever it was: the table tells
        return memory, f"{type(error).__name__}: {error}"
    return memory, ""


def main(arguments: list[str]) -> None:
    """Prints a line a case and a summary, and writes both."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory overrun", description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    source, outcomes, start, skipped = random.Random(asked.seed), [], time.time(), 0
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(draw(asked.count, asked.seed)):
            outcome = try_it(replace(case, offload=False), Path(folder) / "model", source)
            if outcome is None:
                skipped += 1
                continue
            outcomes.append(outcome)
            if outcome.refused or outcome.error or (outcome.share < ENOUGH and not outcome.bound):
                print(f"{number:>4}  {outcome.share:6.1%}  refused {outcome.refused}  {outcome.error}  {outcome.what}", flush=True)
    text = summary(outcomes, skipped, time.time() - start)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "overrun.md").write_text(f"`python -m bench.memory overrun --count {asked.count} --seed {asked.seed}`\n\n{text}\n")


def summary(outcomes: list[Outcome], skipped: int, seconds: float) -> str:
    """As Markdown."""
    able = [o for o in outcomes if not o.bound]
    return "\n".join([
        f"- {len(outcomes)} configurations within an enforced budget ({skipped} more were told beforehand that they would not fit)",
        f"- steps that did not end: {sum(bool(o.error) for o in outcomes)}",
        f"- predicted to fit and had an allocation refused: {sum(o.refused > 0 for o in outcomes)}",
        f"- share of the budget at the peak: median {median(o.share for o in outcomes):.1%}, least {min(o.share for o in outcomes):.1%}",
        f"- could have used more and stayed below {ENOUGH:.0%}: {sum(o.share < ENOUGH for o in able)} "
        f"(everything at once already: {sum(o.bound.startswith('everything') for o in outcomes)}, one more row would not fit: "
        f"{sum(o.bound.startswith('one') for o in outcomes)}, loading or exporting takes more: {sum(o.bound.startswith('loading') for o in outcomes)})",
        f"- {seconds / 60:.1f} minutes",
    ])  # fmt: skip


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
