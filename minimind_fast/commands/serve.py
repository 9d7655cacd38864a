"""`minimind-fast serve PATH`: an OpenAI-compatible server and a chat page for one model.

Purpose: the command: options, model, socket, uvicorn.
Principle: one process. A thread runs the model with continuous batching (`serve/batch.py`); the event loop does the rest
    (`serve/app.py`).
Properties: listens on localhost unless told otherwise. FastAPI and uvicorn are an extra, `pip install minimind_fast[serve]`.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import socket
import sys

from minimind_fast.commands.options import add_model_options, open_model
from minimind_fast.errors import UserError
from minimind_fast.infer.sampling import Sampling
from minimind_fast.serve.batch import Batcher
from minimind_fast.serve.protocol import Defaults


def is_local(host: str) -> bool:
    """Whether only this machine can reach a host name or address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minimind-fast serve", description="Serve a model by OpenAI's API, and a chat page."
    )
    add_model_options(parser)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)")
    add("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    add("--name", help="the model's id for clients (default: the last part of PATH)")
    add("--api-key", "--api_key", default="", help="clients must send it (default: $MINIMIND_API_KEY, or none)")
    add("--max_batch", type=int, default=16, help="requests that run at once (default: 16)")
    add("--max_context", type=int, default=2048, help="tokens of prompt and answer together (default: 2048)")
    add("--max_queue", type=int, default=64, help="requests that wait; more get status 429 (default: 64)")
    add("--prefill_chunk", type=int, default=256, help="prompt tokens between two tokens of the others (default: 256)")
    add("--max_output", type=int, default=2048, help="the most tokens a client gets (default: 2048)")
    add("--max_new_tokens", type=int, default=512, help="for clients that ask for no number (default: 512)")
    add("--max_body", type=int, default=1 << 20, help="bytes of a request (default: 1048576)")
    add("--timeout", type=float, default=300, help="seconds from a request to the end of its answer (default: 300)")
    add("--temperature", type=float, default=0.7, help="for clients that send none (default: 0.7)")
    add("--top_p", type=float, default=0.9, help="for clients that send none (default: 0.9)")
    add("--strict", action="store_true", help="refuse other models' names, MiniMind's own fields, and too many tokens")
    add("--thinking", action="store_true", help="think before each answer, unless a client says otherwise")
    return parser


def main(argv: list[str]) -> int:
    """`minimind-fast serve`: serve a model until Ctrl-C.

    Args:
        argv: arguments after `serve`.

    Returns:
        The exit code.

    Raises:
        ValueError: an option out of range, or FastAPI and uvicorn are not installed.
    """
    args = _parser().parse_args(argv)
    for name in ("max_batch", "max_context", "max_queue", "prefill_chunk", "max_output", "max_new_tokens", "max_body"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(args, name)}")
    if not args.timeout > 0:
        raise UserError(f"--timeout must be above 0, not {args.timeout}")
    try:
        import uvicorn

        from minimind_fast.serve.app import Service, make_app
    except ImportError as error:
        raise UserError(f"serve needs FastAPI and uvicorn ({error}): pip install 'minimind_fast[serve]'") from None
    Sampling(args.temperature, args.top_p)  # their ranges
    key = args.api_key or os.environ.get("MINIMIND_API_KEY", "")
    local = is_local(args.host)
    model, tokenizer = open_model(args)
    context = min(args.max_context, model.config.max_position_embeddings)
    batcher = Batcher(model, args.max_batch, context, args.max_queue, args.prefill_chunk)
    service = Service(
        tokenizer,
        batcher,
        args.name or _name_of(args.path),
        key,
        args.max_body,
        max(args.max_output, args.max_new_tokens),
        args.max_new_tokens,
        args.timeout,
        local,
        Defaults(args.temperature, args.top_p, args.thinking, args.strict),
    )
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    # Bind here rather than in uvicorn, for a clear error if the port is in use and to report port 0's choice.
    with socket.create_server((args.host, args.port), family=family, backlog=2048) as listener:
        port = listener.getsockname()[1]
        shown = f"[{args.host}]" if ":" in args.host else args.host
        size_mib = batcher.slots.cache.nbytes / 2**20
        _note(f"http://{shown}:{port}  a chat page; OpenAI's API under http://{shown}:{port}/v1")
        _note(f"{service.name}: {args.max_batch} requests at once, {context} tokens each, cache {size_mib:.0f} MiB")
        if not local and not key:
            _note("warning: anyone who can reach this address can use the model; set a key with --api-key")
        config = uvicorn.Config(
            make_app(service),
            log_level="warning",
            server_header=False,
            limit_concurrency=1024,
            timeout_keep_alive=15,
            timeout_graceful_shutdown=3,
        )
        uvicorn.Server(config).run(sockets=[listener])
    return 0


def _name_of(path: str) -> str:
    """`out/sft/weights` is the model `sft`."""
    parts = [p for p in os.path.abspath(path).split(os.sep) if p and p != "weights"]
    return os.path.splitext(parts[-1])[0] if parts else "minimind"


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
