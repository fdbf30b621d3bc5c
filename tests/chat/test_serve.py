"""The endpoint, by real requests on the loopback: answers as `chat` does, streams, refuses by name, ends at Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from localrl.engines.llama_cpp import LlamaModel, Sampling
from localrl.settings import UserError
from localrl.sockets import is_here, listen
from tests.chat.conftest import Shell, sentence

ASK = [{"role": "user", "content": "What is 2+2? Grüße"}]


class Served:
    """`localrl serve` in a process of its own."""

    def __init__(self, *words: str) -> None:
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
        code = "from localrl.cli import main; main()"
        self.child = subprocess.Popen([sys.executable, "-c", code, "serve", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        assert self.child.stdout is not None
        self.said = self.child.stdout.readline()
        found = re.search(r"http://\S+?:(\d+)/v1", self.said)
        assert found, self.said + (self.child.stderr.read() if self.child.stderr else "")
        self.url = f"http://127.0.0.1:{found[1]}/v1"

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"} | headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert not [name for name in answer.headers if name.lower().startswith("access-control")], "no web page may read this"
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def end(self) -> tuple[int, str, str]:
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGINT)
        out, err = self.child.communicate(timeout=60)
        return self.child.returncode, out, err


def raw(body: Any) -> bytes:
    """A request for a client that will not wait for the answer."""
    data = json.dumps(body)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer secret\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n{data}".encode()


@pytest.fixture(scope="module")
def served(trained: tuple[Any, Any, Path]) -> Iterator[Served]:
    server = Served(str(trained[2] / "model-merged-f32.gguf"))
    yield server
    code, out, err = server.end()
    assert (code, err) == (0, "") and out.rstrip().endswith("ended")


def test_it_answers_as_the_model_does(served: Served, merged: LlamaModel) -> None:
    assert served.said.startswith("model-merged-f32 at http://127.0.0.1:")
    (listed,) = json.loads(served.ask("/models")[1])["data"]
    assert listed["id"] == "model-merged-f32"
    for body, sampling in (
        ({"temperature": 0, "max_tokens": 12}, Sampling(temperature=0, max_tokens=12)),
        ({"seed": 5, "max_completion_tokens": 12, "stop": "e"}, Sampling(max_tokens=12, stop=("e",))),
        ({"seed": 5, "max_tokens": 9, "top_k": 3, "min_p": 0.1, "top_p": 0.9}, Sampling(max_tokens=9, top_k=3, min_p=0.1, top_p=0.9)),
    ):
        wanted = merged.chat(ASK, sampling, 5).finish()
        status, text = served.ask("/chat/completions", {"messages": ASK, **body})
        found = json.loads(text)
        assert status == 200 and found["object"] == "chat.completion" and found["model"] == "model-merged-f32"
        (choice,) = found["choices"]
        assert choice["message"] == {"role": "assistant", "content": wanted.text}
        assert choice["finish_reason"] == ("stop" if wanted.done else "length")
        read, written = wanted.prompt_tokens, len(wanted.tokens)
        assert found["usage"] == {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    status, text = served.ask("/completions", {"prompt": "Once", "temperature": 0})
    assert json.loads(text)["choices"][0]["text"] == merged.complete("Once", Sampling(temperature=0, max_tokens=16)).finish().text
    parts = [{"role": "user", "content": [{"type": "text", "text": "What is 2+2? "}, {"type": "text", "text": "Grüße"}]}]
    same = [json.loads(served.ask("/chat/completions", {"messages": m, "temperature": 0, "max_tokens": 12})[1])["choices"] for m in (ASK, parts)]
    assert same[0] == same[1]


@pytest.mark.parametrize("path", ["/chat/completions", "/completions"])
def test_it_streams(served: Served, merged: LlamaModel, path: str) -> None:
    chat = path.startswith("/chat")
    said = {"messages": ASK} if chat else {"prompt": "Once"}
    sampling = Sampling(temperature=0, max_tokens=12)
    wanted = merged.chat(ASK, sampling).finish() if chat else merged.complete("Once", sampling).finish()
    status, text = served.ask(path, {**said, "temperature": 0, "max_tokens": 12, "stream": True, "stream_options": {"include_usage": True}})
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert status == 200 and events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert len(chunks) > 5 and len({chunk["id"] for chunk in chunks}) == 1
    assert "".join(c["delta"].get("content", "") if chat else c["text"] for c in choices) == wanted.text
    assert [c["finish_reason"] for c in choices if c["finish_reason"]] == ["stop" if wanted.done else "length"]
    assert chunks[-1]["usage"]["completion_tokens"] == len(wanted.tokens)


@pytest.mark.parametrize(("change", "words"), [
    ({"temperature": -1}, "temperature = -1.0: it lies between"), ({"tools": [{"type": "function"}]}, "tools = .* is not offered here"),
    ({"n": 2}, "n = 2 is not offered"), ({"frequency_penalty": 0.5}, "frequency_penalty"), ({"messages": []}, "messages"), ({"messages": "x"}, "messages"),
    ({"max_tokens": 0}, "max_tokens = 0"), ({"messages": [{"role": "user", "content": "x" * 600}]}, "does not fit a context of 512"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "'text'"),
])  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(served: Served, change: dict[str, Any], words: str) -> None:
    status, text = served.ask("/chat/completions", {"messages": ASK, **change})
    assert status == 400 and re.search(words, json.loads(text)["error"]["message"]), text


def test_what_asks_for_nothing_is_passed_over(served: Served) -> None:
    harmless = {"n": 1, "presence_penalty": 0, "logit_bias": None, "tools": [], "response_format": {"type": "text"}, "user": "me", "max_tokens": 2}
    assert served.ask("/chat/completions", {"messages": ASK, **harmless})[0] == 200


def test_web_pages_and_nonsense_get_nothing(served: Served) -> None:
    body = {"messages": ASK, "max_tokens": 2}
    for headers, status in (({"Content-Type": "text/plain"}, 415), ({"Host": "evil.example"}, 403), ({"Host": "127.0.0.1.evil.example:80"}, 403)):
        assert served.ask("/chat/completions", body, **headers)[0] == status, headers
    assert served.ask("/chat/completions", b"{nonsense")[0] == 400
    assert served.ask("/nowhere")[0] == 404


def test_requests_wait_for_each_other_and_one_that_leaves_frees_its_place(served: Served, merged: LlamaModel) -> None:
    host, port = served.url.removeprefix("http://").removesuffix("/v1").split(":")
    with socket.create_connection((host, int(port))) as gone:
        gone.sendall(raw({"messages": ASK, "temperature": 0, "stream": True}))
        gone.recv(100)
    wanted = {text: merged.complete(text, Sampling(temperature=0, max_tokens=30)).finish().text for text in ("Once", "Twice", "Thrice")}
    found: dict[str, str] = {}

    def one(text: str) -> None:
        found[text] = json.loads(served.ask("/completions", {"prompt": text, "temperature": 0, "max_tokens": 30})[1])["choices"][0]["text"]

    threads = [threading.Thread(target=one, args=(text,)) for text in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == wanted


def test_a_key_and_the_end_within_a_reply(trained: tuple[Any, Any, Path]) -> None:
    out = trained[2]
    server = Served(str(out / "model-base-f32.gguf"), "--adapter", str(out / "model-adapter-f32.gguf"), "--host", "0.0.0.0", "--api-key", "secret")
    assert server.child.stdout is not None
    assert "everyone who reaches 0.0.0.0" in server.child.stdout.readline()
    assert server.ask("/models")[0] == 401
    assert server.ask("/models", Authorization="Bearer secres")[0] == 401
    assert server.ask("/models", Authorization="Bearer secret")[0] == 200
    assert server.ask("/models", Authorization="Bearer secret", Host="any.example")[0] == 200
    host, port = server.url.removeprefix("http://").removesuffix("/v1").split(":")
    with socket.create_connection((host, int(port))) as under_way:
        under_way.sendall(raw({"messages": ASK, "temperature": 0}))
        begun = time.monotonic()
        code, _, err = server.end()
    assert code == 0 and "Traceback" not in err and time.monotonic() - begun < 30


def test_where_it_may_listen() -> None:
    with pytest.raises(UserError, match=r"--host 0.0.0.0 would let everyone .* add --api-key"):
        listen("0.0.0.0", 0, None)
    with pytest.raises(UserError, match="--api-key is empty"):
        listen("0.0.0.0", 0, " ")
    with pytest.raises(UserError, match="is no address"):
        listen("no.such.host.invalid", 0, "key")
    assert not is_here("192.168.1.1") and is_here("127.0.0.5")
    with listen("127.0.0.1", 0, None) as first, pytest.raises(UserError, match=r"cannot listen on 127.0.0.1, port \d+ .* choose another with --port"):
        listen("127.0.0.1", first.getsockname()[1], None)


def test_errors_are_one_sentence(trained: tuple[Any, Any, Path], tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    model = str(trained[2] / "model-merged-f32.gguf")
    assert "no file" in sentence(*shell("serve", str(tmp_path / "no.gguf")))
    assert "add --api-key" in sentence(*shell("serve", model, "--host", "0.0.0.0"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "choose another with --port" in sentence(*shell("serve", model, "--port", str(taken.getsockname()[1])))
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert 'uvicorn, which is not installed: pip install "localrl[serve]"' in sentence(*shell("serve", model))
