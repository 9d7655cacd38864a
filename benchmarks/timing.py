"""How long something takes on the device, and what the device can do at best.

Purpose:    samples of a call's time, roofs of the same run, sets of inputs that no cache can hold.
Principle:  on a GPU the calls for all input sets are recorded in one CUDA graph and replayed, a device event between
            replays and no wait of the host, so that launches cost nothing; the same calls without a graph tell what they
            cost. Input sets together are larger than three L2 caches. On a CPU pytest-benchmark's own clock is used.
Properties: random data, never zeros; roofs are a 1 GiB copy, a memset and an 8192^3 matmul, and any matmul of given shape.
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
    """A clock for pytest-benchmark that gives back samples which were taken on the device."""

    def __init__(self) -> None:
        self._samples: Iterator[float] = iter(())
        self._running = False

    def load(self, samples: Sequence[float]) -> None:
        """Play these seconds, one a round."""
        self._samples, self._running = iter(samples), False

    def __call__(self) -> float:
        self._running = not self._running
        return 0.0 if self._running else next(self._samples)


def percentiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """(median, p20, p80).

    Args:
        samples: at least one.
    """
    values = torch.tensor(samples, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64))
    median, low, high = values.tolist()
    return median, low, high


def num_sets(size: int, on_gpu: bool) -> int:
    """Input sets that together are larger than three L2 caches.

    Args:
        size: bytes of one set.
        on_gpu: else 1, as a CPU's times are of toy sizes.
    """
    if not on_gpu:
        return 1
    wanted = 3 * torch.cuda.get_device_properties(0).L2_cache_size
    return min(1 + wanted // max(size, 1), MAX_SETS)


def _between_events(run: Call, calls: int, replays: int = REPLAYS) -> list[float]:
    """Seconds a call of each run; the host stays ahead, so that only the device's time is between the events."""
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
        calls: one for each input set.
        capture: False for what waits for the host, which no graph can hold.

    Returns:
        (seconds of a call, one for each replay; median seconds with launches, the host waiting for each round of calls;
        how the samples were taken).
    """

    def plain() -> None:
        for call in calls:
            call()

    side = torch.cuda.Stream() if capture else torch.cuda.current_stream()  # capture wants a stream of its own
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
    """Seconds of a call by the host's clock, for the roofs of a CPU.

    Args:
        call: what to time.
        rounds: after one to warm up.
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
    """Rate of one matmul of this shape: cuBLAS's on a GPU.

    Args:
        m, n, k: its sizes.
        dtype: of its operands.
        device: "cuda" or "cpu".
    """
    x, y = (torch.randn(a, b, device=device).to(dtype) for a, b in ((m, k), (k, n)))
    out = torch.empty(m, n, device=device, dtype=dtype)
    return 2 * m * n * k / _median(lambda: torch.mm(x, y, out=out), device == "cuda")


def roofs(device: str, dtype: torch.dtype) -> dict[str, float]:
    """What this device can do: copy and fill rates, and the rate of a large matmul.

    Args:
        device: "cuda" or "cpu" (there smaller, but beyond its caches).
        dtype: of the matmul.

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
