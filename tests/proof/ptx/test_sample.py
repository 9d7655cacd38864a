"""A few programs of a large launch, counted: `proof/ptx/sample.py`, on a kernel whose counts are known by hand."""

import numpy as np
import pytest
from one_program import FRAME

from minimind_fast.proof.ptx.parse import UnknownPtx
from minimind_fast.proof.ptx.sample import Pointer, sample

# A row's 8 values a lane in four steps of 16 bytes, a shuffle, and one more step that waits behind it.
LOOP = """
ld.param.b64 %rd1, [kernel_param_0];
ld.param.b64 %rd2, [kernel_param_1];
mov.u32 %r1, %tid.x;
mov.u32 %r9, %ctaid.x;
mad.lo.s32 %r9, %r9, 512, 0;
mad.wide.u32 %rd3, %r1, 16, %rd1;
mad.wide.u32 %rd3, %r9, 1, %rd3;
mov.u32 %r2, 0;
$again:
ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd3];
add.s32 %r2, %r2, 1;
setp.lt.s32 %p1, %r2, 4;
@%p1 bra $again;
shfl.sync.bfly.b32 %r14, %r10, 16, 31, -1;
ld.global.b32 %r15, [%rd3];
mad.wide.u32 %rd4, %r1, 4, %rd2;
st.global.b32 [%rd4], %r15;
"""


def counted(body=LOOP, grid=(1 << 30, 1, 1), kinds=("bf16", "fp32"), names=("x_ptr", "y_ptr"), warps=2):
    values = [Pointer(name, kind) for name, kind in zip(names, kinds, strict=True)]
    return sample(FRAME.format(body=body, threads=32 * warps), values, {"V": 7}, grid, warps, 0)


def test_a_program_of_a_grid_that_no_memory_holds_is_counted():
    found = counted()
    assert found.executed["ld.global.v4.b32", "kernel.py:7"] == 2 * 4 and found.executed["bra", "kernel.py:7"] == 2 * 4
    assert found.instructions == 2 * (8 + 4 * 4 + 4 + 1)  # the last is the return
    assert found.loaded == 64 * (4 * 16 + 4) and found.stored == 64 * 4
    assert found.wide == 64 * 4 * 16 and found.behind == 64 * 4
    # 16 bytes a lane are 16 sectors a warp; 4 bytes in steps of 16 touch as many; stored words are 4.
    assert found.sectors == 2 * (4 * 16 + 16 + 4)


def test_index_tensors_hold_what_such_tensors_hold():
    """A target of the vocabulary, so that the kernel takes the way of a token that counts."""
    body = """
ld.param.b64 %rd1, [kernel_param_0];
ld.global.b64 %rd2, [%rd1+80];
setp.eq.s64 %p1, %rd2, 3;
@%p1 bra $right;
bar.sync 0;
$right:
"""
    found = counted(body, kinds=("i64", "fp32"), names=("targets_ptr", "y_ptr"))
    assert not found.executed["bar.sync", "kernel.py:7"]
    with pytest.raises(LookupError, match="other_ptr"):
        counted(body, kinds=("i64", "fp32"), names=("other_ptr", "y_ptr"))


def test_an_instruction_that_is_not_known_is_named():
    with pytest.raises(UnknownPtx, match="tcgen05"):
        counted("tcgen05.mma.cta_group::1.kind::f16 [%r1], %rd1, %rd2, %r3, %p1;")


def test_matrix_instructions_are_counted_and_not_computed():
    body = "mov.b32 %r1, 0;" + "".join(f"mov.b32 %r{i}, 1065353216;" for i in range(2, 12))
    body += "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r20, %r21, %r22, %r23}, {%r2, %r3, %r4, %r5}, "
    body += "{%r6, %r7}, {%r8, %r9, %r10, %r11};\n"
    body += "setp.eq.s32 %p1, %r20, 0;\n@%p1 bra $zero;\nbar.sync 0;\n$zero:\n"
    found = counted(body)
    assert sum(times for (opcode, _), times in found.executed.items() if opcode.startswith("mma.sync")) == 2
    assert not found.executed["bar.sync", "kernel.py:7"]
    assert np.isclose(found.loaded, 0)
