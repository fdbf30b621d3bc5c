"""Modelfiles: a chat template is taken for a format only by what it renders, and the Go template renders the same."""

from __future__ import annotations

import re
from collections.abc import Callable

import jinja2
import jinja2.sandbox
import pytest

from localrl.export.ollama import DIALOGUES, FORMATS, Format, Messages, modelfile, recognise

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}" + CHATML
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA31 = LLAMA3.replace("{% for m", "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n\n<|eot_id|>{% for m")
PHI3 = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
PHI4 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}<|im_sep|>{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
)
GEMMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ first if loop.first else '' }}{{ m['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}{% elif m['role'] == 'user' %}"
    "[INST] {{ m['content'] }} [/INST]{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
MISTRAL3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}{% if m['role'] == 'user' %}"
    "[INST] {{ first if loop.first else '' }}{{ m['content'] }}[/INST]{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
OWN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
LINE_LESS = CHATML.replace("<|im_end|>\n", "<|im_end|>")

KNOWN = [
    (CHATML, "ChatML"), (QWEN, "ChatML"), (LLAMA3, "Llama-3"), (PHI3, "Phi-3"), (PHI4, "Phi-4"), (GEMMA2, "Gemma"), (GEMMA3, "Gemma"),
    (MISTRAL, "Mistral"), (MISTRAL3, "Mistral"),
]  # fmt: skip


def renderer(template: str) -> Callable[[Messages], str | None]:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def refuse(text: str) -> None:
        raise jinja2.TemplateError(text)

    def render(messages: Messages) -> str | None:
        try:
            made = environment.from_string(template)
            return made.render(messages=messages, add_generation_prompt=True, bos_token="<s>", eos_token="</s>", raise_exception=refuse)
        except jinja2.TemplateError:
            return None

    return render


def go(template: str, messages: Messages) -> str:
    """As much of Go's templates as is used: range over messages, if eq, if and, and values."""
    system = next((m["content"] for m in messages if m["role"] == "system"), "")
    parts = [part for part in re.split(r"(\{\{.*?\}\})", template) if part]
    opened = parts.index("{{ range $i, $m := .Messages }}")
    depth, closed = 1, opened
    while depth:
        closed += 1
        depth += parts[closed].startswith("{{ if") - (parts[closed] == "{{ end }}")
    text = "".join(parts[:opened])
    for i, message in enumerate(messages):
        shown = [True]
        for part in parts[opened + 1 : closed]:
            if found := re.fullmatch(r'\{\{ if eq \$m\.Role "(\w+)" \}\}', part):
                shown.append(shown[-1] and message["role"] == found[1])
            elif part == "{{ if and (eq $i 1) $.System }}":
                shown.append(shown[-1] and i == 1 and bool(system))
            elif part == "{{ end }}":
                shown.pop()
            elif shown[-1]:
                text += {"{{ $m.Content }}": message["content"], "{{ $.System }}": system}.get(part, part)
    assert "{{" not in text
    return text + "".join(parts[closed + 1 :])


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: f"{kind.name}-{FORMATS.index(kind)}")
def test_the_go_template_renders_as_the_row_does(kind: Format) -> None:
    for messages in DIALOGUES:
        if (wanted := kind.render(messages)) is not None:
            assert go(kind.go(), messages) == wanted


@pytest.mark.parametrize(("template", "name"), KNOWN)
def test_templates_are_recognised_by_what_they_render(template: str, name: str) -> None:
    render = renderer(template)
    found = recognise(render, "<s>")
    assert found is not None
    assert found.format.name == name
    for messages in DIALOGUES:
        wanted = render(messages)
        if wanted is None:
            continue
        told = messages
        if found.default_system and messages[0]["role"] != "system":
            told = [{"role": "system", "content": found.default_system}, *messages]
        assert found.begin + go(found.format.go(), told) == wanted
    assert found.begin == ("<s>" if "bos_token" in template else "")
    assert found.default_system == ("You are a helpful assistant." if template == QWEN else "")


@pytest.mark.parametrize("template", [OWN, LINE_LESS, LLAMA31, "{{ raise_exception('never') }}", CHATML + "<think>\n"])
def test_what_is_nearly_right_is_not_taken_for_it(template: str) -> None:
    assert recognise(renderer(template), "<s>") is None
    made = modelfile("x.gguf", None, None, adds_bos=False, ends=["</s>"], parameters={"temperature": "1"}, licence="")
    assert "\nTEMPLATE" not in made
    assert "# No TEMPLATE" in made


def test_a_modelfile() -> None:
    found = recognise(renderer(QWEN), "")
    made = modelfile("b.gguf", "a.gguf", found, adds_bos=True, ends=["<|im_end|>", 'a"b'], parameters={"temperature": "0.7", "num_ctx": "4096"}, licence="mit")
    assert made.splitlines()[:2] == ["FROM ./b.gguf", "ADAPTER ./a.gguf"]
    assert 'SYSTEM """You are a helpful assistant."""' in made
    assert 'PARAMETER stop "<|im_end|>"\nPARAMETER stop "a\\"b"\nLICENSE mit\n' in made
    assert "PARAMETER temperature 0.7\nPARAMETER num_ctx 4096\n" in made
    llama = recognise(renderer(LLAMA3), "<s>")
    for adds, begins in ((True, '"""{{ range'), (False, '"""<s>{{ range')):
        assert begins in modelfile("x.gguf", None, llama, adds_bos=adds, ends=[], parameters={}, licence="")
