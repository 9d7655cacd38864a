"""Linear KL: the divergence between a student's and a teacher's next-token distributions, without storing all logits.

Purpose:    distillation without the two (T, V) logits tensors and the five more that eager derives from them.
Principle:  s = student_hidden W_s^T / temperature, t likewise of the teacher, a chunk of rows at a time;
            P = softmax(t), Q = softmax(s), p = log P, q = log Q
            KL(teacher || student) = sum_j P_j (p_j - q_j);                d s_j = g (Q_j - P_j)
            KL(student || teacher) = sum_j Q_j (q_j - p_j) =: R (reverse);  d s_j = g Q_j (q_j - p_j - R)
            d_hidden = ds W_s / temperature;  d_W = ds^T student_hidden / temperature, summed over the chunks in float32.
Properties: FLOPs a token: 2 (D + D') V forward, 2 (3 D + D') V backward. Saved: the inputs, both lse and the divergence (12
            bytes a token); the backward recomputes both sets of logits. The student's gradient overwrites its logits in
            the chunk's buffer. Memory traffic: the inputs, the gradients, 8 D V bytes a chunk for d_W's float32 sum, and
            what of a chunk's logits does not stay in L2 (not measured).
            Masked tokens skip the softmax passes but not the matmuls (the host does not know their number).
            Float32 inside (float64 for float64); logits are rounded to the inputs' dtype, as in eager. No atomics, chunks
            in order: two runs agree bitwise. Nothing synchronises with the host. No gradient reaches the teacher.

Shapes: T tokens (all leading dimensions), D student's and D' teacher's hidden size, V the student's vocabulary.
Source: Hinton et al., Distilling the Knowledge in a Neural Network, 2015; Gu et al., MiniLLM, 2023 (reverse); Liger-Kernel
        (chunks of rows).
"""
# Triton's annotations (constexpr) are the compiler's view, not the caller's.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportCallIssue=false

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from minimind_fast.kernels.common import (
    accum_dtype,
    add_product,
    as_matrix,
    as_op,
    as_vector,
    next_power_of_2,
    padded,
    refuse_second_derivative,
)

# One chunk of both models' logits: 1,280 rows at V = 6400 in 16 bits. L2 is 40 MB on an A100, 50 MB on an H100 (not yet
# measured).
CHUNK_BYTES = 32 << 20
# Each chunk moves 8 D V bytes for d_W's float32 sum and does 2 (3 D + D') V FLOPs a row: with fewer rows, the sum costs
# more than L2 saves (numbers in linear_cross_entropy).
MIN_CHUNK_ROWS = 1024


def _chunk_rows(V: int, itemsize: int) -> int:
    """Choose how many tokens go through both heads at a time.

    Args:
        V: vocabulary size.
        itemsize: bytes a logit.
    Returns:
        A multiple of 128: as many rows as fit twice in CHUNK_BYTES, at least MIN_CHUNK_ROWS.
    """
    return max(CHUNK_BYTES // (2 * V * itemsize) // 128 * 128, MIN_CHUNK_ROWS)


def buffer_bytes(T: int, D: int, V: int, itemsize: int) -> int:
    """Count the op's peak memory beyond its inputs and returned gradients.

    Args:
        T, D, V: tokens, the student's hidden size, vocabulary size.
        itemsize: bytes of one input value.
    Returns:
        Bytes: one chunk of both models' logits, two lse and the divergence, d_W's float32 sum.
    """
    return 2 * min(_chunk_rows(V, itemsize), T) * padded(V) * itemsize + 3 * T * 4 + V * D * 4


def _launch_params(V: int) -> dict[str, int]:
    """Choose the block for a vocabulary size: one program a row, 8 values of each model a thread per block.

    Returns:
        BLOCK_V, num_warps, num_stages: keyword arguments of both kernels.
    """
    block = min(next_power_of_2(V), 2048 if V <= 16384 else 4096)
    return {"BLOCK_V": block, "num_warps": min(max(block // 256, 1), 16), "num_stages": 1}


@triton.jit
def _lse(at, scale, V: tl.constexpr, BLOCK_V: tl.constexpr, wide: tl.constexpr):
    """-> one row's m and log sum_j exp(scale (z_j - m)), kept apart so that small differences of large logits stay exact."""
    top = tl.full((), -float("inf"), dtype=wide)
    total = tl.zeros((), dtype=wide)
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        z = tl.load(at + cols, mask=cols < V, other=-float("inf")).to(wide)
        new_top = tl.maximum(top, tl.max(z, axis=0))
        total = total * tl.exp((top - new_top) * scale) + tl.sum(tl.exp((z - new_top) * scale), axis=0)
        top = new_top
    return top, tl.log(total)


@triton.jit
def _linear_kl_fwd_kernel(
    student_ptr, teacher_ptr, mask_ptr, kl_ptr, lse_ptr, num_tokens, stride, scale,
    V: tl.constexpr, MASKED: tl.constexpr, REVERSE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = tl.float64 if student_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    live = True
    if MASKED:
        live = tl.load(mask_ptr + row) != 0
    if live:
        student_at = student_ptr + row * stride
        teacher_at = teacher_ptr + row * stride
        student_top, student_log = _lse(student_at, scale, V, BLOCK_V, wide)
        teacher_top, teacher_log = _lse(teacher_at, scale, V, BLOCK_V, wide)
        kl = tl.zeros((), dtype=wide)
        for start in range(0, V, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            inside = cols < V
            q = (tl.load(student_at + cols, mask=inside, other=0.0).to(wide) - student_top) * scale - student_log
            p = (tl.load(teacher_at + cols, mask=inside, other=0.0).to(wide) - teacher_top) * scale - teacher_log
            term = tl.exp(q) * (q - p) if REVERSE else tl.exp(p) * (p - q)
            kl += tl.sum(tl.where(inside, term, 0.0), axis=0)
        tl.store(kl_ptr + row, kl)
        tl.store(lse_ptr + row, student_top + student_log / scale)
        tl.store(lse_ptr + num_tokens + row, teacher_top + teacher_log / scale)
    else:
        zero = tl.zeros((), dtype=wide)
        tl.store(kl_ptr + row, zero)
        tl.store(lse_ptr + row, zero)
        tl.store(lse_ptr + num_tokens + row, zero)


@triton.jit
def _linear_kl_bwd_kernel(
    student_ptr, teacher_ptr, mask_ptr, kl_ptr, lse_ptr, grad_ptr, num_tokens, stride, scale,
    V: tl.constexpr, MASKED: tl.constexpr, REVERSE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = tl.float64 if student_ptr.dtype.element_ty == tl.float64 else tl.float32
    narrow: tl.constexpr = student_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    student_at = student_ptr + row * stride
    live = True
    if MASKED:
        live = tl.load(mask_ptr + row) != 0
    if live:
        teacher_at = teacher_ptr + row * stride
        student_lse = tl.load(lse_ptr + row)
        teacher_lse = tl.load(lse_ptr + num_tokens + row)
        grad = tl.load(grad_ptr + row).to(wide) * scale
        kl = tl.load(kl_ptr + row)
        for start in range(0, V, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            inside = cols < V
            q = (tl.load(student_at + cols, mask=inside, other=0.0).to(wide) - student_lse) * scale
            p = (tl.load(teacher_at + cols, mask=inside, other=0.0).to(wide) - teacher_lse) * scale
            d = tl.exp(q) * (q - p - kl) if REVERSE else tl.exp(q) - tl.exp(p)
            tl.store(student_at + cols, (grad * d).to(narrow), mask=inside)
    else:
        for start in range(0, V, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            tl.store(student_at + cols, tl.zeros((BLOCK_V,), dtype=narrow), mask=cols < V)


def _chunks(x: Tensor, weight: Tensor, y: Tensor, teacher: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Compute the logits chunk by chunk, in one buffer per model.

    Args:
        x, weight: the student's (T, D) and (V, D).
        y, teacher: the teacher's (T, D') and (V, D').
    Returns:
        A slice of rows, the student's and the teacher's logits (rows, V) before the temperature; the caller may overwrite
        them.
    """
    T, V, itemsize = x.shape[0], weight.shape[0], weight.element_size()
    most = min(_chunk_rows(V, itemsize), T)
    buffers = weight.new_empty(2, most, padded(V))[:, :, :V]
    for start in range(0, T, most):
        rows = slice(start, min(start + most, T))
        student, teachers = buffers[:, : rows.stop - rows.start]
        torch.mm(x[rows], weight.t(), out=student)
        torch.mm(y[rows], teacher.t(), out=teachers)
        yield rows, student, teachers


@as_op("minimind_fast::linear_kl_fwd")
def _linear_kl_fwd(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    mask: Tensor | None,
    temperature: float,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """-> kl (T,); lse (2, T) of student and teacher, times the temperature."""
    V = weight.shape[0]
    kl = hidden.new_empty(hidden.shape[:-1], dtype=accum_dtype(hidden))
    T = kl.numel()
    lse = hidden.new_empty(2, T, dtype=accum_dtype(hidden))
    if T > 0:
        k = kl.view(-1)
        m = k if mask is None else as_vector(mask)
        with torch.cuda.device_of(hidden):
            for rows, student, teacher in _chunks(
                as_matrix(hidden), weight, as_matrix(teacher_hidden), teacher_weight[:V]
            ):
                _linear_kl_fwd_kernel[(student.shape[0],)](
                    student, teacher, m[rows], k[rows], lse[:, rows], T, student.stride(0), 1.0 / temperature,
                    V, mask is not None, reverse, **_launch_params(V),
                )  # fmt: skip
    return kl, lse


@_linear_kl_fwd.register_fake
def _(hidden, weight, teacher_hidden, teacher_weight, mask, temperature, reverse):
    kl = hidden.new_empty(hidden.shape[:-1], dtype=accum_dtype(hidden))
    return kl, hidden.new_empty(2, kl.numel(), dtype=accum_dtype(hidden))


@as_op("minimind_fast::linear_kl_bwd")
def _linear_kl_bwd(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    mask: Tensor | None,
    kl: Tensor,
    lse: Tensor,
    temperature: float,
    reverse: bool,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor]:
    """-> d_hidden, d_weight, each empty where not wanted."""
    V = weight.shape[0]
    d_hidden = hidden.new_empty(hidden.shape if want_hidden else 0)
    total = weight.new_zeros(weight.shape if want_weight else 0, dtype=accum_dtype(weight))
    T = kl.numel()
    if T > 0:
        x, k, g, both = as_matrix(hidden), as_vector(kl), as_vector(grad), lse.contiguous()
        m = k if mask is None else as_vector(mask)
        with torch.cuda.device_of(hidden):
            for rows, student, teacher in _chunks(x, weight, as_matrix(teacher_hidden), teacher_weight[:V]):
                _linear_kl_bwd_kernel[(student.shape[0],)](
                    student, teacher, m[rows], k[rows], both[:, rows], g[rows], T, student.stride(0),
                    1.0 / temperature, V, mask is not None, reverse, **_launch_params(V),
                )  # fmt: skip
                if want_hidden:
                    torch.mm(student, weight, out=d_hidden.view(-1, hidden.shape[-1])[rows])
                if want_weight:
                    add_product(total, student, x[rows])
    return d_hidden, total.to(weight.dtype, copy=False)


@_linear_kl_bwd.register_fake
def _(
    grad, hidden, weight, teacher_hidden, teacher_weight, mask, kl, lse, temperature, reverse, want_hidden, want_weight
):
    d_weight = torch.empty(weight.shape if want_weight else 0, dtype=weight.dtype, device=weight.device)
    return hidden.new_empty(hidden.shape if want_hidden else 0), d_weight


def _save(ctx, inputs, output):
    ctx.temperature, ctx.reverse = inputs[5:]
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    want_hidden, want_weight = ctx.needs_input_grad[:2]
    if grad is None:
        return (None,) * 7
    d_hidden, d_weight = _linear_kl_bwd(
        grad, *ctx.saved_tensors, ctx.temperature, ctx.reverse, want_hidden, want_weight
    )
    return d_hidden if want_hidden else None, d_weight if want_weight else None, None, None, None, None, None


_linear_kl_fwd.register_autograd(_backward, setup_context=_save)
refuse_second_derivative(_linear_kl_bwd, "linear_kl")


def linear_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    reverse: bool = False,
) -> Tensor:
    """Compute the per-token KL divergence between a teacher's and a student's next-token distributions.

    Args:
        student_hidden: (..., D) float32, bfloat16, float16 or float64, any strides.
        student_weight: (V, D), the student's head.
        teacher_hidden: (..., D').
        teacher_weight: (V' >= V, D'); cut to the student's V rows before the softmax. All four share one dtype. No gradient
            reaches the teacher.
        mask: (...) bool; the result is 0 where it is False.
        temperature: divides both logits; positive. No T^2 factor is applied.
        reverse: KL(student || teacher) instead of KL(teacher || student).
    Returns:
        (...) float32 (float64 for float64).
    Raises:
        ValueError: invalid shapes, dtypes or temperature, or a teacher with the smaller vocabulary.
        RuntimeError: a second derivative is requested.
    Source: Hinton et al., Distilling the Knowledge in a Neural Network, 2015.
    """
    for name, x, w in (("student", student_hidden, student_weight), ("teacher", teacher_hidden, teacher_weight)):
        if x.dim() == 0 or w.dim() != 2 or x.shape[-1] != w.shape[1] or not w.numel():
            raise ValueError(
                f"linear_kl needs hidden (..., D) and weight (V, D), got {tuple(x.shape)} and {tuple(w.shape)} "
                f"from the {name}."
            )
    dtypes = {t.dtype for t in (student_hidden, student_weight, teacher_hidden, teacher_weight)}
    if len(dtypes) > 1 or not student_hidden.is_floating_point():
        raise ValueError(f"linear_kl needs hidden and weights in one floating-point dtype, got {dtypes}.")
    if teacher_hidden.shape[:-1] != student_hidden.shape[:-1]:
        raise ValueError(
            f"linear_kl needs the same tokens for both, got {tuple(student_hidden.shape)} and {tuple(teacher_hidden.shape)}."
        )
    if teacher_weight.shape[0] < student_weight.shape[0]:
        raise ValueError(
            f"the teacher's vocabulary ({teacher_weight.shape[0]}) is smaller than the student's "
            f"({student_weight.shape[0]})"
        )
    if mask is not None and (mask.shape != student_hidden.shape[:-1] or mask.dtype != torch.bool):
        raise ValueError(
            f"linear_kl needs a bool mask of shape {tuple(student_hidden.shape[:-1])}, got {mask.dtype} of "
            f"{tuple(mask.shape)}."
        )
    if not temperature > 0:
        raise ValueError(f"linear_kl needs a positive temperature, got {temperature}.")
    return _linear_kl_fwd(
        student_hidden,
        student_weight,
        teacher_hidden.detach(),
        teacher_weight.detach(),
        mask,
        float(temperature),
        reverse,
    )[0]
