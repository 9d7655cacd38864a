"""Configs of other formats: Hugging Face Llama, Qwen3 and Qwen3-MoE, both ways.

Purpose: translate a `ModelConfig` to another format's `config.json`, and back.
Principle: tensor names are the same everywhere (MiniMind took them from Llama; Qwen3-MoE names experts the same way), so
    only the config is translated. MiniMind2 dense is a Llama, MiniMind3 dense a Qwen3 (q/k norm), MiniMind3 MoE a
    Qwen3-MoE. What a format cannot express is refused with all reasons, before anything is written.
Properties: in float32 both sides compute the same. In bf16 and fp16 they differ by one rounding per norm where the order
    of cast and weight differs: Hugging Face casts first in every norm, as MiniMind2 does; MiniMind3 casts last. A model
    read from such a folder gets `norm_cast_first`, which leaves only the q/k norms in our order. Measured with random
    weights of minimind3's shape in bf16, relative error of the logits against float32: Hugging Face 1.45%, ours in its
    own order 1.27%, ours in Hugging Face's order 1.38%: the effect of the order is below bf16's own error.
    Training differs, answers do not: Hugging Face applies dropout to attention weights only, and its aux loss pools all
    layers where ours sums them.
    Tests check folders against Transformers 5.23; 4.57.1 opened them with the same logits (tried by hand).
"""

from __future__ import annotations

import math
from typing import Any

from minimind_fast.config import YARN, ModelConfig, ids_on_disk, token_ids
from minimind_fast.errors import UserError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}


# ---------------------------------------------------------------------------------------------------------------- write


def obstacles(config: ModelConfig, format: str) -> list[str]:
    """Why a model cannot be written in a format (a key of ARCHITECTURES); empty if it can."""
    found = []
    if format == "llama" and config.qk_norm:
        found.append("Llama has no q/k norm, and this model has")
    if format != "llama" and not config.qk_norm:
        found.append("Qwen3 always has q/k norm, and this model has none")
    if format == "qwen3_moe" and not config.use_moe:
        found.append("Qwen3-MoE has experts in every layer, and this model has none")
    if format != "qwen3_moe" and config.use_moe:
        found.append(f"{'Llama' if format == 'llama' else 'Qwen3'} has no experts, and this model has")
    if config.use_moe and config.num_shared_experts:
        found.append("none of these formats has shared experts, and this model has")
    if format == "llama" and config.hidden_size % config.num_attention_heads:
        found.append(
            f"Llama wants hidden_size ({config.hidden_size}) to be a multiple of the heads ({config.num_attention_heads})"
        )
    if yarn_clamped_differently(config):
        found.append("YaRN with this head_dim, rope_theta and original length is cut off at another frequency there")
    return found


def fitting_format(config: ModelConfig) -> str | None:
    """The format that can hold a model, if any."""
    return next((format for format in ARCHITECTURES if not obstacles(config, format)), None)


def to_hf_config(config: ModelConfig, format: str) -> dict[str, Any]:
    """The content of `config.json` in another format.

    RoPE is written twice: as `rope_parameters` for Transformers 5, as `rope_theta` and `rope_scaling` for 4.

    Args:
        config: the model to describe.
        format: a key of ARCHITECTURES.

    Returns:
        The JSON object, without `dtype`.

    Raises:
        ValueError: the format cannot hold this model; gives all reasons, and the formats that can.

    Source: LlamaConfig, Qwen3Config, Qwen3MoeConfig of Hugging Face Transformers 5.23.
    """
    reasons = obstacles(config, format)
    if reasons:
        fits = fitting_format(config)
        instead = f"{fits!r} can" if fits else "only 'minimind' and 'pth' can"
        raise UserError(f"this model cannot be written as {format!r}: {'; '.join(reasons)}; {instead}")
    raw: dict[str, Any] = {
        "model_type": format,
        "architectures": [ARCHITECTURES[format]],
        **{name: getattr(config, name) for name in _SAME_NAMES},
        "attention_dropout": config.dropout,
        "attention_bias": False,
        "initializer_range": 0.02,
        "use_cache": True,
        **ids_on_disk(config),
        **rope_to_hf(config),
    }
    if format == "llama":
        raw["mlp_bias"] = False
    else:
        raw.update(use_sliding_window=False, sliding_window=None)
    if format == "qwen3_moe":
        raw.update({name: getattr(config, name) for name in _MOE_NAMES})
        raw["norm_topk_prob"] = config.normalizes_weights  # there also where one expert is chosen
        raw.update(decoder_sparse_step=1, mlp_only_layers=[], output_router_logits=False)
    return raw


def generation_config(config: ModelConfig) -> dict[str, Any]:
    """The content of `generation_config.json`: special ids only; sampling is the user's choice."""
    return {name: value for name, value in ids_on_disk(config).items() if value is not None}


_SAME_NAMES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *(
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
    ),
)
_NO_IDS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
_MOE_NAMES = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "router_aux_loss_coef")


_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def rope_to_hf(config: ModelConfig) -> dict[str, Any]:
    theta, yarn = float(config.rope_theta), config.rope_scaling
    plain = {"rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    if not yarn:
        return plain
    if yarn.get("type") == "llama3":
        scaling = {"rope_type": "llama3", **{name: yarn[name] for name in _LLAMA3}}
        return {"rope_theta": theta, "rope_parameters": {**scaling, "rope_theta": theta}, "rope_scaling": scaling}
    original, amplitude = yarn["original_max_position_embeddings"], float(yarn.get("attention_factor", 1.0))
    stretched = config.max_position_embeddings > original  # MiniMind keeps the frequencies within the original length
    if not stretched and amplitude == 1:
        return plain
    scaling = {
        "rope_type": "yarn",
        "factor": float(yarn["factor"]) if stretched else 1.0,
        "original_max_position_embeddings": original,
        "beta_fast": float(yarn["beta_fast"]),
        "beta_slow": float(yarn["beta_slow"]),
        "attention_factor": amplitude,  # always explicit: Transformers would derive it from the factor
    }
    return {"rope_theta": theta, "rope_parameters": {**scaling, "rope_theta": theta}, "rope_scaling": scaling}


def yarn_clamped_differently(config: ModelConfig) -> bool:
    """Whether MiniMind's ramp between kept and stretched frequencies differs from Hugging Face's.

    MiniMind clamps the ramp's end to a head's last pair (hd / 2 - 1), Hugging Face to hd - 1. This matters only if the
    slowest pair turns more than beta_slow times within the original length.
    """
    yarn = config.rope_scaling
    if (
        not yarn
        or yarn.get("type") == "llama3"
        or yarn["factor"] == 1
        or config.max_position_embeddings <= yarn["original_max_position_embeddings"]
    ):
        return False
    assert config.head_dim is not None

    def pair(rotations: float) -> float:
        turns = yarn["original_max_position_embeddings"] / (rotations * 2 * math.pi)
        return config.head_dim * math.log(turns) / (2 * math.log(config.rope_theta))  # type: ignore[operator]

    low, high = max(math.floor(pair(yarn["beta_fast"])), 0), math.ceil(pair(yarn["beta_slow"]))
    return high > config.head_dim // 2 - 1 or low > high


# ----------------------------------------------------------------------------------------------------------------- read


def from_hf_config(raw: dict[str, Any], where: str, generation: dict[str, Any] | None = None) -> ModelConfig:
    """Read `config.json` of a Llama, Qwen3 or Qwen3-MoE folder.

    Fields that Transformers' model of that type ignores are ignored here too.

    Args:
        raw: the parsed JSON; its `model_type` is a key of ARCHITECTURES.
        where: source to name in errors, usually the file.
        generation: the folder's `generation_config.json`; its special ids win, as in Transformers.

    Raises:
        ValueError: a field is missing, or asks for something that MiniMind does not compute; gives all reasons.

    Source: defaults and priorities of Hugging Face Transformers 5.23.
    """
    kind = raw["model_type"]
    raw = {name: value for name, value in raw.items() if value is not None}
    raw.setdefault("num_experts", raw.get("num_local_experts", 128))
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    missing = [name for name in required if name not in raw]
    if missing:
        raise UserError(f"{where}: {kind} without {', '.join(missing)}")
    values: dict[str, Any] = {
        "generation": 2 if kind == "llama" else 3,
        "qk_norm": kind != "llama",
        "norm_cast_first": True,
        "dropout": raw.get("attention_dropout", 0.0),
        # these types' defaults
        "num_key_value_heads": {"llama": raw["num_attention_heads"], "qwen3": 32, "qwen3_moe": 4}[kind],
        "head_dim": 128 if kind == "qwen3" else None,
        "max_position_embeddings": 2048 if kind == "llama" else 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        **{name: raw[name] for name in _SAME_NAMES if name in raw},
        **token_ids({**_NO_IDS, **raw, **{k: v for k, v in (generation or {}).items() if v is not None}}),
    }
    if kind == "qwen3_moe":
        defaults = dict(num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=False)
        values.update({**defaults, "router_aux_loss_coef": 1e-3})
        values.update({name: raw[name] for name in _MOE_NAMES if name in raw})
        values.update(use_moe=True, num_shared_experts=0)
    reasons = _foreign(raw, kind)
    try:
        rope, rope_reasons = _rope_from_hf(raw, values["max_position_embeddings"])
        values.update(rope)
        if reasons := reasons + rope_reasons:
            raise UserError(f"this {kind} model computes what MiniMind does not: {'; '.join(reasons)}")
        config = ModelConfig(**values)
        if yarn_clamped_differently(config):
            raise UserError("YaRN with this head_dim, rope_theta and original length is cut off elsewhere in MiniMind")
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{where}: {error}") from None
    return config


def _foreign(raw: dict[str, Any], kind: str) -> list[str]:
    """What a config asks for that MiniMind cannot compute."""
    found = []
    if raw.get("attention_bias") or raw.get("mlp_bias"):
        names = [name for name in ("attention_bias", "mlp_bias") if raw.get(name)]
        found.append(f"projections with biases ({', '.join(names)})")
    if "quantization_config" in raw:
        found.append("quantized weights (quantization_config)")
    layers = set(raw.get("layer_types", [])) - {"full_attention"}
    if kind != "llama" and (layers or (raw.get("use_sliding_window") and "sliding_window" in raw)):
        found.append("sliding-window attention")
    if kind == "qwen3_moe":
        if raw.get("decoder_sparse_step", 1) != 1 or raw.get("mlp_only_layers"):
            found.append("layers without experts among those with (decoder_sparse_step, mlp_only_layers)")
        if raw["num_experts"] < 1:
            found.append("no experts at all (num_experts)")
    return found


def _rope_from_hf(raw: dict[str, Any], max_positions: int) -> tuple[dict[str, Any], list[str]]:
    """Our RoPE fields and max_position_embeddings, and what is unsupported."""
    # 4.x writes rope_theta and rope_scaling, 5.x rope_parameters; 5.x reads them in this order.
    scaling = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    scaling = {name: value for name, value in scaling.items() if value is not None}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    fields: dict[str, Any] = {"rope_theta": float(scaling.get("rope_theta", raw.get("rope_theta", 1e4)))}
    if scaling.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1:
        return fields, ["rotation of a part of each head (partial_rotary_factor)"]
    if kind == "default":
        return fields, []
    if kind == "llama3":
        missing = [name for name in _LLAMA3 if name not in scaling]
        if missing:
            return fields, [f"RoPE scaling of type 'llama3' without {', '.join(missing)}"]
        return {**fields, "rope_scaling": {"type": "llama3", **{name: scaling[name] for name in _LLAMA3}}}, []
    if kind != "yarn":
        return fields, [f"RoPE scaling of type {kind!r}"]
    if not scaling.get("truncate", True):
        return fields, ["YaRN with truncate=false"]
    original = raw.get(
        "original_max_position_embeddings", scaling.get("original_max_position_embeddings", max_positions)
    )
    factor = float(scaling.get("factor", max_positions / original))
    fields["rope_scaling"] = {
        **YARN,
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": float(scaling.get("beta_fast") or 32),
        "beta_slow": float(scaling.get("beta_slow") or 1),
        "attention_factor": float(scaling.get("attention_factor", _yarn_amplitude(factor, scaling))),
    }
    if factor > 1 and max_positions <= original:
        # In Transformers the factor alone turns YaRN on; here it is on if the context exceeds the original length.
        fields["max_position_embeddings"] = math.ceil(original * factor)
    return fields, []


def _yarn_amplitude(factor: float, scaling: dict[str, Any]) -> float:
    """The default factor on cos and sin. Source: Peng et al., YaRN, 2023, eq. 22; mscale: DeepSeek-V2."""

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return magnitude(scaling["mscale"]) / magnitude(scaling["mscale_all_dim"])
    return magnitude(1.0)
