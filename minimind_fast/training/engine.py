"""DeepSpeed, started quietly and set up from our options; the one file that imports it.

Purpose: `prepare()` before anything else, `initialize(model, config)` for an engine; the same under `deepspeed`,
    `torchrun` and plain `python`, on GPUs and on a CPU.
Principle: our options make a DeepSpeed config; a user's own file is laid over it, and a clash with an option that was
    given is an error. The optimizer is torch's fused AdamW, which DeepSpeed wraps for each ZeRO stage without building
    anything.
Properties: no compiler is needed; no environment variable has to be set; the start takes seconds on a CPU.

Source: DeepSpeed 0.19 (Rasley et al.), ZeRO (Rajbhandari et al., 2020); what was learned about it by experiment stands
    at the lines that use it.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import json
import logging
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from minimind_fast.model import MiniMind
from minimind_fast.ops import precision
from minimind_fast.training.config import TrainConfig

# Elements of a bucket of gradients, 25 MB in bf16 as in PyTorch's DDP: a model fills several, so that sending one overlaps
# with making the next. DeepSpeed's own 500M are never filled, but allocated, twice with overlap.
REDUCE_BUCKET = 12_500_000


def prepare(num_threads: int = 0) -> torch.device:
    """Make this process a rank, whoever started it, and say on which device.

    Args:
        num_threads: CPU threads of this rank; 0 shares the cores among the ranks of this machine.

    Returns:
        The rank's device.
    """
    if "RANK" not in os.environ:  # plain `python train/pretrain.py`: a world of one on a free port
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        one = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        os.environ.update(one, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or os.environ["WORLD_SIZE"])
        torch.set_num_threads(num_threads or max(1, (os.cpu_count() or 1) // here))
        keep_freed_memory()
    warnings.filterwarnings("ignore", category=FutureWarning, message=r".*`torch\.distributed\..*` is deprecated")
    warnings.filterwarnings("ignore", message=r".*barrier\(\).*device")
    _import_deepspeed()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
    if not dist.is_initialized():
        dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
    return device


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, instead of giving each large tensor back and having its pages cleared anew.

    What it brings stands in docs/en/cpu.md. Nothing happens where the C library has no mallopt.
    """
    m_trim_threshold, m_mmap_max = -1, -4
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_max, 0)  # take large blocks from the heap too
        libc.mallopt(m_trim_threshold, 2**31 - 1)  # and never shrink it


def _import_deepspeed() -> None:
    """Import it without its probe of compilers, and without the shared-memory op that it would build for a minute."""
    import deepspeed
    import deepspeed.ops
    from deepspeed.runtime import compiler

    deepspeed.ops.__compatible_ops__ = {}
    # Its Muon module is imported by initialize(); a decorator there pulls in torch's inductor, two seconds for nothing.
    kept, compiler.compile = compiler.compile, lambda *_, **__: lambda function: function
    with contextlib.suppress(ImportError):
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    compiler.compile = kept
    from deepspeed.runtime import bf16_optimizer

    bf16_optimizer.see_memory_usage = lambda *_, **__: None  # it prints a dozen lines at every start, with no switch
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def world() -> tuple[int, int]:
    """(rank, world size)."""
    return dist.get_rank(), dist.get_world_size()


def leave(code: int = 0) -> None:
    """Leave the world; one of several ranks ends here, with all its output written.

    A gloo thread may still hold the last collective's tensors, which DeepSpeed's groups keep alive: if it frees them
    while the interpreter shuts down, the process aborts ("terminate called without an active exception").

    Args:
        code: exit code of the process.

    Source: https://github.com/pytorch/pytorch/issues/190489.
    """
    if not dist.is_initialized():
        return
    several = dist.get_world_size() > 1
    dist.destroy_process_group()
    if several:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def choose_zero_stage(config: TrainConfig, world_size: int) -> int:
    """The stage asked for, or 1; plain fp32 on one rank takes 0, as there is nothing to partition.

    Stage 1 with bf16 is DeepSpeed's BF16 optimizer, which accumulates gradients in fp32 (stage 0 keeps them in bf16).
    Stages 0 and 1 send gradients once an optimizer step, 2 and 3 once a micro-batch; a MiniMind fits every card, so
    that the memory which 2 and 3 save is not worth their traffic.

    Args:
        config: zero_stage, dtype, offload.
        world_size: number of ranks.
    """
    if config.zero_stage >= 0:
        return config.zero_stage
    return 0 if config.dtype == "float32" and world_size == 1 and config.offload == "none" else 1


def deepspeed_config(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """Our options as a DeepSpeed config, the user's own file laid over it.

    Args:
        config: the run's options.
        world_size: number of ranks.

    Raises:
        ValueError: a clash between the file and an option (both are named), or a combination that cannot be.
    """
    config = dataclasses.replace(config, dtype=precision.choose(config.dtype))
    stage = choose_zero_stage(config, world_size)
    if config.offload == "cpu" and stage == 0:
        raise ValueError("--offload cpu needs --zero_stage 1, 2 or 3: stage 0 has no partitioned optimizer to move")
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
    if config.dtype == "bfloat16":
        # At stage 1 a gradient is added to its fp32 sum as soon as it is there, and freed.
        made["bf16"] = {"enabled": True, "immediate_grad_update": True}
    elif config.dtype == "float16":
        made["fp16"] = {"enabled": True, "initial_scale_power": 12}
    if config.deepspeed_config:
        _overlay(made, _read(config.deepspeed_config), config.deepspeed_config, config.given)
    stage = made["zero_optimization"]["stage"]
    dtype = _dtype_of(made)
    if dtype == "float16" and stage == 0:
        raise ValueError(  # it divides by the loss's scale without having multiplied by it
            "float16 at ZeRO stage 0: DeepSpeed loses small gradients there; give --zero_stage 1, 2 or 3, or leave it out"
        )
    if dtype == "bfloat16" and stage > 0:
        made.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
        if stage == 1:  # else the fp32 sums are rounded to bf16 before they are reduced
            made.setdefault("communication_data_type", "fp32")
    return made


# DeepSpeed's key -> the option of ours that says the same.
_OPTION_OF = {
    "train_micro_batch_size_per_gpu": "batch_size",
    "gradient_accumulation_steps": "accumulation_steps",
    "gradient_clipping": "grad_clip",
    "zero_optimization.stage": "zero_stage",
    "zero_optimization.offload_optimizer": "offload",
    "bf16.enabled": "dtype",
    "fp16.enabled": "dtype",
    "optimizer": "learning_rate, --weight_decay, --beta1, --beta2",
    "scheduler": "lr_schedule, --warmup_steps",
}
_OURS_ONLY = ("optimizer", "scheduler", "train_batch_size")


def _read(file: str) -> dict[str, Any]:
    try:
        raw = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--deepspeed_config {file}: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"--deepspeed_config {file}: must hold a JSON object")
    return raw


def _overlay(made: dict[str, Any], theirs: dict[str, Any], file: str, given: set[str], path: str = "") -> None:
    for key, value in theirs.items():
        name = f"{path}{key}"
        option = _OPTION_OF.get(name)
        if name in _OURS_ONLY:
            say = f"use --{option}" if option else "it follows from --batch_size, --accumulation_steps and the ranks"
            raise ValueError(f"--deepspeed_config {file}: remove {name!r}; {say}")
        if option in given and made.get(key) != value:
            raise ValueError(f"{name} = {value!r} in {file} clashes with --{option}: give one of the two")
        if isinstance(value, dict) and isinstance(made.get(key), dict):
            _overlay(made[key], value, file, given, f"{name}.")
        else:
            made[key] = value


def adopt(config: TrainConfig, ds: dict[str, Any]) -> None:
    """Let the options say what a user's DeepSpeed file decided.

    Args:
        config: changed in place.
        ds: of `deepspeed_config`.
    """
    config.batch_size = ds["train_micro_batch_size_per_gpu"]
    config.accumulation_steps = ds["gradient_accumulation_steps"]
    config.grad_clip = ds["gradient_clipping"]
    config.zero_stage = ds["zero_optimization"]["stage"]
    config.dtype = _dtype_of(ds)


def _dtype_of(ds: dict[str, Any]) -> str:
    half = [name for key, name in (("bf16", "bfloat16"), ("fp16", "float16")) if ds.get(key, {}).get("enabled")]
    return half[0] if half else "float32"


def param_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices decay, norms do not.

    Args:
        model: the model.
        weight_decay: of the first group.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


def initialize(model: MiniMind, config: TrainConfig, ds: dict[str, Any]) -> Any:
    """A DeepSpeed engine around the model.

    Args:
        model: on this rank's device; every rank gets rank 0's weights.
        config: optimizer options.
        ds: of `deepspeed_config`.

    Returns:
        deepspeed.DeepSpeedEngine.

    Raises:
        ValueError: float16 on a CPU.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    dtype = _dtype_of(ds)
    if dtype == "float16" and not accelerator.is_fp16_supported():
        raise ValueError("--dtype float16 needs a GPU: DeepSpeed does not train in it on a CPU; leave --dtype out")
    groups = param_groups(model, config.weight_decay)
    # lr 0: with bf16 and stage 0 DeepSpeed takes an optimizer step while it starts; so it must move nothing.
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), fused=True)
    trained = [p for group in groups for p in group["params"]]
    exact = [p.detach().to("cpu", copy=True) for p in trained] if dtype != "float32" else []
    engine: Any
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds)
    for state in optimizer.state.values():
        state["step"].zero_()  # of that same step: its gradients were zero, so the counter is all that it left
    for p, value in zip(trained, exact, strict=False):
        _set_master(engine, p, value)
    bf16 = hasattr(engine.optimizer, "clear_hp_grads")
    if bf16:  # its step() leaves the sums cleared, and zero_grad() would clear them again
        engine.optimizer.zero_grad = functools.partial(engine.optimizer.clear_lp_grads, set_to_none=True)
    if world()[1] == 1 and (bf16 or engine.zero_optimization_stage() == 0):
        engine.enable_backward_allreduce = False  # a reduction among one: it would copy all gradients, and back again
    if not hasattr(engine.optimizer, "overflow"):
        engine._config.gradient_clipping = 0.0  # `finish_step` clips, because it needs the norm
    return engine


def _set_master(engine: Any, parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Give a 16-bit weight's float32 master the value from before the rounding; DeepSpeed copies it from the rounded weight.

    That would lose what fp16 files have beyond bf16's 8 bits. And masters that all lie on bf16's grid are rounded alike
    after each of the first steps, by up to some per cent of an update.

    Args:
        engine: of DeepSpeed; any ZeRO stage.
        parameter: of its module.
        value: on the CPU, the same shape.
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    rank, ranks = world()
    value = value.to(parameter.device, torch.float32)
    if ranks > 1:
        dist.broadcast(value, 0)
    if engine.zero_optimization_stage() == 3:
        part = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        padded = torch.nn.functional.pad(value.flatten(), (0, part * ranks - value.numel()))
        safe_set_local_fp32_param(parameter, padded[rank * part : (rank + 1) * part])
    elif engine.zero_optimization_stage() > 0:
        safe_set_full_fp32_param(parameter, value)
    else:
        groups = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
        masters = (high for lows, highs in groups for low, high in zip(lows, highs, strict=True) if low is parameter)
        next(masters).data.copy_(value)


def set_lr(engine: Any, lr: float) -> None:
    """Set the learning rate of the next step.

    Args:
        engine: of `initialize`.
        lr: learning rate.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def finish_step(engine: Any, grad_clip: float) -> tuple[float | None, bool]:
    """Take the optimizer step of an accumulation boundary.

    Args:
        engine: of `initialize`, its gradients complete.
        grad_clip: largest gradient norm, 0 for none; DeepSpeed clips by its config except in plain fp32.

    Returns:
        (gradient norm if it is known, whether the step was taken: False when something was not finite).
    """
    plain = not hasattr(engine.optimizer, "overflow")  # fp32 at stage 0: DeepSpeed neither checks nor tells the norm
    if not plain:
        engine.step()
        norm = engine.get_global_grad_norm()
        return None if norm is None else float(norm), not engine.optimizer.overflow
    parameters = [p for p in engine.module.parameters() if p.requires_grad]
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, grad_clip or float("inf")))
    finite = norm == norm and norm != float("inf")
    if finite:
        engine.step()
    else:
        engine.zero_grad()
        engine.micro_steps += 1
    return norm, finite


@contextlib.contextmanager
def gathered(engine: Any) -> Iterator[None]:
    """All parameters whole on rank 0 while the block runs, whatever the ZeRO stage."""
    import deepspeed

    if engine.zero_optimization_stage() < 3:
        yield
        return
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), modifier_rank=None):
        yield


def to_universal(source: Path, target: Path) -> None:
    """Rewrite a checkpoint so that any number of ranks can load it; call on one rank.

    Args:
        source: a checkpoint folder written by `engine.save_checkpoint`.
        target: folder to write.
    """
    import subprocess

    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(source), "--output_folder", str(target)]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{source} could not be rewritten for another number of ranks:\n{done.stderr[-2000:]}")
