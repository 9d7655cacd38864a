"""Linear cross-entropy's kernel against the error rule, in several chunks: values, shapes, both forms of the gradient.

Runs the compiled kernel on a GPU (float32, float16, bfloat16), else the interpreter (float32, float16).
"""

from functools import partial

import kernel_helpers as kh
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind_fast import ops
from minimind_fast.kernels import linear_cross_entropy as module
from minimind_fast.kernels.linear_cross_entropy import linear_cross_entropy
from minimind_fast.ops import reference

# The interpreter uses numpy, which warns where a GPU would not.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")
REAL_CHUNK_ROWS = module._chunk_rows
# Leading shape, D, V: several chunks with a remainder, one token, no leading dimension; vocabularies of one, of a block and
# one more, of several blocks.
SHAPES = [
    ((3, 5), 20, 301),
    ((1,), 64, 7),
    ((), 16, 33),
    ((9,), 8, 1),
    ((4,), 8, 2048),
    ((5,), 8, 2049),
    ((2,), 3, 6400),
]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "_chunk_rows", lambda V, itemsize: 4)


def draw(leading, D, V, dtype, seed=0, scale=3.0, ignored=0.3):
    """-> hidden, weight, targets; the first target is never ignored."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(V, leading, generator=generator)
    drop = torch.rand(leading, generator=generator) < ignored
    if targets.numel():
        drop.view(-1)[0] = False
    hidden = kh.randn(*leading, D, dtype=dtype, seed=seed)
    return [
        hidden,
        kh.randn(V, D, dtype=dtype, seed=seed + 1, scale=scale * D**-0.5),
        targets.masked_fill(drop, -100).to(hidden.device),
    ]


def gradient(targets, seed=7):
    return kh.randn(targets.numel(), dtype=torch.float32, seed=seed).view(targets.shape)


def check(op, inputs, name="linear_cross_entropy", wanted=None, grads=None, **options):
    grads = grads or [gradient(inputs[2], seed) for seed in ((7, 8) if options.get("return_entropy") else (7,))]
    kh.assert_op(
        name, partial(op, **options), partial(reference.linear_cross_entropy, **options), inputs, grads, wanted
    )


def check_grad_weights(op, inputs, factor=0.25, wanted=None, **options):
    """The three-matmul form, where the incoming gradient is factor times the promised one."""
    grad = gradient(inputs[2])
    kh.assert_op(
        "with grad_weights",
        partial(op, grad_weights=grad / factor, **options),
        partial(reference.linear_cross_entropy, **options),
        inputs,
        [grad],
        wanted,
    )


@pytest.mark.parametrize("dtype", kh.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule(shape, dtype):
    check(linear_cross_entropy, draw(*shape, dtype))


@pytest.mark.parametrize("dtype", kh.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [((3, 5), 20, 301), ((9,), 64, 7), ((9,), 8, 1), ((5,), 8, 2100)], ids=str)
def test_entropy_and_temperature(shape, dtype):
    check(linear_cross_entropy, draw(*shape, dtype), temperature=0.7, return_entropy=True)


@pytest.mark.parametrize("only", ["logprobs", "entropy"])
def test_one_output_has_a_gradient(only):
    inputs = draw((9,), 12, 130, torch.float32)
    grads = [gradient(inputs[2]) if only == name else None for name in ("logprobs", "entropy")]
    check(linear_cross_entropy, inputs, grads=grads, return_entropy=True)


@pytest.mark.parametrize("dtype", kh.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_grad_weights(shape, dtype):
    check_grad_weights(linear_cross_entropy, draw(*shape, dtype), temperature=1.4)


def check_scaled(m, dtype=torch.float16):
    """Only the product is rounded: a factor that is not a power of two keeps its digits in a narrow dtype."""
    source = kh.randn(3, 2000, dtype=dtype)
    for factor in (-1 / 3, 1 / 51234, 77.7):
        exact = torch.tensor(factor, dtype=torch.float64, device=kh.DEVICE)
        with kh.poisoned_memory():
            out = m._scaled(source, exact, dtype)
        product, finfo = source.double() * exact, torch.finfo(dtype)
        # Half a unit in the last place, and the factor's own rounding to float32.
        half = finfo.eps / 2 + torch.finfo(torch.float32).eps
        smallest = finfo.smallest_normal * finfo.eps
        assert ((out - product).abs() <= half * product.abs() + smallest / 2 * (1 + 1e-6)).all()


@pytest.mark.parametrize("dtype", kh.DTYPES, ids=str)
def test_the_factor_is_not_rounded(dtype):
    check_scaled(module, dtype)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=str)
def test_gradients_only_where_asked(wanted):
    inputs = draw((6,), 12, 70, torch.float32)
    wanted = [*wanted, False]
    check(linear_cross_entropy, inputs, wanted=wanted, return_entropy=True)
    check_grad_weights(linear_cross_entropy, inputs, wanted=wanted)


def test_gradients_that_nobody_asked_for_are_not_computed(monkeypatch):
    def never(*_):
        raise AssertionError("d_weight was computed")

    monkeypatch.setattr(module, "add_product", never)
    hidden, weight, targets = draw((6,), 12, 70, torch.float32)
    hidden.requires_grad_()
    for options in ({}, {"grad_weights": torch.ones(6, device=kh.DEVICE)}):
        linear_cross_entropy(hidden, weight, targets, **options).sum().backward()
    with torch.no_grad():
        weight.requires_grad_()
        out = linear_cross_entropy(hidden, weight, targets, grad_weights=torch.ones(6, device=kh.DEVICE))
    assert not out.requires_grad


@pytest.mark.parametrize("dtype", kh.DTYPES, ids=str)
def test_strides(dtype):
    hidden, weight, targets = draw((3, 2), 24, 50, dtype)
    wide = kh.randn(3, 2, 60, dtype=dtype)
    for name, case in {
        "columns of a wider tensor": [wide[..., 3:27], weight, targets],
        "leading dimensions swapped": [hidden.transpose(0, 1), weight, targets.t()],
        "last dimension not contiguous": [kh.randn(24, 3, dtype=dtype).t(), weight, targets[:, 0]],
        "one row repeated": [hidden[:1].expand(3, 2, 24), weight, targets[:1, :1].expand(3, 2)],
        "weight's rows apart": [hidden, kh.randn(100, 24, dtype=dtype)[::2], targets],
        "weight transposed": [hidden, kh.randn(24, 50, dtype=dtype).t(), targets],
        "int32 targets": [hidden, weight, targets],
    }.items():
        op = (lambda x, w, t: linear_cross_entropy(x, w, t.int())) if name == "int32 targets" else linear_cross_entropy
        check(op, case, name)
    check(linear_cross_entropy, [hidden, weight, targets], grads=[kh.randn(1, dtype=torch.float32).expand(3, 2)])


@pytest.mark.parametrize("leading", [(0,), (3, 0)], ids=str)
def test_no_tokens(leading):
    inputs = draw(leading, 8, 30, torch.float32)
    check(linear_cross_entropy, inputs, return_entropy=True)
    check_grad_weights(linear_cross_entropy, inputs)


def test_all_ignored():
    inputs = draw((6,), 8, 30, torch.float32)
    inputs[2] = torch.full_like(inputs[2], -100)
    check(linear_cross_entropy, inputs, return_entropy=True)
    check_grad_weights(linear_cross_entropy, inputs)


@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(
    tokens=st.integers(1, 13),
    D=st.integers(1, 40),
    V=st.integers(1, 300),
    scale=st.sampled_from([1e-4, 1.0, 8.0, 60.0]),
    ignored=st.sampled_from([0.0, 0.5]),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    entropy=st.booleans(),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(kh.DTYPES),
)
def test_any_shape_and_scale(tokens, D, V, scale, ignored, temperature, entropy, seed, dtype):
    inputs = draw((tokens,), D, V, dtype, seed, scale, ignored)
    check(linear_cross_entropy, inputs, temperature=temperature, return_entropy=entropy)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 3e38])
def test_infinite_logits(value):
    # One column of weight times one of hidden, all positive: entire logits become inf, -inf or nan.
    hidden, weight, targets = draw((5,), 4, 40, torch.float32, ignored=0.0)
    hidden = hidden.abs() + 1.0
    weight[3], targets[1] = value, 3
    kh.assert_op("infinite", linear_cross_entropy, reference.linear_cross_entropy, [hidden, weight, targets], None)


def test_targets_outside_the_vocabulary_give_nan():
    hidden, weight, targets = draw((6,), 8, 30, torch.float32, ignored=0.0)
    targets[1], targets[4] = 30, -1
    hidden.requires_grad_()
    out = linear_cross_entropy(hidden, weight, targets)
    (d_hidden,) = torch.autograd.grad(out.nan_to_num().sum(), hidden)
    bad = torch.tensor([False, True, False, False, True, False], device=kh.DEVICE)
    assert torch.equal(out.isnan(), bad)
    assert torch.equal(d_hidden.isnan().all(1), bad) and torch.equal(d_hidden.isnan().any(1), bad)


def test_a_broken_promise_is_told():
    """On a CPU it raises in the backward; on a GPU, without a sync, gradients are nan and the next check raises."""
    hidden, weight, targets = draw((9,), 8, 30, torch.float32)
    promised = gradient(targets)
    hidden.requires_grad_(), weight.requires_grad_()

    def gradients(grad):
        out = linear_cross_entropy(hidden, weight, targets, grad_weights=promised)
        return torch.autograd.grad(out, (hidden, weight), grad)

    free = promised.masked_fill(targets == -100, 1e3)  # ignored targets are not part of the promise
    for kept in (promised, -3 * promised, 0 * promised, free, promised * (1 + 1e-6)):
        assert all(d.isfinite().all() for d in gradients(kept))
    broken = promised.clone()
    broken[0] *= 1.0 + 1e-3
    assert all(d.isnan().all() for d in gradients(promised * float("nan")))  # a nan loss breaks no promise
    ops.check_promises()

    def assert_told(grad):
        with pytest.raises(ops.BrokenPromise, match="one number times the sum of grad_weights.*leave grad_weights out"):
            assert all(d.isnan().all() for d in gradients(grad))
            ops.check_promises()
        ops.check_promises()  # reported once

    for grad in (broken, promised + 1.0, promised.abs()):
        assert_told(grad)
    promised = torch.zeros_like(promised)
    assert_told(torch.ones_like(promised))


@pytest.mark.gpu
def test_a_broken_promise_in_a_cuda_graph_is_told():
    hidden, weight, targets = draw((9,), 8, 30, torch.float32, ignored=0.0)
    promised, grad = gradient(targets), gradient(targets) * 2.0
    ops.describe("cuda")
    hidden.requires_grad_()

    def step():
        out = linear_cross_entropy(hidden, weight, targets, grad_weights=promised)
        return torch.autograd.grad(out, hidden, grad)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    ops.check_promises()
    graph.replay()
    ops.check_promises()
    grad.mul_(torch.linspace(0.5, 1.0, 9, device="cuda"))
    graph.replay()
    grad.copy_(promised)
    graph.replay()  # a promise kept later does not clear the flag
    with pytest.raises(ops.BrokenPromise):
        ops.check_promises()


def test_gradcheck():
    hidden, weight, targets = draw((5,), 2, 3, torch.float64)
    hidden.requires_grad_(), weight.requires_grad_()
    op = partial(linear_cross_entropy, targets=targets, temperature=1.3, return_entropy=True)
    assert torch.autograd.gradcheck(op, (hidden, weight))
    # The three-matmul form, for the gradient of a weighted sum.
    w = gradient(targets)
    op = partial(linear_cross_entropy, targets=targets, temperature=1.3, grad_weights=w)
    assert torch.autograd.gradcheck(lambda x, y: (op(x, y) * w).sum() * 0.7, (hidden, weight))


def test_second_derivative_is_refused():
    hidden, weight, targets = draw((6,), 8, 30, torch.float32)
    for options in ({}, {"return_entropy": True}, {"grad_weights": torch.ones(6, device=kh.DEVICE)}):
        op = partial(linear_cross_entropy, weight=weight, targets=targets, **options)
        as_tensor = (lambda x, op=op: sum(op(x))) if "return_entropy" in options else op
        kh.assert_refuses_second_derivative(as_tensor, hidden)


def test_repeatable():
    hidden, weight, targets = draw((11,), 24, 130, torch.float32)
    w = gradient(targets)
    for options in ({}, {"grad_weights": w}):
        kh.assert_repeatable(lambda x, y, o=options: linear_cross_entropy(x, y, targets, **o), [hidden, weight], [w])


def test_custom_ops_and_compile():
    inputs = draw((7,), 12, 40, torch.float32)
    grad = gradient(inputs[2])
    leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in inputs]
    logprobs, entropy, lse = module._linear_cross_entropy_fwd(*inputs, 1.0, True)
    # Ops without a gradient need no test of autograd tracing.
    traced = ("test_schema", "test_faketensor")
    torch.library.opcheck(module._linear_cross_entropy_fwd.op, (*leaves, 0.7, True))
    backward = (grad, grad, *inputs, entropy, lse, 0.7, True, True)
    torch.library.opcheck(module._linear_cross_entropy_bwd.op, backward, test_utils=traced)
    # The op's backward checks the promise; opcheck's gradients of ones keep it.
    ones = torch.ones_like(grad)
    torch.library.opcheck(module._linear_cross_entropy_both.op, (*leaves, ones, 0.7, True, True))
    scale = (ones, inputs[2], ones, *inputs[:2])
    torch.library.opcheck(module._linear_cross_entropy_scale.op, scale, test_utils=traced)
    hidden, weight, targets = inputs

    def with_entropy(x, y):
        return linear_cross_entropy(x, y, targets, 0.7, return_entropy=True)

    kh.assert_compiles(with_entropy, [hidden, weight], [grad, grad])
    kh.assert_compiles(lambda x, y: linear_cross_entropy(x, y, targets, grad_weights=grad), [hidden, weight], [grad])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden": torch.zeros(6, 9)}, "hidden \\(..., D\\)"),
        ({"weight": torch.zeros(8)}, "hidden \\(..., D\\)"),
        ({"weight": torch.zeros(30, 8, dtype=torch.float16)}, "one floating-point dtype"),
        ({"targets": torch.zeros(5, dtype=torch.int64)}, "integer targets"),
        ({"targets": torch.zeros(6)}, "integer targets"),
        ({"temperature": 0.0}, "positive temperature"),
        ({"grad_weights": torch.ones(6), "return_entropy": True}, "no entropy"),
        ({"grad_weights": torch.ones(5)}, "float32 grad_weights"),
    ],
)
def test_refuses(change, message):
    good = {"hidden": torch.zeros(6, 8), "weight": torch.zeros(30, 8), "targets": torch.zeros(6, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**good, **change})


@pytest.mark.parametrize("V", [1, 100, 6400, 6401, 32000, 151936])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_chunk_rows(V, itemsize):
    rows = REAL_CHUNK_ROWS(V, itemsize)
    assert rows % 128 == 0 and rows >= 128
    assert rows == module.MIN_CHUNK_ROWS or rows * V * itemsize <= module.CHUNK_BYTES < (rows + 128) * V * itemsize


def test_peak_memory(monkeypatch):
    monkeypatch.setattr(module, "_chunk_rows", REAL_CHUNK_ROWS)
    T, V, D = 65536, 6400, 768
    # Compared with logits stored only in bfloat16, the strictest measure; eager also holds float32 copies.
    assert module.buffer_bytes(T, D, V, 2) <= 0.1 * T * V * 2
    # With grad_weights d_hidden exists from the forward on; against bfloat16 logits and one float32 copy.
    assert module.buffer_bytes(T, D, V, 2, with_grad_weights=True) <= 0.1 * T * V * (2 + 4)


@pytest.mark.parametrize("with_grad_weights", [False, True])
def test_peak_memory_is_what_is_counted(monkeypatch, with_grad_weights):
    """No tensor exceeds the count, and nothing else is saved for the backward."""
    monkeypatch.setattr(module, "_chunk_rows", lambda V, itemsize: 8)
    T, D, V = 64, 8, 50
    hidden, weight, targets = draw((T,), D, V, torch.float32)
    hidden.requires_grad_(), weight.requires_grad_()
    saved = []

    def pack(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        w = torch.ones(T, device=kh.DEVICE)
        linear_cross_entropy(hidden, weight, targets, grad_weights=w if with_grad_weights else None)
    given = {t.data_ptr() for t in (hidden, weight, targets, w)}
    kept = sum(t.numel() * t.element_size() for t in saved if t.data_ptr() not in given)
    chunk = 8 * 64 * 4
    assert kept <= module.buffer_bytes(T, D, V, 4, with_grad_weights) - chunk


@pytest.mark.parametrize(
    "old, new",
    [
        ("total = total * old + tl.sum(e, axis=0)", "total = total + tl.sum(e, axis=0)"),
        ("(weighted + moved) * old", "weighted * old"),
        ("* inv_temperature - log_total", "* inv_temperature"),
        ("log_total - weighted / total", "log_total - weighted"),
        ("tl.where(cols == target, 1.0, 0.0)", "tl.where(cols == target + 1, 1.0, 0.0)"),
        ("(logp + entropy)", "logp"),
        ("grad = tl.load(grad_ptr + row).to(wide) * inv_temperature", "grad = tl.load(grad_ptr + row).to(wide)"),
        ("tl.zeros((BLOCK_V,), dtype=logits_ptr.dtype.element_ty)", "tl.load(at + cols)"),
        ("total.addmm_(a.t(), b)", "total.copy_(a.t() @ b)"),
        ("slice(start, min(start + buffer.shape[0], x.shape[0]))", "slice(start, min(start + 4, x.shape[0] - 1))"),
        ("return _scaled(d_hidden, s,", "return _scaled(d_hidden, 1 / s,"),
        ("tl.load(factor_ptr).to(wide)", "tl.load(factor_ptr).to(out_ptr.dtype.element_ty).to(wide)"),
    ],
)
def test_a_broken_kernel_is_seen(tmp_path, monkeypatch, old, new):
    inputs = draw((5,), 12, 40, torch.float32, scale=2.0, ignored=0.6)

    def checks(m):
        monkeypatch.setattr(m, "_chunk_rows", lambda V, itemsize: 4)
        # Several blocks a row, so that the maximum changes.
        monkeypatch.setattr(m, "_launch_params", lambda V: {"BLOCK_V": 16, "num_warps": 1, "num_stages": 1})
        if "_scaled" in old:
            check_grad_weights(m.linear_cross_entropy, inputs)
        elif "factor" in old:
            check_scaled(m)
        else:
            check(m.linear_cross_entropy, inputs, temperature=0.7, return_entropy=True)

    kh.assert_broken(checks, module, tmp_path, old, new)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", kh.DTYPES, ids=str)
@pytest.mark.parametrize("D, V", [(768, 6400), (512, 6401), (768, 151936)])
def test_model_shapes(D, V, dtype, monkeypatch):
    monkeypatch.setattr(module, "_chunk_rows", REAL_CHUNK_ROWS)
    inputs = draw((3001,), D, V, dtype)
    check(linear_cross_entropy, inputs, return_entropy=True)
    check_grad_weights(linear_cross_entropy, inputs)


@pytest.mark.gpu
def test_peak_memory_on_a_gpu(monkeypatch):
    monkeypatch.setattr(module, "_chunk_rows", REAL_CHUNK_ROWS)
    T, D, V = 65536, 768, 6400
    hidden, weight, targets = draw((T,), D, V, torch.bfloat16)
    hidden.requires_grad_(), weight.requires_grad_()
    linear_cross_entropy(hidden[:4096], weight, targets[:4096]).sum().backward()  # cuBLAS's workspace, once
    for with_grad_weights in (False, True):
        hidden.grad = weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        w = torch.ones(T, device="cuda")
        linear_cross_entropy(hidden, weight, targets, grad_weights=w if with_grad_weights else None).sum().backward()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        returned = 2 * (hidden.numel() + weight.numel())
        assert peak - returned <= module.buffer_bytes(T, D, V, 2, with_grad_weights) + (8 << 20)


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu():
    hidden, weight, targets = draw((64,), 64, 300, torch.bfloat16)
    hidden.requires_grad_(), weight.requires_grad_()
    w = torch.ones(64, device="cuda")
    for options in ({}, {"grad_weights": w}):
        torch.cuda.set_sync_debug_mode("error")
        try:
            linear_cross_entropy(hidden, weight, targets, **options).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_cuda_graph():
    inputs = draw((300,), 768, 6400, torch.bfloat16, ignored=0.0)
    grad = torch.ones(300, device="cuda")
    kh.assert_captures(linear_cross_entropy, inputs, [grad])
    kh.assert_captures(partial(linear_cross_entropy, grad_weights=grad), inputs, [grad])
