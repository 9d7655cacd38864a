"""The one training loop, for every stage.

Purpose: a stage provides an engine, batches and a loss; `Trainer.run` does the rest: schedule, accumulation, logs,
    validation, checkpoints, a clean stop.
Principle: an optimizer step is a group of micro-batches. Their targets are first counted over all ranks, so that the loss
    is the mean over the counted tokens of the global batch, however distributed. Data position, random generators and
    optimizer are saved together: a resumed run matches an uninterrupted one bit for bit.
Properties: between log lines nothing waits for the GPU but what DeepSpeed's own steps ask it for (see the engine): how a
    step went is read at the next log line. A signal, a full disk or running out of memory ends in one sentence, and never
    costs a finished checkpoint.
"""

from __future__ import annotations

import itertools
import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minimind_fast import ops
from minimind_fast.data.batches import Batch, Batches
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.errors import TrainingStopped
from minimind_fast.model import MiniMind
from minimind_fast.ops.cards import peak_flops
from minimind_fast.training import ranks, resume, words
from minimind_fast.training.config import TrainConfig
from minimind_fast.training.log import Progress, Window, draw_loss, expert_load, peak_memory
from minimind_fast.training.losses import LossFunction
from minimind_fast.training.ranks import world
from minimind_fast.training.run import Run
from minimind_fast.training.zero.engine import Engine
from minimind_fast.weights.checkpoint import save_pretrained
from minimind_fast.weights.files import Hold, check_replaceable

SAVE_EVERY_S = 600  # with --save_interval 0
UNREAD_STEPS = 100  # whose outcome is read at the latest then, however rare log lines are
# A lost terminal, and Slurm's --signal=USR1: end as for SIGTERM, and never at once.
_WARNINGS = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGUSR1") if hasattr(signal, name))
_SIGNALS = (signal.SIGINT, signal.SIGTERM, *_WARNINGS)
SECOND_SIGNAL_S = 2.0  # a launcher forwards Ctrl-C as SIGTERM at once; a second signal after this means "now"


@dataclass(frozen=True)
class Hooks:
    """Where a stage differs from predicting the next token.

    Attributes:
        val_data: makes the batches of one validation pass.
        count: how many units of a batch the loss is divided by.
        save_weights: (model with whole weights, the run's folder) writes the stage's result; None: the model.
    """

    val_data: Callable[[], Iterable[Batch]] | None = None
    count: Callable[[Any], float] = lambda batch: batch.num_targets
    save_weights: Callable[[MiniMind, Path], None] | None = None


def learning_rate(config: TrainConfig, step: float, total: int) -> float:
    """Learning rate of a step.

    Args:
        config: read for learning_rate, lr_schedule and warmup_steps.
        step: optimizer steps done, from 0.
        total: optimizer steps in the whole run.

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
        run: the resolved run.
        engine: holds the model.
        tokenizer: saved with the weights.
        data: this rank's training batches, positioned where the run begins.
        loss: (engine, batch) -> StepLoss.
        device: this rank's.
        hooks: where the stage differs.
        start: where the run begins.
        frozen: fingerprint of the frozen weights, or None.
        trained: `resume.shapes` of the model; None: not noted in checkpoints.
    """

    def __init__(
        self,
        run: Run,
        engine: Engine,
        tokenizer: Tokenizer,
        data: Batches,
        loss: LossFunction,
        device: torch.device,
        hooks: Hooks | None = None,
        start: resume.Start | None = None,
        frozen: str | None = None,
        trained: dict[str, list[int]] | None = None,
    ) -> None:
        self.plan, self.config, self.engine, self.model = run, run.config, engine, engine.module
        self.tokenizer, self.data, self.loss, self.device = tokenizer, data, loss, device
        self.hooks, self.start, self.frozen = hooks or Hooks(), start or resume.Start(), frozen
        self._trained, self._hold = trained, Hold(run.folder)
        self.rank, self.world_size = world()
        self.step, self.useful_tokens, self.nonfinite = self.start.step, self.start.useful_tokens, 0
        self._unread: list[Tensor | None] = []  # gradient norms, of the last steps
        self.total_steps = self._count_steps()
        self.progress: Progress | None = None
        self._stop_signal, self._first_signal_at = 0, 0.0
        self._began, self._agreed_clock = time.monotonic(), 0.0
        self._position = data.state_dict()  # after the last trained group
        # Ranks agree through the host (gloo), so that no step waits for the GPU.
        on_gpus = device.type == "cuda" and self.world_size > 1
        self._talk = dist.new_group(backend="gloo") if on_gpus else None

    # ------------------------------------------------------------------------------------------------------ the loop

    def run(self) -> None:
        """Train to the end, or to a signal; weights and a checkpoint are on disk when it returns.

        Raises:
            TrainingStopped: too many non-finite steps in a row, out of memory, or a full disk.
        """
        heard = [s for s in _SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]  # nohup ignores SIGHUP
        handlers = {s: signal.signal(s, self._on_signal) for s in heard}
        try:
            self._run()
        except RuntimeError as error:  # GPU and CPU allocators word it differently
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            raise TrainingStopped(words.memory_advice(error, self.config, self.plan.checkpoints)) from None
        except OSError as error:
            raise TrainingStopped(str(error)) from None
        finally:
            for s, handler in handlers.items():
                signal.signal(s, handler)
            if self.progress is not None:
                self.progress.close()
            self._hold.release()

    def _run(self) -> None:
        config = self.config
        ranks.first(self._open_folder)
        if self.rank == 0:
            tokens = getattr(self.data, "batch_tokens", config.batch_size * config.max_seq_len)
            shape = (self.model, self.device.type, self.total_steps, tokens)
            for line in words.introduction(self.plan, *shape, self.frozen is not None, self.start):
                self._say(line)
        peak = peak_flops(self.device, self.plan.dtype) if self.rank == 0 else (1.0, "")
        self._say(f"MFU is of {peak[0] / 1e12:.3g} TFLOP/s a device ({peak[1]}).")
        if not self.start.resumed:
            self.validate()  # the baseline for judging the end
        window = Window()
        last_log, last_save = time.monotonic(), self.start.seconds
        self._began = last_log  # --max_minutes counts training only, not a slow start
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
            lr = self.train_step(group, counted, window, time_share)
            self.useful_tokens += int(tokens)
            window.useful_tokens += tokens
            if self.step % config.log_interval == 0 or self.step == self.total_steps:
                norm, now = self._read_outcomes(window), time.monotonic()
                self._log(window, lr, norm, now - last_log, peak[0])
                window, last_log = Window(), now
            if config.save_interval:
                due = self.step % config.save_interval == 0
            else:
                due = self._agreed_clock - last_save > SAVE_EVERY_S
            if config.val_interval and self.step % config.val_interval == 0:
                self.validate()
            if due and self.step < self.total_steps:
                self._read_outcomes(window)
                self._save()
                last_save = self._agreed_clock
        self._read_outcomes(window)
        self._save()
        if self.rank == 0:
            folder = self.plan.folder
            draw_loss(folder / "log.jsonl", folder / "loss.png", f"{folder.name}, {self.plan.title}")

    def groups(self) -> Iterator[list[Batch]]:
        """The micro-batches of each optimizer step; an epoch's last group may be shorter, none is dropped."""
        while True:
            batches = iter(self.data)
            while group := list(itertools.islice(batches, self.config.accumulation_steps)):
                yield group

    def train_step(self, group: list[Batch], counted: float, window: Window, time_share: float = 0.0) -> float:
        """One optimizer step.

        Args:
            group: this rank's micro-batches.
            counted: units in the global batch.
            window: collects the sums for the log.
            time_share: fraction of --max_minutes used; the schedule follows steps or time, whichever is further.

        Returns:
            The learning rate.
        """
        lr = learning_rate(self.config, max(self.step, time_share * self.total_steps), self.total_steps)
        micro_batches = len(group)
        for i, batch in enumerate(group):
            window.add_work(batch)
            batch = batch.to(self.device, non_blocking=True)
            # DeepSpeed averages gradients over ranks; we want the mean over counted units.
            if self.config.packing:
                factor = self.world_size / max(counted, 1.0)
            else:  # MiniMind's mean of micro-batch means
                factor = 1.0 / (max(self.hooks.count(batch), 1.0) * micro_batches)
            out = self.loss(self.engine, replace(batch, factor=factor))
            mean = out.total * factor
            if out.aux is not None:
                mean = mean + out.aux / micro_batches
            window.add_loss(out, 1.0 / micro_batches)
            self.engine.backward(mean, last=i == micro_batches - 1)
        window.counted += counted
        if len(self._unread) == UNREAD_STEPS:
            self._read_outcomes(window)
        self._unread.append(self.engine.step(lr))
        self.step += 1
        self._position = self.data.state_dict()
        return lr

    # --------------------------------------------------------------------------------------------------- agreement

    def _seconds(self) -> float:
        """Seconds of training so far, including those before a resume."""
        return self.start.seconds + time.monotonic() - self._began

    def _agree(self, group: list[Batch]) -> tuple[float, float, bool, float]:
        """(counted units, targets: over all ranks; whether any must stop; largest share of --max_minutes used)."""
        counted, tokens = sum(self.hooks.count(b) for b in group), sum(b.num_targets for b in group)
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
        patient = self._stop_signal in _WARNINGS  # a warning is often followed by SIGTERM, while we are still saving
        if (
            self._stop_signal
            and not patient
            and number not in _WARNINGS
            and now - self._first_signal_at > SECOND_SIGNAL_S
        ):
            os._exit(128 + number)
        if not self._stop_signal or patient:
            self._stop_signal, self._first_signal_at = number, now

    def _read_outcomes(self, window: Window) -> float | None:
        """Wait for the steps so far, and mind those that were skipped.

        Returns:
            The last step's gradient norm, if it is known and not read before.
        """
        unread, self._unread = self._unread, []
        norm = None
        for step, value in enumerate(unread, self.step + 1 - len(unread)):
            norm = None if value is None else value.item()
            if norm is None or math.isfinite(norm):
                self.nonfinite = 0
            else:
                self._mind_nonfinite(step, window)
        return norm

    def _mind_nonfinite(self, step: int, window: Window) -> None:
        ops.check_promises()  # a broken promise gives NaN gradients; a lower learning rate would not help
        self.nonfinite += 1
        window.skipped += 1
        self._say(
            f"Step {step}: the loss or a gradient is not finite; the step was skipped ({self.nonfinite} in a row)."
        )
        limit = self.config.max_nonfinite_steps
        if self.nonfinite >= limit and self.config.dtype != "float16" or self.nonfinite >= 2 * limit + 20:
            raise TrainingStopped(
                f"{self.nonfinite} steps in a row had a loss or gradient that is not finite. Lower --learning_rate "
                f"(now {self.config.learning_rate:g}), add --warmup_steps, or try --dtype float32. The last checkpoint "
                f"in {self.plan.checkpoints} is untouched."
            )

    # ------------------------------------------------------------------------------------------------ log, validate

    def _log(self, window: Window, lr: float, norm: float | None, seconds: float, peak: float) -> None:
        ops.check_promises()
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
        numbers.update(memory_gib=peak_memory(self.device) / 2**30, useful_tokens=self.useful_tokens)
        numbers.update(skipped_steps=window.skipped, **expert_load(self.model))
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
        if self.hooks.val_data is None:
            return None
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch in self.hooks.val_data():
            counted = self.hooks.count(batch)
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

    # -------------------------------------------------------------------------------------------- the run's folder

    def _open_folder(self) -> None:
        """Hold the run's folder and open its log; an older run of the same name is moved aside, never mixed in."""
        config, folder = self.config, self.plan.folder
        self._hold.take()
        if not self.start.resumed and resume.checkpoints(self.plan.checkpoints):
            aside = next(a for i in itertools.count(1) if not (a := folder.with_name(f"{folder.name}.old{i}")).exists())
            folder.rename(aside)
            ranks.say(f"An older run was moved from {folder} to {aside}.")
        if self.hooks.save_weights is None:
            check_replaceable(self.plan.weights)  # fail now, not after an hour of training
        numbers = sum(math.prod(shape) for shape in (self._trained or {}).values())
        resume.check_room(folder.parent, numbers)
        wanted = {"wandb": config.use_wandb, "swanlab": config.use_swanlab}
        trackers = {name: getattr(config, f"{name}_project") for name, on in wanted.items() if on}
        name = config.wandb_run_name or folder.name
        self.progress = Progress(
            folder, self.total_steps, self.step, config.options(), name, trackers, self.start.resumed
        )
        self.plan.write()

    def _save(self) -> None:
        """Write a checkpoint to resume from, and the weights as a self-contained folder."""
        if self.config.val_interval == 0 or self.step >= self.total_steps:
            self.validate()
        state = {
            "step": self.step,
            "seconds": self._seconds(),
            "useful_tokens": self.useful_tokens,
            "data": {name: value for name, value in self._position.items() if name != "own"},
            "frozen": self.frozen,
            **({} if self._trained is None else {"shapes": self._trained}),
            "zero_stage": self.config.zero_stage,
            "dtype": self.config.dtype,
            "options": self.config.options(),
        }
        own = self._position.get("own")
        resume.save(self.engine, self.plan.checkpoints, state, self.config.keep_checkpoints, own)
        with self.engine.gathered() as model:
            if self.rank == 0 and self.hooks.save_weights is not None:
                self.hooks.save_weights(model, self.plan.folder)
            elif self.rank == 0:
                save_pretrained(model, self.plan.weights, tokenizer=self.tokenizer)
        dist.barrier()

    def _count_steps(self) -> int:
        """Optimizer steps of the whole run, including those before a resume."""
        config, step = self.config, self.step
        current = self.data.state_dict()["epoch"]
        for epoch in range(current, config.epochs):
            batches = self.data.num_left() if epoch == current else self.data.num_batches(epoch)
            step += -(-batches // config.accumulation_steps)
            if config.max_steps and step >= config.max_steps:  # packing an epoch to count its batches takes time
                break
        return min(step, config.max_steps) if config.max_steps else step

    def _say(self, text: str) -> None:
        if self.progress is not None:
            self.progress.say(text)
