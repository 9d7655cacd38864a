"""From the tokens' chosen experts to the order of their slots, and the balancing loss.

Purpose:    the second half of moe_route's forward.
Principle:  tiles of tokens have written how many of their slots each expert has (a histogram). Every tile sums those
            before it (a prefix) and places its own slots: the stable order and its inverse.
            aux = mean over documents of E sum_e f_e P_e,  f_e = share of the slots, P_e = mean of s_e
Properties: the prefix reads tiles^2 E counts from L2. Counts are integers and float sums have a fixed order: two runs
            agree bitwise.

Shapes: T tokens, E experts; a slot is one (token, choice) pair, numbered t * top_k + j.
Source: index inversion for few experts after ScatterMoE and SonicMoE, with a prefix of histograms in place of their sort.
"""

# Triton's annotations (constexpr) are the compiler's view, not the caller's.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportReturnType=false

import triton
import triton.language as tl


@triton.jit
def _balance(load, mass, E: tl.constexpr, TOP_K: tl.constexpr, wide: tl.constexpr):
    """-> one document's E sum_e f_e P_e, its derivative by one token's s_e, and its number of tokens."""
    length = tl.sum(load, axis=0) // TOP_K
    tokens = tl.maximum(length, 1).to(wide)
    share = load.to(wide) / (tokens * TOP_K)
    return E * tl.sum(share * (mass / tokens), axis=0), E * share / tokens, length


@triton.jit
def _balance_document_kernel(
    cu_ptr, valid_ptr, scores_ptr, experts_ptr, loss_ptr, length_ptr, slope_ptr, num_tokens,
    E: tl.constexpr, TOP_K: tl.constexpr, HAS_VALID: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Balancing loss of one document; tokens outside all documents join the first or the last, as in eager."""
    wide: tl.constexpr = scores_ptr.dtype.element_ty
    document = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    first = tl.load(cu_ptr + document).to(tl.int32)
    end = tl.load(cu_ptr + document + 1).to(tl.int32)
    first = tl.where(document == 0, 0, first)
    end = tl.where(document == tl.num_programs(0) - 1, num_tokens, end)
    load = tl.zeros((BLOCK_E,), dtype=tl.int32)
    mass = tl.zeros((BLOCK_E,), dtype=wide)
    for start in range(first, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        counted = t < end
        if HAS_VALID:
            counted = counted & (tl.load(valid_ptr + t, mask=counted, other=0) != 0)
        mask = counted[:, None] & (e < E)[None, :]
        mass += tl.sum(tl.load(scores_ptr + t[:, None].to(tl.int64) * E + e[None, :], mask=mask, other=0.0), axis=0)
        for j in range(TOP_K):
            expert = tl.load(experts_ptr + t.to(tl.int64) * TOP_K + j, mask=counted, other=-1)
            load += tl.sum((e[None, :] == expert[:, None]).to(tl.int32), axis=0)
    loss, slope, length = _balance(load, mass, E, TOP_K, wide)
    tl.store(loss_ptr + document, loss)
    tl.store(length_ptr + document, length)
    tl.store(slope_ptr + document.to(tl.int64) * E + e, slope, mask=e < E)


@triton.jit
def _route_plan_kernel(
    experts_ptr, tile_counts_ptr, load_ptr, mass_ptr, loss_ptr, length_ptr,
    counts_ptr, order_ptr, inverse_ptr, aux_ptr, scale_ptr, slope_ptr, num_tokens, num_tiles, num_documents,
    E: tl.constexpr, TOP_K: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Place the slots of one tile; the first program also writes the counts and the balancing loss."""
    wide: tl.constexpr = mass_ptr.dtype.element_ty
    pid = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    live_e = e < E
    before = tl.zeros((BLOCK_E,), dtype=tl.int32)
    total = tl.zeros((BLOCK_E,), dtype=tl.int32)
    for start in range(0, num_tiles, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        mask = (row < num_tiles)[:, None] & live_e[None, :]
        counts = tl.load(tile_counts_ptr + row[:, None] * E + e[None, :], mask=mask, other=0)
        total += tl.sum(counts, axis=0)
        before += tl.sum(tl.where((row < pid)[:, None], counts, 0), axis=0)
    base = tl.cumsum(total, axis=0) - total + before

    t = pid * BLOCK_T + tl.arange(0, BLOCK_T)
    live_t = t < num_tokens
    slot = t * TOP_K
    chosen = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.int32)
    for j in range(TOP_K):
        expert = tl.load(experts_ptr + slot + j, mask=live_t, other=-1)
        chosen += (e[None, :] == expert[:, None]).to(tl.int32)
    place = base[None, :] + tl.cumsum(chosen, axis=0) - chosen
    for j in range(TOP_K):
        expert = tl.load(experts_ptr + slot + j, mask=live_t, other=-1)
        position = tl.sum(tl.where(e[None, :] == expert[:, None], place, 0), axis=1)
        tl.store(inverse_ptr + slot + j, position, mask=live_t)
        tl.store(order_ptr + position, slot + j, mask=live_t)

    if pid == 0:
        tl.store(counts_ptr + e, total, mask=live_e)
        if HAS_DOCUMENTS:
            loss = tl.zeros((BLOCK_ROWS,), dtype=wide)
            documents = tl.zeros((BLOCK_ROWS,), dtype=tl.int32)
            for start in range(0, num_documents, BLOCK_ROWS):
                row = start + tl.arange(0, BLOCK_ROWS)
                loss += tl.load(loss_ptr + row, mask=row < num_documents, other=0.0)
                length = tl.load(length_ptr + row, mask=row < num_documents, other=0)
                documents += (length > 0).to(tl.int32)
            scale = 1.0 / tl.maximum(tl.sum(documents, axis=0), 1).to(wide)
            tl.store(aux_ptr, tl.sum(loss, axis=0) * scale)
            tl.store(scale_ptr, scale)
        else:
            load = tl.zeros((BLOCK_E,), dtype=tl.int32)
            mass = tl.zeros((BLOCK_E,), dtype=wide)
            for start in range(0, num_tiles, BLOCK_ROWS):
                row = start + tl.arange(0, BLOCK_ROWS)
                mask = (row < num_tiles)[:, None] & live_e[None, :]
                load += tl.sum(tl.load(load_ptr + row[:, None] * E + e[None, :], mask=mask, other=0), axis=0)
                mass += tl.sum(tl.load(mass_ptr + row[:, None] * E + e[None, :], mask=mask, other=0.0), axis=0)
            loss, slope, _ = _balance(load, mass, E, TOP_K, wide)
            tl.store(aux_ptr, loss)
            tl.store(scale_ptr, 1.0)
            tl.store(slope_ptr + e, slope, mask=live_e)
