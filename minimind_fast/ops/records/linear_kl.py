"""Linear KL divergence between a teacher's and a student's next-token distributions.

Purpose: the record of the op: reference, work, cases, timing.
Principle: sum_j p_j (log p_j - log q_j) with p and q the softmax of each head's logits.
Properties: compute-bound. The reference stores all logits of both models; the kernel never does.

Shapes: T tokens, D the student's and D' the teacher's hidden size, V vocab; `...` any leading shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minimind_fast.config import ModelConfig
from minimind_fast.ops.cases import Case, Draw
from minimind_fast.ops.numbers import accum_dtype
from minimind_fast.ops.registry import Op, Timing, Work

TEACHER_HIDDEN = 768  # D' in the models' cases


def linear_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    reverse: bool = False,
) -> Tensor:
    """Per-token KL divergence between a teacher's and a student's next-token distributions.

    Args:
        student_hidden: (..., D).
        student_weight: (V, D).
        teacher_hidden: (..., D').
        teacher_weight: (V' >= V, D'); cut to the student's V rows before the softmax. No gradient reaches the teacher.
        mask: (...) bool; the result is 0 where it is False.
        temperature: divides both logits; no T^2 factor is applied.
        reverse: KL(student || teacher) instead of KL(teacher || student).

    Returns:
        (...) float32.

    Raises:
        ValueError: the teacher's vocabulary is smaller than the student's.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, 2015.
    """
    vocab = student_weight.shape[0]
    if teacher_weight.shape[0] < vocab:
        raise ValueError(
            f"the teacher's vocabulary ({teacher_weight.shape[0]}) is smaller than the student's ({vocab})"
        )
    wide = accum_dtype(student_hidden.dtype)
    student = ((student_hidden @ student_weight.t()).to(wide) / temperature).log_softmax(-1)
    with torch.no_grad():
        logits = (teacher_hidden @ teacher_weight[:vocab].t()).to(wide)
        teacher = (logits / temperature).log_softmax(-1)
    p, q = (student, teacher) if reverse else (teacher, student)
    kl = (p.exp() * (p - q)).sum(-1)
    return kl if mask is None else torch.where(mask, kl, 0.0)


def _work(c: ModelConfig, direction: str, tokens: int, element_bytes: int) -> Work:
    """Forward: both hidden states; a matmul each. Backward: the student's and its gradient; two matmuls."""
    d, v = c.hidden_size, c.vocab_size
    if direction == "backward":
        return Work(tokens * 2 * d * element_bytes, tokens * 4 * d * v)
    return Work(tokens * (d + TEACHER_HIDDEN) * element_bytes, tokens * 2 * (d + TEACHER_HIDDEN) * v)


def _case(
    name: str,
    tokens: int,
    hidden: int,
    vocab: int,
    teacher_hidden: int,
    teacher_vocab: int,
    masked: bool = True,
    scale: float = 1.0,
    **options: Any,
) -> Case:
    def tensors(draw: Draw) -> dict[str, Any]:
        return {
            "student_hidden": draw.normal(tokens, hidden),
            "student_weight": draw.normal(vocab, hidden, scale=scale * hidden**-0.5),
            "teacher_hidden": draw.normal(tokens, teacher_hidden),
            "teacher_weight": draw.normal(teacher_vocab, teacher_hidden, scale=scale * teacher_hidden**-0.5),
            "mask": draw.chance(0.8, tokens) if masked else None,
        }

    return Case("linear_kl", name, tensors, options)


OP = Op(
    name="linear_kl",
    reference=linear_kl,
    differentiable=("student_hidden", "student_weight"),
    work=_work,
    model_case=lambda c, tokens: _case("", tokens, c.hidden_size, c.vocab_size, TEACHER_HIDDEN, c.vocab_size),
    cases=(
        _case("reverse", 11, 48, 300, 64, 300, reverse=True),
        _case("temperature, wider teacher", 11, 48, 300, 96, 320, temperature=2.0),
        _case("reverse, temperature, no mask", 11, 48, 301, 32, 301, masked=False, reverse=True, temperature=0.7),
        _case("one token", 1, 32, 100, 32, 100),
        _case("no tokens", 0, 32, 100, 32, 100),
        _case("sharp", 9, 64, 200, 64, 200, scale=8.0),
    ),
    small={"vocab_size": 640},
    in_forward=False,
    place=5,
    timing=Timing(place=7, matmul=lambda c, tokens: (tokens, c.vocab_size, c.hidden_size)),
    page="kernel_linear_kl",
    issue_bound={
        "_linear_kl_fwd_kernel": "82 instructions a pair of logits, read twice: two maxima and sums, then the divergence",
        "_linear_kl_bwd_kernel": "31 instructions a pair of logits: two exponentials, mask",
    },
)
