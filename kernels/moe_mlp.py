"""The experts' SwiGLU MLPs as grouped matmuls over a routing plan: no loop over experts, no copied rows, no sync.

Purpose:    y[t] = sum_j w[t, j] expert_{e(t, j)}(x[t]) at the cost of its arithmetic, however tokens are distributed.
Principle:  sorted by expert, the slots form one block of rows per expert. A program finds its expert, rows and columns
            from the counts on the device; the grid is an upper bound, and programs past the last row exit.
            forward   h = x[order] W1^T (the matmul's own loads gather the rows; a W1 tile is half gate rows, half up
                      rows, so a thread holds both of a pair and a = silu(g) u needs no exchange);  z = a W2^T;
                      y[t] = sum_j w z[inverse[t, j]]
            backward  da = dy[order] W2;  dw = sum_f da a (no z needed);  dh = w da * (u s (1 + g (1 - s)), g s);
                      dx[t] = sum_j (dh W1)[inverse[t, j]];  dW1 = dh^T x[order];  dW2 = dy[order]^T (w a)
                      with s = sigmoid(g); dW's sums over an expert's rows are matmuls of ragged depth.
            With top_k = 1 a token has one row, which the second matmul scales and stores in place: no gather-sum.
Properties: FLOPs a slot: 6DF forward, 12DF backward. Saved for the backward beside x, the weights and the plan: h, 4F
            bytes a slot in 16 bits (a is recomputed, z is not needed); nothing if no gradient is required.
            Bytes a slot in 16 bits beyond the matmuls' operands: forward 6F + 2D written, backward 6F + 2D written and
            4F read; each reads another 2D where top_k > 1. float32 accumulation and epilogues (float64 for float64),
            each stored tensor rounded once. A dW of few tiles is split over the rows and its float32 partials added in
            a fixed order; the gather-sum runs over j in order; no atomics: two runs agree bitwise.

Shapes: T tokens, D hidden, F ffn, E experts, S = T * top_k slots; sorted rows are slots in the plan's order.
Source: MegaBlocks (Gale et al., 2022) for grouped matmuls; ScatterMoE (Tan et al., 2024) for gathered rows; SonicMoE
    for what need not be saved (dw from da and a); Triton's grouped-matmul tutorial for the order of the tiles.
"""

# Triton's annotations (constexpr) are the compiler's view, not the caller's.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportReturnType=false

from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from minimind_fast.kernels.common import (
    accum_dtype,
    as_op,
    cdiv,
    next_power_of_2,
    refuse_second_derivative,
    sum_partials,
)
from minimind_fast.kernels.grouped_matmul import _moe_combine_kernel, _moe_dw_kernel, halves, locate, matmul, quarters

MAX_EXPERTS = 128  # every program scans the counts in registers
# Compute capabilities with 163 KB of shared memory per program (8.0, 8.7) or 227 KB; 8.6, 8.9 and 12.0 have 99. Four
# stages of a 128 x 256 x 64 tile take 144 KB where mma reads registers, 192 where wgmma reads shared memory.
ROOMY = (80, 87, 90, 100, 103)
# Split dW so that one hot expert cannot outlast the rest: its tiles should fill most multiprocessors (132 on an H200).
# MiniMind3's d_gate_up (114 tiles) stays whole, its d_down (60) is split in 2, MiniMind2's in 2 and 3: 53 to 70 MB of
# partials, by byte count 3 to 6% of the matmuls' time. No split under 512 rows, or if partials exceed this size.
DW_TILES, DW_MIN_ROWS, DW_PARTIAL_BYTES = 100, 512, 128 << 20
# The gather-sum: 2048 values in 4 warps, two 16-byte loads a thread per choice.
COMBINE_TILE, COMBINE_BLOCK_D = 2048, 256


class Plan(Protocol):
    """The fields of a Routing that this op reads."""

    weights: Tensor
    experts: Tensor
    counts: Tensor
    order: Tensor
    inverse: Tensor


def _launch_params(kernel: str, slots: int, experts: int, element_bytes: int, capability: int) -> dict[str, int]:
    """Choose the tile of one of the matmuls.

    Args:
        kernel: "gate_up" (its BLOCK_N counts pairs: the matmul's tile is twice as wide), "d_hidden", "rows" (the second
            matmul and the input's gradient) or "dw" (both weight gradients; its BLOCK_K counts rows).
        slots, experts: S and E.
        element_bytes: bytes of one value of x.
        capability: compute capability of the card, 90 for 9.0; 0 without a card.
    Returns:
        BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M (row blocks that share a pass over the columns), num_warps, num_stages and,
        where limiting registers pays, maxnreg.
    """

    def tile(m: int, n: int, k: int, group: int, warps: int, stages: int) -> dict[str, int]:
        pairs = 2 if kernel == "gate_up" else 1
        # dW's rows are gathered through `order`, and Triton spends every other stage on that load.
        depth = 2 * stages - 1 if kernel == "dw" else stages
        names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M", "num_warps", "num_stages")
        return dict(zip(names, (m, n // pairs, k, group, warps, depth), strict=True))

    if element_bytes > 2:  # exact float32, no tensor cores: small tiles that stay in registers
        return tile(64, 64, 32, 4, 4, 2)
    rows = slots // experts
    if kernel != "dw":
        # Few rows an expert: reading the weights dominates. Use the narrowest row tile and deep stages of narrow
        # columns: 24 to 76 programs read one token's experts, with 36 to 60 KB in flight each.
        if rows <= 16:
            return tile(16, 64 if kernel == "gate_up" else 32, 128, 1, 4, 4)
        if rows <= 64:
            return tile(64, 64, 64, 1, 4, 4)
    # 8 row blocks x all column blocks at a time: 1.6 MB of x and one expert's weights (7.5 MB at 768 x 2432) fit in L2.
    if capability not in ROOMY:
        return tile(128, 128, 32, 8, 8, 4)
    if kernel == "d_hidden":
        # The epilogue moves 10F bytes a row, which takes as long as the matmul: with two programs an SM, one computes
        # while the other stores. On sm_90 this needs a limit of 128 registers (no spills).
        return tile(128, 128, 64, 8, 8, 3) | ({"maxnreg": 128} if capability == 90 else {})
    # 128 x 256 in 8 warps reads 48 KB from L2 every 4.2 MFLOP; 128 x 128 reads a third more at the same rate.
    # dW on sm_80 would spill with one more stage.
    return tile(128, 256, 64, 8, 8, 3 if kernel == "dw" and capability < 90 else 4)


def _dw_splits(E: int, M: int, N: int, slots: int, block_m: int, block_n: int) -> int:
    """How many splits of an expert's rows to use for its (M, N) weight gradient."""
    tiles = cdiv(M, block_m) * cdiv(N, block_n)
    return max(1, min(cdiv(DW_TILES, tiles), slots // DW_MIN_ROWS, DW_PARTIAL_BYTES // (4 * E * M * N)))


@triton.jit
def _moe_gate_up_kernel(
    x_ptr, gate_up_ptr, counts_ptr, order_ptr, hidden_ptr, act_ptr,
    D: tl.constexpr, F: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr, KEEP_HIDDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """act = silu(gate) * up of the gathered rows; hidden saves gate | up for the backward."""
    wide: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    expert, first, end, column = locate(counts_ptr, E, F, BLOCK_M, BLOCK_N, BLOCK_E, GROUP_M)
    if first >= end:
        return
    row = first + tl.arange(0, BLOCK_M)
    live = row < end
    # Rows and columns past the end read the first token and the last weight; only stores are masked.
    token = tl.load(order_ptr + row, mask=live, other=0) // TOP_K
    pair = tl.arange(0, 2 * BLOCK_N)
    weight_row = pair // BLOCK_N * F + tl.minimum(column * BLOCK_N + pair % BLOCK_N, F - 1)
    k = tl.arange(0, BLOCK_K)
    a_at = x_ptr + token[:, None].to(tl.int64) * D + k[None, :]
    b_at = gate_up_ptr + (expert * (2 * F) + weight_row)[None, :] * D + k[:, None]
    acc = tl.zeros((BLOCK_M, 2 * BLOCK_N), dtype=wide)
    acc = matmul(a_at, b_at, acc, k, D, 1, wide, BLOCK_K)

    gate, up = halves(acc, BLOCK_M, BLOCK_N)
    f = column * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = live[:, None] & (f < F)[None, :]
    within = tl.arange(0, BLOCK_M)[:, None]
    act_at = act_ptr + first.to(tl.int64) * F + (within * F + f[None, :])
    tl.store(act_at, (gate / (1.0 + tl.exp(-gate)) * up).to(act_ptr.dtype.element_ty), mask=mask)
    if KEEP_HIDDEN:
        hidden_at = hidden_ptr + first.to(tl.int64) * (2 * F) + (within * (2 * F) + f[None, :])
        tl.store(hidden_at, gate.to(hidden_ptr.dtype.element_ty), mask=mask)
        tl.store(hidden_at + F, up.to(hidden_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _moe_rows_kernel(
    a_ptr, weight_ptr, counts_ptr, order_ptr, scale_ptr, out_ptr,
    K: tl.constexpr, N: tl.constexpr, E: tl.constexpr, STRIDE_K: tl.constexpr, STRIDE_N: tl.constexpr,
    SCATTER: tl.constexpr, HAS_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Sorted rows a (S, K) times their expert's (K, N); SCATTER (top_k = 1) stores each row, scaled, at its token."""
    wide: tl.constexpr = tl.float64 if a_ptr.dtype.element_ty == tl.float64 else tl.float32
    expert, first, end, column = locate(counts_ptr, E, N, BLOCK_M, BLOCK_N, BLOCK_E, GROUP_M)
    if first >= end:
        return
    row = first + tl.arange(0, BLOCK_M)
    live = row < end
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a_at = a_ptr + tl.minimum(row, end - 1)[:, None].to(tl.int64) * K + k[None, :]
    b_at = weight_ptr + expert * (K * N) + k[:, None] * STRIDE_K + (n % N)[None, :] * STRIDE_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=wide)
    acc = matmul(a_at, b_at, acc, k, K, STRIDE_K, wide, BLOCK_K)
    if SCATTER:
        row = tl.load(order_ptr + row, mask=live, other=0)
        if HAS_SCALE:
            acc = acc * tl.load(scale_ptr + row, mask=live, other=0.0)[:, None]
    out_at = out_ptr + row[:, None].to(tl.int64) * N + n[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=live[:, None] & (n < N)[None, :])


@triton.jit
def _moe_d_hidden_kernel(
    dy_ptr, down_ptr, hidden_ptr, weights_ptr, counts_ptr, order_ptr, d_hidden_ptr, act_ptr, partial_ptr, num_slots,
    D: tl.constexpr, F: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr,
    WANT_D_HIDDEN: tl.constexpr, WANT_ACT: tl.constexpr, WANT_D_WEIGHTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """d-hidden (S, 2F), w * act (S, F) for d-down, and this column block's part of the routing weights' gradient."""
    wide: tl.constexpr = tl.float64 if dy_ptr.dtype.element_ty == tl.float64 else tl.float32
    expert, first, end, column = locate(counts_ptr, E, F, BLOCK_M, BLOCK_N, BLOCK_E, GROUP_M)
    if first >= end:
        return
    row = first + tl.arange(0, BLOCK_M)
    live = row < end
    slot = tl.load(order_ptr + row, mask=live, other=0)
    f = column * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a_at = dy_ptr + (slot // TOP_K)[:, None].to(tl.int64) * D + k[None, :]
    b_at = down_ptr + expert * (D * F) + k[:, None] * F + (f % F)[None, :]
    d_act = tl.zeros((BLOCK_M, BLOCK_N), dtype=wide)
    d_act = matmul(a_at, b_at, d_act, k, D, F, wide, BLOCK_K)

    weight = tl.load(weights_ptr + slot, mask=live, other=0.0)[:, None]
    # An eighth of the columns at a time, to hold only an eighth of g, u and the results in registers.
    PART: tl.constexpr = BLOCK_N // 8
    d_weights = tl.zeros((BLOCK_M,), dtype=wide)
    left, right = halves(d_act, BLOCK_M, BLOCK_N // 2)
    hidden_ptr += first.to(tl.int64) * (2 * F)  # int32 offsets from here on: half the registers
    d_hidden_ptr += first.to(tl.int64) * (2 * F)
    act_ptr += first.to(tl.int64) * F
    within = tl.arange(0, BLOCK_M)[:, None]
    parts = quarters(left, BLOCK_M, PART) + quarters(right, BLOCK_M, PART)
    for part in tl.static_range(8):
        d_act = parts[part]
        f = column * BLOCK_N + part * PART + tl.arange(0, PART)
        mask = live[:, None] & (f < F)[None, :]
        hidden_at = within * (2 * F) + f[None, :]
        gate = tl.load(hidden_ptr + hidden_at, mask=mask, other=0.0).to(wide)
        up = tl.load(hidden_ptr + hidden_at + F, mask=mask, other=0.0).to(wide)
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        silu = gate * sigmoid
        if WANT_D_WEIGHTS:
            # Masked, though zero there: the compiler would fuse a lane's bare product into the sum, unrounded, but not those
            # that shuffles bring, so that the lanes of a row would end with different last bits.
            d_weights += tl.sum(tl.where(mask, d_act * silu * up, 0.0), axis=1)
        if WANT_ACT:
            act_at = act_ptr + within * F + f[None, :]
            tl.store(act_at, (weight * silu * up).to(act_ptr.dtype.element_ty), mask=mask)
        if WANT_D_HIDDEN:
            d_act = d_act * weight
            d_gate = d_act * up * (sigmoid + silu * (1.0 - sigmoid))
            tl.store(d_hidden_ptr + hidden_at, d_gate.to(d_hidden_ptr.dtype.element_ty), mask=mask)
            tl.store(d_hidden_ptr + hidden_at + F, (d_act * silu).to(d_hidden_ptr.dtype.element_ty), mask=mask)
    if WANT_D_WEIGHTS:
        tl.store(partial_ptr + column.to(tl.int64) * num_slots + slot, d_weights, mask=live)


class _Launcher:
    """The sizes of one call, and the kernel launches that depend on them."""

    def __init__(
        self, x: Tensor, weights: Tensor, counts: Tensor, order: Tensor, inverse: Tensor, down: Tensor
    ) -> None:
        self.x, self.counts, self.order, self.inverse = x, counts, order, inverse
        self.weights = weights.contiguous()
        (self.T, self.D), (self.E, _, self.F) = x.shape, down.shape
        self.top_k = weights.shape[1]
        self.S = self.T * self.top_k
        self.block_e = max(2, next_power_of_2(self.E))
        major, minor = torch.cuda.get_device_capability(x.device) if x.is_cuda else (0, 0)
        self.capability = 10 * major + minor

    def params(self, kernel: str) -> dict[str, int]:
        params = _launch_params(kernel, self.S, self.E, self.x.element_size(), self.capability)
        return {**params, "BLOCK_E": self.block_e}

    def grid(self, columns: int, params: dict[str, int]) -> tuple[int]:
        """Row blocks for any split of S rows among E experts, in whole groups, times column blocks."""
        block_m, group = params["BLOCK_M"], params["GROUP_M"]
        used = min(self.E, self.S)  # experts that can have rows; each may leave one block partly empty
        row_blocks = (self.S + used * (block_m - 1)) // block_m
        return (cdiv(row_blocks, group) * group * cdiv(columns, params["BLOCK_N"]),)

    def rows(self, a: Tensor, weight: Tensor, K: int, N: int, transposed: bool, scale: Tensor | None) -> Tensor:
        """Sum over a token's choices of (scale times) the sorted rows a (S, K) times their experts' weights."""
        params, scatter = self.params("rows"), self.top_k == 1
        product = a.new_empty((self.S, N))
        some = self.weights if scale is None else scale
        strides = (1, K) if transposed else (N, 1)
        _moe_rows_kernel[self.grid(N, params)](
            a, weight, self.counts, self.order, some, product, K, N, self.E, *strides, scatter, scale is not None, **params
        )  # fmt: skip
        if scatter:
            return product
        out = a.new_empty((self.T, N))
        block_d = min(COMBINE_BLOCK_D, next_power_of_2(N))
        block_t = COMBINE_TILE // block_d
        _moe_combine_kernel[(cdiv(self.T, block_t) * cdiv(N, block_d),)](
            product, self.inverse, some, out, self.T, N, self.top_k, scale is not None,
            BLOCK_T=block_t, BLOCK_D=block_d,
        )  # fmt: skip
        return out

    def weight_grad(self, a: Tensor, b: Tensor, out: Tensor, gather_a: bool) -> None:
        """out (E, M, N) = the sum over each expert's rows of a^T b."""
        (_, M, N), params = out.shape, self.params("dw")
        params.pop("GROUP_M")
        splits = _dw_splits(self.E, M, N, self.S, params["BLOCK_M"], params["BLOCK_N"])
        tiles = cdiv(M, params["BLOCK_M"]) * cdiv(N, params["BLOCK_N"])
        partial = out if splits == 1 else out.new_empty((splits, self.E, M, N), dtype=accum_dtype(out))
        _moe_dw_kernel[(tiles * splits * self.E,)](
            a, b, self.counts, self.order, partial, M, N, self.E, self.top_k, splits, gather_a, **params
        )
        if splits > 1:
            sum_partials(partial, out)


@as_op("minimind_fast::moe_mlp_fwd")
def _moe_mlp_fwd(
    x: Tensor,
    weights: Tensor,
    counts: Tensor,
    order: Tensor,
    inverse: Tensor,
    gate_up: Tensor,
    down: Tensor,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor]:
    """-> y (T, D) and sorted hidden (S, 2F), or empty."""
    S, F = order.shape[0], down.shape[2]
    hidden = x.new_empty((S if keep_hidden else 0, 2 * F))
    if x.numel() == 0:
        return x.new_empty(x.shape), hidden
    x, gate_up, down = x.contiguous(), gate_up.contiguous(), down.contiguous()
    launch = _Launcher(x, weights, counts, order, inverse, down)
    params = launch.params("gate_up")
    act = x.new_empty((S, F))
    with torch.cuda.device_of(x):
        _moe_gate_up_kernel[launch.grid(F, params)](
            x, gate_up, counts, order, hidden, act, launch.D, F, launch.E, launch.top_k, keep_hidden, **params
        )
        y = launch.rows(act, down, F, launch.D, transposed=True, scale=launch.weights)
    return y, hidden


@_moe_mlp_fwd.register_fake
def _(x, weights, counts, order, inverse, gate_up, down, keep_hidden):
    return x.new_empty(x.shape), x.new_empty((order.shape[0] if keep_hidden else 0, 2 * down.shape[2]))


@as_op("minimind_fast::moe_mlp_bwd")
def _moe_mlp_bwd(
    dy: Tensor,
    x: Tensor,
    weights: Tensor,
    counts: Tensor,
    order: Tensor,
    inverse: Tensor,
    gate_up: Tensor,
    down: Tensor,
    hidden: Tensor,
    want_dx: bool,
    want_d_weights: bool,
    want_d_gate_up: bool,
    want_d_down: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dx, d_weights, d_gate_up, d_down, each empty where not wanted."""
    dx = x.new_empty(0)
    d_weights = weights.new_empty(weights.shape if want_d_weights else 0)
    d_gate_up = gate_up.new_empty(gate_up.shape if want_d_gate_up else 0)
    d_down = down.new_empty(down.shape if want_d_down else 0)
    if x.numel() == 0:
        return x.new_empty(x.shape if want_dx else 0), d_weights, d_gate_up.zero_(), d_down.zero_()
    dy, x, gate_up, down = dy.contiguous(), x.contiguous(), gate_up.contiguous(), down.contiguous()
    launch = _Launcher(x, weights, counts, order, inverse, down)
    D, F, params = launch.D, launch.F, launch.params("d_hidden")
    want_d_hidden = want_dx or want_d_gate_up
    d_hidden = hidden.new_empty(hidden.shape if want_d_hidden else 0)
    act = hidden.new_empty((launch.S, F) if want_d_down else 0)
    blocks = cdiv(F, params["BLOCK_N"])
    partial = weights.new_empty((blocks, launch.S) if want_d_weights else 0)
    with torch.cuda.device_of(x):
        _moe_d_hidden_kernel[launch.grid(F, params)](
            dy, down, hidden, launch.weights, counts, order, d_hidden, act, partial, launch.S,
            D, F, launch.E, launch.top_k, want_d_hidden, want_d_down, want_d_weights, **params,
        )  # fmt: skip
        if want_d_weights:
            sum_partials(partial, d_weights)
        if want_dx:
            dx = launch.rows(d_hidden, gate_up, 2 * F, D, transposed=False, scale=None)
        if want_d_gate_up:
            launch.weight_grad(d_hidden, x, d_gate_up, gather_a=False)
        if want_d_down:
            launch.weight_grad(dy, act, d_down, gather_a=True)
    return dx, d_weights, d_gate_up, d_down


@_moe_mlp_bwd.register_fake
def _(dy, x, weights, counts, order, inverse, gate_up, down, hidden, want_dx, want_d_weights, want_d_gate_up,
      want_d_down):  # fmt: skip
    wanted = ((x, want_dx), (weights, want_d_weights), (gate_up, want_d_gate_up), (down, want_d_down))
    return tuple(t.new_empty(t.shape if want else 0) for t, want in wanted)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:-1], output[1])
    # Else autograd makes zeros for `hidden`'s gradient: 637 MB a layer at 65,536 tokens of MiniMind3.
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, _):
    if dy is None:
        return (None,) * 8
    need = ctx.needs_input_grad
    wanted = need[0], need[1], need[5], need[6]
    grads = _moe_mlp_bwd(dy, *ctx.saved_tensors, *wanted)
    dx, d_weights, d_gate_up, d_down = (g if want else None for g, want in zip(grads, wanted, strict=True))
    return dx, d_weights, None, None, None, d_gate_up, d_down, None


_moe_mlp_fwd.register_autograd(_backward, setup_context=_save)
refuse_second_derivative(_moe_mlp_bwd, "moe_mlp")


def moe_mlp(x: Tensor, routing: Plan, gate_up: Tensor, down: Tensor) -> Tensor:
    """Send each token through its experts' SwiGLU MLPs and sum the outputs by the routing weights.

    Args:
        x: (T, D) float32, bfloat16 or float16 (float64 in the interpreter only); copied if not contiguous.
        routing: the result of `moe_route` for these tokens; `counts` and `order` are trusted.
        gate_up: (E, 2F, D) stacked expert weights in x's dtype, gate first, E up to 128.
        down: (E, D, F) in x's dtype.
    Returns:
        (T, D) in x's dtype; gradients to x, routing.weights, gate_up and down.
    Raises:
        ValueError: mismatched shapes or dtypes, or E above 128.
        RuntimeError: a second derivative is requested.
    Source: Gale et al., MegaBlocks, 2022; Tan et al., ScatterMoE, 2024; SonicMoE.
    """
    if x.dim() != 2 or not x.is_floating_point() or (x.is_cuda and x.dtype == torch.float64):
        raise ValueError(
            f"moe_mlp's kernel needs floating-point x (T, D), float64 in the interpreter only; "
            f"got {x.dtype} {tuple(x.shape)}."
        )
    E, F = down.shape[0], down.shape[-1]
    if not 1 <= E <= MAX_EXPERTS:
        raise ValueError(f"moe_mlp's kernel takes 1 to {MAX_EXPERTS} experts, got {E}.")
    expected = {"gate_up": (gate_up, (E, 2 * F, x.shape[1])), "down": (down, (E, x.shape[1], F))}
    for name, (weight, shape) in expected.items():
        if tuple(weight.shape) != shape or weight.dtype != x.dtype:
            raise ValueError(
                f"moe_mlp needs {name} {shape} in x's dtype {x.dtype}, got {tuple(weight.shape)} {weight.dtype}."
            )
    if routing.weights.shape[0] != x.shape[0] or routing.counts.shape != (E,):
        raise ValueError(
            f"moe_mlp needs the routing of these {x.shape[0]} tokens and {E} experts, "
            f"got {tuple(routing.weights.shape)} weights and {tuple(routing.counts.shape)} counts."
        )
    tensors = x, routing.weights, routing.counts, routing.order, routing.inverse, gate_up, down
    keep_hidden = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return _moe_mlp_fwd(*tensors, keep_hidden)[0]
