"""Faults planted in the PTX of kernels, one at a time, and what is seen of each: `python faults.py sm_80 swiglu odd`

A fault is seen if a result breaks the error rule, if something is found on the way, or if the kernel cannot run. Of one
that is not seen the line is told, and whether it changes any bit of the results.
"""

import argparse
import json
import os
import re
from collections.abc import Callable, Iterator

os.environ.pop("TRITON_INTERPRET", None)  # Triton's compiler is what is asked here

import torch

from minimind_fast import ops
from minimind_fast.proof.cases import CASES, evaluate
from minimind_fast.proof.ptx import execute
from minimind_fast.proof.ptx.formats import TYPES
from minimind_fast.proof.ptx.instructions.table import Step
from minimind_fast.proof.ptx.lanes import Lanes, reader
from minimind_fast.proof.ptx.launch import executed
from minimind_fast.proof.ptx.parse import Instruction, Program
from minimind_fast.proof.ptx.threads import Mask
from minimind_fast.proof.rule import compare

# Kind of fault -> where it can be planted, and what is written there instead.
SITES: dict[str, tuple[str, Callable[[re.Match], str]]] = {
    "barrier removed": (r"bar\.sync\s+0;", lambda m: ";"),
    "shuffle halved": (
        r"(shfl\.sync\.bfly\.b32\s+%\w+, %\w+), (\d+), 31, -1;",
        lambda m: f"{m[1]}, {int(m[2]) // 2}, 31, -1;",
    ),
    "scan halved": (
        r"(shfl\.sync\.up\.b32\s+[%\w|]+, %\w+), (\d+), 0, -1;",
        lambda m: f"{m[1]}, {int(m[2]) // 2}, 0, -1;",
    ),
    "wait weakened": (r"((?:cp\.async|wgmma)\.wait_group(?:\.sync\.aligned)?)\s+(\d+);", lambda m: f"{m[1]} 9;"),
    "fence removed": (r"fence\.proxy\.async\.shared::cta;", lambda m: ";"),
    "mask shifted": (r"setp\.lt\.(s32|s64|u32|u64)", lambda m: f"setp.le.{m[1]}"),
}


class Faults:
    """One case of one op, run again and again with another fault in one of its kernels.

    Args:
        target: "sm_80" or its like.
        op: whose case.
        case: a part of its name.
        kernel: name of the Triton function.
        dtype: of the inputs.
    """

    def __init__(self, target: str, op: str, case: str, kernel: str, dtype: torch.dtype = torch.bfloat16) -> None:
        self.target, self.op, self.kernel, self.dtype = target, op, kernel, dtype
        self.case = next(c for c in CASES[op] if case in c.name)
        reference = ops.OPS[op].reference
        self.truth = evaluate(self.case, reference, dtype, "cpu", double=True)
        self.eager = evaluate(self.case, reference, dtype, "cpu")
        self.results: dict[str, torch.Tensor] = {}  # of the last run
        self.healthy: dict[str, torch.Tensor] = {}

    def run(self, change: Callable[[str], str]) -> list[str]:
        """What is seen of a changed kernel: findings, wrong results, or the error."""
        found = []
        with executed(self.target, lambda name, text: change(text) if name == self.kernel else text) as record:
            try:
                ours = self.results = evaluate(self.case, ops.kernel(self.op), self.dtype, "cpu", poison=True)
                found = [k for k in self.truth if not compare(ours[k], self.eager[k], self.truth[k]).passed]
            except Exception as error:  # a broken kernel may well not run
                found = [type(error).__name__]
        return [finding.kind for finding in record.findings.values()] + found

    def sites(self, kind: str) -> int:
        """How many of a kind the kernel has, over all its compilations in this case."""
        counts = [0]

        def look(text: str) -> str:
            if kind != "barrier removed" or not re.search(r"\.reqntid 32\b", text):  # one warp needs no barrier
                counts.append(len(re.findall(SITES[kind][0], text)))
            return text

        healthy = self.run(look)
        assert not healthy, f"the healthy kernel: {healthy}"
        self.healthy = self.results
        return max(counts)

    def same_bits(self) -> bool:
        """Whether the last run's results are those of the healthy kernel."""
        pairs = [(self.results[k].flatten(), self.healthy[k].flatten()) for k in self.healthy]
        return all(torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) for a, b in pairs)

    def at_the_bound(self) -> set[int]:
        """Numbers of the `setp.lt` where some lane stands exactly at the bound: only these say something else as `le`."""
        real, found = execute.step_of, set()

        def looking(program: Program, one: Instruction) -> Step:
            step = real(program, one)
            if program.name != self.kernel or not re.match(SITES["mask shifted"][0], one.opcode):
                return step
            number = sum(bool(re.match(SITES["mask shifted"][0], o.opcode)) for o in program.instructions[: one.place])
            a, b = (reader(program, operand, TYPES[one.opcode[-3:]]) for operand in one.operands[1:3])

            def look(lanes: Lanes, mask: Mask) -> None:
                if (lanes.full(a(lanes)) == lanes.full(b(lanes)))[lanes.chosen(mask)].any():
                    found.add(number)
                step(lanes, mask)

            return look

        execute.step_of = looking
        try:
            self.run(lambda text: text + "// a text of its own, so that it is decoded again")
        finally:
            execute.step_of = real
        return found

    def plant(self, kind: str) -> Iterator[tuple[int, list[str], str]]:
        """Plant each fault of a kind in turn -> its number, what was seen, and where it was if nothing was."""
        pattern, instead = SITES[kind]
        count = self.sites(kind)
        numbers = self.at_the_bound() if kind == "mask shifted" else range(count)
        where = [""]
        for i in sorted(numbers):

            def change(text: str, i: int = i) -> str:
                hits = list(re.finditer(pattern, text))
                if i >= len(hits):
                    return text
                before, after = text[: hits[i].start()], text[hits[i].end() :]
                line = (re.findall(r"\.loc\t[^\n]*// (.*)", before) or [""])[-1]
                following = re.search(r"\n\t(?!\.)([\w.]+)", after)
                where[0] = f"{line}, before {following[1] if following else '?'}"
                target = re.match(r"shfl\.\S+\s+(%r\d+)", hits[i][0])
                if target and len(re.findall(rf"{target[1]}\b", text)) == 1:
                    where[0] += ", nobody reads it"
                return before + instead(hits[i]) + after

            seen = self.run(change)
            yield i, seen, "" if seen else f"{where[0]}{', no bit changes' if self.same_bits() else ''}"

    def wrong(self) -> list[str]:
        """What is seen of a kernel that computes something else: products become sums, or sums products."""

        def change(text: str) -> str:
            for old, new in (("mul.f32", "add.f32"), ("add.f32", "mul.f32")):
                if re.search(rf"\b{re.escape(old)}\b", text):
                    return re.sub(rf"\b{re.escape(old)}\b", new, text)
            head, found, tail = text.rpartition("add.s32")  # no float arithmetic: the last address or count
            assert found, "nothing to make wrong"
            return f"{head}sub.s32{tail}"

        return self.run(change)


def kernels_of(target: str, op: str, case: str, dtype: torch.dtype) -> list[str]:
    """The Triton functions that a case launches."""
    chosen = next(c for c in CASES[op] if case in c.name)
    with executed(target) as record:
        evaluate(chosen, ops.kernel(op), dtype, "cpu")
    return list(record.launches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("op")
    parser.add_argument("case", help="a part of its name")
    parser.add_argument("--kernel", default="", help="name of the Triton function (default: all of the case)")
    parser.add_argument("--kinds", default=",".join(SITES), help=f"of {', '.join(SITES)}, or arithmetic")
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dtype, told = getattr(torch, args.dtype), {}
    for kernel in [args.kernel] if args.kernel else kernels_of(args.target, args.op, args.case, dtype):
        faults = Faults(args.target, args.op, args.case, kernel, dtype)
        for kind in args.kinds.split(","):
            seen = [(0, faults.wrong(), "")] if kind == "arithmetic" else list(faults.plant(kind))
            unseen = [f"{i}: {where}" for i, what, where in seen if not what]
            if seen:
                told[f"{kernel}: {kind}"] = {"planted": len(seen), "unseen": unseen}
                print(f"{kernel}: {kind}: {len(seen) - len(unseen)} of {len(seen)} seen; unseen {unseen}", flush=True)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
