"""Throughput of the server: many clients at once against the same requests one after another.

Purpose: tokens/s of `minimind-fast serve` with 16 clients and with one, over HTTP.
Principle: a server process with random weights, the clients in this one. The same greedy completions are requested one
    after another, then by all clients at once; whole and streamed. Both must give the same texts.
Properties: rounds alternate between the two sides, so other load hits both equally; the ratio of medians is reported. The
    clients share the server's cores. Writes results/cpu_serving.json and .md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import torch

import minimind_fast as mm
from benchmarks.record import RESULTS, environment, processor, write
from minimind_fast.data import samples

MODELS = ("tiny", "minimind2-small")


class Server:
    """`minimind-fast serve` with random weights in its own process, for a `with` block.

    Args:
        name: preset.
        dtype: dtype of weights and cache.
        clients: rows of the batch.
        threads: PyTorch's threads.
    """

    def __init__(self, name: str, dtype: str, clients: int, threads: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        torch.manual_seed(0)
        model = mm.MiniMind(mm.ModelConfig.preset(name))
        mm.save_pretrained(model, self.folder.name)
        tokenizer = samples.path("tokenizer")
        command = [sys.executable, "-m", "minimind_fast.cli", "serve", self.folder.name, "--tokenizer", str(tokenizer)]
        command += ["--port", "0", "--dtype", dtype, "--max_batch", str(clients), "--threads", str(threads)]
        self.process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)

    def __enter__(self) -> str:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if found := re.match(r"(http://\S+)", line):
                return found[1]
        raise RuntimeError("the server did not start")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()
        self.folder.cleanup()


async def ask(client: httpx.AsyncClient, prompt: list[int], new: int, stream: bool) -> str:
    """Request one completion and return its text."""
    body = {"prompt": prompt, "max_tokens": new, "temperature": 0, "stream": stream}
    if not stream:
        reply = await client.post("/v1/completions", json=body)
        return reply.raise_for_status().json()["choices"][0]["text"]
    text = ""
    async with client.stream("POST", "/v1/completions", json=body) as reply:
        async for line in reply.raise_for_status().aiter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
    return text


async def tokens_of(client: httpx.AsyncClient) -> int:
    """Tokens generated since the server started."""
    page = (await client.get("/metrics")).text
    found = re.search(r"^minimind_generated_tokens_total (\S+)$", page, re.M)
    assert found is not None
    return int(float(found[1]))


async def measure(url: str, clients: int, context: int, new: int, rounds: int) -> list[dict]:
    """Rows of the table for one server: whole and streamed."""
    draw = random.Random(0)
    prompts = [[draw.randrange(100, 6000) for _ in range(context)] for _ in range(clients)]
    rows = []
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=clients)) as client:
        await asyncio.gather(*(ask(client, p, 4, False) for p in prompts))  # warm-up
        for stream in (False, True):
            rates: dict[str, list[float]] = {"one": [], "many": []}
            for _ in range(rounds):
                texts = {}
                for side in rates:
                    before, begin_s = await tokens_of(client), time.perf_counter()
                    if side == "one":
                        texts[side] = [await ask(client, p, new, stream) for p in prompts]
                    else:
                        texts[side] = await asyncio.gather(*(ask(client, p, new, stream) for p in prompts))
                    seconds = time.perf_counter() - begin_s
                    rates[side].append((await tokens_of(client) - before) / seconds)
                equal = sum(a == b for a, b in zip(texts["one"], texts["many"], strict=True)) / clients
            one, many = (statistics.median(rates[side]) for side in ("one", "many"))
            rows.append(
                {
                    "streamed": stream,
                    "one_after_another_tokens_per_s": one,
                    "at_once_tokens_per_s": many,
                    "ratio": many / one,
                    "equal_answers": equal,
                }
            )
    return rows


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--context", type=int, default=64, help="prompt tokens")
    parser.add_argument("--new", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu_serving.json")
    args = parser.parse_args()
    results = []
    print(f"{args.clients} clients, {args.context} prompt tokens, {args.new} new, {args.threads} threads")
    columns = {"model": 16, "dtype": 9, "streamed": 9, "one by one": 11, "at once": 9, "ratio": 6, "equal": 6}
    print(" ".join(f"{name:>{width}}" for name, width in columns.items()))
    for name in args.models:
        for dtype in args.dtypes:
            with Server(name, dtype, args.clients, args.threads) as url:
                rows = asyncio.run(measure(url, args.clients, args.context, args.new, args.rounds))
            for row in rows:
                results.append({"model": name, "dtype": dtype, **row})
                shown = [
                    name,
                    dtype,
                    "yes" if row["streamed"] else "no",
                    f"{row['one_after_another_tokens_per_s']:.0f}",
                ]
                shown += [f"{row['at_once_tokens_per_s']:.0f}", f"{row['ratio']:.1f}", f"{row['equal_answers']:.0%}"]
                print(" ".join(f"{x:>{w}}" for x, w in zip(shown, columns.values(), strict=True)), flush=True)
    head = {"machine": processor(), "torch": str(torch.__version__)}
    head |= {name: getattr(args, name) for name in ("threads", "clients", "context", "new", "rounds")}
    found = {**head, "results": results}
    write(args.out, found, table(found))


def table(found: dict) -> str:
    """The result as Markdown."""
    lines = [
        f"By `benchmarks/studies/serving.py` on {found['threads']} threads of {found['machine']}, torch {found['torch']}: "
        f"{found['clients']} clients, {found['context']} prompt tokens, {found['new']} new ones, random weights.",
        "",
        "| model | dtype | streamed | one after another, tokens/s | all at once | ratio | equal answers |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in found["results"]:
        one, many = (f"{r[key]:,.0f}" for key in ("one_after_another_tokens_per_s", "at_once_tokens_per_s"))
        cells = (r["model"], r["dtype"], "yes" if r["streamed"] else "no", one, many, f"**{r['ratio']:.1f}x**")
        lines.append("| " + " | ".join((*cells, f"{r['equal_answers']:.0%}")) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
