"""From the live model to GGUF files that have been proven equal to it: read, write beside, check in a child, rename.

Every model file begins with a parent in F32 (F16 above LARGE), which is compared strictly. The types that were asked for are made from it,
and the parent goes away unless it was one of them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, get_args

from torch import nn

from localrl.export.added import model_name
from localrl.export.check import Agree, check, looseness, sha256
from localrl.export.checkpoint import check_mergeable
from localrl.export.converted import converted, looseness_of, parameters_of, read_back, told, with_keys
from localrl.export.converter import Converter, converter_for
from localrl.export.expected import Expected, expect, few
from localrl.export.families import Value, family_of, head_width, hyperparameters
from localrl.export.heldout import HeldOut, grade
from localrl.export.made import MERGED, PROVEN, Made, better, loads
from localrl.export.metadata import general_keys, generation_ends, own_keys
from localrl.export.original import Original, any_quantised, merged_sources
from localrl.export.parents import ordered, parent_type, size
from localrl.export.quantize import quantize
from localrl.export.reference import Parting, Sample, partings, reference
from localrl.export.report import CheckReport, Row
from localrl.export.settle import CHECKS, ROOM, Export, scratch, settle
from localrl.export.shards import parts_row, scratch_folder, size_of, split
from localrl.export.tensors import Weights, against_model, against_parent, fallbacks, keys_of, keys_row
from localrl.export.tokenizer import Vocabulary, read_vocabulary
from localrl.export.weights import Source, adapter_sources, causal_lm, check_lora, check_model, shape_of
from localrl.export.writer import F16_MAX, FILE_TYPES, DType, Progress, write
from localrl.settings import INSTALL_LLAMA_CPP, UserError

What = Literal["merged", "adapter", "base"]
Merge = Literal["auto", "dequantized", "original"]
SHARD_SIZE = "48GB"
"""Above which a file comes in parts: the hub takes none of 50."""


def check_exportable(
    config: Any, lora: Mapping[str, Any], tokenizer: Any | None = None, stop_ids: Sequence[int] = (), converter: Path | None = None
) -> None:
    """UserError if a model of this configuration, trained with this adapter, could not be exported. Ask before training.

    `config`: transformers' model configuration. `lora`: keys as in PEFT's LoraConfig, missing ones are its defaults. `tokenizer`: live, or
    None to leave it out. `stop_ids`: what ends a reply, beside the tokenizer's eos. `converter`: llama.cpp's own, by its path.
    """
    if converter_for(config, converter) is None:
        check_lora(lora, family_of(config))
    if tokenizer is not None:
        read_vocabulary(tokenizer, int(config.vocab_size), stop_ids)


def require_llama_cpp() -> None:
    """UserError if there is nothing to check a file with."""
    if importlib.util.find_spec("llama_cpp") is None:
        raise UserError(f"exports are checked with llama-cpp-python, which is not installed: {INSTALL_LLAMA_CPP}")


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
    metadata: Mapping[str, Value] | None = None,
    stop_ids: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Export:
    """One file in one type, without rewards; everything as in `export_all`."""
    return export_all(
        model, tokenizer, out_dir, what=what, dtypes=[dtype], samples=samples, name=name, adapter=adapter, base=base, metadata=metadata,
        stop_ids=stop_ids, progress=progress,
    )[0]  # fmt: skip


def export_all(
    model: nn.Module,
    tokenizer: Any,
    out_dir: Path,
    *,
    what: What,
    dtypes: Sequence[DType],
    samples: Sequence[Sample],
    name: str = "model",
    adapter: str = "policy",
    base: Path | None = None,
    metadata: Mapping[str, Value] | None = None,
    stop_ids: Sequence[int] | None = None,
    progress: Progress | None = None,
    held_out: HeldOut | None = None,
    merge: Merge = "dequantized",
    original: Original | None = None,
    shard_size: str = SHARD_SIZE,
    converter: Path | None = None,
) -> list[Export]:
    """Write GGUFs of the live model and return once llama.cpp has been seen to agree with it; the model is only read.

    `what`: "merged" base + adapter in one file, "base" the base alone, "adapter" a small file to be used on a base GGUF: on `base`, or
    where that is None on one that is written (and checked) first. `dtypes`: of the matrices, a file each, for an adapter those of its bases;
    the adapter itself is F32 on an F32 base and F16 otherwise. `samples`: prompts and sampled answers on which the two are compared.
    `metadata`: written as `localrl.<key>`, or as it stands if it begins with `general.`. `stop_ids`: what ends a reply; None: the generation
    config's and the tokenizer's. `progress`: called with bytes done, bytes in all and a tensor's name, before every check with "self-check".
    `held_out`: the live model's answers whose rewards a file has to keep. `merge`: into the weights that were trained on (de-quantised), or into
    the `original` ones; auto: whichever keeps more of the reward, de-quantised where that cannot be told. `shard_size`: a model file that is larger
    comes in parts, see `shards.py`. `converter`: llama.cpp's own, by its path, see `converter.py`.

    UserError if the model cannot be expressed, or a file does not say what the model says: it is then kept as `<file>.failed`. Files that were
    complete before that stay.
    """
    for label, values, known in (("what", [what], get_args(What)), ("dtype", dtypes, get_args(DType)), ("merge", [merge], get_args(Merge))):
        if strange := [value for value in values if value not in known]:
            raise UserError(f"{label} = '{strange[0]}' is not offered, only {', '.join(known)}")
    most_bytes = size_of(shard_size)
    require_llama_cpp()
    merged_in = None if what == "base" else adapter
    if (script := converter_for(causal_lm(model).config, converter)) is None:
        check_model(model, merged_in)
    elif what == "adapter" or merge == "original":
        instead = "what = 'merged'" if what == "adapter" else "merge = 'auto'"
        raise UserError(f"llama.cpp's converter makes whole models, of the weights that were trained on: {instead}")
    else:
        check_mergeable(model, merged_in)
    job = Job(model, tokenizer, out_dir, name, samples, metadata or {}, stop_ids, progress, held_out, original, most_bytes, script)
    with job.folder():
        if what == "adapter":
            return job.adapters(adapter, list(dict.fromkeys(dtypes)), base)
        return job.models(what, merged_in, list(dict.fromkeys(dtypes)), merge)


@dataclass(frozen=True)
class Job:
    """What the files of one export have in common."""

    model: nn.Module
    tokenizer: Any
    out_dir: Path
    name: str
    samples: Sequence[Sample]
    metadata: Mapping[str, Value]
    stop_ids: Sequence[int] | None
    progress: Progress | None
    held_out: HeldOut | None
    original: Original | None
    most_bytes: int = size_of(SHARD_SIZE)
    converter: Converter | None = None
    start: float = field(default_factory=perf_counter)

    @property
    def config(self) -> Any:
        """transformers' configuration."""
        return causal_lm(self.model).config

    @property
    def rows(self) -> int:
        """Of the embedding."""
        return int(shape_of(causal_lm(self.model).model.embed_tokens)[0])

    @property
    def looseness(self) -> float:
        """By how much the strict limits are wider for this model."""
        return looseness_of(self.config) if self.converter else looseness(family_of(self.config).arch)

    @contextmanager
    def folder(self) -> Iterator[None]:
        """The folder, which is gone again if it was not there and nothing has come into it."""
        there = self.out_dir.exists()
        self.out_dir.mkdir(parents=True, exist_ok=True)
        try:
            yield
        finally:
            if not there and not any(self.out_dir.iterdir()):
                self.out_dir.rmdir()

    def path(self, what: str, dtype: str) -> Path:
        """What a file is called."""
        return self.out_dir / f"{self.name}-{what}-{dtype}.gguf"

    # -- models -------------------------------------------------------------------------------------------------------------

    def models(self, what: str, adapter: str | None, dtypes: Sequence[DType], merge: Merge) -> list[Export]:
        """The merged model or the base alone, in every type."""
        with ExitStack() as stack:
            parent = self.parent(stack, what, adapter, dtypes, merge)
            return [self.child(what, adapter, parent, dtype) for dtype in ordered(dtypes, parent.dtype)]

    def parent(self, stack: ExitStack, what: str, adapter: str | None, dtypes: Sequence[DType], merge: Merge) -> Made:
        """The file that all others are made from, proven. Of two ways to merge, the one that keeps more of the reward."""
        if self.converter is not None:
            return self.converted(stack, self.converter, what, adapter, dtypes)
        if adapter is None or not any_quantised(self.model):
            return self.first(stack, what, adapter, dtypes, None, "only")
        if merge == "original" and self.original is None:
            raise UserError("merge = 'original' needs the original weights, and they were not given: merge = 'dequantized'")
        scored = self.held_out is not None and bool(self.held_out.names)
        if merge == "dequantized" or self.original is None or (merge == "auto" and not scored):
            made = self.first(stack, what, adapter, dtypes, None, "dequantized")
            why = "The original weights are not at hand" if self.original is None else "No held-out rewards"
            return made if merge == "dequantized" else replace(made, notes=(*made.notes, f"{why}: not compared with a merge into the original weights."))
        if merge == "original":
            return self.first(stack, what, adapter, dtypes, self.original, "original")
        ours = self.graded(self.first(stack, what, adapter, dtypes, None, "dequantized"))
        if not ours.passed:  # it is the trained model: to prefer the other one now would hide a fault
            self.settle(ours, what, self.path(what, ours.dtype))
        theirs = self.first(stack, f"{what}-original", adapter, dtypes, self.original, "original")
        return better(ours, self.graded(theirs))

    def first(self, stack: ExitStack, what: str, adapter: str | None, dtypes: Sequence[DType], original: Original | None, merge: str) -> Made:
        """A parent, written and compared strictly. One that fails is put aside, and that is the end of it."""
        sources = merged_sources(self.model, adapter, original)
        dtype = parent_type(sum(size(s) for s in sources), dtypes)
        vocabulary = self.vocabulary()
        keys = self.keys("model", dtype, sum(map(size, sources)), vocabulary) | hyperparameters(self.config, self.rows)
        if adapter is not None:
            keys["localrl.merge"] = merge
        file = stack.enter_context(scratch(self.path(what, dtype)))
        expected = expect(self.model, self.tokenizer, adapter, vocabulary, self.samples, self.rows, original)
        made = self.write(file, keys, sources, dtype, None, expected, judge_texts(self.model, adapter, original))
        made = replace(made, notes=(MERGED[merge],) if adapter is not None else ())
        if not made.passed:
            self.settle(made, what, self.path(what, dtype))
        return made

    def converted(self, stack: ExitStack, converter: Converter, what: str, adapter: str | None, dtypes: Sequence[DType]) -> Made:
        """The parent as llama.cpp's own converter writes it, with this package's keys and vocabulary, compared strictly like any other."""
        dtype = parent_type(sum(p.numel() for p in causal_lm(self.model).parameters()), dtypes)
        vocabulary, path = self.vocabulary(), self.path(what, dtype)
        expected = expect(self.model, self.tokenizer, adapter, vocabulary, self.samples, self.rows, None)
        raw, file = (stack.enter_context(scratch(p)) for p in (path.with_name(path.name + ".converted"), path))
        self.say("converting")
        hashes = converted(converter, self.model, self.tokenizer, adapter, dtype, raw)
        keys = self.keys("model", dtype, parameters_of(raw), vocabulary) | ({"localrl.merge": "dequantized"} if adapter else {})
        with_keys(raw, file, keys)
        raw.unlink()
        self.say("self-check")
        rows, figures = check(file, None, expected, agree := judge_texts(self.model, adapter, None), dtype, self.looseness)
        weights = read_back(file, hashes) if loads(rows) else Weights(Row("weights", False, "not read", "all"), {}, {})
        written = (keys_row(file, keys),) if loads(rows) else ()
        made = Made(file, dtype, (*rows, *written, weights.row), figures, weights, expected, agree, notes=(told(converter),))
        if not made.passed:
            self.settle(made, what, path)
        return made

    def child(self, what: str, adapter: str | None, parent: Made, dtype: DType) -> Export:
        """One of the types that were asked for, from the parent."""
        path = self.path(what, dtype)
        with scratch(path) as file:
            if dtype == parent.dtype:
                return self.settle(self.graded(parent) if adapter is not None else parent, what, path)
            largest, where = parent.weights.largest
            if dtype == "f16" and largest > F16_MAX:
                raise UserError(f"the weight '{where}' reaches {largest:g}, beyond F16's {F16_MAX:g}: export with dtype = 'f32'")
            quantize(parent.file, file, dtype, self.progress)
            self.say("self-check")
            rows, figures = check(file, None, parent.expected, parent.agree, dtype, self.looseness)
            weights = against_parent(file, parent.file) if loads(rows) else Weights(Row("weights", False, "not read", "all"), {}, {})
            source = replace(weights, source=parent.weights.source)
            proven = tuple(replace(row, name=f"{row.name}, {parent.dtype} parent") for row in parent.rows if row.name in PROVEN)
            keys = (keys_row(file, keys_of(parent.file)),) if loads(rows) else ()
            made = replace(parent, file=file, dtype=dtype, rows=(*proven, *rows, *keys, weights.row), figures=figures, weights=source, graded=None)
            return self.settle(self.graded(made) if adapter is not None and made.passed else made, what, path)

    # -- adapters -----------------------------------------------------------------------------------------------------------

    def adapters(self, adapter: str, dtypes: Sequence[DType], base: Path | None) -> list[Export]:
        """The adapter for a base in every type: compared strictly on the bases' parent, then on the base that it is for."""
        if base is not None:
            require_gguf(base)
            return [self.adapter(adapter, dtype, base, None) for dtype in dtypes]
        with ExitStack() as stack:
            parent = self.parent(stack, "base", None, dtypes, "dequantized")
            found: list[Export] = []
            for dtype in ordered(dtypes, parent.dtype):
                path = self.child("base", None, parent, dtype).path
                found.append(self.adapter(adapter, dtype, path, None if dtype == parent.dtype else parent.file))
            return found

    def adapter(self, adapter: str, dtype: DType, base: Path, strict: Path | None) -> Export:
        """The adapter on one base. `strict`: the base that it was made from, on which the adapter is compared first."""
        small: DType = "f32" if dtype == "f32" else "f16"
        path, sources = self.path("adapter", dtype), adapter_sources(self.model, adapter, balanced=small == "f16")
        keys = self.keys("adapter", small, sum(map(size, sources))) | {"adapter.type": "lora"}
        keys["adapter.lora.alpha"] = 0.0  # PEFT's scaling lies in B; 0: times 1
        expected = expect(self.model, self.tokenizer, adapter, self.vocabulary(), self.samples, self.rows, None)
        agree = judge_texts(self.model, adapter, None)
        with scratch(path) as file:
            made = self.write(file, keys, sources, small, strict or base, expected, agree, limits=small if strict else dtype)
            if strict is not None and made.passed:
                self.say("self-check")
                rows, figures = check(base, file, expected, agree, dtype, self.looseness)
                again = tuple(replace(row, name=f"{row.name}, {dtype} base") for row in rows if row.name in ("loads", "mean KL", "first choice"))
                made = replace(made, rows=(*made.rows, *again), figures=figures)
            made = replace(made, dtype=dtype)
            return self.settle(self.graded(made, base) if made.passed else made, "adapter", path, base=base)

    # -- what both need -----------------------------------------------------------------------------------------------------

    def write(
        self, file: Path, keys: Mapping[str, Value], sources: Sequence[Source], dtype: DType, base: Path | None, expected: Expected, agree: Agree,
        limits: DType | None = None,
    ) -> Made:  # fmt: skip
        """A file of live weights, and what the check finds. `base`: for an adapter, what it is checked on. `limits`: of another type."""
        write(file, family_of(self.config).arch, keys, sources, dtype, self.progress)
        self.say("self-check")
        rows, figures = check(base or file, file if base else None, expected, agree, limits or dtype, self.looseness)
        weights = against_model(file, sources) if loads(rows) else Weights(Row("weights", False, "not read", "all"), {}, {})
        written = (keys_row(file, keys),) if loads(rows) else ()
        return Made(file, dtype, (*rows, *written, weights.row), figures, weights, expected, agree)

    def graded(self, made: Made, base: Path | None = None) -> Made:
        """With its rewards, if there is anything to compare and that was not done already."""
        if self.held_out is None or made.graded is not None:
            return made
        found = grade(base or made.file, made.file if base else None, self.held_out, cache_bytes(self.config))
        return replace(made, rows=(*made.rows, *found.rows), graded=found)

    def settle(self, made: Made, what: str, path: Path, *, base: Path | None = None) -> Export:
        """Report and name."""
        counts: dict[str, int] = {}
        for kind in made.weights.types.values():
            counts[kind] = counts.get(kind, 0) + 1
        report = CheckReport(
            file=path.name, what=what, dtype=made.dtype, bytes=made.file.stat().st_size, sha256=sha256(made.file), types=counts,
            seconds=perf_counter() - self.start, checks=made.rows, figures=made.figures, source=made.weights.source,
            fallbacks=fallbacks(made.file, made.dtype) if what != "adapter" and loads(made.rows) else {},
            rewards=made.graded.rewards if made.graded else {}, notes=made.notes,
        )  # fmt: skip
        if what == "adapter" or not made.passed or report.bytes <= self.most_bytes:
            return settle({made.file: path}, report, base)
        with scratch_folder(path) as folder:
            parts = split(made.file, path.name, folder, self.most_bytes, self.progress)
            self.say("self-check")
            rows, _ = check(parts[0], None, few(made.expected), made.agree, made.dtype, self.looseness)
            seen = tuple(replace(row, name=f"{row.name}, in parts") for row in rows if row.name in ("loads", "tokens", "mean KL"))
            same = (parts_row(made.file, parts, self.most_bytes),) if loads(rows) else ()
            return settle({part: path.with_name(part.name) for part in parts}, replace(report, checks=(*report.checks, *seen, *same)))

    def keys(self, kind: str, dtype: DType, parameters: int, vocabulary: Vocabulary | None = None) -> dict[str, Value]:
        """What the file says of itself, and its vocabulary."""
        own: dict[str, Value] = {"general.type": kind, "general.file_type": FILE_TYPES[dtype], "general.quantization_version": 2, CHECKS: " " * ROOM}
        keys = general_keys(self.name, self.config, parameters) | own | own_keys(self.metadata)
        if vocabulary is not None:
            keys |= vocabulary.keys
            keys["general.name"] = model_name(str(keys["general.name"]), vocabulary.takes_spaces)
        return keys

    def vocabulary(self) -> Vocabulary:
        """The tokenizer as GGUF has it."""
        return read_vocabulary(self.tokenizer, self.rows, generation_ends(self.model) if self.stop_ids is None else self.stop_ids)

    def say(self, what: str) -> None:
        """Between two tensors."""
        if self.progress is not None:
            self.progress(1, 1, what)


def cache_bytes(config: Any) -> int:
    """Keys and values of one token, in F16."""
    return int(config.num_hidden_layers) * int(config.num_key_value_heads or config.num_attention_heads) * head_width(config) * 4


def judge_texts(model: nn.Module, adapter: str | None, original: Original | None) -> Agree:
    """The model's word on greedy texts."""

    def agree(prompts: Sequence[Sequence[int]], written: Sequence[Sequence[int]]) -> list[Parting]:
        with reference(model, adapter, original):
            return partings(model, prompts, written)

    return agree


def require_gguf(path: Path) -> None:
    """UserError unless a file begins as a GGUF does."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: export what = 'base' first, or leave base out")
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise UserError(f"{path} is not a GGUF file: export what = 'base' first, or leave base out")
