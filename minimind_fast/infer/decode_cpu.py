"""A CPU decode step in as few operations as PyTorch allows, with the arithmetic of the model's forward.

Purpose: `CpuStep` runs one token per row through all layers; `Decoder` uses it whenever the model is on a CPU.
Principle: with one token per row, call overhead outweighs an operation's arithmetic, and a matmul's cost is reading its
    weight. So q, k and v are rotated at once (v by the angle 0), k and v are stored by one write, and each weight goes
    through the library call that reads it fastest.
Properties: no host synchronisation, no allocation that grows. Tests compare it with `PlainStep`.

Measured on two Zen 4 cores with weights from memory, 2816 x 512 and one row: float32 `linear` 570 us, `mm` with a
    transposed copy 340 us, `embedding_bag` 250 us; bfloat16 by oneDNN 310 us, by PyTorch's own gemv 127 us. With 8 rows,
    float32 in oneDNN's layout takes about half the time of `linear`; bfloat16 gains nothing.
Shapes: B rows, D hidden, F ffn, H query heads, K kv heads, hd head_dim, S slots, V vocab.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind_fast.model import Attention, Block, MiniMind, MoE, RMSNorm

Product = Callable[[Tensor], Tensor]  # (B, columns) -> (B, rows) of a weight (rows, columns)
BAG_WIDTH = 400  # outputs per bag: 250 to 400 read a weight at 22 to 28 GB/s, 800 and more at 15


class Packs:
    """Weights in the layouts that `CpuStep` reads fastest, prepared once for all steps.

    Float32 layouts are copies, one for a single row and one for several: each costs the weights' memory again, and goes
    stale when the weights are trained.
    """

    def __init__(self) -> None:
        self._of: dict[tuple[int, bool], Product] = {}

    def get(self, weight: Tensor, single: bool) -> Product:
        """Return the product with a weight.

        Args:
            weight: (rows, columns); the model must outlive this object.
            single: for one row of input, else for several.
        """
        key = id(weight), single
        if key not in self._of:
            weight = weight.detach()
            product = None
            if weight.dtype == torch.float32:
                product = _bags(weight) if single else _packed(weight)
            self._of[key] = product or _plain(weight)
        return self._of[key]


def _plain(weight: Tensor) -> Product:
    turned = weight.t()
    return lambda x: torch.mm(x, turned)


def _packed(weight: Tensor) -> Product | None:
    if not torch.backends.mkldnn.is_available():
        return None
    # Laid out for 16 rows; 2 to 32 rows gain as much.
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def _bags(weight: Tensor) -> Product | None:
    """Matrix-vector product by `embedding_bag`: a weighted sum of the weight's columns.

    It is vectorised and spreads its bags, each some of the outputs, over the threads.
    """
    rows, columns = weight.shape
    bags = next((n for n in range(2, rows // 16 + 1) if rows % n == 0 and rows // n <= BAG_WIDTH), None)
    if bags is None:
        return None
    table = weight.view(bags, rows // bags, columns).transpose(1, 2).reshape(bags * columns, rows // bags)
    index, starts = torch.arange(bags * columns), torch.arange(0, bags * columns, columns)

    def product(x: Tensor) -> Tensor:
        shares = x.expand(bags, columns).reshape(-1)
        return torch.embedding_bag(table, index, starts, False, 0, False, shares)[0].view(1, rows)

    return product


class CpuStep:
    """One token per row through a model on a CPU.

    Args:
        model: in evaluation mode.
        cache: (L, B, 2K, S, hd), keys before values.
        packs: the model's weights, shared with other steps; None: new ones.
    """

    def __init__(self, model: MiniMind, cache: Tensor, packs: Packs | None = None) -> None:
        c, body = model.config, model.model
        self.model, self.cache, self.rows = model, cache, cache.shape[1]
        self.heads, self.kv_heads, self.head_dim = c.num_attention_heads, c.num_key_value_heads, cache.shape[-1]
        self.dtype = cache.dtype
        self.single, packs = self.rows == 1, packs or Packs()
        self.embedding, self.head = body.embed_tokens.weight, packs.get(model.lm_head.weight, self.single)
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
            self.layers.append((before, after, mlp, norms, [packs.get(w, self.single) for w in weights]))
        self.every_row = torch.arange(self.rows)
        self.offsets = torch.arange(self.rows + 1, dtype=torch.int32)
        # cos and signed sin for all heads; v's stay 1 and 0.
        shape = (self.rows, self.heads + 2 * self.kv_heads, self.head_dim)
        self.cos, self.sin = torch.ones(shape), torch.zeros(shape)

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
        for (before, after, mlp, norms, products), cache in zip(self.layers, self.cache, strict=True):
            qkv = products[0](_norm(h, before)).view(rows, -1, hd)
            if norms is not None:
                qkv = torch.cat([_scale(qkv[:, :rotated], norms, before.eps), qkv[:, rotated:]], 1)
            qkv = qkv.float()
            swapped = qkv.view(rows, -1, 2, half).flip(2).view_as(qkv)
            qkv = torch.addcmul(qkv * self.cos, swapped, self.sin)
            if level:
                cache[:, :, used - 1] = qkv[:, heads:]
            else:
                cache[self.every_row, :, positions] = qkv[:, heads:].to(self.dtype)
            q = qkv[:, :heads].to(self.dtype).view(rows, kv_heads, heads // kv_heads, hd)
            visible = cache[:, :, :used]
            out = F.scaled_dot_product_attention(q, visible[:, :kv_heads], visible[:, kv_heads:], attn_mask=mask)
            h = h + products[1](out.reshape(rows, -1))
            x = _norm(h, after)
            if isinstance(mlp, MoE):
                h = h + mlp(x, self.offsets, None)[0]
            else:
                gate, up = products[2](x).chunk(2, -1)
                h = h + products[3](F.silu(gate) * up)
        return self.head(_norm(h, self.model.model.norm))


class _WithoutOneDNN:
    """Turns oneDNN off for matmuls in a `with` block.

    The switch is process-wide: the first of several threads sets it, the last one restores it. Other threads' matmuls
    stay correct meanwhile, just without oneDNN.
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


def _norm(h: Tensor, norm: RMSNorm) -> Tensor:
    wide = h.float()
    if h.shape[0] == 1:  # the library's takes eight operations
        flat = wide.view(-1)
        normed = wide * (float(torch.dot(flat, flat)) / flat.numel() + norm.eps) ** -0.5
    else:
        normed = F.rms_norm(wide, wide.shape[-1:], None, norm.eps)
    return normed.to(h.dtype) * norm.weight if norm.cast_first else (normed * norm.weight).to(h.dtype)


def _scale(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm that applies the weight before its only rounding."""
    return (F.rms_norm(x.float(), x.shape[-1:], None, eps) * weight).to(x.dtype)
