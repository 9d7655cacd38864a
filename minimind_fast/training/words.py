"""What a run prints at its start, at its end, and when memory runs out.

Purpose: the texts of a run, kept out of the loop.
Principle: functions from the run or its options to lines of text.
Properties: anything that might surprise is said once, at the start: the implementation of each op, precision, a router
    that learns nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from minimind_fast import ops
from minimind_fast.data.minimind import sets
from minimind_fast.model import MiniMind
from minimind_fast.ops import precision
from minimind_fast.ops.attention import chosen
from minimind_fast.training.config import TrainConfig
from minimind_fast.training.log import clock
from minimind_fast.training.resume import Start
from minimind_fast.training.run import JOINED, NO_DATA, Run
from minimind_fast.weights.resume_pth import holds_optimizer


def introduction(
    run: Run, m: MiniMind, device: str, steps: int, batch_tokens: int, partly: bool = False, start: Start | None = None
) -> list[str]:
    """The first lines of a run.

    Args:
        run: the resolved run.
        m: its model.
        device: "cuda" or "cpu".
        steps: optimizer steps in total.
        batch_tokens: maximum tokens in a micro-batch.
        partly: whether some weights are frozen.
        start: where a resumed run begins.
    """
    c, ranks = run.config, run.ranks
    extra = f" ({m.num_parameters(active=True) / 1e6:.1f}M active)" if m.config.use_moe else ""
    if partly:
        extra += f" ({m.num_parameters(trained=True) / 1e6:.2f}M of them trained)"
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    backend, reason = chosen(device, run.dtype)
    lines = [
        f"{run.title}: {m.num_parameters() / 1e6:.1f}M parameters{extra}, {c.dtype}, ZeRO {c.zero_stage}, "
        f"{ranks} x {where}.",
        f"{steps} optimizer steps of {c.accumulation_steps * ranks} x up to {batch_tokens:,} tokens; "
        f"attention: {backend} ({reason}).",
    ]
    if c.why("data_path") == NO_DATA and sets.offer(run.stage):
        lines.append(f"Data: the shipped sample, for a first try. {sets.offer(run.stage)}")
    if c.recipe != "none":
        took = [f"{name} {_shown(v)}" for name, v in c.options().items() if c.why(name) == f"--recipe {c.recipe}"]
        lines.append(f"Recipe {c.recipe}: {', '.join(took) or 'nothing that was not given'}.")
    if c.reasons.get("batch_size") == JOINED:
        lines.append(
            f"--batch_size {c.batch_size} --accumulation_steps {c.accumulation_steps}: {JOINED}; either option settles both."
        )
    groups: dict[str, list[str]] = {}
    for name, how in ops.describe(device).items():
        groups.setdefault(how, []).append(name)
    lines.append("Ops: " + "; ".join(f"{', '.join(names)} by {how}" for how, names in groups.items()) + ".")
    if not precision.multiplies(run.dtype, device):
        lines.append(
            f"Note: this CPU has no instructions for {c.dtype} and is many times faster in float32 (--dtype auto)."
        )
    if c.cuda_graphs:
        lines.append("Forward and backward are replayed as CUDA graphs, captured when a shape occurs a second time.")
    if not m.config.router_gets_lm_gradient:
        lines.append(
            "Note: normalised top-1 routing gives the router no gradient from the language-model loss (MiniMind's "
            "own form); --straight_through_router passes one through, --no_norm_topk_prob weighs by the score itself."
        )
    if start is not None and start.resumed:
        lines.append(f"Going on from step {start.step} ({start.useful_tokens:,} tokens).")
    elif start is not None and start.step:
        lines.append(
            f"Going on from step {start.step} of {c.from_weight}, with its optimizer, at the beginning of its epoch."
        )
    elif holds_optimizer(c.from_weight):
        lines.append(f"{c.from_weight}: its weights are taken; --with_optimizer takes its optimizer and step too.")
    return lines


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def finished(run: Run, steps: int, tokens: int, seconds: float) -> str:
    """The last lines of a run.

    Args:
        run: the finished run.
        steps: optimizer steps done.
        tokens: tokens trained on, without padding.
        seconds: duration of the whole run.
    """
    return (
        f"Done: {steps} steps, {tokens:,} tokens in {clock(seconds)}.\n"
        f"  weights      {run.weights}\n"
        f"  loss curve   {run.folder / 'loss.png'}  (log.jsonl and tensorboard/ beside it)\n"
        f"  checkpoints  {run.checkpoints}  (go on with --from_resume)"
    )


def memory_advice(error: BaseException, c: TrainConfig, checkpoints: Path) -> str:
    """What to lower when memory runs out, with numbers.

    Args:
        error: the allocator's.
        c: the run's options.
        checkpoints: the folder to report as untouched.
    """
    return (
        f"Out of memory ({str(error).splitlines()[0]}). A micro-batch is {c.batch_size} x {c.max_seq_len} tokens: try "
        f"--batch_size {max(c.batch_size // 2, 1)} --accumulation_steps {c.accumulation_steps * 2} (the same optimizer "
        "step in half the memory), --gradient_checkpointing, or --zero_stage 2 on several GPUs. Checkpoints in "
        f"{checkpoints} are untouched."
    )
