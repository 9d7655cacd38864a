"""The two memories: what is right goes through without a word, and each fault is found and named."""

import numpy as np
import pytest
import torch
from one_program import execute, launch, program_of

from minimind_fast.proof.ptx.fresh import mark, marked_memory

LANE_BYTE = "shl.b32 %r20, %r190, 2;"
INPUT = np.arange(256, dtype=np.uint32)[:, None]
POINTERS = "ld.param.b64 %rd1, [kernel_param_0]; ld.param.b64 %rd2, [kernel_param_1]; mov.u32 %r1, %tid.x;"


def shared(body, threads=64, size=512, programs=1):
    return execute(LANE_BYTE + body, INPUT[: threads * programs], 1, threads, programs, size)


def test_a_barrier_lets_warps_trade_values():
    body = "st.shared.b32 [%r20], %r0; {} xor.b32 %r21, %r20, 128; ld.shared.b32 %r100, [%r21];"
    ran = shared(body.format("bar.sync 0;"))
    assert (ran.outputs[:, 0] == (np.arange(64) ^ 32)).all() and ran.kinds == []
    assert shared(body.format("")).kinds == ["two warps, no barrier: a read of what another wrote"]


def test_within_a_warp_no_barrier_is_needed():
    body = "st.shared.b32 [%r20], %r0; xor.b32 %r21, %r20, 4; ld.shared.b32 %r100, [%r21];"
    assert shared(body).kinds == []


@pytest.mark.parametrize("programs", [1, 3])
def test_a_write_over_what_another_warp_reads_is_found(programs):
    body = (
        "st.shared.b32 [%r20], %r0; bar.sync 0; xor.b32 %r21, %r20, 128; ld.shared.b32 %r100, [%r21]; {} "
        "st.shared.b32 [%r20], %r0;"
    )
    assert shared(body.format("bar.sync 0;"), programs=programs).kinds == []
    ran = shared(body.format(""), programs=programs)
    assert ran.kinds == ["two warps, no barrier: a write of what another read"]
    finding = next(iter(ran.record.findings.values()))
    assert finding.kernel == "kernel" and finding.line == "kernel.py:7" and "st.shared.b32" in finding.instruction
    assert finding.program == (0, 0, 0)


# Half of a sum of two lanes, where a product went unrounded into one of the two orders, and where it did not.
TWO_LANES = """
mov.b32 %r25, 0f3FCDA63E;
setp.eq.s32 %p1, %r190, 0;
@!%p1 mov.b32 %r25, 0f3FDD6025;
mul.f32 %r26, %r25, %r25;
shfl.sync.bfly.b32 %r27, %r26, 1, 31, -1;
{sum}
shr.u32 %r28, %r190, 1;
shl.b32 %r21, %r28, 2;
st.shared.b32 [%r21], %r29;
mov.b32 %r100, 0;
"""


@pytest.mark.parametrize("count", ["%r190", "%r20"], ids=["lanes of a warp", "two warps"])
def test_lanes_that_write_one_place_are_found_and_equal_values_are_none(count):
    body = "mov.b32 %r21, 0; " if count == "%r190" else "and.b32 %r21, %r20, 127; "
    body += "st.shared.b32 [%r21], {}; mov.b32 %r100, 0;"
    assert shared(body.format(count)).kinds == ["two lanes write different values to one place"]
    assert shared(body.format("5")).kinds == []
    apart = "setp.lt.s32 %p1, %r190, 32; @%p1 st.shared.b32 [0], %r0; @!%p1 st.shared.b32 [0], %r0; mov.b32 %r100, 0;"
    kinds = shared(apart.replace("[0]", "[%r22]").replace("setp", "mov.b32 %r22, 0; setp", 1)).kinds
    assert "two warps, no barrier: both write" in kinds


def test_a_product_that_one_lane_does_not_round_is_found_by_its_last_bit():
    """How a matmul's epilogue lost a bit to luck: a * b + shuffle(a * b) as one instruction."""
    assert shared(TWO_LANES.format(sum="add.f32 %r29, %r26, %r27;")).kinds == []
    fused = shared(TWO_LANES.format(sum="fma.rn.f32 %r29, %r25, %r25, %r27;"))
    assert fused.kinds == ["two lanes write different values to one place"]


def test_lanes_that_write_one_place_of_global_memory_are_found():
    body = "st.global.b32 [%rd31], {}; mov.b32 %r100, 0;"
    assert execute(body.format("5")).kinds == []
    assert execute(body.format("%r190")).kinds == ["two lanes write different values to one place"]


FAULTS = {
    "st.shared.b32 [%r20+508], %r0; mov.b32 %r100, 0;": "shared memory out of bounds",
    "st.shared.b32 [%r20+2], %r0; mov.b32 %r100, 0;": "shared memory is misaligned",
    "ld.shared.b32 %r100, [%r20];": "shared memory is read that nobody wrote",
    "add.s32 %r100, %r50, 1;": "a register is read that nobody wrote",
    "@%p9 mov.b32 %r100, 1; mov.b32 %r100, 0;": "a register is read that nobody wrote",
}


@pytest.mark.parametrize("body", FAULTS)
def test_faults_of_shared_memory_and_registers(body):
    assert FAULTS[body] in shared(body).kinds


COPY = (
    "cp.async.ca.shared.global [%r20], [%rd32], 0x4; cp.async.commit_group; {wait} {barrier} "
    "xor.b32 %r21, %r20, {other}; ld.shared.b32 %r100, [%r21];"
)


def test_a_copy_lands_at_its_wait():
    right = COPY.format(wait="cp.async.wait_group 0;", barrier="bar.sync 0;", other=128)
    ran = shared(right)
    assert (ran.outputs[:, 0] == (np.arange(64) ^ 32)).all() and ran.kinds == []
    for wait in ("", "cp.async.wait_group 1;"):
        ran = shared(COPY.format(wait=wait, barrier="bar.sync 0;", other=128))
        assert ran.kinds == ["a copy's data is read before its wait"]
        assert (ran.outputs == 0xFFFFFFFF).all()
    ran = shared(COPY.format(wait="cp.async.wait_group 0;", barrier="", other=128))
    assert ran.kinds == ["two warps, no barrier: a read of what another wrote"]
    late = "cp.async.ca.shared.global [%r20], [%rd32], 0x4; st.shared.b32 [%r20], %r0; mov.b32 %r100, 0;"
    assert shared(late).kinds == ["a copy's place is written before its wait"]


def test_a_copy_of_no_bytes_writes_zeros_and_reads_nothing():
    body = COPY.format(wait="cp.async.wait_all;", barrier="", other=0).replace("0x4;", "0x4, %r30;")
    ran = shared("setp.lt.s32 %p1, %r190, 3; selp.b32 %r30, 4, 0, %p1; add.s64 %rd32, %rd32, 0;" + body)
    assert (ran.outputs[:, 0] == np.where(np.arange(64) < 3, np.arange(64), 0)).all() and ran.kinds == []


# ---------------------------------------------------------------------------------------------------------- global memory


def kinds(body, tensors, threads=32, grid=(1, 1, 1)):
    record = launch(program_of(POINTERS + body, threads), tensors, threads, grid)
    return [finding.kind for finding in record.findings.values()]


LOAD = "mad.wide.u32 %rd3, %r1, 4, %rd1; ld.global.b32 %r2, [%rd3{}];"
STORE = "mad.wide.u32 %rd4, %r1, 4, %rd2; st.global.b32 [%rd4{}], %r1;"


def pair(n=32):
    return torch.zeros(n, dtype=torch.int32), torch.zeros(n, dtype=torch.int32)


def test_inside_an_argument_nothing_is_found():
    a, b = pair()
    assert kinds(LOAD.format("") + STORE.format(""), [a, b]) == [] and b.tolist() == list(range(32))


@pytest.mark.parametrize("offset", ["+4", "+-4", "+4000000"])
def test_one_element_beside_an_argument_is_found(offset):
    """Though another tensor of the process may lie there."""
    whole = torch.zeros(96, dtype=torch.int32)
    assert kinds(LOAD.format(offset), [whole[32:64], whole]) == ["read outside an argument"]
    assert kinds(STORE.format(offset), [whole, whole[32:64]]) == ["written outside an argument"]
    assert not whole[:32].any() and not whole[64:].any()


def test_between_the_rows_of_a_strided_argument_is_found():
    whole = torch.zeros(8, 8, dtype=torch.int32)
    assert kinds(LOAD.format(""), [whole, whole[:, :4]]) == []
    assert kinds(STORE.format(""), [whole, whole[:, :4]]) == ["written outside an argument"]


def test_misaligned_and_wild_addresses_are_found():
    a, b = pair()
    assert kinds("ld.global.b32 %r2, [%rd1+2];", [a, b]) == ["global memory is misaligned"]
    assert kinds("ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd1+4];", [a, b]) == ["global memory is misaligned"]
    assert kinds("mov.b64 %rd5, 64; ld.global.b32 %r2, [%rd5];", [a, b]) == ["read outside every argument"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64])
def test_reading_what_nobody_wrote_is_found(dtype):
    with marked_memory():
        fresh = torch.empty(64, dtype=dtype)
        again = torch.zeros(64).new_empty(64, dtype=dtype)
    assert torch.equal(fresh.view(torch.uint8), again.view(torch.uint8))
    half = fresh.itemsize == 2
    body = "mad.wide.u32 %rd3, %r1, 4, %rd1; ld.global.b16 %rs1, [%rd3];" if half else LOAD.format("")
    if fresh.itemsize == 8:
        body = "mad.wide.u32 %rd3, %r1, 8, %rd1; ld.global.b64 %rd5, [%rd3];"
    assert kinds(body, [fresh, pair()[0]]) == ["global memory is read that nobody wrote"]
    assert kinds(body, [torch.zeros_like(fresh), pair()[0]]) == []
    assert not torch.zeros(3).isnan().any() and (
        not dtype.is_floating_point or mark(torch.zeros(3, dtype=dtype)).isnan().all()
    )


def test_two_programs_on_one_place_are_found():
    a, b = pair()
    assert kinds(LOAD.format(""), [a, b], grid=(2, 1, 1)) == []  # both read
    assert kinds(STORE.format(""), [a, b], grid=(2, 1, 1)) == ["two programs on one place of global memory"]
    # One program reads what the other writes, whichever comes first.
    own = (
        "mov.u32 %r3, %ctaid.x; mad.wide.u32 %rd5, %r3, 128, %rd2; "
        "mad.wide.u32 %rd6, %r1, 4, %rd5; st.global.b32 [%rd6], %r1;"
    )
    read = "mad.wide.u32 %rd7, %r1, 4, %rd1; ld.global.b32 %r4, [%rd7];"
    both = torch.zeros(64, dtype=torch.int32)
    for part in (both[:32], both[32:]):
        assert kinds(read + own, [part, both], grid=(2, 1, 1)) == ["two programs on one place of global memory"]
    assert kinds(own, [a, both], grid=(2, 1, 1)) == []
