"""Counters of the server in Prometheus's text form.

Purpose: `Metrics`, the content of `/metrics`.
Principle: counters and histograms are plain numbers; gauges are read at scrape time.
Properties: used only from the event loop's thread, so there are no locks. Labels come from the server, never from a client.

Source: Prometheus's text exposition format 0.0.4.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

_BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Histogram:
    """How many observations were at most each bound, in seconds."""

    def __init__(self) -> None:
        self.buckets = [0] * (len(_BOUNDS_S) + 1)
        self.sum_s = 0.0

    def add(self, seconds: float) -> None:
        """Record an observation."""
        self.buckets[sum(seconds > bound for bound in _BOUNDS_S)] += 1
        self.sum_s += seconds

    def lines(self, name: str) -> list[str]:
        """The histogram in Prometheus's text format."""
        out, total = [], 0
        for bound, count in zip([*map(str, _BOUNDS_S), "+Inf"], self.buckets, strict=True):
            total += count
            out.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*out, f"{name}_sum {self.sum_s:.6f}", f"{name}_count {total}"]


class Metrics:
    """The server's counters and histograms."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()  # (endpoint, status); 499: the client left
        self.first_token, self.whole = Histogram(), Histogram()

    def text(self, gauges: Mapping[str, tuple[str, str, float]]) -> str:
        """The page's text.

        Args:
            gauges: name -> (type, help, value) from other components.
        """
        lines = _head("requests_total", "counter", "requests by endpoint and status; 499: the client left")
        for (endpoint, status), count in sorted(self.requests.items()):
            lines.append(f'minimind_requests_total{{endpoint="{endpoint}",status="{status}"}} {count}')
        for name, (kind, text, value) in gauges.items():
            lines += [*_head(name, kind, text), f"minimind_{name} {value:g}"]
        for name, text, histogram in (
            ("first_token_seconds", "from request to first token", self.first_token),
            ("request_seconds", "from request to end of the answer", self.whole),
        ):
            lines += _head(name, "histogram", text) + histogram.lines(f"minimind_{name}")
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP minimind_{name} {text}", f"# TYPE minimind_{name} {kind}"]
