"""The state of a run on disk: everything that the next step needs, and nothing half-written.

Purpose: `save` and `load` a run so that it continues exactly, on the same number of ranks or another.
Principle: all ranks write into a temporary folder; when all are done it is renamed to `step_<n>`. A folder with that name
    is therefore complete, and a run resumes from the newest.
Properties: a manifest holds each file's checksum, so that a damaged checkpoint is refused and an older one offered. Frozen
    weights are not stored: they are loaded from their source again, and a fingerprint must match. Holds
    DeepSpeed's own files (weights, float32 masters, optimizer), every rank's random generators, the data position and the
    schedule. Files are only replaced by a rename. For another number of ranks, the newest checkpoint is first converted to
    DeepSpeed's universal format.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from minimind_fast.data.batches import Batches
from minimind_fast.data.rows import read_object
from minimind_fast.errors import UserError
from minimind_fast.model import MiniMind
from minimind_fast.training.ranks import first, say, together, world
from minimind_fast.training.run import Run
from minimind_fast.training.zero.engine import Engine, to_universal
from minimind_fast.weights.files import sync_to_disk, written_aside
from minimind_fast.weights.resume_pth import AdamWState, holds_optimizer, read_adamw

STATE_FILE, MANIFEST = "state.json", "manifest.json"
_NAME = re.compile(r"step_(\d+)$")


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    found = [(int(m[1]), p) for p in folder.glob("step_*") if (m := _NAME.search(p.name)) and p.is_dir()]
    return [p for _, p in sorted(found)]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The `state` that was passed to `save`.

    Args:
        checkpoint: one of `checkpoints`.

    Raises:
        UserError: it is missing or damaged.
    """
    state = read_object(checkpoint / STATE_FILE)
    if not {"step", "dtype", "zero_stage", "world_size"} <= set(state):
        raise UserError(f"{checkpoint / STATE_FILE} is not the state of a run")
    return state


def _write_manifest(folder: Path) -> None:
    """Note size and SHA-256 of every file of a checkpoint."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    entries = {str(p.relative_to(folder)): [p.stat().st_size, _checksum(p)] for p in files}
    (folder / MANIFEST).write_text(json.dumps(entries, indent=1), encoding="utf-8")


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files; None if nothing, or if it is too old to have a manifest."""
    try:
        read_state(checkpoint)
        entries = read_object(checkpoint / MANIFEST) if (checkpoint / MANIFEST).exists() else {}
    except UserError as error:
        return str(error)
    for name, (size, checksum) in entries.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes and had {size:,}"
        if _checksum(path) != checksum:
            return f"{name} is not what was written"
    return None


def shapes(model: torch.nn.Module) -> dict[str, list[int]]:
    """The shapes of the parameters that are trained, by name.

    Args:
        model: before an engine parts its parameters.
    """
    return {name: list(p.shape) for name, p in model.named_parameters() if p.requires_grad}


def frozen_fingerprint(model: torch.nn.Module) -> str | None:
    """A hash (16 hex digits) of the parameters that are not trained; None if all are.

    Args:
        model: as loaded, before training.
    """
    frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
    if not frozen:
        return None
    digest = hashlib.blake2b(digest_size=8)
    for name, p in frozen:
        digest.update(name.encode())
        digest.update(p.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save(engine: Engine, folder: Path, state: dict[str, Any], keep: int, own: Any = None) -> Path:
    """Write a checkpoint; all ranks call it.

    Args:
        engine: the run's engine.
        folder: the run's checkpoints.
        state: JSON-serialisable, with "step".
        keep: how many checkpoints to keep.
        own: this rank's part of the data position: tensors, numbers and texts in lists and dicts.

    Returns:
        The new checkpoint's folder.

    Raises:
        OSError: the disk is full or not writable; older checkpoints are untouched.
    """
    rank, world_size = world()
    final = folder / f"step_{state['step']:08d}"
    aside = folder / f".new-{final.name}"
    with together(f"the checkpoint of step {state['step']} could not be written to {folder}"):
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob(".new-*"):
                shutil.rmtree(old, ignore_errors=True)
    with together(f"the checkpoint of step {state['step']} could not be written to {folder}"):
        engine.save(folder, aside.name)
        torch.save({**_generators(), "own": own}, aside / f"generators_rank_{rank:05d}.pt")
        if rank == 0:
            (aside / STATE_FILE).write_text(json.dumps({**state, "world_size": world_size}, indent=1), encoding="utf-8")
    with together(f"the checkpoint of step {state['step']} could not be written to {folder}"):
        if rank == 0:
            _write_manifest(aside)
            sync_to_disk(aside)
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)
            for old in checkpoints(folder)[:-keep]:
                shutil.rmtree(old, ignore_errors=True)
    return final


def check_room(folder: Path, trained: int) -> None:
    """Refuse a disk that cannot hold one checkpoint, before the first step.

    Args:
        folder: exists.
        trained: parameters that are trained; master and both moments take 12 bytes each.

    Raises:
        UserError: says how much is free.
    """
    free, need = shutil.disk_usage(folder).free, 12 * trained
    if free < need:
        raise UserError(
            f"{folder} has {free / 1e9:.2f} GB free and a checkpoint takes {need / 1e9:.2f} GB or more: free some, or give "
            "another --save_dir"
        )


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        step: optimizer steps done.
        useful_tokens: tokens trained on so far, without padding.
        seconds: training time so far.
        resumed: whether the run's folder holds what came before; a step of MiniMind's own run has no folder here.
    """

    step: int = 0
    useful_tokens: int = 0
    seconds: float = 0.0
    resumed: bool = False


def find(run: Run, frozen: str | None, trained: dict[str, list[int]]) -> Path | None:
    """The checkpoint that --from_resume continues from; all ranks call it.

    Args:
        run: the resolved run.
        frozen: `frozen_fingerprint` of its model.
        trained: `shapes` of its model.

    Returns:
        The newest, or None without --from_resume.

    Raises:
        UserError: there is none, or it is damaged, or its precision, ZeRO stage, optimizer, shapes or frozen weights differ.
    """
    config = run.config
    if not config.from_resume:
        return None
    found = checkpoints(run.checkpoints)
    if not found:
        raise UserError(f"--from_resume: no checkpoint in {run.checkpoints}; leave it out to start anew")
    first(lambda: _refuse_damaged(found))
    checkpoint, before = found[-1], read_state(found[-1])
    for option in ("dtype", "zero_stage"):
        if before[option] != getattr(config, option):
            raise UserError(
                f"--from_resume: {checkpoint} was written with --{option} {before[option]}, this run has "
                f"{getattr(config, option)}: use the same value"
            )
    optimizer = before.get("options", {}).get("optimizer", "adamw")
    if optimizer != config.optimizer:
        raise UserError(
            f"--from_resume: {checkpoint} holds the state of --optimizer {optimizer}, this run has {config.optimizer}: use "
            "the same, or begin a new run from its weights with --from_weight"
        )
    if before.get("frozen") != frozen:
        raise UserError(
            f"--from_resume: the frozen weights ({config.from_weight}) are not those that this run began with; give "
            "the same --from_weight and the same targets, or leave --from_resume out to start anew"
        )
    theirs = before.get("shapes", trained)
    if theirs != trained:
        name = next(n for n in [*theirs, *trained] if theirs.get(n) != trained.get(n))
        raise UserError(
            f"--from_resume: {checkpoint} holds a model of another shape: {name} was {theirs.get(name, 'not there')} and is "
            f"{trained.get(name, 'not there')} now; give the options of its run, which are in {run.folder / 'run.json'}"
        )
    return checkpoint


def minimind_s(run: Run, model: MiniMind) -> AdamWState | None:
    """The optimizer of MiniMind's own run, if --with_optimizer asks for it.

    Args:
        run: the resolved run.
        model: with the run's weights, on the CPU.

    Raises:
        UserError: --from_weight holds none that fits, or this run cannot take it.
    """
    config = run.config
    if not config.with_optimizer:
        return None
    if not holds_optimizer(config.from_weight):
        raise UserError(f"--with_optimizer needs MiniMind's *_resume.pth as --from_weight, not {config.from_weight}")
    unfit = config.optimizer != "adamw" or config.zero_stage > 2 or config.offload != "none"
    if unfit or frozen_fingerprint(model) is not None:
        raise UserError("--with_optimizer: only for AdamW on all weights, at --zero_stage 0, 1 or 2 without --offload")
    return read_adamw(config.from_weight, model)


def _refuse_damaged(found: list[Path]) -> None:
    """Refuse the newest of some checkpoints if it is damaged, and offer the newest that is whole."""
    newest, wrong = found[-1], damage(found[-1])
    if wrong is None:
        if not (newest / MANIFEST).exists():
            say(f"{newest} has no {MANIFEST}: its files are not verified.")
        return
    whole = next((p for p in reversed(found[:-1]) if damage(p) is None), None)
    advice = "no older one is whole; leave --from_resume out to start anew"
    if whole is not None:
        gone = " and ".join(str(p) for p in found[found.index(whole) + 1 :])
        advice = f"{whole} is whole: remove {gone} to continue from there"
    raise UserError(f"--from_resume: {newest} is damaged ({wrong}); {advice}")


def load(engine: Engine, checkpoint: Path, data: Batches) -> Start:
    """Load a checkpoint into an engine, the data and this rank's random generators; all ranks call it.

    Args:
        engine: new, built with `universal=needs_universal(...)`.
        checkpoint: the result of `find`.
        data: new, at its beginning.

    Returns:
        Where the run continues.
    """
    rank, ranks = world()
    state = read_state(checkpoint)
    tag, rewritten = checkpoint.name, needs_universal(checkpoint, ranks)
    if rewritten:
        tag = f".universal-{checkpoint.name}"
        target = checkpoint.with_name(tag)
        with together(f"{checkpoint} could not be rewritten for {ranks} ranks"):
            if rank == 0 and not target.is_dir():
                with written_aside(target) as aside:
                    to_universal(checkpoint, aside)
    engine.load(checkpoint.parent, tag)
    if state["world_size"] == ranks:
        saved = torch.load(checkpoint / f"generators_rank_{rank:05d}.pt", "cpu", weights_only=True)
        _restore(saved)
        if saved.get("own") is not None:
            state["data"]["own"] = saved["own"]
    dist.barrier()
    if rank == 0 and rewritten:
        shutil.rmtree(checkpoint.with_name(tag), ignore_errors=True)
    data.load_state_dict(state["data"])
    return Start(state["step"], state["useful_tokens"], state["seconds"], resumed=True)


def needs_universal(checkpoint: Path, ranks: int) -> bool:
    """Whether a checkpoint depends on its number of ranks and was written by a different number.

    Args:
        checkpoint: one of `checkpoints`.
        ranks: current number of processes.
    """
    state = read_state(checkpoint)
    return state["zero_stage"] > 0 and state["world_size"] != ranks  # at stage 0 every rank holds and reads everything


def _generators() -> dict[str, Any]:
    kind, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "python": json.dumps(random.getstate()),
    }


def _restore(saved: dict[str, Any]) -> None:
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"])
    kind, keys, *rest = saved["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, internal, gauss = json.loads(saved["python"])
    random.setstate((version, tuple(internal), gauss))
