"""Linear cross-entropy: log-probabilities of the targets straight from hidden states, logits never stored whole.

Purpose:    the head's matmul and the softmax without a (T, V) tensor, which is the largest of a training step.
Principle:  z = hidden W^T / temperature, a chunk of rows at a time;  lse = log sum_j exp z_j;  p = exp(z - lse)
            logprob = z_target - lse;  entropy = lse - sum_j p_j z_j
            dz_j = g (1[j = target] - p_j) - g_H p_j (log p_j + entropy);  d_hidden = dz W / temperature,
            d_W = dz^T hidden / temperature, summed over the chunks in float32.
Properties: FLOPs a token are 2 D V a matmul. Without `grad_weights` four matmuls: the forward keeps hidden and lse (4 bytes
            a token) and the backward computes the logits again, whatever the incoming gradient. With `grad_weights` three:
            the gradient is known up to one factor, so the forward computes both gradients from the logits it has, and
            keeps them instead. A chunk's logits are written, read and overwritten in L2 where V allows; the bytes that reach
            memory are those of hidden, W, their gradients, and 8 D V of d_W's float32 sum a chunk.
            Ignored rows are left out of the softmax passes, not out of the matmuls (their number is not known to the host).
            Float32 inside (float64 for float64), logits rounded to the inputs' dtype as eager's are. No atomics, chunks in
            order: two runs agree bitwise. Nothing synchronises with the host.

Shapes: T tokens (all leading dimensions), D hidden, V vocab.
Source: Liger-Kernel (chunks of rows, gradients in the forward); Wijmans et al., Cut Your Losses, 2024 (lse recomputed).
"""
# Triton's annotations describe what its compiler sees (constexpr), not what a launch passes.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportReturnType=false

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

IGNORE_INDEX = -100
# A chunk's logits: 2,560 rows at V = 6400 in 16 bits. L2 holds 40 MB on an A100, 50 MB on an H100 (not yet measured).
CHUNK_BYTES = 32 << 20
# Each chunk reads and writes d_W's float32 sum, 8 D V bytes, beside 8 D V FLOPs a row in its four matmuls: an H200 does 184
# rows of FLOPs in the time of those bytes. At 1,024 rows the sum costs 18% of the matmuls; at the 128 rows that L2 has room
# for at V = 151,936 it would cost 144%, more than what L2 saves there.
MIN_CHUNK_ROWS = 1024
# The grad_weights promise: |g - s w| <= this * max |g|.
PROMISE = 1e-5


def _chunk_rows(V: int, itemsize: int) -> int:
    """Choose how many tokens go through the head at a time.

    Args:
        V: vocabulary.
        itemsize: bytes of one logit.
    Returns:
        A multiple of 128: as many rows as CHUNK_BYTES holds, at least MIN_CHUNK_ROWS.
    """
    return max(CHUNK_BYTES // (V * itemsize) // 128 * 128, MIN_CHUNK_ROWS)


def buffer_bytes(T: int, D: int, V: int, itemsize: int, with_grad_weights: bool = False) -> int:
    """Count the memory that the op needs at its peak beyond its inputs and the gradients that it returns.

    Args:
        T, D, V: tokens, hidden size, vocabulary.
        itemsize: bytes of one input value.
        with_grad_weights: the three-matmul form, which holds d_hidden from the forward on: counted too.
    Returns:
        Bytes: one chunk of logits, lse and log-probabilities, d_W's float32 sum.
    """
    rows = min(_chunk_rows(V, itemsize), T)
    kept = T * D * itemsize if with_grad_weights else 0
    return rows * _padded(V, itemsize) * itemsize + 2 * T * 4 + V * D * 4 + kept


def _padded(V: int, itemsize: int) -> int:
    """Row stride of the logits: rows start at 16 bytes, which the matmul and the loads need to be fast."""
    unit = 16 // itemsize
    return (V + unit - 1) // unit * unit


def _launch_params(V: int) -> dict[str, int]:
    """Choose the block for a vocabulary: one program a row, 8 or 16 values a thread and block.

    Args:
        V: vocabulary.
    Returns:
        BLOCK_V, num_warps, num_stages: keyword arguments of both kernels.
    """
    block = min(triton.next_power_of_2(V), 2048 if V <= 16384 else 8192)
    return {"BLOCK_V": block, "num_warps": min(max(block // 256, 1), 16), "num_stages": 1}


@triton.jit
def _linear_cross_entropy_fwd_kernel(
    logits_ptr, targets_ptr, logprobs_ptr, lse_ptr, entropy_ptr, stride, inv_temperature,
    V: tl.constexpr, IGNORE: tl.constexpr, ENTROPY: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    wide = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    logprob = tl.zeros((), dtype=wide)
    lse = tl.zeros((), dtype=wide)
    entropy = tl.zeros((), dtype=wide)
    if target != IGNORE:
        at = logits_ptr + row * stride
        top = tl.full((), -float("inf"), dtype=wide)
        total = tl.zeros((), dtype=wide)
        weighted = tl.zeros((), dtype=wide)
        for start in range(0, V, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            z = tl.load(at + cols, mask=cols < V, other=-float("inf")).to(wide) * inv_temperature
            new_top = tl.maximum(top, tl.max(z, axis=0))
            # inf - inf is nan; eager's logsumexp takes an infinite maximum for 0 too.
            shift = tl.where(tl.abs(new_top) == float("inf"), 0.0, new_top)
            old = tl.exp(top - shift)
            e = tl.exp(z - shift)
            total = total * old + tl.sum(e, axis=0)
            if ENTROPY:
                weighted = weighted * old + tl.sum(tl.where(cols < V, e * z, 0.0), axis=0)
            top = new_top
        lse = tl.log(total) + tl.where(tl.abs(top) == float("inf"), 0.0, top)
        valid = (target >= 0) & (target < V)
        picked = tl.load(at + target, mask=valid, other=float("nan")).to(wide) * inv_temperature
        # A target outside the vocabulary has no probability: nan here, and through lse in the gradient.
        lse = tl.where(valid, lse, float("nan"))
        logprob = picked - lse
        if ENTROPY:
            entropy = lse - weighted / total
    tl.store(logprobs_ptr + row, logprob)
    tl.store(lse_ptr + row, lse)
    if ENTROPY:
        tl.store(entropy_ptr + row, entropy)


@triton.jit
def _linear_cross_entropy_bwd_kernel(
    logits_ptr, targets_ptr, lse_ptr, entropy_ptr, grad_ptr, grad_entropy_ptr, stride, inv_temperature,
    V: tl.constexpr, IGNORE: tl.constexpr, ENTROPY: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    wide = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    at = logits_ptr + row * stride
    if target == IGNORE:
        for start in range(0, V, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            tl.store(at + cols, tl.zeros((BLOCK_V,), dtype=logits_ptr.dtype.element_ty), mask=cols < V)
    else:
        grad = tl.load(grad_ptr + row).to(wide) * inv_temperature
        lse = tl.load(lse_ptr + row)
        if ENTROPY:
            entropy = tl.load(entropy_ptr + row)
            grad_entropy = tl.load(grad_entropy_ptr + row).to(wide) * inv_temperature
        for start in range(0, V, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            z = tl.load(at + cols, mask=cols < V, other=-float("inf")).to(wide)
            logp = z * inv_temperature - lse
            p = tl.exp(logp)
            d = grad * (tl.where(cols == target, 1.0, 0.0) - p)
            if ENTROPY:
                d -= grad_entropy * p * (logp + entropy)
            tl.store(at + cols, d.to(logits_ptr.dtype.element_ty), mask=cols < V)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _rows(x: Tensor) -> Tensor:
    """View as (T, D); copies only what has no such view."""
    return x.reshape(-1, x.shape[-1])


def _logits_buffer(T: int, weight: Tensor) -> Tensor:
    """-> (rows, V) for the logits of a chunk, overwritten by each."""
    V, itemsize = weight.shape[0], weight.element_size()
    return weight.new_empty(min(_chunk_rows(V, itemsize), T), _padded(V, itemsize))[:, :V]


def _chunks(x: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Compute the logits of one chunk after another, in one buffer.

    Args:
        x: (T, D).
        weight: (V, D).
    Returns:
        Pairs of the rows' slice and their logits (rows, V), before the temperature; the caller may overwrite them.
    """
    buffer = _logits_buffer(x.shape[0], weight)
    for start in range(0, x.shape[0], max(buffer.shape[0], 1)):
        rows = slice(start, min(start + buffer.shape[0], x.shape[0]))
        logits = buffer[: rows.stop - rows.start]
        torch.mm(x[rows], weight.t(), out=logits)
        yield rows, logits


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a^T @ b to a float32 (float64 for float64) sum, the products of 16-bit values never rounded to 16 bits."""
    if total.dtype == a.dtype:
        total.addmm_(a.t(), b)
    elif a.device.type == "cuda":
        # The matmul writes float32 from 16-bit operands; baddbmm takes a float32 summand in each torch from 2.11 on.
        torch.baddbmm(total[None], a.t()[None], b[None], out_dtype=total.dtype, out=total[None])
    else:
        total.addmm_(a.t().to(total.dtype), b.to(total.dtype))
