"""Packed attention: exact against the plain T x T mask, and no document sees another."""

import pytest
import torch

from minimind_fast.attention import attention, resolve
from minimind_fast.attention_rows import Rectangles

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


def test_no_tokens():
    q, k, v, cu = packed([0])
    assert attention(q, k, v, cu, 0, "sdpa").shape == q.shape


def test_unknown_and_impossible_backends_are_errors():
    with pytest.raises(ValueError, match="unknown attention backend 'flash'.*sdpa"):
        resolve("flash", "cpu")
    with pytest.raises(ValueError, match="needs a GPU"):
        resolve("flash_attn", "cpu")
    assert resolve("auto", "cpu") == ("sdpa", "no GPU")


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
