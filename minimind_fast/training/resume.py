"""The state of a run on disk: everything that the next step needs, and nothing half-written.

Purpose: `save` and `load` a run so that it goes on exactly, with the same number of ranks or another.
Principle: each rank writes into a folder with a name that nobody reads; when all are done the folder is renamed to
    `step_<n>`. A folder with that name is therefore whole: the newest one is the one to go on from.
Properties: frozen weights are not stored again: they come from where they came from, and must be the same (a fingerprint
    is compared). Holds DeepSpeed's own files (weights, float32 masters, optimizer), every rank's random generators, the data
    position and the schedule. Files are only ever replaced by a rename. For another number of ranks DeepSpeed's universal
    format is made from the newest checkpoint first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from minimind_fast.training import engine as ds
from minimind_fast.weights.checkpoint import sync_to_disk, written_aside

STATE_FILE = "state.json"
_NAME = re.compile(r"step_(\d+)$")
# ds_to_universal asks for this mark at stages 1 and 2.
_CLIENT_STATE = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first.

    Args:
        folder: of the run's checkpoints.
    """
    found = [(int(m[1]), p) for p in folder.glob("step_*") if (m := _NAME.search(p.name)) and p.is_dir()]
    return [p for _, p in sorted(found)]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `save` was given as state.

    Args:
        checkpoint: one of `checkpoints`.
    """
    return json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))


def frozen_fingerprint(model: torch.nn.Module) -> str | None:
    """16 hex digits for the parameters that are not trained; None if all are.

    Args:
        model: as it was loaded.
    """
    frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
    if not frozen:
        return None
    digest = hashlib.blake2b(digest_size=8)
    for name, p in frozen:
        digest.update(name.encode())
        digest.update(p.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _partly_frozen(engine: Any) -> bool:
    return any(not p.requires_grad for p in engine.module.parameters())


def save(engine: Any, folder: Path, state: dict[str, Any], keep: int, own: Any = None) -> Path:
    """Write a checkpoint; all ranks call it.

    Args:
        engine: the DeepSpeed engine.
        folder: of the run's checkpoints.
        state: JSON-serialisable, with "step".
        keep: how many checkpoints stay.
        own: this rank's part of the position in the data: tensors, numbers and texts in lists and dicts.

    Returns:
        The new checkpoint's folder.

    Raises:
        OSError: the disk is full or not writable; the older checkpoints are untouched.
    """
    rank, world_size = ds.world()
    final = folder / f"step_{state['step']:08d}"
    aside = folder / f".new-{final.name}"
    with _together(f"the checkpoint of step {state['step']} could not be written to {folder}"):
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob(".new-*"):
                shutil.rmtree(old, ignore_errors=True)
    with _together(f"the checkpoint of step {state['step']} could not be written to {folder}"):
        engine.save_checkpoint(
            str(folder),
            tag=aside.name,
            client_state=dict(_CLIENT_STATE),
            save_latest=False,
            exclude_frozen_parameters=_partly_frozen(engine),
        )
        torch.save({**_generators(), "own": own}, aside / f"generators_rank_{rank:05d}.pt")
        if rank == 0:
            (aside / STATE_FILE).write_text(json.dumps({**state, "world_size": world_size}, indent=1), encoding="utf-8")
    with _together(f"the checkpoint of step {state['step']} could not be written to {folder}"):
        if rank == 0:
            sync_to_disk(aside)
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)
            for old in checkpoints(folder)[:-keep]:
                shutil.rmtree(old, ignore_errors=True)
    return final


@contextlib.contextmanager
def _together(what: str) -> Iterator[None]:
    """Either all ranks leave the block well, or all raise: nobody waits for a rank that failed."""
    problem: Exception | None = None
    try:
        yield
    except Exception as error:  # whatever it is, the other ranks must hear of it
        problem = error
    failed = torch.tensor([float(problem is not None)], device=_collective_device())
    dist.all_reduce(failed)
    if problem is not None:
        raise OSError(f"{what}: {problem}; older checkpoints are untouched") from problem
    if failed.item():
        raise OSError(f"{what}: another rank failed; older checkpoints are untouched")


def _collective_device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def load(engine: Any, checkpoint: Path) -> dict[str, Any]:
    """Put a checkpoint into an engine and this rank's random generators; all ranks call it.

    Args:
        engine: a fresh engine, made with "load_universal" set as `needs_universal` says.
        checkpoint: one of `checkpoints`.

    Returns:
        The state that `save` was given; with as many ranks as then, its data holds this rank's "own".
    """
    rank, world_size = ds.world()
    state = read_state(checkpoint)
    tag = checkpoint.name
    if needs_universal(checkpoint, world_size, engine.zero_optimization_stage()):
        tag = f".universal-{checkpoint.name}"
        target = checkpoint.with_name(tag)
        with _together(f"{checkpoint} could not be rewritten for {world_size} ranks"):
            if rank == 0 and not target.is_dir():
                with written_aside(target) as aside:
                    ds.to_universal(checkpoint, aside)
    saved_lr = [(g["lr"], g["weight_decay"]) for g in engine.optimizer.param_groups]
    path, _ = engine.load_checkpoint(str(checkpoint.parent), tag=tag, load_module_strict=not _partly_frozen(engine))
    if path is None:
        raise ValueError(f"{checkpoint}: DeepSpeed found nothing to load there")
    for group, (lr, weight_decay) in zip(engine.optimizer.param_groups, saved_lr, strict=True):
        group.update(
            lr=lr, weight_decay=weight_decay
        )  # stage 3's universal format gives every group those of the first
    if state["world_size"] == world_size:
        saved = torch.load(checkpoint / f"generators_rank_{rank:05d}.pt", "cpu", weights_only=True)
        _restore(saved)
        if saved.get("own") is not None:
            state["data"]["own"] = saved["own"]
    dist.barrier()
    if rank == 0 and tag != checkpoint.name:
        shutil.rmtree(checkpoint.with_name(tag), ignore_errors=True)
    return state


def needs_universal(checkpoint: Path, world_size: int, stage: int) -> bool:
    """Whether a checkpoint was written by another number of ranks in a form that depends on it.

    Args:
        checkpoint: one of `checkpoints`.
        world_size: ranks now.
        stage: ZeRO stage now.
    """
    state = read_state(checkpoint)
    if state["zero_stage"] != stage:
        raise ValueError(
            f"{checkpoint} was written with --zero_stage {state['zero_stage']}, this run has {stage}: give the same stage"
        )
    return stage > 0 and state["world_size"] != world_size  # at stage 0 every rank holds, and reads, everything


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
