"""MiniMind for Transformers: the file that lies in a model's folder, for `trust_remote_code=True`.

Purpose: `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` on folders of format `minimind`, of both
    generations, dense and mixtures, without minimind_fast installed.
Principle: plain PyTorch under the tensor names on disk. Angles are computed in each forward and no buffer is kept, because
    Transformers 5 builds a model without data first. The cache is Transformers' own, so `generate` works in full.
Properties: the logits are those of minimind_fast. The loss has no balancing term, so train mixtures with minimind_fast.

Shapes: B batch, T new tokens, S tokens with the cache, D hidden, H query heads, K kv heads, hd head_dim, E experts.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

# MiniMind2's names -> those of MiniMind3.
_OLDER_NAMES = {
    "n_routed_experts": "num_experts",
    "n_shared_experts": "num_shared_experts",
    "aux_loss_alpha": "router_aux_loss_coef",
    "seq_aux": "aux_loss_per_sequence",
}


class MiniMindConfig(PretrainedConfig):
    """The shape of a MiniMind; `config.json` names every field."""

    model_type = "minimind"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 6400,
        hidden_size: int = 768,
        num_hidden_layers: int = 8,
        num_attention_heads: int = 8,
        num_key_value_heads: int = 4,
        max_position_embeddings: int = 32768,
        rope_theta: float = 1e6,
        rope_scaling: dict | None = None,
        rms_norm_eps: float = 1e-6,
        qk_norm: bool = True,
        norm_cast_first: bool = False,
        use_moe: bool = False,
        norm_topk_prob: bool = True,
        **others,
    ):
        others = {_OLDER_NAMES.get(name, name): value for name, value in others.items()}
        own = {
            "head_dim": hidden_size // num_attention_heads,
            "intermediate_size": 64 * math.ceil(hidden_size * math.pi / 64),
            "dropout": 0.0,
            "hidden_act": "silu",
            "num_experts": 4,
            "num_experts_per_tok": 1,
            "num_shared_experts": 0,
            "router_aux_loss_coef": 0.0,
            "aux_loss_per_sequence": False,
        }
        own = {name: others.pop(name, value) for name, value in own.items()}
        own["moe_intermediate_size"] = others.pop("moe_intermediate_size", own["intermediate_size"])
        # Under a name of our own: Transformers 5 would rewrite `rope_scaling`, and Transformers 4 check it.
        self.yarn = rope_scaling
        self.rope_theta = rope_theta
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.num_key_value_heads = num_attention_heads, num_key_value_heads
        self.max_position_embeddings, self.rms_norm_eps = max_position_embeddings, rms_norm_eps
        self.qk_norm, self.norm_cast_first = qk_norm, norm_cast_first
        self.use_moe, self.norm_topk_prob = use_moe, norm_topk_prob
        for name, value in own.items():
            setattr(self, name, value)
        super().__init__(**{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **others})

    def to_dict(self) -> dict:
        """The content of `config.json`, under the names it was read by."""
        out = super().to_dict()
        out.pop("rope_parameters", None)
        out["rope_scaling"] = out.pop("yarn", None)
        return out


def rotations(positions: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """cos and sin of each position's angles, (B, 1, T, hd) float32, with YaRN where the config has it.

    Source: Su et al., RoFormer, 2021; Peng et al., YaRN, 2023.
    """
    hd, theta, yarn = config.head_dim, config.rope_theta, config.yarn
    frequencies = 1.0 / theta ** (torch.arange(0, hd, 2, device=positions.device).float() / hd)
    amplitude = 1.0
    if yarn:
        original, amplitude = yarn["original_max_position_embeddings"], yarn.get("attention_factor", 1.0)
        if config.max_position_embeddings > original:

            def pair(turns: float) -> float:
                return hd * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

            low, high = (
                max(math.floor(pair(yarn["beta_fast"])), 0),
                min(math.ceil(pair(yarn["beta_slow"])), hd // 2 - 1),
            )
            index = torch.arange(hd // 2, device=positions.device).float()
            ramp = ((index - low) / max(high - low, 0.001)).clamp(0, 1)
            frequencies = frequencies * (1 - ramp + ramp / yarn["factor"])
    angles = positions[:, None, :, None].float() * frequencies
    angles = torch.cat([angles, angles], -1)
    return angles.cos() * amplitude, angles.sin() * amplitude


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + hd / 2) of (B, H, T, hd)."""
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


class MiniMindRMSNorm(nn.Module):
    """RMSNorm; MiniMind2 rounds before the weight, MiniMind3 after it."""

    def __init__(self, size: int, config: MiniMindConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.cast_first = config.rms_norm_eps, config.norm_cast_first

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight * (wide.to(x.dtype) if self.cast_first else wide)).to(x.dtype)


class MiniMindHeadNorm(MiniMindRMSNorm):
    """The norm of q and k, which rounds last in both generations."""

    def __init__(self, config: MiniMindConfig):
        super().__init__(config.head_dim, config)
        self.cast_first = False


class MiniMindAttention(nn.Module):
    """Grouped-query attention."""

    def __init__(self, config: MiniMindConfig, layer: int):
        super().__init__()
        self.layer, self.dropout = layer, config.dropout
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)
        self.q_norm = MiniMindHeadNorm(config) if config.qk_norm else nn.Identity()
        self.k_norm = MiniMindHeadNorm(config) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (p(x).view(b, t, -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        k, v = (part.repeat_interleave(self.heads // self.kv_heads, dim=1) for part in (k, v))
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None and t > 1)
        return F.dropout(self.o_proj(y.transpose(1, 2).reshape(b, t, -1)), self.dropout, self.training)


class MiniMindMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: MiniMindConfig, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MiniMindMixture(nn.Module):
    """The best experts for each token, weighted by the router, and those that all tokens share."""

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        width = config.moe_intermediate_size
        self.top_k, self.normalise = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(MiniMindMLP(config, width) for _ in range(config.num_experts))
        if config.num_shared_experts:
            self.shared_experts = nn.ModuleList(MiniMindMLP(config, width) for _ in range(config.num_shared_experts))
        else:
            self.shared_experts = []

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        weights, chosen = self.gate(flat).float().softmax(-1).topk(self.top_k, dim=-1)
        if self.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        y = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            token, place = (chosen == e).nonzero(as_tuple=True)
            y = y.index_add(0, token, (expert(flat[token]) * weights[token, place, None]).to(y.dtype))
        y = y.view_as(x)
        for expert in self.shared_experts:
            y = y + expert(x)
        return y


class MiniMindBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: MiniMindConfig, layer: int):
        super().__init__()
        self.input_layernorm = MiniMindRMSNorm(config.hidden_size, config)
        self.self_attn = MiniMindAttention(config, layer)
        self.post_attention_layernorm = MiniMindRMSNorm(config.hidden_size, config)
        self.mlp = MiniMindMixture(config) if config.use_moe else MiniMindMLP(config, config.intermediate_size)
        self.dropout = config.dropout

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache) -> Tensor:
        h = h + self.self_attn(self.input_layernorm(h), cos, sin, mask, cache)
        return h + F.dropout(self.mlp(self.post_attention_layernorm(h)), self.dropout, self.training)


class MiniMindPreTrainedModel(PreTrainedModel):
    """What Transformers wants to know of every model."""

    config_class = MiniMindConfig
    base_model_prefix = "model"
    _no_split_modules = ["MiniMindBlock"]
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)


class MiniMindModel(MiniMindPreTrainedModel):
    """Embedding, blocks and last norm."""

    def __init__(self, config: MiniMindConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MiniMindBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = MiniMindRMSNorm(config.hidden_size, config)
        self.post_init()

    def forward(self, h: Tensor, positions: Tensor, mask: Tensor | None, cache) -> Tensor:
        """(B, T, D) embeddings -> (B, T, D)."""
        cos, sin = rotations(positions, self.config)
        h = F.dropout(h, self.config.dropout, self.training)
        for layer in self.layers:
            h = layer(h, cos, sin, mask, cache)
        return self.norm(h)


class MiniMindForCausalLM(MiniMindPreTrainedModel, GenerationMixin):
    """MiniMind with its head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MiniMindConfig):
        super().__init__(config)
        self.model = MiniMindModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), the loss of labels (-100 for none, shifted here), and the cache.

        Args:
            input_ids: (B, T).
            attention_mask: (B, S), 0 for padding.
            position_ids: (B, T); counted from the cache's length if None.
            past_key_values: Transformers' cache.
            inputs_embeds: (B, T, D) instead of input_ids.
            labels: (B, T).
            use_cache: return the cache; a new one if there is none.
            logits_to_keep: only the last so many logits, or these positions; 0 for all.
        """
        h = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        b, t, _ = h.shape
        cache = past_key_values
        if cache is None and use_cache:
            cache = DynamicCache()
        past = cache.get_seq_length() if cache is not None else 0
        at = torch.arange(past, past + t, device=h.device)
        if position_ids is None:
            position_ids = at[None].expand(b, t)
        h = self.model(h, position_ids, _mask(attention_mask, at, past), cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(h[:, kept])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)


def _mask(attention_mask: Tensor | None, at: Tensor, past: int) -> Tensor | None:
    """(B, 1, T, S): which tokens each new one sees; None for plain causal attention."""
    if attention_mask is None and (past == 0 or at.numel() == 1):
        return None
    keys = torch.arange(past + at.numel(), device=at.device)
    seen = (keys <= at[:, None])[None, None]
    if attention_mask is not None:
        seen = seen & attention_mask[:, None, None, : keys.numel()].bool()
        seen = seen | (keys == at[:, None])  # padding sees itself: a row of nothing would be NaN
    return seen
