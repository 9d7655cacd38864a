"""Attention by its backends, and the mixture-of-experts layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import ALL_DOCUMENTS, Suite, document_lengths, offsets

from minimind_fast import ops
from minimind_fast.attention import BACKENDS, attention, resolve
from minimind_fast.config import ModelConfig
from minimind_fast.model import MoE
from minimind_fast.roofline import Work, attention_work, op_work
from minimind_fast.verify import Comparison, _SameExperts, compare

EAGER_TOKENS = 8192  # eager builds T x T scores; sdpa stands for it beyond
DIRECTIONS = ("forward", "both")


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
    presets = [p for p in suite.presets(("minimind3-moe",), ("minimind3-moe",)) if p.endswith("-moe")]
    loads = ("balanced", "70/10/10/10", "one empty") if suite.on_gpu or suite.everything else ("balanced",)
    return [
        (preset, tokens, load, name, direction)
        for tokens in suite.tokens(65536, 128)
        for preset in presets
        for load in loads
        for name in ("eager", "ours")
        for direction in DIRECTIONS
    ]


ROWS = {"test_attention": _attention_rows, "test_moe_layer": _moe_rows}


def _grads(out: torch.Tensor, leaves: list[torch.Tensor], grad: torch.Tensor) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(out, leaves, grad.to(out.dtype))
    return {"out": out.detach(), **{f"d {i}": g for i, g in enumerate(found)}}


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
        capture=name in ("flash_attn", "torch_varlen"),  # the others read the documents' bounds on the host
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


def _layer(preset: str, load: str, dtype: torch.dtype, device: str) -> MoE:
    """A layer whose router likes its experts as the load says: the first feature of each token is 1."""
    config = ModelConfig.preset(preset)
    torch.manual_seed(0)
    layer = MoE(config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    likings = {"balanced": [0.0] * 4, "70/10/10/10": [1.15, 0.0, 0.0, 0.0], "one empty": [0.0, 0.0, 0.0, -100.0]}[load]
    with torch.no_grad():
        layer.gate.weight.mul_(1.5)  # logits of unit size or so
        layer.gate.weight[:, 0] = torch.tensor(likings)
    return layer.to(device, dtype).train()


def test_moe_layer(case: tuple[Any, ...], suite: Suite, benchmark: Any) -> None:
    preset, tokens, load, name, direction = case
    c = ModelConfig.preset(preset)
    kernels = "none" if name == "eager" else "auto"
    with ops.use(kernels):
        if name == "ours" and all(ops._choose(op, suite.device)[1].startswith("reference") for op in ops.NAMES[-2:]):
            pytest.skip("on a CPU ours is the reference itself")
    cu = offsets(document_lengths("512", tokens), suite.device)

    def draw(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        own = torch.Generator(suite.device).manual_seed(seed)
        x, grad = (torch.randn(tokens, c.hidden_size, generator=own, device=suite.device) for _ in "xg")
        x[:, 0] = 1.0
        return x.to(suite.dtype).requires_grad_(), grad.to(suite.dtype)

    def run(layer: MoE, x: torch.Tensor, grad: torch.Tensor, kernels: str) -> dict[str, torch.Tensor]:
        with ops.use(kernels):
            x = x.detach().to(layer.gate.weight.dtype).requires_grad_()
            y, aux = layer(x, cu, None)
            total = (y * grad.to(y.dtype)).sum() + aux
            leaves = [x, *layer.parameters()]
            found = torch.autograd.grad(total, leaves)
            return {"out": y.detach(), **{f"d {i}": g for i, g in enumerate(found)}}

    layer = _layer(preset, load, suite.dtype, suite.device)
    x, grad = draw(0)
    with _SameExperts() as experts:  # near ties are decided by rounding, not by right and wrong
        theirs = run(layer, x, grad, "none")
        experts.replay()
        truth = run(_layer(preset, load, suite.dtype, suite.device).double(), x, grad, "none")
        experts.replay()
        mine = run(layer, x, grad, kernels)
    errors = suite.hold_to(_by_norm(mine, theirs, truth), name == "ours")
    del theirs, truth, mine
    element = torch.finfo(suite.dtype).bits // 8
    sets = [draw(1 + i) for i in range(suite.sets(2 * x.numel() * element))]
    parameters = list(layer.parameters())

    def forward(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        with ops.use(kernels):
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
        capture=name == "ours",
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
    """The rule for more than one op: by norm, as an element's error has no owner."""
    return {k: compare(mine[k], theirs[k], truth[k], 1.25 + 3 * truth[k].numel() ** -0.5) for k in truth}
