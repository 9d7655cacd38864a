"""The ranks of a run: how a process joins, under any launcher, and how it leaves.

Purpose: `start(main)` runs a script; `prepare()` makes it a rank under `deepspeed`, `torchrun` or plain `python`; `leave()`.
Principle: launchers assign ranks in environment variables; without them the process is a world of one.
Properties: no environment variable must be set by hand; no rank waits for one that failed (`together`, `first`).
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import minimind_fast
from minimind_fast import console, ops
from minimind_fast.errors import TrainingStopped, UserError
from minimind_fast.ops.cpu.allocator import keep_freed_memory
from minimind_fast.ops.precision import matmuls_for_training


def start(main: Callable[[], Any]) -> None:
    """Run a stage's main function; a user's error becomes a sentence, any other keeps its traceback; exit code 1.

    Args:
        main: the script's function without arguments.
    """
    _with_own_package(Path(main.__code__.co_filename).resolve())
    console.any_text_may_be_printed()
    code = 0
    try:
        main()
    except (UserError, TrainingStopped, ops.BrokenPromise) as error:
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"\nError: {error}", file=sys.stderr, flush=True)
            if isinstance(error.__cause__, Exception) and os.environ.get("MINIMIND_DEBUG"):
                traceback.print_exception(error.__cause__)
        code = 1
    except Exception as error:
        traceback.print_exc()
        print(
            f"\nThe program failed {console.part(error)}; this is not a wrong option or file.",
            file=sys.stderr,
            flush=True,
        )
        code = 1
    leave(code)
    if code:
        sys.exit(code)


def _with_own_package(script: Path) -> None:
    """Restart if Python found another checkout's package (an editable install), not the script's own."""
    root = script.parents[1]
    own, found = root / "minimind_fast" / "__init__.py", Path(minimind_fast.__file__)
    if not own.is_file() or own.samefile(found):
        return
    path = os.environ.get("PYTHONPATH", "")
    if str(root) in path.split(os.pathsep):
        sys.exit(f"Error: {script} belongs to {root}, but Python takes the package in {found.parent}: install {root}")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), path]))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def prepare(num_threads: int = 0) -> torch.device:
    """Make this process a rank, under any launcher.

    Args:
        num_threads: CPU threads of this rank; 0 shares the machine's cores among its ranks.

    Returns:
        The rank's device.

    Raises:
        ValueError: more ranks than GPUs on this machine.

    Source: https://github.com/deepspeedai/DeepSpeed/issues/8248, on binding a device in a world of one.
    """
    if "RANK" not in os.environ:  # plain `python train/pretrain.py`
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        one = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        os.environ.update(one, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    gpu = torch.cuda.is_available()
    grow_segments()
    if not gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or os.environ["WORLD_SIZE"])
        torch.set_num_threads(num_threads or max(1, (os.cpu_count() or 1) // here))
        keep_freed_memory()
    warnings.filterwarnings("ignore", category=FutureWarning, message=r".*`torch\.distributed\..*` is deprecated")
    warnings.filterwarnings("ignore", message=r".*barrier\(\).*device")
    if gpu:
        _check_local_rank(torch.cuda.device_count())
        torch.cuda.set_device(device())
        matmuls_for_training()
    if not dist.is_initialized():
        # A bound device makes NCCL split its communicator for each new group, which fails on some drivers in a world of one.
        bound = device() if gpu and int(os.environ["WORLD_SIZE"]) > 1 else None
        dist.init_process_group("nccl" if gpu else "gloo", device_id=bound)
    return device()


def _check_local_rank(gpus: int) -> None:
    """Refuse more ranks than GPUs here; no launcher does."""
    if int(os.environ["LOCAL_RANK"]) >= gpus:
        raise UserError(
            f"this machine shows {gpus} GPU{'s' * (gpus > 1)}, and rank {os.environ['RANK']} asks for number "
            f"{int(os.environ['LOCAL_RANK']) + 1}: lower --num_gpus (torchrun: --nproc_per_node), the slots in the "
            "hostfile, or look at CUDA_VISIBLE_DEVICES"
        )


def grow_segments() -> None:
    """Let PyTorch's allocator grow its segments, unless the user has set it up; before the first tensor on a GPU.

    Packs vary in length, and blocks of one length are cut out of segments made for another: what is left over is too small
    for the next. A segment that grows leaves no such rest (benchmarks/studies/allocator.py).
    """
    names = [f"PYTORCH_{kind}ALLOC_CONF" for kind in ("", "CUDA_", "HIP_")]  # the older two are still read
    if not any(name in os.environ for name in names):
        os.environ[names[0]] = "expandable_segments:True"


def device() -> torch.device:
    """This rank's device."""
    gpu = torch.cuda.is_available()
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")


def least_memory() -> int:
    """Bytes of the smallest GPU among all ranks; 0 on CPUs."""
    if not torch.cuda.is_available():
        return 0
    least = torch.tensor(torch.cuda.get_device_properties(device()).total_memory, device=device())
    if world()[1] > 1:
        dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)


def world() -> tuple[int, int]:
    """(rank, world size)."""
    return dist.get_rank(), dist.get_world_size()


def say(text: str) -> None:
    """Print a line on rank 0; a terminal that has gone (a lost ssh line) is no reason to end."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        with contextlib.suppress(OSError):
            print(text, flush=True)


def first(do: Callable[[], None]) -> None:
    """Let rank 0 do something; all ranks call it, and all raise if it failed.

    Raises:
        UserError: what rank 0 raised.
    """
    problem: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            do()
        except (UserError, OSError) as error:
            problem[0] = str(error)
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(problem)
    if problem[0] is not None:
        raise UserError(problem[0])


def leave(code: int = 0) -> None:
    """Leave the world; with several ranks, flush all output and end the process.

    A gloo thread may still hold the last collective's tensors, which DeepSpeed's groups keep alive. If it frees them
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


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """Either all ranks complete the block, or all raise: none waits for one that failed.

    Args:
        what: start of the error message, such as "the checkpoint could not be written".

    Raises:
        OSError: on every rank, if one failed.
    """
    problem: Exception | None = None
    try:
        yield
    except Exception as error:  # any error: the other ranks must learn of it
        problem = error
    failed = torch.tensor([float(problem is not None)], device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(failed)
    if problem is not None:
        raise OSError(f"{what}: {problem}; older checkpoints are untouched") from problem
    if failed.item():
        raise OSError(f"{what}: another rank failed; older checkpoints are untouched")
