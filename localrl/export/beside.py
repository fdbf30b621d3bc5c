"""What lies beside an exported file: a Modelfile for Ollama, and a README with its checks and the commands that use it.

All of it is read off the files themselves and their reports, and holds no path but names within the folder: it can be moved, or published.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from gguf import GGUFReader
from jinja2.sandbox import ImmutableSandboxedEnvironment

from localrl.export.ollama import Messages, modelfile, recognise
from localrl.export.report import CheckReport, Interval, RewardChange, Row
from localrl.export.shards import whole_name
from localrl.folder import write_whole

MERGE = "# Ollama reads no model in parts. First: llama-gguf-split --merge {part} {whole}\n"
MOST_CONTEXT = 8192
"""Tokens of context in the commands; a model that was trained for more can have more."""


@dataclass(frozen=True)
class Told:
    """What a model's GGUF tells about itself, as far as the files beside it need it."""

    template: str
    bos: str
    eos: str
    adds_bos: bool
    ends: tuple[str, ...]
    context: int
    temperature: float
    licence: str
    base_model: str

    @classmethod
    def of(cls, path: Path) -> Told:
        """Read off the file."""
        fields = GGUFReader(path).fields

        def get(key: str, default: Any) -> Any:
            return fields[key].contents() if key in fields else default

        def token(name: str) -> str:
            number = get(f"tokenizer.ggml.{name}_token_id", None)
            return "" if number is None else str(fields["tokenizer.ggml.tokens"].contents(number))

        ends = [text for name in ("eos", "eot", "eom") if (text := token(name))] + list(get("localrl.stop", []))
        arch, url = get("general.architecture", ""), get("general.base_model.0.repo_url", "")
        context = min(MOST_CONTEXT, int(get(f"{arch}.context_length", MOST_CONTEXT)))
        if f"{arch}.rope.scaling.attn_factor" in fields:  # longrope: with more room llama.cpp turns short texts too by the factors for long ones
            context = min(context, int(get(f"{arch}.rope.scaling.original_context_length", context)))
        return cls(
            template=get("tokenizer.chat_template", ""), bos=token("bos"), eos=token("eos"), adds_bos=bool(get("tokenizer.ggml.add_bos_token", False)),
            ends=tuple(dict.fromkeys(ends)), context=context,
            temperature=round(float(get("general.sampling.temp", 1.0)), 4), licence=get("general.license", ""),
            base_model=url.removeprefix("https://huggingface.co/"),
        )  # fmt: skip

    def render(self, messages: Messages) -> str | None:
        """A dialogue by the template within the file; None where it refuses."""
        def refuse(text: str) -> None:
            raise jinja2.TemplateError(text)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        named = {"bos_token": self.bos, "eos_token": self.eos, "raise_exception": refuse, "strftime_now": lambda form: time.strftime(form)}
        try:
            return environment.from_string(self.template).render(messages=messages, add_generation_prompt=True, **named)
        except jinja2.TemplateError:
            return None


def write_beside(path: Path, base: Path | None) -> None:
    """The Modelfile of a file that passed, and the folder's README anew. `base`: for an adapter, the model's GGUF that it goes on."""
    told = Told.of(base or path)
    relative = path.name if base is None else os.path.relpath(base, path.parent)
    whole = whole_name(relative)
    text = modelfile(
        whole, None if base is None else path.name, recognise(told.render, told.bos) if told.template else None, adds_bos=told.adds_bos, ends=told.ends,
        parameters={"temperature": f"{told.temperature:g}", "num_ctx": str(told.context)}, licence=told.licence,
    )  # fmt: skip
    merged = MERGE.format(part=relative, whole=whole) if whole != relative else ""
    write_whole(path.with_name(whole_name(path.name)).with_suffix(".Modelfile"), merged + text)
    write_whole(path.parent / "README.md", readme(path.parent, path, relative if base else None, told))


def readme(folder: Path, newest: Path, base: str | None, told: Told) -> str:
    """Every file of the folder that has a report, the newest first, each with its checks and how to use it."""
    bases = {path.name: adapter_base(path) for path in folder.glob("*.gguf")} | {newest.name: base}
    found = [newest, *sorted((p for p in folder.glob("*.gguf") if p != newest), key=lambda p: p.stat().st_mtime, reverse=True)]
    reports = {path.name: report for path in found if (report := read_report(path)) is not None}
    front = {"license": told.licence, "base_model": told.base_model, "library_name": "gguf", "pipeline_tag": "text-generation"}
    lines = ["---", *(f"{key}: {value}" for key, value in front.items() if value), "tags: [localrl, gguf]", "---", f"# {folder_title(newest)}", ""]
    lines += [
        "Trained with rewards by localrl and exported to GGUF. Each file was loaded by llama.cpp and compared with the trained model, as its table says;",
        "it carries a short form of that report within, as `localrl.checks`.",
        "",
        "| file | kind | size | mean KL, nats | held-out reward, trained model -> file |",
        "|---|---|---|---|---|",
    ]
    for name, report in reports.items():
        reward = report.rewards.get("reward")
        change = f"{reward.before} -> {reward.after}" if reward else ""
        lines.append(f"| `{name}` | {report.what}, {report.dtype} | {report.bytes / 2**20:,.1f} MiB | {report.figures['kl_mean']:.1e} | {change} |")
    for name, report in reports.items():
        lines += ["", f"## {name}", "", report.to_markdown().rstrip(), "", usage(name, bases.get(name), told)]
    return "\n".join(lines) + "\n"


def usage(name: str, base: str | None, told: Told) -> str:
    """Commands and a Python snippet for one file; they are run in its folder."""
    stem, model, lora = whole_name(name).removesuffix(".gguf"), base or name, f" --lora {name}" if base else ""
    sampling = f"--temp {told.temperature:g} --top-k 0 --top-p 1 --min-p 0"
    on_top = f', lora_path="{name}"' if base else ""
    if told.template:
        asked = 'create_chat_completion([{"role": "user", "content": "Hello"}]'
        shown = '["message"]["content"]'
    else:
        asked, shown = 'create_completion("Hello"', '["text"]'
    return "\n".join([
        "```sh",
        f"llama-cli -m {model}{lora} -c {told.context} {sampling}",
        f"llama-server -m {model}{lora} -c {told.context} {sampling}",
        *([f"llama-gguf-split --merge {model} {whole_name(model)}  # Ollama reads no model in parts"] if whole_name(model) != model else []),
        f"ollama create {stem} -f {stem}.Modelfile && ollama run {stem}",
        "```",
        "",
        "```python",
        "from llama_cpp import Llama",
        "",
        f'model = Llama("{model}"{on_top}, n_ctx={told.context}, verbose=False)',
        f"reply = model.{asked}, max_tokens=256, temperature={told.temperature:g}, top_k=0, top_p=1.0, min_p=0.0)",
        f'print(reply["choices"][0]{shown})',
        "model.close()",
        "```",
    ])  # fmt: skip


def folder_title(path: Path) -> str:
    """The export's name: what stands before the kind."""
    name = path.name
    for kind in ("merged", "adapter", "base"):
        name = name.split(f"-{kind}-")[0]
    return name


def adapter_base(path: Path) -> str | None:
    """What an adapter's Modelfile builds on; None for a model."""
    beside = path.with_suffix(".Modelfile")
    lines = beside.read_text("utf-8").splitlines() if beside.exists() else []
    if any(line.startswith("ADAPTER ") for line in lines):
        named = next(line.removeprefix("FROM ./") for line in lines if line.startswith("FROM "))
        first = sorted(path.parent.glob(named.removesuffix(".gguf") + "-00001-of-*.gguf"))
        return os.path.relpath(first[-1], path.parent) if first and not (path.parent / named).exists() else named
    return None


def read_report(path: Path) -> CheckReport | None:
    """The report beside a file, or None if there is none of this form."""
    beside = path.with_name(path.name + ".check.json")
    if not beside.exists():
        return None
    values: dict[str, Any] = json.loads(beside.read_text("utf-8"))
    if not values.pop("passed") or "source" not in values:
        return None
    rewards: Mapping[str, Any] = values["rewards"]
    values["rewards"] = {n: RewardChange(*(Interval(**change[k]) for k in ("before", "after", "change"))) for n, change in rewards.items()}
    values["checks"] = tuple(Row(**row) for row in values["checks"])
    values["notes"] = tuple(values["notes"])
    return CheckReport(**values)
