"""The suite's shared harness: device, roofs, options, and how a row is filled.

Purpose:    one way from calls to a row: time, share of the roof, ratio to eager, peak memory, error beside eager's.
Principle:  correctness first: errors are checked before timing, and a row that fails has no time. Work is the mandatory
            minimum of `proof.roofline`; roofs are measured once per session, on first use.
Properties: times are pytest-benchmark's statistics, of its own clock on a CPU, of played-back device samples on a GPU.
            Groups run eager first, so later rows know their ratio.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import pytest
import torch

from benchmarks.record import processor
from benchmarks.timing import Playback, device_samples, matmul_flop_per_s, num_sets, percentiles, roofs
from minimind_fast.ops import precision
from minimind_fast.ops.cards import peak_flops
from minimind_fast.ops.registry import Work
from minimind_fast.proof.rule import Comparison

ALL_TOKENS = (6144, 16384, 53191, 65536, 131072)
ALL_DOCUMENTS = ("209", "512", "2048", "mix")
CLOCK = Playback()


def document_lengths(kind: str, tokens: int) -> list[int]:
    """Lengths of packed documents that fill a batch.

    Args:
        kind: a length, or "mix": lognormal like web text, mean about 340, at most 2,048, from a fixed seed.
        tokens: their sum.
    """
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    left = tokens
    while left:
        drawn = int(torch.randn((), generator=generator).mul(0.9).add(5.4).exp()) if kind == "mix" else int(kind)
        lengths.append(max(1, min(drawn, 2048, left)))
        left -= lengths[-1]
    return lengths


def offsets(lengths: Sequence[int], device: str) -> torch.Tensor:
    """cu_seqlens (documents + 1,) int32 for these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)


@contextlib.contextmanager
def others_may_fail(own: bool) -> Iterator[None]:
    """Skip the row, with the reason, when a peer's implementation fails; our own errors propagate."""
    try:
        yield
    except Exception as error:
        if own:
            raise
        pytest.skip(f"{type(error).__name__}: {str(error)[:200]}")


class Suite:
    """The session: what is measured where.

    Args:
        everything: all shapes rather than those that fit in ten minutes.
        presets: requested models; empty for the default.
        tokens: requested T; empty for the default.
        budget_s: start no row after this many seconds.
        peer_error: also time peers with up to this many times eager's error, marked as above the rule; 0: the rule holds
            for all.
    """

    def __init__(
        self, everything: bool, presets: list[str], tokens: list[int], budget_s: float, peer_error: float = 0.0
    ) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.on_gpu = self.device == "cuda"
        self.dtype_name = precision.choose("auto")  # as in training
        self.dtype = getattr(torch, self.dtype_name)
        self.everything, self.budget_s, self.peer_error = everything, budget_s, peer_error
        self._presets, self._tokens = presets, tokens
        self.skipped: dict[str, list[str]] = {}  # reason -> rows without a time
        self._medians: dict[tuple[str, str], float] = {}
        self._matmuls: dict[tuple[int, int, int], float] = {}
        self._began = time.monotonic()

    @property
    def device_name(self) -> str:
        """The card's name, or the processor's."""
        if self.on_gpu:
            return torch.cuda.get_device_name()
        return f"CPU {processor()}, {torch.get_num_threads()} threads"

    @cached_property
    def roofs(self) -> dict[str, float]:
        """The device's roofs, measured on first use."""
        return roofs(self.device, self.dtype)

    def presets(self, default: Sequence[str], small: Sequence[str]) -> list[str]:
        """A group's models: those requested, all five, the default on a GPU, or a few on a CPU."""
        every = ["minimind3", "minimind3-moe", "minimind2-small", "minimind2", "minimind2-moe"]
        return self._presets or (every if self.everything else list(default if self.on_gpu else small))

    def tokens(self, default: int, small: int) -> list[int]:
        """A group's T: those requested, all five, or one that suits the device."""
        if not self.on_gpu:
            return self._tokens or [small]
        return self._tokens or (list(ALL_TOKENS) if self.everything else [default])

    def limits(self) -> list[str]:
        """What this run's numbers can and cannot show, for the head of the report."""
        if self.on_gpu:
            return [
                f"On {self.device_name}: bf16, model shapes, graph replays between device events.",
                "Roofs are measured in this run. An implementation that breaks the error rule has no time.",
            ]
        return [
            f"On {self.device_name}: no GPU. What this run can tell: that the suite works, and how our CPU paths stand",
            "beside plain eager PyTorch (and torch.compile, for small ops) at small shapes, in the format that training",
            f"takes here: {self.dtype_name}.",
            "What it cannot: anything of the Triton kernels. They would run in an interpreter, whose time says nothing, so",
            "that they are not timed here; nor of attention backends, CUDA graphs, memory, or shares of a roof, as small",
            "shapes lie in caches.",
        ]

    def stop_if_out_of_time(self) -> None:
        """Skip the calling row once the session's budget is spent."""
        spent = time.monotonic() - self._began
        if spent > self.budget_s:
            pytest.skip(f"out of time: {spent:.0f} s of {self.budget_s:.0f} are spent")

    def hold_to(self, results: dict[str, Comparison], ours: bool) -> dict[str, Any]:
        """End the row unless every comparison passed: no time without a right answer.

        Args:
            results: tensor -> Comparison.
            ours: a failure fails the suite; otherwise the row is skipped with the reason.

        Returns:
            error, eager_error: relative norms of the worst tensor; and above_the_rule if `peer_error` let a peer through.
        """
        broken = {key: r for key, r in results.items() if not r.passed}
        failed = [f"{key}: {r.reason}" for key, r in broken.items()]
        let_through = all(0 < r.norm_error <= self.peer_error * r.eager_norm_error for r in broken.values())
        if failed and (ours or not let_through):
            reason = f"no time without a right answer: {'; '.join(failed)}"
            pytest.fail(reason, pytrace=False) if ours else pytest.skip(reason)
        worst = max((broken or results).values(), key=lambda r: r.norm_error)
        marked = {"above_the_rule": True} if broken else {}
        return {"error": worst.norm_error, "eager_error": worst.eager_norm_error, **marked}

    def sets(self, size: int) -> int:
        """Number of input sets for a call with this many input bytes."""
        return num_sets(size, self.on_gpu)

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        """Peak device memory beyond what is already allocated; None on a CPU, which does not report it."""
        if not self.on_gpu:
            return None
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def time(self, benchmark: Any, calls: Sequence[Callable[[], Any]], capture: bool = True, less: float = 0.0) -> dict:
        """Feed pytest-benchmark its samples.

        Args:
            benchmark: pytest-benchmark's fixture.
            calls: the same work on different inputs; a CPU uses the first.
            capture: see `device_samples`.
            less: seconds to subtract from each sample, for a part that is measured separately.

        Returns:
            how the samples were taken, and with_launch_s on a GPU.
        """
        if not self.on_gpu:
            calls[0]()  # warm-up
            benchmark(calls[0])
            return {"how": "host clock"}
        samples, with_launch, how = device_samples(calls, capture)
        CLOCK.load([max(s - less, 1e-9) for s in samples])
        benchmark.pedantic(lambda: None, rounds=len(samples))
        return {"how": how, "with_launch_s": with_launch - less}

    def row(
        self,
        benchmark: Any,
        group: str,
        implementation: str,
        calls: Sequence[Callable[[], Any]],
        work: Work | None = None,
        capture: bool = True,
        less: float = 0.0,
        floor_s: float | None = None,
        **facts: Any,
    ) -> None:
        """Time an implementation and fill its row.

        Args:
            benchmark: pytest-benchmark's fixture.
            group: rows shown side by side.
            implementation: "eager", "compile", "ours", "liger" or another peer's or backend's name.
            calls, capture, less: as for `time`.
            work: the mandatory minimum of a call.
            floor_s: floor in seconds, for work made of sequential parts.
            facts: kind, preset, tokens, errors and anything else the report shows.
        """
        benchmark.group = group
        facts = {**facts, "implementation": implementation, "device": self.device_name, "torch": torch.__version__}
        facts.update(self.time(benchmark, calls, capture, less))
        if benchmark.stats is not None:  # None with --benchmark-disable
            median, low, high = percentiles(benchmark.stats.stats.data)
            facts.update(median_s=median, p20_s=low, p80_s=high, **self.ratios(group, implementation, median))
            if (tokens := facts.get("counted_tokens")) is not None:
                facts["tokens_per_s"] = tokens / median
            if work is not None:
                facts.update(bytes=work.bytes, flops=work.flops)
                if work.flops:
                    facts["flop_per_s"] = work.flops / median
                if self.on_gpu:
                    rates = self.roofs["copy_bytes_per_s"], self.roofs["matmul_flop_per_s"]
                    facts["share_of_roof"] = (floor_s or work.seconds(*rates)) / median
            if self.on_gpu and facts.get("kind") == "model step":
                facts["mfu"] = facts["flops"] / median / peak_flops(torch.device("cuda"), torch.bfloat16)[0]
            if facts.get("same_shape_flop_per_s"):
                facts["share_of_same_shape"] = facts["flops"] / median / facts["same_shape_flop_per_s"]
        benchmark.extra_info.update(facts)

    def host_row(
        self, benchmark: Any, implementation: str, seconds: Sequence[float], useful_tokens: int, **facts: Any
    ) -> None:
        """Fill a row timed by the host's clock, for a loader or a whole loop.

        Args:
            benchmark: pytest-benchmark's fixture, with its group set.
            implementation: as for `row`.
            seconds: samples; empty with --benchmark-disable.
            useful_tokens: useful tokens per sample.
            facts: as for `row`.
        """
        facts = {**facts, "implementation": implementation, "device": self.device_name, "torch": torch.__version__}
        facts["counted_tokens"] = useful_tokens
        if seconds:
            median, low, high = percentiles(seconds)
            facts.update(median_s=median, p20_s=low, p80_s=high, tokens_per_s=useful_tokens / median)
            facts.update(self.ratios(benchmark.group, implementation, median / useful_tokens))
        benchmark.extra_info.update(facts)

    def ratios(self, group: str, implementation: str, seconds: float) -> dict[str, float]:
        """Record a row's time and compare it with earlier rows of its group.

        Args:
            group: the row's group.
            implementation: the row's implementation.
            seconds: per call, or per unit of work.

        Returns:
            times_eager and times_compile: their time over this one's, if measured.
        """
        self._medians[group, implementation] = seconds
        found = ((f"times_{other}", self._medians.get((group, other))) for other in ("eager", "compile"))
        return {key: theirs / seconds for key, theirs in found if theirs is not None}

    def same_shape(self, m: int, n: int, k: int) -> float | None:
        """FLOP/s of cuBLAS's matmul of this shape; None on a CPU."""
        if not self.on_gpu:
            return None
        if (m, n, k) not in self._matmuls:
            self._matmuls[m, n, k] = matmul_flop_per_s(m, n, k, self.dtype, self.device)
        return self._matmuls[m, n, k]

    def median(self, group: str, implementation: str) -> float | None:
        """Median seconds of a row of this session; None if it has no time."""
        return self._medians.get((group, implementation))

    def tidy(self) -> None:
        """Free a row's memory between tests."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
