"""Packed attention: exact against the plain T x T mask, and no document sees another."""

import sys

import pytest
import torch

from minimind_fast.ops.attention import attention, chosen, resolve, use
from minimind_fast.ops.cpu import attention as attention_rows
from minimind_fast.ops.cpu.attention import KEPT, Rectangles, plain_rows

LENGTHS = [[7], [5, 5, 5], [1, 2, 3], [17, 1, 64, 33, 100, 2], [16, 0, 16], [40, 40, 8]]


def packed(lengths, heads=4, kv_heads=2, head_dim=8, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    total = sum(lengths)
    q, k, v = (torch.randn(total, h, head_dim, dtype=dtype, requires_grad=True) for h in (heads, kv_heads, kv_heads))
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return q, k, v, cu


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_sdpa_equals_eager(lengths, kv_heads):
    q, k, v, cu = packed(lengths, kv_heads=kv_heads)
    weight = torch.randn_like(q)
    results = []
    for backend in ("eager", "sdpa"):
        out = attention(q, k, v, cu, max(lengths), backend)
        results.append([out, *torch.autograd.grad((out * weight).sum(), (q, k, v))])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=0)


def test_a_document_changes_no_other():
    q, k, v, cu = packed([17, 1, 64, 33])
    before = attention(q, k, v, cu, 64, "sdpa")
    with torch.no_grad():
        for x in (q, k, v):
            x[18:82] += 1.0
    after = attention(q, k, v, cu, 64, "sdpa")
    same = [*range(18), *range(82, 115)]
    assert torch.equal(before[same], after[same])
    assert not torch.allclose(before[18:82], after[18:82])


def test_the_future_changes_nothing_before_it():
    q, k, v, cu = packed([20, 40])
    before = attention(q, k, v, cu, 40, "sdpa")
    with torch.no_grad():
        for x in (k, v):
            x[50:] += 1.0
    assert torch.equal(before[:50], attention(q, k, v, cu, 40, "sdpa")[:50])


def test_rectangles_waste_little_and_lose_nobody():
    lengths = torch.randint(1, 600, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    cu = torch.tensor([0, *lengths]).cumsum(0).tolist()
    r = Rectangles(cu, torch.device("cpu"))
    assert torch.equal(r.source[r.place], torch.arange(cu[-1]))
    padded_pairs = sum(n * length**2 for n, length in r.shapes)
    assert padded_pairs <= 1.3 * sum(n * n for n in lengths)
    assert len(r.shapes) < 30


def rows_of(n, length, heads, kv_heads, head_dim, dtype):
    torch.manual_seed(length)
    return [torch.randn(n, length, h, head_dim).to(dtype).requires_grad_() for h in (heads, kv_heads, kv_heads)]


def results_of(attend, inputs, dtype):
    """(out, dq, dk, dv) in float64, computed from the inputs in a dtype."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in inputs)
    out = attend(q, k, v)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(inputs[0].dtype)
    return [x.detach().double() for x in (out, *torch.autograd.grad(out, (q, k, v), weight.to(dtype)))]


ROWS = [
    (3, 1, 4, 2, 8), (5, 64, 8, 2, 16), (3, 65, 4, 4, 8), (2, 144, 4, 1, 24),  # one token; one, two and three blocks
    (3, KEPT, 4, 2, 16), (3, KEPT + 1, 4, 2, 16), (71, 96, 8, 2, 8), (1, 600, 4, 2, 8),  # several tiles; larger blocks
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", ROWS)
def test_rows_by_matmuls_are_as_exact_as_sdpa(shape, dtype):
    inputs = rows_of(*shape, dtype=dtype)
    truth = results_of(plain_rows, inputs, torch.float64)
    sdpa, rows = (results_of(attend, inputs, dtype) for attend in (plain_rows, attention_rows._Rows.apply))
    for name, t, theirs, ours in zip(("out", "dq", "dk", "dv"), truth, sdpa, rows, strict=True):
        error, allowed = (ours - t).norm(), (theirs - t).norm()
        assert error <= 1.25 * allowed + 1e-6 * t.norm(), (name, float(error), float(allowed))


@pytest.mark.parametrize("length", [40, 200])
def test_kept_probabilities_are_those_that_are_made_again(monkeypatch, length):
    inputs = rows_of(4, length, 4, 2, 16, torch.bfloat16)

    def run():
        q, k, v = (x.detach().requires_grad_() for x in inputs)
        out = attention_rows._Rows.apply(q, k, v)
        saved = sum(x.numel() for x in out.grad_fn.saved_tensors) - sum(x.numel() for x in inputs)
        return saved, results_of(attention_rows._Rows.apply, inputs, torch.bfloat16)

    kept, ours = run()
    assert kept == 4 * 4 * attention_rows.kept(length, torch.bfloat16) > 0
    monkeypatch.setattr(attention_rows, "KEPT", 0)
    none, again = run()
    assert none == attention_rows.kept(length, torch.bfloat16) == attention_rows.kept(40, torch.float32) == 0
    for one, other in zip(ours, again, strict=True):
        assert (one - other).norm() <= 2**-8 * one.norm()  # dS is computed from rounded or unrounded P
    assert torch.equal(ours[0], again[0]) and torch.equal(ours[3], again[3])  # out and dv do not depend on dS


def test_probabilities_kept_are_bounded():
    for length in range(1, KEPT + 1):
        assert 0 < attention_rows.kept(length, torch.bfloat16) * 2 <= 320 * length
    assert attention_rows.kept(KEPT + 1, torch.bfloat16) == 0


def test_matmuls_serve_training_alone(monkeypatch):
    q, k, v, cu = packed([40, 40, 8], dtype=torch.float32)
    want = attention(q, k, v, cu, 40, "sdpa")
    monkeypatch.setattr(attention_rows, "_Rows", None)
    with torch.no_grad():
        torch.testing.assert_close(attention(q, k, v, cu, 40, "sdpa"), want)
    assert attention(q, k, v, cu, 40, "sdpa", dropout=0.5).requires_grad
    with pytest.raises(AttributeError):
        attention(q, k, v, cu, 40, "sdpa")


def test_no_tokens():
    q, k, v, cu = packed([0])
    assert attention(q, k, v, cu, 0, "sdpa").shape == q.shape


def test_unknown_and_impossible_backends_are_errors():
    with pytest.raises(ValueError, match="unknown attention backend 'flash'.*sdpa"):
        resolve("flash", "cpu")
    with pytest.raises(ValueError, match="needs an Ampere or newer GPU"):
        resolve("flash_attn", "cpu")
    assert resolve("auto", "cpu") == ("sdpa", "no GPU")
    with pytest.raises(ValueError, match="unknown attention backend 'flash'.*sdpa"):
        use("flash")
    with use("flash_attn"), pytest.raises(ValueError, match="--attention flash_attn needs an Ampere or newer GPU"):
        chosen("cpu", torch.bfloat16)


def test_the_choice_is_the_whole_process_s_and_ends_with_its_block(monkeypatch):
    q, k, v, cu = packed([3, 4])
    with use("eager"):
        assert chosen("cpu", q.dtype) == ("eager", "asked for")
        with monkeypatch.context() as patch:
            patch.setattr(attention_rows, "attend_rows", None)
            attention(q, k, v, cu, 4)
        with use("auto"):
            assert chosen("cpu", q.dtype)[0] == "sdpa"
        assert chosen("cpu", q.dtype)[0] == "eager"
    assert chosen("cpu", q.dtype) == ("sdpa", "no GPU")


def test_a_compiled_function_looks_the_choice_up(monkeypatch):
    """No import and no cache to trace through: the graph has no break, with a GPU's backend too."""
    module = sys.modules[attention.__module__]
    monkeypatch.setattr(module, "_chosen", {})
    monkeypatch.setattr(module, "_flash_attn", lambda: (None, "flash-attn is not installed"))
    want = chosen("cuda", torch.bfloat16)
    assert want == ("torch_varlen", "flash-attn is not installed")
    monkeypatch.setattr(module, "resolve", None)
    torch._dynamo.reset()
    ask = torch.compile(lambda x: x + len(chosen("cuda", torch.bfloat16)[0]), backend="eager", fullgraph=True)
    assert ask(torch.zeros(())) == len(want[0])
    torch._dynamo.reset()


def test_a_backend_is_resolved_once(monkeypatch):
    q, k, v, cu = packed([3, 4])
    asked = []
    module = sys.modules[attention.__module__]  # `ops.attention` is the function
    monkeypatch.setattr(module, "_chosen", {})
    monkeypatch.setattr(module, "resolve", lambda *key: asked.append(key) or ("eager", "counted"))
    for dtype in (torch.float64, torch.float32):
        for _ in range(3):
            attention(q.to(dtype), k.to(dtype), v.to(dtype), cu, 4)
    assert asked == [("auto", "cpu", torch.float64), ("auto", "cpu", torch.float32)]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flash_attn", "torch_varlen", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gpu_backends_agree_with_eager(backend, dtype):
    try:
        resolve(backend, "cuda", dtype)
    except ValueError as error:
        pytest.skip(str(error))
    q, k, v, cu = packed([209, 512, 1, 77], heads=8, kv_heads=4, head_dim=96)
    inputs = [x.detach().to("cuda", dtype).requires_grad_() for x in (q, k, v)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    weight = torch.randn(q.shape, device="cuda", dtype=dtype)
    results = []
    for xs, name in ((wide, "eager"), (inputs, "eager"), (inputs, backend)):
        out = attention(*xs, cu.cuda(), 512, name)
        results.append([out, *torch.autograd.grad((out * weight.to(out.dtype)).sum(), xs)])
    for truth, eager, got in zip(*results, strict=True):
        error, own = (got.double() - truth).norm(), (eager.double() - truth).norm()
        assert error <= 1.25 * own + 1e-4 * truth.norm()
