"""RoPE's kernel against the error rule: with and without the norms of q and k, head shapes, positions, autograd.

Runs the compiled kernel on a GPU (float32, float16, bfloat16), else the interpreter (float32, float16).
"""

import kernel_helpers as kh
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind_fast.kernels import rope as module
from minimind_fast.kernels.rope import rope
from minimind_fast.ops import reference

# The interpreter uses numpy, which warns where a GPU would not.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")
INF, NAN = float("inf"), float("nan")
POSITIONS = 64
# H, K, hd: the presets' heads, odd halves, one head, as many kv heads as heads, counts that are not powers of two.
HEADS = [(8, 2, 64), (8, 2, 80), (8, 4, 96), (2, 1, 128), (3, 1, 12), (4, 4, 20), (6, 3, 16), (2, 1, 6), (1, 1, 2)]


def tables(head_dim, positions=POSITIONS, dtype=torch.float32):
    """-> cos and sin (positions, hd // 2) of the standard angles."""
    frequency = 1e4 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.outer(torch.arange(positions, dtype=torch.float64), frequency)
    return angle.cos().to(kh.DEVICE, dtype), angle.sin().to(kh.DEVICE, dtype)


def packed_positions(*shape, seed=0, positions=POSITIONS):
    """-> positions that restart and jump, as in packed documents."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(positions, shape, generator=generator).to(kh.DEVICE)


def function(op, heads, positions, norms, table_dtype=torch.float32):
    """-> the op as a function of qkv and the weights of the norms named in `norms` ("", "q", "k", "qk")."""
    num_heads, num_kv_heads, head_dim = heads
    cos, sin = tables(head_dim, dtype=table_dtype)

    def call(qkv, *weights):
        named = dict(zip([f"{n}_weight" for n in norms], weights, strict=True))
        # The float64 truth uses the same angles.
        wide = (lambda t: t.double()) if qkv.dtype == torch.float64 else (lambda t: t)
        return op(qkv, wide(cos), wide(sin), positions, num_heads, num_kv_heads, **named, eps=1e-6)

    return call


def tensors(qkv, heads, norms, seed=20, weight_dtype=None):
    """-> inputs and output gradients to match qkv."""
    num_heads, num_kv_heads, head_dim = heads
    weights = [kh.randn(head_dim, dtype=weight_dtype or qkv.dtype, seed=seed + i) for i in range(len(norms))]
    grads = [
        kh.randn(*qkv.shape[:-1], n, head_dim, dtype=qkv.dtype, seed=seed + 2 + i)
        for i, n in enumerate((num_heads, num_kv_heads, num_kv_heads))
    ]
    return [qkv, *weights], grads


def projection(*leading, heads, dtype, seed=0, scale=1.0):
    return kh.randn(*leading, (heads[0] + 2 * heads[1]) * heads[2], dtype=dtype, seed=seed, scale=scale)


def check(op, qkv, heads, norms, positions=None, name="rope", wanted=None, weight_dtype=None):
    positions = packed_positions(*qkv.shape[:-1]) if positions is None else positions
    inputs, grads = tensors(qkv, heads, norms, weight_dtype=weight_dtype)
    ours, theirs = function(op, heads, positions, norms), function(reference.rope, heads, positions, norms)
    kh.assert_op(name, ours, theirs, inputs, grads, wanted)


@pytest.mark.parametrize("dtype", kh.DTYPES, ids=str)
@pytest.mark.parametrize("norms", ["", "qk"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_error_rule(heads, norms, dtype):
    check(rope, projection(7, heads=heads, dtype=dtype), heads, norms)


@pytest.mark.parametrize("norms", ["q", "k"])
def test_one_norm_only(norms):
    heads = (3, 2, 12)
    check(rope, projection(7, heads=heads, dtype=torch.float32), heads, norms)


def test_float32_weight():
    heads = (4, 2, 12)
    check(rope, projection(7, heads=heads, dtype=torch.float16), heads, "qk", weight_dtype=torch.float32)


def test_positions():
    heads = (4, 2, 12)
    x = projection(2, 5, heads=heads, dtype=torch.float32)
    for name, positions in {
        "int32": packed_positions(2, 5).int(),
        "one row for all": torch.arange(5, device=kh.DEVICE),
        "strided": packed_positions(5, 2).t(),
        "the last of the table": torch.full((2, 5), POSITIONS - 1, device=kh.DEVICE),
    }.items():
        check(rope, x, heads, "qk", positions, name)
    q, k, _ = function(rope, heads, torch.zeros(2, 5, dtype=torch.long, device=kh.DEVICE), "")(x)
    assert torch.equal(torch.cat([q, k], -2).flatten(-2), x[..., : 6 * 12]), "position 0 is not turned"


def test_strides():
    heads = (4, 2, 12)
    width, dtype = 8 * 12, torch.float32
    for name, x in {
        "columns of a wider tensor": kh.randn(6, 200, dtype=dtype)[:, 4 : 4 + width],
        "every second row": kh.randn(9, width, dtype=dtype)[::2],
        "leading dimensions swapped": kh.randn(3, 4, width, dtype=dtype).transpose(0, 1),
        "last dimension not contiguous": kh.randn(width, 6, dtype=dtype).t(),
        "not aligned to 16 bytes": kh.randn(3 * width + 1, dtype=dtype)[1:].view(3, width),
        "a single token": kh.randn(width, dtype=dtype),
    }.items():
        check(rope, x, heads, "qk", name=name)
    x, positions = kh.randn(5, width, dtype=dtype), packed_positions(5)
    inputs, _ = tensors(x, heads, "qk")
    grads = [
        kh.randn(4, 5, 12, dtype=dtype).transpose(0, 1),  # heads before tokens, as attention may return them
        kh.randn(1, dtype=dtype).expand(5, 2, 12),
        kh.randn(12, 2, 5, dtype=dtype).permute(2, 1, 0),
    ]
    ours, theirs = function(rope, heads, positions, "qk"), function(reference.rope, heads, positions, "qk")
    kh.assert_op("gradients", ours, theirs, inputs, grads)


def test_v_is_a_view():
    heads = (4, 2, 12)
    x = projection(5, heads=heads, dtype=torch.float32).requires_grad_()
    q, k, v = function(rope, heads, packed_positions(5), "")(x)
    assert v.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert q.is_contiguous() and k.is_contiguous()


@pytest.mark.parametrize("norms", ["", "qk"])
@pytest.mark.parametrize("leading", [(0,), (3, 0)], ids=str)
def test_empty(leading, norms):
    heads = (4, 2, 12)
    check(rope, projection(*leading, heads=heads, dtype=torch.float32), heads, norms)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(
    tokens=st.integers(1, 20),
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    half=st.integers(2, 20),
    scale=st.sampled_from([1e-30, 1e-4, 1.0, 30.0, 1e4, 1e25]),
    values=st.lists(st.sampled_from([INF, -INF, NAN, -0.0, 0.0, 6e4, -6e4, 1e-7]), max_size=3),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(kh.DTYPES),
    norms=st.sampled_from(["", "qk"]),
)
def test_any_shape_and_value(tokens, num_kv_heads, group, half, scale, values, seed, dtype, norms):
    heads = (group * num_kv_heads, num_kv_heads, 2 * half)
    x = projection(tokens, heads=heads, dtype=dtype, seed=seed, scale=scale)
    check(rope, kh.special_values(x, seed, values), heads, norms)


def test_gradcheck():
    heads = (2, 1, 4)
    inputs, _ = tensors(projection(1, heads=heads, dtype=torch.float64), heads, "qk")
    call = function(rope, heads, packed_positions(1, seed=1), "qk", table_dtype=torch.float64)
    assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in inputs])


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, True), (False, False, True)])
def test_only_the_gradients_asked_for(wanted, monkeypatch):
    heads = (4, 2, 12)
    asked = []
    real = module._rope_bwd
    monkeypatch.setattr(module, "_rope_bwd", lambda *a: asked.append(a[-2:]) or real(*a))
    check(rope, projection(5, heads=heads, dtype=torch.float32), heads, "qk", wanted=wanted)
    assert asked == [(wanted[0], wanted[1] or wanted[2])]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradient_of_two_outputs_only(which):
    heads, positions = (4, 2, 12), packed_positions(5)
    inputs, grads = tensors(projection(5, heads=heads, dtype=torch.float32), heads, "qk")
    grads[which] = None
    ours, theirs = function(rope, heads, positions, "qk"), function(reference.rope, heads, positions, "qk")
    kh.assert_op("two outputs", ours, theirs, inputs, grads)


def test_second_derivative_is_refused():
    heads = (2, 1, 6)
    (x, weight), _ = tensors(projection(3, heads=heads, dtype=torch.float32), heads, "q")
    call = function(rope, heads, packed_positions(3), "q")
    kh.assert_refuses_second_derivative(lambda x: call(x, weight)[0], x)


def test_repeatable():
    heads = (4, 2, 12)
    inputs, grads = tensors(projection(40, heads=heads, dtype=torch.float32), heads, "qk")
    kh.assert_repeatable(function(rope, heads, packed_positions(40), "qk"), inputs, grads)


def test_custom_ops_and_compile():
    heads, positions = (4, 2, 12), packed_positions(5)
    (x, wq, wk), grads = tensors(projection(5, heads=heads, dtype=torch.float32), heads, "qk")
    cos, sin = tables(12)
    # A Function around these ops does their autograd, so opcheck covers only schema and fakes.
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(module._rope_fwd.op, (x, cos, sin, positions, wq, wk, 4, 2, 1e-6), test_utils=checks)
    backward = (*grads, cos, sin, positions, x, wq, wk, 1e-6, True, True)
    torch.library.opcheck(module._rope_bwd.op, backward, test_utils=checks)
    kh.assert_compiles(function(rope, heads, positions, "qk"), [x, wq, wk], grads)
    kh.assert_compiles(function(rope, heads, positions, ""), [x], grads)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"qkv": torch.zeros(3, 97)}, "qkv"),
        ({"qkv": torch.zeros(3, 8 * 11), "cos": torch.zeros(9, 5), "sin": torch.zeros(9, 5)}, "even head_dim"),
        ({"qkv": torch.zeros(3, 96, dtype=torch.int64)}, "floating-point"),
        ({"cos": torch.zeros(9, 12)}, "cos and sin"),
        ({"positions": torch.zeros(3)}, "int32 or int64"),
        ({"positions": torch.zeros(4, dtype=torch.int64)}, "do not fit"),
        ({"q_weight": torch.zeros(6)}, "norm weights"),
        ({"q_weight": torch.zeros(12), "k_weight": torch.zeros(12, dtype=torch.float16)}, "one dtype"),
    ],
)
def test_refuses(change, match):
    right = {
        "qkv": torch.zeros(3, 96),
        "cos": torch.zeros(9, 6),
        "sin": torch.zeros(9, 6),
        "positions": torch.zeros(3, dtype=torch.int64),
        "num_heads": 4,
        "num_kv_heads": 2,
    }
    with pytest.raises(ValueError, match=match):
        rope(**{**right, **change})


@pytest.mark.parametrize(
    "old, new",
    [
        ("x1 * c - x2 * s", "x1 * c + x2 * s"),
        ("/ (2 * HALF) + eps", "/ HALF + eps"),
        ("mask & (tl.arange(0, BLOCK_N) < N)", "mask & (tl.arange(0, BLOCK_N) < N - 1)"),
        ("positions = tl.load(positions_ptr + tokens, mask=live, other=0)", "positions = tokens"),
        ("q1, q2 = q1 * c + q2 * s, q2 * c - q1 * s", "q1, q2 = q1 * c - q2 * s, q2 * c + q1 * s"),
        ("(g1 - m1 * mean) * rstd", "g1 * rstd"),
        ("tl.store(k_out + K * 2 * HALF + HALF, v2, mask=mask_k)", "pass"),
        ("dwk2 += _fold(p2, ", "dwk2 += 0.0 * _fold(p2, "),
        ("range(pid, tl.cdiv(num_tokens, BLOCK_T)", "range(pid, num_tokens // BLOCK_T"),
        ("mask = (rows < num_partials)", "mask = (rows < num_partials - 1)"),
        (
            "eps, HALF)\n        q1, q2 = q1 * rstd * w1, q2 * rstd * w2",
            "eps, HALF)\n        q1, q2 = q1 * rstd, q2 * rstd",
        ),
    ],
)
def test_a_broken_kernel_is_seen(tmp_path, old, new):
    heads = (3, 1, 12)
    x = projection(77, heads=heads, dtype=torch.float32)
    kh.assert_broken(lambda m: check(m.rope, x, heads, "qk"), module, tmp_path, old, new)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", kh.DTYPES, ids=str)
@pytest.mark.parametrize("norms", ["", "qk"])
@pytest.mark.parametrize("heads", [(8, 2, 64), (8, 2, 80), (8, 2, 96), (8, 4, 96), (32, 8, 128), (5, 5, 36)], ids=str)
def test_model_shapes(heads, norms, dtype):
    check(rope, projection(4099, heads=heads, dtype=dtype), heads, norms)


@pytest.mark.gpu
def test_offsets_beyond_int32():
    heads, width = (8, 4, 96), 16 * 96
    x = torch.zeros(2**31 // width + 9, width, dtype=torch.bfloat16, device="cuda")
    x[-8:] = kh.randn(8, width, dtype=torch.bfloat16)
    positions = torch.arange(x.shape[0], device="cuda") % POSITIONS
    whole, part = function(rope, heads, positions, ""), function(rope, heads, positions[-8:], "")
    for a, b in zip(whole(x), part(x[-8:].clone()), strict=True):
        assert torch.equal(a[-8:], b)


@pytest.mark.gpu
@pytest.mark.parametrize("norms", ["", "qk"])
def test_cuda_graph(norms):
    heads = (8, 4, 96)
    inputs, grads = tensors(projection(130, heads=heads, dtype=torch.bfloat16), heads, norms)
    kh.assert_captures(function(rope, heads, packed_positions(130), norms), inputs, grads)
