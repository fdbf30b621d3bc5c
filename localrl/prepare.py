"""Before a weight is loaded: paths made absolute, the memory planned, data and logs read, rewards asked whether they can serve."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from localrl.buffer import Log, read_log, without_log_columns
from localrl.config import Run, preset_model_config
from localrl.data import DataSettings, PromptData, load_prompts
from localrl.export import check_exportable
from localrl.folder import RunFolder
from localrl.memory.cards import Card
from localrl.memory.fit import shares_prompts
from localrl.memory.plan import MemoryPlan, choose
from localrl.memory.reality import correction, key
from localrl.memory.shape import ModelShape
from localrl.memory.work import Work
from localrl.policy.load import load_tokenizer, model_path, pick_device, pick_dtype
from localrl.rewards import Rewards
from localrl.settings import UserError
from localrl.simulate.provider import Simulated

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


def plan_for_card(run: Run, card: str | None = None, say: Callable[[str], None] = lambda text: None) -> MemoryPlan:
    """What a run would need on a card named here or in the settings, whatever this machine has; without a name, on this machine.

    `say` hears if something has to be simulated first, which takes some seconds.
    """
    card = card or run.memory.card
    if card is None or run.model.device == "cpu":
        return plan_run(run, say)
    dtype = torch.bfloat16 if run.model.compute_dtype == "auto" else getattr(torch, run.model.compute_dtype)
    return plan_on(run, model_config(run), Card.of(card, "cuda"), dtype, say)


def plan_run(run: Run, say: Callable[[str], None] = lambda text: None) -> MemoryPlan:
    """What every phase will need on the device that the run will train on, from the model's config alone."""
    device = pick_device(run.model)
    card = Card.of(run.memory.card, "cuda" if device.type == "cuda" else "cpu")
    return plan_on(run, model_config(run), card, pick_dtype(run.model, device), say)


def plan_on(run: Run, config: Any, card: Card, dtype: torch.dtype, say: Callable[[str], None] = lambda text: None) -> MemoryPlan:
    """The plan of a run with the model of a transformers config, activations in `dtype`, on that card."""
    shape = ModelShape.read(config.to_dict())
    algorithm, rollout, memory = run.algorithm, run.rollout, run.memory
    reads = algorithm.reads_before | algorithm.reads_during
    work = Work(
        quantization=run.model.quantization,
        compute_bytes=dtype.itemsize,
        lora_r=run.adapter.lora_r,
        lora_targets=run.adapter.lora_target_modules,
        critic="value" in reads,
        optimizer=run.optim.optimizer,
        prompts_per_step=rollout.prompts_per_step,
        num_generations=rollout.num_generations,
        max_prompt_length=run.data.max_prompt_length,
        max_completion_length=rollout.max_completion_length,
        reference="ref" in reads,
        device=card.device,
        unpacked=card.device == "cpu" if rollout.weights == "auto" else rollout.weights == "unpacked",
        fewest_generations=min(run.eval.num_generations if run.eval.limit and run.eval.temperature else 1, rollout.num_generations),
        truncated=bool(rollout.top_k) or rollout.top_p < 1,
        searchers=run.search.processes,
        gradients=len(algorithm.directions([spec.weight for spec in run.rewards.functions])),
    )  # fmt: skip
    asked = {
        "concurrent": rollout.concurrent,
        "micro_batch_tokens": memory.micro_batch_tokens,
        "gradient_checkpointing": memory.gradient_checkpointing,
        "head_chunk": memory.head_chunk,
        "mlp_tile": memory.mlp_tile,
        "offload": memory.offload,
        "kv_cache": memory.kv_cache or (None if may_differ(run, shape, work) else "full"),
        "embedding_on_host": memory.embedding_on_host,
        "directions": None if memory.directions == "auto" else memory.directions,
    }
    return choose(card, shape, work, asked, Simulated(config, run, dtype, card.device, say), correction(key(card, shape, work)))


def may_differ(run: Run, shape: ModelShape, work: Work) -> bool:
    """Whether the sampler may be another than the policy, as it is with 8-bit keys and values: the engine can, and the algorithm corrects for it."""
    return shares_prompts(shape, work) and (run.algorithm.learns_from_old or run.algorithm.for_sampler(exact=False).corrects)


def model_config(run: Run) -> Any:
    """As transformers reads it; for the presets' own models without a network."""
    path = preset_model_config(run.model.path) or model_path(run.model)
    try:
        return AutoConfig.from_pretrained(str(path), revision=run.model.revision)
    except (OSError, ValueError) as error:
        raise UserError(f"no model config from model.path = '{run.model.path}': {str(error).splitlines()[0]}") from None


def prepare(run: Run, say: Callable[[str], None]) -> Prepared:
    """Everything short of loading weights: the plan must fit, the data must read, the rewards must answer."""
    plan = plan_run(run, say)
    plan.check()
    tokenizer = load_tokenizer(run.model)
    try:
        check_exportable(model_config(run), {"target_modules": run.adapter.lora_target_modules}, tokenizer)
    except UserError as error:
        say(f"this run can be trained but not exported: {error}")
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
