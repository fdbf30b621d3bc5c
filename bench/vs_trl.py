"""localrl against TRL's GRPOTrainer: the same model, quantisation, prompts, groups, lengths, optimiser and one thread, in one run.

    pip install -e ".[bench]"
    python bench/vs_trl.py                # both models; prints a table of ratios
    python bench/vs_trl.py --model demo --steps 12

Each side runs in a process of its own (so that each one's memory is its own), in turns, several times; ratios of medians are printed. Seconds are
CPU seconds of that process: with one thread that is the time on a quiet machine, and what else runs here does not count.
Memory is the peak of the resident set above what it was once the model, with its adapter, was loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHAPES = {
    "demo": {"prompts": 16, "group": 8, "length": 64},
    "25m": {"prompts": 4, "group": 8, "length": 64},
}
REWARDS = {"demo": "correct", "25m": "letters"}


def model_folder(name: str, into: Path) -> Path:
    """The embedded model, or a random Llama of 25 M parameters with the same tokenizer."""
    from localrl.policy.place import DEMO_MODEL

    if name == "demo":
        return DEMO_MODEL
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
                         num_key_value_heads=8, max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id)  # fmt: skip
    folder = into / name
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows(count: int) -> list[dict[str, Any]]:
    """The embedded task's training questions, in the file's order."""
    return [json.loads(line) for line in (ROOT / "localrl" / "demo" / "data" / "train.jsonl").read_text().splitlines()[:count]]


def resident() -> float:
    """MiB now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def peak() -> float:
    """MiB at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def correct(completions: Any, answer: Any, **_: Any) -> list[float]:
    """The embedded task's reward, the built-in one, for both sides."""
    from localrl.rewards.builtin import numeric_answer

    return [float(v or 0.0) for v in numeric_answer(completions=completions, answer=answer)]


def letters(completions: Any, **_: Any) -> list[float]:
    """For a random model, which no sum ever leaves: the share of small letters in what it says."""
    texts = [c[0]["content"] if isinstance(c, list) else c for c in completions]
    return [sum(ch.isascii() and ch.islower() for ch in text) / max(1, len(text)) for text in texts]


def run_trl(model: Path, shape: dict[str, int], reward: str, steps: int, quantization: str, rate: float) -> dict[str, Any]:
    """GRPOTrainer with NF4 and LoRA as its documentation has it."""
    import datasets
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    quant = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, quantization_config=quant if quantization == "nf4" else None)
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=shape["prompts"] * shape["group"], num_generations=shape["group"],
        max_completion_length=shape["length"], max_steps=steps, learning_rate=rate, lr_scheduler_type="constant", warmup_steps=0, beta=0.0,
        temperature=1.0, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, bf16=False, seed=0, optim="adamw_torch",
        max_grad_norm=1.0, weight_decay=0.0,
    )  # fmt: skip
    times: list[float] = []
    marks: dict[str, float] = {}

    class Timer(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            marks["loaded"] = resident()

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(time.process_time())

        def on_train_end(self, *_: Any, **__: Any) -> None:
            times.append(time.process_time())

    trainer = GRPOTrainer(
        model=base, args=config, reward_funcs=globals()[reward], train_dataset=datasets.Dataset.from_list(rows(steps * shape["prompts"])),
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"), callbacks=[Timer()],
    )  # fmt: skip
    trainer.train()
    log = [row for row in trainer.state.log_history if "reward" in row]
    lengths = [row["completions/mean_length"] for row in log]
    return report(times, [row["reward"] for row in log], lengths, shape, marks["loaded"])


def run_localrl(model: Path, shape: dict[str, int], reward: str, steps: int, quantization: str, rate: float) -> dict[str, Any]:
    """Ours, through the same room that the command line uses."""
    from localrl.config import build
    from localrl.interrupt import Interrupts
    from localrl.prepare import open_rewards, prepare
    from localrl.run import assemble
    from localrl.train import train

    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows(steps * shape["prompts"])))
        run = build({
            "model": {"path": str(model), "quantization": quantization, "device": "cpu"},
            "data": {"path": str(data), "holdout": 0, "shuffle": False},
            "rewards": {"functions": [f"{Path(__file__).resolve()}:{reward}"]},
            "algorithm": {"name": "grpo"}, "steps": steps, "optim": {"learning_rate": rate},
            "rollout": {"prompts_per_step": shape["prompts"], "num_generations": shape["group"], "max_completion_length": shape["length"]},
        })  # fmt: skip
        times, rewards, lengths = [], [], []

        class Timer:
            def phase(self, name: str) -> None:
                if name == "rollout":
                    times.append(time.process_time())

            def step(self, step: int, metrics: dict[str, float], *_: Any) -> None:
                rewards.append(metrics["reward"])
                lengths.append(metrics["completions/mean_length"])

            def rest(self, step: int) -> None: ...
            def say(self, text: str) -> None: ...
            def part(self, done: int, total: int) -> None: ...

        prepared = prepare(run, lambda text: None)
        timer = Timer()
        with open_rewards(run, prepared.data) as workers, assemble(prepared, workers, timer) as room, Interrupts() as interrupts:
            loaded = resident()
            train(room.session, timer, interrupts)
            times.append(time.process_time())
        return report(times, rewards, lengths, shape, loaded)


def report(times: list[float], rewards: list[float], lengths: list[float], shape: dict[str, int], loaded: float) -> dict[str, Any]:
    """One side's numbers; the first step (warm-up) is left out of the time."""
    seconds = [b - a for a, b in pairwise(times[1:])]
    tokens = statistics.mean(lengths[1:]) * shape["prompts"] * shape["group"]
    step = statistics.median(seconds)
    last = rewards[-max(1, len(rewards) // 4) :]
    return {"seconds": step, "tokens_per_second": tokens / step, "memory": peak() - loaded, "first": rewards[0], "reward": statistics.mean(last)}


def child(side: str, arguments: argparse.Namespace, model: Path) -> dict[str, Any]:
    """One side in a process of its own, with one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT),
                                "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}  # fmt: skip
    command = [sys.executable, __file__, "--side", side, "--folder", str(model), "--model", arguments.model, "--steps", str(arguments.steps),
               "--quantization", arguments.quantization, "--rate", str(arguments.rate)]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert isinstance(result, dict)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*SHAPES, "both"], default="both")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quantization", choices=["nf4", "none"], default="nf4")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--side", choices=["trl", "localrl"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        import torch

        torch.set_num_threads(1)
        side = run_trl if arguments.side == "trl" else run_localrl
        print(json.dumps(side(arguments.folder, SHAPES[arguments.model], REWARDS[arguments.model], arguments.steps, arguments.quantization, arguments.rate)))
        return
    print("| model | step rate | generated tokens/s | peak memory above the model | reward at the end, TRL / localrl (start) |\n|---|---|---|---|---|")
    for name in SHAPES if arguments.model == "both" else [arguments.model]:
        arguments.model = name
        with tempfile.TemporaryDirectory() as scratch:
            folder = model_folder(name, Path(scratch))
            runs = [(child("trl", arguments, folder), child("localrl", arguments, folder)) for _ in range(arguments.repeats)]
        middle = {key: [statistics.median(pair[i][key] for pair in runs) for i in range(2)] for key in runs[0][0]}
        speed, rate, memory = (middle["seconds"][0] / middle["seconds"][1], middle["tokens_per_second"][1] / middle["tokens_per_second"][0],
                               middle["memory"][1] / middle["memory"][0])  # fmt: skip
        ends = f"{middle['reward'][0]:.3f} / {middle['reward'][1]:.3f} ({middle['first'][1]:.3f})"
        print(f"| {name} | {speed:.2f}x | {rate:.2f}x | {memory:.2f}x | {ends} |", flush=True)
        print(json.dumps(middle), file=sys.stderr)


if __name__ == "__main__":
    main()
