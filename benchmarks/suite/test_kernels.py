"""Each op forward, backward and both: eager, eager compiled, ours, Liger-Kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.suite.harness import Suite, others_may_fail
from benchmarks.suite.implementations import NAMES, Bench, check, implementation
from minimind_fast import ops
from minimind_fast.config import ModelConfig
from minimind_fast.proof.roofline import op_work

# Ops with goals come first. The head's goals are about its loss, which has its own group.
ORDER = sorted(ops.OPS.values(), key=lambda op: op.timing.place)
DIRECTIONS = ("forward", "backward", "both")


def _rows(suite: Suite) -> list[tuple[Any, ...]]:
    rows = []
    for asked in suite.tokens(65536, 0):
        for op in ORDER:
            for preset in suite.presets(("minimind3", "minimind3-moe"), ("minimind2-small", "minimind3-moe")):
                tokens = asked or op.timing.cpu_tokens
                # An MoE model's other ops have the shapes of a dense model.
                repeated = ModelConfig.preset(preset).use_moe and not op.of_mixtures and not suite.everything
                if op.preset_case(preset, 1) is not None and not repeated:
                    rows += [(op.name, preset, tokens, name, way) for name in NAMES for way in DIRECTIONS]
    return rows


ROWS = {"test_kernel": _rows}


def test_kernel(case: tuple[Any, ...], suite: Suite, benchmark: Any) -> None:
    op, preset, tokens, name, direction = case
    function = implementation(op, name, suite.device)
    if isinstance(function, str):
        pytest.skip(function)
    timing = ops.OPS[op].timing
    if timing.no_backward and direction == "backward":
        pytest.skip(timing.no_backward)
    how = (op, preset, tokens, suite.dtype, suite.device)
    with others_may_fail(name in ("eager", "ours")):
        found = check(*how, name)
        first = Bench(*how, seed=1)
        benches = [first, *(Bench(*how, seed=1 + i) for i in range(1, suite.sets(first.size)))]
        for bench in benches:
            bench.both(function)  # warm-up: draws gradients, compiles functions
    errors = suite.hold_to(found, name == "ours")
    config = ModelConfig.preset(preset)
    group = f"{op} {preset} T={tokens}"
    less = 0.0
    if direction == "backward" and not suite.on_gpu:
        graph = first.forward(function)
        calls = [lambda: first.backward(graph, keep=True)]
    elif direction == "forward":
        calls = [lambda b=bench: b.forward(function, training=False) for bench in benches]
    else:
        calls = [lambda b=bench: b.both(function) for bench in benches]
        if direction == "backward":  # a graph cannot capture backward alone: time both, subtract forward's median
            alone = suite.median(f"{group} forward", name)
            if alone is None:
                pytest.skip("backward is both less forward, and forward was not measured in this run")
            less = alone
    suite.row(
        benchmark,
        f"{group} {direction}",
        name,
        calls,
        op_work(op, config, direction, tokens, torch.finfo(suite.dtype).bits // 8),
        capture=name in ("ours", "liger") or not timing.reference_waits,
        less=less,
        kind="kernel",
        op=op,
        preset=preset,
        tokens=tokens,
        dtype=suite.dtype_name,
        direction=direction,
        same_shape_flop_per_s=suite.same_shape(*timing.matmul(config, tokens)) if timing.matmul else None,
        peak_bytes=suite.peak_bytes(lambda: first.both(function)),
        **errors,
    )
