"""A new op is three files: its kernel, its record and its test. Everything else finds it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

KERNEL = '''"""Doubling: y = 2 x.

Purpose:    stands for a new op.
Principle:  dx = 2 dy: the backward is the forward.
Properties: one pass over memory.
"""
# pyright: reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from minimind_fast.kernels.common import as_op, refuse_second_derivative

BLOCK = 1024


@triton.jit
def _dummy_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size, other=0.0)
    tl.store(y_ptr + at, x * 2.0, mask=at < size)


def _double(x: Tensor) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        _dummy_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, y, x.numel(), BLOCK=BLOCK)
    return y


@as_op("minimind_fast::dummy_fwd")
def _dummy_fwd(x: Tensor) -> Tensor:
    return _double(x)


@as_op("minimind_fast::dummy_bwd")
def _dummy_bwd(dy: Tensor) -> Tensor:
    return _double(dy)


@_dummy_fwd.register_fake
@_dummy_bwd.register_fake
def _(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_dummy_fwd.register_autograd(lambda ctx, dy: _dummy_bwd(dy))
refuse_second_derivative(_dummy_bwd, "dummy")


def dummy(x: Tensor) -> Tensor:
    """Double x."""
    return _dummy_fwd(x)
'''

RECORD = '''"""Doubling: y = 2 x.

Purpose: the record of the op.
Principle: y = 2 x.
Properties: bound by memory.
"""

from __future__ import annotations

from torch import Tensor

from minimind_fast.config import ModelConfig
from minimind_fast.ops.cases import Case
from minimind_fast.ops.registry import Op, Timing, Work


def dummy(x: Tensor) -> Tensor:
    """Double x."""
    return 2 * x


def _work(c: ModelConfig, direction: str, tokens: int, element_bytes: int) -> Work:
    return Work(tokens * 2 * c.hidden_size * element_bytes)


def _case(name: str, *shape: int) -> Case:
    return Case("dummy", name, lambda draw: {"x": draw.normal(*shape)})


OP = Op(
    name="dummy",
    reference=dummy,
    differentiable=("x",),
    work=_work,
    model_case=lambda c, tokens: _case("", tokens, c.hidden_size),
    cases=(_case("one row", 1, 33), _case("no rows", 0, 8)),
    in_forward=False,
    timing=Timing(cpu_tokens=64),
)
'''

TEST = '''"""Doubling's kernel."""

import kernel_helpers as kh
import torch

from minimind_fast.kernels.dummy import dummy
from minimind_fast.ops import reference


def test_error_rule():
    x = kh.randn(5, 7, dtype=torch.float32)
    kh.assert_op("dummy", dummy, reference.dummy, [x], [torch.ones_like(x)])
'''

SAYS = """
import io, contextlib
from minimind_fast import ops
from minimind_fast.config import ModelConfig
from minimind_fast.proof.roofline import op_work
from minimind_fast.training.cli import parse
from minimind_fast.training.config import TrainConfig
import torch
assert ops.NAMES[-1] == "dummy" and ops.dummy.__doc__ == "Double x."
assert torch.equal(ops.dummy(torch.ones(3)), torch.full((3,), 2.0))
with ops.use("dummy"):
    assert ops.describe("cuda")["dummy"].startswith("kernel") and ops.describe("cuda")["rope"].startswith("reference")
try:
    ops.use("nope")
except ValueError as error:
    assert "dummy" in str(error)
assert op_work("dummy", ModelConfig.preset("minimind3"), "both", 10, 2).bytes == 2 * 10 * 2 * 768 * 2
out = io.StringIO()
with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
    parse(TrainConfig, ["--help"])
print(" ".join(out.getvalue().split()))
"""


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """A copy of the tree with the three files of a new op; nothing else is touched."""
    folder = tmp_path_factory.mktemp("house")
    skip = shutil.ignore_patterns("__pycache__", "*.png", "golden")
    for name in ("minimind_fast", "kernels", "train", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", folder)
    new = {
        "kernels/dummy.py": KERNEL,
        "minimind_fast/ops/records/dummy.py": RECORD,
        "tests/kernels/test_dummy.py": TEST,
    }
    for name, text in new.items():
        assert not (folder / name).exists()
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def python(house: Path, *argv: str, interpret: bool = True) -> subprocess.CompletedProcess:
    """Run Python in the copy, on the copy's own package."""
    left_out = ("TRITON_INTERPRET", "MINIMIND_KERNELS", "PYTEST_ADDOPTS")
    env = {k: v for k, v in os.environ.items() if k not in left_out}
    env |= {"PYTHONPATH": str(house), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env |= {"TRITON_INTERPRET": "1"} if interpret else {}
    run = [sys.executable, *argv]
    return subprocess.run(run, cwd=house, env=env, capture_output=True, text=True, timeout=250)


def test_the_switch_the_help_and_the_roofline_have_it(house):
    done = python(house, "-c", SAYS)
    assert done.returncode == 0, done.stderr
    assert "linear_cross_entropy" in done.stdout and "dummy" in done.stdout


@pytest.mark.slow
def test_its_own_test_and_those_of_the_switch_and_the_cases_pass(house):
    files = ["tests/kernels/test_dummy.py", "tests/ops/test_ops.py", "tests/proof/test_verify.py"]
    chosen = "dummy or switch or every_op or unknown or error_rule"
    done = python(house, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *files, "-k", chosen)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout


@pytest.mark.slow
def test_verify_reports_it_and_sees_a_broken_kernel(house):
    command = [
        "-m",
        "minimind_fast.commands.verify",
        "--ops",
        "dummy",
        "--models",
        "no",
        "--device",
        "cpu",
        "--jobs",
        "0",
    ]
    done = python(house, *command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "minimind3 T=20" in done.stdout and "no rows" in done.stdout
    file = house / "kernels" / "dummy.py"
    file.write_text(KERNEL.replace("x * 2.0", "x * 2.01"), encoding="utf-8")
    try:
        done = python(house, *command)
        assert done.returncode == 1 and "FAIL dummy: one row" in done.stdout, done.stdout + done.stderr
    finally:
        file.write_text(KERNEL, encoding="utf-8")


@pytest.mark.slow
def test_it_is_compiled_ahead_of_time_into_the_source_of_the_docs_tables(house, tmp_path):
    argv = ["--ops", "dummy", "--targets", "sm_90", "--presets", "minimind3", "--out", str(tmp_path)]
    done = python(house, "benchmarks/aot.py", *argv, interpret=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "kernels_aot.json").read_text(encoding="utf-8"))
    assert {row["kernel"] for row in found["kernels"]} == {"_dummy_kernel"}
    assert [(row["op"], row["direction"]) for row in found["ops"]] == [("dummy", "forward"), ("dummy", "backward")]


@pytest.mark.slow
def test_the_benchmarks_list_it(house):
    argv = ["-m", "pytest", "benchmarks", "--collect-only", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "dummy"]
    done = python(house, *argv)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert "dummy-minimind3-64-ours-forward" in done.stdout or "dummy-minimind2-small-64-ours-forward" in done.stdout
