"""What several kernels share: views for launchers, sums of partial results, the refusal of second derivatives.

Purpose:    one copy of each helper, so that a kernel file holds its own op only.
Principle:  a helper takes tensors and sizes and knows no op.
Properties: a view copies only where strides rule it out. Sums run in a fixed order: two runs agree bitwise.

Shapes: T tokens (all leading dimensions), D columns, V vocab.
"""
# Triton's annotations (constexpr) are the compiler's view, not the caller's.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportCallIssue=false

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs under the interpreter (0.4 ms each): more than one, so that partials really are summed.
CPU_PROGRAMS = 3


# Triton's own are callable from kernels too, which costs the host some microseconds a call.
def cdiv(a: int, b: int) -> int:
    """Divide, rounding up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Round up to a power of two; n is at least 1."""
    return 1 << (n - 1).bit_length()


def accum_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype to accumulate in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def as_matrix(x: Tensor) -> Tensor:
    """View as (T, D) with any strides, for a matmul."""
    return x.reshape(-1, x.shape[-1])


def as_rows(x: Tensor) -> Tensor:
    """View as (T, D) with adjacent columns, for our kernels."""
    x = as_matrix(x)
    return x if x.stride(-1) == 1 else x.contiguous()


def as_vector(x: Tensor) -> Tensor:
    """View as (T,) with adjacent values."""
    return x.reshape(-1).contiguous()


def padded(V: int) -> int:
    """Round a row stride of logits up to a multiple of 16, which Triton needs for 16-byte loads."""
    return (V + 15) // 16 * 16


def num_programs(x: Tensor, warps_per_sm: int, num_warps: int) -> int:
    """Size a backward's grid by the card, not by the data: this fixes the order of dw's sum.

    Args:
        x: any tensor on the card.
        warps_per_sm: warps resident on a multiprocessor.
        num_warps: warps per program.
    """
    if not x.is_cuda:
        return CPU_PROGRAMS
    return torch.cuda.get_device_properties(x.device).multi_processor_count * max(1, warps_per_sm // num_warps)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a^T @ b to a float32 (float64 for float64) sum, without rounding the product to 16 bits first."""
    if total.dtype == a.dtype:
        total.addmm_(a.t(), b)
    elif a.device.type == "cuda":
        # 16 bits in, float32 out. Batched, because older versions of addmm refuse a float32 summand.
        torch.baddbmm(total[None], a.t()[None], b[None], out_dtype=total.dtype, out=total[None])
    else:
        total.addmm_(a.t().to(total.dtype), b.to(total.dtype))


@triton.jit
def round_to_tf32(x):
    """Round float32 to the nearest tf32: a matrix unit cuts the lower 13 bits off, which costs twice the error."""
    rounded = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)  # a NaN's bits may all be ones, and would become zero


@triton.jit
def _sum_partials_kernel(
    partial_ptr, out_ptr, num_partials, size, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out (size,) = partial (num_partials, size) summed over its rows, in a fixed order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK_ROWS, BLOCK), dtype=partial_ptr.dtype.element_ty)
    for start in range(0, num_partials, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        mask = (row < num_partials)[:, None] & (at < size)[None, :]
        total += tl.load(partial_ptr + row[:, None].to(tl.int64) * size + at[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + at, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=at < size)


def sum_partials(partial: Tensor, out: Tensor) -> None:
    """Sum the rows of partial into out, up to 32 a step so that their loads overlap."""
    num_partials, size = partial.shape[0], out.numel()
    rows = min(32, next_power_of_2(num_partials))
    params = {"BLOCK_ROWS": rows, "BLOCK": 2048 // rows, "num_warps": 4}
    _sum_partials_kernel[(cdiv(size, params["BLOCK"]),)](partial, out, num_partials, size, **params)


class Op:
    """A launcher as an op of PyTorch; `as_op` makes it.

    To torch.compile, fake tensors, dispatch modes and transforms it is a custom op. Where none of these is there, it is a
    plain `autograd.Function`, so that a GPU waits less in small steps. Host time forward and backward without launches, in
    us, as a custom op and so (benchmarks/studies/host_time.py): rms_norm 229 and 122, swiglu 114 and 61, rope 257 and 202;
    rms_norm without gradients 36 and 20.

    Attributes:
        op: the custom op.

    Source: https://github.com/pytorch/pytorch/issues/177109 on what a custom op costs.
    """

    def __init__(self, name: str, launcher: Callable) -> None:
        self.op = torch.library.custom_op(name, launcher, mutates_args=(), device_types=("cuda", "cpu"))
        self.register_fake = self.op.register_fake
        self._name, self._launcher, self._with_gradient = name, launcher, self.op

    def register_autograd(self, backward: Callable, setup_context: Callable | None = None) -> None:
        """As for a custom op."""
        self.op.register_autograd(backward, setup_context=setup_context)

        def forward(ctx, *inputs):
            output = self._launcher(*inputs)
            if setup_context is not None:
                setup_context(ctx, inputs, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._with_gradient = type(self._name.split("::")[1], (torch.autograd.Function,), methods).apply

    def __call__(self, *inputs):
        if torch.compiler.is_compiling() or _someone_listens():
            return self.op(*inputs)
        learns = False
        for x in inputs:
            if isinstance(x, Tensor):
                if type(x) is not Tensor and type(x) is not torch.nn.Parameter:
                    return self.op(*inputs)
                learns = learns or x.requires_grad
        return (self._with_gradient if learns and torch.is_grad_enabled() else self._launcher)(*inputs)


def _someone_listens() -> bool:
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active()


def as_op(name: str) -> Callable[[Callable], Op]:
    """Decorate a launcher.

    Args:
        name: the op's, such as minimind_fast::rms_norm_fwd.
    """
    return lambda launcher: Op(name, launcher)


def refuse_second_derivative(op: Op, name: str) -> None:
    """Make differentiating a backward raise an error that names the op.

    Args:
        op: the backward.
        name: the public op, for the message.
    """

    def refuse(ctx, *grads):
        raise RuntimeError(f"{name}'s kernel has no second derivative: use mm.ops.use('none') for this computation.")

    op.register_autograd(refuse, setup_context=_save_nothing)


def _save_nothing(ctx, inputs, output) -> None:
    pass
