"""Ollama's Modelfile. Its templates are Go, not Jinja, so the chat template within the GGUF is of no use to it.

A format is a row of a table, from which both a rendering and a Go template are made. A chat template is taken for a format only if it renders
dialogues exactly as the row does; otherwise the Modelfile has no TEMPLATE and says so. Ollama itself was not run here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Messages = list[dict[str, str]]
Render = Callable[[Messages], str | None]
"""A dialogue as the chat template opens the reply to it; None: the template refuses it."""


@dataclass(frozen=True)
class Format:
    """How a family of chat models writes a dialogue: what stands before and after each message, and what opens the reply."""

    name: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    opening: str
    system: tuple[str, str] | Literal["with user", "refused"]
    """A turn of its own, or in front of the first question, or not at all."""

    def render(self, messages: Messages) -> str | None:
        """The dialogue, without what begins a text."""
        text, system = "", ""
        for message in messages:
            role, content = message["role"], message["content"]
            if role == "system" and isinstance(self.system, str):
                system = content + "\n\n"
                if self.system == "refused":
                    return None
                continue
            before, after = self.system if role == "system" and not isinstance(self.system, str) else self.user if role == "user" else self.assistant
            text, system = f"{text}{before}{system if role == 'user' else ''}{content}{after}", system if role != "user" else ""
        return text + self.opening

    def go(self) -> str:
        """The same as a Go template. Ollama hands the system prompt over both as `.System` and as the first message."""
        turns = {"user": self.user, "assistant": self.assistant}
        if not isinstance(self.system, str):
            turns = {"system": self.system} | turns
        with_system = "{{ if and (eq $i 1) $.System }}{{ $.System }}\n\n{{ end }}" if self.system == "with user" else ""
        cases = [
            f'{{{{ if eq $m.Role "{role}" }}}}{before}{with_system if role == "user" else ""}{{{{ $m.Content }}}}{after}{{{{ end }}}}'
            for role, (before, after) in turns.items()
        ]
        return "{{ range $i, $m := .Messages }}" + "".join(cases) + "{{ end }}" + self.opening


def tagged(name: str, template: str, after: str, opening: str) -> Format:
    """A format that names the role in front of every message."""
    roles = {role: (template.format(role=role), after) for role in ("system", "user", "assistant")}
    return Format(name, roles["user"], roles["assistant"], opening, roles["system"])


FORMATS: tuple[Format, ...] = (
    tagged("ChatML", "<|im_start|>{role}\n", "<|im_end|>\n", "<|im_start|>assistant\n"),
    tagged("Llama-3", "<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    tagged("Phi-3", "<|{role}|>\n", "<|end|>\n", "<|assistant|>\n"),
    tagged("Phi-4", "<|im_start|>{role}<|im_sep|>", "<|im_end|>", "<|im_start|>assistant<|im_sep|>"),
    tagged("Phi-4-mini", "<|{role}|>", "<|end|>", "<|assistant|>"),
    *(
        Format("Gemma", ("<start_of_turn>user\n", "<end_of_turn>\n"), ("<start_of_turn>model\n", "<end_of_turn>\n"), "<start_of_turn>model\n", system)
        for system in ("with user", "refused")
    ),
    *(
        Format("Mistral", (f"{opens}[INST] ", closes), (before, "</s>"), "", system)
        for opens in ("", " ")
        for closes in (" [/INST]", "[/INST]")
        for before in ("", " ")
        for system in ("with user", "refused")
    ),
)

SYSTEM = "Answer with one word."
DIALOGUES: tuple[Messages, ...] = (
    [{"role": "user", "content": "Hi"}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?\nHello."}, {"role": "user", "content": "Again"}],
    [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Hi"}],
    [{"role": "system", "content": SYSTEM}, *({"role": r, "content": c} for r, c in (("user", "Hi"), ("assistant", "Yes?"), ("user", "Again")))],
)


@dataclass(frozen=True)
class Recognised:
    """A format, what stands in front of a dialogue, and the system prompt that the chat template brings of its own accord."""

    format: Format
    begin: str
    default_system: str


def recognise(render: Render, bos: str) -> Recognised | None:
    """The format of a chat template, by what it renders. `bos`: with which a dialogue may begin."""
    shown = [render(messages) for messages in DIALOGUES]
    for kind in FORMATS:
        found = matches(kind, shown)
        if found is not None and found.begin in ("", bos):  # anything else in front may be a date
            return found
    return None


def matches(kind: Format, shown: Sequence[str | None]) -> Recognised | None:
    """Whether a format renders the dialogues so, but for its beginning and a system prompt where the dialogue has none."""
    wanted = [kind.render(messages) for messages in DIALOGUES]
    if shown[0] is None or shown[1] is None or [w is None for w in wanted] != [s is None for s in shown]:
        return None
    told = shown[2] if shown[2] is not None else shown[0]
    plain = wanted[2] if shown[2] is not None else wanted[0]
    if plain is None or not told.endswith(plain):
        return None
    begin, system = told.removesuffix(plain), ""
    if shown[0] != begin + str(wanted[0]):
        system = own_system(kind, shown[0], begin)
        wanted[:2] = [kind.render([{"role": "system", "content": system}, *messages]) for messages in DIALOGUES[:2]] if system else wanted[:2]
    if all(s is None or s == begin + str(w) for s, w in zip(shown, wanted, strict=True)):
        return Recognised(kind, begin, system)
    return None


def own_system(kind: Format, text: str, begin: str) -> str:
    """The system prompt that a dialogue without one is rendered with; empty: none of this format."""
    marked = kind.render([{"role": "system", "content": "\0"}, *DIALOGUES[0]])
    before, _, after = ("" if marked is None else begin + marked).partition("\0")
    fits = bool(after) and text.startswith(before) and text.endswith(after)
    return text[len(before) : len(text) - len(after)] if fits else ""


def modelfile(
    file: str, adapter: str | None, recognised: Recognised | None, *, adds_bos: bool, ends: Sequence[str], parameters: Mapping[str, str], licence: str
) -> str:
    """The Modelfile's text. `file`, `adapter`: relative paths. `adds_bos`: Ollama puts the beginning token in front by itself."""
    lines = [f"FROM ./{file}", *([f"ADAPTER ./{adapter}"] if adapter else []), ""]
    if recognised is None:
        lines += ["# No TEMPLATE: the chat template of this model is none of those known here. Without one Ollama sends what is typed as it stands.", ""]
    else:
        begin = "" if adds_bos else recognised.begin
        lines += [f"# {recognised.format.name}", f'TEMPLATE """{begin}{recognised.format.go()}"""', ""]
        if recognised.default_system:
            lines += [f'SYSTEM """{recognised.default_system}"""', ""]
    lines += [f"PARAMETER {name} {value}" for name, value in parameters.items()]
    lines += [f'PARAMETER stop "{escaped(end)}"' for end in ends]
    lines += [f"LICENSE {licence}"] if licence else []
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    r"""Within double quotes.

    >>> print(escaped('a"b'))
    a\"b
    """
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
