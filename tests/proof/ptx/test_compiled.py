"""Compiled kernels, executed: what `minimind-fast verify --device ptx:...` says, and that it sees faults.

Each runs in a process of its own: Triton decides at its import between compiler and interpreter. A telling few run in
every suite; every op on every card in bfloat16 with `make proof`; all dtypes, models and faults with `make proof WHOLE=1`.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minimind_fast import ops

HERE, ROOT = Path(__file__).parent, Path(__file__).resolve().parents[3]
ENV = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
JOBS = os.environ.get("PROOF_JOBS", "0")  # 0: all ops in one process


def python(*argv: str, timeout_s: int = 600, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, *argv], cwd=ROOT, env=ENV | env, capture_output=True, text=True, timeout=timeout_s
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def verify(folder: Path, target: str, *argv: str, timeout_s: int = 600) -> tuple[list[dict], str]:
    file = folder / "rows.json"
    run = ["-m", "minimind_fast.commands.verify", "--device", f"ptx:{target}", "--json", str(file), *argv]
    said = python(*run, "--jobs", JOBS, timeout_s=timeout_s)
    return json.loads(file.read_text())["rows"], said


def faults(target: str, op: str, case: str, *argv: str, timeout_s: int = 600) -> dict[str, dict]:
    """-> kernel and kind: how many were planted, the numbers of those that nobody saw."""
    said = python(str(HERE / "faults.py"), target, op, case, *argv, timeout_s=timeout_s)
    return json.loads(said.splitlines()[-1])


def test_a_few_cases_in_bfloat16_on_a_hopper(tmp_path):
    rows, said = verify(
        tmp_path, "sm_90", "--ops", "swiglu,rms_norm", "--dtype", "bfloat16", "--models", "no", "--case", "minimind3 "
    )
    assert {row["op"] for row in rows} == {"swiglu", "rms_norm"} and all(row["passed"] for row in rows)
    assert "_rms_norm_bwd_kernel" in said and "ex2.approx.f32" in said and "Matrix instructions: none." in said
    for row in rows:
        assert row["executed"]["programs"] and {"out0"} <= row["results"].keys()


@pytest.mark.slow
def test_matmuls_run_on_the_cards_own_matrix_instructions(tmp_path):
    argv = ("--ops", "moe_route", "--dtype", "float16", "--models", "no", "--case", "many experts")
    hopper, said = verify(tmp_path, "sm_90", *argv)
    assert all(row["passed"] for row in hopper) and "wgmma.mma_async" in said
    ampere, said = verify(tmp_path, "sm_80", *argv)
    assert all(row["passed"] for row in ampere) and "mma.sync" in said and "wgmma" not in said


def test_each_fault_in_a_sum_over_warps_is_seen():
    seen = faults("sm_80", "rms_norm", "minimind3-moe", "--kernel", "_rms_norm_dw_kernel")
    for kind in ("barrier removed", "shuffle halved", "mask shifted"):
        assert seen[f"_rms_norm_dw_kernel: {kind}"]["planted"] >= 2
    assert not [key for key, found in seen.items() if found["unseen"]]


def test_a_wrong_kernel_fails():
    seen = faults("sm_80", "swiglu", "minimind3", "--kinds", "arithmetic")
    assert len(seen) == 2 and not [key for key, found in seen.items() if found["unseen"]]


def test_a_card_that_cannot_be_executed_is_refused():
    run = [sys.executable, "-m", "minimind_fast.commands.verify", "--device", "ptx:sm_75"]
    done = subprocess.run(run, cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 2 and "ptx:sm_90" in done.stderr


# ----------------------------------------------------- `make proof`, and `make proof WHOLE=1` for what CI has no time for

proof, whole = pytest.mark.proof, pytest.mark.whole
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
DTYPES = {"bfloat16": proof, "float16": whole, "float32": whole}


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("dtype", [pytest.param(name, marks=mark) for name, mark in DTYPES.items()])
@pytest.mark.parametrize("target", TARGETS)
def test_every_op_and_case(tmp_path, target, dtype):
    rows, _ = verify(tmp_path, target, "--dtype", dtype, "--models", "no", timeout_s=2900)
    assert {row["op"] for row in rows} == set(ops.NAMES) and all(row["passed"] for row in rows)


@whole
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("target", TARGETS)
def test_whole_models(tmp_path, target):
    rows, _ = verify(tmp_path, target, "--dtype", "bfloat16", "--models", "only", timeout_s=2900)
    assert all(row["passed"] for row in rows)
    assert {row["op"] for row in rows} >= {name for name, op in ops.OPS.items() if op.in_forward} | {"all"}


# Why nobody can see some faults. Those of a maximum may change last bits; all others change no bit of any result.
MAXIMUM = "before max.f32"  # a row's maximum only keeps exp from overflowing: that of half a row does as well
FIRST = "the first barrier: nobody has touched shared memory before it"
UNSTORED = "what lies past the last row, head or expert is worked out too, and not stored"
SAME = "with this case's counts a wrong sum finds the same experts"

# A kernel of each kind, a case in which its masks and its warps matter, and what a line holds -> why faults there go unseen.
KINDS = [
    (proof, "sm_80", "swiglu", "odd width", "_swiglu_fwd_kernel", {}),
    (proof, "sm_80", "rms_norm", "odd width", "_rms_norm_bwd_kernel", {}),
    (
        proof,
        "sm_80",
        "linear_cross_entropy",
        "prime",
        "_linear_cross_entropy_fwd_kernel",
        {"new_top = tl.maximum(top": MAXIMUM},
    ),
    (proof, "sm_80", "linear_kl", "wider", "_linear_kl_fwd_kernel", {"new_top = tl.maximum(top": MAXIMUM}),
    (proof, "sm_80", "moe_route", "minimind3-moe T", "_route_dw_kernel", {"d_logits_ptr + row[:, None] * E": FIRST}),
    (
        whole,
        "sm_80",
        "moe_route",
        "many experts",
        "_route_fwd_kernel",
        {"scores = tl.exp(logits - tl.max(logits": MAXIMUM},
    ),
    (
        whole,
        "sm_80",
        "moe_route",
        "documents",
        "_route_plan_kernel",
        {
            "total += tl.sum(counts": FIRST,
            "base = tl.cumsum(total": UNSTORED,
            "scale = 1.0 / tl.maximum(tl.sum(documents": UNSTORED,
        },
    ),
    (
        whole,
        "sm_80",
        "rope",
        "odd head_dim half",
        "_rope_bwd_kernel",
        {"for tile in range(pid, tl.cdiv(num_tokens": UNSTORED, "_norm_bwd(xk1": UNSTORED, "_norm_bwd(xq1": UNSTORED},
    ),
    (
        whole,
        "sm_80",
        "moe_mlp",
        "one expert has half",
        "_moe_gate_up_kernel",
        {"expert, first, end, column = locate(": SAME, "live = row < end": UNSTORED},
    ),
]


@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    "target, op, case, kernel, unseen", [pytest.param(*row, marks=mark, id=row[3][1:]) for mark, *row in KINDS]
)
def test_planted_faults_are_seen(target, op, case, kernel, unseen):
    seen = faults(target, op, case, "--kernel", kernel, timeout_s=2900)
    print(json.dumps(seen))
    assert sum(found["planted"] for found in seen.values())
    told = [f"{key}: {where}" for key, found in seen.items() for where in found["unseen"]]
    told = [where for where in told if "nobody reads it, no bit changes" not in where]  # Triton's scans leave a few
    used = set()
    for where in told:
        text = source_line(where)
        line = next((line for line in unseen if line in text), "")
        assert line, f"not seen and not explained: {where}: {text}"
        used.add(line)
        assert (unseen[line] == MAXIMUM and MAXIMUM in where) or where.endswith("no bit changes"), where
    assert used == set(unseen), "explained, and yet seen"


def source_line(where: str) -> str:
    """The line of a kernel that a fault's place names as FILE.py:LINE."""
    places = [(ROOT / "kernels" / file, int(line)) for file, line in re.findall(r"(\w+\.py):(\d+)", where)]
    file, line = next(place for place in places if place[0].is_file())  # inlined: Triton's own file comes first
    return file.read_text(encoding="utf-8").splitlines()[line - 1]


@proof
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("op", ops.NAMES)
def test_a_wrong_kernel_of_each_op_fails(op):
    case = "minimind3-moe T" if ops.OPS[op].of_mixtures else "minimind3 T"
    seen = faults("sm_80", op, case, "--kinds", "arithmetic", timeout_s=2900)
    assert seen and not [key for key, found in seen.items() if found["unseen"]]


@whole
@pytest.mark.timeout(3000)
def test_the_older_triton(tmp_path):
    """Triton 3.6, from a folder that `make proof WHOLE=1` fills: it comes before the installed one."""
    folder = Path(os.environ.get("TRITON_3_6", ROOT / ".venv" / "triton-3.6"))
    if not (folder / "triton").is_dir():
        pytest.skip(f"needs Triton 3.6 in {folder}: run make proof WHOLE=1, or set TRITON_3_6")
    path = os.pathsep.join([str(folder), ENV.get("PYTHONPATH", "")])
    version = python("-c", "import triton; print(triton.__version__)", PYTHONPATH=path)
    assert version.startswith("3.6")
    run = ["-m", "minimind_fast.commands.verify", "--device", "ptx:sm_90", "--models", "no", "--jobs", JOBS]
    said = python(*run, "--ops", "swiglu,rms_norm,rope", timeout_s=2900, PYTHONPATH=path)
    assert "_rope_bwd_kernel" in said and "FAIL" not in said
