"""Rooflines: minimum bytes and FLOPs of each op and of a training step.

Purpose: one count shared by the benchmarks, the compiler's table and `minimind-fast plan`.
Principle: the mandatory minimum. Bytes: each input and output once, saved tensors as inputs of the backward; a matmul reads
    its operands and writes its result, three times a step. FLOPs: 2MNK per matmul, causal pairs only. Parts run one after
    the other, each bound by the slower of its bytes and its FLOPs. An op's own count is in its record.
Properties: a lower bound for any implementation that stores its activations; nothing is measured here.

Shapes: T tokens, D hidden, F ffn, H query heads, K kv heads, hd head_dim, E experts, V vocab.
"""

from __future__ import annotations

import torch
from torch import nn

from minimind_fast.config import ModelConfig
from minimind_fast.errors import UserError
from minimind_fast.model import Experts, Head, MiniMind
from minimind_fast.ops import OPS
from minimind_fast.ops.registry import Work
from minimind_fast.training.optimizers.muon import STEPS, matrices

# Bytes per parameter: read fp32 gradient, master, m, v (16); write master, m, v (12) and the bf16 weight (2).
# DeepSpeed's BF16 optimizer moves about 46: the norm, the clipped gradient written back, the masters read again, clearing.
OPTIMIZER_BYTES = 30
# Muon's matrices: read gradient and momentum, write momentum and look-ahead (16); read it, write the update (8); read the
# update and the master, write the master and the bf16 weight (14). Newton-Schulz comes on top.
MUON_BYTES = 38


def op_work(op: str, c: ModelConfig, direction: str, tokens: int, element_bytes: int) -> Work:
    """Minimum bytes that an op must move, and FLOPs of its matmuls.

    Args:
        op: one of ops.NAMES.
        c: the model's shape.
        direction: "forward", "backward" or "both".
        tokens: T.
        element_bytes: bytes per activation.

    Raises:
        ValueError: an unknown op.
    """
    if op not in OPS:
        raise UserError(f"unknown op {op!r}; choose of {', '.join(OPS)}")
    directions = ("forward", "backward") if direction == "both" else (direction,)
    parts = [OPS[op].work(c, d, tokens, element_bytes) for d in directions]
    return Work(sum(part.bytes for part in parts), sum(part.flops for part in parts))


def causal_pairs(tokens: int, document: float) -> float:
    """Number of (query, key) pairs in T packed tokens of equally long documents."""
    return tokens * (document + 1) / 2


def attention_work(c: ModelConfig, direction: str, tokens: int, pairs: float, element_bytes: int) -> Work:
    """The same for attention: 4 hd FLOPs per pair and head forward, twice that backward (recomputation excluded).

    Args:
        c: the model's shape.
        direction: "forward", "backward" or "both".
        tokens: T.
        pairs: from `causal_pairs`.
        element_bytes: bytes per element of q, k and v.
    """
    assert c.head_dim
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    forward = Work(tokens * (2 * q + 2 * kv) * element_bytes, 4 * q * pairs)
    backward = Work(tokens * (4 * q + 4 * kv) * element_bytes, 8 * q * pairs)
    if direction == "both":
        return Work(forward.bytes + backward.bytes, forward.flops + backward.flops)
    return forward if direction == "forward" else backward


def shape_of(c: ModelConfig) -> MiniMind:
    """The model on the meta device, for counting."""
    with torch.device("meta"):
        return MiniMind(c)


def step_work(c: ModelConfig, tokens: int, document: float, element_bytes: int = 2) -> dict[str, Work]:
    """Work of a micro-batch's forward and backward by part, without the optimizer, which does not grow with tokens.

    Args:
        c: the model's shape.
        tokens: T.
        document: average tokens per document.
        element_bytes: bytes per activation and weight.

    Returns:
        part -> Work: matmul, attention, norms, rope, swiglu, embedding and, for MoE, routing.
    """
    model = shape_of(c)
    layers, top_k = c.num_hidden_layers, c.num_experts_per_tok or 1
    operands = weights = 0.0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            operands += module.in_features + module.out_features
            weights += module.weight.numel()
        elif isinstance(module, Experts):
            for matrix in (module.gate_up, module.down):
                operands += top_k * (matrix.shape[1] + matrix.shape[2])
                weights += matrix.numel()
        elif isinstance(module, Head):  # full logits are never stored
            operands += c.hidden_size
            weights += module.weight.numel()
    pairs = causal_pairs(tokens, document)
    attention = attention_work(c, "both", tokens, pairs, element_bytes)
    attention = Work(attention.bytes * layers, attention.flops * layers)
    matmul_flops = model.flops(tokens, 0)

    def part(op: str, times: float) -> Work:
        one = op_work(op, c, "both", tokens, element_bytes)
        return Work(one.bytes * times)

    # The op's count is for one MLP, dense or one expert; an MoE layer runs top_k of them and the shared ones.
    swiglus = top_k + (c.num_shared_experts or 0) if c.use_moe else 1
    parts = {
        "matmul": Work(3 * (operands * tokens + weights) * element_bytes, matmul_flops),
        "attention": attention,
        "norms": part("rms_norm", 2 * layers),
        "rope": part("rope", layers),
        "swiglu": part("swiglu", swiglus * layers),
        "embedding": Work(3 * tokens * c.hidden_size * element_bytes),
    }
    if c.use_moe:  # the router's input and gradient; expert rows gathered and summed, forward and backward
        gathered = Work(6 * top_k * tokens * c.hidden_size * element_bytes * layers)
        parts["routing"] = Work(part("moe_route", layers).bytes + gathered.bytes)
    return parts


def muon_work(c: ModelConfig, element_bytes: int = 2, halved: bool = True) -> Work:
    """Work of Muon's step on all hidden matrices, which does not grow with tokens.

    A Newton-Schulz step of an m x n matrix (m <= n) is x x^T, its square and their sum times x.

    Args:
        c: the model's shape.
        element_bytes: bytes per element that is multiplied.
        halved: whether only half of the two symmetric products is computed.
    """
    total = Work(0.0)
    for shape in (shape for shapes in matrices(shape_of(c)).values() for shape in shapes):
        m, n = sorted(shape)
        symmetric = (m * m * n + m**3) * (1 if halved else 2)
        moved = STEPS * (3 * m * n + 4 * m * m) * element_bytes + MUON_BYTES * m * n
        total = Work(total.bytes + moved, total.flops + STEPS * (symmetric + 2 * m * m * n))
    return total
