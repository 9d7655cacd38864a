"""A decode step on a CPU in as few operations as PyTorch allows: the same arithmetic as the model's own forward.

Purpose: `CpuStep`, one token a row through all layers; `Decoder` takes it wherever the model is on a CPU.
Principle: with one token a row an operation costs more for being called than for its numbers, and a matmul costs the
    reading of its weight. So q, k and v are rotated in one go (v by the angle 0) and k and v stored by one write, and
    each weight is read by the library call that reads it fastest.
Properties: no host synchronisation, nothing grows. Held to `Decoder.plain_step` by tests.

Measured on one Zen 4 core, 2816 x 512 weight and one row: float32 `linear` 575 us, `mm` with a transposed copy 300 us
    (but for a weight with more columns than rows `linear` is the faster: 190 against 260 us); bfloat16 by oneDNN 362 us,
    by PyTorch's own gemv 186 us. With 8 rows oneDNN and `linear` are as fast as any that read the weight as it lies; laid
    out by oneDNN beforehand (`Packs`), float32 takes 519 us instead of 951 with 8 rows, 685 instead of 1233 with 16.
Shapes: B rows, D hidden, F ffn, H query heads, K kv heads, hd head_dim, S slots, V vocab.
"""

from __future__ import annotations

import threading

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind_fast.model import Attention, Block, MiniMind, MoE, RMSNorm


class Packs:
    """Float32 weights laid out for several rows at a time, made once for all steps of a model that is served.

    They take the memory of the weights once more, and do not follow the weights when these are trained.
    """

    def __init__(self) -> None:
        self._of: dict[int, Tensor] = {}

    def get(self, weight: Tensor) -> Tensor | None:
        """The weight laid out by oneDNN; None where it cannot be.

        Args:
            weight: (rows, columns) of the model, which outlives this object.
        """
        if weight.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
            return None
        if id(weight) not in self._of:
            # Made for 16 rows; 2 to 32 rows gain as much from it.
            self._of[id(weight)] = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 16)
        return self._of[id(weight)]


class CpuStep:
    """One token a row through a model on a CPU.

    Args:
        model: in evaluation mode.
        cache: (L, B, 2K, S, hd), keys before values.
        packs: of the model; None: weights are used as they lie, also after they have changed.
    """

    def __init__(self, model: MiniMind, cache: Tensor, packs: Packs | None = None) -> None:
        c, body = model.config, model.model
        self.model, self.cache, self.rows = model, cache, cache.shape[1]
        self.heads, self.kv_heads, self.head_dim = c.num_attention_heads, c.num_key_value_heads, cache.shape[-1]
        self.dtype = cache.dtype
        self.single, self.packs = self.rows == 1, packs
        self.embedding, self.head = body.embed_tokens.weight, self._weight(model.lm_head.weight)
        self.layers = []
        for block in body.layers:
            assert isinstance(block, Block)
            attention: Attention = block.self_attn
            mlp = block.mlp
            norms = None
            if attention.q_norm_weight is not None and attention.k_norm_weight is not None:
                per_head: list[Tensor] = [attention.q_norm_weight.detach()] * self.heads
                per_head += [attention.k_norm_weight.detach()] * self.kv_heads
                norms = torch.stack(per_head)  # (H + K, hd)
            weights = [attention.qkv_proj.weight, attention.o_proj.weight]
            weights += [] if isinstance(mlp, MoE) else [mlp.gate_up_proj.weight, mlp.down_proj.weight]
            before, after = block.input_layernorm, block.post_attention_layernorm
            self.layers.append((before, after, mlp, norms, [self._weight(w) for w in weights]))
        self.every_row = torch.arange(self.rows)
        self.offsets = torch.arange(self.rows + 1, dtype=torch.int32)
        # cos and signed sin for all heads; those of v stay 1 and 0.
        shape = (self.rows, self.heads + 2 * self.kv_heads, self.head_dim)
        self.cos, self.sin = torch.ones(shape), torch.zeros(shape)

    def _weight(self, weight: Tensor) -> tuple[Tensor, str]:
        """(weight, how it lies): as this number of rows reads it fastest."""
        rows, columns = weight.shape
        if self.single and weight.dtype == torch.float32 and rows > columns:
            return weight.detach().t().contiguous(), "transposed"
        if not self.single and self.packs is not None and (packed := self.packs.get(weight)) is not None:
            return packed, "packed"
        return weight.detach(), "plain"

    def __call__(self, ids: Tensor, positions: Tensor, used: int, level: bool) -> Tensor:
        """(B,) ids at (B,) positions, `used` slots visible, all rows equally long if `level` -> (B, V) logits."""
        if self.single and self.dtype == torch.bfloat16:
            with _without_onednn:
                return self._run(ids, positions, used, level)
        return self._run(ids, positions, used, level)

    def _run(self, ids: Tensor, positions: Tensor, used: int, level: bool) -> Tensor:
        rows, heads, kv_heads, hd = self.rows, self.heads, self.kv_heads, self.head_dim
        rotated, half = heads + kv_heads, self.head_dim // 2
        tables = self.model.model.rotary
        cos, sin = tables.cos[positions].unsqueeze(1), tables.sin[positions].unsqueeze(1)
        self.cos[:, :rotated, :half], self.cos[:, :rotated, half:] = cos, cos
        self.sin[:, :rotated, :half], self.sin[:, :rotated, half:] = -sin, sin
        mask = None
        if not level:
            hidden_slots = torch.arange(used) > positions.unsqueeze(1)
            mask = torch.zeros(rows, used, dtype=self.dtype).masked_fill_(hidden_slots, float("-inf"))[:, None, None]
        h = F.embedding(ids, self.embedding)
        for (before, after, mlp, norms, weights), cache in zip(self.layers, self.cache, strict=True):
            qkv = _linear(_norm(h, before), weights[0]).view(rows, -1, hd)
            if norms is not None:
                qkv = torch.cat([_scale(qkv[:, :rotated], norms, before.eps), qkv[:, rotated:]], 1)
            qkv = qkv.float()
            qkv = torch.addcmul(qkv * self.cos, qkv.roll(half, -1), self.sin)
            if level:
                cache[:, :, used - 1] = qkv[:, heads:]
            else:
                cache[self.every_row, :, positions] = qkv[:, heads:].to(self.dtype)
            q = qkv[:, :heads].to(self.dtype).view(rows, kv_heads, heads // kv_heads, hd)
            visible = cache[:, :, :used]
            out = F.scaled_dot_product_attention(q, visible[:, :kv_heads], visible[:, kv_heads:], attn_mask=mask)
            h = h + _linear(out.reshape(rows, -1), weights[1])
            x = _norm(h, after)
            if isinstance(mlp, MoE):
                h = h + mlp(x, self.offsets, None)[0]
            else:
                gate, up = _linear(x, weights[2]).chunk(2, -1)
                h = h + _linear(F.silu(gate) * up, weights[3])
        return _linear(_norm(h, self.model.model.norm), self.head)


class _WithoutOneDNN:
    """Matmuls by PyTorch's own code in a `with` block.

    The switch is the whole process's: the first of several threads sets it, the last one puts it back. Meanwhile another
    thread's matmuls are right as well, only by another library.
    """

    def __init__(self) -> None:
        self.lock, self.inside, self.before = threading.Lock(), 0, True

    def __enter__(self) -> None:
        with self.lock:
            if self.inside == 0:
                self.before = torch._C._get_mkldnn_enabled()
                torch._C._set_mkldnn_enabled(False)
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                torch._C._set_mkldnn_enabled(self.before)


_without_onednn = _WithoutOneDNN()


def _linear(x: Tensor, weight: tuple[Tensor, str]) -> Tensor:
    if weight[1] == "packed":
        return torch.ops.mkldnn._linear_pointwise(x, weight[0], None, "none", [], "")
    return torch.mm(x, weight[0]) if weight[1] == "transposed" else F.linear(x, weight[0])


def _norm(h: Tensor, norm: RMSNorm) -> Tensor:
    if h.dtype == torch.float32:
        return F.rms_norm(h, h.shape[-1:], norm.weight, norm.eps)
    if norm.cast_first:
        return F.rms_norm(h.float(), h.shape[-1:], None, norm.eps).to(h.dtype) * norm.weight
    return _scale(h, norm.weight, norm.eps)


def _scale(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm with the weight applied before the one rounding."""
    return (F.rms_norm(x.float(), x.shape[-1:], None, eps) * weight).to(x.dtype)
