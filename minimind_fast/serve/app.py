"""The web application: routes, keys, limits, server-sent events, the page.

Purpose: `make_app(service)`, an ASGI application for uvicorn.
Principle: a request passes a series of checks (host, key, content type, size, JSON, fields, prompt length, queue), each of
    which refuses with an OpenAI-style error. It then becomes a `Call`, which the response, whole or streamed, closes.
Properties: the event loop never runs the model, the tokenizer or a template. A client that leaves or stops reading occupies
    at most its own row, until the time limit. On localhost without a key, requests for another host name are refused, so a
    web page cannot reach the model by DNS rebinding.

Source: OpenAI's API reference; the HTML standard's server-sent events.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.serve.batch import Batcher, Job
from minimind_fast.serve.call import Call, Calls, Gone
from minimind_fast.serve.metrics import Metrics
from minimind_fast.serve.output import Answer
from minimind_fast.serve.prompt import chat_prompt, completion_prompt
from minimind_fast.serve.protocol import ApiError, Ask, ChatAsk, Defaults, bad, read_chat, read_completion, read_json
from minimind_fast.serve.reply import ChatReply, CompletionReply

log = logging.getLogger("minimind_fast.serve")
PAGE = Path(__file__).with_name("web")
_PAGE_FILES = {"/": "index.html", "/chat.js": "chat.js", "/chat.css": "chat.css"}
_BODY_TIME_S = 30.0
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
# The page loads nothing from other hosts and runs only its own script.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@dataclass
class Service:
    """The served model and its limits.

    Args:
        tokenizer: the model's.
        batcher: holds the model; not started.
        name: the model's id for clients.
        api_key: "" for none.
        max_body_bytes: limit for a request body.
        max_output_tokens: limit for an answer.
        default_output_tokens: limit for an answer if the client sets none.
        timeout_s: from the request to the end of its answer.
        local: only this machine can connect.
        defaults: sampling settings that the client omits, and whether requests are taken strictly: another model's name and
            more tokens than there is room for are then refused. MiniMind's own clients ask for both.
    """

    tokenizer: Tokenizer
    batcher: Batcher
    name: str
    api_key: str = ""
    max_body_bytes: int = 1 << 20
    max_output_tokens: int = 2048
    default_output_tokens: int = 512
    timeout_s: float = 300.0
    local: bool = True
    defaults: Defaults = field(default_factory=Defaults)

    def __post_init__(self) -> None:
        self.metrics = Metrics()
        self.calls = Calls(self.batcher, self.timeout_s, self.metrics)
        self.created = int(time.time())

    def job(self, ask: Ask, prompt: list[int], client: str) -> Job:
        """Create the job of a checked request.

        Args:
            ask: the request's settings.
            prompt: token ids.
            client: key for fair queueing.

        Raises:
            ApiError: prompt and answer do not fit in the context.
        """
        room = self.batcher.context - len(prompt)
        if room < 1:
            raise bad(
                f"the prompt has {len(prompt)} tokens; this server's context is {self.batcher.context}, answer included",
                "messages" if isinstance(ask, ChatAsk) else "prompt",
                "context_length_exceeded",
            )
        new = min(self.default_output_tokens, room) if ask.max_tokens is None else ask.max_tokens
        if not self.defaults.strict:  # an answer that is cut short has finish_reason "length"
            new = min(new, self.max_output_tokens, room)
        if new > self.max_output_tokens:
            raise bad(f"max_tokens must be at most {self.max_output_tokens}, not {new}", "max_tokens")
        if new > room:
            raise bad(
                f"the prompt has {len(prompt)} tokens and {new} are asked for; this server's context is "
                f"{self.batcher.context}: shorten the prompt or lower max_tokens",
                "max_tokens",
                "context_length_exceeded",
            )
        seed = random.SystemRandom().getrandbits(62) if ask.seed is None else ask.seed
        stops = self.batcher.model.config.stop_ids | {self.tokenizer.eos_id}
        return Job(prompt, new, ask.sampling, seed, stops, ask.top_logprobs, client)


def make_app(service: Service) -> FastAPI:
    """Create the ASGI application; the service's batch starts and ends with it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.calls.start()
        yield
        await asyncio.to_thread(service.batcher.close)

    def check_host(request: Request) -> None:
        host = request.headers.get("host", "").rsplit(":", 1)[0] if service.local and not service.api_key else ""
        if host and host.lower() not in _LOOPBACK:
            raise ApiError(403, "this server answers to localhost only; start it with --host or --api-key for more")

    def check_key(request: Request) -> None:
        if not service.api_key:
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), service.api_key.encode()):
            raise ApiError(401, "missing or wrong API key", code="invalid_api_key")

    # No generated documentation pages: they load scripts from other hosts.
    app = FastAPI(
        lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None, dependencies=[Depends(check_host)]
    )

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> JSONResponse:
        return _error(service, request, error)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        return _error(service, request, ApiError(error.status_code, f"{error.detail}: {request.method} here"))

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> JSONResponse:
        return _error(service, request, ApiError(500, "the server has failed on this request; its log says more"))

    @app.get("/health")
    async def health() -> Response:
        well = service.batcher.alive
        return JSONResponse({"status": "ok" if well else "stopped"}, 200 if well else 503)

    @app.get("/metrics", dependencies=[Depends(check_key)])
    async def metrics() -> Response:
        b = service.batcher
        gauges = {
            "requests_running": ("gauge", "requests in the batch", b.running),
            "requests_waiting": ("gauge", "requests in the queue", b.waiting),
            "batch_rows": ("gauge", "rows of the batch", b.slots.rows),
            "prompt_tokens_total": ("counter", "prompt tokens run", b.prompt_tokens),
            "generated_tokens_total": ("counter", "tokens generated", b.generated_tokens),
            "turns_total": ("counter", "turns of the batch", b.turns),
        }
        return PlainTextResponse(service.metrics.text(gauges), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models", dependencies=[Depends(check_key)])
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model(service)]})

    @app.get("/v1/models/{name:path}", dependencies=[Depends(check_key)])
    async def model(name: str) -> Response:
        if name != service.name:
            raise _unknown_model(service)
        return JSONResponse(_model(service))

    @app.post("/v1/chat/completions", dependencies=[Depends(check_key)])
    async def chat(request: Request) -> Response:
        ask = read_chat(await _body(service, request), service.defaults)
        _check_model(service, ask.model)
        prompt, thinking = await asyncio.to_thread(chat_prompt, service.tokenizer, ask)
        answer = Answer(service.tokenizer, ask.stop, thinking, ask.tools is not None)
        return await _respond(service, request, ask, prompt, ChatReply(service.name, answer, len(prompt)))

    @app.post("/v1/completions", dependencies=[Depends(check_key)])
    async def completion(request: Request) -> Response:
        ask = read_completion(await _body(service, request), service.defaults)
        _check_model(service, ask.model)
        prompt = await asyncio.to_thread(completion_prompt, service.tokenizer, ask)
        answer = Answer(service.tokenizer, ask.stop, plain=True)
        return await _respond(service, request, ask, prompt, CompletionReply(service.name, answer, len(prompt)))

    for path, name in _PAGE_FILES.items():
        app.add_api_route(path, _file(PAGE / name), methods=["GET"])
    return app


def _file(path: Path):
    async def send() -> FileResponse:
        return FileResponse(path, headers=_PAGE_HEADERS)

    return send


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.name, "object": "model", "created": service.created, "owned_by": "minimind_fast"}


def _check_model(service: Service, name: str) -> None:
    if name and name != service.name and service.defaults.strict:
        raise _unknown_model(service)


def _unknown_model(service: Service) -> ApiError:
    return ApiError(404, f"unknown model; this server has {service.name!r}", "model", "model_not_found")


def _count(service: Service, request: Request, status: int) -> None:
    # Label by the route's path: the client's path could be anything.
    service.metrics.requests[getattr(request.scope.get("route"), "path", "other"), status] += 1


def _error(service: Service, request: Request, error: ApiError) -> JSONResponse:
    _count(service, request, error.status)
    headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
    headers |= {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
    # An unread body would be parsed as the next request.
    headers |= {"Connection": "close"} if error.status in (408, 413) else {}
    return JSONResponse(error.body(), error.status, headers)


async def _body(service: Service, request: Request) -> dict[str, Any]:
    """Read a request's JSON object.

    Raises:
        ApiError: not JSON, too large, too slow, or not an object.
    """
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "send JSON with the header Content-Type: application/json")
    limit, parts, size = service.max_body_bytes, [], 0
    message = f"the body has more than {limit} bytes"
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or len(declared) > 12 or int(declared) > limit:
        raise ApiError(413, message)
    try:
        async with asyncio.timeout(_BODY_TIME_S):
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise ApiError(413, message)
                parts.append(part)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {_BODY_TIME_S:g} seconds") from None
    return await asyncio.to_thread(read_json, b"".join(parts))


async def _respond(service: Service, request: Request, ask: Ask, prompt: list[int], reply: ChatReply) -> Response:
    client = f"{request.client.host if request.client else ''} {ask.user}"
    call = service.calls.open(service.job(ask, prompt, client), reply.answer)
    if ask.stream:
        return Events(service, request, call, reply, ask.include_usage)
    try:
        deltas, tokens = await call.guard(request.receive, _collect(call))
    except Gone:
        _count(service, request, 499)
        return Response(status_code=499)
    except TimeoutError:
        raise ApiError(504, f"no answer within {service.timeout_s:g} seconds", code="timeout") from None
    finally:
        call.close()
    _count(service, request, 200)
    return JSONResponse(reply.whole(deltas, tokens, ask.top_logprobs is not None))


async def _collect(call: Call) -> tuple[list, list]:
    deltas, tokens = [], []
    while call.answer.finish_reason is None:
        deltas += await call.deltas()
        tokens += call.answer.take_tokens()
    return deltas, tokens


class Events(Response):
    """An answer as server-sent events; always closes its call.

    Args:
        service: provides the time limit and the counters.
        request: the client's request.
        call: an open call.
        reply: builds the chunks.
        include_usage: append a chunk with the usage.
    """

    media_type = "text/event-stream"

    def __init__(self, service: Service, request: Request, call: Call, reply: ChatReply, include_usage: bool) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.service, self.request, self.call, self.reply = service, request, call, reply
        self.include_usage = include_usage

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        status = 200
        try:
            await self.call.guard(receive, self._stream(send))
        except Gone:
            status = 499
        except TimeoutError:
            status = 504
            # The client may have stopped reading: try to send, do not wait.
            late = ApiError(504, f"no answer within {self.service.timeout_s:g} seconds", code="timeout")
            await _soon(send, _event(late.body()), True)
        except ApiError as error:
            status = error.status
            await _soon(send, _event(error.body()), True)
        finally:
            self.call.close()
            _count(self.service, self.request, status)

    async def _stream(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        answer, reply = self.call.answer, self.reply
        first = reply.first()
        await _send(send, _event(first) if first else b"")
        while answer.finish_reason is None:
            deltas = await self.call.deltas()
            chunks = reply.chunks(deltas, answer.take_tokens())
            if data := b"".join(map(_event, chunks)):
                await _send(send, data)
        self.call.close()  # free the row before a slow reader reaches the end
        end = _event(reply.last()) if self.include_usage else b""
        await _send(send, end + b"data: [DONE]\n\n", True)


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _send(send: Any, data: bytes, last: bool = False) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": not last})


async def _soon(send: Any, data: bytes, last: bool) -> None:
    try:
        async with asyncio.timeout(1):
            await _send(send, data, last)
    except (TimeoutError, OSError):
        log.info("a client did not read the end of its answer")
