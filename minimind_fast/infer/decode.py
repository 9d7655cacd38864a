"""The KV cache: prefill, and decoding one token per row.

Purpose: `Decoder.prefill(prompts)` and `Decoder.step(ids)` return the logits of each row's next token.
Principle: the model delegates attention to a context object, so it need not know the cache. Two contexts also store keys
    and values: `Prefill` for packed prompts from position 0, `Extend` for the next n tokens of every row. `Extend` treats
    the H / K query heads of a kv head as extra queries, so kv heads are read once and never repeated.
Properties: rows are left-aligned in the cache, each with its own length; slots beyond it are masked, and overwritten later.

Shapes: B rows, T tokens, S slots, n tokens a row, H query heads, K kv heads, hd head_dim, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind_fast import ops
from minimind_fast.errors import UserError
from minimind_fast.infer.decode_cpu import CpuStep, Packs
from minimind_fast.model import Attention, MiniMind, Packed
from minimind_fast.ops.documents import Documents, size_for

Step = Callable[[Tensor, Tensor, int, bool], Tensor]  # (ids, positions, used slots, all rows equally long) -> logits
# Graphs are captured for this many visible slots, and for twice as many whenever rows outgrow them; likewise for rows.
_GRAPH_SLOTS = 256
_GRAPH_ROWS = 8  # fewer rows than this decode no faster: weights, not rows, are what a step reads


class Prefill(NamedTuple):
    """Packed prompts from position 0: attention as in training; keys and values are stored."""

    cache: Tensor  # (L, B, 2K, S, hd)
    rows: Tensor  # (T,), without filler
    positions: Tensor  # (T,)
    packed: Packed

    def attend(self, asker: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(T, H, hd), (T, K, hd), (T, K, hd) -> (T, H, hd)."""
        self.cache[asker.layer][self.rows, :, self.positions] = torch.cat([k, v], -2)[: len(self.rows)]
        return self.packed.attend(asker, q, k, v)


class Extend(NamedTuple):
    """n more tokens in each of R rows, each attending to its own row up to itself."""

    cache: Tensor  # (L, R, 2K, S, hd), only the visible slots
    rows: Tensor  # (R, n) 0 .. R - 1
    positions: Tensor  # (R, n)
    mask: Tensor | None  # (R, 1, n, S) bool; None if all is visible

    def attend(self, asker: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(R n, H, hd), (R n, K, hd), (R n, K, hd) -> (R n, H, hd)."""
        shape = self.positions.shape
        self.cache[asker.layer][self.rows, :, self.positions] = torch.cat([k, v], -2).unflatten(0, shape)
        keys, values = self.cache[asker.layer].chunk(2, dim=1)
        groups = q.shape[1] // k.shape[1]
        grouped = q.view(*shape, k.shape[1], groups, -1).permute(0, 2, 3, 1, 4).flatten(2, 3)  # (R, K, G n, hd)
        mask = self.mask if self.mask is None or shape[1] == 1 else self.mask.repeat(1, 1, groups, 1)
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
        return out.unflatten(2, (groups, shape[1])).permute(0, 3, 1, 2, 4).reshape(q.shape)


def new_cache(model: MiniMind, rows: int, slots: int) -> Tensor:
    """An empty KV cache of B rows and S slots, in the model's dtype and on its device.

    Returns:
        (L, B, 2K, S, hd): a layer's keys and values are adjacent, so one write stores both.
    """
    config, weight = model.config, model.model.embed_tokens.weight
    assert config.head_dim is not None
    shape = (config.num_hidden_layers, rows, 2 * config.num_key_value_heads, slots, config.head_dim)
    # Not `empty`: a masked slot has weight 0, and 0 * NaN is NaN.
    return torch.zeros(shape, dtype=weight.dtype, device=weight.device)


class Decoder:
    """One batch in flight.

    Args:
        model: in evaluation mode.
        rows: B.
        slots: S, the maximum tokens per row.
        cache: (L, B, 2K, S, hd) to use, such as a view of a larger one; None: a new one.
        packs: the model's weights in CPU layout; the model must not be trained meanwhile.
        graphs: steps over the first rows of this cache, by the number of rows; new ones are added.
    """

    def __init__(
        self,
        model: MiniMind,
        rows: int,
        slots: int,
        cache: Tensor | None = None,
        packs: Packs | None = None,
        graphs: dict[int, GraphStep] | None = None,
    ) -> None:
        self.model = model
        self.cache = new_cache(model, rows, slots) if cache is None else cache
        self.device, self.dtype = self.cache.device, self.cache.dtype
        self.lengths = [0] * rows  # on the host: no device synchronisation
        self.positions = torch.zeros(rows, dtype=torch.int64, device=self.device)  # the same on the device
        self._fast: Step | None = None
        self._packs = packs
        self._graphs = {} if graphs is None else graphs

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], chunk: int | None = None) -> Tensor:
        """Run the prompts.

        Args:
            prompts: B lists of at least one token id.
            chunk: tokens per row and forward pass; None: all at once.

        Returns:
            (B, V) logits of the token after each prompt.

        Raises:
            ValueError: chunk is below 1.
        """
        if chunk is not None and chunk < 1:
            raise UserError(f"prefill_chunk must be at least 1, not {chunk}")
        lengths = [len(p) for p in prompts]
        longest = max(lengths)
        chunk = min(chunk or longest, longest)
        hidden = self._run_packed([list(p[:chunk]) for p in prompts])
        for begin in range(chunk, longest, chunk):
            rows = [r for r, n in enumerate(lengths) if n > begin]
            pieces = [list(prompts[r][begin : begin + chunk]) for r in rows]
            hidden[rows] = self._run_rectangle(rows, pieces, begin)
        self.lengths = lengths
        self.positions = torch.tensor(lengths, device=self.device)
        return self.model.lm_head(hidden).logits

    @torch.inference_mode()
    def prefill_piece(self, pieces: Sequence[Sequence[int]], begin: int = 0) -> Tensor:
        """Run the next piece of every row's prompt, for callers that interleave other work.

        Args:
            pieces: B lists of at least one token id.
            begin: tokens per row already in the cache.

        Returns:
            (B, V) logits of the token after each piece.
        """
        rows = [list(p) for p in pieces]
        hidden = self._run_rectangle(list(range(len(rows))), rows, begin) if begin else self._run_packed(rows)
        return self.model.lm_head(hidden).logits

    def _run_packed(self, prompts: list[list[int]]) -> Tensor:
        """Last hidden state of each row, (B, D)."""
        counts = torch.tensor([len(p) for p in prompts])
        ends = counts.cumsum(0)
        bounds = F.pad(ends, (1, 0)).to(self.device, torch.int32)
        ids = torch.tensor([i for p in prompts for i in p], device=self.device)
        size = size_for(self.model, len(ids))
        documents = Documents.of(bounds, len(ids), self.dtype, int(counts.max()), size)
        rows = torch.repeat_interleave(torch.arange(len(prompts)), counts).to(self.device)
        context = Prefill(self.cache, rows, documents.positions[: len(ids)], Packed(documents))
        whole = (documents.fill_ids(ids), documents.positions, context, documents.cu_seqlens)
        hidden, _ = self.model.model(*whole)
        return hidden[(ends - 1).to(self.device)]

    def _run_rectangle(self, rows: list[int], pieces: list[list[int]], begin: int) -> Tensor:
        """Run the next tokens of some rows, all from position `begin`; shorter pieces repeat their last token.

        The repeats land in the cache beyond the row's end: masked, and overwritten by later steps.
        """
        n = max(map(len, pieces))
        ids = torch.tensor([p + p[-1:] * (n - len(p)) for p in pieces], device=self.device)
        positions = torch.arange(begin, begin + n, device=self.device).expand(len(rows), n)
        some = len(rows) < self.cache.shape[1]
        cache = self.cache[:, rows] if some else self.cache
        slots = torch.arange(begin + n, device=self.device)
        mask = (slots <= positions.unsqueeze(-1)).unsqueeze(1)
        hidden = _extend(self.model, ids, positions, cache[..., : begin + n, :], mask)
        if some:
            self.cache[:, rows] = cache
        last = torch.tensor([len(p) - 1 for p in pieces], device=self.device)
        return hidden.unflatten(0, ids.shape)[torch.arange(len(rows), device=self.device), last]

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """Run one token per row.

        Args:
            ids: (B,) int64.

        Returns:
            (B, V) logits of the next token.
        """
        used = max(self.lengths) + 1
        if self._fast is None:
            self._fast = self._make_fast()
        logits = self._fast(ids, self.positions, used, min(self.lengths) + 1 == used)
        self.lengths = [n + 1 for n in self.lengths]
        self.positions = self.positions + 1
        return logits

    def _make_fast(self) -> Step:
        # A step references the cache, not this object: a reference cycle would pin gigabytes until the next gc run.
        if captures(self.model):
            rows = self.cache.shape[1]
            if rows not in self._graphs:
                pool = next((step.pool for step in self._graphs.values()), None)
                self._graphs[rows] = GraphStep(self.model, self.cache, pool)
            return self._graphs[rows]
        if self.device.type == "cpu":
            return CpuStep(self.model, self.cache, self._packs)
        return PlainStep(self.model, self.cache)

    def rows_for(self, live: int, rows: int) -> int:
        """How many rows to go on with: dropping finished ones costs a copy of the cache, and with graphs a capture.

        A capture synchronises and takes as long as some tens of steps, so with graphs the number is a power of two and at
        least 8: a batch of B rows has at most log2(B / 8) + 1 numbers on the way, and the next batch the same ones.

        Args:
            live: rows that go on.
            rows: rows in the cache.
        """
        if captures(self.model):
            return min(rows, max(_GRAPH_ROWS, 1 << (live - 1).bit_length()))
        return live if 4 * (rows - live) >= rows else rows

    @torch.inference_mode()
    def keep(self, rows: list[int], ids: Tensor) -> Tensor:
        """Drop all rows but the given ones.

        Args:
            rows: indices to keep.
            ids: (B,) tokens about to be run.

        Returns:
            The ids of the kept rows.
        """
        kept = self.cache[:, rows]
        # Graphs hold addresses: kept rows move to the front of the cache.
        self.cache = self.cache[:, : len(rows)].copy_(kept) if captures(self.model) else kept
        self._fast = None
        self.lengths = [self.lengths[r] for r in rows]
        self.positions = self.positions[rows]
        return ids[rows]


class Workspace:
    """On a GPU, a KV cache and its graphs for one batch after another: a later one captures nothing that an earlier one did.

    Args:
        model: its weights may change between batches; if they move, graphs are captured anew.
        rows: of the largest batch.
        slots: of the longest.
    """

    def __init__(self, model: MiniMind, rows: int, slots: int) -> None:
        self.model, self.rows, self.slots = model, rows, slots
        self._cache: Tensor | None = None
        self._graphs: dict[int, GraphStep] = {}
        self._addresses: list[int] = []

    def decoder(self, rows: int, slots: int) -> Decoder:
        """A decoder for a new batch; the one before is done.

        Args:
            rows: B.
            slots: tokens per row, at most.
        """
        assert rows <= self.rows and slots <= self.slots
        if not captures(self.model):
            return Decoder(self.model, rows, slots)
        addresses = [p.data_ptr() for p in self.model.parameters()]
        if self._cache is None or addresses != self._addresses:
            self._cache, self._addresses, self._graphs = None, addresses, {}
            self._cache = new_cache(self.model, self.rows, self.slots)
        self._cache.zero_()  # a NaN of the last batch would count even where it is masked
        return Decoder(self.model, rows, slots, self._cache[:, :rows], graphs=self._graphs)


def _extend(model: MiniMind, ids: Tensor, positions: Tensor, cache: Tensor, mask: Tensor | None) -> Tensor:
    """Hidden states (R n, D) of n more tokens (R, n) in each of R rows."""
    rows = torch.arange(ids.shape[0], device=ids.device).unsqueeze(1).expand_as(ids)
    cu = torch.arange(ids.shape[0] + 1, device=ids.device, dtype=torch.int32) * ids.shape[1]
    return model.model(ids.flatten(), positions.flatten(), Extend(cache, rows, positions, mask), cu)[0]


class PlainStep:
    """One token per row through the model itself; tests compare the faster steps with it.

    Args:
        model: in evaluation mode.
        cache: (L, B, 2K, S, hd).
    """

    def __init__(self, model: MiniMind, cache: Tensor) -> None:
        self.model, self.cache = model, cache

    def __call__(self, ids: Tensor, positions: Tensor, used: int, level: bool) -> Tensor:
        """Run one step.

        Args:
            ids: (B,) tokens.
            positions: (B,) their positions.
            used: slots in use, including these tokens.
            level: all rows have the same length.

        Returns:
            (B, V) logits.
        """
        mask = None if level else (torch.arange(used, device=ids.device) <= positions.unsqueeze(1))[:, None, None]
        hidden = _extend(self.model, ids.unsqueeze(1), positions.unsqueeze(1), self.cache[..., :used, :], mask)
        return self.model.lm_head(hidden).logits


def can_capture(model: MiniMind) -> bool:
    """Whether a decode step runs without host synchronisation: all do but those with the reference MoE ops."""
    found = ops.describe("cuda") if model.config.use_moe else {}
    return all(how.startswith("kernel") for op, how in found.items() if op in ("moe_route", "moe_mlp"))


def captures(model: MiniMind) -> bool:
    """Whether decode steps become CUDA graphs."""
    return model.model.embed_tokens.weight.device.type == "cuda" and can_capture(model)


def graph_slots(used: int, all_slots: int) -> int:
    """Slots that a graph covers: the least doubling of 256 that holds those in use, at most the cache's."""
    slots = _GRAPH_SLOTS
    while slots < used:
        slots *= 2
    return min(slots, all_slots)


class GraphStep:
    """`PlainStep` as CUDA graphs: one launch per token instead of some hundred.

    A graph has fixed shapes, so it covers more slots than are used, the others masked; one with twice as many is captured
    when the rows outgrow it. All share one memory pool.

    Args:
        model: in evaluation mode.
        cache: (L, B, 2K, S, hd); must not move, since graphs hold its address.
        pool: that of other steps, which take turns with this one; None: a new one.
    """

    def __init__(self, model: MiniMind, cache: Tensor, pool: Any = None) -> None:
        self.plain = PlainStep(model, cache)
        self.ids, self.positions = torch.zeros(2, cache.shape[1], dtype=torch.int64, device=cache.device)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}  # slots -> graph, its logits
        self.pool = torch.cuda.graph_pool_handle() if pool is None else pool

    def __call__(self, ids: Tensor, positions: Tensor, used: int, level: bool) -> Tensor:
        self.ids.copy_(ids)
        self.positions.copy_(positions)
        slots = graph_slots(used, self.plain.cache.shape[-2])
        if slots not in self.graphs:
            with torch.cuda.device(self.ids.device):  # a new stream belongs to the current device, which may differ
                self.graphs[slots] = self._capture(slots)
        graph, logits = self.graphs[slots]
        graph.replay()
        return logits.clone()  # the next replay overwrites this buffer

    def _capture(self, slots: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # Warm-up outside the capture compiles and selects kernels. It writes the same values to the same slots as the
        # replay.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.plain(self.ids, self.positions, slots, False)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            logits = self.plain(self.ids, self.positions, slots, False)
        return graph, logits
