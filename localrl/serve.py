"""An exported model behind the part of OpenAI's API that every client uses, on this machine alone unless told otherwise.

    GET /v1/models      POST /v1/chat/completions      POST /v1/completions        the last two also streaming

llama-cpp-python brings a server of its own. It is not used, because what it answers is not what was trained: a request that says nothing of
it is sampled with a repetition penalty of 1.1 and 40 candidates, and a template that resembles a known one is replaced by it. It also lets
every web page that is open in a browser on this machine read the answers (its CORS headers allow all origins), reads its settings from
whatever environment variables are called SEED or CACHE, and ends a reply where the next request begins.

Here nothing is cut off the distribution unless the request says so, what cannot be honoured is refused by name, requests wait for each other,
and a page in a browser gets nothing: there are no CORS headers, a body must be declared as JSON, and without a key the Host must be this machine.
"""

from __future__ import annotations

import asyncio
import hmac
import importlib.util
import json
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from localrl.batch import Message
from localrl.engines.llama_cpp import LlamaModel, Reply, Sampling, TooLong
from localrl.exports import Files
from localrl.settings import UserError, explain
from localrl.sockets import is_here, listen

INSTALL = 'pip install "localrl[serve]"'
OFF: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "presence_penalty": (0,), "frequency_penalty": (0,), "repeat_penalty": (1, 0), "logprobs": (False,), "top_logprobs": (0,),
    "logit_bias": ({},), "echo": (False,), "suffix": ("",), "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},), "grammar": ("",),
}  # fmt: skip
"""What would change the answer and is not offered here, with the values that ask for nothing."""
GRACE = 2
"""Seconds that replies under way have at Ctrl-C."""


class Part(BaseModel):
    """A piece of a message. Text is all a language model reads."""

    type: Literal["text"]
    text: str


class Said(BaseModel):
    """A message."""

    role: str
    content: str | list[Part]

    def message(self) -> Message:
        """As templates want it."""
        return {"role": self.role, "content": self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)}


class Options(BaseModel):
    """What both kinds of request may say of sampling. The defaults are the distribution itself, as it was trained."""

    model_config = ConfigDict(extra="allow")
    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None

    def sampling(self, longest: int) -> Sampling:
        """UserError for a value out of range, or for what is not offered."""
        for name, value in (self.model_extra or {}).items():
            if name in OFF and value is not None and value not in OFF[name]:
                raise UserError(f"{name} = {json.dumps(value)[:80]} is not offered here: leave it out")
        given = {name: value for name in ("temperature", "top_p", "top_k", "min_p") if (value := getattr(self, name)) is not None}
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        asked = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return Sampling(**given, max_tokens=longest if asked is None else asked, stop=stop)


class ChatRequest(Options):
    """POST /v1/chat/completions."""

    messages: list[Said] = Field(min_length=1)


class TextRequest(Options):
    """POST /v1/completions."""

    prompt: str | list[str]


class Server:
    """One loaded model and the requests that wait for it."""

    def __init__(self, model: LlamaModel, name: str, key: str | None, say: Callable[[str], None]) -> None:
        self.model, self.name, self.key, self.say = model, name, key, say
        self.started = int(time.time())
        self._turn = asyncio.Lock()

    def app(self) -> Any:
        """The three routes as an ASGI application."""
        from starlette.applications import Starlette
        from starlette.requests import Request
        from starlette.responses import JSONResponse, Response
        from starlette.routing import Route

        async def models(request: Request) -> Response:
            own = {"id": self.name, "object": "model", "created": self.started, "owned_by": "localrl", "context": self.model.n_ctx}
            return self.refusal(request) or JSONResponse({"object": "list", "data": [own]})

        async def chat(request: Request) -> Response:
            return self.refusal(request) or await self.answer(request, ChatRequest)

        async def text(request: Request) -> Response:
            return self.refusal(request) or await self.answer(request, TextRequest)

        post = ["POST"]
        return Starlette(routes=[
            Route("/v1/models", models), Route("/v1/chat/completions", chat, methods=post), Route("/v1/completions", text, methods=post),
        ])  # fmt: skip

    def refusal(self, request: Any) -> Any:
        """A response that refuses, or None: no or another key, a web page, a body that is no JSON."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.key is not None and not hmac.compare_digest(given.encode(), self.key.encode()):
            return failure(401, "the key is missing or another one: send Authorization: Bearer KEY", "invalid_api_key")
        if self.key is None and not is_here(request.url.hostname or ""):
            return failure(403, f"this server answers to 127.0.0.1 and localhost, not to '{request.url.hostname}'", "host")
        if request.method == "POST" and request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
            return failure(415, "send the body as Content-Type: application/json", "content_type")
        return None

    async def answer(self, request: Any, kind: type[ChatRequest] | type[TextRequest]) -> Any:
        """The reply, whole or as it comes."""
        from starlette.responses import JSONResponse, StreamingResponse

        try:
            asked = kind.model_validate_json(await request.body())
            sampling = asked.sampling(16 if kind is TextRequest else self.model.n_ctx)        # as OpenAI's API has it
            tokens = self.tokens(asked)
        except ValidationError as error:
            return failure(400, explain(error, {}), "invalid_request_error")
        except TooLong as error:
            return failure(400, str(error), "context_length_exceeded")
        except UserError as error:
            return failure(400, str(error), "invalid_request_error")
        one = Answer(self, chat=kind is ChatRequest)
        seed = secrets.randbelow(2**31) if asked.seed is None else asked.seed % 2**31
        if asked.stream:
            usage = bool((asked.stream_options or {}).get("include_usage"))
            return StreamingResponse(one.events(tokens, sampling, seed, usage), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        async with aclosing(one.pieces(tokens, sampling, seed)) as pieces:
            async for _ in pieces:
                if await request.is_disconnected():
                    return failure(499, "the client has gone", "gone")
        return JSONResponse(one.whole())

    def tokens(self, asked: Options) -> list[int]:
        """The prompt as the model reads it. UserError if it cannot be rendered, TooLong if it leaves no room."""
        if isinstance(asked, ChatRequest):
            tokens = self.model.tokenize(self.model.render([said.message() for said in asked.messages]), whole=False)
        else:
            assert isinstance(asked, TextRequest)
            prompts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
            if len(prompts) != 1:
                raise UserError(f"prompt holds {len(prompts)} texts: one a request")
            tokens = self.model.tokenize(prompts[0], whole=True)
        self.model.check_room(len(tokens))
        return tokens

    async def write(self, tokens: list[int], sampling: Sampling, seed: int) -> AsyncGenerator[tuple[Reply, str], None]:
        """(the reply so far, its next piece), when it is this request's turn. Every token is computed in a thread beside."""
        from starlette.concurrency import run_in_threadpool

        async with self._turn:
            reply = self.model.complete(tokens, sampling, seed, fresh=False)
            try:
                while (piece := await run_in_threadpool(next, reply.pieces, None)) is not None:
                    yield reply, piece
            finally:
                reply.pieces.close()
            yield reply, ""
            self.say(f"{reply.prompt_tokens} tokens read, {len(reply.tokens)} written, {reply.tokens_per_second:,.0f} tok/s")


class Answer:
    """One answer in the shape of OpenAI's API."""

    def __init__(self, server: Server, chat: bool) -> None:
        self.server, self.chat = server, chat
        self.head = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}", "created": int(time.time()), "model": server.name}
        self.reply: Reply | None = None

    async def pieces(self, tokens: list[int], sampling: Sampling, seed: int) -> AsyncGenerator[str, None]:
        """The text as it comes."""
        async with aclosing(self.server.write(tokens, sampling, seed)) as written:
            async for self.reply, piece in written:
                yield piece

    async def events(self, tokens: list[int], sampling: Sampling, seed: int, usage: bool) -> AsyncGenerator[str, None]:
        """Server-sent events: the role, the pieces, why it ended, what it cost if asked for, [DONE]."""
        if self.chat:
            yield self._event([self._choice({"delta": {"role": "assistant", "content": ""}}, None)])
        async with aclosing(self.pieces(tokens, sampling, seed)) as pieces:
            async for piece in pieces:
                if piece:
                    yield self._event([self._choice({"delta": {"content": piece}} if self.chat else {"text": piece}, None)])
        yield self._event([self._choice({"delta": {}} if self.chat else {"text": ""}, self._why())])
        if usage:
            yield self._event([], usage=self._usage())
        yield "data: [DONE]\n\n"

    def whole(self) -> dict[str, Any]:
        """The finished answer."""
        assert self.reply is not None
        said = {"message": {"role": "assistant", "content": self.reply.text}} if self.chat else {"text": self.reply.text}
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": [self._choice(said, self._why())], "usage": self._usage()}

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return f"data: {json.dumps({**self.head, 'object': kind, 'choices': choices, **more}, ensure_ascii=False)}\n\n"

    def _choice(self, said: dict[str, Any], why: str | None) -> dict[str, Any]:
        return {"index": 0, **said, "logprobs": None, "finish_reason": why}

    def _why(self) -> str:
        return "stop" if self.reply is not None and self.reply.done else "length"

    def _usage(self) -> dict[str, int]:
        assert self.reply is not None
        read, written = self.reply.prompt_tokens, len(self.reply.tokens)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def failure(status: int, message: str, code: str) -> Any:
    """An error as OpenAI's clients expect it."""
    from starlette.responses import JSONResponse

    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": code}}, status_code=status)


def serve(files: Files, *, host: str, port: int, key: str | None, context: int, say: Callable[[str], None]) -> None:
    """Load and answer until Ctrl-C. UserError for what stands in the way."""
    lacking = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if lacking:
        raise UserError(f"serving needs {' and '.join(lacking)}, which {'is' if len(lacking) == 1 else 'are'} not installed: {INSTALL}")
    import uvicorn

    with listen(host, port, key) as knocked, LlamaModel(files.model, files.adapter, n_ctx=context) as model:
        server = Server(model, files.label, key, say)
        shown = f"[{host}]" if ":" in host else host
        say(f"{files.label} at http://{shown}:{knocked.getsockname()[1]}/v1, {model.n_ctx} tokens of context. Ctrl-C ends it")
        if not is_here(host):
            say(f"everyone who reaches {host} and has the key can ask it; key and texts travel unencrypted, so keep it within a network that you trust")
        config = uvicorn.Config(server.app(), log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=GRACE)
        with suppress(KeyboardInterrupt):                            # it has ended by then, and passes the signal on
            uvicorn.Server(config).run(sockets=[knocked])
    say("ended")
