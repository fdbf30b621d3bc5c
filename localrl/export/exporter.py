"""From the live model to a GGUF file that has been proven equal to it: read, write beside, check in a child, rename."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from localrl import __version__
from localrl.export.check import Agree, CheckReport, check
from localrl.export.expected import expect
from localrl.export.families import Value, family_of, hyperparameters
from localrl.export.reference import Parting, Sample, partings, reference
from localrl.export.tokenizer import read_vocabulary
from localrl.export.weights import adapter_sources, causal_lm, check_lora, check_model, model_sources, shape_of
from localrl.export.writer import FILE_TYPES, DType, Progress, write
from localrl.settings import UserError

What = Literal["merged", "adapter", "base"]


@dataclass(frozen=True)
class Export:
    """A file that passed."""

    path: Path
    report: CheckReport
    report_path: Path
    base: Path | None = None
    """For an adapter: the base model's GGUF that it was checked with."""


def check_exportable(config: Any, lora: Mapping[str, Any], tokenizer: Any | None = None, stop_ids: Sequence[int] = ()) -> None:
    """UserError if a model of this configuration, trained with this adapter, could not be exported. Ask before training.

    `config`: transformers' model configuration. `lora`: keys as in PEFT's LoraConfig, missing ones are its defaults. `tokenizer`: live, or
    None to leave it out. `stop_ids`: what ends a reply, beside the tokenizer's eos.
    """
    family_of(config)
    check_lora(lora)
    if tokenizer is not None:
        read_vocabulary(tokenizer, int(config.vocab_size), stop_ids)


def export(
    model: nn.Module,
    tokenizer: Any,
    out_dir: Path,
    *,
    what: What,
    dtype: DType,
    samples: Sequence[Sample],
    name: str = "model",
    adapter: str = "policy",
    base: Path | None = None,
    metadata: Mapping[str, int | float | bool | str] | None = None,
    stop_ids: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Export:
    """Write a GGUF of the live model and return once llama.cpp has been seen to agree with it; the model is only read.

    `what`: "merged" base + adapter in one file, "base" the base alone, "adapter" a small file to be used on a base GGUF: on `base`, or
    where that is None on one that is written (and checked) first. `dtype`: of the matrices, for an adapter those of its base; the adapter
    itself is F32 on an F32 base and F16 otherwise. `samples`: prompts and sampled answers on which the two are compared. `metadata`:
    written as `localrl.<key>`. `stop_ids`: what ends a reply; None: the generation config's and the tokenizer's. `progress`: called with
    bytes done, bytes in all and a tensor's name, last with "self-check".

    UserError if the model cannot be expressed, or the file does not say what the model says: it is then kept as `<file>.failed`.
    """
    if what not in get_args(What):
        raise UserError(f"what = '{what}' is not offered, only {', '.join(get_args(What))}")
    if dtype not in get_args(DType):
        raise UserError(f"dtype = '{dtype}' is not offered, only {', '.join(get_args(DType))}")
    if importlib.util.find_spec("llama_cpp") is None:
        raise UserError('exports are checked with llama-cpp-python, which is missing: CMAKE_ARGS="-DLLAVA_BUILD=OFF" pip install "localrl[chat]"')
    chosen = None if what == "base" else adapter
    check_model(model, chosen)
    config, rows = causal_lm(model).config, shape_of(causal_lm(model).model.embed_tokens)[0]
    keys: dict[str, Value]
    vocabulary = read_vocabulary(tokenizer, rows, generation_ends(model) if stop_ids is None else stop_ids)
    expected = expect(model, tokenizer, chosen, vocabulary, samples, rows)
    if what == "adapter":
        base = base or export(
            model, tokenizer, out_dir, what="base", dtype=dtype, samples=samples,
            name=name, metadata=metadata, stop_ids=stop_ids, progress=progress,
        ).path  # fmt: skip
        require_gguf(base)
        small: DType = "f32" if dtype == "f32" else "f16"
        sources, stored_as = adapter_sources(model, adapter, balanced=small == "f16"), small
        keys = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 0.0}  # PEFT's scaling lies in B; 0: times 1
    else:
        base, stored_as = None, dtype
        sources = model_sources(model, chosen)
        keys = {"general.type": "model", **origin_keys(config), **hyperparameters(config, rows), **vocabulary.keys}
    keys |= {"general.name": name, "general.file_type": FILE_TYPES[stored_as], "general.quantization_version": 2, **own_keys(metadata)}
    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / f"{name}-{what}-{dtype}.gguf"
    with scratch(path) as temporary:
        types = write(temporary, family_of(config).arch, keys, sources, stored_as, progress)
        if progress is not None:
            progress(1, 1, "self-check")
        on_base = None if base is None else temporary
        report = check(base or temporary, on_base, expected, judge_texts(model, chosen), file_name=path.name, what=what, dtype=dtype, types=types)
        return settle(temporary, path, report, base)


def judge_texts(model: nn.Module, adapter: str | None) -> Agree:
    """The model's word on greedy texts."""

    def agree(prompts: Sequence[Sequence[int]], written: Sequence[Sequence[int]]) -> list[Parting]:
        with reference(model, adapter):
            return partings(model, prompts, written)

    return agree


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """`path`.tmp, which is gone afterwards however this ends, unless it has been renamed."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def settle(temporary: Path, path: Path, report: CheckReport, base: Path | None) -> Export:
    """A file that passed gets its name, another is put aside under `.failed`; the report lies beside it. UserError for what failed."""
    final = path if report.passed else path.with_name(path.name + ".failed")
    beside = final.with_name(final.name + ".check.json")
    beside.write_text(replace(report, file=final.name).to_json(), encoding="utf-8")
    temporary.replace(final)
    if not report.passed:
        raise UserError(f"{final.name} does not say what the trained model says ({report.failures()}): do not use it, the report is {beside}")
    return Export(path, report, beside, base)


def generation_ends(model: nn.Module) -> list[int]:
    """Every end token of the live generation config."""
    ends = getattr(getattr(causal_lm(model), "generation_config", None), "eos_token_id", None)
    return [] if ends is None else [int(i) for i in ends] if isinstance(ends, list) else [int(ends)]


def origin_keys(config: Any) -> dict[str, Value]:
    """Which model this one was made from, as far as its configuration tells."""
    origin = str(getattr(config, "_name_or_path", "") or "")
    if not origin:
        return {}
    keys: dict[str, Value] = {"general.base_model.count": 1, "general.base_model.0.name": Path(origin).name}
    if origin.count("/") == 1 and not Path(origin).exists():  # a hub id, not a folder
        keys["general.base_model.0.repo_url"] = f"https://huggingface.co/{origin}"
    return keys


def own_keys(metadata: Mapping[str, int | float | bool | str] | None) -> dict[str, Value]:
    """The caller's facts under `localrl.`; loaders pass over keys they do not know. Empty strings cannot be told and are left out."""
    return {"localrl.version": __version__, **{f"localrl.{key}": value for key, value in (metadata or {}).items() if value != ""}}


def require_gguf(path: Path) -> None:
    """UserError unless a file begins as a GGUF does."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: export what = 'base' first, or leave base out")
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise UserError(f"{path} is not a GGUF file: export what = 'base' first, or leave base out")
