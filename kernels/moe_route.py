"""Mixture-of-experts routing: scores, top-k, balancing loss and dispatch plan, without leaving the device.

Purpose:    from tokens to (weights, experts) and to the order in which the experts' matmuls read the tokens, in two
            launches (three with documents), without a sort or a host sync.
Principle:  s = softmax(x W^T);  the top_k largest s, ties to the lower expert;  w_j = s_j or s_j / sum_i s_i
            aux = mean over documents of E sum_e f_e P_e,  f_e = share of the slots, P_e = mean of s_e
            A token chooses an expert at most once, so a slot's place among its expert's slots is the number of earlier
            tokens that chose it: a column sum of a 0/1 matrix. Tiles of tokens write their column sums (histogram);
            in the second launch every tile sums those before it (prefix) and places its own slots. This gives the
            stable order and its inverse.
            Backward: ds_j = dw_j, or (dw_j - sum_i dw_i w_i) / sum_i s_i;  ds_e += d_aux E f_e / (length documents);
            dz = s (ds - sum s ds);  dx = dz W;  dW = dz^T x.  f is a count and has no derivative.
Properties: bytes a token in 16 bits: forward 2D + 4E + 24 top_k, backward 4D + 12E + 12 top_k; FLOPs 2DE forward, 4DE
            backward: memory-bound. With documents the scores are read once more, by one program a document, tile after
            tile: a few documents of many thousand tokens leave most of the card idle (not yet measured).
            The prefix reads tiles^2 E counts from L2: 16 MB at T = 65,536, E = 4.
            Logits stay float32 (eager rounds them to x's dtype before the softmax): more accurate, and rounding makes
            no ties. Where W and x are 16-bit, dz multiplies them rounded to tf32; eager rounds it to their dtype.
            Saved beside x and W: s and the choices, 4E + 4 top_k bytes a token, both outputs anyway, and E numbers a
            document. Counts are integers and every float sum has a fixed order: two runs on one card agree bitwise.

Shapes: T tokens, D hidden, E experts; a slot is one (token, choice) pair, numbered t * top_k + j.
Source: Shazeer et al., 2017, and Fedus et al., Switch Transformers, 2021; index inversion for few experts after
    ScatterMoE and SonicMoE, with a prefix of histograms in place of their sort.
"""

# Triton's annotations (constexpr) are the compiler's view, not the caller's.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportReturnType=false

from typing import NamedTuple

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
    round_to_tf32,
    sum_partials,
)
from minimind_fast.kernels.route_plan import _balance_document_kernel, _route_plan_kernel

MAX_EXPERTS = 128  # a (tokens, experts) tile is held in registers
# Tokens per tile. 64 with few experts: 1024 programs at T = 65,536, several waves of a memory-bound kernel. 128 with
# many, forward only: the prefix over tiles costs tiles^2 E, and the backward would spill. 16, tl.dot's minimum, gives
# short inputs more than one program.
TILE_T_FEW, TILE_T_MANY, TILE_T_SHORT = 64, 128, 16
FEW_EXPERTS, SHORT_T = 16, 1024
# Columns of x a step: 256 bytes of a 16-bit row. Three stages of a 64 x 128 tile and of W's take 60 KB: three programs
# share an SM of 227 KB, and one fits in 99.
BLOCK_D, NUM_STAGES = 128, 3
# Rows of the histogram that the prefix reads a step.
BLOCK_ROWS = 64
# Programs that share dW's sum: about two an SM on the largest cards, each with its own float32 partial.
DW_PROGRAMS = 256


class Routing(NamedTuple):
    """Same fields as the reference's Routing; kernels may not import ops."""

    weights: Tensor  # (T, top_k) float32
    experts: Tensor  # (T, top_k) int32
    counts: Tensor  # (E,) int32
    order: Tensor  # (T * top_k,) int32
    inverse: Tensor  # (T * top_k,) int32
    aux_loss: Tensor  # () float32
    scores: Tensor  # (T, E) float32


def _launch_params(kernel: str, T: int, D: int, E: int, element_bytes: int) -> dict[str, int]:
    """Choose the tiles.

    Args:
        kernel: "fwd" (all its launches share BLOCK_T) or "bwd".
        T, D, E: tokens, columns, experts.
        element_bytes: bytes of one value of x.
    Returns:
        BLOCK_T, BLOCK_D, BLOCK_E (at least 16, for tl.dot), num_warps and num_stages, as keyword arguments.
    """
    block_e = max(16, next_power_of_2(E))
    block_t = TILE_T_SHORT if T <= SHORT_T else TILE_T_FEW
    if kernel == "fwd" and T > SHORT_T and E > FEW_EXPERTS:
        block_t = TILE_T_MANY
    block_d = max(16, min(BLOCK_D * 2 // element_bytes, next_power_of_2(D)))
    warps = 8 if block_t * block_e > 2048 else 4
    return {"BLOCK_T": block_t, "BLOCK_D": block_d, "BLOCK_E": block_e, "num_warps": warps, "num_stages": NUM_STAGES}


def _dw_splits(T: int, D: int, block_d: int) -> int:
    """How many splits of the tokens to use for dW: DW_PROGRAMS programs in all, at least 256 tokens a split."""
    return max(1, min(cdiv(DW_PROGRAMS, cdiv(D, block_d)), T // 256))


@triton.jit
def _route_fwd_kernel(
    x_ptr, gate_ptr, valid_ptr, scores_ptr, weights_ptr, experts_ptr, counts_ptr, load_ptr, mass_ptr, num_tokens,
    D: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr, NORMALIZE: tl.constexpr, HAS_VALID: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Score and choose for one tile of tokens; counts, load, mass: its (tiles, E) column sums."""
    wide: tl.constexpr = scores_ptr.dtype.element_ty
    pid = tl.program_id(0)
    t = pid * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    d = tl.arange(0, BLOCK_D)
    live_t, live_e = t < num_tokens, e < E
    x_at = x_ptr + t[:, None].to(tl.int64) * D + d[None, :]
    gate_at = gate_ptr + e[None, :] * D + d[:, None]
    logits = tl.zeros((BLOCK_T, BLOCK_E), dtype=wide)
    for start in range(0, D, BLOCK_D):
        live_d = d < D - start
        x = tl.load(x_at + start, mask=live_t[:, None] & live_d[None, :], other=0.0)
        gate = tl.load(gate_at + start, mask=live_d[:, None] & live_e[None, :], other=0.0)
        logits = tl.dot(x, gate, logits, input_precision="ieee", out_dtype=wide)

    logits = tl.where(live_e[None, :], logits, float("-inf"))
    scores = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    scores = scores / tl.sum(scores, axis=1)[:, None]
    slot_mask = live_t[:, None] & live_e[None, :]
    tl.store(scores_ptr + t[:, None].to(tl.int64) * E + e[None, :], scores, mask=slot_mask)

    # NaN counts as the largest, as in torch.topk: a diverged model still chooses valid experts.
    left = tl.where(scores == scores, scores, float("inf"))
    left = tl.where(live_e[None, :], left, -1.0)
    choice = tl.arange(0, BLOCK_K)[None, :]
    weights = tl.zeros((BLOCK_T, BLOCK_K), dtype=wide)
    experts = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.int32)
    chosen = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.int32)
    for j in range(TOP_K):
        best = tl.max(left, axis=1)
        expert = tl.min(tl.where(left == best[:, None], e[None, :], BLOCK_E), axis=1)
        hit = e[None, :] == expert[:, None]
        weights = tl.where(choice == j, tl.sum(tl.where(hit, scores, 0.0), axis=1)[:, None], weights)
        experts = tl.where(choice == j, expert[:, None], experts)
        chosen += hit.to(tl.int32)
        left = tl.where(hit, -1.0, left)
    if NORMALIZE:
        weights = weights / (tl.sum(weights, axis=1)[:, None] + 1e-20)
    slot_at = t[:, None].to(tl.int64) * TOP_K + choice
    tl.store(weights_ptr + slot_at, weights, mask=live_t[:, None] & (choice < TOP_K))
    tl.store(experts_ptr + slot_at, experts, mask=live_t[:, None] & (choice < TOP_K))

    chosen = tl.where(slot_mask, chosen, 0)
    at = pid * E + e
    tl.store(counts_ptr + at, tl.sum(chosen, axis=0), mask=live_e)
    counted = slot_mask
    if HAS_VALID:
        counted = counted & (tl.load(valid_ptr + t, mask=live_t, other=0) != 0)[:, None]
        tl.store(load_ptr + at, tl.sum(tl.where(counted, chosen, 0), axis=0), mask=live_e)
    tl.store(mass_ptr + at, tl.sum(tl.where(counted, scores, 0.0), axis=0), mask=live_e)


@triton.jit
def _route_bwd_kernel(
    d_weights_ptr, d_aux_ptr, d_scores_ptr, gate_ptr, scores_ptr, experts_ptr, slope_ptr, scale_ptr, cu_ptr, valid_ptr,
    d_logits_ptr, dx_ptr, num_tokens, num_documents, search_steps,
    D: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr, NORMALIZE: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    HAS_VALID: tl.constexpr, HAS_D_WEIGHTS: tl.constexpr, HAS_D_AUX: tl.constexpr, HAS_D_SCORES: tl.constexpr,
    WANT_DX: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """d-logits (T, E) of one tile of tokens, and its dx."""
    wide: tl.constexpr = scores_ptr.dtype.element_ty
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    live_t, live_e = t < num_tokens, e < E
    mask = live_t[:, None] & live_e[None, :]
    at = t[:, None].to(tl.int64) * E + e[None, :]
    slot = t.to(tl.int64) * TOP_K
    scores = tl.load(scores_ptr + at, mask=mask, other=0.0)
    d_scores = tl.zeros((BLOCK_T, BLOCK_E), dtype=wide)
    # A single normalised weight is always 1: its gradient is exactly zero.
    if HAS_D_WEIGHTS and not (NORMALIZE and TOP_K == 1):
        total = tl.zeros((BLOCK_T,), dtype=wide)
        dot = tl.zeros((BLOCK_T,), dtype=wide)
        for j in range(TOP_K):
            expert = tl.load(experts_ptr + slot + j, mask=live_t, other=-1)
            d_weight = tl.load(d_weights_ptr + slot + j, mask=live_t, other=0.0)
            hit = e[None, :] == expert[:, None]
            score = tl.sum(tl.where(hit, scores, 0.0), axis=1)
            total += score
            dot += score * d_weight
            d_scores += tl.where(hit, d_weight[:, None], 0.0)
        if NORMALIZE:
            total = tl.where(live_t, total + 1e-20, 1.0)
            chosen = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.int32)
            for j in range(TOP_K):
                expert = tl.load(experts_ptr + slot + j, mask=live_t, other=-1)
                chosen += (e[None, :] == expert[:, None]).to(tl.int32)
            d_scores = tl.where(chosen > 0, (d_scores - (dot / total)[:, None]) / total[:, None], 0.0)
    if HAS_D_AUX:
        slope_at = slope_ptr + e[None, :]
        if HAS_DOCUMENTS:  # a token's document is the number of ends at or before t, by bisection
            low = tl.zeros((BLOCK_T,), dtype=tl.int32)
            high = low + (num_documents - 1)
            for _ in range(search_steps):
                middle = (low + high) // 2
                beyond = tl.load(cu_ptr + middle + 1).to(tl.int32) <= t
                low = tl.where(beyond, tl.minimum(middle + 1, high), low)
                high = tl.where(beyond, high, middle)
            slope_at += low[:, None].to(tl.int64) * E
        counted = mask
        if HAS_VALID:
            counted = counted & (tl.load(valid_ptr + t, mask=live_t, other=0) != 0)[:, None]
        d_aux = tl.load(d_aux_ptr) * tl.load(scale_ptr)
        d_scores += d_aux * tl.load(slope_at + tl.zeros((BLOCK_T, 1), dtype=tl.int32), mask=counted, other=0.0)
    if HAS_D_SCORES:
        d_scores += tl.load(d_scores_ptr + at, mask=mask, other=0.0)
    d_logits = scores * (d_scores - tl.sum(scores * d_scores, axis=1)[:, None])
    tl.store(d_logits_ptr + at, d_logits, mask=mask)
    if PRECISION == "tf32":
        d_logits = round_to_tf32(d_logits)
    if WANT_DX:
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            gate = tl.load(gate_ptr + e[:, None] * D + d[None, :], mask=live_e[:, None] & (d < D)[None, :], other=0.0)
            dx = tl.dot(d_logits, gate.to(wide), input_precision=PRECISION, out_dtype=wide)
            dx_at = dx_ptr + t[:, None].to(tl.int64) * D + d[None, :]
            tl.store(dx_at, dx.to(dx_ptr.dtype.element_ty), mask=live_t[:, None] & (d < D)[None, :])


@triton.jit
def _route_dw_kernel(
    d_logits_ptr, x_ptr, partial_ptr, num_tokens, tokens_each,
    D: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """partial[split] (E, D): dz^T x over one split of the tokens."""
    wide: tl.constexpr = d_logits_ptr.dtype.element_ty
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(1)
    e = tl.arange(0, BLOCK_E)
    live_e, live_d = e < E, d < D
    acc = tl.zeros((BLOCK_E, BLOCK_D), dtype=wide)
    end = tl.minimum((split + 1) * tokens_each, num_tokens)
    for start in range(split * tokens_each, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        row = t.to(tl.int64)
        d_logits = tl.load(
            d_logits_ptr + row[:, None] * E + e[None, :], mask=(t < end)[:, None] & live_e[None, :], other=0.0
        )
        x = tl.load(x_ptr + row[:, None] * D + d[None, :], mask=(t < end)[:, None] & live_d[None, :], other=0.0)
        if PRECISION == "tf32":
            d_logits = round_to_tf32(d_logits)
        acc = tl.dot(tl.trans(d_logits), x.to(wide), acc, input_precision=PRECISION, out_dtype=wide)
    at = (split.to(tl.int64) * E + e[:, None]) * D + d[None, :]
    tl.store(partial_ptr + at, acc, mask=live_e[:, None] & live_d[None, :])


def _num_documents(cu_seqlens: Tensor | None) -> int:
    return 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _empty_results(x: Tensor, E: int, top_k: int, documents: int) -> tuple[Tensor, ...]:
    """weights, experts, counts, order, inverse, aux_loss, scores; slope (documents, E), scale () for the backward."""
    T, wide = x.shape[0], accum_dtype(x)
    return (
        x.new_empty((T, top_k), dtype=wide),
        x.new_empty((T, top_k), dtype=torch.int32),
        x.new_empty((E,), dtype=torch.int32),
        x.new_empty((T * top_k,), dtype=torch.int32),
        x.new_empty((T * top_k,), dtype=torch.int32),
        x.new_empty((), dtype=wide),
        x.new_empty((T, E), dtype=wide),
        x.new_empty((documents, E), dtype=wide),
        x.new_empty((), dtype=wide),
    )


_Nine = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@as_op("minimind_fast::moe_route_fwd")
def _route_fwd(
    x: Tensor, gate_weight: Tensor, top_k: int, normalize: bool, cu_seqlens: Tensor | None, valid: Tensor | None
) -> _Nine:
    """-> the fields of Routing, slope, scale."""
    T, D = x.shape
    E, documents = gate_weight.shape[0], _num_documents(cu_seqlens)
    results = _empty_results(x, E, top_k, documents)
    weights, experts, counts, order, inverse, aux_loss, scores, slope, scale = results
    if T == 0:
        for t in (counts, aux_loss, slope, scale):
            t.zero_()
        return weights, experts, counts, order, inverse, aux_loss, scores, slope, scale
    x, gate_weight = x.contiguous(), gate_weight.contiguous()
    params = _launch_params("fwd", T, D, E, x.element_size())
    warps = {"num_warps": params["num_warps"]}
    tile = {"BLOCK_T": params["BLOCK_T"], "BLOCK_E": params["BLOCK_E"]}
    tiles = cdiv(T, tile["BLOCK_T"])
    tile_counts = x.new_empty((tiles, E), dtype=torch.int32)
    tile_load = tile_counts if valid is None else torch.empty_like(tile_counts)
    tile_mass = x.new_empty((tiles, E), dtype=scores.dtype)
    valid_bytes = tile_counts if valid is None else valid.contiguous().view(torch.uint8)
    loss, length = tile_mass, tile_counts  # placeholders without documents
    with torch.cuda.device_of(x):
        _route_fwd_kernel[(tiles,)](
            x, gate_weight, valid_bytes, scores, weights, experts, tile_counts, tile_load, tile_mass, T,
            D, E, top_k, normalize, valid is not None, **params, BLOCK_K=next_power_of_2(top_k),
        )  # fmt: skip
        if cu_seqlens is not None and documents > 0:
            cu_seqlens = cu_seqlens.contiguous()
            loss, length = torch.empty_like(slope[:, 0]), x.new_empty((documents,), dtype=torch.int32)
            _balance_document_kernel[(documents,)](
                cu_seqlens, valid_bytes, scores, experts, loss, length, slope, T, E, top_k, valid is not None,
                **tile, **warps,
            )  # fmt: skip
        _route_plan_kernel[(tiles,)](
            experts, tile_counts, tile_load, tile_mass, loss, length,
            counts, order, inverse, aux_loss, scale, slope, T, tiles, documents,
            E, top_k, cu_seqlens is not None, **tile, BLOCK_ROWS=BLOCK_ROWS, **warps,
        )  # fmt: skip
    return weights, experts, counts, order, inverse, aux_loss, scores, slope, scale


@_route_fwd.register_fake
def _(x, gate_weight, top_k, normalize, cu_seqlens, valid):
    return _empty_results(x, gate_weight.shape[0], top_k, _num_documents(cu_seqlens))


@as_op("minimind_fast::moe_route_bwd")
def _route_bwd(
    d_weights: Tensor | None,
    d_aux: Tensor | None,
    d_scores: Tensor | None,
    x: Tensor,
    gate_weight: Tensor,
    experts: Tensor,
    scores: Tensor,
    slope: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor | None,
    valid: Tensor | None,
    normalize: bool,
    want_dx: bool,
    want_dw: bool,
) -> tuple[Tensor, Tensor]:
    """-> dx, d_gate_weight, each empty where not wanted."""
    T, D = x.shape
    E, documents = gate_weight.shape[0], _num_documents(cu_seqlens)
    dx, dw = x.new_empty(x.shape if want_dx else 0), gate_weight.new_empty(gate_weight.shape if want_dw else 0)
    if T == 0:
        return dx, dw.zero_()
    x, gate_weight = x.contiguous(), gate_weight.contiguous()
    params = _launch_params("bwd", T, D, E, x.element_size())
    # float32 needs every bit. A 16-bit operand is exact in tf32; dz is rounded to tf32's 10 bits of mantissa.
    precision = "tf32" if x.element_size() == 2 else "ieee"
    d_logits = torch.empty_like(scores)

    def given(grad: Tensor | None) -> Tensor:
        return scores if grad is None else grad.contiguous()

    with torch.cuda.device_of(x):
        _route_bwd_kernel[(cdiv(T, params["BLOCK_T"]),)](
            given(d_weights), given(d_aux), given(d_scores), gate_weight, scores, experts, slope, scale,
            experts if cu_seqlens is None else cu_seqlens.contiguous(),
            experts if valid is None else valid.contiguous().view(torch.uint8),
            d_logits, dx, T, documents, documents.bit_length(),
            D, E, experts.shape[1], normalize, cu_seqlens is not None, valid is not None,
            d_weights is not None, d_aux is not None, d_scores is not None, want_dx, precision, **params,
        )  # fmt: skip
        if want_dw:
            splits = _dw_splits(T, D, params["BLOCK_D"])
            partial = scores.new_empty((splits, E, D))
            tokens_each = cdiv(T, splits)
            _route_dw_kernel[(cdiv(D, params["BLOCK_D"]), splits)](
                d_logits, x, partial, T, tokens_each, D, E, precision, **params
            )
            sum_partials(partial, dw)
    return dx, dw


@_route_bwd.register_fake
def _(d_weights, d_aux, d_scores, x, gate_weight, experts, scores, slope, scale, cu_seqlens, valid, normalize,
      want_dx, want_dw):  # fmt: skip
    return x.new_empty(x.shape if want_dx else 0), gate_weight.new_empty(gate_weight.shape if want_dw else 0)


def _save(ctx, inputs, output):
    x, gate_weight, _, ctx.normalize, cu_seqlens, valid = inputs
    _, experts, _, _, _, _, scores, slope, scale = output
    ctx.save_for_backward(x, gate_weight, experts, scores, slope, scale, cu_seqlens, valid)
    ctx.set_materialize_grads(False)


def _backward(ctx, d_weights, d_experts, d_counts, d_order, d_inverse, d_aux, d_scores, d_slope, d_scale):
    want_dx, want_dw = ctx.needs_input_grad[:2]
    if d_weights is None and d_aux is None and d_scores is None:
        return (None,) * 6
    dx, dw = _route_bwd(d_weights, d_aux, d_scores, *ctx.saved_tensors, ctx.normalize, want_dx, want_dw)
    return dx if want_dx else None, dw if want_dw else None, None, None, None, None


_route_fwd.register_autograd(_backward, setup_context=_save)
refuse_second_derivative(_route_bwd, "moe_route")


def moe_route(
    x: Tensor,
    gate_weight: Tensor,
    top_k: int,
    normalize: bool,
    cu_seqlens: Tensor | None = None,
    valid: Tensor | None = None,
) -> Routing:
    """Score the experts for each token, choose the best ones and plan the dispatch.

    Args:
        x: (T, D) float32, bfloat16 or float16 (float64 in the interpreter only); copied if not contiguous.
        gate_weight: (E, D) in x's dtype, E up to 128.
        top_k: experts a token.
        normalize: divide the chosen scores by their sum.
        cu_seqlens: (documents + 1,) int32 or int64: the aux loss is a mean over documents; None: one over the batch.
        valid: (T,) bool; False for padding, which the aux loss and its averages leave out.
    Returns:
        Routing; `weights`, `aux_loss` and `scores` carry gradients to x and gate_weight.
    Raises:
        ValueError: mismatched shapes or dtypes, top_k outside 1..E, or E above 128.
        RuntimeError: a second derivative is requested.
    Source: Shazeer et al., 2017 (sparsely gated experts); Fedus et al., Switch Transformers, 2021 (balancing loss).
    """
    if x.dim() != 2 or gate_weight.dim() != 2 or gate_weight.shape[1] != x.shape[1] or x.dtype != gate_weight.dtype:
        raise ValueError(
            f"moe_route needs x (T, D) and gate_weight (E, D) of one dtype, got {tuple(x.shape)} {x.dtype} "
            f"and {tuple(gate_weight.shape)} {gate_weight.dtype}."
        )
    if not x.is_floating_point() or (x.is_cuda and x.dtype == torch.float64):
        raise ValueError(
            f"moe_route's kernel needs floating-point tokens, float64 in the interpreter only; got {x.dtype}."
        )
    if not 1 <= gate_weight.shape[0] <= MAX_EXPERTS or not 1 <= top_k <= gate_weight.shape[0]:
        raise ValueError(
            f"moe_route's kernel takes 1 to {MAX_EXPERTS} experts and top_k from 1 to their number, "
            f"got {gate_weight.shape[0]} and top_k {top_k}."
        )
    if x.shape[0] * top_k >= 2**31:
        raise ValueError(f"moe_route numbers its slots in 32 bits; {x.shape[0]} tokens x top_k {top_k} are too many.")
    if valid is not None and (valid.shape != x.shape[:1] or valid.dtype != torch.bool):
        raise ValueError(f"moe_route needs valid as (T,) bool, got {tuple(valid.shape)} {valid.dtype}.")
    if cu_seqlens is not None and (cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2):
        raise ValueError(f"moe_route needs cu_seqlens (documents + 1,), got {tuple(cu_seqlens.shape)}.")
    return Routing(*_route_fwd(x, gate_weight, top_k, normalize, cu_seqlens, valid)[:7])
