"""The KV cache, and how a model that knows nothing of it runs against it: prefill and one token a row.

Purpose: `Decoder.prefill(prompts)` and `Decoder.step(ids)` give the logits of each row's next token.
Principle: the model asks a context object to attend. Here two of them also keep keys and values: `Prefill` for packed
    prompts from position 0, `Extend` for the same number of further tokens in every row. In `Extend` the H / K query
    heads of a kv head are laid out as further queries, so that kv heads are read once and never repeated.
Properties: rows lie at the cache's left end, each with its own length; what lies beyond is masked, and overwritten later.

Shapes: B rows, T tokens, S slots, n tokens a row, H query heads, K kv heads, hd head_dim, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind_fast.attention import Rectangles, resolve
from minimind_fast.model import MiniMind, Packed


class Prefill(NamedTuple):
    """Packed prompts from position 0: attention as in training, keys and values kept."""

    cache: Tensor  # (L, 2, B, K, S, hd)
    rows: Tensor  # (T,)
    positions: Tensor  # (T,)
    packed: Packed

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(T, H, hd), (T, K, hd), (T, K, hd) -> (T, H, hd)."""
        keys, values = self.cache[layer]
        keys[self.rows, :, self.positions] = k
        values[self.rows, :, self.positions] = v
        return self.packed.attend(layer, q, k, v)


class Extend(NamedTuple):
    """n further tokens in each of R rows, each seeing its own row up to itself."""

    cache: Tensor  # (L, 2, R, K, S, hd), the slots that anybody may see
    rows: Tensor  # (R, n) 0 .. R - 1
    positions: Tensor  # (R, n)
    mask: Tensor | None  # (R, 1, n, S) bool; None if all is visible

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(R n, H, hd), (R n, K, hd), (R n, K, hd) -> (R n, H, hd)."""
        keys, values = self.cache[layer]
        shape = self.positions.shape
        keys[self.rows, :, self.positions] = k.unflatten(0, shape)
        values[self.rows, :, self.positions] = v.unflatten(0, shape)
        groups = q.shape[1] // k.shape[1]
        grouped = q.view(*shape, k.shape[1], groups, -1).permute(0, 2, 3, 1, 4).flatten(2, 3)  # (R, K, G n, hd)
        mask = self.mask if self.mask is None or shape[1] == 1 else self.mask.repeat(1, 1, groups, 1)
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
        return out.unflatten(2, (groups, shape[1])).permute(0, 3, 1, 2, 4).reshape(q.shape)


class Decoder:
    """One batch in flight.

    Args:
        model: in evaluation mode.
        rows: B.
        slots: S, the most tokens that a row will have.
    """

    def __init__(self, model: MiniMind, rows: int, slots: int) -> None:
        config, weight = model.config, model.model.embed_tokens.weight
        self.model, self.device, self.dtype = model, weight.device, weight.dtype
        assert config.head_dim is not None
        shape = (config.num_hidden_layers, 2, rows, config.num_key_value_heads, slots, config.head_dim)
        # Zeros, not empty: a masked slot has weight 0, and 0 times a stray NaN would be NaN.
        self.cache = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self.lengths = [0] * rows  # on the host, so that nothing waits for the device
        self.positions = torch.zeros(rows, dtype=torch.int64, device=self.device)  # the same on the device

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], chunk: int | None = None) -> Tensor:
        """Run the prompts.

        Args:
            prompts: B lists of at least one token id.
            chunk: tokens of each row at a time; None: all.

        Returns:
            (B, V) logits of the token after each prompt.

        Raises:
            ValueError: a chunk below 1.
        """
        if chunk is not None and chunk < 1:
            raise ValueError(f"prefill_chunk must be at least 1, not {chunk}")
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

    def _run_packed(self, prompts: list[list[int]]) -> Tensor:
        """Last hidden state of each row, (B, D)."""
        counts = torch.tensor([len(p) for p in prompts])
        ends = counts.cumsum(0)
        cu = torch.cat([ends.new_zeros(1), ends])
        rows = torch.repeat_interleave(torch.arange(len(prompts)), counts)
        positions = torch.arange(int(cu[-1])) - cu[rows]
        ids = torch.tensor([i for p in prompts for i in p])
        offsets = cu.to(self.device, torch.int32)
        backend, _ = resolve(self.model.attention, self.device.type, self.dtype)
        rectangles = Rectangles(cu.tolist(), self.device) if backend == "sdpa" else None
        packed = Packed(offsets, int(counts.max()), backend, 0.0, rectangles)
        positions = positions.to(self.device)
        context = Prefill(self.cache, rows.to(self.device), positions, packed)
        hidden, _ = self.model.model(ids.to(self.device), positions, context, offsets)
        return hidden[(ends - 1).to(self.device)]

    def _run_rectangle(self, rows: list[int], pieces: list[list[int]], begin: int) -> Tensor:
        """The next tokens of some rows, all from position `begin`; a shorter piece repeats its last token.

        What the repeated tokens leave in the cache lies beyond the row's end: masked, and overwritten by later steps.
        """
        n = max(map(len, pieces))
        ids = torch.tensor([p + p[-1:] * (n - len(p)) for p in pieces], device=self.device)
        positions = torch.arange(begin, begin + n, device=self.device).expand(len(rows), n)
        some = len(rows) < self.cache.shape[2]
        cache = self.cache[:, :, rows] if some else self.cache
        slots = torch.arange(begin + n, device=self.device)
        mask = (slots <= positions.unsqueeze(-1)).unsqueeze(1)
        hidden = self._extend(ids, positions, cache[..., : begin + n, :], mask)
        if some:
            self.cache[:, :, rows] = cache
        last = torch.tensor([len(p) - 1 for p in pieces], device=self.device)
        return hidden.unflatten(0, ids.shape)[torch.arange(len(rows), device=self.device), last]

    def _extend(self, ids: Tensor, positions: Tensor, cache: Tensor, mask: Tensor | None) -> Tensor:
        rows = torch.arange(ids.shape[0], device=self.device).unsqueeze(1).expand_as(ids)
        cu = torch.arange(ids.shape[0] + 1, device=self.device, dtype=torch.int32) * ids.shape[1]
        context = Extend(cache, rows, positions, mask)
        return self.model.model(ids.flatten(), positions.flatten(), context, cu)[0]

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """Run one more token a row.

        Args:
            ids: (B,) int64.

        Returns:
            (B, V) logits of the token after it.
        """
        used = max(self.lengths) + 1
        mask = None
        if min(self.lengths) + 1 < used:
            mask = (torch.arange(used, device=self.device) <= self.positions.unsqueeze(1))[:, None, None]
        hidden = self._extend(ids.unsqueeze(1), self.positions.unsqueeze(1), self.cache[..., :used, :], mask)
        self.lengths = [n + 1 for n in self.lengths]
        self.positions = self.positions + 1
        return self.model.lm_head(hidden).logits

    @torch.inference_mode()
    def keep(self, rows: list[int], ids: Tensor) -> Tensor:
        """Go on with some rows only.

        Args:
            rows: their indices.
            ids: (B,) tokens about to be run.

        Returns:
            The ids of these rows.
        """
        self.cache = self.cache[:, :, rows]
        self.lengths = [self.lengths[r] for r in rows]
        self.positions = self.positions[rows]
        return ids[rows]
