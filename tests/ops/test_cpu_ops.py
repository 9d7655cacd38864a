"""The CPU ops: outputs and gradients no worse than eager's, for any chunk size."""

import pytest
import torch

from minimind_fast import ops
from minimind_fast.config import IGNORE_INDEX as IGNORE
from minimind_fast.ops import reference
from minimind_fast.ops.cpu import fused as cpu_ops


def rms_inputs(rows=37, width=48, **_):
    return dict(x=torch.randn(rows, width), weight=torch.rand(width) + 0.5, residual=torch.randn(rows, width))


def rope_inputs(rows=29, heads=4, kv_heads=2, hd=8, norm=True):
    table = torch.rand(64, hd // 2) * 6.28
    weights = dict(q_weight=torch.rand(hd) + 0.5, k_weight=torch.rand(hd) + 0.5) if norm else {}
    fixed = dict(cos=table.cos(), sin=table.sin(), positions=torch.randint(0, 64, (rows,)))
    return dict(qkv=torch.randn(rows, (heads + 2 * kv_heads) * hd), **weights), fixed


def head_inputs(rows=41, width=16, vocab=50):
    targets = torch.randint(0, vocab, (rows,))
    targets[::5] = IGNORE
    return dict(hidden=torch.randn(rows, width), weight=torch.randn(vocab, width)), targets, torch.rand(rows) + 0.5


def build(name, **how):
    """-> (differentiable inputs, function of (implementation module, inputs))."""
    torch.manual_seed(0)
    if name == "rms_norm":
        cast_first = how.pop("cast_first", False)
        given = rms_inputs(**how)
        return given, lambda m, i: m.rms_norm(i["x"], i["weight"], 1e-5, i.get("residual"), cast_first)
    if name == "rope":
        given, fixed = rope_inputs(**how)
        return given, lambda m, i: m.rope(
            i["qkv"], fixed["cos"].to(i["qkv"].dtype if i["qkv"].dtype == torch.float64 else torch.float32),
            fixed["sin"].to(i["qkv"].dtype if i["qkv"].dtype == torch.float64 else torch.float32), fixed["positions"],
            4, 2, i.get("q_weight"), i.get("k_weight"),
        )  # fmt: skip
    if name == "swiglu":
        return dict(gate_up=torch.randn(how.get("rows", 33), how.get("width", 40)) * 3), lambda m, i: m.swiglu(
            i["gate_up"]
        )
    given, targets, weights = head_inputs(**how)
    return (
        given,
        lambda m, i: (
            m.linear_cross_entropy(i["hidden"], i["weight"], targets, grad_weights=weights)
            * weights.to(i["hidden"].dtype if i["hidden"].dtype == torch.float64 else torch.float32)
        ),
    )


def run(module, given, call, dtype):
    """Outputs and gradients of one implementation."""
    inputs = {k: v.to(dtype).requires_grad_() for k, v in given.items()}
    out = call(module, inputs)
    outs = out if isinstance(out, tuple) else (out,)
    torch.manual_seed(1)
    # The head's promise allows a single factor; 0.5 is exact.
    loss = sum((o * (0.5 if "hidden" in given else torch.randn(o.shape))).sum() for o in outs)
    return outs, torch.autograd.grad(loss, list(inputs.values()))


CASES = [
    ("rms_norm", {}), ("rms_norm", dict(cast_first=True)), ("rms_norm", dict(rows=1, width=7)),
    ("rope", {}), ("rope", dict(norm=False)), ("rope", dict(rows=1, hd=6)), ("swiglu", {}),
    ("linear_cross_entropy", {}), ("linear_cross_entropy", dict(rows=1)),
]  # fmt: skip


@pytest.fixture(autouse=True, params=[96, 2**18], ids=["many chunks", "one chunk"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(cpu_ops, "CHUNK", request.param)
    monkeypatch.setattr(cpu_ops, "HEAD_ROWS", max(1, request.param // 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "how"), CASES)
def test_error_rule(name, how, dtype):
    given, call = build(name, **how)
    given = {k: v.to(dtype).float() for k, v in given.items()}
    truth = run(reference, {k: v.double() for k, v in given.items()}, call, torch.float64)
    eager, mine = (run(module, given, call, dtype) for module in (reference, cpu_ops))
    for t, e, m in zip(*(o + g for o, g in (truth, eager, mine)), strict=True):
        theirs, ours = ((x.double() - t).norm() for x in (e, m))
        assert ours <= 1.1 * theirs + 1e-6 * t.norm(), (name, float(ours), float(theirs))


# Few elements, as each takes two passes; the width is that of a row, of which two make a chunk or all do.
SMALL = [
    ("rms_norm", dict(rows=5, width=6), 6), ("rms_norm", dict(rows=5, width=6, cast_first=True), 6),
    ("rms_norm", dict(rows=1, width=7), 7), ("rope", dict(rows=3, hd=4), 32), ("rope", dict(rows=3, hd=4, norm=False), 32),
    ("rope", dict(rows=1, hd=6), 48), ("swiglu", dict(rows=5, width=6), 3),
]  # fmt: skip


@pytest.mark.parametrize(("name", "how", "width"), SMALL)
def test_gradients_in_float64(monkeypatch, name, how, width):
    if cpu_ops.CHUNK == 96:
        monkeypatch.setattr(cpu_ops, "CHUNK", 2 * width)
        assert how["rows"] == 1 or len(list(cpu_ops._chunks(how["rows"], width))) == (how["rows"] + 1) // 2
    given, call = build(name, **how)
    names = list(given)
    values = tuple(v.double().requires_grad_() for v in given.values())
    assert torch.autograd.gradcheck(lambda *v: call(cpu_ops, dict(zip(names, v, strict=True))), values)


def test_no_residual_other_shapes_and_no_rows():
    x = torch.randn(2, 3, 16, requires_grad=True)
    w = torch.ones(16, requires_grad=True)
    for module in (reference, cpu_ops):
        y = module.rms_norm(x.transpose(0, 1), w, 1e-5)
        assert y.shape == (3, 2, 16)
    (g1,), (g2,) = (torch.autograd.grad(m.rms_norm(x, w, 1e-5).square().sum(), x) for m in (reference, cpu_ops))
    torch.testing.assert_close(g2, g1)
    assert cpu_ops.swiglu(torch.empty(0, 8, requires_grad=True)).shape == (0, 4)
    assert cpu_ops.rms_norm(torch.empty(0, 16, requires_grad=True), w, 1e-5).shape == (0, 16)
    none = torch.empty(0, dtype=torch.int64)
    h = torch.empty(0, 16, requires_grad=True)
    assert cpu_ops.linear_cross_entropy(h, torch.randn(9, 16), none, grad_weights=torch.empty(0)).shape == (0,)


def test_a_broken_promise_is_an_error_that_says_what_was_promised():
    given, targets, weights = head_inputs()
    hidden, weight = given["hidden"].requires_grad_(), given["weight"]
    out = cpu_ops.linear_cross_entropy(hidden, weight, targets, grad_weights=weights)
    for wrong in ((out * weights.flip(0)).sum(), (out * weights).sum() + 0.01 * (out**2).sum()):
        with pytest.raises(ops.BrokenPromise, match="one number times the sum of grad_weights.*leave grad_weights out"):
            torch.autograd.grad(wrong, hidden, retain_graph=True)
    (grad,) = torch.autograd.grad((out * weights).sum() * float("nan"), hidden, retain_graph=True)
    assert grad.isnan().all()  # a nan loss breaks no promise
    ops.check_promises()


def test_auto_takes_them_for_training_only():
    assert ops.describe("cpu")["swiglu"].startswith("chunks")
    x = torch.randn(4, 8, requires_grad=True)
    with ops.use("none"):
        assert type(ops.swiglu(x).grad_fn).__name__ != "_SwiGLUBackward"
    with ops.use("auto"):
        assert type(ops.swiglu(x).grad_fn).__name__ == "_SwiGLUBackward"
        with torch.no_grad():
            assert torch.equal(ops.swiglu(x), reference.swiglu(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_frequent_tokens_gradient_is_summed_in_float32(dtype):
    """PyTorch's sums stop growing in 16 bits."""
    from minimind_fast.model import Embedding

    torch.manual_seed(0)
    table = Embedding(5, 16).to(dtype)
    ids = torch.tensor([1] * 4000 + [2] * 3).view(-1, 1)
    grad = (torch.randn(len(ids), 1, 16) * 0.1 + 0.02).to(dtype)
    out = table(ids)
    assert torch.equal(out, table.weight[ids])
    out.backward(grad)
    want = torch.zeros(5, 16, dtype=torch.float64).index_add_(0, ids.flatten(), grad[:, 0].double())
    assert table.weight.grad is not None and table.weight.grad.dtype == dtype
    torch.testing.assert_close(table.weight.grad.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-3)
