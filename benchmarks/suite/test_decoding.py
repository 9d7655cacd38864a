"""Generation: prefill and decode, ours beside a plain loop with growing caches."""

from __future__ import annotations

import copy
from typing import Any

import torch

from benchmarks.studies.generation import EagerLoop, run_eager, run_ours
from benchmarks.suite.harness import Suite
from minimind_fast.config import ModelConfig
from minimind_fast.infer.decode import Decoder
from minimind_fast.model import MiniMind
from minimind_fast.ops.registry import Work
from minimind_fast.proof.roofline import causal_pairs, shape_of
from minimind_fast.proof.rule import Comparison, compare

NEW = 16


def _rows(suite: Suite) -> list[tuple[Any, ...]]:
    context = 512 if suite.on_gpu else 64
    batches = (1, 8, 64) if suite.on_gpu else (1, 8)
    return [(b, context, phase, name) for b in batches for phase in ("prefill", "decode") for name in ("eager", "ours")]


ROWS = {"test_generation": _rows}


def _check(model: MiniMind, prompts: torch.Tensor) -> dict[str, Comparison]:
    """Check the logits after the prompts and after one more token by the norm rule."""
    wide = copy.deepcopy(model).double()
    truth, theirs = EagerLoop(wide), EagerLoop(model)
    decoder = Decoder(model, prompts.shape[0], prompts.shape[1] + 1)
    found = {"prefill": (decoder.prefill(prompts.tolist()), theirs.forward(prompts), truth.forward(prompts))}
    ids = found["prefill"][2].argmax(-1)
    found["decode"] = (decoder.step(ids), theirs.forward(ids[:, None]), truth.forward(ids[:, None]))
    return {k: compare(*tensors, 1.25 + 3 * tensors[0].numel() ** -0.5) for k, tensors in found.items()}


@torch.inference_mode()
def test_generation(case: tuple[Any, ...], suite: Suite, benchmark: Any) -> None:
    rows, context, phase, name = case
    config = ModelConfig.preset("minimind2-small", **({} if suite.on_gpu else {"num_hidden_layers": 2}))
    torch.manual_seed(0)
    with torch.inference_mode(False):
        model = MiniMind(config).to(suite.device, suite.dtype).eval()
    prompts = torch.randint(3, config.vocab_size, (rows, context)).to(suite.device)
    errors = suite.hold_to(_check(model, prompts), name == "ours")
    same = torch.tensor(run_eager(model, prompts, NEW)[0]) == torch.tensor(run_ours(model, prompts, NEW)[0])
    parameters = shape_of(config).num_parameters()
    element = torch.finfo(suite.dtype).bits // 8
    assert config.head_dim
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * element
    if phase == "prefill":
        pairs = int(causal_pairs(rows * context, context))
        work = Work(parameters * element, shape_of(config).flops(rows * context, pairs) / 3)

        def call() -> None:
            if name == "eager":
                EagerLoop(model).forward(prompts)
            else:
                Decoder(model, rows, context + 1).prefill(prompts.tolist())

        counted = rows * context
    else:
        # Every weight once, every row's keys and values once.
        work = Work(NEW * (parameters * element + rows * (context + NEW / 2) * cached))

        def call() -> None:
            decode(NEW)

        counted = rows * NEW
        loop = EagerLoop(model)
        decoder = Decoder(model, rows, context + NEW)
        start = loop.forward(prompts).float().argmax(-1, keepdim=True)
        decoder.prefill(prompts.tolist())
        used, at = list(loop.past), decoder.positions.clone()

        def decode(steps: int) -> None:
            if name == "eager":
                loop.past = list(used)  # torch.cat leaves the old caches untouched
                for _ in range(steps):
                    loop.forward(start)
            else:
                decoder.lengths, decoder.positions = [context] * rows, at.clone()  # rewind to the prompts' end
                for _ in range(steps):
                    decoder.step(start.flatten())

    suite.row(
        benchmark,
        f"generation {phase} batch {rows} context {context}",
        name,
        [call],
        work,
        capture=False,
        kind="generation",
        op=phase,
        preset="minimind2-small" if suite.on_gpu else "minimind2-small, 2 layers",
        rows=rows,
        tokens=context,
        counted_tokens=counted,
        dtype=suite.dtype_name,
        equal_greedy_tokens=same.double().mean().item(),
        peak_bytes=suite.peak_bytes(call),
        **errors,
    )
