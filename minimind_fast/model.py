"""MiniMind: one decoder-only transformer for both generations, dense and mixture of experts.

Purpose: tokens in, logits or per-token log-probabilities of the targets out.
Principle: everything runs on one packed stream of T tokens. Rows (B, T) are a stream of B equal documents. Each block
    takes the residual stream h and the last branch's output, adds and normalises them in one op, and returns the same
    pair: every addition is fused. A context object decides how tokens attend: packed here, by a KV cache in `infer`.
Properties: q, k, v are one matmul, gate and up another, experts are stacked; `weights/checkpoint.py` maps these to
    MiniMind's names on disk. The head's matmul and the cross-entropy are one op in the head's forward: the full logits
    are never stored, and ZeRO-3 gathers the head's weight as for any module.

Shapes: T tokens, B batch, D hidden, F ffn, H query heads, K kv heads, hd head_dim, E experts, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minimind_fast import ops
from minimind_fast.config import IGNORE_INDEX, ModelConfig
from minimind_fast.errors import UserError
from minimind_fast.ops.documents import Documents
from minimind_fast.ops.rotary import rope_tables

INIT_STD = 0.02  # for every matrix, as in MiniMind3 (MiniMind2's kaiming-uniform gives 0.026 at its width)


class ModelOutput(NamedTuple):
    """What `MiniMind.forward` returns; fields that were not requested are None.

    A named tuple, as is everything passed between modules: ZeRO-3 finds tensors only in tuples.
    """

    logits: Tensor | None = None  # (..., V)
    logprobs: Tensor | None = None  # (...) float32 of the targets, 0 where ignored
    entropy: Tensor | None = None  # (...) float32
    kl: Tensor | None = None  # (...) float32, against a teacher
    hidden: Tensor | None = None  # (..., D) after the last norm
    aux_loss: Tensor | None = None  # () float32, times its coefficient, summed over layers; 0 when not training


class AttentionContext(Protocol):
    """Which tokens may attend to which: one object a forward pass, called once a layer."""

    def attend(self, asker: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(T, H, hd), (T, K, hd), (T, K, hd) -> (T, H, hd); asker.layer says which layer's cache to use."""
        ...


class Packed(NamedTuple):
    """Causal attention within each document of a pack."""

    documents: Documents
    dropout: float = 0.0

    def attend(self, asker: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(T, H, hd), (T, K, hd), (T, K, hd) -> (T, H, hd)."""
        return self.documents.attend(q, k, v, self.dropout)


class RotaryTables(nn.Module):
    """cos and sin as buffers that follow the model's device but stay float32 when the model is cast."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        for name, table in zip(("cos", "sin"), rope_tables(config), strict=True):
            self.register_buffer(name, table, persistent=False)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.cos.dtype != torch.float32:
            device = self.cos.device
            self.cos, self.sin = (table.to(device) for table in rope_tables(self.config))
        return self


class Embedding(nn.Embedding):
    """Token ids to vectors."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return ops.embedding(input_ids, self.weight)


class RMSNorm(nn.Module):
    """RMSNorm, alone or after adding to the residual stream."""

    def __init__(self, config: ModelConfig, size: int) -> None:
        super().__init__()
        assert config.rms_norm_eps is not None and config.norm_cast_first is not None
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.cast_first = config.rms_norm_eps, config.norm_cast_first

    def forward(self, x: Tensor, residual: Tensor | None = None):
        return ops.rms_norm(x, self.weight, self.eps, residual, self.cast_first)


class Attention(nn.Module):
    """Grouped-query attention with one matmul for q, k and v."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        hd = config.head_dim
        assert hd is not None and config.rms_norm_eps is not None
        self.layer, self.heads, self.kv_heads = layer, config.num_attention_heads, config.num_key_value_heads
        self.eps, self.dropout = config.rms_norm_eps, config.dropout
        self.qkv_proj = nn.Linear(config.hidden_size, (self.heads + 2 * self.kv_heads) * hd, bias=False)
        self.o_proj = nn.Linear(self.heads * hd, config.hidden_size, bias=False)
        # q_norm.weight and k_norm.weight on disk; held here because the rope op applies them.
        self.q_norm_weight = nn.Parameter(torch.ones(hd)) if config.qk_norm else None
        self.k_norm_weight = nn.Parameter(torch.ones(hd)) if config.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, context: AttentionContext) -> Tensor:
        qkv = self.qkv_proj(x)
        norms = (self.q_norm_weight, self.k_norm_weight, self.eps)
        q, k, v = ops.rope(qkv, cos, sin, positions, self.heads, self.kv_heads, *norms)
        out = self.o_proj(context.attend(self, q, k, v).flatten(-2))
        return F.dropout(out, self.dropout, self.training)


class MLP(nn.Module):
    """SwiGLU feed-forward with one matmul for gate and up."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.down_proj(ops.swiglu(self.gate_up_proj(x))), self.dropout, self.training)


class Router(nn.Module):
    """Scores the experts; its weight is `mlp.gate.weight` on disk."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.num_experts_per_tok is not None
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.top_k = config.num_experts_per_tok
        self.straight_through = config.straight_through_router and config.normalizes_weights and self.top_k == 1
        self.normalize = config.normalizes_weights and not self.straight_through

    def forward(self, x: Tensor, cu_seqlens: Tensor | None, valid: Tensor | None) -> ops.Routing:
        routing = ops.moe_route(x, self.weight, self.top_k, self.normalize, cu_seqlens, valid)
        s = routing.weights  # straight through: the value is 1, the gradient d log s
        return routing._replace(weights=s / s.detach()) if self.straight_through else routing


class Experts(nn.Module):
    """A layer's routed experts, stacked: the optimizer and ZeRO see two large tensors."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        e, d, f = config.num_experts, config.hidden_size, config.moe_intermediate_size
        assert f is not None
        self.gate_up = nn.Parameter(torch.empty(e, 2 * f, d))
        self.down = nn.Parameter(torch.empty(e, d, f))

    def forward(self, x: Tensor, routing: ops.Routing) -> Tensor:
        return ops.moe_mlp(x, routing, self.gate_up, self.down)


class MoE(nn.Module):
    """Routed experts plus shared ones; n shared experts are one MLP, n times as wide."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate, self.experts = Router(config), Experts(config)
        width = config.moe_intermediate_size
        assert width is not None and config.num_shared_experts is not None
        self.shared = MLP(config, width * config.num_shared_experts) if config.num_shared_experts else None
        self.per_sequence, self.coefficient = config.aux_loss_per_sequence, config.balance_factor
        self.dropout = config.dropout
        self.last_counts: Tensor | None = None  # (E,) slots per expert in the last pass
        self.last_scores: Tensor | None = None  # (T, E) the router's softmax in the last pass

    def forward(self, x: Tensor, cu_seqlens: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        routing = self.gate(x, cu_seqlens if self.per_sequence else None, valid)
        y = F.dropout(self.experts(x, routing), self.dropout, self.training)
        if self.shared is not None:
            y = y + self.shared(x)
        if self.training:
            self.last_counts, self.last_scores = routing.counts.detach(), routing.scores.detach()
            return y, routing.aux_loss * self.coefficient
        return y, routing.aux_loss.new_zeros(())


class Block(nn.Module):
    """Pre-norm transformer block on the pair (branch output, residual stream)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config, config.hidden_size)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config, config.hidden_size)
        assert config.intermediate_size is not None
        self.mlp = MoE(config) if config.use_moe else MLP(config, config.intermediate_size)

    def forward(
        self,
        branch: Tensor | None,
        h: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        context: AttentionContext,
        cu_seqlens: Tensor,
        valid: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(branch, h), not yet added -> the same for the next block, and this layer's aux loss."""
        if branch is None:
            x = self.input_layernorm(h)
        else:
            x, h = self.input_layernorm(branch, h)
        x, h = self.post_attention_layernorm(self.self_attn(x, cos, sin, positions, context), h)
        if isinstance(self.mlp, MoE):
            y, aux = self.mlp(x, cu_seqlens, valid)
            return y, h, aux
        return self.mlp(x), h, None


class Body(nn.Module):
    """Embedding, blocks and last norm: tokens to hidden states."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Block(config, i) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config, config.hidden_size)
        self.rotary = RotaryTables(config)
        self.dropout = config.dropout
        self.gradient_checkpointing = False

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        context: AttentionContext,
        cu_seqlens: Tensor,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(T,) tokens at (T,) positions -> hidden (T, D), aux loss ()."""
        h = F.dropout(self.embed_tokens(input_ids), self.dropout, self.training)
        branch, aux_loss = None, h.new_zeros((), dtype=torch.float32)
        rest = (self.rotary.cos, self.rotary.sin, positions, context, cu_seqlens, valid)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                branch, h, aux = checkpoint(layer, branch, h, *rest, use_reentrant=False)
            else:
                branch, h, aux = layer(branch, h, *rest)
            if aux is not None:
                aux_loss = aux_loss + aux
        y, _ = self.norm(branch, h)
        return y, aux_loss


class Head(nn.Module):
    """The vocabulary projection, and everything computed from its logits."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        temperature: float = 1.0,
        return_entropy: bool = False,
        teacher: Teacher | None = None,
        grad_weights: Tensor | None = None,
    ) -> ModelOutput:
        """Logits without targets, else the targets' log-probabilities (and the entropy, and the KL to a teacher)."""
        if targets is None:
            return ModelOutput(logits=F.linear(hidden, self.weight))
        how = (temperature, return_entropy, grad_weights)
        result = ops.linear_cross_entropy(hidden, self.weight, targets, *how)
        logprobs, entropy = result if return_entropy else (result, None)
        kl = None
        if teacher is not None:
            mask = targets != IGNORE_INDEX
            kl = ops.linear_kl(
                hidden, self.weight, teacher.hidden, teacher.weight, mask, teacher.temperature, teacher.reverse
            )
        return ModelOutput(logprobs=logprobs, entropy=entropy, kl=kl)


class Teacher(NamedTuple):
    """A teacher's view of the same tokens, for distillation."""

    hidden: Tensor  # (T, D')
    weight: Tensor  # (V', D')
    temperature: float = 1.0
    reverse: bool = False


class MiniMind(nn.Module):
    """A MiniMind language model.

    Args:
        config: the model's shape; weights are drawn from N(0, 0.02), norms start at 1.
    """

    generator: ClassVar[Callable[..., Any] | None] = None  # set by `infer.generate`, which stands above
    base_fingerprint: str = ""  # these two are kept by `weights.lora`
    merged_adapters: tuple[str, ...] = ()

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.lm_head = Head(config)
        self.reset_parameters()
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def reset_parameters(self) -> None:
        """Draw new weights from torch's default generator."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=INIT_STD)
            else:
                nn.init.ones_(parameter)

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        valid: Tensor | None = None,
        temperature: float = 1.0,
        return_entropy: bool = False,
        return_hidden: bool = False,
        teacher: Teacher | None = None,
        grad_weights: Tensor | None = None,
        documents: Documents | None = None,
    ) -> ModelOutput:
        """Compute logits, or log-probabilities of targets.

        Args:
            input_ids: (B, T) rows without padding, or (T,) packed with cu_seqlens. int64.
            targets: the same shape; the token to predict after each position, IGNORE_INDEX for none. Without targets
                the result holds logits.
            cu_seqlens: (documents + 1,) int32 from 0 to T; required for packed input.
            max_seqlen: tokens in the longest document; loaders pass it so that nothing waits for the GPU.
            valid: the same shape as input_ids, bool: tokens that are not padding (only for MoE balancing).
            temperature: divides the logits inside the log-probabilities.
            return_entropy: also return the entropy at each position with a target.
            return_hidden: also return the hidden states before the head (and no logits).
            teacher: also return the KL divergence to this teacher.
            grad_weights: the targets' shape, float32: a promise that the loss is one number times the sum of these times
                the log-probabilities. The head then computes its gradients in the forward.
            documents: instead of cu_seqlens and max_seqlen, if already known.

        Returns:
            ModelOutput, its tensors in input_ids' shape.

        Raises:
            ValueError: mismatched shapes, or a document longer than max_position_embeddings.
        """
        shape = input_ids.shape
        if documents is None:
            documents = self._documents(input_ids, cu_seqlens, max_seqlen)
        longest, limit = documents.max_seqlen, self.config.max_position_embeddings
        if longest > limit:
            raise UserError(f"a document of {longest} tokens exceeds max_position_embeddings ({limit})")
        if targets is not None and targets.shape != shape:
            raise UserError(f"targets {tuple(targets.shape)} must have input_ids' shape {tuple(shape)}")
        context = Packed(documents, self.config.dropout if self.training else 0.0)
        flat_valid = None if valid is None else valid.flatten()
        hidden, aux_loss = self.model(
            input_ids.flatten(), documents.positions, context, documents.cu_seqlens, flat_valid
        )
        hidden = hidden.view(*shape, -1)
        if return_hidden and targets is None:
            return ModelOutput(hidden=hidden, aux_loss=aux_loss)
        out = self.lm_head(hidden, targets, temperature, return_entropy, teacher, grad_weights)
        return out._replace(aux_loss=aux_loss, hidden=hidden if return_hidden else None)

    def _documents(self, input_ids: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None) -> Documents:
        dtype = self.model.embed_tokens.weight.dtype
        if input_ids.dim() == 2 and cu_seqlens is None:
            return Documents.of_rows(input_ids.shape[0], input_ids.shape[1], input_ids.device, dtype)
        if input_ids.dim() == 1 and cu_seqlens is not None:
            return Documents.of(cu_seqlens, input_ids.numel(), dtype, max_seqlen)
        raise UserError(f"input_ids must be (B, T), or (T,) with cu_seqlens; got {tuple(input_ids.shape)}")

    def generate(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """Continue each row; see `minimind_fast.infer.generate.generate` for the options.

        Args:
            input_ids: (B, T) int64.
            kwargs: max_new_tokens, temperature, top_p, top_k, ...

        Returns:
            (B, T + new) int64.
        """
        assert MiniMind.generator is not None, "set by minimind_fast.infer.generate"
        return MiniMind.generator(self, input_ids, **kwargs)

    def num_parameters(self, active: bool = False, trained: bool = False) -> int:
        """Number of parameters, a tied head counted once.

        Args:
            active: count only those that one token uses.
            trained: count only those that get gradients.
        """
        total = sum(_size(p) for p in self.parameters() if p.requires_grad or not trained)
        if active and self.config.use_moe:
            c = self.config
            assert c.num_experts_per_tok is not None
            experts = [p for m in self.modules() if isinstance(m, Experts) for p in m.parameters()]
            count = sum(_size(p) for p in experts if p.requires_grad or not trained)
            total -= count * (c.num_experts - c.num_experts_per_tok) // c.num_experts
        return total

    def flops(self, tokens: int, pairs: int) -> int:
        """FLOPs of forward and backward: 2MNK a matmul, causal pairs only, recomputation not counted.

        A frozen matrix passes gradients on but gets none: 4 FLOPs a parameter and token instead of 6.

        Args:
            tokens: T.
            pairs: (query, key) pairs that attend: the sum of n (n + 1) / 2 over documents.
        """
        c = self.config
        assert c.head_dim is not None
        matmul, trained = self.num_parameters(active=True), self.num_parameters(active=True, trained=True)
        if not c.tie_word_embeddings:
            matmul -= c.vocab_size * c.hidden_size
            if self.model.embed_tokens.weight.requires_grad:
                trained -= c.vocab_size * c.hidden_size
        attention = 12 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * pairs
        return (4 * matmul + 2 * trained) * tokens + attention


def _size(p: Tensor) -> int:
    """Elements of the whole parameter; the engine notes them where only a shard stays here."""
    return getattr(p, "whole_numel", p.numel())
