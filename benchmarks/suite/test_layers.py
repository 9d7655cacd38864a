"""The head's loss, the MoE layer beside its peers, and attention by its backends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks.peers import liger_ops, moe_peers
from benchmarks.suite.harness import ALL_DOCUMENTS, Suite, document_lengths, offsets, others_may_fail
from minimind_fast import ops
from minimind_fast.config import ModelConfig
from minimind_fast.model import MLP, MoE
from minimind_fast.ops.attention import BACKENDS, attention, resolve
from minimind_fast.ops.registry import Work
from minimind_fast.proof.models import SameExperts
from minimind_fast.proof.roofline import attention_work, op_work
from minimind_fast.proof.rule import Comparison, compare

EAGER_TOKENS = 8192  # eager builds T x T scores; sdpa replaces it beyond
DIRECTIONS = ("forward", "both")
MIXTURE_OPS = [name for name, op in ops.OPS.items() if op.of_mixtures]


def _attention_rows(suite: Suite) -> list[tuple[Any, ...]]:
    kinds = ALL_DOCUMENTS if suite.everything else ("512", "mix") if suite.on_gpu else ("64", "mix")
    return [
        (preset, tokens, kind, name, direction)
        for tokens in suite.tokens(65536, 512)
        for preset in suite.presets(("minimind3",), ("minimind3",))
        for kind in kinds
        for name in ("eager", *(b for b in BACKENDS if b not in ("auto", "eager")))
        for direction in DIRECTIONS
    ]


def _moe_rows(suite: Suite) -> list[tuple[Any, ...]]:
    """The goals' rows first: the newest MoE model, balanced and skewed, forward and backward."""
    presets = [p for p in suite.presets(("minimind3-moe", "minimind2-moe"), ("minimind3-moe",)) if p.endswith("-moe")]
    loads = ("balanced", "70/10/10/10", "one empty") if suite.everything else ("balanced", "70/10/10/10")
    last = moe_peers.NAMES[-1]
    rows = [
        (preset, tokens, load, name, direction)
        for tokens in suite.tokens(65536, 128)
        for preset in presets
        for load in (loads if suite.on_gpu or suite.everything else loads[:1])
        for direction in ("both", "forward")
        for name in ("eager", "dense", "ours", *moe_peers.NAMES)
        if name != "dense" or load == "balanced"  # dense has no routing
    ]
    if not suite.everything:
        # Peers' forwards and a compilation per shape are for --shapes all.
        rows = [r for r in rows if r[4] == "both" or r[3] in ("eager", "dense", "ours")]
        rows = [r for r in rows if r[3] != last or r[2] == "balanced"]
    return sorted(rows, key=lambda r: (r[3] == last, r[4] == "forward"))  # stable


def _head_rows(suite: Suite) -> list[tuple[Any, ...]]:
    return [
        (preset, tokens, name)
        for tokens in suite.tokens(65536, 64)
        for preset in suite.presets(("minimind3",), ("minimind2-small",))
        for name in ("eager", "ours", "liger", "compile")
    ]


ROWS = {"test_head_loss": _head_rows, "test_moe_layer": _moe_rows, "test_attention": _attention_rows}


def _grads(out: torch.Tensor, leaves: list[torch.Tensor], grad: torch.Tensor) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(out, leaves, grad.to(out.dtype))
    return {"out": out.detach(), **{f"d {i}": g for i, g in enumerate(found)}}


def test_head_loss(case: tuple[Any, ...], suite: Suite, benchmark: Any) -> None:
    """The mean loss and its gradients, as pretraining asks for them."""
    preset, tokens, name = case
    c = ModelConfig.preset(preset)
    if name == "compile" and not suite.on_gpu:
        pytest.skip("compiled on a GPU only")

    def eager(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = torch.nn.functional.linear(hidden, weight)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return torch.nn.functional.cross_entropy(wide, targets)

    even = torch.full((tokens,), 1 / tokens, device=suite.device)

    def ours(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with ops.use("auto"):
            return -(ops.linear_cross_entropy(hidden, weight, targets, grad_weights=even) * even).sum()

    made = {
        "eager": lambda: eager,
        "ours": lambda: ours,
        "compile": lambda: torch.compile(eager, dynamic=False),
        "liger": lambda: liger_ops.or_reason(liger_ops.mean_loss) if suite.on_gpu else "liger runs on a GPU only",
    }
    function = made[name]()
    if isinstance(function, str):
        pytest.skip(function)

    def draw(seed: int) -> tuple[torch.Tensor, ...]:
        own = torch.Generator(suite.device).manual_seed(seed)
        shapes = ((tokens, c.hidden_size), (c.vocab_size, c.hidden_size))
        hidden, weight = (torch.randn(s, generator=own, device=suite.device).to(suite.dtype) for s in shapes)
        targets = torch.randint(0, c.vocab_size, (tokens,), generator=own, device=suite.device)
        return hidden.requires_grad_(), weight.mul_(c.hidden_size**-0.5).requires_grad_(), targets

    def run(function: Callable, some: tuple[torch.Tensor, ...], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        hidden, weight = leaves = [t.detach().to(dtype).requires_grad_() for t in some[:2]]
        found = function(hidden, weight, some[2])
        grads = torch.autograd.grad(found, leaves)
        # A single number has no worst element to bound it: check it at the inputs' precision.
        return {"loss": found.detach().to(dtype), "d hidden": grads[0], "d weight": grads[1]}

    def both(some: tuple[torch.Tensor, ...]) -> None:
        torch.autograd.grad(function(*some), some[:2])

    first = draw(0)
    with others_may_fail(name in ("eager", "ours")):
        mine = run(function, first, suite.dtype)
    theirs, truth = run(eager, first, suite.dtype), run(eager, first, torch.float64)
    errors = suite.hold_to({key: compare(mine[key], theirs[key], truth[key]) for key in truth}, name == "ours")
    del mine, theirs, truth
    element = torch.finfo(suite.dtype).bits // 8
    sets = [draw(1 + i) for i in range(suite.sets(first[0].numel() * element))]
    suite.row(
        benchmark,
        f"head's mean loss {preset} T={tokens}",
        name,
        [lambda some=some: both(some) for some in sets],
        op_work("linear_cross_entropy", c, "both", tokens, element),
        capture=name in ("eager", "ours"),
        kind="head",
        op="head",
        preset=preset,
        tokens=tokens,
        direction="both",
        dtype=suite.dtype_name,
        same_shape_flop_per_s=suite.same_shape(tokens, c.vocab_size, c.hidden_size),
        peak_bytes=suite.peak_bytes(lambda: both(sets[0])),
        **errors,
    )


def _layer(preset: str, load: str, dtype: torch.dtype, device: str) -> MoE:
    """A layer whose router produces the given load, through each token's first feature, which is 1."""
    config = ModelConfig.preset(preset)
    torch.manual_seed(0)
    layer = MoE(config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    likings = {"balanced": [0.0] * 4, "70/10/10/10": [1.15, 0.0, 0.0, 0.0], "one empty": [0.0, 0.0, 0.0, -100.0]}[load]
    with torch.no_grad():
        layer.gate.weight.mul_(1.5)  # logits of about unit size
        layer.gate.weight[:, 0] = torch.tensor(likings)
    return layer.to(device, dtype).train()


@contextlib.contextmanager
def _experts_by(function: Callable | None) -> Iterator[None]:
    """Run the model's experts by a peer's function, or by ours if None."""
    own = ops.moe_mlp
    ops.moe_mlp = function or own
    try:
        yield
    finally:
        ops.moe_mlp = own


class _Dense(torch.nn.Module):
    """An MLP as wide as a token's active experts, with the layer's interface."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.moe_intermediate_size and config.num_experts_per_tok is not None
        torch.manual_seed(0)
        slots = config.num_experts_per_tok + (config.num_shared_experts or 0)
        self.mlp = MLP(config, config.moe_intermediate_size * slots)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.02)

    def forward(self, x: torch.Tensor, cu_seqlens: torch.Tensor, valid: None) -> tuple[torch.Tensor, torch.Tensor]:
        return self.mlp(x), x.new_zeros(())


def test_moe_layer(case: tuple[Any, ...], suite: Suite, benchmark: Any) -> None:
    preset, tokens, load, name, direction = case
    c = ModelConfig.preset(preset)
    kernels, experts = "none" if name == "eager" else "auto", None
    if name in moe_peers.NAMES:  # all use our router
        experts = moe_peers.find(name, suite.device)
        if isinstance(experts, str):
            pytest.skip(experts)
    elif name == "ours" and all(ops.choose(op, suite.device)[1].startswith("reference") for op in MIXTURE_OPS):
        pytest.skip("on a CPU ours is the reference itself")
    cu = offsets(document_lengths("512", tokens), suite.device)

    def draw(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        own = torch.Generator(suite.device).manual_seed(seed)
        x, grad = (torch.randn(tokens, c.hidden_size, generator=own, device=suite.device) for _ in "xg")
        x[:, 0] = 1.0
        return x.to(suite.dtype).requires_grad_(), grad.to(suite.dtype)

    def make(dtype: torch.dtype) -> MoE | _Dense:
        return _Dense(c).to(suite.device, dtype) if name == "dense" else _layer(preset, load, dtype, suite.device)

    def run(layer: torch.nn.Module, x: torch.Tensor, grad: torch.Tensor, kernels: str, by: Callable | None = None):
        with ops.use(kernels), _experts_by(by):
            x = x.detach().to(next(layer.parameters()).dtype).requires_grad_()
            y, aux = layer(x, cu, None)
            total = (y * grad.to(y.dtype)).sum() + aux
            leaves = [x, *layer.parameters()]
            found = torch.autograd.grad(total, leaves)
            return {"out": y.detach(), **{f"d {i}": g for i, g in enumerate(found)}}

    layer = make(suite.dtype)
    x, grad = draw(0)
    # The same experts for all: rounding decides near ties.
    with others_may_fail(experts is None), SameExperts() as same:
        theirs = run(layer, x, grad, "none")
        same.replay()
        truth = run(make(suite.dtype).double(), x, grad, "none")
        same.replay()
        mine = run(layer, x, grad, kernels, experts)
    errors = suite.hold_to(_by_norm(mine, theirs, truth), name in ("ours", "dense"))
    del theirs, truth, mine
    element = torch.finfo(suite.dtype).bits // 8
    sets = [draw(1 + i) for i in range(suite.sets(2 * x.numel() * element))]
    parameters = list(layer.parameters())

    def forward(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        with ops.use(kernels), _experts_by(experts):
            y, _ = layer(x, cu, None)
        return y

    def both(x: torch.Tensor, grad: torch.Tensor) -> None:
        torch.autograd.grad(forward(x, grad), [x, *parameters], grad, allow_unused=True)

    function = forward if direction == "forward" else both
    route, experts_work = (op_work(op, c, direction, tokens, element) for op in ("moe_route", "moe_mlp"))
    shared = (c.num_shared_experts or 0) / (c.num_experts_per_tok or 1)
    work = Work(route.bytes + experts_work.bytes * (1 + shared), experts_work.flops * (1 + shared))
    suite.row(
        benchmark,
        f"MoE layer {preset} T={tokens} {load} {direction}",
        name,
        [lambda some=some: function(*some) for some in sets],
        work,
        capture=name in ("ours", "dense"),  # a graph needs calls without host waits, which others do not promise
        kind="MoE layer",
        op="MoE layer",
        preset=preset,
        tokens=tokens,
        routing=load,
        direction=direction,
        dtype=suite.dtype_name,
        peak_bytes=suite.peak_bytes(lambda: both(*sets[0])),
        **errors,
    )


def _by_norm(mine: dict, theirs: dict, truth: dict) -> dict[str, Comparison]:
    """The rule for several ops: by norm, since element errors have many causes."""
    return {k: compare(mine[k], theirs[k], truth[k], 1.25 + 3 * truth[k].numel() ** -0.5) for k in truth}


def test_attention(case: tuple[Any, ...], suite: Suite, benchmark: Any) -> None:
    preset, tokens, kind, name, direction = case
    c = ModelConfig.preset(preset)
    assert c.head_dim
    try:
        resolve(name, suite.device, suite.dtype)
    except ValueError as error:
        pytest.skip(str(error))
    if name == "eager" and tokens > EAGER_TOKENS:
        pytest.skip(f"eager builds {tokens} x {tokens} scores; sdpa stands for it in the check")
    lengths = document_lengths(kind, tokens)
    cu, longest = offsets(lengths, suite.device), max(lengths)
    sizes = (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads)
    pairs = sum(n * (n + 1) / 2 for n in lengths)
    shapes = [(tokens, heads, c.head_dim) for heads in sizes]
    element = torch.finfo(suite.dtype).bits // 8

    def draw(seed: int) -> list[torch.Tensor]:
        own = torch.Generator(suite.device).manual_seed(seed)
        shapes_and_grad = [*shapes, shapes[0]]
        return [torch.randn(s, generator=own, device=suite.device).to(suite.dtype) for s in shapes_and_grad]

    plain = "eager" if tokens <= EAGER_TOKENS else "sdpa"

    def run(backend: str, tensors: list[torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        q, k, v = leaves = [t.detach().to(dtype).requires_grad_() for t in tensors[:3]]
        return _grads(attention(q, k, v, cu, longest, backend), leaves, tensors[3])

    tensors = draw(0)
    truth = run(plain, tensors, torch.float64)
    theirs, mine = run(plain, tensors, suite.dtype), run(name, tensors, suite.dtype)
    errors = suite.hold_to({key: compare(mine[key], theirs[key], truth[key]) for key in truth}, name != "eager")
    del truth, theirs, mine
    sets = [draw(1 + i) for i in range(suite.sets(sum(t.numel() * element for t in tensors)))]
    for some in sets:
        for tensor in some[:3]:
            tensor.requires_grad_()

    def forward(some: list[torch.Tensor]) -> torch.Tensor:
        return attention(*some[:3], cu, longest, name)

    def both(some: list[torch.Tensor]) -> None:
        torch.autograd.grad(forward(some), some[:3], some[3])

    function = forward if direction == "forward" else both
    suite.row(
        benchmark,
        f"attention {preset} T={tokens} documents of {kind} {direction}",
        name,
        [lambda some=some: function(some) for some in sets],
        attention_work(c, direction, tokens, pairs, element),
        capture=name in ("flash_attn", "torch_varlen"),  # the others read document bounds on the host
        kind="attention",
        op="attention",
        preset=preset,
        tokens=tokens,
        documents=kind,
        direction=direction,
        dtype=suite.dtype_name,
        peak_bytes=suite.peak_bytes(lambda: both(sets[0])),
        **errors,
    )
