"""The one training loop, for every stage.

Purpose: a stage gives a model, batches and a loss; `Trainer.run` does the rest: engine, schedule, accumulation, logs,
    validation, checkpoints, resume, a clean stop.
Principle: an optimizer step is a group of micro-batches. Their targets are counted over all ranks first, so that the loss
    is the mean over the counted tokens of the whole global batch, however they are spread. The position in the data, the
    random generators and the optimizer are saved together, so that a resumed run repeats the uninterrupted one bit for bit.
Properties: nothing waits for the GPU between log lines except DeepSpeed's own overflow check; a signal, a full disk or
    memory that runs out ends in a sentence, and never costs a finished checkpoint.
"""

from __future__ import annotations

import itertools
import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minimind_fast import ops
from minimind_fast.data.packing import Batch, Batches, Prefetcher
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.model import MiniMind, MoE
from minimind_fast.ops import precision
from minimind_fast.ops.attention import chosen, leave_out_of_compilation
from minimind_fast.training import engine as ds
from minimind_fast.training import graphs, resume
from minimind_fast.training.config import TrainConfig
from minimind_fast.training.log import Progress, clock, draw_loss, peak_flops
from minimind_fast.weights.checkpoint import check_replaceable, save_pretrained

SAVE_EVERY_S = 600  # with --save_interval 0
SECOND_SIGNAL_S = 2.0  # a launcher passes Ctrl-C on as SIGTERM at once; a later second signal means "now"


class TrainingStopped(RuntimeError):
    """The run cannot go on; the message says why and what to do."""


@dataclass
class StepLoss:
    """What a stage's loss function returns for one micro-batch.

    Attributes:
        total: () sum over counted units (tokens, pairs); the trainer divides by their number in the global batch.
        aux: () added as a mean over micro-batches, or None.
        metrics: further sums over counted units, for the log.
    """

    total: Tensor
    aux: Tensor | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)


LossFunction = Callable[[Any, Any], StepLoss]  # (engine, batch of the stage's own kind)


def learning_rate(config: TrainConfig, step: float, total: int) -> float:
    """Learning rate of a step.

    Args:
        config: learning_rate, lr_schedule, warmup_steps.
        step: optimizer steps done, from 0.
        total: optimizer steps of the whole run.

    Returns:
        Linear warmup, then MiniMind's lr * (0.1 + 0.45 * (1 + cos)) from 1 to a tenth ("minimind"), a cosine to zero
        ("cosine"), or a constant.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps) / max(total - config.warmup_steps, 1)
    wave = 1 + math.cos(math.pi * min(done, 1.0))
    floor, height = (0.1, 0.45) if config.lr_schedule == "minimind" else (0.0, 0.5)
    return config.learning_rate * (floor + height * wave)


class Trainer:
    """One run of one stage.

    Args:
        config: the options, checked.
        name: of the stage; the run's folder is save_dir/(save_weight or name).
        model: on the CPU; the same weights on every rank are ensured by DeepSpeed.
        tokenizer: saved with the weights.
        data: training batches of this rank.
        loss: (engine or model, batch) -> StepLoss.
        device: of `engine.prepare`.
        val_data: makes the batches of one validation pass, or None.
        count: units of a batch by which the loss is divided; its counted targets if None.
        save_weights: (model with whole weights, the run's folder) writes what the stage leaves behind; None: the model,
            to weights/.
    """

    def __init__(
        self,
        config: TrainConfig,
        name: str,
        model: MiniMind,
        tokenizer: Tokenizer,
        data: Batches,
        loss: LossFunction,
        device: torch.device,
        val_data: Callable[[], Iterable[Batch]] | None = None,
        count: Callable[[Any], float] | None = None,
        save_weights: Callable[[MiniMind, Path], None] | None = None,
    ) -> None:
        self.rank, self.world_size = ds.world()
        self.config, self.tokenizer, self.loss, self.val_data = config, tokenizer, loss, val_data
        self.count = count or (lambda batch: batch.num_targets)
        self.save_weights = save_weights
        # On a CPU the loader competes with the model for the same cores and gains nothing.
        ahead = device.type == "cuda" and not getattr(data, "needs_model", False)
        self.device, self.data = device, Prefetcher(data) if ahead else data
        self.folder = Path(config.save_dir) / (config.save_weight or name)
        self.checkpoint_folder, self.weights_folder = self.folder / "checkpoints", self.folder / "weights"
        self.step, self.useful_tokens, self.nonfinite = 0, 0, 0
        self._stop_signal, self._first_signal_at = 0, 0.0
        self._began, self._seconds_before, self._agreed_clock = time.monotonic(), 0.0, 0.0
        # Ranks agree over the host's network, so that no step waits for the GPU.
        on_gpus = device.type == "cuda" and self.world_size > 1
        self._talk = dist.new_group(backend="gloo") if on_gpus else None

        self.ds_config = ds.deepspeed_config(config, self.world_size)
        ds.adopt(config, self.ds_config)
        self.dtype = precision.of(config.dtype)
        checkpoint = self._find_checkpoint()
        self._frozen = resume.frozen_fingerprint(model)
        if checkpoint is not None:
            before = resume.read_state(checkpoint)
            if before["dtype"] != config.dtype:
                raise ValueError(
                    f"--from_resume: {checkpoint} was written with --dtype {before['dtype']}, this run has {config.dtype}: "
                    "give the same"
                )
            if before.get("frozen") != self._frozen:
                raise ValueError(
                    f"--from_resume: the frozen weights ({config.from_weight}) are not those that this run began with; give "
                    "the same --from_weight and the same targets, or leave --from_resume out to start anew"
                )
            self.ds_config["checkpoint"]["load_universal"] = resume.needs_universal(
                checkpoint, self.world_size, config.zero_stage
            )
        model.model.gradient_checkpointing = config.gradient_checkpointing
        self.model = model.to(device)
        self.kernels = ops.describe(device.type)
        self.attention = chosen(device.type, self.dtype)
        self.model.train()
        if config.cuda_graphs:
            graphs.check(config, self.model, device, self.attention[0])
        if config.use_compile:
            leave_out_of_compilation(self.attention[0])
            self.model.model.compile(dynamic=True)
        self.engine = ds.initialize(self.model, config, self.ds_config)
        if config.cuda_graphs:
            graphs.install(self.model)
        torch.manual_seed(config.seed + self.rank)  # dropout differs between ranks
        if checkpoint is not None:
            state = resume.load(self.engine, checkpoint)
            self.step, self.useful_tokens = state["step"], state["useful_tokens"]
            self.data.load_state_dict(state["data"])
            self._seconds_before = state["seconds"]
        self._position = self.data.state_dict()  # after the last group that was trained on
        self.total_steps = self._count_steps()
        self.progress: Progress | None = None

    # ------------------------------------------------------------------------------------------------------ the loop

    def run(self) -> None:
        """Train to the end, or to a signal; weights and a checkpoint are on disk when it returns.

        Raises:
            TrainingStopped: too many steps in a row were not finite, memory ran out, or the disk is full.
        """
        handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._run()
        except RuntimeError as error:  # a GPU's and the CPU allocator's words for the same thing
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            raise TrainingStopped(memory_advice(error, self.config, self.checkpoint_folder)) from None
        except OSError as error:
            raise TrainingStopped(str(error)) from None
        finally:
            for s, handler in handlers.items():
                signal.signal(s, handler)
            if self.progress is not None:
                self.progress.close()

    def _run(self) -> None:
        config = self.config
        if self.rank == 0:
            if self.step == 0:
                self._put_older_run_aside()
            if self.save_weights is None:
                check_replaceable(self.weights_folder)  # now rather than after an hour of training
            self.progress = Progress(
                *(self.folder, self.total_steps, self.step, config.options(), self.folder.name),
                use_wandb=config.use_wandb,
                use_swanlab=config.use_swanlab,
            )
            self._introduce()
        peak = peak_flops(self.device, self.dtype) if self.rank == 0 else (1.0, "")
        self._say(f"MFU is of {peak[0] / 1e12:.3g} TFLOP/s a device ({peak[1]}).")
        if self.step == 0:
            self.validate()  # what the stage begins with, so that its end can be judged
        window = Window()
        last_log, last_save = time.monotonic(), self._seconds_before
        self._began = last_log  # --max_minutes buys steps, not the start of a busy machine
        groups = self.groups()
        while self.step < self.total_steps:
            group = next(groups)
            counted, tokens, stopping, time_share = self._agree(group)
            if stopping:
                self._say(f"Stopping at step {self.step}, as asked; saving first.")
                break
            if time_share >= 1:
                self._say(f"Stopping at step {self.step}: --max_minutes {config.max_minutes:g} are over.")
                break
            lr, norm = self.train_step(group, counted, window, time_share)
            self.useful_tokens += int(tokens)
            window.useful_tokens += tokens
            if self.step % config.log_interval == 0 or self.step == self.total_steps:
                now = time.monotonic()
                self._log(window, lr, norm, now - last_log, peak[0])
                window, last_log = Window(), now
            if config.save_interval:
                due = self.step % config.save_interval == 0
            else:
                due = self._agreed_clock - last_save > SAVE_EVERY_S
            if config.val_interval and self.step % config.val_interval == 0:
                self.validate()
            if due and self.step < self.total_steps:
                self._save()
                last_save = self._agreed_clock
        self._save()
        if self.rank == 0:
            draw_loss(self.folder / "log.jsonl", self.folder / "loss.png", f"{self.folder.name}, {self.config.preset}")

    def groups(self) -> Iterator[list[Batch]]:
        """Micro-batches of each optimizer step; an epoch's last group may be shorter, none is lost."""
        while True:
            batches = iter(self.data)
            while group := list(itertools.islice(batches, self.config.accumulation_steps)):
                yield group

    def train_step(
        self, group: list[Batch], counted: float, window: Window, time_share: float = 0.0
    ) -> tuple[float, float | None]:
        """One optimizer step.

        Args:
            group: this rank's micro-batches.
            counted: units in the whole global batch.
            window: takes the sums for the log.
            time_share: of --max_minutes that is gone; the schedule follows whichever of steps and time is further.

        Returns:
            (learning rate, gradient norm if it is known).
        """
        lr = learning_rate(self.config, max(self.step, time_share * self.total_steps), self.total_steps)
        ds.set_lr(self.engine, lr)
        micro_batches = len(group)
        for i, batch in enumerate(group):
            window.add_work(batch)
            batch = batch.to(self.device, non_blocking=True)
            self.engine.set_gradient_accumulation_boundary(i == micro_batches - 1)
            # DeepSpeed averages gradients over ranks; the mean wanted is over counted units, so that undo it.
            if self.config.packing:
                factor = self.world_size / max(counted, 1.0)
            else:  # MiniMind's mean of micro-batch means
                factor = 1.0 / (max(self.count(batch), 1.0) * micro_batches)
            out = self.loss(self.engine, replace(batch, factor=factor))
            mean = out.total * factor
            if out.aux is not None:
                mean = mean + out.aux / micro_batches
            window.add_loss(out, 1.0 / micro_batches)
            self.engine.backward(mean, scale_wrt_gas=False)
            if i < micro_batches - 1:
                self.engine.step()
        window.counted += counted
        norm, finite = ds.finish_step(self.engine, self.config.grad_clip)
        self.step += 1
        self._position = self.data.state_dict()
        self._mind_nonfinite(finite, window)
        return lr, norm

    # --------------------------------------------------------------------------------------------------- agreement

    def _seconds(self) -> float:
        """Seconds of training so far, those before a resume included."""
        return self._seconds_before + time.monotonic() - self._began

    def _agree(self, group: list[Batch]) -> tuple[float, float, bool, float]:
        """(counted units and targets over all ranks, whether any was asked to stop, largest share of --max_minutes gone)."""
        counted, tokens = sum(self.count(b) for b in group), sum(b.num_targets for b in group)
        mine = [float(counted), float(bool(self._stop_signal)), self._seconds(), float(tokens)]
        everyone = torch.tensor([mine], dtype=torch.float64)
        if self.world_size > 1:
            parts = [torch.empty_like(everyone) for _ in range(self.world_size)]
            dist.all_gather(parts, everyone, group=self._talk)
            everyone = torch.cat(parts)
        limit = 60 * self.config.max_minutes
        self._agreed_clock = everyone[:, 2].max().item()
        share = self._agreed_clock / limit if limit else 0.0
        return everyone[:, 0].sum().item(), everyone[:, 3].sum().item(), bool(everyone[:, 1].any()), share

    def _on_signal(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        if self._stop_signal and now - self._first_signal_at > SECOND_SIGNAL_S:
            os._exit(128 + number)
        if not self._stop_signal:
            self._stop_signal, self._first_signal_at = number, now

    def _mind_nonfinite(self, finite: bool, window: Window) -> None:
        if finite:
            self.nonfinite = 0
            return
        self.nonfinite += 1
        window.skipped += 1
        self._say(
            f"Step {self.step}: the loss or a gradient is not finite; the step was skipped ({self.nonfinite} in a row)."
        )
        limit = self.config.max_nonfinite_steps
        if self.nonfinite >= limit and self.config.dtype != "float16" or self.nonfinite >= 2 * limit + 20:
            raise TrainingStopped(
                f"{self.nonfinite} steps in a row had a loss or gradient that is not finite. Lower --learning_rate "
                f"(now {self.config.learning_rate:g}), add --warmup_steps, or try --dtype float32. The last checkpoint "
                f"in {self.checkpoint_folder} is untouched."
            )

    # ------------------------------------------------------------------------------------------------ log, validate

    def _log(self, window: Window, lr: float, norm: float | None, seconds: float, peak: float) -> None:
        names, values = window.totals(self.model, self.device)
        if self.world_size > 1:
            dist.all_reduce(values)
        totals = dict(zip(names, values.tolist(), strict=True))
        if self.rank != 0:
            return
        counted = max(window.counted, 1.0)
        numbers: dict[str, Any] = {"loss": totals.pop("loss") / counted}
        aux, flops = totals.pop("aux"), totals.pop("flops")
        if window.has_aux:
            numbers["aux_loss"] = aux / max(window.steps, 1) / self.world_size
        numbers.update({name: total / counted for name, total in totals.items()})
        rate = window.useful_tokens / seconds
        numbers.update(lr=lr, tokens_per_s=rate, mfu=flops / seconds / (peak * self.world_size))
        if norm is not None:
            numbers["grad_norm"] = norm
        numbers.update(memory_gib=_peak_memory(self.device) / 2**30, useful_tokens=self.useful_tokens)
        numbers.update(skipped_steps=window.skipped, **_moe_numbers(self.model))
        left = (self.total_steps - self.step) * seconds / max(window.steps, 1)
        if self.config.max_minutes:
            left = min(left, max(60 * self.config.max_minutes - self._seconds(), 0.0))
        assert self.progress is not None
        self.progress.log(self.step, numbers, left)

    @torch.no_grad()
    def validate(self) -> float | None:
        """Mean loss over the validation data, on all ranks together.

        Returns:
            Nats per counted unit, or None without validation data.
        """
        if self.val_data is None:
            return None
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch in self.val_data():
            counted = self.count(batch)
            out = self.loss(self.engine, batch.to(self.device))
            sums += torch.stack([out.total.double(), torch.tensor(float(counted), device=self.device)])
        self.model.train()
        if self.world_size > 1:
            dist.all_reduce(sums)
        loss = (sums[0] / sums[1].clamp(min=1)).item()
        if self.progress is not None:
            self.progress.record(self.step, {"val_loss": loss})
            self.progress.say(f"Validation loss at step {self.step}: {loss:.4f}")
        return loss

    # -------------------------------------------------------------------------------------------- save and resume

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "seconds": self._seconds(),
            "useful_tokens": self.useful_tokens,
            "data": {name: value for name, value in self._position.items() if name != "own"},
            "frozen": self._frozen,
            "zero_stage": self.config.zero_stage,
            "dtype": self.config.dtype,
            "options": self.config.options(),
        }

    def _save(self) -> None:
        """A checkpoint to go on from, and the weights as a folder that stands alone."""
        if self.config.val_interval == 0 or self.step >= self.total_steps:
            self.validate()
        own = self._position.get("own")
        resume.save(self.engine, self.checkpoint_folder, self._state(), self.config.keep_checkpoints, own)
        with ds.gathered(self.engine):
            if self.rank == 0 and self.save_weights is not None:
                self.save_weights(self.model, self.folder)
            elif self.rank == 0:
                save_pretrained(self.model, self.weights_folder, tokenizer=self.tokenizer)
        dist.barrier()

    def _find_checkpoint(self) -> Path | None:
        if not self.config.from_resume:
            return None
        found = resume.checkpoints(self.checkpoint_folder)
        if not found:
            raise ValueError(f"--from_resume: no checkpoint in {self.checkpoint_folder}; leave it out to start anew")
        return found[-1]

    def _put_older_run_aside(self) -> None:
        """A new run never mixes its checkpoints with those of an older one of the same name; the older stay."""
        if not resume.checkpoints(self.checkpoint_folder):
            return
        for i in itertools.count(1):
            aside = self.folder.with_name(f"{self.folder.name}.old{i}")
            if not aside.exists():
                self.folder.rename(aside)
                print(f"An older run was moved from {self.folder} to {aside}.", flush=True)
                return

    def _count_steps(self) -> int:
        """Optimizer steps of the whole run, those before a resume included."""
        config, step = self.config, self.step
        current = self.data.state_dict()["epoch"]
        for epoch in range(current, config.epochs):
            batches = self.data.num_left() if epoch == current else self.data.num_batches(epoch)
            step += -(-batches // config.accumulation_steps)
        return min(step, config.max_steps) if config.max_steps else step

    # ---------------------------------------------------------------------------------------------------- words

    def _say(self, text: str) -> None:
        if self.progress is not None:
            self.progress.say(text)

    def _introduce(self) -> None:
        c, m = self.config, self.model
        size, active = m.num_parameters() / 1e6, m.num_parameters(active=True) / 1e6
        tokens = getattr(self.data, "batch_tokens", c.batch_size * c.max_seq_len)
        extra = f" ({active:.1f}M active)" if m.config.use_moe else ""
        if self._frozen is not None:
            extra += f" ({m.num_parameters(trained=True) / 1e6:.2f}M of them trained)"
        device = (
            torch.cuda.get_device_name() if self.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        )
        name = c.preset if c.from_weight == "none" else f"From {c.from_weight}"
        self._say(
            f"{name}: {size:.1f}M parameters{extra}, {c.dtype}, ZeRO {c.zero_stage}, {self.world_size} x {device}."
        )
        self._say(
            f"{self.total_steps} optimizer steps of {c.accumulation_steps * self.world_size} x up to "
            f"{tokens:,} tokens; attention: {self.attention[0]} ({self.attention[1]})."
        )
        groups: dict[str, list[str]] = {}
        for name, how in self.kernels.items():
            groups.setdefault(how, []).append(name)
        self._say("Ops: " + "; ".join(f"{', '.join(names)} by {how}" for how, names in groups.items()) + ".")
        if not precision.multiplies(self.dtype, self.device.type):
            self._say(
                f"Note: this CPU has no instructions for {c.dtype} and is many times faster in float32 (--dtype auto)."
            )
        if c.cuda_graphs:
            self._say("Forward and backward are replayed as CUDA graphs, captured when a shape comes a second time.")
        if not m.config.router_gets_lm_gradient:
            self._say(
                "Note: normalised top-1 routing gives the router no gradient from the language-model loss (MiniMind's "
                "own form); --no_norm_topk_prob is the form that learns."
            )
        if self.step:
            self._say(f"Going on from step {self.step} ({self.useful_tokens:,} tokens).")


def memory_advice(error: BaseException, c: TrainConfig, checkpoints: Path) -> str:
    """What to lower when memory ran out, with numbers.

    Args:
        error: of the allocator.
        c: the run's options.
        checkpoints: folder that is named as untouched.
    """
    return (
        f"Out of memory ({str(error).splitlines()[0]}). A micro-batch is {c.batch_size} x {c.max_seq_len} tokens: try "
        f"--batch_size {max(c.batch_size // 2, 1)} --accumulation_steps {c.accumulation_steps * 2} (the same optimizer "
        "step in half the memory), --gradient_checkpointing, or --zero_stage 2 on several GPUs. Checkpoints in "
        f"{checkpoints} are untouched."
    )


class Window:
    """Sums between two log lines; tensors stay on the device until `totals`."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.tokens, self.pairs = 0, 0  # positions through the model, and pairs of them that attend
        self.counted = self.steps = self.useful_tokens = 0.0
        self.skipped, self.has_aux = 0, False

    def add_work(self, batch: Batch) -> None:
        if batch.cu_seqlens is None:
            rows, length = batch.input_ids.shape
            self.pairs += rows * length * (length + 1) // 2
        else:
            n = batch.cu_seqlens.diff().long()
            self.pairs += int((n * (n + 1) // 2).sum())
        self.tokens += batch.input_ids.numel()

    def add_loss(self, out: StepLoss, share: float) -> None:
        self._add("loss", out.total)
        if out.aux is not None:
            self.has_aux = True
            self._add("aux", out.aux * share)
        for name, value in out.metrics.items():
            self._add(name, value)
        self.steps += share

    def _add(self, name: str, value: Tensor) -> None:
        value = value.detach().double()
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def totals(self, model: MiniMind, device: torch.device) -> tuple[list[str], Tensor]:
        """(names, values) with loss, aux and flops always among them, in the same order on every rank."""
        zero = torch.zeros((), dtype=torch.float64, device=device)
        known = {"loss": zero, "aux": zero, **self.sums, "flops": zero + model.flops(self.tokens, self.pairs)}
        names = sorted(known)
        return names, torch.stack([known[n] for n in names])


def _peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the process's peak resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _moe_numbers(model: MiniMind) -> dict[str, Any]:
    """Expert load of the last micro-batch: max/mean by layer, router entropy, experts that got nothing."""
    layers = [m for m in model.modules() if isinstance(m, MoE) and m.last_counts is not None]
    if not layers:
        return {}
    counts = torch.stack([m.last_counts for m in layers if m.last_counts is not None]).double().cpu()
    scores = torch.stack([m.last_scores for m in layers if m.last_scores is not None])
    share = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    imbalance = share.max(-1).values * counts.shape[-1]
    return {
        "expert_imbalance": imbalance.mean().item(),
        "router_entropy": -torch.special.xlogy(scores, scores).sum(-1).mean().item(),
        "dead_experts": int((counts == 0).sum()),
        "expert_load": [[round(x, 4) for x in row] for row in share.tolist()],
    }


def finished(trainer: Trainer, seconds: float) -> str:
    """The last lines of a run, for people.

    Args:
        trainer: after `run`.
        seconds: of the whole run.
    """
    return (
        f"Done: {trainer.step} steps, {trainer.useful_tokens:,} tokens in {clock(seconds)}.\n"
        f"  weights      {trainer.weights_folder}\n"
        f"  loss curve   {trainer.folder / 'loss.png'}  (log.jsonl and tensorboard/ beside it)\n"
        f"  checkpoints  {trainer.checkpoint_folder}  (go on with --from_resume)"
    )
