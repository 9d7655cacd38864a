"""The model under DeepSpeed; the only class that touches DeepSpeed's objects.

Purpose: `Engine(model, ...)` runs forward, backward and optimizer steps under any ZeRO stage, and saves and loads its state.
Principle: torch's fused AdamW, or Muon (`optimizers/`), which DeepSpeed wraps for each stage without building anything.
    Unwanted parts of its startup are patched out while it starts, then restored.
Properties: no compiler is needed. At stage 1 in bf16 and stage 0 in fp32 a step never waits for the device: norm, clipping
    and skipping stay there. Elsewhere it waits as often as DeepSpeed does, to look for overflow. Each DeepSpeed internal
    used here has a contract test named after it (tests/training/test_deepspeed_contract.py), so that an upgrade says what
    moved.

Source: DeepSpeed 0.19 (Rasley et al.); what experiments showed about it is noted where it is used.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from minimind_fast.errors import UserError
from minimind_fast.model import MiniMind, ModelOutput
from minimind_fast.ops import precision
from minimind_fast.training.config import TrainConfig
from minimind_fast.training.optimizers.muon import Muon, Place
from minimind_fast.training.ranks import world
from minimind_fast.training.zero.options import dtype_of

# ds_to_universal requires this at stages 1 and 2.
_CLIENT_STATE = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}


def param_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices decay, norms do not.

    Args:
        model: any module.
        weight_decay: AdamW's coefficient for the first group.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


def make_optimizer(model: MiniMind, config: TrainConfig, dtype: str) -> torch.optim.Optimizer:
    """The optimizer of --optimizer, before DeepSpeed wraps it.

    Args:
        model: on this rank's device.
        config: read for optimizer, weight_decay, beta1 and beta2.
        dtype: the training precision.

    Raises:
        UserError: Muon, and the model's matrices are frozen.
    """
    betas = (config.beta1, config.beta2)
    if config.optimizer == "adamw":
        # DeepSpeed steps once inside initialize() at stage 0 in bf16; lr=0 makes that a no-op.
        return torch.optim.AdamW(param_groups(model, config.weight_decay), lr=0.0, betas=betas, fused=True)
    device = next(model.parameters()).device
    fast = dtype != "float32" and precision.multiplies(torch.bfloat16, device.type) and not precision.before_ampere()
    return Muon(model, config.weight_decay, betas, torch.bfloat16 if fast else torch.float32, device)


@contextlib.contextmanager
def _patched(where: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute of a module while the block runs."""
    there, before = name in vars(where), vars(where).get(name)
    setattr(where, name, value)
    try:
        yield
    finally:
        setattr(where, name, before) if there else delattr(where, name)


@contextlib.contextmanager
def _started_quietly() -> Iterator[Any]:
    """Yield DeepSpeed; within the block it probes no compiler, builds no op and prints no startup messages."""
    import deepspeed
    import deepspeed.ops
    from deepspeed.runtime import bf16_optimizer, compiler

    # initialize() imports its Muon module, whose decorator pulls in torch's inductor: two seconds for nothing.
    with _patched(compiler, "compile", lambda *_, **__: lambda function: function), contextlib.suppress(ImportError):
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # The table of ops to build: without an entry DeepSpeed uses gloo and needs no compiler.
    with (
        _patched(deepspeed.ops, "__compatible_ops__", {}),
        _patched(bf16_optimizer, "see_memory_usage", lambda *_, **__: None),
    ):
        yield deepspeed


def _replaceable(optimizer: Any) -> bool:
    """Whether `_bf16_step` does all that a BF16_Optimizer's own step would."""
    unusual = optimizer.mpu is not None or optimizer.has_moe_layers or getattr(optimizer, "_uses_muon", False)
    return not unusual and optimizer.norm_type == 2 and optimizer.grad_acc_dtype == torch.float32


def _skip_if_infinite(adamw: Any, norm: torch.Tensor) -> None:
    """Let fused AdamW find out on the device whether to leave weights, moments and its counter as they are."""
    adamw.found_inf = norm.isfinite().logical_not().float()


@torch.no_grad()
def _bf16_step(optimizer: Any) -> None:
    """BF16_Optimizer's step, in which the host waits for nothing.

    The norm is taken over the flat sums of each group, not of each parameter (DeepSpeed launches one norm and one
    multiplication for each). Clipping and skipping are fused AdamW's own `grad_scale` and `found_inf`, on the device, where
    DeepSpeed asks the host three times.

    Args:
        optimizer: DeepSpeed's; its `_global_grad_norm` becomes the norm, on the device; `overflow` stays False, unknown.
    """
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(optimizer.fp32_groups_gradients_flat)))
    adamw = optimizer.optimizer
    _skip_if_infinite(adamw, norm)
    adamw.grad_scale = ((norm + 1e-6) / optimizer.clip_grad).clamp(min=1.0) if optimizer.clip_grad > 0 else None
    for master, grad in zip(
        optimizer.fp32_groups_flat_partition, optimizer.fp32_groups_gradient_flat_partition, strict=True
    ):
        master.grad = grad
    adamw.step()
    optimizer._lazy_init_hp_params_optimizer_state()
    optimizer.update_lp_params()
    optimizer.clear_hp_grads()
    optimizer._global_grad_norm, optimizer.overflow = norm, False


class Engine:
    """A model, its optimizer and their state, partitioned by ZeRO.

    Args:
        model: on this rank's device; every rank gets rank 0's weights.
        config: for the optimizer's options.
        ds: the DeepSpeed config, from `zero.deepspeed_config`.
        universal: whether the state to load is in DeepSpeed's universal format.

    Raises:
        ValueError: float16 on a CPU.
    """

    def __init__(self, model: MiniMind, config: TrainConfig, ds: Mapping[str, Any], universal: bool = False) -> None:
        with _started_quietly() as deepspeed:
            from deepspeed.accelerator import get_accelerator

            accelerator: Any = get_accelerator()
            made, dtype = copy.deepcopy(dict(ds)), dtype_of(dict(ds))
            made["checkpoint"]["load_universal"] = universal
            if dtype == "float16" and not accelerator.is_fp16_supported():
                raise UserError("--dtype float16 needs a GPU: DeepSpeed cannot train in it on a CPU; leave --dtype out")
            optimizer = make_optimizer(model, config, dtype)
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            for p in model.parameters():
                p.whole_numel = p.numel()  # type: ignore[attr-defined]  stage 3 leaves a shard of it
            exact = [p.detach().to("cpu", copy=True) for p in trained] if dtype != "float32" else []
            self._ds: Any
            self._ds, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=made)
        self.module, self.config, self.zero_stage = model, model.config, made["zero_optimization"]["stage"]
        self._adamw = optimizer
        self.grad_clip = made["gradient_clipping"]
        for state in optimizer.state.values():
            state["step"].zero_()  # the counter is that step's only trace: its gradients were zero
        for p, value in zip(trained, exact, strict=False):
            self._set_master(p, value)
        if isinstance(optimizer, Muon):
            optimizer.place(place for p in trained if (place := self._place(p)) is not None)
        bf16 = hasattr(self._ds.optimizer, "clear_hp_grads")
        if bf16:  # its step() clears the sums already; zero_grad() would clear them again
            self._ds.optimizer.zero_grad = functools.partial(self._ds.optimizer.clear_lp_grads, set_to_none=True)
            if _replaceable(self._ds.optimizer):
                self._ds.optimizer.step = functools.partial(_bf16_step, self._ds.optimizer)
        if world()[1] == 1 and (bf16 or self.zero_stage == 0):
            self._ds.enable_backward_allreduce = False  # reducing over one rank would copy all gradients back and forth
        # fp32 at stage 0: DeepSpeed neither checks for nan nor reports the norm, so `step` clips.
        self._plain = not hasattr(self._ds.optimizer, "overflow")
        if self._plain:
            self._ds._config.gradient_clipping = 0.0

    # ------------------------------------------------------------------------------------------------------- a step

    def __call__(self, *args: Any, **kwargs: Any) -> ModelOutput:
        """The model's forward."""
        return self._ds(*args, **kwargs)

    def backward(self, loss: torch.Tensor, last: bool = True) -> None:
        """Accumulate a micro-batch's gradients.

        Args:
            loss: () this rank's share of the step's loss, times the number of ranks.
            last: whether this is the optimizer step's last micro-batch.
        """
        self._ds.set_gradient_accumulation_boundary(last)
        self._ds.backward(loss, scale_wrt_gas=False)
        if not last:
            self._ds.step()

    def step(self, lr: float) -> torch.Tensor | None:
        """Take the optimizer step, after the last micro-batch's backward.

        Args:
            lr: learning rate.

        Returns:
            () gradient norm before clipping, where it was computed: reading it waits for the device. Not finite if the step
            was skipped because anything was not. None if DeepSpeed was told not to compute it.
        """
        for group in self._ds.optimizer.param_groups:
            group["lr"] = lr
        if self._plain:
            parameters = [p for p in self.module.parameters() if p.requires_grad]
            norm = torch.nn.utils.clip_grad_norm_(parameters, self.grad_clip or float("inf"))
            _skip_if_infinite(self._ds.optimizer, norm)
            self._ds.step()
            return norm
        self._ds.step()
        if self._ds.optimizer.overflow:
            return torch.tensor(float("inf"))
        norm = self._ds.get_global_grad_norm()
        return None if norm is None else torch.as_tensor(norm)

    # --------------------------------------------------------------------------------------------------- its weights

    @contextlib.contextmanager
    def gathered(self) -> Iterator[MiniMind]:
        """The module, with whole parameters on every rank while the block runs, at any ZeRO stage."""
        if self.zero_stage < 3:
            yield self.module
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.module.parameters()), modifier_rank=None):
            yield self.module

    def _set_master(self, parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
        """Set a 16-bit weight's fp32 master to the unrounded value; DeepSpeed copies the rounded weight.

        Rounded masters lose what fp16 files hold beyond bf16's 8 bits. Masters on bf16's grid are also rounded alike after
        each of the first steps, by up to a few per cent of an update.

        Args:
            parameter: one of the module's.
            value: in its shape, on the CPU.
        """
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        rank, ranks = world()
        value = value.to(parameter.device, torch.float32)
        if ranks > 1:
            dist.broadcast(value, 0)
        if self.zero_stage == 3:
            part = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            padded = torch.nn.functional.pad(value.flatten(), (0, part * ranks - value.numel()))
            safe_set_local_fp32_param(parameter, padded[rank * part : (rank + 1) * part])
        elif self.zero_stage > 0:
            safe_set_full_fp32_param(parameter, value)
        else:
            self._master(parameter).data.copy_(value)

    def _master(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """What AdamW moves for a parameter at stage 0: its fp32 master, or itself in float32."""
        optimizer = self._ds.optimizer
        groups = zip(getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=True)
        pairs = (pair for lows, highs in groups for pair in zip(lows, highs, strict=True))
        return next((high for low, high in pairs if low is parameter), parameter)

    @torch.no_grad()
    def set_moments(self, moments: Mapping[str, tuple[torch.Tensor, torch.Tensor]], step: int) -> None:
        """Go on with another AdamW's state, at ZeRO 0 to 2 without offload; all ranks call it with the same.

        Args:
            moments: (exp_avg, exp_avg_sq) of every parameter by its name, in its shape, float32.
            step: AdamW's steps so far.
        """
        from deepspeed.utils import safe_set_full_optimizer_state

        if self.zero_stage > 0:  # flat partitions have no state before a step, and then DeepSpeed has none to set
            for part in (p for group in self._adamw.param_groups for p in group["params"]):
                empty = {key: torch.zeros_like(part) for key in ("exp_avg", "exp_avg_sq")}
                self._adamw.state[part] = {"step": torch.zeros((), device=part.device), **empty}
            self._ds.optimizer._lazy_init_hp_params_optimizer_state()
        for name, p in self.module.named_parameters():
            values = dict(zip(("exp_avg", "exp_avg_sq"), moments[name], strict=True))
            if self.zero_stage > 0:
                for key, value in values.items():
                    safe_set_full_optimizer_state(p, value.to(p.device, torch.float32), key)
                continue
            master = self._master(p)
            self._adamw.state[master] = {
                "step": torch.zeros((), device=master.device),
                **{key: value.to(master.device, torch.float32, copy=True) for key, value in values.items()},
            }
        for state in self._adamw.state.values():
            state["step"].fill_(step)

    def _place(self, parameter: torch.nn.Parameter) -> Place | None:
        """Where this rank's part of a parameter lies in the float32 tensors that the optimizer steps; None: nowhere."""
        wrapper = self._ds.optimizer
        if self.zero_stage == 3:
            group, offset, numel = wrapper.grad_position[wrapper.get_param_id(parameter)]
            start = world()[0] * numel
            left = max(min(numel, parameter.ds_numel - start), 0)  # type: ignore[attr-defined]
            return Place(parameter, start, left, wrapper.fp32_partitioned_groups_flat[group], offset)
        if self.zero_stage > 0:
            at = parameter._hp_mapping  # type: ignore[attr-defined]
            if at is None:
                return None
            master = wrapper.optimizer.param_groups[at.param_group_index]["params"][0]
            inside = at.lp_fragment_address
            return Place(parameter, inside.start, inside.numel, master, at.hp_fragment_address.start)
        return Place(parameter, 0, parameter.numel(), self._master(parameter), 0)

    # ------------------------------------------------------------------------------------------------ state on disk

    @property
    def _partly_frozen(self) -> bool:
        return any(not p.requires_grad for p in self.module.parameters())

    def save(self, folder: Path, tag: str) -> None:
        """Write weights, masters and optimizer state to folder/tag, without frozen weights; all ranks call it.

        Args:
            folder: the run's checkpoints.
            tag: name of the new subfolder.
        """
        self._ds.save_checkpoint(
            str(folder),
            tag=tag,
            client_state=dict(_CLIENT_STATE),
            save_latest=False,
            exclude_frozen_parameters=self._partly_frozen,
        )

    def load(self, folder: Path, tag: str) -> None:
        """Read what `save` wrote; all ranks call it.

        Args:
            folder: the run's checkpoints.
            tag: name of the subfolder.

        Raises:
            ValueError: there is nothing to load.
        """
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self._ds.optimizer.param_groups]
        path, _ = self._ds.load_checkpoint(str(folder), tag=tag, load_module_strict=not self._partly_frozen)
        if path is None:
            raise UserError(f"{folder / tag}: DeepSpeed found nothing to load")
        for group, before in zip(self._ds.optimizer.param_groups, groups, strict=True):
            group.update(before)  # stage 3's universal format gives every group the first one's options,
        for state in self._ds.optimizer.state.values():
            state["step"] = state["step"].clone()  # and one counter to all, which each would move on


def to_universal(source: Path, target: Path) -> None:
    """Rewrite a checkpoint so that any number of ranks can load it; call on one rank.

    Args:
        source: a folder written by `Engine.save`.
        target: folder to write.

    Raises:
        RuntimeError: DeepSpeed's converter failed; the message has the end of its output.
    """
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(source), "--output_folder", str(target)]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{source} could not be rewritten for another number of ranks:\n{done.stderr[-2000:]}")
