"""The routing and the experts' kernels against the error rule: routings of every kind, shapes, documents, autograd.

Runs the compiled kernel on a GPU (float32, float16, bfloat16), else the interpreter (float32, float16).
"""

import kernel_helpers as kh
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import minimind_fast as mm
from minimind_fast import ops
from minimind_fast.kernels import moe_mlp as mlp_module
from minimind_fast.kernels import moe_route as route_module
from minimind_fast.kernels.moe_mlp import moe_mlp
from minimind_fast.kernels.moe_route import moe_route
from minimind_fast.ops import reference

# The interpreter uses numpy, which warns where a GPU would not.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")
INTS = ("experts", "counts", "order", "inverse")
# tokens, D, E, top_k, normalize, ends of documents, padding
ROUTES = {
    "minimind2": (70, 40, 4, 2, True, (0, 20, 20, 47, 70), False),
    "minimind3": (70, 40, 4, 1, True, None, False),
    "mended": (70, 40, 4, 1, False, None, True),
    "documents and padding": (50, 24, 4, 3, True, (0, 1, 33, 50), True),
    "all chosen": (33, 24, 5, 5, True, (0, 33), False),
    "one expert": (18, 16, 1, 1, False, None, False),
    "64 experts": (40, 48, 64, 8, True, None, True),
    "one token": (1, 8, 3, 2, True, (0, 1), False),
    "no tokens": (0, 8, 3, 2, True, None, False),
    "no tokens in a document": (0, 8, 3, 2, False, (0, 0), True),
}
# T, D, F, E, top_k, probability of each expert (None: equal)
MLPS = {
    "balanced": (90, 40, 24, 4, 2, None),
    "70/10/10/10": (80, 48, 40, 4, 1, (0.7, 0.1, 0.1, 0.1)),
    "one empty": (60, 33, 21, 3, 2, (1, 0, 1)),
    "one full": (70, 32, 32, 4, 1, (0, 1, 0, 0)),
    "all chosen": (33, 24, 72, 5, 5, None),
    "one expert": (40, 16, 80, 1, 1, None),
    "64 experts": (12, 16, 16, 64, 2, None),
    "large tiles": (150, 72, 136, 2, 1, (0.9, 0.1)),
    "one token": (1, 16, 24, 9, 8, None),
    "no tokens": (0, 8, 8, 3, 2, None),
}


def clear_tokens(tokens, D, E, top_k, dtype, seed=0):
    """-> x, gate: no token's choice depends on rounding, so that the integers can be compared."""
    gate = kh.randn(E, D, dtype=dtype, seed=seed, scale=2 * D**-0.5)
    x = kh.randn(4 * tokens + 64, D, dtype=dtype, seed=seed + 1)
    logits = (x.double() @ gate.double().t()).sort(-1, descending=True).values
    gap = (logits[:, :-1] - logits[:, 1:])[:, :top_k].amin(-1) if E > 1 else torch.ones(x.shape[0], device=x.device)
    return x[gap.topk(tokens).indices.sort().values].contiguous(), gate


def padding(tokens):
    return (torch.arange(tokens, device=kh.DEVICE) * 7 % 10) < 7


def route_options(case):
    tokens, _, _, top_k, normalize, ends, padded = case
    cu = None if ends is None else torch.tensor(ends, dtype=torch.int32, device=kh.DEVICE)
    return top_k, normalize, cu, padding(tokens) if padded else None


def route_function(op, case):
    def function(x, gate):
        routing = op(x, gate, *route_options(case))
        return routing.weights, routing.aux_loss, routing.scores

    return function


def route_tensors(case, dtype):
    tokens, D, E, top_k = case[:4]
    grads = [kh.randn(*shape, dtype=torch.float32, seed=9) for shape in ((tokens, top_k), (1,), (tokens, E))]
    grads[1] = grads[1][0]
    return list(clear_tokens(tokens, D, E, top_k, dtype)), grads


def check_route(module, case, dtype=torch.float32, wanted=None, grads=None, name="moe_route"):
    inputs, all_grads = route_tensors(case, dtype)
    ours = route_function(module.moe_route, case)
    kh.assert_op(name, ours, route_function(reference.moe_route, case), inputs, grads or all_grads, wanted)
    with kh.poisoned_memory():
        plan = module.moe_route(*inputs, *route_options(case))
    truth = reference.moe_route(*(t.double() for t in inputs), *route_options(case))
    for field in INTS:
        assert torch.equal(getattr(plan, field), getattr(truth, field)), field


@pytest.mark.parametrize("dtype", kh.DTYPES, ids=str)
@pytest.mark.parametrize("name", ROUTES)
def test_route_error_rule(name, dtype):
    check_route(route_module, ROUTES[name], dtype, name=name)


@pytest.mark.parametrize("which", range(3), ids=["weights", "aux_loss", "scores"])
def test_route_gradient_through_one_output(which):
    case = ROUTES["documents and padding"]
    grads = [g if i == which else None for i, g in enumerate(route_tensors(case, torch.float32)[1])]
    check_route(route_module, case, grads=grads)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=["x", "gate"])
def test_route_gradients_only_where_asked(wanted):
    check_route(route_module, ROUTES["minimind2"], wanted=wanted)


def test_route_long_input():
    """Many tiles, a histogram prefix over more rows than one step reads, and dW split over the tokens."""
    check_route(route_module, (1090, 16, 3, 2, True, None, True))


def test_ties_go_to_the_lower_expert_and_nan_stays_in_range():
    x = torch.ones(20, 16, device=kh.DEVICE)
    x[3] = float("nan")
    gate = torch.zeros(5, 16, device=kh.DEVICE)
    gate[3:] = 0.5
    routing = moe_route(x, gate, 3, True)
    experts = torch.tensor([3, 4, 0], dtype=torch.int32, device=kh.DEVICE).expand(20, 3).clone()
    experts[3] = torch.arange(3)
    assert torch.equal(routing.experts, experts)
    assert routing.weights[3].isnan().all() and routing.weights[:3].isfinite().all()
    assert torch.equal(routing.order.sort().values.cpu(), torch.arange(60, dtype=torch.int32))
    assert torch.equal(routing.counts.cpu(), torch.tensor([20, 1, 1, 19, 19], dtype=torch.int32))


def plan(experts, E):
    """-> a Routing for given choices, as the reference lays it out."""
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    counts = (flat[:, None] == torch.arange(E)).sum(0)
    ints = [t.to(kh.DEVICE, torch.int32) for t in (experts, counts, order, order.argsort())]
    empty = torch.empty(0, device=kh.DEVICE)
    return reference.Routing(empty, *ints, empty, empty)


def choose(tokens, E, top_k, probabilities=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    liking = torch.ones(E) if probabilities is None else torch.tensor(probabilities, dtype=torch.float32)
    if tokens == 0:
        return torch.zeros(0, top_k, dtype=torch.long)
    return torch.multinomial(liking.expand(tokens, E), top_k, generator=generator)


def mlp_function(op, routing):
    return lambda x, weights, gate_up, down: op(x, routing._replace(weights=weights), gate_up, down)


def mlp_tensors(T, D, F, E, top_k, dtype):
    inputs = [
        kh.randn(T, D, dtype=dtype, seed=1),
        kh.randn(T, top_k, dtype=torch.float32, seed=2).abs(),
        kh.randn(E, 2 * F, D, dtype=dtype, seed=3, scale=D**-0.5),
        kh.randn(E, D, F, dtype=dtype, seed=4, scale=F**-0.5),
    ]
    return inputs, [kh.randn(T, D, dtype=dtype, seed=5)]


def check_mlp(module, case, dtype=torch.float32, wanted=None, name="moe_mlp"):
    T, D, F, E, top_k, probabilities = case
    inputs, grads = mlp_tensors(T, D, F, E, top_k, dtype)
    routing = plan(choose(T, E, top_k, probabilities), E)
    ours, theirs = mlp_function(module.moe_mlp, routing), mlp_function(reference.moe_mlp, routing)
    kh.assert_op(name, ours, theirs, inputs, grads, wanted)


@pytest.mark.parametrize("dtype", kh.DTYPES, ids=str)
@pytest.mark.parametrize("name", MLPS)
def test_mlp_error_rule(name, dtype):
    if name in ("64 experts", "large tiles") and dtype == torch.float32 and not kh.HAS_GPU:
        pytest.skip("5 to 10 s of the interpreter: this case runs in float16")
    check_mlp(mlp_module, MLPS[name], dtype, name=name)


@pytest.mark.parametrize("name", ["70/10/10/10", "large tiles"])
def test_tiles_of_large_cards(name, monkeypatch):
    """The tiles of an H200, which small inputs never select."""
    if kh.HAS_GPU:
        pytest.skip("the card's own tiles are tested by the other cases")
    params = mlp_module._launch_params
    monkeypatch.setattr(
        mlp_module, "_launch_params", lambda kernel, slots, *rest: params(kernel, 1 << 20, *rest[:2], 90)
    )
    check_mlp(mlp_module, MLPS[name], torch.float16)


@pytest.mark.parametrize("name", ["balanced", "70/10/10/10"])
def test_weight_gradient_split_over_rows(name, monkeypatch):
    monkeypatch.setattr(mlp_module, "DW_MIN_ROWS", 20)
    assert mlp_module._dw_splits(4, 48, 40, 80, 64, 64) == 4
    check_mlp(mlp_module, MLPS[name])


@pytest.mark.parametrize("wanted", [tuple(i == j for j in range(4)) for i in range(4)], ids=str)
def test_mlp_gradients_only_where_asked(wanted):
    check_mlp(mlp_module, MLPS["balanced"], wanted=wanted)


def test_mlp_keeps_nothing_without_gradients():
    inputs, _ = mlp_tensors(40, 16, 24, 4, 2, torch.float32)
    routing = plan(choose(40, 4, 2), 4)
    tensors = inputs[0], inputs[1], routing.counts, routing.order, routing.inverse, *inputs[2:]
    kept, lost = (mlp_module._moe_mlp_fwd(*tensors, keep) for keep in (True, False))
    assert kept[1].shape == (80, 48) and lost[1].numel() == 0
    assert torch.equal(kept[0], lost[0])


class _Zeros(TorchDispatchMode):
    """Records the shapes of the zero tensors made while it is active."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.zeros, torch.ops.aten.zeros_like, torch.ops.aten.new_zeros):
            self.shapes.append(tuple(out.shape))
        return out


def test_mlp_makes_no_gradient_for_what_it_keeps():
    inputs, (grad, *_) = mlp_tensors(40, 16, 24, 4, 2, torch.float32)
    leaves = [t.clone().requires_grad_() for t in inputs]
    y = moe_mlp(leaves[0], plan(choose(40, 4, 2), 4)._replace(weights=leaves[1]), *leaves[2:])
    with _Zeros() as zeros:
        torch.autograd.grad(y, leaves, grad)
    assert zeros.shapes == []


def test_non_contiguous_inputs():
    (x, weights, gate_up, down), _ = mlp_tensors(40, 16, 24, 4, 2, torch.float32)
    x, weights = torch.cat([x, x], 1)[:, ::2], weights.t().contiguous().t()
    gate_up, down = gate_up.mT.contiguous().mT, down.flip(0).mT.contiguous().mT
    routing = plan(choose(40, 4, 2), 4)
    grads = [torch.ones(16, device=kh.DEVICE).expand(40, 16)]
    inputs = [x, weights, gate_up, down]
    kh.assert_op("strides", mlp_function(moe_mlp, routing), mlp_function(reference.moe_mlp, routing), inputs, grads)
    gate = kh.randn(16, 4, dtype=torch.float32).t()
    case = (40, 16, 4, 2, True, None, False)
    # Not equal for all experts: through a softmax that gives zero, leaving only rounding to compare.
    grads = [kh.randn(n, dtype=torch.float32).expand(40, n) for n in (2, 4)]
    grads.insert(1, torch.ones((), device=kh.DEVICE))
    kh.assert_op(
        "strides", route_function(moe_route, case), route_function(reference.moe_route, case), [x, gate], grads
    )


def layer(route, mlp, top_k, normalize):
    """A whole MoE layer: x, gate, gate_up, down -> y, aux loss."""

    def function(x, gate, gate_up, down):
        routing = route(x, gate, top_k, normalize)
        return mlp(x, routing, gate_up, down), routing.aux_loss

    return function


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.data())
def test_generated_routings(data):
    """Any split of the slots among the experts, forward and backward."""
    E = data.draw(st.sampled_from([1, 2, 3, 4, 7, 16]))
    top_k = data.draw(st.integers(1, min(E, 3)))
    T = data.draw(st.sampled_from([1, 2, 15, 64, 65]))
    D, F = data.draw(st.sampled_from([(8, 8), (17, 5), (32, 64)]))
    liked = data.draw(st.lists(st.integers(0, E - 1), min_size=top_k, max_size=E, unique=True))
    probabilities = [float(e in liked) for e in range(E)]
    check_mlp(mlp_module, (T, D, F, E, top_k, probabilities), name=f"{T, D, F, E, top_k, liked}")


def layer_tensors(T, D, F, E, top_k, dtype):
    x, gate = clear_tokens(T, D, E, top_k, dtype)
    inputs, grads = mlp_tensors(T, D, F, E, top_k, dtype)
    return [x, gate, *inputs[2:]], [*grads, kh.randn(1, dtype=torch.float32, seed=6)[0]]


@pytest.mark.parametrize("top_k, normalize", [(1, False), (2, True)])
def test_whole_layer(top_k, normalize):
    inputs, grads = layer_tensors(70, 24, 40, 4, top_k, torch.float32)
    ours, theirs = (
        layer(m.moe_route, n.moe_mlp, top_k, normalize) for m, n in [(route_module, mlp_module), (reference,) * 2]
    )
    kh.assert_op("layer", ours, theirs, inputs, grads)


@pytest.mark.skipif(kh.HAS_GPU, reason="float64 matmuls are the interpreter's")
def test_gradcheck():
    (x, gate, gate_up, down), _ = layer_tensors(5, 6, 4, 3, 2, torch.float32)
    leaves = [t.double().requires_grad_() for t in (x, gate, gate_up, down)]
    assert torch.autograd.gradcheck(layer(moe_route, moe_mlp, 2, True), leaves, fast_mode=True)


def test_repeatable(monkeypatch):
    monkeypatch.setattr(mlp_module, "DW_MIN_ROWS", 20)
    for top_k in (1, 2):
        inputs, grads = layer_tensors(70, 24, 40, 4, top_k, torch.float32)
        kh.assert_repeatable(layer(moe_route, moe_mlp, top_k, False), inputs, grads)


def test_second_derivative_is_refused():
    (x, gate, gate_up, down), _ = layer_tensors(5, 16, 8, 3, 2, torch.float32)
    routing = reference.moe_route(x, gate, 2, True)
    kh.assert_refuses_second_derivative(lambda t: moe_mlp(t, routing, gate_up, down), x)
    kh.assert_refuses_second_derivative(lambda t: moe_route(t, gate, 2, True).weights[:, 0], x)


def test_custom_ops_and_compile():
    inputs, grads = layer_tensors(20, 16, 8, 3, 2, torch.float32)
    x, gate, gate_up, down = (t.clone().requires_grad_() for t in inputs)
    cu = torch.tensor([0, 7, 20], dtype=torch.int32, device=kh.DEVICE)
    torch.library.opcheck(route_module._route_fwd.op, (x, gate, 2, True, cu, padding(20)))
    outputs = route_module._route_fwd(*inputs[:2], 2, True, cu, padding(20))
    weights, experts, counts, order, inverse, aux, scores, slope, scale = outputs
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        route_module._route_bwd.op,
        (weights, aux, None, *inputs[:2], experts, scores, slope, scale, cu, padding(20), True, True, True),
        test_utils=checks,
    )
    plan_of = weights.clone().requires_grad_(), counts, order, inverse
    torch.library.opcheck(mlp_module._moe_mlp_fwd.op, (x, *plan_of, gate_up, down, True))
    _, hidden = mlp_module._moe_mlp_fwd(inputs[0], weights, counts, order, inverse, *inputs[2:], True)
    torch.library.opcheck(
        mlp_module._moe_mlp_bwd.op,
        (grads[0], inputs[0], weights, counts, order, inverse, *inputs[2:], hidden, True, False, True, False),
        test_utils=checks,
    )
    kh.assert_compiles(layer(moe_route, moe_mlp, 2, True), inputs, grads)
    kh.assert_compiles(layer(moe_route, moe_mlp, 1, False), inputs, grads)


def test_router_learns_from_the_language_model_only_in_the_mended_form(monkeypatch):
    """MiniMind's top-1 weight is score / score = 1: the language-model loss gives the router no gradient."""
    norms = {}
    for implementation, (route, mlp) in {
        "reference": (reference.moe_route, reference.moe_mlp),
        "kernels": (moe_route, moe_mlp),
    }.items():
        monkeypatch.setattr(ops, "moe_route", route)
        monkeypatch.setattr(ops, "moe_mlp", mlp)
        for normalize in (False, True):
            torch.manual_seed(0)
            model = mm.MiniMind(
                mm.ModelConfig(
                    generation=3, vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                    num_key_value_heads=1, use_moe=True, num_experts=4, num_experts_per_tok=1, norm_topk_prob=normalize,
                    moe_intermediate_size=32,
                )
            ).to(kh.DEVICE).train()  # fmt: skip
            with torch.no_grad():
                model.model.layers[0].mlp.gate.weight.mul_(20)
            ids = torch.randint(40, (2, 24), generator=torch.Generator().manual_seed(1)).to(kh.DEVICE)
            with ops.use("none") if implementation == "reference" else ops.use("auto"):
                (-model(ids, targets=ids.roll(-1, 1)).logprobs.mean()).backward()
            norms[implementation, normalize] = model.model.layers[0].mlp.gate.weight.grad
    torch.testing.assert_close(norms["kernels", False], norms["reference", False], rtol=1e-3, atol=1e-7)
    assert norms["kernels", False].norm() > 1e-4
    assert not norms["kernels", True].any()
    assert norms["reference", True].norm() < 1e-5 * norms["reference", False].norm()


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda: moe_route(torch.zeros(3, 8), torch.zeros(4, 9), 1, True), "gate_weight"),
        (lambda: moe_route(torch.zeros(3, 8), torch.zeros(4, 8).half(), 1, True), "one dtype"),
        (lambda: moe_route(torch.zeros(3, 8).int(), torch.zeros(4, 8).int(), 1, True), "floating-point"),
        (lambda: moe_route(torch.zeros(3, 8), torch.zeros(200, 8), 1, True), "128 experts"),
        (lambda: moe_route(torch.zeros(3, 8), torch.zeros(4, 8), 5, True), "top_k 5"),
        (lambda: moe_route(torch.zeros(3, 8), torch.zeros(4, 8), 1, True, valid=torch.ones(3)), "valid"),
        (lambda: moe_route(torch.zeros(3, 8), torch.zeros(4, 8), 1, True, torch.zeros(1)), "cu_seqlens"),
        (lambda: moe_mlp(torch.zeros(8), plan(choose(3, 4, 1), 4), torch.zeros(4, 6, 8), torch.zeros(4, 8, 3)), "x"),
        (lambda: refused_mlp(gate_up=torch.zeros(4, 8, 8)), "gate_up"),
        (lambda: refused_mlp(down=torch.zeros(4, 8, 3).half()), "down"),
        (lambda: refused_mlp(E=200), "128 experts"),
        (lambda: refused_mlp(tokens=5), "routing of these"),
    ],
)
def test_refuses(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def refused_mlp(E=4, tokens=3, gate_up=None, down=None):
    routing = plan(choose(3, 4, 1), 4)._replace(weights=torch.zeros(3, 1))
    gate_up = torch.zeros(E, 6, 8) if gate_up is None else gate_up
    return moe_mlp(torch.zeros(tokens, 8), routing, gate_up, torch.zeros(E, 8, 3) if down is None else down)


# Broken copies must not write out of bounds: in the interpreter that would kill the process.
BROKEN_ROUTE_CASE = (50, 24, 4, 3, True, (0, 1, 1, 33, 50), True)
BROKEN_MLP_CASE = (40, 24, 16, 3, 2, None)


def test_the_healthy_kernels_pass_where_broken_ones_must_not():
    check_route(route_module, BROKEN_ROUTE_CASE)
    check_mlp(mlp_module, BROKEN_MLP_CASE)


@pytest.mark.parametrize(
    "old, new",
    [
        ("weights / (tl.sum(weights, axis=1)[:, None] + 1e-20)", "weights"),
        ("tl.where(hit, -1.0, left)", "tl.where(hit, 0.5 * left, left)"),
        ("counted & (tl.load(valid_ptr + t, mask=counted", "counted | (tl.load(valid_ptr + t, mask=counted"),
        ("e[None, :], BLOCK_E), axis=1)", "e[None, :], 0), axis=1)"),
        ("(row < pid)[:, None]", "(row < 0)[:, None]"),
        ("tl.cumsum(chosen, axis=0) - chosen", "0 * chosen"),
        ("tl.where(document == 0, 0, first)", "first + 1"),
        ("(length > 0)", "(length >= 0)"),
        ("(dot / total)[:, None]", "0.0"),
        ("beyond = tl.load(cu_ptr + middle + 1).to(tl.int32) <= t", "beyond = tl.load(cu_ptr + middle + 1) < t"),
        ("tl.sum(scores * d_scores, axis=1)[:, None]", "0.0"),
        ("mask = (row < num_partials)", "mask = (row < num_partials - 1)"),
    ],
)
def test_a_broken_route_is_seen(tmp_path, old, new):
    with pytest.raises(AssertionError):
        check_route(kh.broken_variant(route_module, tmp_path, old, new), BROKEN_ROUTE_CASE)


@pytest.mark.parametrize(
    "old, new",
    [
        ("mask=live, other=0) // TOP_K\n    pair", "mask=live, other=0) // TOP_K // 2\n    pair"),
        ("pair // BLOCK_N * F", "(1 - pair // BLOCK_N) * F"),
        ("gate / (1.0 + tl.exp(-gate)) * up", "gate / (1.0 + tl.exp(-up)) * gate"),
        ("cumsum(tiles, axis=0) <= tile", "cumsum(tiles, axis=0) < tile"),
        ("value * tl.load(scale_ptr + t * TOP_K + j", "value * tl.load(scale_ptr + t * TOP_K"),
        ("d_act = d_act * weight", "d_act = d_act"),
        ("(weight * silu * up)", "(silu * up)"),
        ("d_act * silu * up, 0.0)", "d_act * silu, 0.0)"),
        ("(sigmoid + silu * (1.0 - sigmoid))", "sigmoid"),
        ("live = row < high", "live = row < high - 1"),
        (
            "counts = tl.load(counts_ptr + e, mask=e < E, other=-1)",
            "counts = tl.load(counts_ptr + e, mask=e < E - 1, other=0)",
        ),
        ("a_row, b_row = (token, row) if GATHER_A else (row, token)", "a_row, b_row = token, token"),
        ("(split + 1) * each, count)", "(split + 1) * each, count - 1)"),
    ],
)
def test_a_broken_mlp_is_seen(tmp_path, old, new):
    with pytest.raises(AssertionError):
        check_mlp(kh.broken_variant(mlp_module, tmp_path, old, new), BROKEN_MLP_CASE)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", kh.DTYPES, ids=str)
@pytest.mark.parametrize("probabilities", [None, (0.7, 0.1, 0.1, 0.1), (0, 1, 1, 1), (0, 0, 1, 1)], ids=str)
@pytest.mark.parametrize("D, F, top_k", [(640, 1728, 2), (768, 2432, 1)], ids=["minimind2", "minimind3"])
@pytest.mark.parametrize("T", [1, 64, 4099])
def test_model_shapes(T, D, F, top_k, probabilities, dtype):
    # With one token a weight's gradient is one number, which eager may happen to get exactly right.
    check_mlp(mlp_module, (T, D, F, 4, top_k, probabilities), dtype, wanted=(True, T > 1, True, True))
    check_route(route_module, (T, D, 4, top_k, top_k > 1, (0, T // 3, T), False), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("top_k", [1, 2])
def test_cuda_graph(top_k):
    inputs, grads = layer_tensors(500, 128, 192, 4, top_k, torch.bfloat16)
    kh.assert_captures(layer(moe_route, moe_mlp, top_k, False), inputs, grads)
