"""RMSNorm's kernel against the error rule: alone and with the residual, both orders of the cast, shapes, autograd.

Runs the compiled kernel on a GPU (float32, float16, bfloat16), else the interpreter (float32, float16).
"""

import kernel_helpers as kh
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from minimind_fast.kernels import rms_norm as module
from minimind_fast.kernels.rms_norm import rms_norm
from minimind_fast.ops import reference

# The interpreter uses numpy, which warns where a GPU would not.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")
INF, NAN = float("inf"), float("nan")
# The presets' hidden and head sizes, odd sizes, one warp and more; rows with a remainder, one row, many programs.
SHAPES = [(3, 512), (5, 640), (5, 768), (19, 96), (2, 3, 80), (33, 100), (1, 2), (7, 3), (2, 1500), (70, 8), (24,)]


def functions(op, fused, cast_first, eps=1e-5):
    if fused:
        return lambda x, weight, residual: op(x, weight, eps, residual, cast_first)
    return lambda x, weight: op(x, weight, eps, None, cast_first)


def tensors(x, fused, seed=20, weight_dtype=None):
    """-> inputs and output gradients to match x."""
    shape, dtype = x.shape, x.dtype
    weight = kh.randn(shape[-1], dtype=weight_dtype or dtype, seed=seed)
    grads = [kh.randn(*shape, dtype=dtype, seed=seed + 1), kh.randn(*shape, dtype=dtype, seed=seed + 2)]
    residual = kh.randn(*shape, dtype=dtype, seed=seed + 3)
    return ([x, weight, residual], grads) if fused else ([x, weight], grads[:1])


def check(op, x, fused, cast_first=False, eps=1e-5, name="rms_norm", wanted=None, weight_dtype=None):
    inputs, grads = tensors(x, fused, weight_dtype=weight_dtype)
    ours, theirs = functions(op, fused, cast_first, eps), functions(reference.rms_norm, fused, cast_first, eps)
    kh.assert_op(name, ours, theirs, inputs, grads, wanted)


@pytest.mark.parametrize("dtype", kh.DTYPES, ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["alone", "fused"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule(shape, fused, dtype):
    for cast_first in [False] if dtype == torch.float32 else [False, True]:  # in float32 there is nothing to round
        check(rms_norm, kh.randn(*shape, dtype=dtype), fused, cast_first)


def test_one_column():
    """With eps as large as x: otherwise cancellation leaves only noise in the gradient."""
    check(rms_norm, kh.randn(9, 1, dtype=torch.float32), True, eps=0.5)


@pytest.mark.parametrize("cast_first", [False, True], ids=["cast_last", "cast_first"])
def test_order_of_the_cast(cast_first):
    """A kernel that rounds only once is more exact than MiniMind2: the error rule alone would not notice."""
    x, weight = kh.randn(40, 96, dtype=torch.float16), kh.randn(96, dtype=torch.float16, seed=1)
    ours = rms_norm(x, weight, 1e-5, cast_first=cast_first)
    same = [(ours == reference.rms_norm(x, weight, 1e-5, cast_first=c)).double().mean() for c in (False, True)]
    assert same[cast_first] > 0.995 and same[not cast_first] < 0.9


@pytest.mark.parametrize("dtype", kh.DTYPES, ids=str)
def test_float32_weight(dtype):
    for cast_first in (False, True):
        check(rms_norm, kh.randn(6, 40, dtype=dtype), True, cast_first, weight_dtype=torch.float32)


@pytest.mark.parametrize("fused", [False, True], ids=["alone", "fused"])
def test_strides(fused):
    dtype = torch.float32
    for name, x in {
        "columns of a wider tensor": kh.randn(6, 100, dtype=dtype)[:, 4:52],
        "every second row": kh.randn(9, 48, dtype=dtype)[::2],
        "leading dimensions swapped": kh.randn(3, 4, 48, dtype=dtype).transpose(0, 1),
        "last dimension not contiguous": kh.randn(48, 6, dtype=dtype).t(),
        "one row repeated": kh.randn(1, 48, dtype=dtype).expand(5, -1),
        "not aligned to 16 bytes": kh.randn(3 * 48 + 1, dtype=dtype)[1:].view(3, 48),
    }.items():
        check(rms_norm, x, fused, name=name)
    inputs, grads = tensors(kh.randn(5, 48, dtype=dtype), fused)
    inputs[1] = kh.randn(96, dtype=dtype)[::2]
    inputs[-1] = inputs[-1] if not fused else kh.randn(48, 5, dtype=dtype).t()
    grads = [kh.randn(1, dtype=dtype).expand(5, 48), kh.randn(48, 5, dtype=dtype).t()][: len(grads)]
    kh.assert_op(
        "weight, residual and gradients",
        functions(rms_norm, fused, False),
        functions(reference.rms_norm, fused, False),
        inputs,
        grads,
    )


@pytest.mark.parametrize("shape", [(0, 8), (4, 0, 8), (3, 0)], ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["alone", "fused"])
def test_empty(shape, fused):
    check(rms_norm, kh.randn(*shape, dtype=torch.float32), fused)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(6, 90),
    scale=st.sampled_from([1e-30, 1e-4, 1.0, 30.0, 1e4, 1e18, 1e25]),
    values=st.lists(st.sampled_from([INF, -INF, NAN, -0.0, 0.0, 6e4, -6e4, 1e-7]), max_size=3),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(kh.DTYPES),
    fused=st.booleans(),
    cast_first=st.booleans(),
)
def test_any_shape_and_value(rows, columns, scale, values, seed, dtype, fused, cast_first):
    x = kh.randn(rows, columns, dtype=dtype, scale=scale, seed=seed)
    check(rms_norm, kh.special_values(x, seed, values), fused, cast_first)


@pytest.mark.parametrize("fused", [False, True], ids=["alone", "fused"])
def test_gradcheck(fused):
    inputs, _ = tensors(kh.randn(3, 6, dtype=torch.float64), fused)
    assert torch.autograd.gradcheck(functions(rms_norm, fused, False), [t.requires_grad_() for t in inputs])


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True), (True, True, False)]
)
def test_only_the_gradients_asked_for(wanted, monkeypatch):
    x = kh.randn(5, 24, dtype=torch.float32)
    asked = []
    real = module._rms_norm_bwd
    monkeypatch.setattr(module, "_rms_norm_bwd", lambda *a: asked.append(a[-2:]) or real(*a))
    check(rms_norm, x, True, wanted=wanted)
    assert asked == [(wanted[0] or wanted[2], wanted[1])]


@pytest.mark.parametrize("which", [0, 1])
def test_gradient_of_one_output_only(which):
    inputs, grads = tensors(kh.randn(5, 24, dtype=torch.float32), True)
    grads[which] = None
    kh.assert_op(
        "one output", functions(rms_norm, True, False), functions(reference.rms_norm, True, False), inputs, grads
    )


def test_second_derivative_is_refused():
    weight = kh.randn(8, dtype=torch.float32)
    kh.assert_refuses_second_derivative(lambda x: rms_norm(x, weight, 1e-5), kh.randn(2, 8, dtype=torch.float32))


def test_repeatable():
    inputs, grads = tensors(kh.randn(50, 40, dtype=torch.float32), True)
    kh.assert_repeatable(functions(rms_norm, True, False), inputs, grads)


def test_the_dispatcher_is_called_only_where_someone_listens(monkeypatch):
    """Its share of a small step's host time is the largest; compilation, fake tensors, modes and transforms need it."""
    inputs, grads = tensors(kh.randn(5, 24, dtype=torch.float32), True)
    asked = []

    class Noted:
        def __init__(self, op):
            self.op = op

        def __call__(self, *inputs):
            asked.append(self.op._opoverload.name())
            return self.op(*inputs)

    ops = {part: getattr(module, f"_rms_norm_{part}") for part in ("fwd", "bwd")}
    for part in ops.values():
        monkeypatch.setattr(part, "op", Noted(part.op))
    op = functions(rms_norm, True, False)
    plain = kh.run(op, inputs, grads)
    assert not asked
    with FlopCounterMode(display=False):  # a dispatch mode
        watched = kh.run(op, inputs, grads)
    assert asked == ["minimind_fast::rms_norm_fwd", "minimind_fast::rms_norm_bwd"]
    for a, b in zip(plain[0] + plain[1], watched[0] + watched[1], strict=True):
        assert torch.equal(a, b)
    asked.clear()
    with FakeTensorMode() as fakes:
        assert rms_norm(fakes.from_tensor(inputs[0]), fakes.from_tensor(inputs[1]), 1e-5).shape == inputs[0].shape
    with torch.no_grad():
        rms_norm(*inputs[:2], 1e-5)
    assert asked == ["minimind_fast::rms_norm_fwd"]


def test_custom_ops_and_compile():
    inputs, grads = tensors(kh.randn(5, 24, dtype=torch.float32), True)
    x, weight, residual = (t.clone().requires_grad_() for t in inputs)
    torch.library.opcheck(module._rms_norm_fwd.op, (x, residual, weight, 1e-5, False))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(module._rms_norm_fwd.op, (x, None, weight, 1e-5, True), test_utils=checks)
    rstd = torch.ones(5, device=kh.DEVICE)
    torch.library.opcheck(
        module._rms_norm_bwd.op, (grads[0], grads[1], inputs[0], inputs[1], rstd, False, True, True), test_utils=checks
    )
    kh.assert_compiles(functions(rms_norm, True, False), inputs, grads)
    kh.assert_compiles(functions(rms_norm, False, True), inputs[:2], grads[:1])


@pytest.mark.parametrize(
    "x, weight, residual, match",
    [
        (torch.zeros(3, 8), torch.zeros(9), None, "weight"),
        (torch.zeros(3, 8, dtype=torch.int32), torch.zeros(8), None, "floating-point"),
        (torch.zeros(3, 8), torch.zeros(8), torch.zeros(4, 8), "residual"),
        (torch.zeros(3, 8), torch.zeros(8), torch.zeros(3, 8, dtype=torch.float16), "residual"),
        (torch.zeros(1, 20000), torch.zeros(20000), None, "16384"),
    ],
)
def test_refuses(x, weight, residual, match):
    with pytest.raises(ValueError, match=match):
        rms_norm(x, weight, 1e-5, residual)


@pytest.mark.parametrize(
    "old, new",
    [
        ("squares / D + eps", "squares / D"),
        ("squares += tl.sum(h_b * h_b, axis=1)", "squares += 0.0"),
        ("dx_a = s_a - h_a * mean", "dx_a = s_a"),
        ("dot += tl.sum(s_b * h_b, axis=1)", "dot += 0.0"),
        ("dx_a += dh_a", "dx_a += 0.0"),
        ("dw_b += s_b * h_b", "dw_b += 0.0"),
        ("range(pid, tl.cdiv(num_rows, ROWS)", "range(pid, num_rows // ROWS"),
        ("mask = (rows < num_partials)", "mask = (rows < num_partials - 1)"),
        ("tl.store(partial_at + b, tl.sum(dw_b, axis=0), mask=b < D)", "pass"),
        ("live = rows < num_rows", "live = rows < num_rows - 1"),
    ],
)
def test_a_broken_kernel_is_seen(tmp_path, old, new):
    x = kh.randn(37, 100, dtype=torch.float32)
    kh.assert_broken(lambda m: check(m.rms_norm, x, True, eps=0.05), module, tmp_path, old, new)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", kh.DTYPES, ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["alone", "fused"])
@pytest.mark.parametrize("D", [64, 80, 96, 512, 640, 768, 1024, 1536, 4096, 8192])
def test_model_shapes(D, fused, dtype):
    for cast_first in (False, True):
        check(rms_norm, kh.randn(4099, D, dtype=dtype), fused, cast_first)


@pytest.mark.gpu
def test_offsets_beyond_int32():
    x = torch.zeros(2**31 // 768 + 9, 768, dtype=torch.bfloat16, device="cuda")
    weight = kh.randn(768, dtype=torch.bfloat16)
    x[-8:] = kh.randn(8, 768, dtype=torch.bfloat16)
    assert torch.equal(rms_norm(x, weight, 1e-6)[-8:], rms_norm(x[-8:].clone(), weight, 1e-6))


@pytest.mark.gpu
def test_cuda_graph():
    inputs, grads = tensors(kh.randn(130, 768, dtype=torch.bfloat16), True)
    kh.assert_captures(functions(rms_norm, True, False), inputs, grads)
