"""Before a weight is loaded: paths made absolute, the memory planned, data and logs read, rewards asked whether they can serve."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localrl.buffer import Log, read_log, without_log_columns
from localrl.config import Run
from localrl.data import DataSettings, PromptData, load_prompts
from localrl.engines.choice import check_engine
from localrl.export import check_exportable, require_llama_cpp
from localrl.folder import RunFolder
from localrl.memory.plan import MemoryPlan
from localrl.planning import model_config, plan_run
from localrl.policy.load import load_tokenizer
from localrl.rewards import Rewards
from localrl.settings import UserError

DEMO_DATA = Path(__file__).parent / "demo" / "data"


@dataclass(frozen=True)
class Prepared:
    """What can be known and checked before a weight is loaded."""

    run: Run
    plan: MemoryPlan
    tokenizer: Any
    data: PromptData
    log: Log | None = None
    """What is learned from instead of own samples."""


def anchor(run: Run, base: Path) -> Run:
    """The same run with its local paths absolute, so that it can be resumed from anywhere."""

    def absolute(path: str) -> str:
        if path == "demo":
            return path
        file, colon, rest = path.partition(":")
        return f"{(base / file).resolve()}{colon}{rest}" if (base / file).exists() else path

    specs = tuple(f.model_copy(update={"function": absolute(f.function)}) if ".py" in f.function else f for f in run.rewards.functions)
    data = {name: absolute(value) for name in ("path", "eval_path") if (value := getattr(run.data, name))}
    return run.model_copy(update={
        "model": run.model.model_copy(update={"path": absolute(run.model.path)}),
        "data": run.data.model_copy(update=data),
        "rewards": run.rewards.model_copy(update={"functions": specs}),
    })  # fmt: skip


def with_demo_data(data: DataSettings) -> DataSettings:
    """"demo" stands for the embedded task's files."""
    files = {name: str(DEMO_DATA / file) for name, file in (("path", "train.jsonl"), ("eval_path", "eval.jsonl")) if getattr(data, name) == "demo"}
    return data.model_copy(update=files)


def prepare(run: Run, say: Callable[[str], None]) -> Prepared:
    """Everything short of loading weights: the plan must fit, the data must read, the rewards must answer."""
    plan = plan_run(run, say)
    plan.check()
    run = run.model_copy(update={"optim": run.optim.model_copy(update={"optimizer": plan.work.optimizer})})
    check_engine(run.rollout, run.adapter, model_config(run))
    tokenizer = load_tokenizer(run.model)
    foresee_export(run, tokenizer, say)
    data = load_prompts(with_demo_data(run.data), tokenizer, run.seed, Path.cwd())
    for note in data.notes:
        say(note)
    if len(data.train) < run.rollout.prompts_per_step and not run.data.from_log:
        say(f"{len(data.train)} training prompts for rollout.prompts_per_step={run.rollout.prompts_per_step}: prompts will repeat within a step")
    if not run.data.from_log:
        return Prepared(run, plan, tokenizer, data)
    log = read_log(data.train, tokenizer, tokenizer.eos_token_id, run.rollout.max_completion_length)
    for note in log.notes:
        say(note)
    return Prepared(run, plan, tokenizer, without_log_columns(data), log)


def foresee_export(run: Run, tokenizer: Any, say: Callable[[str], None]) -> None:
    """Whether the result could be written as GGUF and proven there. Said, or with export.gguf = "required" a UserError: before training, not after."""
    if run.export.gguf == "off":
        return
    try:
        check_exportable(model_config(run), {"target_modules": run.adapter.lora_target_modules}, tokenizer,
                         converter=Path(run.export.converter) if run.export.converter else None)
        if run.export.gguf == "required":
            require_llama_cpp()
    except UserError as error:
        if run.export.gguf == "required":
            raise UserError(f"export.gguf = 'required', but {error} (or set export.gguf = 'off': the checkpoint is a PEFT adapter in any case)") from None
        say(f"this run can be trained but not exported to GGUF: {error} (export.gguf = 'off' stops this question)")


def check_run(run: Run, say: Callable[[str], None]) -> Prepared:
    """`prepare`, and the rewards started once and asked nothing: all that a dry run can find out."""
    if run.log.dir:
        RunFolder.refuse_if_used(Path(run.log.dir).expanduser().resolve())
    prepared = prepare(run, say)
    with open_rewards(run, prepared.data):
        return prepared


@contextmanager
def open_rewards(run: Run, data: PromptData, log: Path | None = None) -> Iterator[Rewards | None]:
    """The reward workers, up and checked against the data's columns. What the functions print goes to `log`, or to our stderr.

    None: a run from a log may have none."""
    if not run.rewards.functions:
        yield None
        return
    with Rewards(run.rewards, Path.cwd(), log) as rewards:
        rewards.check_columns(set(data.columns))
        yield rewards
