"""The terminal: commands inside a chat, Ctrl-C, what errors look like, and what works without llama.cpp."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from localrl.chat import Chat
from localrl.engines.llama_cpp import LlamaModel, Sampling
from localrl.export import Sample, export
from localrl.talk import HELP, Talk
from tests.chat.conftest import Shell, adapted, sentence


def talk(model: LlamaModel, *lines: str, **options: Any) -> tuple[str, Chat]:
    """(what was printed, the chat afterwards)."""
    waiting = iter(lines)

    def read() -> str:
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    file = io.StringIO()
    chat = Chat(model, sampling=Sampling(temperature=0, max_tokens=8), **options)
    Talk(Console(file=file, width=200), chat, read).run()
    return file.getvalue(), chat


def test_commands(merged: LlamaModel, tmp_path: Path) -> None:
    out, chat = talk(merged, "Hello", "/set top_p 0.5", "/set temperature=0.9", "/set seed 4", "/system Be brief.", "/save " + str(tmp_path / "a.md"), "/set")
    assert (chat.sampling.top_p, chat.sampling.temperature, chat.seed, chat.system) == (0.5, 0.9, 4, "Be brief.")
    assert "tokens, " in out and "tok/s" in out and (tmp_path / "a.md").exists()
    assert out.rstrip().endswith("temperature 0.9  top_p 0.5  top_k 0  min_p 0  max_tokens 8  seed 4")
    out, chat = talk(merged, "Hello", "/regenerate", "/undo", "/undo", "/reset", "/system", "/help", "/quit", "never asked", system="X")
    assert "temperature is 0: the same answer comes again" in out
    assert "taken back: Hello" in out and "nothing to take back" in out
    assert all(usage in out for usage in HELP)
    assert chat.messages == []


@pytest.mark.parametrize(("line", "words"), [
    ("/regnerate", "no command /regnerate: did you mean '/regenerate'?"), ("/set colour 1", "no setting 'colour'"), ("/set top_k -1", "lies between"),
    ("/regenerate", "ask something first"), ("/save", "/save wants a file"), ("x" * 600, "/undo takes the last turn back, /reset begins again"),
])  # fmt: skip
def test_what_cannot_be_done_is_said_and_the_talk_goes_on(merged: LlamaModel, line: str, words: str) -> None:
    out, chat = talk(merged, line, "Hello")
    assert words in out
    assert chat.turns == 1


def test_a_full_context_is_said(trained: tuple[Any, Any, Path]) -> None:
    with LlamaModel(trained[2] / "model-merged-f32.gguf", n_ctx=64, threads=1) as model:
        file = io.StringIO()
        lines = iter(["Hello"])
        chat = Chat(model, sampling=Sampling(temperature=0, max_tokens=500))
        Talk(Console(file=file, width=300), chat, lambda: next(lines, "/quit")).run()
        assert chat.last is not None and chat.last.full
        assert "the context of 64 tokens is full, the reply was cut; /undo takes the last turn back" in file.getvalue()
        assert chat.turns == 1


def test_ctrl_c_stops_the_reply_and_not_the_program(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """In a process of its own, with a model that would go on for a long time."""

    model, tokenizer = adapted(make_model("llama", max_position_embeddings=65536), seed=3)
    file = export(model, tokenizer, tmp_path, what="merged", dtype="f32", samples=[Sample(tuple(tokenizer("Hello")["input_ids"]))]).path
    code = "from localrl.cli import main; main()"
    words = ["chat", str(file), "--temperature", "0", "--context", "65536", "--max-tokens", "60000"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen([sys.executable, "-c", code, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(b"Hello\n")
        child.stdin.flush()
        seen = b""
        while len(seen.partition(b"you> ")[2]) < 20:
            seen += os.read(child.stdout.fileno(), 65536)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(b"/undo\n/quit\n", timeout=120)
    text = (seen + out).decode("utf-8", "replace")
    assert child.returncode == 0, err.decode()
    assert "[stopped]" in text and "taken back: Hello" in text
    assert b"Traceback" not in err


def test_a_prompt_and_out(trained: tuple[Any, Any, Path], shell: Shell) -> None:
    code, out, _ = shell("chat", str(trained[2] / "model-adapter-f32.gguf"), "--prompt", "Hello", "--temperature", "0", "--max-tokens", "5")
    assert code == 0 and "(5 tokens" in out


def test_errors_are_one_sentence(trained: tuple[Any, Any, Path], tmp_path: Path, shell: Shell) -> None:
    model = trained[2] / "model-base-f32.gguf"
    (tmp_path / "x.gguf").write_text("hello")
    (tmp_path / "torn.gguf").write_bytes(model.read_bytes()[:-5000])
    (tmp_path / "x.gguf.failed").write_bytes(model.read_bytes())
    (tmp_path / "alone.gguf").write_bytes((trained[2] / "model-adapter-f32.gguf").read_bytes())
    (tmp_path / "folder").mkdir()
    cases = {
        (str(tmp_path / "no.gguf"),): "no file",
        (str(tmp_path / "x.gguf"),): "not a GGUF",
        (str(tmp_path / "torn.gguf"),): "cannot load",
        (str(tmp_path / "x.gguf.failed"),): "did not pass",
        (str(tmp_path / "alone.gguf"),): "no base lies beside it",
        (str(tmp_path / "folder"),): "neither a run folder",
        (str(model), "--adapter", str(model)): "whole model",
        (str(model), "--prompt", "x" * 600): "does not fit a context",
        (str(model), "--top-p", "7"): "between 0 and 1",
    }
    for words, said in cases.items():
        assert said in sentence(*shell("chat", *words)), words


def test_without_llama_cpp_everything_else_works(trained: tuple[Any, Any, Path], run: Path) -> None:
    """In a process where it cannot be imported: what needs it says how to get it, evaluation of the trained model goes on as ever."""
    model = str(trained[2] / "model-base-f32.gguf")
    code = (
        "import sys; sys.modules['llama_cpp'] = None\nfrom localrl.cli import main\n"
        f"run = {str(run)!r}\n"
        f"for words in (['chat', {model!r}], ['serve', {model!r}], ['compare', run], ['export', run], ['eval', run, 'eval.limit=2']):\n"
        "    sys.argv = ['localrl', *words]\n"
        "    try:\n        main()\n    except SystemExit as end:\n        print(words[0], end.code, flush=True)\n"
    )
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False, env=env)
    ended = dict(line.split() for line in done.stdout.splitlines() if line.split()[:1] and line.split()[0] in ("chat", "serve", "compare", "export", "eval"))
    assert ended == {"chat": "2", "serve": "2", "compare": "2", "export": "2", "eval": "0"}, done.stderr
    sentences = [line for line in done.stderr.splitlines() if line.startswith("localrl: ")]
    assert len(sentences) == 4 and all('pip install "localrl[chat]"' in line for line in sentences)
    assert "eval/reward" in done.stdout and "Traceback" not in done.stderr
