"""The base of every settings class, and the one error that a person is meant to read."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict, ValidationError

INSTALL_LLAMA_CPP = 'CMAKE_ARGS="-DLLAVA_BUILD=OFF" pip install "localrl[chat]"'
"""What every sentence says that misses llama.cpp."""


def how_it_ended(code: int) -> str:
    """Of a process in which llama.cpp worked.

    >>> how_it_ended(3), how_it_ended(-6)
    ('exit code 3', 'ended by SIGABRT')
    """
    if code >= 0:
        return f"exit code {code}"
    if -code == signal.SIGILL:
        return "ended by SIGILL: the library uses instructions that fail on this processor, build llama-cpp-python anew (docs/llama.md, Installing)"
    return f"ended by {signal.Signals(-code).name}"


class UserError(Exception):
    """Something that the person at the keyboard can put right: one sentence with the value, the limit and the way out.

    The command line prints it and exits with code 2. Everything else that is raised is a bug of ours and keeps its traceback.
    """


class Settings(BaseModel):
    """Frozen, closed settings. The docstring under a field is its help text, on the command line and in the UI."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint that names the nearest known word, or lists them all.

    >>> nearest("temprature", ["temperature", "top_p"])
    "did you mean 'temperature'?"
    >>> nearest("zzz", ["a", "b"])
    'known: a, b'
    """
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"


def explain(error: ValidationError, known_at: dict[str, list[str]], hidden: frozenset[str] = frozenset()) -> str:
    """One sentence out of pydantic's report: where, what stands there, what is allowed.

    `known_at` maps a dotted section ('' for the top, list positions left out) to its valid keys, for the hint at an unknown key. `hidden`:
    parts of a place that pydantic adds but nobody wrote (the tag of a union).
    """
    sentences = []
    for item in error.errors():
        place = [str(part) for part in item["loc"] if part not in hidden]
        where = ".".join(place)
        if item["type"] == "extra_forbidden":
            section = ".".join(part for part in place[:-1] if not part.isdigit())
            sentences.append(f"unknown key '{where}': {nearest(place[-1], known_at[section]) if section in known_at else 'remove it'}")
        elif item["type"] == "missing":
            sentences.append(f"{where} is missing")
        elif not place:
            sentences.append(item["msg"].removeprefix("Value error, "))
        else:
            sentences.append(f"{where} = {repr(item.get('input'))[:80]}: {item['msg'].removeprefix('Value error, ')}")
    return "; ".join(sentences)
