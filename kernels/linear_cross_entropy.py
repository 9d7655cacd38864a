"""Linear cross-entropy: target log-probabilities from hidden states, without ever storing all logits.

Purpose:    the head's matmul and softmax without a (T, V) tensor, the largest of a training step.
Principle:  z = hidden W^T / temperature, a chunk of rows at a time;  lse = log sum_j exp z_j;  p = exp(z - lse)
            logprob = z_target - lse;  entropy = lse - sum_j p_j z_j
            dz_j = g (1[j = target] - p_j) - g_H p_j (log p_j + entropy);  d_hidden = dz W / temperature,
            d_W = dz^T hidden / temperature, summed over the chunks in float32.
Properties: each matmul costs 2 D V FLOPs a token. Without `grad_weights` there are four: the forward saves hidden and lse
            (4 bytes a token) and the backward recomputes the logits, for any incoming gradient. With `grad_weights` there
            are three: the gradient is known up to one factor, so the forward computes both gradients from its logits and
            saves those instead. Memory traffic: hidden, W, their gradients, 8 D V bytes a chunk for d_W's float32 sum, and
            what of a chunk's logits does not stay in L2 (not measured).
            Ignored rows skip the softmax passes but not the matmuls (the host does not know their number).
            Float32 inside (float64 for float64); logits are rounded to the inputs' dtype, as in eager. No atomics, chunks
            in order: two runs agree bitwise. Nothing synchronises with the host.

Shapes: T tokens (all leading dimensions), D hidden, V vocab.
Source: Liger-Kernel (chunks of rows, gradients in the forward); Wijmans et al., Cut Your Losses, 2024 (lse recomputed).
"""
# Triton's annotations (constexpr) are the compiler's view, not the caller's.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportCallIssue=false

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from minimind_fast.config import IGNORE_INDEX
from minimind_fast.kernels.common import (
    accum_dtype,
    add_product,
    as_matrix,
    as_op,
    as_vector,
    cdiv,
    next_power_of_2,
    padded,
    refuse_second_derivative,
)

# One chunk of logits: 2,560 rows at V = 6400 in 16 bits. L2 is 40 MB on an A100, 50 MB on an H100 (not yet measured).
CHUNK_BYTES = 32 << 20
# Each chunk moves 8 D V bytes for d_W's float32 sum and does 8 D V FLOPs a row in four matmuls; on an H200 those bytes take
# as long as 184 rows. The sum costs 18% of the matmuls at 1,024 rows, but 144% at the 128 rows that L2 can hold at
# V = 151,936: more than L2 saves.
MIN_CHUNK_ROWS = 1024
# The grad_weights promise: |g - s w| <= this * max |g|.
PROMISE = 1e-5
# Values per program of the scaling pass: two or more 16-byte loads a thread.
SCALE_BLOCK, SCALE_WARPS = 4096, 8


def _chunk_rows(V: int, itemsize: int) -> int:
    """Choose how many tokens go through the head at a time.

    Args:
        V: vocabulary size.
        itemsize: bytes a logit.
    Returns:
        A multiple of 128: as many rows as fit in CHUNK_BYTES, at least MIN_CHUNK_ROWS.
    """
    return max(CHUNK_BYTES // (V * itemsize) // 128 * 128, MIN_CHUNK_ROWS)


def buffer_bytes(T: int, D: int, V: int, itemsize: int, with_grad_weights: bool = False) -> int:
    """Count the op's peak memory beyond its inputs and returned gradients.

    Args:
        T, D, V: tokens, hidden size, vocabulary size.
        itemsize: bytes of one input value.
        with_grad_weights: the three-matmul form; also counts d_hidden, which it holds from the forward on.
    Returns:
        Bytes: one chunk of logits, lse and log-probabilities, d_W's float32 sum.
    """
    rows = min(_chunk_rows(V, itemsize), T)
    kept = T * D * itemsize if with_grad_weights else 0
    return rows * padded(V) * itemsize + 2 * T * 4 + V * D * 4 + kept


def _launch_params(V: int) -> dict[str, int]:
    """Choose the block for a vocabulary size: one program a row, 8 or 16 values a thread per block.

    Returns:
        BLOCK_V, num_warps, num_stages: keyword arguments of both kernels.
    """
    block = min(next_power_of_2(V), 2048 if V <= 16384 else 8192)
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
            z = tl.load(at + cols, mask=cols < V, other=-float("inf")).to(wide)
            new_top = tl.maximum(top, tl.max(z, axis=0))
            # inf - inf is nan; eager's logsumexp replaces an infinite maximum by 0, too.
            shift = tl.where(tl.abs(new_top) == float("inf"), 0.0, new_top)
            # Subtract the maximum before scaling: small differences of large logits stay exact.
            z = (z - shift) * inv_temperature
            e = tl.exp(z)
            moved = (top - shift) * inv_temperature
            old = tl.exp(moved)
            if ENTROPY:
                # sum_j e_j z_j relative to the maximum: the entropy must not be a difference of large numbers.
                moved = tl.where(top == -float("inf"), 0.0, total * moved)
                weighted = (weighted + moved) * old + tl.sum(tl.where(cols < V, e * z, 0.0), axis=0)
            total = total * old + tl.sum(e, axis=0)
            top = new_top
        top = tl.where(tl.abs(top) == float("inf"), 0.0, top)
        log_total = tl.log(total)
        # A target outside the vocabulary gives nan here and, through lse, in the gradient.
        valid = (target >= 0) & (target < V)
        log_total = tl.where(valid, log_total, float("nan"))
        picked = tl.load(at + target, mask=valid, other=0.0).to(wide)
        logprob = (picked - top) * inv_temperature - log_total
        lse = top + log_total / inv_temperature
        if ENTROPY:
            entropy = log_total - weighted / total
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
            logp = (z - lse) * inv_temperature
            p = tl.exp(logp)
            d = grad * (tl.where(cols == target, 1.0, 0.0) - p)
            if ENTROPY:
                d -= grad_entropy * p * (logp + entropy)
            tl.store(at + cols, d.to(logits_ptr.dtype.element_ty), mask=cols < V)


@triton.jit
def _linear_cross_entropy_scale_kernel(source_ptr, factor_ptr, out_ptr, numel, BLOCK: tl.constexpr):
    wide = tl.float64 if source_ptr.dtype.element_ty == tl.float64 else tl.float32
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(source_ptr + at, mask=at < numel, other=0.0).to(wide) * tl.load(factor_ptr).to(wide)
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=at < numel)


def _logits_buffer(T: int, weight: Tensor) -> Tensor:
    """-> (rows, V) for one chunk's logits, reused by every chunk."""
    V, itemsize = weight.shape[0], weight.element_size()
    return weight.new_empty(min(_chunk_rows(V, itemsize), T), padded(V))[:, :V]


def _chunks(x: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Compute the logits chunk by chunk, in one buffer.

    Args:
        x: (T, D).
        weight: (V, D).
    Returns:
        Pairs of a slice of rows and its logits (rows, V), before the temperature; the caller may overwrite them.
    """
    buffer = _logits_buffer(x.shape[0], weight)
    for start in range(0, x.shape[0], max(buffer.shape[0], 1)):
        rows = slice(start, min(start + buffer.shape[0], x.shape[0]))
        logits = buffer[: rows.stop - rows.start]
        torch.mm(x[rows], weight.t(), out=logits)
        yield rows, logits


def _scaled(source: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply by a factor on the device, rounding once.

    On a GPU, `source * factor` first rounds a zero-dimensional factor to source's dtype: in bfloat16 (8 bits of mantissa)
    this would scale the whole gradient by up to 0.2%.
    """
    out = torch.empty_like(source, dtype=dtype)
    if out.numel() > 0:
        grid = (cdiv(out.numel(), SCALE_BLOCK),)
        with torch.cuda.device_of(source):
            _linear_cross_entropy_scale_kernel[grid](
                source, factor, out, out.numel(), BLOCK=SCALE_BLOCK, num_warps=SCALE_WARPS, num_stages=1
            )
    return out


@as_op("minimind_fast::linear_cross_entropy_fwd")
def _linear_cross_entropy_fwd(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> logprobs, entropy (empty unless requested), lse times the temperature."""
    shape, V = hidden.shape[:-1], weight.shape[0]
    logprobs, lse = (hidden.new_empty(shape, dtype=accum_dtype(hidden)) for _ in range(2))
    entropy = hidden.new_empty(shape if with_entropy else 0, dtype=accum_dtype(hidden))
    if targets.numel() > 0:
        x, t, params = as_matrix(hidden), as_vector(targets), _launch_params(V)
        out, L, h = logprobs.view(-1), lse.view(-1), entropy.view(-1)
        with torch.cuda.device_of(hidden):
            for rows, logits in _chunks(x, weight):
                _linear_cross_entropy_fwd_kernel[(logits.shape[0],)](
                    logits, t[rows], out[rows], L[rows], h[rows], logits.stride(0), 1.0 / temperature,
                    V, IGNORE_INDEX, with_entropy, **params,
                )  # fmt: skip
    return logprobs, entropy, lse


@_linear_cross_entropy_fwd.register_fake
def _(hidden, weight, targets, temperature, with_entropy):
    shape, dtype = hidden.shape[:-1], accum_dtype(hidden)
    entropy = hidden.new_empty(shape if with_entropy else 0, dtype=dtype)
    return hidden.new_empty(shape, dtype=dtype), entropy, hidden.new_empty(shape, dtype=dtype)


@as_op("minimind_fast::linear_cross_entropy_bwd")
def _linear_cross_entropy_bwd(
    grad: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    entropy: Tensor,
    lse: Tensor,
    temperature: float,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor]:
    """-> d_hidden, d_weight, each empty where not wanted."""
    d_hidden = hidden.new_empty(hidden.shape if want_hidden else 0)
    total = weight.new_zeros(weight.shape if want_weight else 0, dtype=accum_dtype(weight))
    if targets.numel() > 0:
        x, t, L, g = as_matrix(hidden), as_vector(targets), as_vector(lse), as_vector(grad)
        h, g_h = (L, g) if grad_entropy is None else (as_vector(entropy), as_vector(grad_entropy))
        V = weight.shape[0]
        with torch.cuda.device_of(hidden):
            for rows, logits in _chunks(x, weight):
                _linear_cross_entropy_bwd_kernel[(logits.shape[0],)](
                    logits, t[rows], L[rows], h[rows], g[rows], g_h[rows], logits.stride(0), 1.0 / temperature,
                    V, IGNORE_INDEX, grad_entropy is not None, **_launch_params(V),
                )  # fmt: skip
                if want_hidden:
                    torch.mm(logits, weight, out=d_hidden.view(-1, hidden.shape[-1])[rows])
                if want_weight:
                    add_product(total, logits, x[rows])
    return d_hidden, total.to(weight.dtype, copy=False)


@_linear_cross_entropy_bwd.register_fake
def _(grad, grad_entropy, hidden, weight, targets, entropy, lse, temperature, want_hidden, want_weight):
    d_weight = torch.empty(weight.shape if want_weight else 0, dtype=weight.dtype, device=weight.device)
    return hidden.new_empty(hidden.shape if want_hidden else 0), d_weight


@as_op("minimind_fast::linear_cross_entropy_both")
def _linear_cross_entropy_both(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    grad_weights: Tensor,
    temperature: float,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> logprobs; d_hidden and d_weight (float32) for the incoming gradient grad_weights, empty where not wanted."""
    logprobs = hidden.new_empty(hidden.shape[:-1], dtype=accum_dtype(hidden))
    d_hidden = hidden.new_empty(hidden.shape if want_hidden else 0)
    total = weight.new_zeros(weight.shape if want_weight else 0, dtype=accum_dtype(weight))
    if targets.numel() > 0:
        x, t, out, g = as_matrix(hidden), as_vector(targets), logprobs.view(-1), as_vector(grad_weights)
        lse = torch.empty_like(out)
        V = weight.shape[0]
        params = _launch_params(V)
        with torch.cuda.device_of(hidden):
            for rows, logits in _chunks(x, weight):
                L, grid = lse[rows], (logits.shape[0],)
                _linear_cross_entropy_fwd_kernel[grid](
                    logits, t[rows], out[rows], L, L, logits.stride(0), 1.0 / temperature,
                    V, IGNORE_INDEX, False, **params,
                )  # fmt: skip
                _linear_cross_entropy_bwd_kernel[grid](
                    logits, t[rows], L, L, g[rows], L, logits.stride(0), 1.0 / temperature,
                    V, IGNORE_INDEX, False, **params,
                )  # fmt: skip
                if want_hidden:
                    torch.mm(logits, weight, out=d_hidden.view(-1, hidden.shape[-1])[rows])
                if want_weight:
                    add_product(total, logits, x[rows])
    return logprobs, d_hidden, total


@_linear_cross_entropy_both.register_fake
def _(hidden, weight, targets, grad_weights, temperature, want_hidden, want_weight):
    total = torch.empty(weight.shape if want_weight else 0, dtype=accum_dtype(weight), device=weight.device)
    logprobs = hidden.new_empty(hidden.shape[:-1], dtype=accum_dtype(hidden))
    return logprobs, hidden.new_empty(hidden.shape if want_hidden else 0), total


@as_op("minimind_fast::linear_cross_entropy_scale")
def _linear_cross_entropy_scale(
    grad: Tensor, targets: Tensor, grad_weights: Tensor, d_hidden: Tensor, total: Tensor
) -> tuple[Tensor, Tensor]:
    """-> s d_hidden and s d_weight, where grad = s grad_weights; nan if there is no such s."""
    if targets.numel() == 0:
        return d_hidden.clone(), total.to(d_hidden.dtype, copy=True)
    live = targets != IGNORE_INDEX
    g, w = torch.where(live, grad, 0.0).double(), torch.where(live, grad_weights, 0.0).double()
    square = (w * w).sum()
    s = torch.where(square > 0, (g * w).sum() / square, 0.0)
    kept = ((g - s * w).abs() <= PROMISE * g.abs().amax()).all()
    # An inf or nan gradient breaks no promise: the result is nan, as usual.
    torch.ops.minimind_fast.note_promise(~kept & g.isfinite().all())
    s = torch.where(kept, s, float("nan"))
    return _scaled(d_hidden, s, d_hidden.dtype), _scaled(total, s, d_hidden.dtype)


@_linear_cross_entropy_scale.register_fake
def _(grad, targets, grad_weights, d_hidden, total):
    return torch.empty_like(d_hidden), torch.empty_like(total, dtype=d_hidden.dtype)


def _save(ctx, inputs, output):
    hidden, weight, targets, ctx.temperature, ctx.with_entropy = inputs
    ctx.save_for_backward(hidden, weight, targets, *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, grad_entropy, _):
    saved = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(saved[-1])
    want_hidden, want_weight = ctx.needs_input_grad[:2]
    d_hidden, d_weight = _linear_cross_entropy_bwd(
        grad, grad_entropy if ctx.with_entropy else None, *saved, ctx.temperature, want_hidden, want_weight
    )
    return d_hidden if want_hidden else None, d_weight if want_weight else None, None, None, None


def _save_both(ctx, inputs, output):
    ctx.save_for_backward(inputs[2], inputs[3], *output[1:])
    ctx.set_materialize_grads(False)


def _backward_both(ctx, grad, *_):
    nothing = (None,) * 7
    if grad is None:
        return nothing
    want_hidden, want_weight = ctx.needs_input_grad[:2]
    d_hidden, d_weight = _linear_cross_entropy_scale(grad, *ctx.saved_tensors)
    return d_hidden if want_hidden else None, d_weight if want_weight else None, *nothing[2:]


_linear_cross_entropy_fwd.register_autograd(_backward, setup_context=_save)
_linear_cross_entropy_both.register_autograd(_backward_both, setup_context=_save_both)
for _op in (_linear_cross_entropy_bwd, _linear_cross_entropy_scale):
    refuse_second_derivative(_op, "linear_cross_entropy")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    return_entropy: bool = False,
    grad_weights: Tensor | None = None,
):
    """Compute the log-probability of each target under softmax(hidden @ weight.T / temperature), not storing the logits.

    Args:
        hidden: (..., D) float32, bfloat16, float16 or float64, any strides.
        weight: (V, D), the head, in the same dtype.
        targets: (...) int64 or int32; IGNORE_INDEX (-100) where there is no loss. Any other value outside [0, V) gives nan.
        temperature: divides the logits; positive.
        return_entropy: also return the entropy of the distribution, which is differentiable.
        grad_weights: (...) float32, constant: a promise that the incoming gradient is one number times these (ignored
            targets aside), as for a weighted mean of the log-probabilities. The forward then computes the gradients, which
            saves a quarter of the matmuls; in 16 bits d_hidden is rounded once more when scaled by that number, unless it
            is a power of two. A promise broken by more than 1e-5 of the largest gradient raises on a CPU; on a GPU both
            gradients are nan and `ops.check_promises()` raises.
    Returns:
        logprobs (...) float32 (float64 for float64), 0 where ignored; with `return_entropy` also entropy, likewise.
    Raises:
        ValueError: invalid shapes, dtypes or temperature, or entropy requested together with grad_weights.
        RuntimeError: a second derivative is requested.
    Source: Liger-Kernel; Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, 2024.
    """
    if hidden.dim() == 0 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1] or not weight.numel():
        raise ValueError(
            f"linear_cross_entropy needs hidden (..., D) and weight (V, D), got {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}."
        )
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(
            f"linear_cross_entropy needs hidden and weight in one floating-point dtype, got {hidden.dtype} and "
            f"{weight.dtype}."
        )
    if targets.shape != hidden.shape[:-1] or targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"linear_cross_entropy needs integer targets of shape {tuple(hidden.shape[:-1])}, got {targets.dtype} of "
            f"{tuple(targets.shape)}."
        )
    if not temperature > 0:
        raise ValueError(f"linear_cross_entropy needs a positive temperature, got {temperature}.")
    if grad_weights is not None:
        if return_entropy:
            raise ValueError("linear_cross_entropy has no entropy with grad_weights: leave one of the two out.")
        if grad_weights.shape != targets.shape or grad_weights.dtype != torch.float32:
            raise ValueError(
                f"linear_cross_entropy needs float32 grad_weights of shape {tuple(targets.shape)}, got "
                f"{grad_weights.dtype} of {tuple(grad_weights.shape)}."
            )
        wanted = [torch.is_grad_enabled() and t.requires_grad for t in (hidden, weight)]
        if any(wanted):
            return _linear_cross_entropy_both(
                hidden, weight, targets, grad_weights.detach(), float(temperature), *wanted
            )[0]
    logprobs, entropy, _ = _linear_cross_entropy_fwd(hidden, weight, targets, float(temperature), return_entropy)
    return (logprobs, entropy) if return_entropy else logprobs
