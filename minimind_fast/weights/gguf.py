"""GGUF files for llama.cpp, Ollama and what is built on them.

Purpose: `save_gguf` writes a model and its tokenizer as one file, without llama.cpp's converter.
Principle: each model is one of five architectures that llama.cpp computes exactly as we do. Dense MiniMind2 is its `llama`,
    dense MiniMind3 its `qwen3`, a mixture with normalised weights and q/k norm its `qwen3moe`. That one always normalises
    and has no shared experts, so every other mixture is a `bailingmoe2` (q/k norm) or a `bailingmoe` (none), which have a
    switch for the first and room for the second.
Properties: what the file cannot say is refused before it is written. `llama` and `bailingmoe` rotate neighbouring pairs
    where we rotate halves, so the rows of q and k are reordered there. Norms and routers stay float32. llama.cpp multiplies
    YaRN's amplitude by 1 + 0.1 ln(factor) on its own, so what is written is divided by that.

Source: the GGUF specification and the `gguf` package; for what each architecture computes, llama.cpp's src/models of 2026.

Shapes: D hidden, H heads, hd head_dim, E experts, F ffn.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minimind_fast.config import ModelConfig
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.errors import UserError
from minimind_fast.model import MiniMind
from minimind_fast.weights.checkpoint import EMBEDDING, HEAD, to_disk_names
from minimind_fast.weights.files import written_aside
from minimind_fast.weights.gguf_tokenizer import write_tokenizer
from minimind_fast.weights.hf import rope_to_hf, yarn_clamped_differently

# Name on the command line -> its number in `general.file_type`.
GGUF_DTYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}
_ROTATES_PAIRS = ("llama", "bailingmoe")
_Q8_BLOCK = 32
_LEAVES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def architecture(config: ModelConfig) -> str:
    """The llama.cpp architecture that computes what this model does.

    Raises:
        ValueError: there is none; gives the reason.
    """
    if yarn_clamped_differently(config):
        raise UserError("no GGUF holds this model: llama.cpp cuts YaRN off at another frequency")
    if not config.use_moe:
        return "qwen3" if config.qk_norm else "llama"
    if not config.qk_norm:
        return "bailingmoe"
    if config.norm_topk_prob and not config.num_shared_experts:
        return "qwen3moe"
    assert config.head_dim is not None
    if config.num_attention_heads * config.head_dim != config.hidden_size:
        raise UserError(
            "no GGUF holds this mixture: with q/k norm, and shared experts or weights that are not normalised, llama.cpp "
            f"wants heads ({config.num_attention_heads}) times head_dim ({config.head_dim}) to be hidden_size "
            f"({config.hidden_size})"
        )
    return "bailingmoe2"


def save_gguf(model: MiniMind, path: str | Path, tokenizer: Tokenizer, dtype: str = "f16", name: str = "") -> None:
    """Write a model as one GGUF file.

    Args:
        path: the file; replaced as a whole.
        tokenizer: written into the file, with its chat template.
        dtype: of the matrices, a key of GGUF_DTYPES. With q8_0, rows that are no multiple of 32 long become f16.
        name: shown by tools; the file's stem if empty.

    Raises:
        ValueError: a model, tokenizer or dtype that a GGUF file cannot hold, values beyond float16, or no `gguf` package.
    """
    gguf = import_gguf()
    path, config = Path(path), model.config
    if dtype not in GGUF_DTYPES:
        raise UserError(f"--dtype of a GGUF file is one of {', '.join(GGUF_DTYPES)}, not {dtype!r}")
    kind = architecture(config)
    tensors = {new: _stored(gguf, new, old, dtype) for new, old in _tensors(model, kind).items()}
    with written_aside(path) as aside:
        writer = gguf.GGUFWriter(aside, kind)
        writer.add_name(name or path.stem)
        writer.add_file_type(GGUF_DTYPES[dtype])
        if dtype == "q8_0":
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _write_config(gguf, writer, config, kind)
        write_tokenizer(gguf, writer, tokenizer, config)
        for new, (data, stored) in tensors.items():
            writer.add_tensor(new, data, raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def import_gguf() -> Any:
    """The `gguf` package.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise UserError("a GGUF file needs the gguf package: pip install 'minimind_fast[gguf]'") from None
    return gguf


# --------------------------------------------------------------------------------------------------------------- config


def _write_config(gguf: Any, writer: Any, c: ModelConfig, kind: str) -> None:
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(float(c.rope_theta))
    if yarn := rope_to_hf(c).get("rope_scaling"):
        factor = yarn["factor"]
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(factor)
        writer.add_rope_scaling_orig_ctx_len(yarn["original_max_position_embeddings"])
        writer.add_rope_scaling_attn_factors(yarn["attention_factor"] / (1 + 0.1 * math.log(factor)))
        writer.add_rope_scaling_yarn_beta_fast(yarn["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(yarn["beta_slow"])
    if not c.use_moe:
        return
    writer.add_expert_count(c.num_experts)
    writer.add_expert_used_count(c.num_experts_per_tok)
    writer.add_expert_feed_forward_length(c.moe_intermediate_size)
    if kind == "qwen3moe":
        return
    writer.add_leading_dense_block_count(0)
    writer.add_expert_shared_count(max(c.num_shared_experts or 0, 1))
    writer.add_expert_shared_feed_forward_length(_shared_width(c, kind))
    writer.add_expert_weights_norm(bool(c.norm_topk_prob))
    writer.add_expert_weights_scale(1.0)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)


def _shared_width(c: ModelConfig, kind: str) -> int:
    """F of one shared expert; without any, that of one made of zeros, which `bailingmoe2` lets us keep small."""
    assert c.moe_intermediate_size is not None
    return c.moe_intermediate_size if c.num_shared_experts or kind == "bailingmoe" else _Q8_BLOCK


# -------------------------------------------------------------------------------------------------------------- tensors


def _tensors(model: MiniMind, kind: str) -> dict[str, Tensor]:
    """Weights by llama.cpp's names."""
    c = model.config
    disk = {name: tensor.detach().cpu() for name, tensor in to_disk_names(model.state_dict(), c).items()}
    tied = c.tie_word_embeddings and not kind.startswith("bailing")
    out = {"token_embd.weight": disk[EMBEDDING], "output_norm.weight": disk["model.norm.weight"]}
    if not tied:
        out["output.weight"] = disk[EMBEDDING if c.tie_word_embeddings else HEAD]
    for layer in range(c.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
        found = {new: disk[f"{ours}{old}.weight"] for old, new in _LEAVES.items() if f"{ours}{old}.weight" in disk}
        if kind in _ROTATES_PAIRS:
            found["attn_q"] = _as_pairs(found["attn_q"], c.num_attention_heads)
            found["attn_k"] = _as_pairs(found["attn_k"], c.num_key_value_heads)
        if kind == "bailingmoe2":
            found["attn_qkv"] = torch.cat([found.pop(f"attn_{x}") for x in "qkv"])
        if c.use_moe:
            found.update(_experts(disk, f"{ours}mlp.", c, kind))
        out.update({f"{theirs}{name}.weight": tensor for name, tensor in found.items()})
    return out


def _experts(disk: dict[str, Tensor], prefix: str, c: ModelConfig, kind: str) -> dict[str, Tensor]:
    out = {}
    for leaf, joined in (("gate", 0), ("up", 0), ("down", 1)):  # the axis along which shared experts are one wide one
        routed = [disk[f"{prefix}experts.{e}.{leaf}_proj.weight"] for e in range(c.num_experts)]
        out[f"ffn_{leaf}_exps"] = torch.stack(routed)
        if kind == "qwen3moe":
            continue
        shared = [disk[f"{prefix}shared_experts.{i}.{leaf}_proj.weight"] for i in range(c.num_shared_experts or 0)]
        shape = [c.hidden_size, c.hidden_size]
        shape[joined] = _shared_width(c, kind)
        out[f"ffn_{leaf}_shexp"] = torch.cat(shared, joined) if shared else routed[0].new_zeros(shape)
    return out


def _as_pairs(weight: Tensor, heads: int) -> Tensor:
    """(heads * hd, D): within each head, rows i and i + hd / 2 become neighbours."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def _stored(gguf: Any, name: str, tensor: Tensor, dtype: str) -> tuple[np.ndarray, Any]:
    """A tensor as its bytes in the file, and their type."""
    kinds = gguf.GGMLQuantizationType
    if tensor.dim() == 1 or "ffn_gate_inp." in name:
        kind = kinds.F32
    elif dtype == "q8_0" and tensor.shape[-1] % _Q8_BLOCK:
        kind = kinds.F16
    else:
        kind = kinds[dtype.upper()]
    data = tensor.float().contiguous()
    # q8_0 keeps one float16 scale for each block: its largest value, divided by 127.
    largest = data.abs().max().item() / (127 if kind == kinds.Q8_0 else 1)
    if kind in (kinds.F16, kinds.Q8_0) and 65504 < largest < math.inf:
        raise UserError(f"{name} holds values beyond float16's 65504; write bf16 or f32")
    return gguf.quantize(data.numpy(), kind), kind
