"""The shape of the model that a stage trains, as far as options say it.

Purpose: `preset_config` for a new model, `pth_shape` for a MiniMind .pth, `check_shape_options` for a folder, whose config
    says everything.
Principle: weights bring their shape; an option either completes what they do not say or is compared with what they do.
Properties: no option of the shape is ever ignored: it acts, it agrees, or it is refused.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from minimind_fast.config import ModelConfig
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.errors import UserError
from minimind_fast.training.config import TrainConfig


def preset_name(config: TrainConfig) -> str:
    """The preset of --preset and --use_moe."""
    name = config.preset
    return f"{name.removesuffix('-small')}-moe" if config.use_moe and not name.endswith("-moe") else name


def check_shape_options(config: TrainConfig, model: ModelConfig) -> None:
    """Refuse options that ask for another model than the weights are.

    Args:
        config: its given options are compared.
        model: of the weights.

    Raises:
        UserError: names the option, and what the weights have.
    """
    shape = {"hidden_size": model.hidden_size, "num_hidden_layers": model.num_hidden_layers, "use_moe": model.use_moe}
    has = {"generation": model.generation, **shape, "norm_topk_prob": model.norm_topk_prob}
    wanted = {name: getattr(config, name) for name in (*shape, "norm_topk_prob") if config.why(name) == "given"}
    wanted = {name: value for name, value in wanted.items() if value or value is False}  # 0 and None: not overridden
    own = set(wanted)
    if config.why("preset") == "given":
        preset = ModelConfig.preset(config.preset)
        wanted = {**{name: getattr(preset, name) for name in ("generation", *shape)}, **wanted}
    for name, value in wanted.items():
        if value != has[name]:
            option = name if name in own else "preset"
            raise UserError(
                f"--{option} {getattr(config, option)} does not fit --from_weight {config.from_weight}: its {name} is "
                f"{has[name]}, not {value}; leave --{option} out, since weights bring their shape with them"
            )


def pth_shape(config: TrainConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """How `load_pretrained` is told the shape of a .pth: by its tensors and, where given, by the options.

    Args:
        config: read for preset, hidden_size, num_hidden_layers, use_moe, norm_topk_prob and dropout.
        tokenizer: sets the special ids.
    """
    if config.why("preset") == "given":
        if config.norm_topk_prob is None:  # a .pth is MiniMind's: its mixtures normalise
            config = dataclasses.replace(config, norm_topk_prob=True)
        shape = preset_config(config, tokenizer)
        return {"config": dataclasses.replace(shape, num_experts_per_tok=2 if shape.generation == 2 else 1)}
    told: dict[str, Any] = dict(
        bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id,
        dropout=config.dropout, max_position_embeddings=max(32768, config.max_seq_len),
    )  # fmt: skip
    names = ("hidden_size", "num_hidden_layers", "use_moe", "straight_through_router")
    told.update({name: getattr(config, name) for name in names if getattr(config, name)})
    if config.norm_topk_prob is not None:
        told["norm_topk_prob"] = config.norm_topk_prob
    return {"told": told}


def preset_config(config: TrainConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The model shape given by --preset and its overrides.

    Args:
        config: read for preset, hidden_size, num_hidden_layers, use_moe, norm_topk_prob and dropout.
        tokenizer: sets vocabulary size and special ids.
    """
    changes: dict[str, Any] = {"vocab_size": max(tokenizer.vocab_size, 6400), "dropout": config.dropout}
    changes.update(bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
    changes["max_position_embeddings"] = max(32768, config.max_seq_len)
    for field in ("hidden_size", "num_hidden_layers", "straight_through_router"):
        if getattr(config, field):
            changes[field] = getattr(config, field)
    if config.norm_topk_prob is not None:
        changes["norm_topk_prob"] = config.norm_topk_prob
    return ModelConfig.preset(preset_name(config), **changes)
