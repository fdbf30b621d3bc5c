"""llama.cpp's own converter, for models without a row of ours: named by the person, asked first, run in its own process, its file proven like any other."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from gguf import GGUFReader
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from localrl.export import Export, Sample, check_exportable, export_all
from localrl.export.checkpoint import merged_state, save_merged
from localrl.export.converter import Converter, converter_for
from localrl.settings import UserError
from tests.conftest import byte_tokenizer, tiny_config

Live = Callable[..., tuple[Any, Any]]
Samples = Callable[[Any], list[Sample]]
KNOWN = "Supported models:\nTEXT models:\n  - GraniteForCausalLM\n  - LlamaForCausalLM\n"


def real() -> Path | None:
    """The real script, if somebody has llama.cpp's sources here."""
    place = os.environ.get("LLAMA_CPP_DIR")
    return Path(place) if place and (Path(place) / "convert_hf_to_gguf.py").is_file() else None


REAL = real()
needs_script = pytest.mark.skipif(REAL is None, reason="llama.cpp's sources are not here: set LLAMA_CPP_DIR to them")


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)


def script(folder: Path, converting: str, *, asked: str = f"sys.stderr.write({KNOWN!r})") -> Path:
    """A script that answers when asked what it supports, and otherwise does as told with sys.argv."""
    path = folder / "convert_hf_to_gguf.py"
    path.write_text(f"import os, sys, time\nif '--print-supported-models' in sys.argv:\n    {asked}\n    sys.exit(0)\n{converting}\n")
    return path


def export(model: Any, tokenizer: Any, folder: Path, *, what: Any, dtype: Any, samples: list[Sample], converter: Path | None = None) -> Export:
    return export_all(model, tokenizer, folder, what=what, dtypes=[dtype], samples=samples, converter=converter)[0]


def granite(*, tied: bool = True, lora: bool = True) -> tuple[Any, Any]:
    """A small model of a kind that has no row here, with an adapter that says something."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    changes = {"embedding_multiplier": 3.0, "residual_multiplier": 0.7, "logits_scaling": 2.0, "attention_multiplier": 0.3}
    config = tiny_config("granite", len(tokenizer) + 3, tie_word_embeddings=tied, **changes)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, tokenizer.eos_token_id, None
    model = AutoModelForCausalLM.from_config(config)
    model.config.architectures = ["GraniteForCausalLM"]
    if lora:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"), adapter_name="policy")
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.05)
    return model.train(), tokenizer


@needs_script
def test_a_model_without_a_row_is_converted_and_proven(samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = granite(tied=False)
    place = REAL
    assert place is not None
    done = export(model, tokenizer, tmp_path, what="merged", dtype="f32", samples=samples(tokenizer), converter=place)
    rows = {row.name: row for row in done.report.checks}
    assert rows["logits"].passed and rows["mean KL"].passed and rows["tokens"].passed and rows["chat template"].passed and rows["keys"].passed
    fields = GGUFReader(done.path).fields
    assert fields["general.architecture"].contents() == "granite"
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2", "this package's vocabulary, which the script would have refused"
    assert fields["localrl.merge"].contents() == "dequantized" and fields["general.quantized_by"].contents() == "localrl"
    assert "llama.cpp's own converter" in done.report.notes[0]
    assert len(done.report.source) == 21
    assert {p.name for p in tmp_path.iterdir()} == {
        "model-merged-f32.gguf", "model-merged-f32.gguf.check.json", "model-merged-f32.Modelfile", "README.md",
    }  # fmt: skip
    monkeypatch.setenv("LLAMA_CPP_DIR", str(place))
    small = export(model, tokenizer, tmp_path, what="merged", dtype="q8_0", samples=samples(tokenizer))
    assert small.report.types["Q8_0"] >= 14 and small.report.passed
    assert next(row for row in small.report.checks if row.name == "weights").detail.startswith("relative error")


@needs_script
def test_a_row_of_ours_and_the_converter_write_the_same_weights(live: Live, samples: Samples, tmp_path: Path) -> None:
    model, tokenizer = live("llama", "nf4")
    model.get_base_model().config.architectures = ["LlamaForCausalLM"]
    told = samples(tokenizer)
    ours = export(model, tokenizer, tmp_path / "ours", what="merged", dtype="f32", samples=told)
    theirs = export(model, tokenizer, tmp_path / "theirs", what="merged", dtype="f32", samples=told, converter=REAL)
    before, after = ({t.name: t.data for t in GGUFReader(file.path).tensors} for file in (ours, theirs))
    assert before.keys() == after.keys()
    assert all((before[name] == after[name]).all() for name in before), "de-quantised, merged, interleaved"


def test_without_one_the_refusal_says_how_to_get_it() -> None:
    config = AutoConfig.for_model("granite")
    with pytest.raises(UserError, match=r"'granite' cannot be written .* llama\.cpp's sources .* --converter or LLAMA_CPP_DIR"):
        check_exportable(config, {})


def test_it_is_asked_before_training_what_it_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = script(tmp_path, "")
    config = AutoConfig.for_model("granite", architectures=["GraniteForCausalLM"])
    check_exportable(config, {"target_modules": ["odd_name"]}, converter=place)
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    found = converter_for(config, None)
    assert found is not None and found.script == place.resolve()
    assert converter_for(AutoConfig.for_model("llama", architectures=["LlamaForCausalLM"]), None) is None, "what has a row is written here"
    with pytest.raises(UserError, match=r"does not know OddForCausalLM \(it knows 2 others\)"):
        converter_for(AutoConfig.for_model("granite", architectures=["OddForCausalLM"]), None)


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        ("raise RuntimeError('no module conversion')", "does not run .RuntimeError: no module conversion"),
        ("print('something else')", "does not run .it said nothing"),
    ],
)
def test_a_script_that_does_not_run_is_refused(asked: str, word: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=word):
        Converter.at(script(tmp_path, "", asked=asked), ["LlamaForCausalLM"])
    with pytest.raises(UserError, match=r"no converter at .*nowhere: get llama\.cpp's sources"):
        Converter.at(tmp_path / "nowhere", ["LlamaForCausalLM"])


@pytest.mark.parametrize("what", ["merged", "base"])
def test_a_script_that_fails_leaves_nothing(what: Any, samples: Samples, tmp_path: Path) -> None:
    model, tokenizer = granite()
    place = script(tmp_path, "open(sys.argv[3], 'w').write('half'); raise NotImplementedError('BPE pre-tokenizer was not recognized')")
    with pytest.raises(UserError, match=r"converter failed .NotImplementedError: BPE pre-tokenizer was not recognized"):
        export(model, tokenizer, tmp_path / "new", what=what, dtype="f16", samples=samples(tokenizer), converter=place)
    assert not (tmp_path / "new").exists()


def test_a_script_that_writes_another_model_is_caught(samples: Samples, tmp_path: Path) -> None:
    """It makes a good file of a model that was never trained: the logits differ."""
    model, tokenizer = granite()
    wrong, _ = live_llama(tokenizer)
    kept = export(wrong, tokenizer, tmp_path / "kept", what="base", dtype="f32", samples=samples(tokenizer)).path
    place = script(tmp_path, f"import shutil; shutil.copy({str(kept)!r}, sys.argv[3])")
    with pytest.raises(UserError, match="logits: "):
        export(model, tokenizer, tmp_path / "new", what="merged", dtype="f32", samples=samples(tokenizer), converter=place)
    left = {p.name for p in (tmp_path / "new").iterdir()}
    assert left == {f"model-merged-f32.gguf.failed{end}" for end in ("", ".check.json", ".check.md")}
    report = json.loads((tmp_path / "new" / "model-merged-f32.gguf.failed.check.json").read_text())
    assert "own converter" in report["notes"][0]


def live_llama(tokenizer: Any) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_config(tiny_config("llama", len(tokenizer) + 3, bos_token_id=None)).train(), tokenizer


def test_a_script_that_hangs_ends_with_ctrl_c(samples: Samples, tmp_path: Path) -> None:
    model, tokenizer = granite()
    note = tmp_path / "pid"
    place = script(tmp_path, f"open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(600)")

    def stop() -> None:
        while not note.exists() or not note.read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop, daemon=True).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        export(model, tokenizer, tmp_path / "new", what="merged", dtype="f32", samples=samples(tokenizer), converter=place)
    assert time.monotonic() - start < 60
    assert not psutil.pid_exists(int(note.read_text()))
    assert not (tmp_path / "new").exists()


def test_what_it_cannot_do_is_refused(live: Live, samples: Samples, tmp_path: Path) -> None:
    model, tokenizer = live("llama", "none", lora={"use_dora": True})
    model.get_base_model().config.architectures = ["LlamaForCausalLM"]
    place = script(tmp_path, "")
    told = samples(tokenizer)
    with pytest.raises(UserError, match=r"whole models, .* what = 'merged'"):
        export(model, tokenizer, tmp_path, what="adapter", dtype="f16", samples=told, converter=place)
    with pytest.raises(UserError, match="use_dora"):
        export(model, tokenizer, tmp_path, what="merged", dtype="f16", samples=told, converter=place)


@pytest.mark.parametrize("form", ["none", "nf4"])
def test_the_checkpoint_is_the_merged_model(form: str, live: Live, samples: Samples, tmp_path: Path) -> None:
    """Loaded by transformers it says what the live model says; a tied output layer is stored once."""
    model, tokenizer = live("llama", form, tie_word_embeddings=True)
    hashes = save_merged(model, tokenizer, "policy", tmp_path)
    assert "lm_head.weight" not in hashes and len(hashes) == len(merged_state(model, "policy"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.tensor([samples(tokenizer)[0].prompt])
    with torch.no_grad():
        assert torch.allclose(again(ids).logits, model(ids).logits, atol=2e-5 if form == "none" else 5e-3)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())

