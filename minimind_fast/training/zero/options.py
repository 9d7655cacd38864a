"""Our options as a DeepSpeed config, overlaid with the user's own file.

Purpose: `deepspeed_config(options, ranks)`; `decided` turns what a user's file decided back into options.
Principle: options make the config; a user's file overrides options that were not given; a clash with a given option is an
    error that names both.
Properties: no tensors, no process group: the same options always give the same dict.

Source: DeepSpeed 0.19's config; ZeRO: Rajbhandari et al., 2020.
"""

from __future__ import annotations

from typing import Any

import torch

from minimind_fast.data.rows import read_object
from minimind_fast.errors import UserError
from minimind_fast.ops import precision
from minimind_fast.training.config import TrainConfig

# Elements in a bucket of gradients: 25 MB in bf16, as in PyTorch's DDP. A MiniMind never fills DeepSpeed's default of 500M,
# but it is allocated, twice with overlap. At stages 2 and 3 sending one bucket overlaps with filling the next; stages 0 and
# 1 send once, after the last backward pass, and overlap nothing.
REDUCE_BUCKET = 12_500_000


def choose_zero_stage(config: TrainConfig, world_size: int) -> int:
    """The requested stage, or 1; 0 for fp32 on one rank, which has nothing to partition.

    Stage 1 with bf16 is DeepSpeed's BF16 optimizer, which accumulates gradients in fp32 (stage 0 keeps them in bf16).
    Stages 0 and 1 send gradients once an optimizer step, 2 and 3 once a micro-batch. A MiniMind fits on any card, so the
    memory that 2 and 3 save is not worth their traffic.

    Args:
        config: read for zero_stage, dtype and offload.
        world_size: number of ranks.
    """
    if config.zero_stage >= 0:
        return config.zero_stage
    plain = precision.choose(config.dtype) == "float32" and config.offload == "none"
    return 0 if plain and world_size == 1 else 1


def deepspeed_config(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """Our options as a DeepSpeed config, overlaid with the user's own file.

    Args:
        config: the run's options.
        world_size: number of ranks.

    Raises:
        ValueError: the file clashes with an option (both are named), or an invalid combination.
    """
    dtype = precision.choose(config.dtype)
    stage = choose_zero_stage(config, world_size)
    if config.offload == "cpu" and stage == 0:
        raise UserError("--offload cpu needs --zero_stage 1, 2 or 3: stage 0 has no partitioned optimizer to move")
    made: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.batch_size,
        "gradient_accumulation_steps": config.accumulation_steps,
        "gradient_clipping": config.grad_clip,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            "contiguous_gradients": True,
            "overlap_comm": torch.cuda.is_available(),
            "reduce_bucket_size": REDUCE_BUCKET,
        },
        "timers": {"throughput": {"enabled": False}},  # on by default, it waits for the GPU at every micro-batch
        "checkpoint": {"load_universal": False},
    }
    if config.offload == "cpu":
        made["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if dtype == "bfloat16":
        # Stage 1: add each gradient to its fp32 sum as soon as it is ready, and free it.
        made["bf16"] = {"enabled": True, "immediate_grad_update": True}
    elif dtype == "float16":
        made["fp16"] = {"enabled": True, "initial_scale_power": 12}
    if config.deepspeed_config:
        _overlay(made, _read(config.deepspeed_config), config.deepspeed_config, config.given)
    stage = made["zero_optimization"]["stage"]
    dtype = dtype_of(made)
    if dtype == "float16" and stage == 0:
        raise UserError(  # it divides by the loss scale without having multiplied by it
            "float16 at ZeRO stage 0: DeepSpeed loses small gradients there; give --zero_stage 1, 2 or 3, or leave it out"
        )
    if dtype == "bfloat16" and stage > 0:
        made.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
        if stage == 1:  # else the fp32 sums are rounded to bf16 before the reduction
            made.setdefault("communication_data_type", "fp32")
    return made


# DeepSpeed's key -> our option with the same meaning.
_OPTION_OF = {
    "train_micro_batch_size_per_gpu": "batch_size",
    "gradient_accumulation_steps": "accumulation_steps",
    "gradient_clipping": "grad_clip",
    "zero_optimization.stage": "zero_stage",
    "zero_optimization.offload_optimizer": "offload",
    "bf16.enabled": "dtype",
    "fp16.enabled": "dtype",
    "optimizer": "optimizer, --learning_rate, --weight_decay, --beta1, --beta2",
    "scheduler": "lr_schedule, --warmup_steps",
}
_OURS_ONLY = ("optimizer", "scheduler", "train_batch_size")


def _read(file: str) -> dict[str, Any]:
    try:
        return read_object(file)
    except UserError as error:
        raise UserError(f"--deepspeed_config {error}") from None


def _overlay(made: dict[str, Any], theirs: dict[str, Any], file: str, given: frozenset[str], path: str = "") -> None:
    for key, value in theirs.items():
        name = f"{path}{key}"
        option = _OPTION_OF.get(name)
        if name in _OURS_ONLY:
            say = f"use --{option}" if option else "it follows from --batch_size, --accumulation_steps and the ranks"
            raise UserError(f"--deepspeed_config {file}: remove {name!r}; {say}")
        if option in given and made.get(key) != value:
            raise UserError(f"{name} = {value!r} in {file} clashes with --{option}: give one of the two")
        if isinstance(value, dict) and isinstance(made.get(key), dict):
            _overlay(made[key], value, file, given, f"{name}.")
        else:
            made[key] = value


def decided(ds: dict[str, Any]) -> dict[str, Any]:
    """The options that a DeepSpeed config determines.

    Args:
        ds: the result of `deepspeed_config`.

    Returns:
        option -> value: batch_size, accumulation_steps, grad_clip, zero_stage, dtype.
    """
    return {
        "batch_size": ds["train_micro_batch_size_per_gpu"],
        "accumulation_steps": ds["gradient_accumulation_steps"],
        "grad_clip": ds["gradient_clipping"],
        "zero_stage": ds["zero_optimization"]["stage"],
        "dtype": dtype_of(ds),
    }


def dtype_of(ds: dict[str, Any]) -> str:
    half = [name for key, name in (("bf16", "bfloat16"), ("fp16", "float16")) if ds.get(key, {}).get("enabled")]
    return half[0] if half else "float32"
