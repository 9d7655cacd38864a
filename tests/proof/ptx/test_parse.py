"""PTX text becomes instructions with guards, operands, labels and source lines; what is not known is named."""

import pytest
from one_program import FRAME, execute, program_of

from minimind_fast.proof.ptx.execute import decode
from minimind_fast.proof.ptx.parse import UnknownPtx, parse, split_operands, vector


def test_a_program_is_read_whole():
    program = program_of("@!%p3 bra $L__BB0_2;\n$L__BB0_1: mov.b32 {%rs1, %rs2}, %r5; // words; more\n$L__BB0_2:")
    branch, move, end = program.instructions[:3]
    assert program.name == "kernel" and [pointer for *_, pointer in program.parameters] == [True, True]
    assert (branch.opcode, branch.guard, branch.negated) == ("bra", "%p3", True)
    assert move.operands == ("{%rs1, %rs2}", "%r5") and end.opcode == "ret"
    assert program.labels == {"$L__BB0_1": 1, "$L__BB0_2": 2}
    assert branch.line == "kernel.py:7"
    assert program.registers["%r199"][1] == 4 and program.registers["%p0"][1] == 0
    assert len({slot for slot, _ in program.registers.values()}) == len(program.registers)


def test_operands_are_cut_outside_brackets():
    assert split_operands("{%r1, %r2}, [ %rd1 + 0 ], 0x10, %r3") == ("{%r1, %r2}", "[ %rd1 + 0 ]", "0x10", "%r3")
    assert vector("{ %r1, %r2 }") == ["%r1", "%r2"] and vector("%r7") == ["%r7"]


@pytest.mark.parametrize(
    "line",
    [
        "add.cc.u32 %r1, %r2, %r3;",
        "fma.rz.f32 %r1, %r2, %r3, %r4;",
        "ld.local.b32 %r1, [%rd1];",
        "cvt.rn.satfinite.e4m3x2.f32 %rs1, %r2, %r3;",
        "shfl.sync.bfly.b64 %rd1, %rd2, 1, 31, -1;",
        "atom.global.add.f32 %r1, [%rd1], %r2;",
        "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r1, %r2}, {%r3}, {%r4}, {%r5};",
        "bar.sync 1, 64;",
        "setp.foo.s32 %p1, %r1, %r2;",
    ],
)
def test_an_unknown_opcode_is_an_error_that_names_it(line):
    """Before anything runs, and though it would never be reached."""
    program = program_of(f"bra $L__end; {line}\n$L__end:")
    with pytest.raises(UnknownPtx, match=line.split()[0].replace(".", r"\.")):
        decode(program)


def test_an_unknown_directive_is_an_error_that_names_it():
    with pytest.raises(UnknownPtx, match=".local"):
        parse(FRAME.format(body=".local .align 4 .b8 depot[16];", threads=32))


def test_a_loop_with_lanes_that_leave_one_by_one():
    body = """
    mov.b32 %r100, 0;
    $L__loop:
    add.s32 %r100, %r100, %r0;
    sub.s32 %r0, %r0, 1;
    setp.gt.s32 %p1, %r0, 0;
    @%p1 bra $L__loop;
    """
    import numpy as np

    ran = execute(body, np.arange(1, 65, dtype=np.int32)[:, None], threads=32, programs=2)
    n = np.arange(1, 65)
    assert (ran.outputs[:, 0] == n * (n + 1) // 2).all() and not ran.kinds


def test_a_guard_leaves_the_other_lanes_alone():
    import numpy as np

    ran = execute(
        "mov.b32 %r100, 5; setp.lt.s32 %p1, %r0, 3; @%p1 mov.b32 %r100, 7; @!%p1 add.s32 %r100, %r100, 1;",
        np.arange(32, dtype=np.int32)[:, None],
    )
    assert (ran.outputs[:, 0] == np.where(np.arange(32) < 3, 7, 6)).all()
