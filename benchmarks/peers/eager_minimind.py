"""MiniMind as its users run it, in plain eager PyTorch: the baseline of every ratio.

Purpose: a faithful stand-in for upstream's dense model and training loop, written for this benchmark.
Principle: separate q, k, v, gate and up projections, keys and values repeated for the query heads, RMSNorm and RoPE as
    chains of elementwise operators, full logits, cross-entropy over padded rows, unfused AdamW.
Properties: it loads our model's weights (`from_ours`), so both start from the same point. Nothing is slowed down on
    purpose: attention is PyTorch's causal SDPA, and data is tokenised beforehand, as ours is. It has as many operators as
    MiniMind (a test counts them).

Source: the behaviour of MiniMind (jingyaogong/minimind, Apache-2.0), restated.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind_fast.config import ModelConfig
from minimind_fast.data.packing import Batch
from minimind_fast.model import MiniMind, rope_tables
from minimind_fast.training.config import TrainConfig
from minimind_fast.training.trainer import learning_rate
from minimind_fast.weights.checkpoint import to_disk_names


class Norm(nn.Module):
    def __init__(self, size: int, eps: float, cast_first: bool) -> None:
        super().__init__()
        self.weight, self.eps, self.cast_first = nn.Parameter(torch.ones(size)), eps, cast_first

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.type_as(x) if self.cast_first else (self.weight * normed).type_as(x)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return (x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin).to(x.dtype)


def repeat_kv(x: Tensor, times: int) -> Tensor:
    b, t, heads, hd = x.shape
    return x if times == 1 else x[:, :, :, None, :].expand(b, t, heads, times, hd).reshape(b, t, heads * times, hd)


class EagerAttention(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv, self.hd = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, self.heads * self.hd, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, self.kv * self.hd, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, self.kv * self.hd, bias=False)
        self.o_proj = nn.Linear(self.heads * self.hd, c.hidden_size, bias=False)
        self.q_norm = Norm(self.hd, c.rms_norm_eps, c.norm_cast_first) if c.qk_norm else None
        self.k_norm = Norm(self.hd, c.rms_norm_eps, c.norm_cast_first) if c.qk_norm else None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, D) -> q (B, T, H, hd), k and v (B, T, K, hd), with q/k norm if the model has it, before RoPE."""
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, self.heads, self.hd)
        k = self.k_proj(x).view(b, t, self.kv, self.hd)
        v = self.v_proj(x).view(b, t, self.kv, self.hd)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.project(x)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        times = self.heads // self.kv
        q, k, v = q.transpose(1, 2), repeat_kv(k, times).transpose(1, 2), repeat_kv(v, times).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(b, t, -1))


class EagerMLP(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class EagerBlock(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = Norm(c.hidden_size, c.rms_norm_eps, c.norm_cast_first)
        self.self_attn = EagerAttention(c)
        self.post_attention_layernorm = Norm(c.hidden_size, c.rms_norm_eps, c.norm_cast_first)
        self.mlp = EagerMLP(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class EagerMiniMind(nn.Module):
    """A dense MiniMind of either generation.

    Args:
        config: use_moe must be False.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.use_moe:
            raise ValueError("the eager baseline is dense")
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList([EagerBlock(config) for _ in range(config.num_hidden_layers)])
        self.model.norm = Norm(config.hidden_size, config.rms_norm_eps, config.norm_cast_first)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight
        for name, table in zip(("cos", "sin"), rope_tables(config, 2048), strict=True):
            self.register_buffer(name, torch.cat([table, table], -1)[None, :, None, :], persistent=False)

    @classmethod
    def from_ours(cls, model: MiniMind) -> EagerMiniMind:
        """Copy a dense model's weights under MiniMind's names."""
        eager = cls(model.config)
        eager.load_state_dict({n: t.float() for n, t in to_disk_names(model.state_dict(), model.config).items()})
        return eager

    def hidden(self, input_ids: Tensor) -> Tensor:
        """(B, T) -> the last norm's output (B, T, D)."""
        t = input_ids.shape[1]
        cos, sin = self.cos[:, :t], self.sin[:, :t]
        x = self.model.embed_tokens(input_ids)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return self.model.norm(x)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, T) -> logits (B, T, V)."""
        return self.lm_head(self.hidden(input_ids))


def loss(model: EagerMiniMind, input_ids: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy from full float32 logits; input_ids and targets (B, T), -100 on padding."""
    logits = model(input_ids).float()
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.flatten(), ignore_index=-100)


class EagerTraining:
    """MiniMind's loop: padded rows, accumulation, clipping, AdamW; autocast to bfloat16 on a GPU, float32 on a CPU.

    Args:
        model: on its device; may be compiled.
        batches: padded rows; restarted when exhausted.
        accumulation: micro-batches per optimizer step.
        total_steps: length of the schedule.
        lr: peak learning rate.
    """

    def __init__(
        self,
        model: EagerMiniMind,
        batches: Iterable[Batch],
        accumulation: int,
        total_steps: int,
        lr: float,
    ) -> None:
        self.model, self.accumulation, self.total = model, accumulation, total_steps
        self.device = model.cos.device
        fused = None if self.device.type == "cuda" else False  # on a GPU, PyTorch's default
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, foreach=fused, fused=False)
        self.batches = itertools.chain.from_iterable(itertools.repeat(batches))
        self.config, self.step = TrainConfig(learning_rate=lr), 0

    def take_step(self) -> tuple[int, float]:
        """One optimizer step -> (useful tokens, their mean loss)."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step, self.total)
        useful, summed = 0, 0.0
        for _ in range(self.accumulation):
            batch = next(self.batches).to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                value = loss(self.model, batch.input_ids, batch.targets)
            (value / self.accumulation).backward()
            useful += batch.num_targets
            summed += value.item() * batch.num_targets
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return useful, summed / useful
