"""The cost model of compiled kernels: what it counts in a disassembly, and what it makes of a card."""

import json

import pytest

from benchmarks import cost
from benchmarks.record import RESULTS
from minimind_fast import ops
from minimind_fast.proof.targets import TARGETS

# A loop that ptxas took four times at once with one time left over, and a way that nobody took.
SASS = """
.text.kernel:
	//## File "/somewhere/kernel.py", line 3
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   S2R R0, SR_TID.X ;
.L_x_1:
	//## File "/somewhere/kernel.py", line 5 inlined at "/somewhere/kernel.py", line 9
        /*0020*/                   LDG.E.128 R4, [R2] ;
        /*0030*/                   LDG.E.128 R4, [R2+0x10] ;
        /*0040*/                   LDG.E.128 R4, [R2+0x20] ;
        /*0050*/                   LDG.E.128 R4, [R2+0x30] ;
        /*0060*/              @!P0 FADD R5, R4, R6 ;
        /*0070*/               @P1 BRA `(.L_x_1) ;
        /*0080*/                   LDG.E.128 R4, [R2] ;
        /*0090*/               @P2 BRA `(.L_x_2) ;
	//## File "/somewhere/kernel.py", line 7
        /*00a0*/                   STG.E desc[UR4][R2.64], R5 ;
        /*00b0*/                   IMAD R5, R5, R5, R5 ;
.L_x_2:
	//## File "/somewhere/kernel.py", line 8
        /*00c0*/                   MUFU.EX2 R5, R5 ;
        /*00d0*/                   NOP ;
        /*00e0*/                   EXIT ;
"""
EXECUTED = {
    ("ld.global.v4.b32", "kernel.py:5"): 2 * 85,
    ("ex2.approx.ftz.f32", "kernel.py:8"): 2,
    ("add.f32", "kernel.py:5"): 999,
}


def test_a_loop_counts_as_often_as_its_loads_ran():
    """85 loads a warp of five in the text: each of the five ran 17 times; the head and the end once, the store never."""
    issued, special = cost.instructions(SASS, EXECUTED, warps=2)
    assert issued == 2 * (2 + 17 * 6 + 17 * 2 + 0 + 2) and special == 2


def test_a_line_that_only_ptx_has_is_spread_over_the_others():
    moved = {(opcode, line.replace(":5", ":6")): times for (opcode, line), times in EXECUTED.items()}
    assert cost.instructions(SASS, moved, warps=2) == cost.instructions(SASS, EXECUTED, warps=2)


def row(**more):
    plain = {
        "op": "swiglu",
        "kernel": "_k",
        "preset": "minimind3",
        "direction": "forward",
        "target": "sm_90",
        "mma": None,
    }
    sizes = {"registers": 32, "num_warps": 4, "shared_bytes": 0, "programs": 132 * 16 * 3, "all_programs": 132 * 16 * 3}
    return plain | sizes | {"bytes_moved": 432 * 10**6, "issued": 5000, "special": 10} | more


def test_the_times_by_hand():
    found = cost.times(row(), TARGETS["sm_90"])
    assert found["byte_us"] == 100.0  # 432 MB at 4.32 TB/s
    assert found["issue_us"] == pytest.approx(132 * 16 * 3 * 5000 / (132 * 4 * 1.83e3), abs=0.01)
    assert (found["resident_warps"], found["waves"], found["idle"]) == (64, 3.0, 0.0)
    assert cost.times(row(special=2000), TARGETS["sm_90"])["issue_us"] == pytest.approx(
        3.2 * found["issue_us"], abs=0.01
    )
    half_full = cost.times(row(programs=132 * 16 * 5 // 2), TARGETS["sm_90"])
    assert half_full["waves"] == 2.5 and half_full["idle"] == pytest.approx(1 / 6, abs=1e-3)


@pytest.mark.parametrize(
    "more, warps",
    [({"registers": 255, "num_warps": 8}, 8), ({"shared_bytes": 100 << 10}, 8), ({"num_warps": 1}, 32), ({}, 64)],
    ids=["registers", "shared memory", "blocks", "warps"],
)
def test_what_limits_the_warps_of_a_multiprocessor(more, warps):
    assert cost.resident_warps(row(**more)) == warps


def test_a_kernel_bound_by_its_instructions_needs_a_reason_and_no_other_does():
    slow, fast = (row(cost={"issue_us": time, "byte_us": 100.0}) for time in (61.0, 59.0))
    assert "60%" not in cost.unexplained([slow], {})[0] and "61%" in cost.unexplained([slow], {})[0]
    assert not cost.unexplained([fast], {}) and not cost.unexplained([slow, fast], {"swiglu": {"_k": "why"}})
    assert "not so" in cost.unexplained([fast], {"swiglu": {"_k": "why"}})[0]
    assert not cost.unexplained([row(cost={"issue_us": 2.0, "byte_us": 1.0})], {}), "a matter of launching"
    assert cost.unexplained([row(cost={"issue_us": 9.0, "byte_us": 1.0})], {})
    assert not cost.unexplained([{**slow, "mma": "mma.sync"}], {}), "a matter of the matrix units"


# ------------------------------------------------------------------------------------------------- the committed table


@pytest.fixture(scope="module")
def rows():
    return json.loads((RESULTS / "kernels_aot.json").read_text(encoding="utf-8"))["kernels"]


def test_no_memory_bound_kernel_is_held_back_by_its_instructions_without_a_reason(rows):
    assert not cost.unexplained(rows, {name: op.issue_bound for name, op in ops.OPS.items()})


def test_every_kernel_without_a_matmul_has_a_cost_on_every_card(rows):
    cards = {name for name, target in TARGETS.items() if target.card} - {"sm_100"}  # some of its PTX is not known here
    plain = [row for row in rows if row["mma"] is None and row["target"] in cards]
    assert plain and not [row["kernel"] for row in plain if not row.get("cost")]
    assert {row["target"] for row in plain} == cards


def test_the_heads_softmax_is_bound_by_instructions_and_its_chunk_exceeds_l2(rows):
    mine = [row for row in rows if row["target"] == "sm_90" and row["preset"] == "minimind3"]
    for kernel in ("_linear_cross_entropy_fwd_kernel", "_linear_kl_fwd_kernel"):
        row = next(row for row in mine if row["kernel"] == kernel)
        assert cost.issue_share(row) > cost.ISSUE_LIMIT
        assert row["chunk_bytes"] > TARGETS["sm_90"].l2_mib << 20
