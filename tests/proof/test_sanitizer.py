"""The interpreter's sanitizer: it sees planted faults, is silent where there are none, and so on every kernel.

A few cases of each op run with the suite; all of them, and every shape that no memory holds, with `make proof WHOLE=1`.
"""

# isort: off
import kernel_helpers as kh  # first: it chooses the interpreter before anything imports triton

import importlib

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from minimind_fast import ops
from minimind_fast.proof.cases import CASES, MODELS
from minimind_fast.proof.rule import poisoned_memory
from minimind_fast.proof.sanitizer.examine import examine
from minimind_fast.proof.sanitizer.interpreter import watched
from minimind_fast.proof.sanitizer.shadow import Shadow
from minimind_fast.proof.sanitizer.virtual import Virtual, examine_shape
# isort: on

pytestmark = [
    pytest.mark.skipif(kh.HAS_GPU, reason="kernels are compiled here: the sanitizer watches the interpreter"),
    # The interpreter uses numpy, which warns where a GPU would not.
    pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning"),
]
SIZE, BLOCK = 100, 32
ROPE = "q/k norm, head_dim 64"


@triton.jit
def doubles(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n, other=0.0) * 2, mask=i < n)


@triton.jit
def loads_past_the_end(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i), mask=i < n)


@triton.jit
def stores_past_the_end(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n, other=0.0))


@triton.jit
def all_write_the_first_block(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + tl.arange(0, BLOCK), tl.load(x_ptr + i, mask=i < n, other=0.0))


@triton.jit
def reverses_in_place(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + (n - 1 - i), tl.load(x_ptr + i, mask=i < n, other=0.0), mask=i < n)


@triton.jit
def two_lanes_one_element(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i // 2, tl.load(x_ptr + i, mask=i < n, other=0.0), mask=i < n)


@triton.jit
def passes_through_memory(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n, other=0.0), mask=i < n)
    shifted = tl.program_id(0) * BLOCK + (tl.arange(0, BLOCK) + 1) % BLOCK
    total = tl.sum(tl.load(out_ptr + shifted, mask=shifted < n, other=0.0), axis=0)
    tl.store(x_ptr + tl.program_id(0) * BLOCK, total)


@triton.jit
def reads_its_output(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(out_ptr + i, mask=i < n, other=0.0) * 0 + 1, mask=i < n)


@triton.jit
def multiplies_in_32_bits(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * 100000 * 100000 + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=(i >= 0) & (i < n), other=0.0), mask=(i >= 0) & (i < n))


@triton.jit
def sums_undefined_lanes(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + tl.program_id(0), tl.sum(tl.load(x_ptr + i, mask=i < n), axis=0))


@triton.jit
def counts_the_programs(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    tl.atomic_add(out_ptr, 1.0)


def launch(kernel, seed=0, watch=True):
    """-> what was found, and what the kernel wrote."""
    watcher = Shadow(seed)
    x = torch.randn(SIZE, generator=torch.Generator().manual_seed(0))
    with poisoned_memory():
        out = torch.empty(SIZE)
    if watch:
        with watched(watcher):
            kernel[(triton.cdiv(SIZE, BLOCK),)](x, out, SIZE, BLOCK)
    else:
        kernel[(triton.cdiv(SIZE, BLOCK),)](x, out, SIZE, BLOCK)
    return watcher.findings, out


@pytest.mark.parametrize(
    "kernel, kinds",
    [
        (doubles, set()),
        (loads_past_the_end, {"load out of bounds"}),
        (stores_past_the_end, {"store out of bounds"}),
        (all_write_the_first_block, {"race: two programs write one element"}),
        (reverses_in_place, {"race: reads what another program writes", "race: writes what another program reads"}),
        (two_lanes_one_element, {"race: one store writes an element twice"}),
        (passes_through_memory, {"race: reads what it wrote itself"}),
        (reads_its_output, {"reads what nobody wrote"}),
        (multiplies_in_32_bits, {"int32 overflow"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_planted_fault_is_seen_and_nothing_else(kernel, kinds):
    found, _ = launch(kernel)
    assert found.kinds == kinds, str(found)
    for finding in found.values():
        assert finding.kernel == kernel.__name__ and finding.line.startswith("test_sanitizer.py:")
        assert str(finding.program) and (finding.argument in ("x_ptr", "out_ptr") or "overflow" in finding.kind)


def test_a_fault_leaves_the_process_and_its_memory_alone():
    _, out = launch(stores_past_the_end)
    plain, x = launch(doubles, watch=False)[1], torch.randn(SIZE, generator=torch.Generator().manual_seed(0))
    assert torch.equal(2 * out, plain) and torch.equal(out, x)


def test_undefined_lanes_are_poison():
    _, out = launch(sums_undefined_lanes)
    assert out[:3].isfinite().all() and out[3].isnan()
    assert launch(sums_undefined_lanes, watch=False)[1][:4].isfinite().all()


def test_the_order_of_programs_is_shuffled_and_shows_what_depends_on_it():
    results = {tuple(launch(all_write_the_first_block, seed)[1][:BLOCK].tolist()) for seed in range(8)}
    assert len(results) > 1
    assert len({tuple(launch(doubles, seed)[1].tolist()) for seed in range(8)}) == 1


def test_an_operation_that_it_does_not_know_is_named():
    with pytest.raises(NotImplementedError, match="create_atomic"):
        launch(counts_the_programs)


def test_the_interpreter_is_its_own_again_afterwards():
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    before = dict(vars(InterpreterBuilder)), GridExecutor.__call__
    launch(doubles)
    assert (dict(vars(InterpreterBuilder)), GridExecutor.__call__) == before


# ------------------------------------------------------------------------------------------------- faults in our kernels


@pytest.mark.parametrize(
    "op, case, old, new, kind",
    [
        ("swiglu", "odd width", "(rows < num_rows)[", "(rows < num_rows + 1)[", "load out of bounds"),
        ("rms_norm", "odd width", "partial_ptr + pid.to(tl.int64) * D", "partial_ptr", "race: two programs write"),
        ("rms_norm", "one row", "load(rstd_ptr + rows", "load(rstd_ptr + rows + 1", "load out of bounds"),
        ("rope", ROPE, "program_id(0).to(tl.int64) * BLOCK_T", "program_id(0).to(tl.int64)", "race: two programs"),
        ("linear_cross_entropy", "one token", "load(lse_ptr + row)", "load(lse_ptr + row + 1)", "load out of bounds"),
        ("linear_kl", "one token", "store(lse_ptr + num_tokens + row, t", "store(lse_ptr + row, t", "reads what nobody"),
        ("moe_route", "odd sizes", "tl.cumsum(chosen, axis=0) - chosen", "0 * chosen", "race: one store writes"),
        ("moe_mlp", "one token", "(split * E + expert)", "(split * E)", "race: two programs write"),
    ],
)  # fmt: skip
def test_a_fault_in_a_kernel_of_ours_is_seen(tmp_path, op, case, old, new, kind):
    module = importlib.import_module(f"minimind_fast.kernels.{op}")
    broken = kh.broken_variant(module, tmp_path, old, new)
    verdict = examine(next(c for c in CASES[op] if c.name == case), getattr(broken, op), torch.float32)
    assert any(found.startswith(kind) for found in verdict.findings.kinds), str(verdict)


# ---------------------------------------------------------------------------------------------------- the kernels we have

# With the suite: awkward cases, cheap and of every kind. All cases of all ops take minutes.
FEW = {
    "rms_norm": ("odd width", "one row"),
    "rope": (ROPE,),
    "swiglu": ("odd width",),
    "linear_cross_entropy": ("entropy", "gradients in the forward"),
    "linear_kl": ("reverse",),
    "moe_route": ("documents and padding",),
    "moe_mlp": ("one token",),
    "symmetric_product": ("a product alone, scaled",),
}


def cases(few):
    """Cases of the ops with each dtype that the interpreter knows; the few in float16 only."""
    return [
        pytest.param(op, case, getattr(torch, dtype), id=f"{op}-{case.name}-{dtype}")
        for op in ops.NAMES
        for case in CASES[op]
        for dtype in (("float16",) if few else ("float32", "float16"))
        if (not few or case.name in FEW[op]) and (not case.only or dtype in case.only)
    ]


def assert_clean(op, case, dtype, seed=0):
    verdict = examine(case, ops.kernel(op), dtype, seed)
    assert verdict.clean, str(verdict)
    assert verdict.accesses > 0 or case.name.startswith("no ")


@pytest.mark.parametrize("op, case, dtype", cases(few=True))
def test_a_kernel_is_clean_in_any_order(op, case, dtype):
    assert_clean(op, case, dtype)


@pytest.mark.whole
@pytest.mark.parametrize("op, case, dtype", cases(few=False))
def test_every_case_of_every_kernel_is_clean_in_any_order(op, case, dtype):
    assert_clean(op, case, dtype, seed=1)


# --------------------------------------------------------------------------------------------- shapes that no memory holds

TOKENS = 3_000_000  # more than 2^31 elements in every activation


@pytest.mark.parametrize(
    "op, old, new, kind",
    [
        ("swiglu", "(pid // blocks).to(tl.int64) * BLOCK_T", "(pid // blocks) * BLOCK_T", "int32 overflow"),
        ("swiglu", "(rows < num_rows)[", "(rows < num_rows + 1)[", None),
        ("swiglu", "+ rows * stride + cols", "+ rows * stride + cols + 1", "load out of bounds"),
        ("swiglu", "out_ptr + rows * F", "out_ptr + rows * (F + 1)", "store out of bounds"),
        (
            "symmetric_product",
            "rows = (i * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)",
            "rows = i * BLOCK + tl.arange(0, BLOCK)",
            "int32 overflow",
        ),
    ],
)
def test_a_fault_past_2_31_elements_is_seen(tmp_path, op, old, new, kind):
    broken = kh.broken_variant(importlib.import_module(f"minimind_fast.kernels.{op}"), tmp_path, old, new)
    found = examine_shape(op, "minimind3", TOKENS, function=getattr(broken, op)).findings
    # A mask that lets one row too many pass is no fault where the tokens fill the last tile.
    assert kind in found.kinds if kind else not found, str(found)


def assert_shape_clean(op, preset, dtype):
    watcher = examine_shape(op, preset, TOKENS, dtype)
    assert not watcher.findings, str(watcher.findings)
    launches = 1 if ops.OPS[op].forward_only else 2
    assert watcher.launches >= launches and watcher.programs >= 5 * launches
    return watcher


@pytest.mark.parametrize("op", ["swiglu", "moe_route"])
def test_a_kernel_addresses_more_than_2_31_elements(op):
    watcher = assert_shape_clean(op, "minimind3" if op == "swiglu" else "minimind3-moe", torch.float16)
    assert max(watcher.largest.values()) > 2**31


SHAPES = [
    pytest.param(op, preset, dtype, id=f"{op}-{preset}-{dtype}")
    for op in ops.NAMES
    for preset in MODELS
    for dtype in (torch.float16, torch.float32)
    # Thousands of launches, one chunk after another, whose addresses begin anew in each: in one dtype.
    if ops.OPS[op].preset_case(preset, 1) and not (op.startswith("linear_") and dtype == torch.float32)
]


@pytest.mark.whole
@pytest.mark.parametrize("op, preset, dtype", SHAPES)
def test_every_kernel_of_every_model_addresses_more_than_memory_holds(op, preset, dtype):
    assert_shape_clean(op, preset, dtype)


def test_an_index_tensor_of_unknown_contents_is_an_error():
    watcher = Virtual()
    watcher.begin({"secret_ptr": torch.zeros(4, dtype=torch.int32)})
    where = np.array([watcher.address("secret_ptr", torch.zeros(4))], dtype=np.uint64)
    with pytest.raises(LookupError, match="secret_ptr"):
        watcher.load("secret_ptr", where, np.array([True]), np.dtype(np.int32))


def test_the_card_is_gone_afterwards():
    before = torch.cuda.get_device_properties, torch.cuda.device_of
    examine_shape("swiglu", "minimind3", 64)
    assert (torch.cuda.get_device_properties, torch.cuda.device_of) == before
    assert torch.empty(1).is_cuda is False
