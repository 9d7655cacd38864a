"""Every kernel compiled ahead of time, without a GPU: no spills, shared memory fits, dots use tensor cores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minimind_fast import ops

ROOT = Path(__file__).resolve().parents[2]
# The compiler runs in its own process: Triton chooses compiler or interpreter when it is imported.
ENV = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


def compile_all(folder: Path, *argv: str, timeout_s: int) -> dict:
    run = [sys.executable, "-m", "benchmarks.aot", "--out", str(folder), *argv]
    done = subprocess.run(run, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return json.loads((folder / "kernels_aot.json").read_text())


def check_table(found: dict, targets: set[str], presets: set[str], names: set[str]) -> None:
    rows = found["kernels"]
    assert {row["target"] for row in rows} == targets
    assert {row["preset"] for row in rows} == presets
    assert {row["op"] for row in rows} == names
    for op in names:
        own = {"forward"} if ops.OPS[op].forward_only else {"forward", "backward"}
        assert {row["direction"] for row in rows if row["op"] == op} == own
    for row in rows:
        assert row["problems"] == []
        assert 16 <= row["registers"] <= 512 and row["bytes_moved"] > 0


def test_the_newest_model_on_hopper(tmp_path):
    """A subset for each run of the suite: the largest shared memory here, the smallest below."""
    names = {"rms_norm", "rope", "swiglu", "linear_cross_entropy", "linear_kl"}
    argv = ("--targets", "sm_90", "--presets", "minimind3", "--ops", ",".join(sorted(names)))
    found = compile_all(tmp_path, *argv, timeout_s=280)
    check_table(found, {"sm_90"}, {"minimind3"}, names)
    # The floors of the fused norm and of SwiGLU by hand: 4 D and 3 F values of 2 bytes a token.
    floors = {(row["op"], row["direction"]): row["floor_bytes"] for row in found["ops"]}
    assert floors["rms_norm", "forward"] == 65536 * 4 * 768 * 2
    assert floors["swiglu", "forward"] == 65536 * 3 * 2432 * 2


@pytest.mark.aot
def test_a_dense_model_on_turing(tmp_path):
    """A T4 has tensor cores only for float16, and the smallest shared memory."""
    names = {"rms_norm", "rope", "swiglu", "linear_cross_entropy", "linear_kl"}
    argv = ("--targets", "sm_75", "--presets", "minimind3", "--ops", ",".join(sorted(names)), "--dtype", "float16")
    check_table(compile_all(tmp_path, *argv, timeout_s=280), {"sm_75"}, {"minimind3"}, names)


@pytest.mark.aot
@pytest.mark.timeout(3000)
def test_every_model_on_every_architecture(tmp_path):
    found = compile_all(tmp_path, timeout_s=2900)
    check_table(
        found,
        {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"},
        {"minimind2-small", "minimind2", "minimind2-moe", "minimind3", "minimind3-moe"},
        set(ops.NAMES),
    )


@pytest.mark.whole
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_compilation_that_can_be_met(tmp_path, dtype):
    """One token (integers that are 1 become constants), a number that 16 does not divide, verify's cases, the large ones."""
    found = compile_all(tmp_path, "--shapes", "all", "--targets", "sm_80,sm_90", "--dtype", dtype, timeout_s=2900)
    assert {row["op"] for row in found["kernels"]} == set(ops.NAMES)
    assert not [row for row in found["kernels"] if row["problems"]]


SPILLING = """
import sys, torch
sys.path.insert(0, {folder!r})
from benchmarks import aot
import triton
import triton.language as tl

@triton.jit
def too_wide(x_ptr, y_ptr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        a = tl.load(x_ptr + m[:, None] * K + start + k[None, :])
        b = tl.load(x_ptr + (start + k[:, None]) * K + n[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(y_ptr + m[:, None] * BLOCK_N + n[None, :], acc)

target = aot.TARGETS["sm_86"]
with aot._no_card(target) as launches, aot.FakeTensorMode():
    x = torch.empty(4096, 4096, dtype=torch.bfloat16)
    y = torch.empty(256, 256)
    too_wide[(1,)](x, y, 4096, 256, 256, 64, num_warps=4, num_stages=4)
    function, args, options, _ = launches[0]
    args = [aot._Pointer(a) if isinstance(a, torch.Tensor) else a for a in args]
launch = aot.Launch("", "", "", function, args, options, 1, 0)
compiled = aot.compile_launch(launch, target)
row = dict(aot.resources(compiled, target), target="sm_86", dtype="bfloat16")
print(row["spill_bytes"], row["shared_bytes"], row["mma"], aot.problems(row), sep="|")
"""


def test_a_kernel_that_spills_and_does_not_fit_is_seen(tmp_path):
    script = tmp_path / "spilling.py"
    script.write_text(SPILLING.format(folder=str(ROOT)))
    done = subprocess.run([sys.executable, str(script)], env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    spills, shared, mma, found = done.stdout.strip().split("|")
    assert int(spills) > 0 and int(shared) > 99 * 1024 and mma == "mma.sync"
    assert "spills" in found and "shared memory" in found


def test_the_committed_table_is_of_every_architecture_and_clean():
    file = ROOT / "benchmarks" / "results" / "kernels_aot.json"
    rows = json.loads(file.read_text())["kernels"]
    assert {row["target"] for row in rows} == {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"}
    assert {row["op"] for row in rows} >= {name for name, op in ops.OPS.items() if op.page}
    assert not [row for row in rows if row["problems"]]
