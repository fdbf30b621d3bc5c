"""Real exported files and a real run, made once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from localrl.cli import main
from localrl.config import load_run
from localrl.engines.llama_cpp import LlamaModel
from localrl.export import Sample, export
from localrl.run import train_run
from tests.displays import Silent


@pytest.fixture(scope="session", autouse=True)
def _close_null_files() -> Iterator[None]:
    """llama-cpp-python never closes its two /dev/null, which Python mentions at exit."""
    yield
    from llama_cpp import _utils

    _utils.outnull_file.close()
    _utils.errnull_file.close()


def adapted(folder: Path, seed: int) -> tuple[Any, Any]:
    """(live model with an adapter of random weights, tokenizer)."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"), adapter_name="policy").train()
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model, PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="session")
def trained(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """(live model, tokenizer, folder with model-merged-f32, model-base-f32, model-adapter-f32 and another-adapter-f32)."""
    folder = make_model("llama")
    out = tmp_path_factory.mktemp("gguf")
    model, tokenizer = adapted(folder, seed=3)
    told = [Sample(tuple(tokenizer("Hello there")["input_ids"]))]
    for what in ("merged", "adapter"):
        export(model, tokenizer, out, what=what, dtype="f32", samples=told)  # type: ignore[arg-type]
    other, _ = adapted(folder, seed=4)
    export(other, tokenizer, out, what="adapter", dtype="f32", samples=told, name="another", base=out / "model-base-f32.gguf")
    return model, tokenizer, out


@pytest.fixture(scope="session")
def merged(trained: tuple[Any, Any, Path]) -> LlamaModel:
    return LlamaModel(trained[2] / "model-merged-f32.gguf", threads=1)


@pytest.fixture(scope="session")
def base(trained: tuple[Any, Any, Path]) -> LlamaModel:
    return LlamaModel(trained[2] / "model-base-f32.gguf", threads=1)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of the demo model: checkpoint-1 and checkpoint-2, nothing exported yet."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "small"
    few = ["steps=2", "rollout.prompts_per_step=2", "rollout.num_generations=4", "eval.limit=0", "log.save_steps=1", "optim.learning_rate=1e-3"]
    train_run(load_run("demo", None, [*few, f"log.dir='{folder}'"]), Silent())
    torch.set_num_threads(threads)
    return folder


Shell = Callable[..., tuple[int, str, str]]


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    """`shell("chat", "x.gguf")` -> (exit code, what it printed, what it complained of), in this process."""

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["localrl", *words])
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        torch.set_num_threads(threads)
        printed = capsys.readouterr()
        return int(end.value.code or 0), printed.out, printed.err

    return call


def sentence(code: int, out: str, err: str) -> str:
    """What a failed command says: exit code 2, and one line."""
    assert code == 2, out + err
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("localrl: "), err
    return lines[0]
