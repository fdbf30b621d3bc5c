"""The plan's bytes, phase by phase, against the CPU allocator's own trace while the real policy, engine and exporter work.

The trace (torch.profiler's memory events) has every allocation, also those inside one operator, which no dispatch mode sees. What lives when
a phase begins is counted from the tensors themselves. Not in it: what is no tensor (numpy's arrays in an export, Python), and files that are
mapped into memory. What is moved to the host's memory to spare a card is taken out of the trace: on a CPU both are the same.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from bench.memory.cases import SEVERAL, Case, draw, model_of
from localrl.batch import Batch, Readout, Request, Rollout, collate
from localrl.devices import hearing_of_moves
from localrl.engines.decoder import misfit
from localrl.engines.torch import TorchEngine
from localrl.export.families import FAMILIES as EXPORTED
from localrl.export.families import family_of
from localrl.export.weights import causal_lm, model_sources
from localrl.export.writer import write
from localrl.memory.plan import MemoryPlan
from localrl.memory.work import PHASES, Phase
from localrl.policy.policy import Policy
from localrl.simulate.phases import LATE, calibrated
from localrl.simulate.solve import NotLinear
from localrl.train import accumulate

RESULTS = Path(__file__).parent / "results"
NO_TENSORS = ("margin", "the same as it is written")
"""Lines of the bill that the trace cannot see."""


class Step(NamedTuple):
    """One change of the allocator's bytes."""

    time: int
    size: int
    total: int
    """Since the trace began."""


@dataclass
class Trace:
    """What the allocator did."""

    steps: list[Step]

    @property
    def peak(self) -> int:
        """Bytes above the beginning."""
        return max((step.total for step in self.steps), default=0)

    @property
    def end(self) -> int:
        """Bytes that are left."""
        return self.steps[-1].total if self.steps else 0


@contextmanager
def traced(mapped: int = -1) -> Iterator[Trace]:
    """The allocations of what happens while it is open, known afterwards. `mapped`: size of a file whose mapping into memory is not one of them."""
    trace, moved = Trace([]), list[tuple[int, int]]()
    gc.collect()
    with hearing_of_moves(lambda tensor: moved.append((tensor.untyped_storage().data_ptr(), time.time_ns()))), profile(
        activities=[ProfilerActivity.CPU], profile_memory=True
    ) as recorded:
        yield trace
        gc.collect()
    waiting, events = list(recorded.profiler.kineto_results.experimental_event_tree()), []
    while waiting:
        node = waiting.pop()
        if node.tag == _EventType.Allocation and (of := node.extra_fields).device.type == "cpu" and abs(of.alloc_size) != mapped:
            events.append((node.start_time_ns, of.alloc_size, of.ptr))
        waiting += node.children
    events.sort(key=lambda event: event[0])
    _fill(trace, events, moved)


def _fill(trace: Trace, events: list[tuple[int, int, int]], moved: list[tuple[int, int]]) -> None:
    """Running sums, without tensors that moved to the host."""
    elsewhere: set[int] = set()
    for place, when in moved:
        made = [i for i, (at, size, address) in enumerate(events) if address == place and size > 0 and at <= when]
        if made:
            gone = next((i for i, (_, size, address) in enumerate(events) if i > made[-1] and address == place and size < 0), None)
            elsewhere |= {made[-1]} if gone is None else {made[-1], gone}
    total = 0
    for i, (at, size, _) in enumerate(events):
        total += 0 if i in elsewhere else size
        trace.steps.append(Step(at, size, total))


def storages(*tensors: Tensor | None) -> int:
    """Bytes of what these lie in, each storage once."""
    found = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(found.values())


def model_tensors(model: Any) -> list[Tensor]:
    """Parameters, buffers, and what bitsandbytes keeps beside them."""
    found = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if (state := getattr(getattr(module, "weight", None), "quant_state", None)) is not None:
            found += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        if (state := getattr(module, "state", None)) is not None and getattr(state, "SCB", None) is not None:
            found += [state.CB, state.SCB]
    return found


def policy_tensors(policy: Policy) -> list[Tensor]:
    """All that lasts between two phases of a step."""
    found = [*model_tensors(policy.model), *(policy.critic.parameters() if policy.critic is not None else ())]
    found += [p.grad for _, p in policy.trainable() if p.grad is not None]
    found += [value for state in policy.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    if policy.directions is not None:
        kept = [part for item in policy.directions._kept.values() for part in item if isinstance(part, Tensor)]
        found += [t for t in (*kept, policy.directions._table, policy.directions._update, policy.directions._weights) if t is not None]
    return found


def tensors_of(thing: Any) -> list[Tensor]:
    """Of a batch, a readout or a credit."""
    values = [getattr(thing, f.name) for f in fields(thing)] if isinstance(thing, Batch | Readout) else list(thing or ())
    return [value for value in values if isinstance(value, Tensor)]


def measure(case: Case, plan: MemoryPlan, folder: Path, traces: dict[str, Trace] | None = None) -> dict[Phase, int]:
    """Peak bytes of every phase of a step, worst case: responses run to the limit."""
    run, seen = case.run(folder), traces if traces is not None else {}
    algorithm, choice = calibrated(run.algorithm.for_sampler(exact=run.own_samples)), plan.choice
    peaks: dict[Phase, int] = {}

    def note(phase: Phase, before: int, trace: Trace) -> None:
        peaks[phase], seen[phase] = max(peaks.get(phase, 0), before + trace.peak), trace

    reads = algorithm.reads_before | algorithm.reads_during
    weights = run.rewards.weights
    with traced((folder / "model.safetensors").stat().st_size) as trace:
        policy = Policy.create(
            run, critic="value" in reads, checkpointing=choice.gradient_checkpointing, head_chunk=choice.head_chunk, directions=algorithm.directions(weights),
            kept_as=choice.directions, mlp_tile=choice.mlp_tile, offload=choice.offload,
        )  # fmt: skip
    mapped = storages(*policy_tensors(policy)) - trace.end           # parts of the file that serve as they are
    note("load", mapped, trace)
    policy.tokenizer.eos_token = None
    policy.model.generation_config.eos_token_id = policy.model.get_base_model().generation_config.eos_token_id = None
    requests, whole = worst_requests(case, policy), case.requests()
    before = storages(*policy_tensors(policy))
    engine = TorchEngine(policy.model, policy.tokenizer, run.rollout, 0, kv_cache=choice.kv_cache)
    with traced() as trace:
        rollouts = engine.generate(requests, 0, settings=run.rollout.model_copy(update={"concurrent": choice.concurrent}))
    note("rollout", before, trace)
    batch = collate([scored(rollout, i, case.rewards, whole[i]) for i, rollout in enumerate(rollouts)], weights, case.response, LATE)
    parts = plan.split(batch.sequence_length)
    before = storages(*policy_tensors(policy), *tensors_of(batch))
    columns = algorithm.reads_before or frozenset({"logp"})          # those of `optim.num_iterations` above 1
    with traced() as trace:
        readout = policy.read_whole(batch, columns, parts)
        credit = algorithm.credit(batch, readout)
    note("scoring", before, trace)
    for number in range(policy.directions.passes if policy.directions else 1):
        before = storages(*policy_tensors(policy), *tensors_of(batch), *tensors_of(readout), *tensors_of(credit))
        with traced() as trace:
            accumulate(algorithm, policy, batch, credit, parts)
            if policy.directions is not None and number == 0:
                policy.directions.gram()
                policy.turn([1.0] * policy.directions.count, {})
        note("backward", before, trace)
    before = storages(*policy_tensors(policy), *tensors_of(batch), *tensors_of(readout), *tensors_of(credit))
    with traced() as trace:
        policy.update()
    note("optimiser", before, trace)
    if case.family in EXPORTED:
        policy.optimizer.state.clear()
        before = storages(*model_tensors(policy.model))
        lm = causal_lm(policy.model)
        with traced() as trace:
            write(folder / "merged.gguf", family_of(lm.config).arch, {}, model_sources(policy.model, "policy"), "f16", None)
        note("export", before, trace)
    return peaks


def worst_requests(case: Case, policy: Policy) -> list[Request]:
    """What takes most to sample: for a model's own forward pass prompts that are not of one length, since it then needs a mask."""
    return case.requests(shorter=int(misfit(policy.model, case.prompt + case.response) is not None))


def scored(rollout: Rollout, number: int, rewards: int, request: Request | None = None) -> Rollout:
    """With rewards that differ, and as the answer to another request if one is given."""
    if len(rollout.tokens) == 0 or rollout.done:
        raise RuntimeError("a response ended: the worst case has none that does")
    marks = tuple(float((number * 7 + r * 3) % 5) for r in range(rewards))
    return Rollout(request or rollout.request, rollout.tokens, "", number % 2 == 0, LATE, rollout.logp, marks)


def predicted(plan: MemoryPlan) -> dict[Phase, int]:
    """The plan's own tensors: no margin, no libraries, no heap."""
    return {phase: sum(item.bytes for item in plan.lines(phase) if not item.name.startswith(NO_TENSORS)) for phase in PHASES}


class Row(NamedTuple):
    """One case, one phase."""

    case: Case
    phase: Phase
    predicted: int
    measured: int

    @property
    def error(self) -> float:
        """As a share of what was measured; above 0: more was predicted."""
        return self.predicted / self.measured - 1


def compare(case: Case, folder: Path, traces: dict[str, Trace] | None = None) -> list[Row]:
    """Every phase of one case."""
    with model_of(case, folder):
        plan = case.plan(case.run(folder))
        told, seen = predicted(plan), measure(case, plan, folder, traces)
    return [Row(case, phase, told[phase], seen[phase]) for phase in seen]


def summary(rows: list[Row]) -> str:
    """A table of errors, phase by phase."""
    lines = ["| phase | cases | median error | worst over | worst under |", "|---|---|---|---|---|"]
    for phase in PHASES:
        errors = [row.error for row in rows if row.phase == phase]
        if errors:
            lines.append(f"| {phase} | {len(errors)} | {median(abs(e) for e in errors):.2%} | {max(errors):+.2%} | {min(errors):+.2%} |")
    return "\n".join(lines)


def picture(rows: list[Row], path: Path) -> None:
    """Predicted against measured, and a histogram of errors for each phase."""
    figure, axes = plt.subplots(1, 1 + len(PHASES), figsize=(3 * (1 + len(PHASES)), 3), constrained_layout=True)
    for phase in PHASES:
        some = [row for row in rows if row.phase == phase]
        axes[0].scatter([row.measured / 2**20 for row in some], [row.predicted / 2**20 for row in some], s=4, label=phase)
    axes[0].set(xscale="log", yscale="log", xlabel="measured, MiB", ylabel="predicted, MiB")
    axes[0].axline((10, 10), (100, 100), color="grey", linewidth=0.5)
    axes[0].legend(fontsize=6)
    for axis, phase in zip(axes[1:], PHASES, strict=True):
        axis.hist([100 * row.error for row in rows if row.phase == phase], bins=40)
        axis.set(title=phase, xlabel="error, %")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(rows: list[Row], failed: list[str], seconds: float, command: str) -> str:
    """Everything that was found, as a page."""
    worst = sorted(rows, key=lambda row: -abs(row.error))[:15]
    cases = len({row.case for row in rows})
    lines = [f"# {cases} configurations, predicted against the allocator's trace", ""]
    lines += [f"`{command}`, {seconds:.0f} s; {len(failed)} more could not be planned.", ""]
    lines += [summary(rows), "", "![predicted against measured](truth.png)", "", "The worst:", ""]
    lines += ["| phase | predicted, MiB | measured, MiB | error | configuration |", "|---|---|---|---|---|"]
    lines += [f"| {r.phase} | {r.predicted / 2**20:.2f} | {r.measured / 2**20:.2f} | {r.error:+.2%} | {r.case.what} |" for r in worst]
    lines += ["", "Not planned:", "", *(f"- {what}" for what in failed)] if failed else []
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    """Run as many cases as asked for and write what was found."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory truth", description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=1, help=f"of so many cases the first; {SEVERAL}: each setting in one size")
    parser.add_argument("--processes", type=int, default=1, help="beside each other; bytes do not mind")
    asked = parser.parse_args(arguments)
    rows, failed = list[Row](), list[str]()
    start = time.perf_counter()
    cases = list(enumerate(draw(asked.count, asked.seed)[:: asked.every]))
    settings = [cases[i : i + SEVERAL] for i in range(0, len(cases), SEVERAL)]         # what is simulated for one serves the others
    with ProcessPoolExecutor(asked.processes, get_context("spawn"), _quiet) as pool:
        for number, what, found in chain.from_iterable(pool.map(_compare_all, settings)):
            if isinstance(found, str):                               # no plan at all: said, and not among the errors
                failed.append(f"{what}: {found}")
            else:
                rows += found
            print(f"{number:4d} {time.perf_counter() - start:6.1f} s  {found if isinstance(found, str) else _short(found)}  {what}", flush=True)
    text = report(rows, failed, time.perf_counter() - start, f"python -m bench.memory truth --count {asked.count} --seed {asked.seed} --every {asked.every}")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "truth.md").write_text(text)
    (RESULTS / "truth.csv").write_text(_table(rows))
    picture(rows, RESULTS / "truth.png")
    print(text)


def _quiet() -> None:
    warnings.filterwarnings("ignore")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()                                                      # what the libraries made: looking at it again takes longer than a phase


def _compare_all(cases: list[tuple[int, Case]]) -> list[tuple[int, str, list[Row] | str]]:
    """(number, words, what was found or why there is no plan) of each."""
    told: list[tuple[int, str, list[Row] | str]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, case in cases:
            try:
                told.append((number, case.what, compare(case, Path(folder) / f"model{number}")))
            except NotLinear as error:
                told.append((number, case.what, f"no plan: {error}"))
    return told


def _short(rows: list[Row]) -> str:
    return " ".join(f"{row.phase[:4]} {row.error:+.1%}" for row in rows)


def _table(rows: list[Row]) -> str:
    lines = ["phase,predicted,measured,error,configuration"]
    return "\n".join([*lines, *(f'{r.phase},{r.predicted},{r.measured},{r.error:.5f},"{r.case.what}"' for r in rows)]) + "\n"


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
