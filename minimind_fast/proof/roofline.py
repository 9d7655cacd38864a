"""The least that a machine must do: bytes and FLOPs of each op and of a training step, and how fast cards are.

Purpose: one count that the benchmarks, the compiler's table and `minimind-fast plan` share.
Principle: the mandatory minimum. Bytes: each input and each output once, saved tensors as inputs of the backward; a
    matmul reads its operands and writes its result, three times a step. FLOPs: 2MNK a matmul, causal pairs only. Parts run
    one after the other, each as fast as the slower of its bytes and its FLOPs.
Properties: a floor, which nothing that stores its activations can undercut; nothing is measured here. Rates of a card are
    90% of its data sheet's bandwidth and 80% of its dense bf16 peak, which is what an H200 gave: 4.3 TB/s, 790 TFLOP/s.

Shapes: T tokens, D hidden, F ffn, H query heads, K kv heads, hd head_dim, E experts, V vocab.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from minimind_fast.config import ModelConfig
from minimind_fast.model import Experts, Head, MiniMind
from minimind_fast.training.log import PEAK_TFLOPS

TEACHER_HIDDEN = 768  # of the distillation case
OPTIMIZER_BYTES = 30  # a parameter: fp32 gradient, master and two moments read, three of them and bf16 weights written


class Work(NamedTuple):
    """What something must do at least."""

    bytes: float
    flops: float = 0.0

    def seconds(self, bytes_per_s: float, flop_per_s: float) -> float:
        """The floor in time, when bytes and FLOPs overlap fully."""
        return max(self.bytes / bytes_per_s, self.flops / flop_per_s)


def op_work(op: str, c: ModelConfig, direction: str, tokens: int, element_bytes: int) -> Work:
    """Bytes that an op must move at least, and FLOPs of its matmuls.

    Args:
        op: its name.
        c: the model.
        direction: "forward", "backward" or "both".
        tokens: T.
        element_bytes: of the activations.

    Returns:
        Work.

    Raises:
        ValueError: an unknown op.
    """
    if direction == "both":
        one, two = (op_work(op, c, d, tokens, element_bytes) for d in ("forward", "backward"))
        return Work(one.bytes + two.bytes, one.flops + two.flops)
    assert c.head_dim and c.intermediate_size and c.moe_intermediate_size and c.num_experts_per_tok
    d, v, back = c.hidden_size, c.vocab_size, direction == "backward"
    f = c.moe_intermediate_size if c.use_moe else c.intermediate_size
    qk, kv = (c.num_attention_heads + c.num_key_value_heads) * c.head_dim, c.num_key_value_heads * c.head_dim
    values = {
        "rms_norm": 4 * d,
        "rope": (3 if c.qk_norm else 2) * qk + 2 * kv if back else 2 * qk,
        "swiglu": (5 if back else 3) * f,
        "linear_cross_entropy": (2 if back else 1) * d,
        "linear_kl": 2 * d if back else d + TEACHER_HIDDEN,
        "moe_route": (2 if back else 1) * d,
        "moe_mlp": (3 if back else 2) * d,
    }
    if op not in values:
        raise ValueError(f"unknown op {op!r}; choose of {', '.join(values)}")
    flops = {
        "linear_cross_entropy": 2 * d * v * (2 if back else 1),
        "linear_kl": 4 * d * v if back else 2 * (d + TEACHER_HIDDEN) * v,
        "moe_mlp": 6 * d * f * c.num_experts_per_tok * (2 if back else 1),
    }.get(op, 0)
    return Work(tokens * values[op] * element_bytes, tokens * flops)


def causal_pairs(tokens: int, document: float) -> float:
    """(query, key) pairs of packed documents.

    Args:
        tokens: T.
        document: tokens of each document.
    """
    return tokens * (document + 1) / 2


def attention_work(c: ModelConfig, direction: str, tokens: int, pairs: float, element_bytes: int) -> Work:
    """The same for attention: 4 hd FLOPs a pair and head forward, twice that backward (nothing for recomputation).

    Args:
        c: the model.
        direction: "forward", "backward" or "both".
        tokens: T.
        pairs: of `causal_pairs`.
        element_bytes: of q, k and v.
    """
    assert c.head_dim
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    forward = Work(tokens * (2 * q + 2 * kv) * element_bytes, 4 * q * pairs)
    backward = Work(tokens * (4 * q + 4 * kv) * element_bytes, 8 * q * pairs)
    if direction == "both":
        return Work(forward.bytes + backward.bytes, forward.flops + backward.flops)
    return forward if direction == "forward" else backward


def shape_of(c: ModelConfig) -> MiniMind:
    """The model without data, for counting.

    Args:
        c: its config.
    """
    with torch.device("meta"):
        return MiniMind(c)


def step_work(c: ModelConfig, tokens: int, document: float, element_bytes: int = 2) -> dict[str, Work]:
    """A micro-batch's forward and backward in parts; the optimizer apart, as it does not grow with tokens.

    Args:
        c: the model.
        tokens: T.
        document: tokens of each document, on average.
        element_bytes: of activations and weights.

    Returns:
        part -> Work: matmul, attention, norms, rope, swiglu, embedding, and of a mixture routing.
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
        elif isinstance(module, Head):  # whole logits are never stored
            operands += c.hidden_size
            weights += module.weight.numel()
    pairs = causal_pairs(tokens, document)
    attention = attention_work(c, "both", tokens, pairs, element_bytes)
    attention = Work(attention.bytes * layers, attention.flops * layers)
    matmul_flops = model.flops(tokens, 0)

    def part(op: str, times: float) -> Work:
        one = op_work(op, c, "both", tokens, element_bytes)
        return Work(one.bytes * times)

    # The op's count is of an MLP, dense or one expert's; a mixture has top_k of them and the shared ones.
    swiglus = top_k + (c.num_shared_experts or 0) if c.use_moe else 1
    parts = {
        "matmul": Work(3 * (operands * tokens + weights) * element_bytes, matmul_flops),
        "attention": attention,
        "norms": part("rms_norm", 2 * layers),
        "rope": part("rope", layers),
        "swiglu": part("swiglu", swiglus * layers),
        "embedding": Work(3 * tokens * c.hidden_size * element_bytes),
    }
    if c.use_moe:  # the router's input and gradient; rows of the experts gathered and summed, there and back
        gathered = Work(6 * top_k * tokens * c.hidden_size * element_bytes * layers)
        parts["routing"] = Work(part("moe_route", layers).bytes + gathered.bytes)
    return parts


@dataclass(frozen=True)
class Card:
    """What a device can do.

    Attributes:
        name: as it calls itself, or a part of that.
        memory_gib: of its memory.
        bytes_per_s: a large copy, read plus written.
        flop_per_s: a large bf16 matmul.
        links_bytes_per_s: to the other devices of its node, one direction.
        how: where the rates are from.
    """

    name: str
    memory_gib: float
    bytes_per_s: float
    flop_per_s: float
    links_bytes_per_s: float
    how: str


# name -> (memory in GiB, TB/s, GB/s to its neighbours in one direction: NVLink, else PCIe); vendors' data sheets.
_SHEETS = {
    "B200": (180, 8.0, 900),
    "H200": (141, 4.8, 450),
    "H100": (80, 3.35, 450),
    "A100": (80, 2.04, 300),
    "L40S": (48, 0.864, 32),
    "RTX 5090": (32, 1.79, 64),
    "RTX 4090": (24, 1.01, 32),
    "RTX 3090": (24, 0.936, 32),
}
CARDS = {
    name: Card(
        name, memory, 0.9 * tb * 1e12, 0.8 * PEAK_TFLOPS[name] * 1e12, links * 1e9, "data sheet, see roofline.py"
    )
    for name, (memory, tb, links) in _SHEETS.items()
}
