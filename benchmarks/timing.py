"""Timing on the device, and the device's measured limits.

Purpose:    samples of a call's time, roofs of the same run, input sets that exceed the caches.
Principle:  on a GPU the calls for all input sets are captured in one CUDA graph and replayed, with device events between
            replays and no host synchronisation, so launches are free; the same calls without a graph show their cost.
            The input sets exceed three L2 caches together. On a CPU pytest-benchmark's own clock is used.
Properties: random data, never zeros; roofs are a 1 GiB copy, a memset and an 8192^3 matmul, or a matmul of any shape.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

REPLAYS, WARM_UPS = 40, 3
MAX_SETS = 16
Call = Callable[[], Any]


class Playback:
    """A clock for pytest-benchmark that plays back samples taken on the device."""

    def __init__(self) -> None:
        self._samples: Iterator[float] = iter(())
        self._running = False

    def load(self, samples: Sequence[float]) -> None:
        """Play back these seconds, one per round."""
        self._samples, self._running = iter(samples), False

    def __call__(self) -> float:
        self._running = not self._running
        return 0.0 if self._running else next(self._samples)


def percentiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """(median, p20, p80) of at least one sample."""
    values = torch.tensor(samples, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64))
    median, low, high = values.tolist()
    return median, low, high


def num_sets(size: int, on_gpu: bool) -> int:
    """Number of input sets that together exceed three L2 caches.

    Args:
        size: bytes of one set.
        on_gpu: False gives 1: CPU timings use toy sizes.
    """
    if not on_gpu:
        return 1
    wanted = 3 * torch.cuda.get_device_properties(0).L2_cache_size
    return min(1 + wanted // max(size, 1), MAX_SETS)


def _between_events(run: Call, calls: int, replays: int = REPLAYS) -> list[float]:
    """Seconds per call in each run; the host stays ahead, so only device time lies between the events."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    for _ in range(WARM_UPS):
        run()
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 / calls for a, b in zip(events, events[1:], strict=False)]


def device_samples(calls: Sequence[Call], capture: bool = True) -> tuple[list[float], float, str]:
    """Time calls that do the same work on different inputs, on a GPU.

    Args:
        calls: one per input set.
        capture: False for calls that synchronise with the host, which a graph cannot capture.

    Returns:
        (seconds per call for each replay; median seconds with launches and a host wait after each round of calls; how the
        samples were taken).
    """

    def plain() -> None:
        for call in calls:
            call()

    side = torch.cuda.Stream() if capture else torch.cuda.current_stream()  # capture needs a side stream
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            plain()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    launched = []
    for _ in range(10):
        begin = time.perf_counter()
        plain()
        torch.cuda.synchronize()
        launched.append((time.perf_counter() - begin) / len(calls))
    with_launch = percentiles(launched)[0]
    if not capture:
        return _between_events(plain, len(calls), 10), with_launch, "plain calls between events"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        plain()
    samples = _between_events(graph.replay, len(calls))
    del graph
    return samples, with_launch, "graph replay between events"


def host_samples(call: Call, rounds: int = 5) -> list[float]:
    """Seconds per call by the host's clock, for a CPU's roofs.

    Args:
        call: the call to time.
        rounds: number of samples, after one warm-up.
    """
    call()
    samples = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        samples.append(time.perf_counter() - begin)
    return samples


def _median(call: Call, on_gpu: bool) -> float:
    return percentiles(device_samples([call])[0] if on_gpu else host_samples(call))[0]


def matmul_flop_per_s(m: int, n: int, k: int, dtype: torch.dtype, device: str) -> float:
    """Rate of one (m, k) x (k, n) matmul, by cuBLAS on a GPU."""
    x, y = (torch.randn(a, b, device=device).to(dtype) for a, b in ((m, k), (k, n)))
    out = torch.empty(m, n, device=device, dtype=dtype)
    return 2 * m * n * k / _median(lambda: torch.mm(x, y, out=out), device == "cuda")


def roofs(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Measure the device's copy and fill rates and its rate for a large matmul.

    Args:
        device: "cuda" or "cpu" (smaller sizes, but beyond the caches).
        dtype: dtype of the matmul.

    Returns:
        copy_bytes_per_s (read plus written), memset_bytes_per_s, matmul_flop_per_s.
    """
    on_gpu = device == "cuda"
    count, n = (1 << 28, 8192) if on_gpu else (1 << 25, 1024)  # 1 GiB of float32, or 128 MiB
    a, b = (torch.randn(count, device=device) for _ in range(2))
    copy = _median(lambda: b.copy_(a), on_gpu)
    fill = _median(b.zero_, on_gpu)
    return {
        "copy_bytes_per_s": 8 * count / copy,
        "memset_bytes_per_s": 4 * count / fill,
        "matmul_flop_per_s": matmul_flop_per_s(n, n, n, dtype, device),
    }
