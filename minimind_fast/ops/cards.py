"""Peak speeds of GPUs in matmuls, by the names that they report.

Purpose: `peak_flops(device, dtype)`, to which MFU refers.
Principle: names that contain each other mean different cards (L4 and L40, A10 and A10G, H100 and H100 NVL). So a name is
    compared whole, without the vendor, the memory and the SXM generation (`model_of`).
Properties: dense 16-bit peaks with float32 sums, from the vendors' data sheets. A card that is not in the table, a laptop's
    or a part of a card is measured with a matmul, and the log says so.
"""

from __future__ import annotations

import math
import re
import time

import torch

# `model_of` a card -> TFLOP/s in bfloat16; in float16 where tensor cores have no bfloat16 (V100, T4, RTX 20).
PEAK_TFLOPS = {
    "V100": 125.0,
    "V100 PCIe": 112.0,
    "V100S PCIe": 130.0,
    "T4": 65.0,
    "RTX 2080 Ti": 53.8,
    "RTX 3080": 59.5,
    "RTX 3090": 71.0,
    "RTX 3090 Ti": 80.0,
    "RTX 4080": 97.5,
    "RTX 4090": 165.2,
    "RTX 5080": 112.6,
    "RTX 5090": 209.5,
    "RTX A6000": 154.8,
    "RTX 6000 Ada Generation": 364.2,
    "A10": 125.0,
    "A10G": 70.0,
    "A30": 165.0,
    "A40": 149.7,
    "A100": 312.0,
    "A100 PCIe": 312.0,
    "A800": 312.0,
    "A800 PCIe": 312.0,
    "L4": 121.0,
    "L40": 181.0,
    "L40S": 362.0,
    "H20": 148.0,
    "H100": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H800": 989.0,
    "H800 PCIe": 756.0,
    "H200": 989.0,
    "H200 NVL": 835.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "B300": 2250.0,
    "GB200": 2500.0,
    "GB300": 2500.0,
    "MI210": 181.0,
    "MI250X": 383.0,
    "MI300X": 1307.0,
    "MI325X": 1307.0,
}
_SAYS_NOTHING = re.compile(r"NVIDIA|Tesla|GeForce|AMD|Instinct|SXM\d*|AC|\d+GB|HBM\w+|OAM")


def model_of(name: str) -> str:
    """A device's name without what does not tell one peak from another.

    Args:
        name: such as "NVIDIA A100-SXM4-80GB" ("A100") or "NVIDIA A100 80GB PCIe" ("A100 PCIe").
    """
    words = (word for word in re.split(r"[\s-]+", name) if not _SAYS_NOTHING.fullmatch(word))
    return " ".join("PCIe" if word.upper() == "PCIE" else word for word in words)


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """The device's peak FLOP/s in a matmul, and where the number comes from.

    Args:
        device: a CPU, or a GPU that is not in the table, is measured with a matmul.
        dtype: the matmuls' dtype.

    Returns:
        (FLOP/s, "NAME data sheet" or "measured, ...").
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        model = model_of(torch.cuda.get_device_name(device))
        if model in PEAK_TFLOPS:
            return PEAK_TFLOPS[model] * 1e12, f"{model} data sheet"
    n = 1024 if device.type == "cpu" else 8192
    own = torch.Generator(device).manual_seed(0)  # leave the run's generator alone: a resumed run must repeat it
    a, b = (torch.randn(n, n, generator=own, device=device).to(dtype) for _ in range(2))
    best = math.inf
    for _ in range(4):
        begin = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2 * n**3 / best, f"measured, {n}^3 matmul"
