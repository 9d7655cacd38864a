"""Muon: which matrices, the step against one written down by hand, and the same step however ZeRO cuts the weights."""

import json
import math

import pytest
import torch
from launching import TINY, finish, finish_all, read_log, run, start, write_corpus
from torch.utils.flop_counter import FlopCounterMode

import minimind_fast as mm
from minimind_fast.proof.roofline import muon_work
from minimind_fast.training.optimizers import shares
from minimind_fast.training.optimizers.muon import COEFFICIENTS, STEPS, Muon, Place, matrices, orthogonalise
from minimind_fast.weights.checkpoint import to_disk_names

SMALL = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=61)
SMALL |= dict(max_position_embeddings=64)


def small(preset: str) -> mm.MiniMind:
    torch.manual_seed(0)
    return mm.MiniMind(mm.ModelConfig.preset(preset, **SMALL))


def hidden(model: mm.MiniMind, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The matrices that Muon trains, by their names on disk; a lone shared expert is one."""
    named = to_disk_names(tensors, model.config).items()
    return {n: t for n, t in named if n.endswith("_proj.weight")}


@pytest.mark.parametrize("preset", ["minimind2", "minimind3", "minimind2-moe", "minimind3-moe"])
def test_each_matrix_on_disk_is_one_and_nothing_else_is(preset):
    model = small(preset)
    found = matrices(model)
    for name, parameter in model.named_parameters():
        in_memory = sorted(hidden(model, {name: parameter}).values(), key=lambda matrix: matrix.storage_offset())
        assert [tuple(matrix.shape) for matrix in in_memory] == found.get(parameter, []), name
        at = 0
        for matrix in in_memory:  # one after the other, without a gap
            assert matrix.is_contiguous() and matrix.storage_offset() == at, name
            at += matrix.numel()


@pytest.mark.parametrize("shape", [(1, 1, 5), (2, 16, 16), (3, 8, 40)], ids=str)
def test_newton_schulz_maps_singular_values_by_its_polynomial(shape):
    """By the singular value decomposition in float64; a singular value from 0.1 on ends near 1."""
    torch.manual_seed(1)
    given = torch.randn(shape)
    u, s, v = torch.linalg.svd(given.double(), full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    large = s > 0.1
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        s = a * s + b * s**3 + c * s**5
    assert ((s > 0.65) & (s < 1.25))[large].all()
    want = u @ torch.diag_embed(s) @ v
    torch.testing.assert_close(orthogonalise(given, torch.float32).double(), want, atol=2e-5, rtol=0)
    assert (orthogonalise(given, torch.bfloat16) - want).norm() < 0.05 * want.norm()
    assert not orthogonalise(torch.zeros(shape), torch.float32).any()


def test_the_roofline_counts_what_newton_schulz_multiplies():
    model = small("minimind2-moe")
    with FlopCounterMode(display=False) as counter:
        for shape in (shape for shapes in matrices(model).values() for shape in shapes):
            orthogonalise(torch.zeros(1, *sorted(shape)), torch.float32)
    whole, half = (muon_work(model.config, halved=halved).flops for halved in (False, True))
    assert whole == counter.get_total_flops() and 0.6 * whole < half < 0.8 * whole


def by_hand(model, gradients, lr, decay):
    """Two steps on every matrix by its name on disk."""
    weights = {n: t.clone() for n, t in hidden(model, dict(model.named_parameters())).items()}
    momenta = {n: torch.zeros_like(t) for n, t in weights.items()}
    for step in gradients:
        for name, grad in hidden(model, step).items():
            momenta[name] = 0.95 * momenta[name] + 0.05 * grad
            update = orthogonalise((0.05 * grad + 0.95 * momenta[name])[None], torch.float32)[0]
            rows, columns = grad.shape
            weights[name] -= lr * (decay * weights[name] + 0.2 * math.sqrt(max(rows, columns)) * update)
    return weights


@pytest.mark.parametrize("preset", ["minimind3", "minimind2-moe"])
@torch.no_grad()
def test_steps_are_those_by_hand_and_as_large_as_adamws(monkeypatch, preset):
    monkeypatch.setattr(shares, "world", lambda: (0, 1))
    model, lr, decay = small(preset), 0.01, 0.1
    named = dict(model.named_parameters())
    gradients = [{n: torch.randn_like(p) for n, p in named.items()} for _ in range(2)]
    want = by_hand(model, gradients, lr, decay)
    rest = {n: p.clone() for n, p in named.items() if not hidden(model, {n: p})}
    decays = [{"params": [p], "weight_decay": decay * (p.dim() > 1)} for p in rest.values()]
    adamw = torch.optim.AdamW(decays, lr=lr, betas=(0.9, 0.95))
    muon = Muon(model, decay, (0.9, 0.95), torch.float32, torch.device("cpu"))
    muon.place(Place(p, 0, p.numel(), p, 0) for p in named.values())
    before = {n: t.clone() for n, t in hidden(model, named).items()}
    for step in gradients:
        for group in muon.param_groups:
            group["lr"] = lr
        for name, p in named.items():
            p.grad = step[name]
            if name in rest:
                rest[name].grad = step[name].clone()
        muon.step()
        adamw.step()
    for name, got in hidden(model, named).items():
        torch.testing.assert_close(got, want[name], atol=1e-6, rtol=1e-5, msg=name)
        rms = ((got - before[name] * (1 - lr * decay) ** 2) / (2 * lr)).square().mean().sqrt()
        assert 0.1 < rms < 0.3, name  # AdamW's updates have 0.2-0.4
    for name, p in rest.items():
        torch.testing.assert_close(named[name], p, msg=name)
    assert {float(state["step"]) for state in muon.state.values()} == {2.0}
    assert all(s["exp_avg_sq"].untyped_storage().nbytes() == 4 for p, s in muon.state.items() if p in matrices(model))


@torch.no_grad()
def test_clipping_and_skipping_on_the_device_are_those_of_the_host(monkeypatch):
    """`grad_scale` and `found_inf`, as the bf16 step of ZeRO 1 sets them, against gradients divided and a step left out."""
    monkeypatch.setattr(shares, "world", lambda: (0, 1))
    torch.manual_seed(0)
    shape = (24, 4 * small("minimind3").config.head_dim)
    gradients = [torch.randn(shape), torch.full(shape, math.nan), torch.randn(shape)]
    ends = []
    for on_device in (True, False):
        model = small("minimind3")
        muon = Muon(model, 0.1, (0.9, 0.95), torch.float32, torch.device("cpu"))
        muon.place(Place(p, 0, p.numel(), p, 0) for p in model.parameters())
        weight = model.model.layers[0].self_attn.o_proj.weight
        for group in muon.param_groups:
            group["lr"] = 0.01
        for i, grad in enumerate(gradients):
            if on_device:
                muon.found_inf, muon.grad_scale = torch.tensor(float(i == 1)), torch.tensor(4.0)
            weight.grad = grad if on_device else grad / 4
            if on_device or i != 1:
                muon.step()
        ends.append((weight, muon.state[weight]["exp_avg"], muon.state[weight]["step"]))
    for device, host in zip(*ends, strict=True):
        torch.testing.assert_close(device, host, atol=1e-7, rtol=1e-6)


def test_a_matrix_goes_to_whom_holds_most_and_then_to_whom_has_least():
    four = [shares.Matrix(0, 2, 4), shares.Matrix(8, 2, 4), shares.Matrix(16, 4, 8), shares.Matrix(48, 2, 2)]
    halves = [shares._parts(four, [shares.Held(0, 14, 0, 3)]), shares._parts(four, [shares.Held(14, 38, 0, 0)])]
    assert [tuple(p) for p in halves[0]] == [(0, 0, 8, 0, 3), (1, 0, 6, 0, 11)]
    assert [tuple(p) for p in halves[1]] == [(1, 6, 2, 0, 0), (2, 0, 32, 0, 2), (3, 0, 4, 0, 34)]
    assert shares.owners(four, halves) == {0: 0, 1: 0, 2: 1, 3: 1}
    all_of_it = shares._parts(four, [shares.Held(0, 52, 0, 0)])
    assert shares.owners(four, [all_of_it, all_of_it]) == {2: 0, 0: 1, 1: 1, 3: 1}


# One process a rank: weights after three steps under each ZeRO stage, and how many matrices travelled in the last.
UNDER_ZERO = """
import json
import torch
import torch.distributed as dist
from minimind_fast.config import ModelConfig
from minimind_fast.model import MiniMind
from minimind_fast.training import ranks
from minimind_fast.training.config import TrainConfig
from minimind_fast.training.zero.engine import Engine
from minimind_fast.training.zero.options import deepspeed_config

ranks.prepare(1)
rank, size = ranks.world()
sent, swap = [], dist.all_to_all_single
def counted(into, out, *sizes):
    sent.append(out.numel())
    return swap(into, out, *sizes)
dist.all_to_all_single = counted
shape = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=61)
ids, cu = torch.arange(60), torch.tensor([0, 60], dtype=torch.int32)
for stage in range(4):
    torch.manual_seed(0)
    model = MiniMind(ModelConfig.preset("minimind2-moe", max_position_embeddings=64, **shape))
    config = TrainConfig(zero_stage=stage, dtype="float32", batch_size=1, accumulation_steps=1, optimizer="muon")
    engine = Engine(model, config, deepspeed_config(config, size))
    for step in range(3):
        sent.clear()
        out = engine(ids, targets=ids.roll(step), cu_seqlens=cu, max_seqlen=60)
        engine.backward(-out.logprobs.mean() + out.aux_loss)
        engine.step(1e-2)
    with engine.gathered():
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    total = torch.tensor([sum(sent)])
    dist.all_reduce(total)
    print(json.dumps([stage, weights[::13].tolist(), total.item()]))
ranks.leave()
"""


def test_ranks_and_zero_stages_agree_in_fp32():
    """On three ranks no partition ends where a matrix does. What travels is what the stage says."""
    one, three = start("-c", [UNDER_ZERO], 1), start("-c", [UNDER_ZERO], 3)
    alone, *together = (
        [json.loads(line) for line in out.splitlines() if line.startswith("[")]
        for out in [*finish_all(one), *finish_all(three)]
    )
    hidden = sum(p.numel() for p in matrices(small("minimind2-moe")))
    for stage, weights, sent in alone:
        assert weights == pytest.approx(alone[0][1], abs=1e-5) and sent == 0, stage
    for rank in together:
        for stage, weights, sent in rank:
            assert weights == pytest.approx(alone[0][1], abs=1e-5), stage
            # Each result to both others; what lies across a border, there and back; the same with borders everywhere.
            low, high = [(2, 2), (0.01, 0.2), (0.01, 0.2), (0.2, 1.4)][stage]
            assert low * hidden <= sent <= high * hidden, stage
        assert [stage for stage, *_ in rank] == [0, 1, 2, 3]


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_another_number_of_ranks_goes_on_as_if_nothing_had_happened(tmp_path, stage):
    """Momenta, AdamW's state and its counter: the steps after the resume are those of a run that was not interrupted."""

    def losses(folder):
        return {step: row["loss"] for step, row in read_log(folder / "pretrain").items() if "loss" in row}

    args = [*TINY, "--data_path", write_corpus(tmp_path / "train.jsonl", 400), "--optimizer", "muon", "--batch_size", 2]
    args += ["--dtype", "float32", "--learning_rate", 5e-3, "--lr_schedule", "constant", "--zero_stage", stage]
    whole = start("pretrain.py", [*args, "--max_steps", 4, "--accumulation_steps", 2, "--save_dir", tmp_path / "whole"])
    run("pretrain.py", [*args, "--max_steps", 2, "--accumulation_steps", 1, "--save_dir", tmp_path], ranks=2)
    finish(whole)
    resume = [*args, "--max_steps", 4, "--accumulation_steps", 2, "--save_dir", tmp_path, "--from_resume"]
    out = run("pretrain.py", [*resume, "--optimizer", "adamw"], expect=1)
    assert "holds the state of --optimizer muon, this run has adamw" in out
    assert "Going on from step 2" in run("pretrain.py", resume)
    assert losses(tmp_path) == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)


def test_adapters_are_refused_before_anything_is_loaded(tmp_path):
    out = run("lora.py", ["--optimizer", "muon", "--from_weight", "nowhere", "--save_dir", tmp_path], expect=2)
    assert "--optimizer muon trains whole matrices, and LoRA trains adapters" in out and "Traceback" not in out
    model = small("minimind3")
    for block in model.model.layers:
        block.requires_grad_(False)
    with pytest.raises(ValueError, match="--optimizer muon needs whole matrices"):
        Muon(model, 0.0, (0.9, 0.95), torch.float32, torch.device("cpu"))
