"""MiniMind's `.pth`: weights without a config, and what their reader takes for granted.

Purpose: `shape_of` finds the model's shape in the tensors, so a `.pth` of any size opens without being described.
    `read_differently` names what MiniMind would compute otherwise from a file written here.
Principle: the tensors' names and shapes say nearly everything: generation, width, depth, experts, tied head, and the size of
    a head where q and k are normalised. What they cannot say is taken from MiniMind's own defaults, because a `.pth` is
    MiniMind's unless told otherwise: its mixtures normalise the chosen scores.
Properties: a field that is told wins; one that contradicts the tensors ends in an error that lists them (`checkpoint.py`).

Source: jingyaogong/minimind, its configs of both generations; it loads with strict=False, so a tensor too many or too few
    passes in silence there.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from minimind_fast.config import YARN, ModelConfig
from minimind_fast.errors import UserError

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
HEADS = 8  # of every MiniMind
KV_HEADS = {2: 2, 3: 4}  # of each generation
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_SHARED = re.compile(r"model\.layers\.0\.mlp\.shared_experts\.(\d+)\.gate_proj\.weight")


def weights_in(raw: Any) -> Any:
    """The weights in what a `.pth` holds: itself, or the model in a `*_resume.pth`; wrappers' prefixes are taken off.

    Args:
        raw: as `torch.load` returns it.
    """
    if isinstance(raw, dict) and isinstance(raw.get("model"), dict) and "step" in raw:
        raw = raw["model"]
    if not isinstance(raw, dict):
        return raw
    return {re.sub(r"^((module|_orig_mod)\.)+", "", str(name)): tensor for name, tensor in raw.items()}


def shape_of(tensors: dict[str, Tensor], where: str, **told: Any) -> ModelConfig:
    """The config of a `.pth`, from its tensors.

    Args:
        tensors: by MiniMind's names.
        where: the file, to name in errors.
        told: fields that the user gave; they win.

    Raises:
        ValueError: these are not MiniMind's weights, or a head's size must be told.
    """

    def rows(name: str) -> int:
        tensor = tensors.get(name)
        if tensor is None or tensor.dim() != 2:
            raise UserError(f"{where} is not a MiniMind's weights: it has no matrix {name}")
        return tensor.shape[0]

    embedding = tensors.get(EMBEDDING, tensors.get(HEAD))
    if embedding is None or embedding.dim() != 2:
        raise UserError(f"{where} is not a MiniMind's weights: it has no matrix {EMBEDDING}")
    first = "model.layers.0."
    norm = tensors.get(f"{first}self_attn.q_norm.weight")
    found: dict[str, Any] = dict(
        generation=told.get("generation", 2 if norm is None else 3),
        qk_norm=norm is not None,
        vocab_size=embedding.shape[0],
        hidden_size=embedding.shape[1],
        num_hidden_layers=1 + max((int(m[1]) for m in map(_LAYER.match, tensors) if m), default=-1),
        tie_word_embeddings=HEAD not in tensors or torch.equal(tensors[HEAD], embedding),
        use_moe=f"{first}mlp.gate.weight" in tensors,
    )
    q, k = rows(f"{first}self_attn.q_proj.weight"), rows(f"{first}self_attn.k_proj.weight")
    size = told.get("head_dim") or (norm.numel() if norm is not None else None)
    heads = told.get("num_attention_heads") or (q // size if size else HEADS)
    size = size or max(q // heads, 1)
    if heads * size != q or k % size:
        raise UserError(
            f"{where}: {q} rows of q and {k} of k are not {heads} heads; say --num_attention_heads and --num_key_value_heads"
        )
    found.update(num_attention_heads=heads, head_dim=size, num_key_value_heads=k // size)
    if found["use_moe"]:
        width = rows(f"{first}mlp.experts.0.gate_proj.weight")
        found.update(num_experts=rows(f"{first}mlp.gate.weight"), moe_intermediate_size=width, intermediate_size=width)
        found["num_shared_experts"] = 1 + max((int(m[1]) for m in map(_SHARED.match, tensors) if m), default=-1)
        found["num_experts_per_tok"] = min(2 if found["generation"] == 2 else 1, found["num_experts"])
    else:
        found["intermediate_size"] = rows(f"{first}mlp.gate_proj.weight")
    return ModelConfig(**{**found, **told})


def as_minimind(preset: str, **told: Any) -> ModelConfig:
    """A preset as MiniMind's own `.pth` means it, for a file that is opened with --preset.

    Args:
        preset: a name from PRESETS.
        told: fields that the user gave; they win.

    Raises:
        ValueError: an unknown preset.
    """
    return ModelConfig.preset(preset, **{"norm_topk_prob": True, "num_experts_per_tok": None, **told})


def read_differently(config: ModelConfig) -> dict[str, Any]:
    """The fields that MiniMind would silently take otherwise from a `.pth` of this model, with the values it needs.

    Args:
        config: the model to be written.

    Returns:
        {field: value to set in MiniMindConfig}; empty if its own defaults compute the same.
    """
    new = config.generation == 3
    theirs: dict[str, Any] = dict(
        rms_norm_eps=1e-6 if new else 1e-5, rope_theta=1e6, tie_word_embeddings=True, qk_norm=new
    )
    assert config.head_dim is not None
    size = config.hidden_size // HEADS
    own = (config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim)
    if not new and own == (HEADS * size, KV_HEADS[2] * size):  # other heads in matrices of the same shape
        theirs.update(num_attention_heads=HEADS, num_key_value_heads=KV_HEADS[2])
    if config.use_moe:
        theirs.update(num_experts_per_tok=1 if new else 2, num_shared_experts=0 if new else 1)
    out = {name: getattr(config, name) for name, value in theirs.items() if getattr(config, name) != value}
    summed = config.use_moe and config.num_experts_per_tok == config.num_experts  # the scores' sum is 1 already
    alike = config.normalizes_weights == replace(config, norm_topk_prob=True).normalizes_weights
    if config.use_moe and not alike and not summed:
        out["norm_topk_prob"] = config.norm_topk_prob
    if config.rope_scaling:
        usual = config.rope_scaling == YARN
        out["inference_rope_scaling" if usual else "rope_scaling"] = True if usual else config.rope_scaling
    return out
