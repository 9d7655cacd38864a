"""A few lines of PTX as one small launch, with registers given and read."""

from dataclasses import dataclass, field

import numpy as np
import torch

from minimind_fast.proof.ptx.execute import decode, narrowest, run
from minimind_fast.proof.ptx.findings import Record
from minimind_fast.proof.ptx.lanes import Launch
from minimind_fast.proof.ptx.parse import Program, parse
from minimind_fast.proof.ptx.storage import GlobalMemory

FRAME = """
.version 8.7
.target sm_80
.visible .entry kernel(.param .u64 .ptr .global .align 1 kernel_param_0, .param .u64 .ptr .global .align 1 kernel_param_1)
.reqntid {threads}
{{
	.reg .pred %p<40>;
	.reg .b16 %rs<40>;
	.reg .b32 %r<200>;
	.reg .b64 %rd<40>;
	.loc	1 7 0
{body}
	ret;
}}
	.file	1 "/somewhere/kernel.py"
	.section	.debug_abbrev
	{{
	}}
"""


def program_of(body: str, threads: int = 32) -> Program:
    return parse(FRAME.format(body=body, threads=threads))


@dataclass
class Ran:
    outputs: np.ndarray  # (programs * threads, words) uint32
    record: Record
    kinds: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.kinds = [finding.kind for finding in self.record.findings.values()]


LOAD_PARAMETERS = """
ld.param.b64 %rd30, [kernel_param_0];
ld.param.b64 %rd31, [kernel_param_1];
mov.u32 %r190, %tid.x;
mov.u32 %r191, %ctaid.x;
mov.u32 %r192, %ntid.x;
mad.lo.s32 %r193, %r191, %r192, %r190;
"""


def execute(
    body: str, inputs: np.ndarray | None = None, words: int = 1, threads: int = 32, programs: int = 1, shared: int = 0
) -> Ran:
    """Run lines of PTX. A thread finds its row of inputs (words of 32 bits) in %r0, %r1, ..., and leaves its outputs in
    %r100, %r101, ...

    Args:
        body: the lines.
        inputs: (programs * threads, n) of a dtype of four bytes.
        words: outputs a thread.
        threads: of a program.
        programs: of the grid.
        shared: bytes.
    """
    total = threads * programs
    given = np.zeros((total, 1), np.uint32) if inputs is None else np.ascontiguousarray(inputs).view(np.uint32)
    n = given.shape[1]
    loads = [LOAD_PARAMETERS, f"mad.wide.u32 %rd32, %r193, {4 * n}, %rd30;"]
    loads += [f"ld.global.b32 %r{i}, [%rd32+{4 * i}];" for i in range(n)]
    stores = [f"mad.wide.u32 %rd33, %r193, {4 * words}, %rd31;"]
    stores += [f"st.global.b32 [%rd33+{4 * i}], %r{100 + i};" for i in range(words)]
    program = program_of("\n".join([*loads, body, *stores]), threads)
    source = torch.from_numpy(given.view(np.int32).copy())
    target = torch.zeros(total, words, dtype=torch.int32)
    record = launch(program, [source, target], threads, (programs, 1, 1), shared)
    return Ran(target.numpy().view(np.uint32), record)


def launch(program: Program, tensors, threads: int, grid, shared: int = 0) -> Record:
    """Run a whole program on tensors."""
    memory, record = GlobalMemory(tensors, narrowest(program, "global")), Record()
    names = [name for name, _, _ in program.parameters]
    pointers = [np.uint64(argument.pointer).tobytes() for argument in memory.arguments]
    parameters = dict(zip(names, [*pointers, *[bytes(8)] * len(names)], strict=False))
    run(Launch(program, grid, threads, shared, parameters, memory, record, "kernel"), decode(program))
    return record
