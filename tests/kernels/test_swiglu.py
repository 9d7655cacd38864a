"""SwiGLU's kernel against the error rule: shapes, strides, values, autograd, compilation, repeatability.

Runs the compiled kernel on a GPU (float32, float16, bfloat16), else the interpreter (float32, float16).
"""

import kernel_helpers as kh
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind_fast.kernels import swiglu as module
from minimind_fast.kernels.swiglu import swiglu
from minimind_fast.ops import reference

# The interpreter uses numpy, which warns where a GPU would not.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")
INF, NAN = float("inf"), float("nan")
# One row, one column, less than a block, more than one block with a remainder, leading dimensions, none (a single vector).
SHAPES = [(1, 2), (3, 10), (17, 2 * 130), (2, 3, 2 * 64), (5, 2 * 1408), (2 * 7,)]


def check(op, gate_up, seed=9, name="swiglu"):
    grad = kh.randn(*gate_up.shape[:-1], gate_up.shape[-1] // 2, dtype=gate_up.dtype, seed=seed)
    kh.assert_op(name, op, reference.swiglu, [gate_up], [grad])


@pytest.mark.parametrize("dtype", kh.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule(shape, dtype):
    check(swiglu, kh.randn(*shape, dtype=dtype, scale=3.0))


@pytest.mark.parametrize("dtype", kh.DTYPES, ids=str)
def test_strides(dtype):
    wide = kh.randn(6, 4, 2 * 24, dtype=dtype)
    for name, x in {
        "columns of a wider tensor": kh.randn(6, 100, dtype=dtype)[:, 4:52],
        "every second row": wide[::2, 0],
        "leading dimensions swapped": wide.transpose(0, 1),
        "last dimension not contiguous": kh.randn(2 * 24, 6, dtype=dtype).t(),
        "one row repeated": wide[:1, 0].expand(5, -1),
        "not aligned to 16 bytes": kh.randn(3 * 48 + 1, dtype=dtype)[1:].view(3, 48),
    }.items():
        check(swiglu, x, name=name)
    x = kh.randn(5, 48, dtype=dtype)
    for name, grad in {
        "expanded": kh.randn(1, dtype=dtype).expand(5, 24),
        "t": kh.randn(24, 5, dtype=dtype).t(),
    }.items():
        kh.assert_op(name, swiglu, reference.swiglu, [x], [grad])


@pytest.mark.parametrize("shape", [(0, 8), (4, 0, 8), (3, 0)], ids=str)
def test_empty(shape):
    check(swiglu, kh.randn(*shape, dtype=torch.float32))


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    scale=st.sampled_from([1e-30, 1e-4, 1.0, 30.0, 1e4, 1e30]),
    values=st.lists(st.sampled_from([INF, -INF, NAN, -0.0, 0.0, 6e4, -6e4, 1e-7, 88.8, -88.8, -104.0]), max_size=4),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(kh.DTYPES),
)
def test_any_shape_and_value(rows, columns, scale, values, seed, dtype):
    x = kh.randn(rows, 2 * columns, dtype=dtype, scale=scale, seed=seed)
    check(swiglu, kh.special_values(x, seed, values), seed=seed + 1)


def test_gradcheck():
    x = kh.randn(3, 12, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(swiglu, (x,))


def test_no_gradient_asked():
    assert not swiglu(kh.randn(2, 8, dtype=torch.float32)).requires_grad
    with torch.no_grad():
        assert not swiglu(kh.randn(2, 8, dtype=torch.float32).requires_grad_()).requires_grad


def test_second_derivative_is_refused():
    kh.assert_refuses_second_derivative(swiglu, kh.randn(2, 8, dtype=torch.float32))


def test_repeatable():
    x, grad = kh.randn(9, 2 * 70, dtype=torch.float32), kh.randn(9, 70, dtype=torch.float32, seed=1)
    kh.assert_repeatable(swiglu, [x], [grad])


def test_custom_ops_and_compile():
    x, grad = kh.randn(5, 2 * 20, dtype=torch.float32), kh.randn(5, 20, dtype=torch.float32, seed=1)
    torch.library.opcheck(module._swiglu_fwd.op, (x.clone().requires_grad_(),))
    torch.library.opcheck(module._swiglu_bwd.op, (grad, x))
    kh.assert_compiles(swiglu, [x], [grad])


@pytest.mark.parametrize("bad", [torch.zeros(3, 5), torch.zeros(3, 4, dtype=torch.int64), torch.zeros(())])
def test_refuses(bad):
    with pytest.raises(ValueError, match="swiglu needs"):
        swiglu(bad)


@pytest.mark.parametrize(
    "old, new",
    [
        ("gate / (1.0 + tl.exp(-gate)) * up", "gate / (1.0 + tl.exp(-gate))"),
        ("(1.0 + gate * (1.0 - sigmoid))", "1.0"),
        ("d_up = grad * gate * sigmoid", "d_up = grad * sigmoid"),
        ("mask = (rows < num_rows)", "mask = (rows < num_rows - 1)"),
        ("(F + BLOCK_F - 1) // BLOCK_F", "(F + BLOCK_F - 1) // BLOCK_F + 1"),
        ("out.to(out_ptr.dtype.element_ty)", "out.to(tl.float16)"),
    ],
)
def test_a_broken_kernel_is_seen(tmp_path, old, new):
    x = kh.randn(33, 2 * 130, dtype=torch.float32)
    kh.assert_broken(lambda m: check(m.swiglu, x), module, tmp_path, old, new)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", kh.DTYPES, ids=str)
@pytest.mark.parametrize("F", [1408, 1728, 2048, 2432, 2433])
def test_model_shapes(F, dtype):
    check(swiglu, kh.randn(4099, 2 * F, dtype=dtype, scale=2.0))


@pytest.mark.gpu
def test_offsets_beyond_int32():
    F = 2432
    x = torch.zeros(2**31 // (2 * F) + 9, 2 * F, dtype=torch.bfloat16, device="cuda")
    x[-8:] = kh.randn(8, 2 * F, dtype=torch.bfloat16)
    assert torch.equal(swiglu(x)[-8:], swiglu(x[-8:].clone()))


@pytest.mark.gpu
def test_cuda_graph():
    kh.assert_captures(
        swiglu, [kh.randn(130, 2 * 1408, dtype=torch.bfloat16)], [kh.randn(130, 1408, dtype=torch.bfloat16, seed=1)]
    )
