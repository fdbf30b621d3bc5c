"""Chat in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing, suppress
from pathlib import Path

from rich.console import Console

from localrl.chat import Chat
from localrl.engines.llama_cpp import TooLong
from localrl.settings import UserError, nearest

MAKE_ROOM = "/undo takes the last turn back, /reset begins again, `localrl chat --context N` gives more if the model was trained for it"
HELP = {
    "/set NAME VALUE": "change temperature, top_p, top_k, min_p, max_tokens, stop or seed; /set alone shows them",
    "/system [TEXT]": "change the system prompt under the conversation; alone: take it away",
    "/regenerate": "answer the last question anew, with other random numbers",
    "/undo": "take the last question and its answer back",
    "/reset": "begin again; the system prompt stays",
    "/save FILE": "append the conversation to a .jsonl or .md file",
    "/quit": "leave, as Ctrl-D does; Ctrl-C stops a reply",
}


class Talk:
    """One chat and the terminal it happens in."""

    def __init__(self, console: Console, chat: Chat, read: Callable[[], str] | None = None) -> None:
        """`read`: where the next line comes from, EOFError at its end; None: the keyboard."""
        self.console, self.chat = console, chat
        self.read = read or _keyboard

    def run(self) -> None:
        """Until /quit, Ctrl-D, or Ctrl-C twice in a row."""
        warned = False
        while True:
            try:
                text = self.read().strip()
            except EOFError:
                self.console.print()
                return
            except KeyboardInterrupt:
                self.console.print()
                if warned:
                    return
                warned = True
                self._aside("Ctrl-C once more, Ctrl-D or /quit leaves")
                continue
            warned = False
            if text == "/quit":
                return
            try:
                self._command(text) if text.startswith("/") else self.answer(text) if text else None
            except UserError as error:
                self.complain(error)

    def answer(self, text: str) -> None:
        """Say something and show the reply as it comes."""
        self._show(self.chat.say(text))

    def complain(self, error: UserError) -> None:
        """One sentence, and what to do if the context is full."""
        self.console.print(f"{error}" + (f"; {MAKE_ROOM}" if isinstance(error, TooLong) else ""), style="red", markup=False, highlight=False, soft_wrap=True)

    def _command(self, text: str) -> None:
        command, _, rest = text.partition(" ")
        known = {usage.split()[0] for usage in HELP} | {"/help"}
        if command not in known:
            raise UserError(f"no command {command}: {nearest(command, known)}")
        getattr(self, f"_{command[1:]}")(rest.strip())

    def _help(self, rest: str) -> None:
        for usage, does in HELP.items():
            self._aside(f"{usage:<18}{does}")

    def _set(self, rest: str) -> None:
        if rest:
            name, _, value = rest.replace("=", " ", 1).partition(" ")
            self.chat.set(name, value.strip())
        self._aside("  ".join(f"{name} {value}" for name, value in self.chat.settings().items() if value))

    def _system(self, rest: str) -> None:
        self.chat.system = rest or None
        self._aside("system prompt changed" if rest else "no system prompt")

    def _regenerate(self, rest: str) -> None:
        if self.chat.turns and self.chat.sampling.temperature == 0:
            self._aside("temperature is 0: the same answer comes again; /set temperature 0.7 lets it differ")
        self._show(self.chat.regenerate())

    def _undo(self, rest: str) -> None:
        undone = self.chat.undo()
        self._aside(f"taken back: {undone}" if undone is not None else "nothing to take back")

    def _reset(self, rest: str) -> None:
        self.chat.reset()
        self._aside("begun again")

    def _save(self, rest: str) -> None:
        if not rest:
            raise UserError("/save wants a file: /save talk.jsonl or /save talk.md")
        self.chat.save(Path(rest).expanduser())
        self._aside(f"saved to {rest}")

    def _show(self, pieces: Generator[str, None, None]) -> None:
        with closing(pieces):                                       # broken off or not, the chat then knows what was said
            try:
                for piece in pieces:
                    self.console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
            except KeyboardInterrupt:
                self.console.print(" [stopped]", style="dim", markup=False, end="")
        reply = self.chat.last
        if reply is None:
            return
        ended = f", cut at max_tokens={len(reply.tokens)}" if len(reply.tokens) >= self.chat.sampling.max_tokens and not reply.done else ""
        self._aside(f"\n({len(reply.tokens)} tokens, {reply.tokens_per_second:.0f} tok/s{ended})")
        if reply.full:
            self.complain(TooLong(f"the context of {self.chat.model.n_ctx} tokens is full, the reply was cut"))

    def _aside(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


def _keyboard() -> str:
    with suppress(ImportError):                                      # where there is one, lines can be edited and recalled
        import readline  # noqa: F401

    return input("you> ")
