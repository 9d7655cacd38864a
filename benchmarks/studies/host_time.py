"""What a kernel's call costs the host before the GPU has its work: as a custom op, and as the package calls it.

    python -m benchmarks.studies.host_time

Purpose: a step of few tokens is as long as Python takes to launch it; this is the part that the calling convention decides.
Principle: Triton's launches do nothing, tensors are tiny, and the thread's own CPU time is taken: no GPU is needed. Both
    ways run in turns, and the best of several rounds counts.
Properties: not in the figures are Triton's launcher and the driver, which are the same for both.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from unittest import mock

import torch

from minimind_fast.kernels import common
from minimind_fast.kernels.rms_norm import rms_norm
from minimind_fast.kernels.rope import rope
from minimind_fast.kernels.swiglu import swiglu

CALLS, ROUNDS = 200, 5
ROWS, HEADS, KV_HEADS, HEAD_DIM = 4, 8, 4, 32


def draw(*shape: int) -> torch.Tensor:
    """A leaf in bfloat16."""
    return torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)


def calls() -> dict[str, Callable[[], object]]:
    """Name -> a call of an op, forward and backward unless it says otherwise."""
    x, residual, weight, gate_up = draw(ROWS, 64), draw(ROWS, 64), draw(64), draw(ROWS, 128)
    qkv, norms = draw(ROWS, (HEADS + 2 * KV_HEADS) * HEAD_DIM), (draw(HEAD_DIM), draw(HEAD_DIM))
    table, positions = torch.randn(ROWS, HEAD_DIM // 2), torch.arange(ROWS)

    def both(outputs: tuple[torch.Tensor, ...], *leaves: torch.Tensor) -> object:
        return torch.autograd.grad(outputs, leaves, [o.detach() for o in outputs])

    return {
        "rms_norm": lambda: both(rms_norm(x, weight, 1e-6, residual), x, residual, weight),
        "rms_norm, no gradient": torch.no_grad()(lambda: rms_norm(x, weight, 1e-6, residual)),
        "rope": lambda: both(rope(qkv, table, table, positions, HEADS, KV_HEADS, *norms), qkv, *norms),
        "swiglu": lambda: both((swiglu(gate_up),), gate_up),
    }


def host_us(call: Callable[[], object]) -> float:
    """Microseconds of this thread for one call."""
    begin = time.thread_time()
    for _ in range(CALLS):
        call()
    return (time.thread_time() - begin) / CALLS * 1e6


def measure() -> dict[str, tuple[float, float]]:
    """Name -> microseconds (as a custom op, as called)."""
    torch.set_num_threads(1)
    found = {}
    with mock.patch.object(type(common._sum_partials_kernel), "run", lambda *_, **__: None):
        for name, call in calls().items():
            host_us(call)
            rounds = []
            for _ in range(ROUNDS):
                with mock.patch.object(common, "_someone_listens", lambda: True):
                    custom = host_us(call)
                rounds.append((custom, host_us(call)))
            found[name] = tuple(min(times) for times in zip(*rounds, strict=True))
    return found


def main() -> None:
    print("| call | custom op, us | as called, us |\n|---|---|---|")
    for name, (custom, called) in measure().items():
        print(f"| {name} | {custom:.0f} | {called:.0f} |")


if __name__ == "__main__":
    main()
