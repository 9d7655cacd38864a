"""What a run counts, shows and writes as it goes.

Purpose: sums between two log lines (`Window`); a progress bar or lines, a JSONL log, TensorBoard files, optionally wandb
    or SwanLab (`Progress`); a plot of the loss.
Principle: tensors stay on their device until the log line. Each log step is one dict of numbers, the same for every sink.
Properties: on a terminal a bar with the latest numbers, elsewhere one line a log step; MFU is reported with the peak that
    it refers to. A resumed run goes on with its curve in wandb and SwanLab: their ids are in trackers.json. Nothing here
    touches the model.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minimind_fast.data.packing import Batch
from minimind_fast.errors import UserError
from minimind_fast.model import MiniMind, MoE
from minimind_fast.training.losses import StepLoss

LOSSES = {"loss": "training", "val_loss": "validation"}  # keys in the log -> labels in the plot


def clock(seconds: float) -> str:
    """Format a duration: 42s, 3m05s, 2h10m."""
    s = int(seconds + 0.5)
    return f"{s}s" if s < 60 else f"{s // 60}m{s % 60:02d}s" if s < 3600 else f"{s // 3600}h{s % 3600 // 60:02d}m"


def _show(name: str, value: Any) -> str:
    if name == "lr":
        return f"lr {value:.2e}"
    if name == "tokens_per_s":
        return f"{value:,.0f} tok/s"
    if name == "mfu":
        return f"MFU {value:.1%}"
    if name == "memory_gib":
        return f"{value:.1f} GiB"
    return f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"


class Progress:
    """All sinks of a run.

    Args:
        folder: the run's; log.jsonl and tensorboard/ go there.
        total_steps: length of the bar.
        first_step: where the run begins.
        options: the run's options, for wandb and SwanLab.
        name: the run's name, for wandb and SwanLab.
        trackers: "wandb" and "swanlab" -> the project to log to.
        resumed: whether to go on with the folder's log and the trackers' curves.

    Raises:
        UserError: wandb or swanlab is not installed or cannot be reached.
    """

    SHOWN = (
        "loss",
        "reward",
        "reward_margin",
        "accuracy",
        "kl",
        "completion_length",
        "rollout_tokens_per_s",
        "aux_loss",
        "lr",
        "grad_norm",
        "tokens_per_s",
        "mfu",
        "memory_gib",
    )

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        first_step: int,
        options: dict[str, Any],
        name: str,
        trackers: Mapping[str, str] | None = None,
        resumed: bool = False,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.total, self.step = folder, total_steps, first_step
        self.sinks = _open_trackers(trackers or {}, folder / "trackers.json", resumed, name, options)
        self.file = (folder / "log.jsonl").open("a" if resumed else "w", encoding="utf-8")
        self.board: Any = None
        self.bar: Any = None
        if sys.stdout.isatty():
            from tqdm import tqdm

            layout = "{desc}{percentage:3.0f}%|{bar:18}| {n_fmt}/{total_fmt} {postfix}"
            self.bar = tqdm(
                total=total_steps, initial=first_step, file=sys.stdout, bar_format=layout, dynamic_ncols=True
            )

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        with contextlib.suppress(OSError):  # the terminal may have gone; the files go on
            if self.bar is not None:
                self.bar.write(text, file=sys.stdout)
            else:
                print(text, flush=True)

    def record(self, step: int, numbers: dict[str, Any]) -> None:
        """Send one step's numbers to every sink except the screen.

        Args:
            step: optimizer steps done.
            numbers: by name; floats, ints or lists of them.
        """
        self.file.write(json.dumps({"step": step, **numbers}) + "\n")
        self.file.flush()
        flat = {k: v for k, v in numbers.items() if isinstance(v, (int, float))}
        if self.board is None:
            from torch.utils.tensorboard import SummaryWriter  # takes a second, which should not delay the first step

            self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.step)
        for key, value in flat.items():
            self.board.add_scalar(key, value, step)
        for sink in self.sinks:
            sink.log(flat, step=step)

    def log(self, step: int, numbers: dict[str, Any], left_s: float) -> None:
        """Record one step's numbers and show them.

        Args:
            step: optimizer steps done.
            numbers: as for `record`.
            left_s: estimated seconds to the end of the run.
        """
        self.record(step, numbers)
        text = "  ".join(_show(k, numbers[k]) for k in self.SHOWN if k in numbers) + f"  left {clock(left_s)}"
        if self.bar is None:
            self.say(f"step {step:>{len(str(self.total))}}/{self.total}  {text}")
        else:
            with contextlib.suppress(OSError):
                self.bar.set_postfix_str(text, refresh=False)
                self.bar.update(step - self.step)
        self.step = step

    def close(self) -> None:
        """Close every sink, and draw the loss from the log."""
        if self.bar is not None:
            with contextlib.suppress(OSError):
                self.bar.close()
        self.file.close()
        if self.board is not None:
            self.board.close()
        for sink in self.sinks:
            sink.finish()


def _open_trackers(
    projects: Mapping[str, str], known: Path, resumed: bool, name: str, options: dict[str, Any]
) -> list[Any]:
    """Begin a run in each tracker, or go on with the one whose id is in the file `known`."""
    import importlib

    ids = json.loads(known.read_text(encoding="utf-8")) if resumed and known.is_file() else {}
    sinks = []
    for tracker, project in projects.items():
        try:
            sink = importlib.import_module(tracker)
        except ImportError:
            raise UserError(f"--use_{tracker} needs the package: pip install {tracker}") from None
        again: dict[str, Any] = {}
        if tracker in ids:
            again = {"id": ids[tracker], "resume": "allow"}
            if tracker == "wandb":  # --from_resume itself is another option than before
                again["allow_val_change"] = True
        try:
            ids[tracker] = sink.init(project=project, name=name, config=options, **again).id
        except Exception as error:  # their own kinds: not logged in, no network, no such project
            raise UserError(
                f"--use_{tracker}: {tracker} could not begin: {error}. Run `{tracker} login` once, or set "
                f"{tracker.upper()}_MODE=offline"
            ) from None
        sinks.append(sink)
    if sinks:
        known.write_text(json.dumps(ids), encoding="utf-8")
    return sinks


class Window:
    """Sums between two log lines; tensors stay on the device until `totals`."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.tokens, self.pairs = 0, 0  # tokens through the model, and (query, key) pairs that attend
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
        """(names, values), always including loss, aux and flops, in the same order on every rank."""
        zero = torch.zeros((), dtype=torch.float64, device=device)
        known = {"loss": zero, "aux": zero, **self.sums, "flops": zero + model.flops(self.tokens, self.pairs)}
        names = sorted(known)
        return names, torch.stack([known[n] for n in names])


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the process's peak resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def expert_load(model: MiniMind) -> dict[str, Any]:
    """Expert load in the last micro-batch: max/mean by layer, router entropy, experts without tokens."""
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


def draw_loss(
    log: Path, picture: Path, title: str, curves: Mapping[str, str] = LOSSES, ylabel: str = "loss, nats per token"
) -> None:
    """Plot the training and validation loss of a log, or other numbers in it.

    Args:
        log: a log.jsonl.
        picture: the PNG to write.
        title: printed above the curves.
        curves: keys in the log -> labels.
        ylabel: label of the y axis.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows: dict[int, dict[str, Any]] = {}
    for row in map(json.loads, log.read_text(encoding="utf-8").splitlines()):
        rows.setdefault(row["step"], {}).update(row)  # a resumed run repeats steps; the later line counts
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for key, label in curves.items():
        points = sorted((step, row[key]) for step, row in rows.items() if key in row)
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < 20 else None, markersize=3)
    axes.set(xlabel="optimizer step", ylabel=ylabel, title=title)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(picture, dpi=130)
    plt.close(figure)
