"""Mixtures of both generations against MiniMind's formulas, written anew: the sum over experts, and the balancing loss."""

import pytest
import torch
import torch.nn.functional as F

import minimind_fast as mm
from minimind_fast.model import MoE

ROWS, LENGTH, HIDDEN = 3, 7, 16
SHAPES = [(experts, chosen) for experts in range(1, 9) for chosen in range(1, experts + 1)]


def mixture(generation, experts, chosen, normalised, shared, per_sequence, **more):
    torch.manual_seed(experts * 10 + chosen)
    config = mm.ModelConfig(
        generation=generation, hidden_size=HIDDEN, num_attention_heads=2, num_key_value_heads=1, use_moe=True,
        num_experts=experts, num_experts_per_tok=chosen, norm_topk_prob=normalised, num_shared_experts=shared,
        aux_loss_per_sequence=per_sequence, router_aux_loss_coef=0.3, moe_intermediate_size=8, **more,
    )  # fmt: skip
    layer = MoE(config).double().train()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def expert(x, gate_up, down):
    gate, up = F.linear(x, gate_up).chunk(2, -1)
    return F.linear(F.silu(gate) * up, down)


def minimind(layer, x, generation, chosen, normalised, per_sequence):
    """What MiniMind computes of rows (B, T, D): each expert on every token, times its weight or 0."""
    experts = layer.experts.gate_up.shape[0]
    scores = torch.softmax(x @ layer.gate.weight.T, -1)
    order = scores.argsort(-1, descending=True)[..., :chosen]
    picked = torch.zeros_like(scores).scatter(-1, order, 1.0)
    weights = scores * picked
    if normalised and (generation == 3 or chosen > 1):
        weights = weights / weights.sum(-1, keepdim=True)
    y = sum(weights[..., e, None] * expert(x, layer.experts.gate_up[e], layer.experts.down[e]) for e in range(experts))
    if layer.shared is not None:
        for wide in range(layer.shared.down_proj.in_features // 8):  # one by one, as MiniMind has them
            rows = slice(8 * wide, 8 * wide + 8)
            gate, up = layer.shared.gate_up_proj.weight.chunk(2)
            y = y + expert(x, torch.cat([gate[rows], up[rows]]), layer.shared.down_proj.weight[:, rows])
    over = (1,) if per_sequence else (0, 1)
    share, mass = picked.mean(over), scores.mean(over)
    times = 1.0 if generation == 3 else 1.0 / chosen  # generation 2 divides by the choices, generation 3 does not
    return y, 0.3 * experts * times * (share * mass).sum(-1).mean()


@pytest.mark.parametrize("generation", [2, 3])
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("per_sequence", [True, False])
def test_every_mixture_is_minimind_s(generation, normalised, per_sequence):
    cu = torch.arange(ROWS + 1, dtype=torch.int32) * LENGTH
    for experts, chosen in SHAPES:
        for shared in range(3):
            layer = mixture(generation, experts, chosen, normalised, shared, per_sequence)
            x = torch.randn(ROWS, LENGTH, HIDDEN, dtype=torch.float64, requires_grad=True)
            want, want_aux = minimind(layer, x, generation, chosen, normalised, per_sequence)
            got, aux = layer(x.reshape(-1, HIDDEN), cu, None)
            about = f"{chosen} of {experts} experts, {shared} shared"
            torch.testing.assert_close(got.view_as(want), want, rtol=1e-9, atol=1e-9, msg=about)
            torch.testing.assert_close(aux.double(), want_aux, rtol=1e-6, atol=1e-9, msg=about)
            leaves = [x, *layer.parameters()]
            upstream = torch.randn_like(want)
            wanted = torch.autograd.grad((want * upstream).sum() + want_aux, leaves, allow_unused=True)
            mine = torch.autograd.grad((got.view_as(want) * upstream).sum() + aux, leaves, allow_unused=True)
            for a, b in zip(mine, wanted, strict=True):
                zero = torch.zeros(())
                torch.testing.assert_close(zero if a is None else a, zero if b is None else b, rtol=1e-6, atol=1e-8)


def test_the_gradient_that_is_passed_through_is_that_of_the_score_s_logarithm():
    layer = mixture(3, 4, 1, True, 0, False, straight_through_router=True)
    plain = mixture(3, 4, 1, True, 0, False)
    x = torch.randn(9, HIDDEN, dtype=torch.float64)
    cu = torch.tensor([0, 9], dtype=torch.int32)
    got, _ = layer(x, cu, None)
    assert torch.equal(got, plain(x, cu, None)[0])  # the answer is MiniMind's, to the bit
    upstream = torch.randn_like(got)
    logs = torch.log_softmax(x @ layer.gate.weight.T, -1)
    best, which = logs.max(-1)
    each = torch.stack([expert(x[i], layer.experts.gate_up[e], layer.experts.down[e]) for i, e in enumerate(which)])
    want = torch.autograd.grad(((each * upstream).sum(-1).detach() * best).sum(), layer.gate.weight)[0]
    mine = torch.autograd.grad((got * upstream).sum(), layer.gate.weight)[0]
    torch.testing.assert_close(mine, want, rtol=1e-6, atol=1e-9)
    assert want.norm() > 1e-3
    nothing = torch.autograd.grad((plain(x, cu, None)[0] * upstream).sum(), plain.gate.weight)[0]
    assert nothing.norm() < 1e-6 * want.norm()


def test_who_learns_from_the_language_model():
    def learns(**changes):
        return mm.ModelConfig(**{"use_moe": True, "num_experts_per_tok": 1, **changes}).router_gets_lm_gradient

    assert not learns(generation=3) and learns(generation=3, straight_through_router=True)
    assert learns(generation=2)  # which normalises only where several are chosen
    assert learns(generation=3, norm_topk_prob=False) and learns(generation=3, num_experts_per_tok=2)
