"""A file that is not the model is caught and put aside; one that is cancelled leaves nothing; what no GGUF can hold is refused before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from transformers import AutoConfig, PreTrainedTokenizerFast

from localrl.export import Sample, check_exportable, export
from localrl.settings import UserError

Live = Callable[..., tuple[Any, Any]]
Samples = Callable[[Any], list[Sample]]
Damage = Callable[[Path], None]


def undo_interleaving(path: Path) -> None:
    """q and k as transformers has them: the classic silent mistake, text stays plausible."""
    for tensor in GGUFReader(path, "r+").tensors:
        if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            rows = tensor.data
            heads = {"q": 4, "k": 2}[tensor.name[len("blk.0.attn_")]]
            rows[:] = rows.reshape(heads, len(rows) // heads // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape).copy()


def undo_interleaving_q8(path: Path) -> None:
    """The same in a quantised file: whole rows change places."""
    for tensor in GGUFReader(path, "r+").tensors:
        if tensor.name.endswith("attn_q.weight"):
            rows = tensor.data
            rows[:] = rows.reshape(4, len(rows) // 8, 2, -1).swapaxes(1, 2).reshape(rows.shape).copy()


def flip_bytes(path: Path) -> None:
    """A few bytes of one matrix."""
    tensor = next(t for t in GGUFReader(path, "r+").tensors if t.name == "blk.1.ffn_up.weight")
    tensor.data.view(np.uint8)[3, 64:72] ^= 0x40


def wrong_epsilon(path: Path) -> None:
    """A norm's epsilon, which moves the distribution by a millionth."""
    field = GGUFReader(path, "r+").fields["llama.attention.layer_norm_rms_epsilon"]
    field.parts[field.data[0]][0] = 1e-5


def wrong_eos(path: Path) -> None:
    """Another end token: it would never stop."""
    field = GGUFReader(path, "r+").fields["tokenizer.ggml.eos_token_id"]
    field.parts[field.data[0]][0] = 65


def other_token(path: Path) -> None:
    """One letter of the vocabulary is another's."""
    reader = GGUFReader(path, "r+")
    field = reader.fields["tokenizer.ggml.tokens"]
    first, second = (field.parts[field.data[i]] for i in (40, 41))
    first[0], second[0] = second[0].copy(), first[0].copy()


def other_template(path: Path) -> None:
    """One letter of the chat template."""
    field = GGUFReader(path, "r+").fields["tokenizer.chat_template"]
    text = field.parts[field.data[0]]
    text[bytes(text).index(b"assistant")] = ord("A")


def no_gguf(path: Path) -> None:
    """Rubbish at the front."""
    with path.open("r+b") as stream:
        stream.write(b"FUGG")


def cut_short(path: Path) -> None:
    """As after a full disk."""
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size // 2)


def other_place(path: Path) -> None:
    """A template that is off by a line break, at its end, where rendering hardly shows it."""
    rewrite(path, "tokenizer.chat_template", lambda text: text + "\n")


def first_line(path: Path) -> None:
    """A template that is off by a line break within each message."""
    rewrite(path, "tokenizer.chat_template", lambda text: text.replace("<|im_end|>\n", "<|im_end|>"))


def beginning(path: Path) -> None:
    """A beginning that nobody asked for."""
    field = GGUFReader(path, "r+").fields["tokenizer.ggml.add_bos_token"]
    field.parts[field.data[0]][0] = True


def rewrite(path: Path, key: str, change: Callable[[str], str]) -> None:
    """The same file with one string changed, which may be longer or shorter."""
    reader = GGUFReader(path)
    copy = path.with_name("rewritten")
    writer = GGUFWriter(copy, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = field.contents()
        kind, inner = field.types[0], field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, change(value) if field.name == key else value, kind, inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    copy.replace(path)


def plant(damage: Damage, file: Path, at: int = 1) -> Callable[[int, int, str], None]:
    """A progress that damages `file` just before the `at`-th check."""
    checks: list[str] = []

    def interfere(done: int, total: int, name: str) -> None:
        if name == "self-check":
            checks.append(name)
            if len(checks) == at:
                damage(file)

    return interfere


FAULTS = [
    (undo_interleaving, "mean KL"),
    (flip_bytes, "logits"),
    (flip_bytes, "weights"),
    (wrong_epsilon, "mean KL"),
    (wrong_epsilon, "keys"),
    (wrong_eos, "end tokens"),
    (wrong_eos, "special tokens"),
    (beginning, "special tokens"),
    (other_token, "tokens"),
    (other_template, "chat template"),
    (other_place, "stored template"),
    (first_line, "chat template"),
    (no_gguf, "loads"),
    (cut_short, "loads"),
]


@pytest.mark.parametrize(("damage", "named"), FAULTS)
def test_a_damaged_file_is_caught_and_put_aside(damage: Damage, named: str, live: Live, samples: Samples, tmp_path: Path) -> None:
    model, tokenizer = live("llama", "none", tie_word_embeddings=True)
    fault = plant(damage, tmp_path / "model-merged-f32.gguf.tmp")
    with pytest.raises(UserError, match=named):
        export(model, tokenizer, tmp_path, what="merged", dtype="f32", samples=samples(tokenizer), progress=fault)
    name = "model-merged-f32.gguf.failed"
    assert sorted(p.name for p in tmp_path.iterdir()) == [name, f"{name}.check.json", f"{name}.check.md"]
    report = json.loads((tmp_path / f"{name}.check.json").read_text())
    assert report["passed"] is False
    assert report["sha256"] == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    assert named in [row["name"] for row in report["checks"] if not row["passed"]]
    assert f"| FAILED {named} |" in (tmp_path / f"{name}.check.md").read_text()


QUANTISED = [(undo_interleaving_q8, "weights"), (flip_bytes, "weights"), (wrong_epsilon, "keys"), (wrong_eos, "end tokens"), (cut_short, "loads")]


@pytest.mark.parametrize(("damage", "named"), QUANTISED)
def test_damage_that_comes_with_quantising_shows_as_well(damage: Damage, named: str, live: Live, samples: Samples, tmp_path: Path) -> None:
    model, tokenizer = live("llama", "none", tie_word_embeddings=True)
    fault = plant(damage, tmp_path / "model-merged-q8_0.gguf.tmp", at=2)
    with pytest.raises(UserError, match=named):
        export(model, tokenizer, tmp_path, what="merged", dtype="q8_0", samples=samples(tokenizer), progress=fault)
    assert {p.name for p in tmp_path.glob("*.failed")} == {"model-merged-q8_0.gguf.failed"}
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob("*.tmp"))


def scaled_twice(path: Path) -> None:
    """An adapter's alpha as PEFT's configuration has it, while its scaling lies in B already: what rsLoRA and patterns come to elsewhere."""
    field = GGUFReader(path, "r+").fields["adapter.lora.alpha"]
    field.parts[field.data[0]][0] = 16.0


@pytest.mark.parametrize("dtype", ["f32", "q8_0"])
def test_an_adapter_of_the_wrong_scale_is_caught(dtype: Any, live: Live, samples: Samples, tmp_path: Path) -> None:
    model, tokenizer = live("llama", "none", lora={"use_rslora": True})
    fault = plant(scaled_twice, tmp_path / f"model-adapter-{dtype}.gguf.tmp", at=2 if dtype == "f32" else 3)
    with pytest.raises(UserError, match="mean KL"):
        export(model, tokenizer, tmp_path, what="adapter", dtype=dtype, samples=samples(tokenizer), progress=fault)
    assert {p.name for p in tmp_path.glob("*.gguf*") if p.suffix in (".gguf", ".failed")} == {
        f"model-base-{dtype}.gguf", f"model-adapter-{dtype}.gguf.failed",
    }  # fmt: skip


@pytest.mark.parametrize("at", ["blk.0.attn_v.weight", 1, 2])
def test_cancelled_leaves_nothing(at: str | int, live: Live, samples: Samples, tmp_path: Path) -> None:
    """While it writes, before the parent's check, and before that of what was made from it."""
    model, tokenizer = live("llama", "nf4")
    seen: list[str] = []

    def cancel(done: int, total: int, name: str) -> None:
        seen.append(name)
        if name == at or seen.count("self-check") == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(model, tokenizer, tmp_path / "new", what="merged", dtype="f16", samples=samples(tokenizer), progress=cancel)
    assert list(tmp_path.iterdir()) == []


def test_an_older_export_survives_a_failing_one(live: Live, samples: Samples, tmp_path: Path) -> None:
    model, tokenizer = live("llama", "none")
    good = tmp_path / "model-merged-f32.gguf"
    good.write_bytes(b"an older export")
    with pytest.raises(UserError, match="loads"):
        export(
            model, tokenizer, tmp_path, what="merged", dtype="f32", samples=samples(tokenizer),
            progress=lambda done, total, name: no_gguf(good.with_name(good.name + ".tmp")) if name == "self-check" else None,
        )  # fmt: skip
    assert good.read_bytes() == b"an older export"


@pytest.mark.parametrize(
    ("lora", "word"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"target_modules": ".*(lm_head|q_proj)"}, "lm_head"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens"),
    ],
)
def test_adapters_that_no_gguf_can_hold_are_refused_before_training(lora: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        check_exportable(AutoConfig.for_model("llama"), lora)


@pytest.mark.parametrize(
    ("family", "changes", "word"),
    [
        ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping"),
        ("llama", {"hidden_act": "gelu"}, "gelu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
    ],
)
def test_models_that_llama_cpp_computes_differently_are_refused(family: str, changes: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        check_exportable(AutoConfig.for_model(family, **changes), {})


def test_live_models_are_looked_at_too(live: Live, samples: Samples, tmp_path: Path) -> None:
    model, tokenizer = live("llama", lora={"target_modules": ["q_proj", "lm_head"]})
    with pytest.raises(UserError, match="lm_head"):
        export(model, tokenizer, tmp_path, what="merged", dtype="f32", samples=samples(tokenizer))
    model, tokenizer = live("llama", lora={"use_dora": True})
    with pytest.raises(UserError, match="use_dora"):
        export(model, tokenizer, tmp_path, what="adapter", dtype="f32", samples=samples(tokenizer))
    model, tokenizer = live("llama")
    with pytest.raises(UserError, match="no adapter 'critic'"):
        export(model, tokenizer, tmp_path, what="merged", dtype="f32", samples=samples(tokenizer), adapter="critic")
    with pytest.raises(UserError, match="on prompts"):
        export(model, tokenizer, tmp_path, what="merged", dtype="f32", samples=[])
    with pytest.raises(UserError, match="q4_x"):
        export(model, tokenizer, tmp_path, what="merged", dtype="q4_x", samples=samples(tokenizer))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_diverged_weights_are_refused(live: Live, samples: Samples, tmp_path: Path) -> None:
    model, tokenizer = live("llama")
    layer = model.get_base_model().model.layers[1].mlp.up_proj.lora_B["policy"].weight
    layer.data[0, 0] = 1e6
    with pytest.raises(UserError, match="65504"):
        export(model, tokenizer, tmp_path, what="merged", dtype="f16", samples=samples(tokenizer))
    layer.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        export(model, tokenizer, tmp_path, what="merged", dtype="f32", samples=samples(tokenizer))
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_without_an_end_is_refused(make_model: Callable[..., Path]) -> None:
    folder = make_model("llama")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    check_exportable(AutoConfig.from_pretrained(folder), {}, tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="end token"):
        check_exportable(AutoConfig.from_pretrained(folder), {}, tokenizer)


def test_types_that_do_not_fit_a_width_are_told(live: Live, samples: Samples, tmp_path: Path) -> None:
    model, tokenizer = live("llama", "none", intermediate_size=144)
    done = export(model, tokenizer, tmp_path, what="merged", dtype="q8_0", samples=samples(tokenizer))
    assert done.report.fallbacks == {f"blk.{i}.ffn_down.weight": "F16" for i in range(2)}
    assert done.report.types["F16"] == 2
    assert "2 of them are larger than asked" in done.report.to_markdown()


@pytest.mark.parametrize("dtype", ["q6_k", "q4_k_m", "iq4_xs"])
def test_k_quants_pass_and_a_flipped_byte_in_one_does_not(dtype: Any, live: Live, samples: Samples, tmp_path: Path) -> None:
    model, tokenizer = live("llama", "none", hidden_size=256, intermediate_size=256, initializer_range=0.05)
    told = samples(tokenizer)
    done = export(model, tokenizer, tmp_path, what="merged", dtype=dtype, samples=told)
    assert not done.report.fallbacks
    kind = {"q6_k": "Q6_K", "q4_k_m": "Q4_K", "iq4_xs": "IQ4_XS"}[dtype]
    assert done.report.types[kind] >= 6
    fault = plant(flip_bytes, tmp_path / f"model-merged-{dtype}.gguf.tmp", at=2)
    with pytest.raises(UserError, match=r"weights: 20 of 21 within .* first: blk\.1\.ffn_up\.weight"):
        export(model, tokenizer, tmp_path, what="merged", dtype=dtype, samples=told, progress=fault)


def test_cancelled_while_llama_cpp_quantises(live: Live, samples: Samples, tmp_path: Path) -> None:
    model, tokenizer = live("llama", "nf4")

    def cancel(done: int, total: int, name: str) -> None:
        if name == "quantising" and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(model, tokenizer, tmp_path, what="merged", dtype="q5_k_m", samples=samples(tokenizer), progress=cancel)
    assert list(tmp_path.iterdir()) == []
