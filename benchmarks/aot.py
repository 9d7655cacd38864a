"""Compile every kernel ahead of time for GPUs that are not here, exactly as its launcher would.

Purpose:    shows without a card that each kernel compiles for each architecture at each preset's shapes, spills no
            registers, fits in shared memory and uses tensor cores; and a table of the resources.
Principle:  the op runs forward and backward on fake tensors (shapes without data). Its launchers reach Triton's
            `JITFunction.run`, which records the call: arguments, constexprs, options. The recorded call is then compiled
            for the target as Triton itself would, including specialisation of integers and alignment, so the table
            cannot drift from the launchers. Registers and stack come from cuobjdump, spill bytes from ptxas, shared
            memory from Triton's metadata; AMD's resources from the assembly.
Properties: launch parameters that depend on the card (multiprocessors, shared memory) use the target's numbers. Bytes
            count every tensor passed to a launch in full and once: an upper bound on a kernel's traffic, except for
            repeated reads from L2. The floor counts each input and output of the op once, or its matmul FLOPs. One
            process per target. Triton caches compilations, so a second run takes seconds. `--cost` adds a model of the
            time (cost.py), in minutes.

usage: python -m benchmarks.aot [--targets sm_90,gfx942] [--presets minimind3] [--ops rope] [--cost] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # we need the compiler, and Triton chooses at import

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from benchmarks import cost
from benchmarks.aot_tables import TOKENS, markdown, ops_table
from benchmarks.record import write
from minimind_fast import ops
from minimind_fast.ops.cases import Case, Draw
from minimind_fast.proof.cases import CASES, MODELS, large_cases
from minimind_fast.proof.ptx.launch import FORMATS
from minimind_fast.proof.ptx.parse import UnknownPtx
from minimind_fast.proof.ptx.sample import Pointer, sample
from minimind_fast.proof.targets import TARGETS, Target, as_card, patched

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


# For float16 and dense models only: MoE dots spill there, so `ops` uses the reference.
ON_REQUEST = ("sm_75",)


@dataclass
class Launch:
    """One kernel launch of an op's forward or backward, as made by its launcher.

    `chunk_bytes` are those of all tensors that the op's launches and cuBLAS's matmuls touch from one launch of this kernel
    to the next; 0 where no matmul lies between.
    """

    op: str
    preset: str
    direction: str
    kernel: JITFunction
    args: list[Any]
    options: dict[str, Any]
    programs: int
    bytes_moved: int
    grid: tuple[int, ...] = (1,)
    chunk_bytes: int = 0


class _Pointer:
    """Stands in for a tensor argument: a dtype and the alignment of the launcher's view."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype = tensor.dtype
        self._offset = int(tensor.storage_offset()) * tensor.element_size()
        self._bytes = tensor.numel() * tensor.element_size()
        self.numel = tensor.numel()

    def data_ptr(self) -> int:
        return self._offset

    def ptr_range(self) -> int:
        return self._bytes


class _NoDevice(SimpleNamespace):
    """Stands in for Triton's driver: only the target is queried."""

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def _no_card(target: Target):
    """Let launchers run on fake tensors as if on this card; launches are appended to the yielded list."""
    launches: list[tuple[JITFunction, tuple, dict, Any]] = []

    def run(self, *args, grid, warmup, **options):
        launches.append((self, args, options, grid))

    # Fake tensors that claim to be on a GPU but live on the CPU: without CUDA, PyTorch has autograd only there.
    with as_card(target, FakeTensor, run, JITFunction):
        yield launches


def _let_fakes_run_the_launchers(op: str) -> None:
    """Register each custom op's real body as its implementation for fake tensors."""
    module = sys.modules[ops.kernel(op).__module__]
    for value in vars(module).values():
        if isinstance(custom := getattr(value, "op", None), torch.library.CustomOpDef):
            custom._abstract_fn = custom._init_fn


def record(case: Case, preset: str, dtype: torch.dtype, target: Target) -> list[Launch]:
    """Run a case's forward and backward on fake tensors and return the launches.

    Args:
        case: an op as a model calls it.
        preset: name for the rows.
        dtype: dtype of the inputs.
        target: the card that the launchers see.

    Returns:
        The launches in order.
    """
    kernel, found = ops.kernel(case.op), []
    _let_fakes_run_the_launchers(case.op)
    module = sys.modules[kernel.__module__]
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    with _no_card(target) as launches, _matmuls_noted(module, launches) as matmuls, fakes:
        tensors = case.tensors(Draw(dtype))
        leaves = [tensors[k].requires_grad_() for k in ops.OPS[case.op].differentiable if tensors[k] is not None]
        outputs = case.call(kernel, tensors)
        forward = len(launches)
        outputs = [out for out in outputs if out.requires_grad]
        torch.autograd.grad(outputs, leaves, [torch.empty_like(out) for out in outputs], allow_unused=True)
        given = [[a for a in args if isinstance(a, torch.Tensor)] for _, args, _, _ in launches]
        for i, (function, args, options, grid) in enumerate(launches):
            size = _size(given[i])
            plain = [_Pointer(a) if isinstance(a, torch.Tensor) else a for a in args]
            named = {k: _Pointer(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
            programs = 1
            sizes: Any = grid(named) if callable(grid) else grid
            for n in sizes:
                programs *= int(n)
            direction = "forward" if i < forward else "backward"
            again = next((j for j in range(i + 1, len(launches)) if launches[j][0] is function), i)
            products = [tensors for at, tensors in matmuls if i <= at < again]
            chunk = _size(tensor for tensors in given[i:again] + products for tensor in tensors) if products else 0
            places = tuple(map(int, sizes))
            found.append(Launch(case.op, preset, direction, function, plain, named, programs, size, places, chunk))
    return found


@contextlib.contextmanager
def _matmuls_noted(module: Any, launches: list) -> Iterator[list[tuple[int, list[torch.Tensor]]]]:
    """Yield (number of the launch before, its tensors) of each matmul of cuBLAS's, in order."""
    noted: list[tuple[int, list[torch.Tensor]]] = []
    mm, add = torch.mm, "add_product"

    def noting_mm(a, b, *, out=None):
        result = mm(a, b) if out is None else mm(a, b, out=out)
        noted.append((len(launches) - 1, [a, b, result]))
        return result

    def noting_sum(total, a, b):
        noted.append((len(launches) - 1, [total, a, b]))

    with patched([(torch, "mm", noting_mm), *([(module, add, noting_sum)] if hasattr(module, add) else [])]):
        yield noted


def _size(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors, each once."""
    each = {(t.untyped_storage()._cdata, t.storage_offset()): t.numel() * t.element_size() for t in tensors}
    return sum(each.values())


def compile_launch(launch: Launch, target: Target) -> Any:
    """Compile a recorded launch for a target and return Triton's compiled kernel."""
    driver: Any = _NoDevice(target=GPUTarget(target.backend, target.arch, target.warp_size))
    triton.runtime.driver.set_active(driver)
    return launch.kernel.run(*launch.args, grid=None, warmup=True, **launch.options)


def resources(compiled: Any, target: Target) -> dict[str, Any]:
    """Resources of a kernel from `compile_launch`.

    Returns:
        registers (per thread), spill_bytes (stores and loads per thread), shared_bytes (per block), num_warps, and mma:
        the tensor-core instruction, "" if there is none, None if the kernel has no dot.
    """
    out: dict[str, Any] = {"shared_bytes": compiled.metadata.shared, "num_warps": compiled.metadata.num_warps}
    has_dot = re.search(r"\btt\.dot", compiled.asm["ttir"]) is not None
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]

        def number(key: str) -> int:
            found = re.search(rf"\.{key}:\s*(\d+)", text)
            return int(found[1]) if found else 0

        spills = 4 * (number("vgpr_spill_count") + number("sgpr_spill_count"))
        names = re.findall(r"\bv_mfma\w+", text)
        return {
            **out,
            "registers": number("vgpr_count"),
            "spill_bytes": spills,
            "mma": (names[0] if names else "") if has_dot else None,
        }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.cubin").write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", f"{folder}/kernel.cubin")
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        if found is None:
            raise RuntimeError(f"cuobjdump gave no resource usage: {usage[-300:]}")
        out["registers"], stack = int(found[1]), int(found[2])
        out["spill_bytes"] = 0
        if stack:  # no stack, no spills
            (Path(folder) / "kernel.ptx").write_text(compiled.asm["ptx"])
            new = isinstance(target.arch, int) and target.arch >= 100
            arch = f"sm_{target.arch}" + ("a" if isinstance(target.arch, int) and target.arch >= 90 else "")
            tool = "ptxas-blackwell" if new and (BIN / "ptxas-blackwell").exists() else "ptxas"
            text = _tool(tool, "-v", f"--gpu-name={arch}", f"{folder}/kernel.ptx", "-o", f"{folder}/again.cubin")
            spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
            if spills is None:
                raise RuntimeError(f"ptxas gave no spills: {text[-300:]}")
            out["spill_bytes"] = int(spills[1]) + int(spills[2])
    mma = next((name for name in ("tcgen05.mma", "wgmma.mma_async", "mma.sync") if name in compiled.asm["ptx"]), "")
    return {**out, "mma": mma if has_dot else None}


def cost_of(launch: Launch, compiled: Any, target: Target) -> dict[str, Any] | None:
    """What one program of a compiled launch executes.

    Args:
        launch: of `record`.
        compiled: of `compile_launch`.
        target: a CUDA card.

    Returns:
        Instructions of SASS and those for the special functions, estimated; instructions of PTX; bytes read, written and
        touched in sectors; shares of the bytes read by wide loads and behind a reduction. None if its matrix instructions
        are not known here.
    """
    function, kinds = launch.kernel, compiled.src.signature
    given = {key: value for key, value in launch.options.items() if key in function.arg_names}
    bound = inspect.signature(function.fn).bind(*launch.args, **given)
    bound.apply_defaults()
    sizes = {key: int(value) for key, value in bound.arguments.items() if isinstance(value, int)}
    if isinstance(order := bound.arguments.get("order_ptr"), _Pointer):
        sizes["slots"] = order.numel
    values = [
        Pointer(key, kinds[key].lstrip("*"), value.data_ptr())
        if isinstance(value, _Pointer)
        else struct.pack(f"<{FORMATS[kinds[key]]}", value)
        for key, value in bound.arguments.items()
        if kinds.get(key, "constexpr") != "constexpr"
    ]
    x, y, z = [*launch.grid, 1, 1][:3]
    warps = compiled.metadata.num_warps
    try:
        found = sample(compiled.asm["ptx"], values, sizes, (x, y, z), warps, compiled.metadata.shared)
    except UnknownPtx:
        return None
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.cubin").write_bytes(compiled.asm["cubin"])
        issued, special = cost.instructions(
            _tool("nvdisasm", "-c", "-g", f"{folder}/kernel.cubin"), found.executed, warps
        )
    return {
        "issued": round(issued),
        "special": round(special),
        "ptx": found.instructions,
        "loaded_bytes": found.loaded,
        "stored_bytes": found.stored,
        "sector_bytes": 32 * found.sectors,
        "wide": round(found.wide / max(found.loaded, 1), 3),
        "behind": round(found.behind / max(found.loaded, 1), 3),
    }


def _tool(name: str, *args: str) -> str:
    done = subprocess.run([str(BIN / name), *args], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def problems(row: dict[str, Any]) -> list[str]:
    """Problems of a row from `compile_target`, one sentence each; AMD's resources are for information only."""
    if "error" in row:
        return [row["error"]]
    target, out = TARGETS[row["target"]], []
    if target.backend == "cuda" and row["shared_bytes"] > target.shared_limit_bytes:
        out.append(f"needs {row['shared_bytes']} bytes of shared memory, a block has {target.shared_limit_bytes}")
    if target.backend == "cuda" and row["spill_bytes"]:
        out.append(f"spills {row['spill_bytes']} bytes a thread")
    if row["mma"] == "" and row["dtype"] != "float32":
        out.append("has a dot but no tensor-core instruction")
    return out


def cases_of(op: str, presets: list[str], shapes: str) -> list[tuple[str, Case]]:
    """What is compiled of an op.

    Args:
        op: its name.
        presets: models.
        shapes: "training": as a training step calls it. "all": also with one token and with a number that 16 does not
            divide (Triton makes a constant of a 1 and drops wide loads there), and on all cases of `verify`, the large
            ones too.

    Returns:
        (model or case, case).
    """
    tokens = [TOKENS] if shapes == "training" else [TOKENS, TOKENS + 3, 1]
    found = [(p, ops.OPS[op].preset_case(p, t, training=True)) for t in tokens for p in presets]
    if shapes == "all":
        found += [(case.name, case) for case in [*CASES[op], *large_cases(op)]]
    return [(label, case) for label, case in found if case is not None]


def compile_target(
    name: str, presets: list[str], names: list[str], dtype: str, shapes: str = "training", with_cost: bool = False
) -> list[dict[str, Any]]:
    """Record and compile every launch for one target.

    Args:
        name: key of TARGETS.
        presets: models whose shapes are compiled.
        names: ops to compile.
        dtype: "bfloat16", "float16" or "float32".
        shapes: of `cases_of`.
        with_cost: also execute a program of each and work out the model of its time.

    Returns:
        One row per compiled kernel, with its launches summed.
    """
    target, rows, known = TARGETS[name], [], {}
    costs: dict[Any, dict[str, Any] | None] = {}
    row: dict[str, Any]
    torch.set_num_threads(1)
    for op in names:
        for preset, case in cases_of(op, presets, shapes):
            if case.only and dtype not in case.only:
                continue
            same = {"op": op, "preset": preset, "target": name, "dtype": dtype}
            try:
                launches = record(case, preset, getattr(torch, dtype), target)
            except Exception as error:  # becomes a row of the table and fails the run
                fault = f"the launcher raised {type(error).__name__}: {str(error)[:300]}"
                row = {**same, "direction": "", "kernel": op, "error": fault}
                row.update(launches=0, bytes_moved=0, seconds=0.0)
                rows.append({**row, "problems": problems(row)})
                continue
            of_case: dict[Any, dict[str, Any]] = {}  # launches of the same compiled kernel, such as chunks, share a row
            for launch in launches:
                row = {**same, "direction": launch.direction, "kernel": launch.kernel.fn.__name__}
                started, key = time.perf_counter(), None
                try:
                    compiled = compile_launch(launch, target)
                    key = launch.direction, compiled.hash
                    if compiled.hash not in known:
                        known[compiled.hash] = resources(compiled, target)
                    row.update(known[compiled.hash])
                except Exception as error:
                    row["error"] = f"does not compile: {type(error).__name__}: {str(error)[:300]}"
                    key = launch.direction, row["kernel"], row["error"]
                new = {
                    "launches": 0,
                    "programs": 0,
                    "all_programs": 0,
                    "bytes_moved": 0,
                    "chunk_bytes": 0,
                    "seconds": 0.0,
                }
                row = of_case.setdefault(key, {**row, **new})
                if with_cost and target.card and not row["launches"] and "error" not in row:  # its first is its largest
                    same_work = compiled.hash, launch.grid, launch.bytes_moved
                    if same_work not in costs:
                        costs[same_work] = cost_of(launch, compiled, target)
                    row["cost"] = costs[same_work]
                row["launches"] += 1
                row["programs"] = max(row["programs"], launch.programs)  # of its largest launch
                row["all_programs"] += launch.programs
                row["bytes_moved"] += launch.bytes_moved
                row["chunk_bytes"] = max(row["chunk_bytes"], launch.chunk_bytes)
                row["seconds"] += time.perf_counter() - started
                row["problems"] = problems(row)
            for row in of_case.values():
                if row.get("cost"):
                    row["cost"] = {**row["cost"], **cost.times({**row, **row["cost"]}, target)}
            rows += of_case.values()
    return rows


def main(argv: list[str] | None = None) -> int:
    """Compile, print the problems, write the tables.

    Args:
        argv: arguments; the process's own if None.

    Returns:
        1 if a kernel does not compile, spills, or does not fit; else 0.
    """
    parser = argparse.ArgumentParser(description="Compile every kernel for every architecture, and read its resources.")
    usual = ",".join(name for name in TARGETS if name not in ON_REQUEST)
    parser.add_argument("--targets", default=usual, help=f"of {', '.join(TARGETS)} (default: {usual})")
    parser.add_argument("--presets", default=",".join(MODELS), help=f"of {', '.join(MODELS)} (default: all)")
    parser.add_argument("--ops", default=",".join(ops.NAMES), help=f"of {', '.join(ops.NAMES)} (default: all)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument(
        "--shapes", default="training", choices=("training", "all"), help="all: verify's cases, T = 1, ..."
    )
    parser.add_argument("--cost", action="store_true", help="also a model of the time, from executed PTX (minutes)")
    parser.add_argument("--out", default="", metavar="FOLDER", help="write kernels_aot.json and kernels_aot.md there")
    args = parser.parse_args(argv)
    asked = {key: getattr(args, key).split(",") for key in ("targets", "presets", "ops")}
    for key, known in (("targets", TARGETS), ("presets", MODELS), ("ops", ops.NAMES)):
        if unknown := [name for name in asked[key] if name not in known]:
            parser.error(f"unknown {key} {', '.join(unknown)}; choose of {', '.join(known)}")
    rows: list[dict[str, Any]] = []
    started = time.perf_counter()
    # A fresh process for each target: Triton keeps the first target's kernels in memory.
    workers = min(len(asked["targets"]), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        same = asked["presets"], asked["ops"], args.dtype, args.shapes, args.cost
        jobs = [pool.submit(compile_target, t, *same) for t in asked["targets"]]
        for name, job in zip(asked["targets"], jobs, strict=True):
            mine = job.result()
            rows += mine
            seconds = sum(row["seconds"] for row in mine)
            print(f"{name:8} {len(mine):4} kernels, {seconds:6.1f} s of compilation", flush=True)
            for row in mine:
                for problem in row["problems"]:
                    print(f"    {row['preset']} {row['kernel']} ({row['direction']}): {problem}", flush=True)
    training = args.shapes == "training"
    summary = ops_table([row for row in rows if row["target"] == "sm_90"]) if training else []
    if args.out:
        folder = Path(args.out)
        for row in rows:
            del row["seconds"]  # the same kernels must give the same rows
        facts = {
            "triton": triton.__version__,
            "tokens": TOKENS,
            "targets": [asdict(TARGETS[t]) for t in asked["targets"]],
        }
        write(
            folder / "kernels_aot",
            {**facts, "kernels": rows, "ops": summary},
            markdown(rows, summary, triton.__version__),
        )
    bad = sum(bool(row["problems"]) for row in rows)
    print(f"{len(rows) - bad} of {len(rows)} kernels are sound; {time.perf_counter() - started:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
