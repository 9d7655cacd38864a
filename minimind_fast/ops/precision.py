"""Which dtype a machine multiplies fast: what `--dtype auto` means.

Purpose: `choose("auto")` for training, `as_stored(dtype, device)` for inference; cuBLAS's shortcuts for both
    (`matmuls_for_training`, `exact_matmuls`).
Principle: a CPU multiplies 16-bit numbers fast only with instructions for them: AVX512-BF16, AVX512-FP16, AMX or their ARM
    counterparts. With AVX2 alone PyTorch converts them one by one, and a matmul takes 5 to 95 times as long as in float32;
    AVX512 without those was not measured and gets float32. An NVIDIA card before Ampere (T4, RTX 20) has tensor cores for
    float16, not for bfloat16.
Properties: decided by CPU flags, not by timing: the same machine always decides alike. Instructions that
    ONEDNN_MAX_CPU_ISA forbids do not count. Float32 holds 16-bit weights exactly, so it is correct everywhere.

Measured on two Zen 1 cores (AVX2), torch 2.13: 1024^3 in float32 70 GFLOP/s, in bfloat16 0.73
    (benchmarks/results/cpu_pretrain_zen1.json); with a transposed weight, as in `linear`, 68, 10, and in float16 12.

Source: https://uxlfoundation.github.io/oneDNN/dev_guide_cpu_dispatcher_control.html, what each limit allows.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch

# dtype -> flags of `torch.cpu.get_capabilities()`; any one of them is enough.
_INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}
# Limits of oneDNN, on x86, under which it multiplies neither; and bfloat16, but not float16.
_NEITHER = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}
_TOO_LOW = {torch.bfloat16: _NEITHER, torch.float16: _NEITHER | {"AVX512_CORE_BF16"}}


def _flags() -> Mapping[str, Any]:
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    return {name: getattr(torch.cpu, f"_is_{name}_supported")() for name in ("avx512_bf16", "amx_fp16")}  # torch 2.11


def multiplies(dtype: torch.dtype, device_type: str = "cpu") -> bool:
    """Whether matmuls in a dtype are at least as fast as in float32.

    Args:
        dtype: float32, bfloat16 or float16.
        device_type: "cuda" (always true) or "cpu".
    """
    if device_type != "cpu" or dtype not in _INSTRUCTIONS:
        return True
    flags = _flags()
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""  # the older name
    if limit.upper() in _TOO_LOW[dtype] and flags.get("architecture") != "aarch64":
        return False
    return torch.backends.mkldnn.is_available() and any(flags.get(name) for name in _INSTRUCTIONS[dtype])


def choose(dtype: str) -> str:
    """The precision to train in.

    Args:
        dtype: `TrainConfig.dtype`; anything but "auto" is returned as it is.

    Returns:
        "bfloat16"; "float32" on a CPU without instructions for it, "float16" on a card before Ampere.
    """
    if dtype != "auto":
        return dtype
    if torch.cuda.is_available():
        return "float16" if before_ampere() else "bfloat16"
    return "bfloat16" if multiplies(torch.bfloat16) else "float32"


# A table, not functools.cache: torch.compile would trace through the cache.
_card: dict[str, tuple[int, int]] = {}


def capability() -> tuple[int, int]:
    """This machine's NVIDIA compute capability; (0, 0) without such a card."""
    if "capability" not in _card:
        nvidia = torch.cuda.is_available() and torch.version.hip is None
        _card["capability"] = torch.cuda.get_device_capability() if nvidia else (0, 0)
    return _card["capability"]


def before_ampere() -> bool:
    """Whether this machine's card is an NVIDIA one too old for bfloat16 and flash attention."""
    return 0 < capability()[0] < 8


def of(dtype: str) -> torch.dtype:
    """`choose` as a torch.dtype."""
    return getattr(torch, choose(dtype))


def as_stored(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The dtype for inference.

    Args:
        dtype: that of the weights on disk.
        device_type: "cuda" or "cpu".

    Returns:
        The same, or float32 if the device does not multiply it fast.
    """
    return dtype if multiplies(dtype, device_type) else torch.float32


def _matmuls(**switches: bool) -> dict[str, bool]:
    """Set switches of cuBLAS and return what they were."""
    before = {name: getattr(torch.backends.cuda.matmul, name) for name in switches}
    for name, value in switches.items():
        setattr(torch.backends.cuda.matmul, name, value)
    return before


def matmuls_for_training(tf32: bool = True) -> dict[str, bool]:
    """Set for the whole process what cuBLAS may do to be fast in training.

    Float32 matmuls, a small part of a 16-bit step, may round their operands to TF32. A 16-bit matmul with a long inner side
    is split over it where its result has few tiles (d_hidden of the head, 6,400 long): the parts' sums stay in float32,
    although PyTorch's default lets them be rounded to 16 bits first.

    Args:
        tf32: False where float32 is a yardstick.

    Returns:
        The switches as they were.
    """
    return _matmuls(
        allow_tf32=tf32, allow_bf16_reduced_precision_reduction=False, allow_fp16_reduced_precision_reduction=False
    )


@contextlib.contextmanager
def exact_matmuls() -> Iterator[None]:
    """No shortcut within the block, whatever was set before: for truths and yardsticks."""
    before = matmuls_for_training(tf32=False)
    try:
        yield
    finally:
        _matmuls(**before)


def repeat_sums() -> None:
    """Add in a fixed order from now on, before the first matmul on a GPU; an op that cannot is an error, not a surprise."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to repeat its choices
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[assignment]  that is for finding faults
    torch.use_deterministic_algorithms(True)
