"""Weight gradients of the newest model's projections: cuBLAS, cuBLAS over pieces of the rows, split-K in Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.suite.harness import Suite
from minimind_fast.config import ModelConfig
from minimind_fast.ops.registry import Work
from minimind_fast.proof.rule import compare

TOKENS = (65536, 6144, 53191)  # most important first
PIECES = (4, 16)  # for cuBLAS in pieces
NAMES = ("eager", "split-K", *(f"bmm x{count}" for count in PIECES))  # eager is torch.mm: cuBLAS as it chooses


def projections(c: ModelConfig) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each matrix of a layer, fused as in our model."""
    assert c.head_dim and c.intermediate_size
    d, f, q = c.hidden_size, c.intermediate_size, c.num_attention_heads * c.head_dim
    qkv = q + 2 * c.num_key_value_heads * c.head_dim
    return {"o": (d, q), "qkv": (qkv, d), "down": (d, f), "gate_up": (2 * f, d)}


def _rows(suite: Suite) -> list[tuple[Any, ...]]:
    asked = suite.tokens(0, 256)
    counts = TOKENS if asked == [0] else asked
    names = (
        NAMES if suite.on_gpu else NAMES[:1]
    )  # a CPU has no float32 results for narrow operands, and no waves to fill
    presets = [p for p in suite.presets(("minimind3",), ("minimind2-small",)) if not ModelConfig.preset(p).use_moe]
    return [
        (preset, tokens, which, name)
        for preset in presets
        for tokens in counts
        for which in projections(ModelConfig.preset(preset))
        for name in names
    ]


ROWS = {"test_weight_gradient": _rows}


def _implementation(name: str) -> Callable | str:
    if name == "eager":
        return lambda dy, x: dy.t() @ x
    try:
        from benchmarks.studies import split_k
    except ImportError as error:
        return f"Triton is not installed: {error}"
    if name == "split-K":
        return split_k.weight_grad
    return lambda dy, x: split_k.in_pieces(dy, x, int(name.removeprefix("bmm x")))


def test_weight_gradient(case: tuple[Any, ...], suite: Suite, benchmark: Any) -> None:
    preset, tokens, which, name = case
    n, k = projections(ModelConfig.preset(preset))[which]
    function = _implementation(name)
    if isinstance(function, str):
        pytest.skip(function)

    def draw(seed: int) -> list[torch.Tensor]:
        own = torch.Generator(suite.device).manual_seed(seed)
        return [torch.randn(tokens, m, generator=own, device=suite.device).to(suite.dtype) for m in (n, k)]

    first = draw(0)
    truth = first[0].double().t() @ first[1].double()
    mine, theirs = function(*first), first[0].t() @ first[1]
    errors = suite.hold_to({"dW": compare(mine, theirs, truth)}, name == "split-K")
    del truth, mine, theirs
    element = torch.finfo(suite.dtype).bits // 8
    sets = [draw(1 + i) for i in range(suite.sets(tokens * (n + k) * element))]
    suite.row(
        benchmark,
        f"dW of {which} {preset} T={tokens}",
        name,
        [lambda some=some, call=function: call(*some) for some in sets],
        Work((tokens * (n + k) + n * k) * element, 2 * tokens * n * k),
        kind="weight gradient",
        op="dW",
        preset=preset,
        tokens=tokens,
        projection=which,
        dtype=suite.dtype_name,
        peak_bytes=suite.peak_bytes(lambda: function(*first)),
        **errors,
    )
