"""A conversation with an exported model. Nothing is printed here."""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import asdict, fields, replace
from pathlib import Path

from localrl.batch import Message
from localrl.engines.llama_cpp import LlamaModel, Reply, Sampling
from localrl.settings import UserError, nearest

ANOTHER = 1_000_003
"""What is added to the seed for every other answer to the same question."""
WHOLE = ("top_k", "max_tokens")


class Chat:
    """A conversation: what was said, and a way to say the next thing, to take it back, to have it answered anew, to begin again."""

    def __init__(self, model: LlamaModel, *, system: str | None = None, sampling: Sampling | None = None, seed: int = 0) -> None:
        """The same seed and the same words give the same conversation, `reset` or not."""
        self.model, self.sampling, self.seed = model, sampling or Sampling(temperature=0.7), seed
        self.messages: list[Message] = []
        """Everything said so far, the system prompt first."""
        self.last: Reply | None = None
        """The newest reply: its tokens, whether it ended by itself, its speed."""
        self._again = 0
        self.system = system

    @property
    def system(self) -> str | None:
        """The system prompt. Setting it changes it under the conversation, which stays; None or empty: there is none."""
        return self.messages[0]["content"] if self.messages and self.messages[0]["role"] == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        said = [message for message in self.messages if message["role"] != "system"]
        self.messages = [*([{"role": "system", "content": text}] if text else []), *said]

    @property
    def turns(self) -> int:
        """How many questions have been answered."""
        return sum(message["role"] == "assistant" for message in self.messages)

    def say(self, text: str) -> Generator[str, None, None]:
        """Say something; the answer comes piece by piece. One that is broken off stays as far as it came, or is forgotten if nothing came.

        TooLong if the conversation no longer fits the model's context.
        """
        self._again = 0
        return self._ask([*self.messages, {"role": "user", "content": text}])

    def regenerate(self) -> Generator[str, None, None]:
        """Another answer to the last question, with other random numbers; the old one stays if nothing comes. UserError if there was none."""
        if not self.turns:
            raise UserError("nothing has been answered yet: ask something first")
        self._again += 1
        return self._ask(self.messages[:-1])

    def _ask(self, asked: list[Message]) -> Generator[str, None, None]:
        answered = sum(message["role"] == "assistant" for message in asked)
        self.last = self.model.chat(asked, self.sampling, self.seed + answered + ANOTHER * self._again)
        return self._stream(self.last, asked)

    def _stream(self, reply: Reply, asked: list[Message]) -> Generator[str, None, None]:
        try:
            yield from reply
        finally:
            if reply.text or reply.done:
                self.messages = [*asked, {"role": "assistant", "content": reply.text}]

    def undo(self) -> str | None:
        """Take the last question and its answer back. -> the question, or None if there was none."""
        if not self.turns:
            return None
        *self.messages, question, _ = self.messages
        self.last = None
        return question["content"]

    def reset(self) -> None:
        """Begin again: only the system prompt stays."""
        self.system, self.messages, self.last = self.system, self.messages[: self.system is not None], None

    def set(self, name: str, text: str) -> None:
        """Change one setting of the sampling, or the seed, from now on. UserError for an unknown name, or a value that it cannot have."""
        if name == "seed":
            self.seed = int(_number(name, text, whole=True))
        else:
            self.sampling = changed(self.sampling, name, text)

    def settings(self) -> dict[str, str]:
        """What `set` may change, and how it stands."""
        return {key: " ".join(value) if isinstance(value, tuple) else f"{value:g}" for key, value in asdict(self.sampling).items()} | {"seed": str(self.seed)}

    def save(self, path: Path) -> None:
        """Append the conversation to a file: `.jsonl` as one line with `messages` and how they were sampled, `.md` to be read.

        UserError for another kind of file, for nothing said, and if it cannot be written.
        """
        if not self.turns:
            raise UserError("nothing has been said yet: there is nothing to save")
        if path.suffix not in (".jsonl", ".md"):
            raise UserError(f"{path}: a conversation is saved as .jsonl (one line with all messages) or as .md (to be read)")
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(self._json() if path.suffix == ".jsonl" else self._markdown())
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}): name another file") from None

    def _json(self) -> str:
        adapter = self.model.adapter.name if self.model.adapter else None
        row = {"messages": self.messages, "model": self.model.path.name, "adapter": adapter, "sampling": asdict(self.sampling), "seed": self.seed}
        return json.dumps(row, ensure_ascii=False) + "\n"

    def _markdown(self) -> str:
        name = self.model.path.name + (f" + {self.model.adapter.name}" if self.model.adapter else "")
        said = "\n\n".join(f"**{message['role']}**\n\n{message['content'].strip()}" for message in self.messages)
        return f"## {name}\n\n{' · '.join(f'{key} {value}' for key, value in self.settings().items() if value)}\n\n{said}\n\n"


def changed(sampling: Sampling, name: str, text: str) -> Sampling:
    """The same with one setting changed. `stop`: strings with spaces between them, none for none.

    >>> changed(Sampling(), "temperature", "0.5").temperature, changed(Sampling(), "stop", "END </s>").stop
    (0.5, ('END', '</s>'))
    """
    known = {f.name for f in fields(Sampling)}
    if name not in known:
        raise UserError(f"no setting '{name}': {nearest(name, known | {'seed'})}")
    if name == "stop":
        return replace(sampling, stop=tuple(text.split()))
    value = _number(name, text, whole=name in WHOLE)
    return replace(sampling, **{name: value})  # type: ignore[arg-type]


def _number(name: str, text: str, whole: bool) -> int | float:
    try:
        return int(text) if whole else float(text)
    except ValueError:
        raise UserError(f"{name} = '{text}': it wants {'a whole number' if whole else 'a number'}") from None
