"""Linear KL's kernel against the error rule, in several chunks: both directions, temperature, mask, shapes, autograd.

Runs the compiled kernel on a GPU (float32, float16, bfloat16), else the interpreter (float32, float16).
"""

from functools import partial

import kernel_helpers as kh
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind_fast.kernels import linear_kl as module
from minimind_fast.kernels.linear_kl import linear_kl
from minimind_fast.ops import reference

# The interpreter uses numpy, which warns where a GPU would not.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")
REAL_CHUNK_ROWS = module._chunk_rows
STUDENT = [True, True, False, False]  # which inputs' gradients to compute
# Leading shape, D, D', V, V': several chunks with a remainder, one token, no leading dimension, a vocabulary of one, several
# blocks, a teacher with a larger vocabulary.
SHAPES = [
    ((3, 5), 20, 12, 301, 301),
    ((1,), 64, 64, 7, 9),
    ((), 16, 8, 33, 33),
    ((9,), 8, 8, 1, 4),
    ((5,), 8, 3, 2049, 2100),
    ((2,), 3, 4, 6400, 6400),
]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "_chunk_rows", lambda V, itemsize: 4)


def draw(leading, D, teacher_D, V, teacher_V, dtype, seed=0, scale=2.0):
    """-> student's hidden and weight, teacher's hidden and weight, mask (the first token is never masked), gradient."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(leading, generator=generator) < 0.7
    if mask.numel():
        mask.view(-1)[0] = True
    inputs = [
        kh.randn(*leading, D, dtype=dtype, seed=seed),
        kh.randn(V, D, dtype=dtype, seed=seed + 1, scale=scale * D**-0.5),
        kh.randn(*leading, teacher_D, dtype=dtype, seed=seed + 2),
        kh.randn(teacher_V, teacher_D, dtype=dtype, seed=seed + 3, scale=scale * teacher_D**-0.5),
    ]
    grad = kh.randn(mask.numel(), dtype=torch.float32, seed=seed + 4).view(mask.shape)
    return inputs, mask.to(kh.DEVICE), grad


def check(op, inputs, grad, name="linear_kl", wanted=STUDENT, **options):
    kh.assert_op(name, partial(op, **options), partial(reference.linear_kl, **options), inputs, [grad], wanted)


@pytest.mark.parametrize("dtype", kh.DTYPES, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule(shape, reverse, dtype):
    inputs, mask, grad = draw(*shape, dtype)
    check(linear_kl, inputs, grad, mask=mask, temperature=1.7, reverse=reverse)


@pytest.mark.parametrize("dtype", kh.DTYPES, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_without_mask_and_temperature(reverse, dtype):
    inputs, _, grad = draw(*SHAPES[0], dtype)
    check(linear_kl, inputs, grad, reverse=reverse)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=str)
def test_gradients_only_where_asked(wanted, monkeypatch):
    inputs, mask, grad = draw(*SHAPES[0], torch.float32)
    check(linear_kl, inputs, grad, wanted=[*wanted, False, False], mask=mask)
    if not wanted[1]:

        def never(*_):
            raise AssertionError("d_weight was computed")

        monkeypatch.setattr(module, "add_product", never)
        linear_kl(inputs[0].requires_grad_(), *inputs[1:]).sum().backward()


def test_no_gradient_reaches_the_teacher():
    inputs, mask, grad = draw(*SHAPES[0], torch.float32)
    leaves = [t.requires_grad_() for t in inputs]
    gradients = torch.autograd.grad(linear_kl(*leaves, mask), leaves, grad, allow_unused=True)
    assert [g is not None for g in gradients] == STUDENT
    student, teacher = leaves[:2], leaves[2:]
    assert not linear_kl(*(t.detach() for t in student), *teacher).requires_grad


@pytest.mark.parametrize("dtype", kh.DTYPES, ids=str)
def test_the_divergence_from_itself_is_zero(dtype):
    inputs, _, _ = draw((5,), 20, 20, 301, 301, dtype)
    student = inputs[0].requires_grad_()
    for reverse in (False, True):
        kl = linear_kl(student, inputs[1], student.detach(), inputs[1], reverse=reverse)
        (d,) = torch.autograd.grad(kl.sum(), student)
        assert not kl.any() and not d.any()


@pytest.mark.parametrize("dtype", kh.DTYPES, ids=str)
def test_strides(dtype):
    inputs, mask, grad = draw((3, 2), 24, 10, 50, 60, dtype)
    x, w, y, v = inputs
    for name, case, m, g in [
        ("columns of wider tensors", [kh.randn(3, 2, 60, dtype=dtype)[..., 3:27], w, y, v], mask, grad),
        ("leading dimensions swapped", [x.transpose(0, 1), w, y.transpose(0, 1), v], mask.t(), grad.t()),
        ("last dimension not contiguous", [kh.randn(24, 3, dtype=dtype).t(), w, y[:, 0], v], mask[:, 1], grad[:, 0]),
        ("one row repeated", [x[:1].expand(3, 2, 24), w, y[:1].expand(3, 2, 10), v], mask[:1].expand(3, 2), grad),
        ("weights' rows apart", [x, kh.randn(100, 24, dtype=dtype)[::2], y, v.repeat(2, 1)[::2]], mask, grad),
        ("weights transposed", [x, kh.randn(24, 50, dtype=dtype).t(), y, v.t().contiguous().t()], mask, grad),
        ("expanded gradient", inputs, mask, grad[:1, :1].expand(3, 2)),
    ]:
        check(linear_kl, case, g, name, mask=m)


@pytest.mark.parametrize("leading", [(0,), (3, 0)], ids=str)
def test_no_tokens(leading):
    inputs, mask, grad = draw(leading, 8, 4, 30, 30, torch.float32)
    check(linear_kl, inputs, grad, mask=mask)


def test_all_masked():
    inputs, mask, grad = draw((6,), 8, 4, 30, 30, torch.float32)
    check(linear_kl, inputs, grad, mask=torch.zeros_like(mask))


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(
    tokens=st.integers(3, 13),
    D=st.integers(1, 40),
    teacher_D=st.integers(1, 40),
    V=st.integers(2, 300),
    more=st.integers(0, 20),
    scale=st.sampled_from([0.1, 1.0, 8.0]),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    reverse=st.booleans(),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(kh.DTYPES),
)
def test_any_shape_and_scale(tokens, D, teacher_D, V, more, scale, temperature, reverse, seed, dtype):
    inputs, mask, grad = draw((tokens,), D, teacher_D, V, V + more, dtype, seed, scale)
    check(linear_kl, inputs, grad, mask=mask, temperature=temperature, reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(reverse):
    inputs, mask, _ = draw((5,), 2, 3, 3, 4, torch.float64)
    op = partial(linear_kl, mask=mask, temperature=1.3, reverse=reverse)
    student = [t.requires_grad_() for t in inputs[:2]]
    assert torch.autograd.gradcheck(lambda x, w: op(x, w, *inputs[2:]), student)


def test_second_derivative_is_refused():
    inputs, mask, _ = draw((6,), 8, 4, 30, 30, torch.float32)
    kh.assert_refuses_second_derivative(lambda x: linear_kl(x, *inputs[1:], mask), inputs[0])


def test_repeatable():
    inputs, mask, grad = draw((11,), 24, 12, 130, 130, torch.float32)
    kh.assert_repeatable(lambda x, w: linear_kl(x, w, *inputs[2:], mask), inputs[:2], [grad])


def test_custom_ops_and_compile():
    inputs, mask, grad = draw((7,), 12, 8, 40, 44, torch.float32)
    kl, lse = module._linear_kl_fwd(*inputs, mask, 0.7, False)
    leaves = [t.clone().requires_grad_() for t in inputs[:2]]
    torch.library.opcheck(module._linear_kl_fwd.op, (*leaves, *inputs[2:], mask, 0.7, True))
    # Ops without a gradient need no test of autograd tracing.
    backward = (grad, *inputs, None, kl, lse, 0.7, False, True, True)
    torch.library.opcheck(module._linear_kl_bwd.op, backward, test_utils=("test_schema", "test_faketensor"))
    kh.assert_compiles(lambda x, w: linear_kl(x, w, *inputs[2:], mask, 0.7), inputs[:2], [grad])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"student_hidden": torch.zeros(6, 9)}, "from the student"),
        ({"teacher_weight": torch.zeros(40, 5)}, "from the teacher"),
        ({"teacher_weight": torch.zeros(29, 4)}, "smaller than the student's"),
        ({"teacher_hidden": torch.zeros(6, 4, dtype=torch.float16)}, "one floating-point dtype"),
        ({"teacher_hidden": torch.zeros(5, 4)}, "the same tokens"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, "bool mask"),
        ({"mask": torch.ones(6)}, "bool mask"),
        ({"temperature": -1.0}, "positive temperature"),
    ],
)
def test_refuses(change, message):
    good = {
        "student_hidden": torch.zeros(6, 8),
        "student_weight": torch.zeros(30, 8),
        "teacher_hidden": torch.zeros(6, 4),
        "teacher_weight": torch.zeros(30, 4),
    }
    with pytest.raises(ValueError, match=message):
        linear_kl(**{**good, **change})


@pytest.mark.parametrize("V", [1, 100, 6400, 6401, 32000, 151936])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_chunk_rows(V, itemsize):
    rows = REAL_CHUNK_ROWS(V, itemsize)
    both = 2 * V * itemsize
    assert rows % 128 == 0 and rows >= 128
    assert rows == module.MIN_CHUNK_ROWS or rows * both <= module.CHUNK_BYTES < (rows + 128) * both


def test_peak_memory(monkeypatch):
    """Against both models' logits stored only in bfloat16, the strictest measure (eager also holds float32 copies)."""
    monkeypatch.setattr(module, "_chunk_rows", REAL_CHUNK_ROWS)
    T, V, D = 65536, 6400, 768
    assert module.buffer_bytes(T, D, V, 2) <= 0.1 * 2 * T * V * 2


@pytest.mark.parametrize(
    "old, new",
    [
        ("total = total * tl.exp((top - new_top) * scale)", "total = total"),
        ("(z - new_top) * scale", "(z - new_top)"),
        ("tl.exp(p) * (p - q)", "tl.exp(q) * (p - q)"),
        ("tl.exp(q) * (q - p) if", "tl.exp(p) * (q - p) if"),
        ("tl.where(inside, term, 0.0)", "term"),
        ("teacher_lse = tl.load(lse_ptr + num_tokens + row)", "teacher_lse = tl.load(lse_ptr + row)"),
        ("(q - p - kl)", "(q - p)"),
        ("grad = tl.load(grad_ptr + row).to(wide) * scale", "grad = tl.load(grad_ptr + row).to(wide)"),
        ("tl.zeros((BLOCK_V,), dtype=narrow)", "tl.load(student_at + cols)"),
        ("total.addmm_(a.t(), b)", "total.copy_(a.t() @ b)"),
        ("as_matrix(teacher_hidden), teacher_weight[:V]", "as_matrix(teacher_hidden), teacher_weight[-V:]"),
        ("slice(start, min(start + most, T))", "slice(start, min(start + most, T - 1))"),
    ],
)
def test_a_broken_kernel_is_seen(tmp_path, monkeypatch, old, new):
    inputs, mask, grad = draw((5,), 12, 8, 40, 44, torch.float32)

    def checks(m):
        monkeypatch.setattr(m, "_chunk_rows", lambda V, itemsize: 4)
        # Several blocks a row, so that the maximum changes.
        monkeypatch.setattr(m, "_launch_params", lambda V: {"BLOCK_V": 16, "num_warps": 1, "num_stages": 1})
        check(m.linear_kl, inputs, grad, mask=mask, temperature=0.7, reverse="q - p" in old)

    kh.assert_broken(checks, module, tmp_path, old, new)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", kh.DTYPES, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("D, teacher_D, V, teacher_V", [(512, 768, 6400, 6400), (768, 1024, 6401, 6500)])
def test_model_shapes(D, teacher_D, V, teacher_V, reverse, dtype, monkeypatch):
    monkeypatch.setattr(module, "_chunk_rows", REAL_CHUNK_ROWS)
    inputs, mask, grad = draw((3001,), D, teacher_D, V, teacher_V, dtype)
    check(linear_kl, inputs, grad, mask=mask, temperature=2.0, reverse=reverse)


@pytest.mark.gpu
def test_large_vocabulary(monkeypatch):
    monkeypatch.setattr(module, "_chunk_rows", REAL_CHUNK_ROWS)
    inputs, mask, grad = draw((1100,), 512, 768, 151643, 151936, torch.bfloat16)
    check(linear_kl, inputs, grad, mask=mask)


@pytest.mark.gpu
def test_peak_memory_on_a_gpu(monkeypatch):
    monkeypatch.setattr(module, "_chunk_rows", REAL_CHUNK_ROWS)
    T, D, V = 65536, 512, 6400
    inputs, _, _ = draw((T,), D, 768, V, V, torch.bfloat16)
    hidden, weight, *teacher = inputs
    hidden.requires_grad_(), weight.requires_grad_()
    linear_kl(hidden[:4096], weight, teacher[0][:4096], teacher[1]).sum().backward()  # cuBLAS's workspace, once
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_kl(hidden, weight, *teacher).sum().backward()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    returned = 2 * (hidden.numel() + weight.numel())
    assert peak - returned <= module.buffer_bytes(T, D, V, 2) + (8 << 20)


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu():
    inputs, mask, _ = draw((64,), 64, 32, 300, 320, torch.bfloat16)
    inputs[0].requires_grad_(), inputs[1].requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_kl(*inputs, mask).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_cuda_graph():
    inputs, mask, grad = draw((300,), 512, 768, 6400, 6400, torch.bfloat16)
    kh.assert_captures(lambda x, w: linear_kl(x, w, *inputs[2:], mask), inputs[:2], [grad])
