"""Decoding speed: ours against a plain eager loop with growing caches.

Purpose: a table of decode tokens/s for minimind2-small with 512 tokens of context, one row and a batch of 8.
Principle: both sides have the same weights, thread count and prompts; with the same dtype they must give the same greedy
    tokens. MiniMind decodes in float32 on a CPU, ours in the dtype of the stored weights, which training writes as
    bfloat16: that pair, which users of both actually see, has its own row.
    The other side decodes as MiniMind does: separate q, k and v projections, norms and rotation in several ops,
    `torch.cat` to grow the cache, repeated kv heads, materialised scores, and the head over the last position.
Properties: the sides alternate, so other load hits both equally. Reported are medians, the median of neighbouring runs'
    ratios, and the ratio of the two best runs. Our time includes preparing weight layouts before the first step.
    `python -m benchmarks.studies.generation` writes results/cpu_generation.json and .md; on a GPU gpu_generation, with
    both sides in float32 and both in bfloat16, where equal tokens are not guaranteed.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import minimind_fast as mm
from benchmarks.record import RESULTS, processor, write
from minimind_fast.infer.decode import Decoder
from minimind_fast.weights.checkpoint import to_disk_names

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAME = f"{'gpu' if DEVICE == 'cuda' else 'cpu'}_generation.json"
PAIRS = [("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")]  # (eager, ours)
if DEVICE == "cuda":
    PAIRS = PAIRS[:2]


def now() -> float:
    """Seconds, after all launched work has finished."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class EagerLoop:
    """A dense MiniMind2 decoded step by step with caches that grow by `torch.cat`; shares the model's weights."""

    def __init__(self, model: mm.MiniMind) -> None:
        config = model.config
        assert not config.use_moe and not config.qk_norm and config.head_dim and config.rms_norm_eps
        self.w = to_disk_names(model.state_dict(), config)
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.layers, self.head_dim, self.eps = config.num_hidden_layers, config.head_dim, config.rms_norm_eps
        cos, sin = model.model.rotary.cos, model.model.rotary.sin
        self.cos, self.sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
        self.past: list[tuple[Tensor, Tensor] | None] = [None] * self.layers

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return ((x * cos.unsqueeze(1)) + (turned * sin.unsqueeze(1))).to(x.dtype)

    def _repeat(self, x: Tensor) -> Tensor:
        b, t, heads, hd = x.shape
        groups = self.heads // self.kv_heads
        return x[:, :, :, None, :].expand(b, t, heads, groups, hd).reshape(b, t, heads * groups, hd)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, n) new tokens -> (B, V) logits at the last one."""
        b, n = ids.shape
        begin = 0 if self.past[0] is None else self.past[0][0].shape[1]
        h = F.embedding(ids, self.w["model.embed_tokens.weight"])
        cos, sin = self.cos[begin : begin + n], self.sin[begin : begin + n]
        for i in range(self.layers):
            p = f"model.layers.{i}."
            x = self._norm(h, self.w[p + "input_layernorm.weight"])
            q, k, v = (
                F.linear(x, self.w[f"{p}self_attn.{c}_proj.weight"]).view(b, n, -1, self.head_dim) for c in "qkv"
            )
            q, k = self._rotate(q, cos, sin), self._rotate(k, cos, sin)
            if (past := self.past[i]) is not None:
                k, v = torch.cat([past[0], k], dim=1), torch.cat([past[1], v], dim=1)
            self.past[i] = (k, v)
            q, k, v = q.transpose(1, 2), self._repeat(k).transpose(1, 2), self._repeat(v).transpose(1, 2)
            if n > 1:
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            else:
                scores = (q @ k.transpose(-2, -1)) / math.sqrt(self.head_dim)
                scores = scores + torch.triu(torch.full((n, n), float("-inf")), diagonal=1)[None, None]
                out = F.softmax(scores.float(), dim=-1).type_as(q) @ v
            h = h + F.linear(out.transpose(1, 2).reshape(b, n, -1), self.w[p + "self_attn.o_proj.weight"])
            x = self._norm(h, self.w[p + "post_attention_layernorm.weight"])
            gate, up = (F.linear(x, self.w[f"{p}mlp.{c}_proj.weight"]) for c in ("gate", "up"))
            h = h + F.linear(F.silu(gate) * up, self.w[p + "mlp.down_proj.weight"])
        return F.linear(self._norm(h, self.w["model.norm.weight"])[:, -1], self.w["lm_head.weight"])


@torch.inference_mode()
def run_eager(model: mm.MiniMind, prompts: Tensor, new: int) -> tuple[list[list[int]], float]:
    """Greedy tokens (B, new) and seconds per decode step."""
    loop = EagerLoop(model)
    ids = loop.forward(prompts).float().argmax(-1, keepdim=True)
    out, begin_s = [ids], now()
    for _ in range(new - 1):
        ids = loop.forward(ids).float().argmax(-1, keepdim=True)
        out.append(ids)
    end_s = now()
    return torch.cat(out, 1).tolist(), (end_s - begin_s) / (new - 1)


@torch.inference_mode()
def run_ours(model: mm.MiniMind, prompts: Tensor, new: int) -> tuple[list[list[int]], float]:
    """The same with `Decoder`."""
    decoder = Decoder(model, prompts.shape[0], prompts.shape[1] + new)
    ids = decoder.prefill(prompts.tolist()).float().argmax(-1)
    out, begin_s = [ids], now()
    for _ in range(new - 1):
        ids = decoder.step(ids).float().argmax(-1)
        out.append(ids)
    end_s = now()
    return torch.stack(out, 1).tolist(), (end_s - begin_s) / (new - 1)


def compare(dtypes: tuple[str, str], rows: int, context: int, new: int, rounds: int) -> dict:
    """Measure one row of the table, alternating both sides.

    Args:
        dtypes: dtype of weights and cache, for the eager loop and ours.
        rows: B.
        context: prompt tokens per row.
        new: tokens decoded per run.
        rounds: runs of each side.

    Returns:
        Medians in tokens/s over the whole batch, both ratios, and the share of equal greedy tokens.
    """
    torch.manual_seed(0)
    model = mm.MiniMind(mm.ModelConfig.preset("minimind2-small"))
    theirs_model, our_model = (copy.deepcopy(model).to(DEVICE, getattr(torch, d)).eval() for d in dtypes)
    prompts = torch.randint(3, model.config.vocab_size, (rows, context)).to(DEVICE)
    run_eager(theirs_model, prompts, 4)
    run_ours(our_model, prompts, 4)
    pairs = []
    for _ in range(rounds):
        theirs, eager_s = run_eager(theirs_model, prompts, new)
        ours, ours_s = run_ours(our_model, prompts, new)
        pairs.append((eager_s, ours_s))
    same = [a == b for x, y in zip(theirs, ours, strict=True) for a, b in zip(x, y, strict=True)]
    return {
        "eager_dtype": dtypes[0],
        "dtype": dtypes[1],
        "rows": rows,
        "context_tokens": context,
        "new_tokens": new,
        "eager_tokens_per_s": rows / statistics.median(e for e, _ in pairs),
        "ours_tokens_per_s": rows / statistics.median(o for _, o in pairs),
        "ratio": statistics.median(e / o for e, o in pairs),
        "ratio_of_best": min(e for e, _ in pairs) / min(o for _, o in pairs),
        "equal_greedy_tokens": sum(same) / len(same),
    }


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--new", type=int, default=64, help="tokens decoded a run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--out", type=Path, default=RESULTS / NAME)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = []
    print(f"minimind2-small, {args.context} tokens of context, {args.threads} threads, torch {torch.__version__}")
    columns = {
        "eager dtype": 11,
        "ours": 9,
        "rows": 5,
        "eager tok/s": 12,
        "ours tok/s": 11,
        "ratio": 6,
        "of best": 8,
        "equal tokens": 13,
    }
    print(" ".join(f"{name:>{width}}" for name, width in columns.items()))
    for dtypes in PAIRS:
        for rows in args.rows:
            r = compare(dtypes, rows, args.context, args.new, args.rounds)
            results.append(r)
            shown = [
                r["eager_dtype"],
                r["dtype"],
                r["rows"],
                f"{r['eager_tokens_per_s']:.1f}",
                f"{r['ours_tokens_per_s']:.1f}",
            ]
            shown += [f"{r['ratio']:.2f}", f"{r['ratio_of_best']:.2f}", f"{r['equal_greedy_tokens']:.1%}"]
            print(" ".join(f"{x:>{w}}" for x, w in zip(shown, columns.values(), strict=True)), flush=True)
    machine = {"processor": processor(), "threads": args.threads, "torch": str(torch.__version__)}
    if DEVICE == "cuda":
        machine |= {"on_gpu": True, "processor": torch.cuda.get_device_name()}
    result = {**machine, "weight_reads_gb_per_s": read_rate(), "results": results}
    write(args.out, result, table(result))
    print("\n" + table(result))


def read_rate() -> float:
    """GB/s at which this device reads memory; the bound for one row, which reads every weight for each token."""
    x = torch.ones(2**28 if DEVICE == "cuda" else 2**26, device=DEVICE)  # 1 GiB or 256 MiB, far beyond the caches
    best = math.inf
    for _ in range(5):
        begin_s = now()
        x.sum()
        best = min(best, now() - begin_s)
    return x.nbytes / best / 1e9


def table(result: dict) -> str:
    """The result as Markdown."""
    weights = mm.MiniMind(mm.ModelConfig.preset("minimind2-small")).num_parameters()
    where = result["processor"] if result.get("on_gpu") else f"{result['threads']} threads of {result['processor']}"
    it_reads = "It sums" if result.get("on_gpu") else "These threads sum"
    bytes_a_step = {d: weights * torch.finfo(getattr(torch, d)).bits / 8e9 for d in ("float32", "bfloat16")}
    lines = [
        f"By `benchmarks/studies/generation.py` on {where}, torch "
        f"{result['torch']}: minimind2-small, {result['results'][0]['context_tokens']} tokens of context, random weights.",
        "",
        "| eager loop | ours | rows | eager tokens/s | ours tokens/s | ratio | our weight reads | equal greedy tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in result["results"]:
        reads = r["ours_tokens_per_s"] / r["rows"] * bytes_a_step[r["dtype"]]
        lines.append(
            f"| {r['eager_dtype']} | {r['dtype']} | {r['rows']} | {r['eager_tokens_per_s']:.0f} "
            f"| {r['ours_tokens_per_s']:.0f} | **{r['ratio']:.1f}x** | {reads:.1f} GB/s | {r['equal_greedy_tokens']:.0%} |"
        )
    rate = result["weight_reads_gb_per_s"]
    most = {d: rate / size for d, size in bytes_a_step.items()}
    lines += [
        "",
        f"A step reads every weight. {it_reads} a large tensor at {rate:.1f} GB/s, at which one row cannot pass "
        f"{most['float32']:.0f} tokens/s in float32 or {most['bfloat16']:.0f} in bfloat16 (caches aside).",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
