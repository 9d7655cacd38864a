"""Other people's implementations behind our signatures: same arithmetic, or no row; and the split-K experiment."""

import importlib
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from kernel_helpers import DEVICE, DTYPES, HAS_GPU, assert_error_rule

from benchmarks.peers import liger_ops, moe_peers
from benchmarks.record import ROOT
from benchmarks.studies import split_k
from minimind_fast.ops import reference
from minimind_fast.proof.rule import compare

EXPERTS, HIDDEN, FFN = 4, 16, 24  # rows of 16 bytes and more, as grouped_mm asks


def mixture(tokens: int, top_k: int, kind: str, dtype: torch.dtype, device: str = "cpu"):
    """x, routing, gate_up, down as leaves, and the output's gradient."""
    own = torch.Generator().manual_seed(tokens + top_k)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(shape, generator=own)).to(device, dtype)

    x, gate = normal(tokens, HIDDEN), normal(EXPERTS, HIDDEN, scale=0.3)
    x[:, 0] = 1.0
    gate[:, 0] = torch.tensor({"balanced": [0.0] * 4, "skewed": [3.0, 0, 0, 0], "one empty": [0.0, 0, 0, -99]}[kind])
    routing = reference.moe_route(x, gate, top_k, top_k > 1)
    weights = routing.weights.detach().requires_grad_()
    leaves = [x, normal(EXPERTS, 2 * FFN, HIDDEN, scale=0.25), normal(EXPERTS, HIDDEN, FFN, scale=0.2)]
    x, gate_up, down = (t.requires_grad_() for t in leaves)
    return (x, routing._replace(weights=weights), gate_up, down), normal(tokens, HIDDEN)


def results(function, inputs, grad, dtype=None) -> list[torch.Tensor]:
    x, routing, gate_up, down = inputs
    leaves = [x, routing.weights, gate_up, down]
    if dtype is not None:
        leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
    x, weights, gate_up, down = leaves
    out = function(x, routing._replace(weights=weights), gate_up, down)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def assert_same(function, inputs, grad) -> None:
    truth = results(reference.moe_mlp, inputs, grad, torch.float64)
    eager, mine = results(reference.moe_mlp, inputs, grad), results(function, inputs, grad)
    for name, *three in zip(("out", "d x", "d weights", "d gate_up", "d down"), mine, eager, truth, strict=True):
        # By norm, as the suite holds layers: these are chains of several operators.
        found = compare(*three, 1.25 + 3 * three[0].numel() ** -0.5)
        assert found.passed, f"{name}: {found.reason}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["balanced", "skewed", "one empty"])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("name", ["loop", "grouped_mm"])
def test_what_pytorch_alone_can_do_is_the_reference(name, top_k, kind, dtype):
    assert_same(moe_peers.find(name, "cpu"), *mixture(33, top_k, kind, dtype))


@pytest.fixture
def stand_in(monkeypatch):
    """Puts a module in the place of one that is not installed."""

    def put(name: str, **functions) -> None:
        module = ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)

    return put


def linear_in_groups(rows, matrices, sizes):
    """Rows in groups times the transposes of matrices."""
    return torch.cat([F.linear(r, w) for r, w in zip(rows.split(list(sizes)), matrices, strict=True)])


def test_sonicmoe_is_given_gate_and_up_rows_in_turn_and_experts_last(stand_in, monkeypatch):
    """A stand-in with SonicMoE's documented contract; it runs on Hopper cards only."""

    def sonic(x, scores, tokens, experts, w1, b1, w2, b2, count, stream, activation):
        assert b1 is None and b2 is None and stream == 7 and activation == "swiglu"
        assert w1.shape == (2 * FFN, HIDDEN, count) and w2.shape == (HIDDEN, FFN, count)
        assert tokens.dtype == experts.dtype == torch.int32 and (tokens.diff() >= 0).all()
        h = torch.einsum("sd,fds->sf", x[tokens.long()], w1[:, :, experts.long()])
        y = torch.einsum("sf,dfs->sd", F.silu(h[:, ::2]) * h[:, 1::2], w2[:, :, experts.long()])
        return torch.zeros_like(x).index_add(0, tokens.long(), y * scores[:, None].to(y.dtype)), None

    stand_in("sonicmoe")
    stand_in("sonicmoe.functional", moe_general_routing_inputs=sonic)
    stand_in("sonicmoe.enums", ActivationType=SimpleNamespace(SWIGLU="swiglu"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    for top_k in (1, 2):
        assert_same(moe_peers._sonicmoe(), *mixture(19, top_k, "skewed", torch.float32))


def test_megablocks_is_given_our_plan(stand_in):
    """Stand-ins with the contracts of its gather and scatter, and of grouped_gemm's matmul."""

    def gather(x, indices, bin_ids, bins, top_k):
        assert (bin_ids.diff() >= 0).all() and bins[-1] == indices.numel()
        return x[indices.long() // top_k]

    def scatter(rows, indices, bin_ids, weights, bins, top_k):
        slots = torch.zeros(len(rows), rows.shape[1]).index_copy(0, indices.long(), rows)
        return (slots * weights[:, None]).view(-1, top_k, rows.shape[1]).sum(1)

    def gmm(a, b, sizes, trans_b):
        assert trans_b and not sizes.is_cuda and sizes.dtype == torch.int64
        return linear_in_groups(a, b, sizes.tolist())

    stand_in("megablocks")
    stand_in("megablocks.ops", gather=gather, scatter=scatter)
    stand_in("grouped_gemm", ops=SimpleNamespace(gmm=gmm))
    for top_k in (1, 2):
        assert_same(moe_peers._megablocks(), *mixture(19, top_k, "one empty", torch.float32))


def test_scattermoe_is_given_our_plan(stand_in):
    """The real one where it is installed, by the interpreter if need be; else a stand-in with its contract."""

    def parallel_linear(x, w, k, experts, order, offsets, gates=None, grouped_in=False, grouped_out=False):
        sizes = offsets.diff(prepend=offsets.new_zeros(1)).tolist()
        rows = x if grouped_in else x[order // k]
        out = linear_in_groups(rows, w.transpose(1, 2), sizes)
        assert experts.tolist() == [e for e, n in enumerate(sizes) for _ in range(n)]
        if grouped_out:
            return out
        slots = torch.zeros_like(out).index_copy(0, order, out)
        return (gates.unsqueeze(1) @ slots.view(*gates.shape, -1)).squeeze(1)

    if importlib.util.find_spec("scattermoe") is None:
        stand_in("scattermoe")
        stand_in("scattermoe.parallel_experts", parallel_linear=parallel_linear)
    for top_k in (1, 2):
        assert_same(moe_peers._scattermoe(), *mixture(19, top_k, "skewed", torch.float32, DEVICE))


def test_ligers_mixture_is_given_our_plan():
    if importlib.util.find_spec("liger_kernel") is None:
        pytest.skip("Liger-Kernel is not installed")
    os.environ["LIGER_FUSED_MOE_AUTOTUNE"] = "0"  # the interpreter has no clock to tune by
    for top_k in (1, 2):
        assert_same(liger_ops.experts(), *mixture(9, top_k, "skewed", torch.float32, DEVICE))


def test_a_peer_that_is_not_there_says_why(monkeypatch):
    assert moe_peers.find("liger", "cpu") == "liger runs on a GPU only"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert moe_peers.find.__wrapped__("sonicmoe", "cuda") == "sonicmoe is for compute capability 9 only"
    monkeypatch.setitem(sys.modules, "scattermoe.parallel_experts", None)  # as if it were not installed
    assert "github.com/shawntan/scattermoe" in moe_peers.find.__wrapped__("scattermoe", "cuda")
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.swiglu", None)
    assert liger_ops.op("swiglu").startswith("Liger-Kernel is not installed")
    assert "twice" in liger_ops.op("linear_cross_entropy")


def test_ligers_mixture_is_tuned_over_few_configurations():
    def config(warps: int, stages: int, **blocks: int) -> SimpleNamespace:
        return SimpleNamespace(kwargs=blocks, num_warps=warps, num_stages=stages)

    plain = [config(w, s, BLOCK_N=n, BLOCK_K=64) for w in (4, 8) for s in (2, 3) for n in (64, 128)]
    dw = [config(w, 2, BLOCK_M=m, BLOCK_N=128, BLOCK_K=32) for w in (4, 8) for m in (64, 128)]
    other = [config(2, 1, BLOCK_H=32)]
    module = SimpleNamespace(
        _up=SimpleNamespace(configs=plain), _bwd_dW1=SimpleNamespace(configs=dw), _x=SimpleNamespace(configs=other), n=1
    )
    liger_ops.tune_over_few(module)
    assert [(c.num_warps, c.num_stages, c.kwargs["BLOCK_N"]) for c in module._up.configs] == [
        (4, 3, 128),
        (8, 2, 128),
        (8, 3, 128),
    ]
    assert [(c.num_warps, c.kwargs["BLOCK_M"]) for c in module._bwd_dW1.configs] == [(8, 64), (8, 128)]
    assert module._x.configs == other  # nothing of FEW: as it was


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, N, K, count", [(64, 128, 64, 1), (70, 40, 100, 3), (33, 130, 24, 2), (5, 8, 8, 4)])
def test_split_k_is_the_weight_gradient(T, N, K, count, dtype):
    own = torch.Generator().manual_seed(T)
    dy, x = (torch.randn(T, n, generator=own).to(DEVICE, dtype) for n in (N, K))
    truth = dy.double().t() @ x.double()
    first, again = (split_k.weight_grad(dy, x, count) for _ in "ab")
    assert torch.equal(first, again)
    assert_error_rule("dW", first, (dy.t() @ x) if HAS_GPU else (dy.float().t() @ x.float()).to(dtype), truth)
    pieces = split_k.in_pieces(dy, x, count)
    assert_error_rule("dW", pieces, (dy.t() @ x) if HAS_GPU else (dy.float().t() @ x.float()).to(dtype), truth)


def test_split_k_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="of as many rows"):
        split_k.weight_grad(torch.zeros(4, 8), torch.zeros(5, 8))
    with pytest.raises(ValueError, match="contiguous"):
        split_k.weight_grad(torch.zeros(8, 4).t(), torch.zeros(4, 8))


def test_rows_are_split_until_the_card_is_full():
    assert split_k.pieces(65536, 768, 768, 132) == 7  # 18 tiles: 126 of 132
    assert split_k.pieces(65536, 4864, 768, 132) == 8  # 114 tiles: 912 in 7 waves; one piece would fill 86%
    assert split_k.pieces(65536, 16896, 256, 132) == 1  # 132 tiles
    assert split_k.pieces(600, 768, 768, 132) == 1  # too few rows to share
    for T, N in ((6144, 1536), (53191, 768)):
        assert 1 <= split_k.pieces(T, N, 768, 132) <= T // split_k.MIN_ROWS


AOT = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from benchmarks import aot
from benchmarks.studies import split_k
from torch._subclasses.fake_tensor import FakeTensorMode
target = aot.TARGETS["sm_90"]
for T, N, K in ((53191, 768, 768), (65536, 4864, 768)):
    with aot._no_card(target) as launches, FakeTensorMode(allow_non_fake_inputs=True):
        dy, x = (torch.empty(T, n, dtype=torch.bfloat16) for n in (N, K))
        split_k.weight_grad(dy, x)
        calls = [
            ([aot._Pointer(a) if isinstance(a, torch.Tensor) else a for a in args], kernel, options)
            for kernel, args, options, _ in launches
        ]
    assert len(calls) == 2, calls
    for args, kernel, options in calls:
        launch = aot.Launch("dW", "", "backward", kernel, args, options, 0, 0)
        row = {**aot.resources(aot.compile_launch(launch, target), target), "target": "sm_90", "dtype": "bfloat16"}
        print(kernel.fn.__name__, row)
        assert not aot.problems(row), aot.problems(row)
        assert row["mma"] == ("wgmma.mma_async" if "partials" in kernel.fn.__name__[:9] else None)
"""


def test_split_k_compiles_for_a_hopper_card_without_spills():
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = [sys.executable, "-c", AOT, str(ROOT)]
    done = subprocess.run(run, env=clean, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("wgmma.mma_async") == 2
