"""The symmetric product's kernel against the error rule: shapes, strides, values, autograd, compilation, repeatability.

Runs the compiled kernel on a GPU (float32, float16, bfloat16), else the interpreter (float32, float16).
"""

import kernel_helpers as kh
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind_fast.kernels import symmetric_product as module
from minimind_fast.kernels.symmetric_product import symmetric_product
from minimind_fast.ops import reference

# The interpreter uses numpy, which warns where a GPU would not.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")
INF, NAN = float("inf"), float("nan")
# One value, a tile, several with a remainder (three rows of tiles in float32), a batch, more columns than a tile is deep.
SHAPES = [(1, 1, 1), (1, 64, 32), (2, 150, 40), (3, 17, 130)]


def check(op, x, c=None, seed=9, name="symmetric_product", **factors):
    inputs = [x] if c is None else [x, c]
    grad = kh.randn(x.shape[0], x.shape[1], x.shape[1], dtype=x.dtype, seed=seed)
    kh.assert_op(
        name, lambda *t: op(*t, **factors), lambda *t: reference.symmetric_product(*t, **factors), inputs, [grad]
    )


@pytest.mark.parametrize("dtype", kh.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule(shape, dtype):
    x = kh.randn(*shape, dtype=dtype)
    check(symmetric_product, x)
    c = kh.randn(shape[0], shape[1], shape[1], dtype=dtype, seed=3)  # not symmetric: each half gets its own
    check(symmetric_product, x, c, alpha=2.0315, beta=-4.775)


def test_symmetric_to_the_bit_where_the_summand_is():
    x = kh.randn(2, 150, 40, dtype=torch.float32)
    y = symmetric_product(x)
    assert torch.equal(y, y.mT)
    y = symmetric_product(y, y, 2.0315, -4.775)
    assert torch.equal(y, y.mT)


@pytest.mark.parametrize("dtype", kh.DTYPES, ids=str)
def test_strides(dtype):
    for name, x in {
        "transposed": kh.randn(2, 40, 24, dtype=dtype).mT,
        "every second row": kh.randn(2, 48, 24, dtype=dtype)[:, ::2],
        "columns of a wider tensor": kh.randn(2, 20, 64, dtype=dtype)[:, :, 3:40],
        "one matrix repeated": kh.randn(1, 20, 24, dtype=dtype).expand(3, -1, -1),
        "not aligned to 16 bytes": kh.randn(2 * 20 * 24 + 1, dtype=dtype)[1:].view(2, 20, 24),
    }.items():
        check(symmetric_product, x, name=name)
    c = kh.randn(2, 20, 20, dtype=dtype, seed=1).mT
    check(symmetric_product, kh.randn(2, 20, 24, dtype=dtype), c, name="summand transposed")


@pytest.mark.parametrize("shape", [(0, 8, 8), (2, 0, 8), (2, 3, 0)], ids=str)
def test_empty(shape):
    x, square = kh.randn(*shape, dtype=torch.float32), (shape[0], shape[1], shape[1])
    check(symmetric_product, x)
    check(symmetric_product, x, kh.randn(*square, dtype=torch.float32), beta=2.0)


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(
    batch=st.integers(1, 3),
    rows=st.integers(1, 70),
    columns=st.integers(1, 70),
    scale=st.sampled_from([1e-10, 1e-2, 1.0, 30.0]),
    values=st.lists(st.sampled_from([INF, -INF, NAN, -0.0, 0.0, 200.0, 1e-7]), max_size=2),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(kh.DTYPES),
)
def test_any_shape_and_value(batch, rows, columns, scale, values, seed, dtype):
    x = kh.randn(batch, rows, columns, dtype=dtype, scale=scale, seed=seed)
    # Forward only: the gradient adds dy to its mirror image before it meets an infinity.
    kh.assert_op("any", symmetric_product, reference.symmetric_product, [kh.special_values(x, seed, values)], None)


def test_gradcheck():
    x, c = (kh.randn(2, 3, n, dtype=torch.float64, seed=n).requires_grad_() for n in (5, 3))
    assert torch.autograd.gradcheck(lambda x, c: symmetric_product(x, c, 2.0, -3.0), (x, c))
    assert torch.autograd.gradcheck(symmetric_product, (x,))


def test_repeatable():
    x, grad = kh.randn(2, 70, 40, dtype=torch.float32), kh.randn(2, 70, 70, dtype=torch.float32, seed=1)
    kh.assert_repeatable(symmetric_product, [x], [grad])


def test_custom_ops_and_compile():
    x, grad = kh.randn(2, 20, 24, dtype=torch.float32), kh.randn(2, 20, 20, dtype=torch.float32, seed=1)
    torch.library.opcheck(module._symmetric_product.op, (x.clone().requires_grad_(), grad, 2.0, -1.0))
    kh.assert_compiles(symmetric_product, [x, grad], [grad])


@pytest.mark.parametrize(
    "bad",
    [
        (torch.zeros(3, 5),),
        (torch.zeros(2, 3, 4, dtype=torch.int64),),
        (torch.zeros(2, 3, 4), torch.zeros(2, 4, 4)),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 3, dtype=torch.float16)),
    ],
    ids=["matrix", "integers", "other shape", "other dtype"],
)
def test_refuses(bad):
    with pytest.raises(ValueError, match="symmetric_product needs"):
        symmetric_product(*bad)


@pytest.mark.parametrize(
    "old, new",
    [
        ("acc = acc * alpha", "acc = acc * 1.0"),
        ("value = tl.trans(acc)", "value = acc"),
        ("tl.load(c_ptr + there, mask=mirrored", "tl.load(c_ptr + here, mask=mirrored"),
        ("(tile >= row * (row + 1) // 2)", "(tile > row * (row + 1) // 2)"),
        ("k < K - start)[None, :]", "k < K - start - 1)[None, :]"),
        ("pid // tiles", "pid // tiles * 0"),
        ("if i != j:", "if i > j + 1:"),
        ("mask = (rows < M)[:, None]", "mask = (rows < M - 1)[:, None]"),
    ],
)
def test_a_broken_kernel_is_seen(tmp_path, old, new):
    x, c = kh.randn(2, 150, 40, dtype=torch.float32), kh.randn(2, 150, 150, dtype=torch.float32, seed=1)
    kh.assert_broken(lambda m: check(m.symmetric_product, x, c, alpha=2.0), module, tmp_path, old, new)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", kh.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8, 768, 2432), (16, 384, 768), (8, 512, 1408), (2, 768, 768)], ids=str)
def test_model_shapes(shape, dtype):
    check(symmetric_product, kh.randn(*shape, dtype=dtype, scale=shape[2] ** -0.5))


@pytest.mark.gpu
def test_cuda_graph():
    kh.assert_captures(
        symmetric_product,
        [kh.randn(2, 384, 768, dtype=torch.bfloat16)],
        [kh.randn(2, 384, 384, dtype=torch.bfloat16, seed=1)],
    )
