"""Speeds of GPUs, from their data sheets.

Purpose: lets `minimind-fast plan` estimate runs on cards that are not at hand.
Principle: 90% of the data sheet's bandwidth and 80% of its dense bf16 peak.
Properties: these shares are what an H200 reached: 4.3 TB/s of 4.8, 790 TFLOP/s of 989. Nothing is measured here.
"""

from __future__ import annotations

from dataclasses import dataclass

from minimind_fast.ops.cards import PEAK_TFLOPS


@dataclass(frozen=True)
class Card:
    """A device's memory and speeds.

    Attributes:
        name: `ops.cards.model_of` the device.
        memory_gib: total memory.
        bytes_per_s: rate of a large copy, read plus written.
        flop_per_s: rate of a large bf16 matmul.
        links_bytes_per_s: to the other devices of its node, one direction.
        how: source of the rates.
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
    name: Card(name, memory, 0.9 * tb * 1e12, 0.8 * PEAK_TFLOPS[name] * 1e12, links * 1e9, "data sheet, see cards.py")
    for name, (memory, tb, links) in _SHEETS.items()
}
