"""Linear cross-entropy: the log-probability of each target from hidden states and the head's weight.

Purpose: the record of the op: reference, work, cases, timing.
Principle: logprob = z_target - logsumexp(z) with z = hidden W^T / temperature.
Properties: compute-bound. The reference stores all logits; the kernel never does.

Shapes: T tokens, D hidden, V vocab; `...` any leading shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minimind_fast.config import IGNORE_INDEX, ModelConfig
from minimind_fast.ops.cases import Case, Draw
from minimind_fast.ops.numbers import accum_dtype
from minimind_fast.ops.registry import Op, Timing, Work


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    return_entropy: bool = False,
    grad_weights: Tensor | None = None,
):
    """Per-token log-probability of the target under softmax(hidden @ weight.T / temperature).

    Args:
        hidden: (..., D).
        weight: (V, D), the head.
        targets: (...) int64; IGNORE_INDEX where there is no loss.
        temperature: divides the logits.
        return_entropy: also return the entropy of the distribution.
        grad_weights: (...) float32: a promise that the gradient will be one number times these, which saves the kernel
            a matmul and which the reference ignores. Unless that number is a power of two, the kernel rounds d_hidden
            twice.

    Returns:
        logprobs (...) float32, 0 where ignored; with `return_entropy` also entropy (...) float32, 0 where ignored.
    """
    logits = (hidden @ weight.t()).to(accum_dtype(hidden.dtype))
    if temperature != 1.0:  # on a CPU this saves a pass over a step's largest tensor, forward and backward
        logits = logits / temperature
    counted = targets != IGNORE_INDEX
    lse = logits.logsumexp(-1)
    picked = logits.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    logprobs = torch.where(counted, picked - lse, 0.0)
    if not return_entropy:
        return logprobs
    entropy = lse - (torch.softmax(logits, -1) * logits).sum(-1)
    return logprobs, torch.where(counted, entropy, 0.0)


def _work(c: ModelConfig, direction: str, tokens: int, element_bytes: int) -> Work:
    """Forward: hidden; one matmul. Backward: hidden and its gradient; two matmuls."""
    times = 2 if direction == "backward" else 1
    return Work(tokens * times * c.hidden_size * element_bytes, tokens * 2 * c.hidden_size * c.vocab_size * times)


def _case(
    name: str,
    tokens: int,
    hidden: int,
    vocab: int,
    ignored: float = 0.2,
    scale: float = 1.0,
    weighted: bool = False,
    **options: Any,
) -> Case:
    def tensors(draw: Draw) -> dict[str, Any]:
        out = {
            "hidden": draw.normal(tokens, hidden),
            "weight": draw.normal(vocab, hidden, scale=scale * hidden**-0.5),
            "targets": draw.targets(vocab, tokens, ignored),
        }
        return {**out, "grad_weights": draw.normal(tokens, dtype=torch.float32)} if weighted else out

    return Case("linear_cross_entropy", name, tensors, options, promised="grad_weights" if weighted else "")


def _model_case(c: ModelConfig, tokens: int, weighted: bool = False) -> Case:
    return _case("", tokens, c.hidden_size, c.vocab_size, weighted=weighted)


OP = Op(
    name="linear_cross_entropy",
    reference=linear_cross_entropy,
    cpu="minimind_fast.ops.cpu.fused:linear_cross_entropy",
    differentiable=("hidden", "weight"),
    work=_work,
    model_case=_model_case,
    training_case=lambda c, tokens: _model_case(c, tokens, weighted=True),
    cases=(
        _case("temperature", 19, 64, 300, temperature=0.7),
        _case("entropy", 19, 64, 300, temperature=1.3, return_entropy=True),
        _case("gradients in the forward", 19, 64, 300, weighted=True, temperature=0.7),
        _case("gradients there, all ignored", 8, 32, 100, ignored=1.1, weighted=True),
        _case("vocabulary of a prime", 9, 48, 1009),
        _case("small vocabulary", 9, 32, 3),
        _case("all ignored", 8, 32, 100, ignored=1.1),
        _case("none ignored", 8, 32, 100, ignored=-1.0),
        _case("one token", 1, 64, 200),
        _case("no tokens", 0, 64, 200),
        _case("sharp", 16, 64, 200, scale=20.0),
        _case("flat", 16, 64, 200, scale=1e-3),
    ),
    large_cases=(_case("vocabulary of 151936", 515, 768, 151936),),
    small={"vocab_size": 640},
    place=4,
    timing=Timing(
        place=5,
        matmul=lambda c, tokens: (tokens, c.vocab_size, c.hidden_size),
        no_backward="in training the forward computes the gradients: see both; forward is that of evaluation",
    ),
    page="kernel_linear_cross_entropy",
    issue_bound={
        "_linear_cross_entropy_fwd_kernel": "30 instructions a logit of 2 bytes: running maximum and sum, exponential, mask",
        "_linear_cross_entropy_bwd_kernel": "24 instructions a logit, read and written: exponential, target, mask",
    },
)
