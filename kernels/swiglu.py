"""SwiGLU on the fused gate-up projection: one pass forward, one pass backward.

Purpose:    silu(gate) * up without the three intermediate tensors that eager writes and reads again.
Principle:  s = sigmoid(gate);  out = gate s up
            d_gate = d_out up s (1 + gate (1 - s));  d_up = d_out gate s
Properties: bytes a token in 16 bits: forward 6F (read 2F values, write F), backward 10F (read 3F, write 2F), the
            minimum. About 8 FLOPs a value forward and 15 backward: memory-bound.
            Only the input is saved; the backward recomputes the activation. Float32 inside (float64 for float64), one
            rounding at the store. No reductions, so two runs agree bitwise.

Shapes: T tokens (all leading dimensions), F ffn.
Source: Shazeer, GLU Variants Improve Transformer, 2020; Liger-Kernel for recomputing in the backward.
"""
# Triton's annotations (constexpr) are the compiler's view, not the caller's.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportReturnType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from minimind_fast.kernels.common import as_op, as_rows, cdiv, next_power_of_2, refuse_second_derivative

# A tile is a few rows by 128 columns: 256 bytes of a 16-bit row (whole cache lines), and 128 divides the presets' ffn
# sizes or nearly (1408 = 11 x 128, 1728 = 13.5, 2048 = 16, 2432 = 19). One row a program, padded to a power of two,
# would idle 41% of its lanes at 2432.
BLOCK_F = 128
# 2048 values in 128 threads: two 16-byte loads a thread per operand, issued before the first use. With about 40
# registers, 12 programs are resident on an SM: about 100 KB in flight, three times what HBM latency needs.
TILE = 2048
NUM_WARPS = 4


def _launch_params(F: int) -> dict[str, int]:
    """Choose the tile for an ffn size.

    Args:
        F: columns of the output.
    Returns:
        BLOCK_T, BLOCK_F, num_warps, num_stages: keyword arguments of both kernels.
    """
    block_f = min(BLOCK_F, next_power_of_2(F))
    return {"BLOCK_T": TILE // block_f, "BLOCK_F": block_f, "num_warps": NUM_WARPS, "num_stages": 1}


@triton.jit
def _tile(num_rows, F: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr):
    """-> this program's rows (int64), columns and mask; neighbouring programs are neighbours in a row."""
    blocks: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    pid = tl.program_id(0)
    rows = (pid // blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = (pid % blocks) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (rows < num_rows)[:, None]
    if F % BLOCK_F != 0:
        mask = mask & (cols < F)[None, :]
    return rows[:, None], cols[None, :], mask


@triton.jit
def _swiglu_fwd_kernel(
    gate_up_ptr, out_ptr, num_rows, stride, F: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr
):
    wide = tl.float64 if gate_up_ptr.dtype.element_ty == tl.float64 else tl.float32
    rows, cols, mask = _tile(num_rows, F, BLOCK_T, BLOCK_F)
    gate_at = gate_up_ptr + rows * stride + cols
    gate = tl.load(gate_at, mask=mask, other=0.0)
    up = tl.load(gate_at + F, mask=mask, other=0.0)
    gate, up = gate.to(wide), up.to(wide)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + rows * F + cols, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_bwd_kernel(
    grad_ptr, gate_up_ptr, d_gate_up_ptr, num_rows, grad_stride, stride,
    F: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    wide = tl.float64 if gate_up_ptr.dtype.element_ty == tl.float64 else tl.float32
    rows, cols, mask = _tile(num_rows, F, BLOCK_T, BLOCK_F)
    gate_at = gate_up_ptr + rows * stride + cols
    gate = tl.load(gate_at, mask=mask, other=0.0)
    up = tl.load(gate_at + F, mask=mask, other=0.0)
    grad = tl.load(grad_ptr + rows * grad_stride + cols, mask=mask, other=0.0)
    gate, up, grad = gate.to(wide), up.to(wide), grad.to(wide)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    d_gate = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    d_up = grad * gate * sigmoid
    d_gate_at = d_gate_up_ptr + rows * (2 * F) + cols
    tl.store(d_gate_at, d_gate.to(d_gate_up_ptr.dtype.element_ty), mask=mask)
    tl.store(d_gate_at + F, d_up.to(d_gate_up_ptr.dtype.element_ty), mask=mask)


@as_op("minimind_fast::swiglu_fwd")
def _swiglu_fwd(gate_up: Tensor) -> Tensor:
    F = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], F)
    if out.numel() > 0:
        x, params = as_rows(gate_up), _launch_params(F)
        grid = (cdiv(x.shape[0], params["BLOCK_T"]) * cdiv(F, params["BLOCK_F"]),)
        with torch.cuda.device_of(x):
            _swiglu_fwd_kernel[grid](x, out, x.shape[0], x.stride(0), F, **params)
    return out


@_swiglu_fwd.register_fake
def _(gate_up):
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@as_op("minimind_fast::swiglu_bwd")
def _swiglu_bwd(grad: Tensor, gate_up: Tensor) -> Tensor:
    F = gate_up.shape[-1] // 2
    d_gate_up = gate_up.new_empty(gate_up.shape)
    if grad.numel() > 0:
        x, g, params = as_rows(gate_up), as_rows(grad), _launch_params(F)
        grid = (cdiv(x.shape[0], params["BLOCK_T"]) * cdiv(F, params["BLOCK_F"]),)
        with torch.cuda.device_of(x):
            _swiglu_bwd_kernel[grid](g, x, d_gate_up, x.shape[0], g.stride(0), x.stride(0), F, **params)
    return d_gate_up


@_swiglu_bwd.register_fake
def _(grad, gate_up):
    return gate_up.new_empty(gate_up.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])


def _backward(ctx, grad):
    return _swiglu_bwd(grad, *ctx.saved_tensors)


_swiglu_fwd.register_autograd(_backward, setup_context=_save)
refuse_second_derivative(_swiglu_bwd, "swiglu")


def swiglu(gate_up: Tensor) -> Tensor:
    """Compute silu(gate) * up on a fused projection.

    Args:
        gate_up: (..., 2F) float32, bfloat16, float16 or float64, gate first; any strides (copied if the last dimension
            is not contiguous or the leading ones do not fold into one).
    Returns:
        (..., F), contiguous, in the same dtype.
    Raises:
        ValueError: an odd last dimension, or a dtype that is not floating point.
        RuntimeError: a second derivative is requested.
    Source: Shazeer, GLU Variants Improve Transformer, 2020.
    """
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2 or not gate_up.is_floating_point():
        raise ValueError(
            f"swiglu needs a floating-point (..., 2F) tensor, got {gate_up.dtype} of shape {tuple(gate_up.shape)}."
        )
    return _swiglu_fwd(gate_up)
