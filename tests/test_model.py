"""The model beyond MiniMind's golden answers: packing, padding, dropout, checkpointing, compile, dtypes."""

import pytest
import torch

import minimind_fast as mm
from minimind_fast.config import ModelConfig
from minimind_fast.model import MoE, rope_tables
from minimind_fast.ops.attention import leave_out_of_compilation, use
from minimind_fast.ops.cpu import attention as attention_rows

SHAPES = {
    "dense2": dict(generation=2),
    "dense3": dict(generation=3, head_dim=12),
    "untied": dict(generation=3, tie_word_embeddings=False),
    "moe2": dict(generation=2, use_moe=True),
    "moe3": dict(generation=3, use_moe=True, norm_topk_prob=False),
}


def tiny(name: str, **changes) -> mm.MiniMind:
    torch.manual_seed(0)
    size = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    return mm.MiniMind(ModelConfig(**{**size, "max_position_embeddings": 128, **SHAPES[name], **changes}))


def documents(lengths, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 97, (n,), generator=g) for n in lengths]


def pack(docs):
    ids = torch.cat([d[:-1] for d in docs])
    targets = torch.cat([d[1:] for d in docs])
    cu = torch.tensor([0, *(len(d) - 1 for d in docs)]).cumsum(0).to(torch.int32)
    return ids, targets, cu


@pytest.mark.parametrize("name", SHAPES)
def test_packed_equals_separate_rows(name):
    model = tiny(name).train()
    docs = documents([9, 30, 2, 17])
    ids, targets, cu = pack(docs)
    packed = model(ids, targets=targets, cu_seqlens=cu)
    packed.logprobs.sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    rows = [model(d[None, :-1], targets=d[None, 1:]) for d in docs]
    torch.testing.assert_close(torch.cat([r.logprobs[0] for r in rows]), packed.logprobs, atol=1e-5, rtol=0)
    torch.stack([r.logprobs.sum() for r in rows]).sum().backward()
    for n, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, grads[n], atol=1e-5, rtol=1e-5, msg=n)
    if name == "moe2":  # per document: the packed aux loss is the mean over documents
        torch.testing.assert_close(torch.stack([r.aux_loss for r in rows]).mean(), packed.aux_loss)


@pytest.mark.parametrize("name", SHAPES)
def test_one_document_changes_no_other(name):
    model = tiny(name).eval()
    docs = documents([9, 30, 17])
    changed = [docs[0], documents([30], seed=9)[0], docs[2]]
    with torch.no_grad():
        a, b = (model(i, targets=t, cu_seqlens=c).logprobs for i, t, c in (pack(docs), pack(changed)))
    same = [*range(8), *range(37, 53)]
    torch.testing.assert_close(a[same], b[same], atol=1e-6, rtol=0)
    assert not torch.allclose(a[8:37], b[8:37])


def test_targets_that_are_ignored_count_nothing():
    model = tiny("dense3")
    ids, targets, cu = pack(documents([9, 12]))
    targets[3:7] = mm.IGNORE_INDEX
    out = model(ids, targets=targets, cu_seqlens=cu)
    assert (out.logprobs[3:7] == 0).all() and (out.logprobs[:3] != 0).all()


def test_logprobs_are_the_softmax_of_the_logits():
    model = tiny("untied").eval()
    (doc,) = documents([20])
    logits = model(doc[None]).logits
    out = model(doc[None, :-1], targets=doc[None, 1:], temperature=0.7, return_entropy=True)
    p = (logits[0, :-1] / 0.7).log_softmax(-1)
    torch.testing.assert_close(out.logprobs[0], p.gather(-1, doc[1:, None])[:, 0])
    torch.testing.assert_close(out.entropy[0], -(p.exp() * p).sum(-1))


@pytest.mark.parametrize("name", ["dense2", "moe3"])
def test_gradient_checkpointing_changes_nothing(name):
    ids, targets, cu = pack(documents([9, 30]))
    results = []
    for on in (False, True):
        model = tiny(name, dropout=0.2).train()
        model.model.gradient_checkpointing = on
        torch.manual_seed(3)
        out = model(ids, targets=targets, cu_seqlens=cu)
        (out.logprobs.sum() + out.aux_loss).backward()
        results.append([out.logprobs, *(p.grad for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_compiled_layers_share_their_code_and_a_new_pack_needs_none(monkeypatch):
    """What --use_compile does on a CPU, where attention goes by rectangles that are new with each pack."""
    from torch._dynamo.testing import CompileCounter  # loads Triton

    monkeypatch.setattr(attention_rows, "attend_rows", attention_rows.attend_rows)  # so that it is put back
    leave_out_of_compilation("sdpa")
    model, counter = tiny("dense3", num_hidden_layers=12).train(), CompileCounter()
    torch._dynamo.reset()
    model.model.compile(dynamic=True, backend=counter)
    for lengths in ([5, 9], [30, 2], [7, 8, 9], [40], [11] * 5):
        ids, targets, cu = pack(documents([n + 1 for n in lengths]))
        model(ids, targets=targets, cu_seqlens=cu).logprobs.sum().backward()
        assert 0 < counter.frame_count < 12
    torch._dynamo.reset()


@pytest.mark.parametrize("whole", [False, True])
def test_a_compiled_model_is_one_graph(whole):
    """Nothing breaks it: neither the choice of a backend nor what is worked out of a pack's bounds."""
    torch._dynamo.reset()
    model = tiny("dense3").train()
    ids, targets, cu = pack(documents([10, 31]))
    with use("eager"):
        want = model(ids, targets, cu, 30).logprobs
        if whole:
            model.compile(backend="aot_eager", fullgraph=True)
        else:
            model.model.compile(backend="aot_eager", fullgraph=True, dynamic=True)
        got = model(ids, targets, cu, 30).logprobs
        got.sum().backward()
    torch._dynamo.reset()
    torch.testing.assert_close(got, want)


def test_dropout_only_when_training():
    model = tiny("dense2", dropout=0.5)
    ids, targets, cu = pack(documents([30]))
    a, b = (model.train()(ids, targets=targets, cu_seqlens=cu).logprobs for _ in range(2))
    assert not torch.equal(a, b)
    a, b = (model.eval()(ids, targets=targets, cu_seqlens=cu).logprobs for _ in range(2))
    assert torch.equal(a, b)


def test_rope_tables_stay_float32():
    model = tiny("dense3").to(torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.model.rotary.cos.dtype == torch.float32
    assert torch.equal(model.model.rotary.cos, rope_tables(model.config)[0])


def test_router_learns_from_the_language_model_only_in_the_mended_form():
    ids, targets, cu = pack(documents([40, 20]))
    norms = {}
    for normalised in (True, False):
        model = tiny("moe3", norm_topk_prob=normalised).train()
        (-model(ids, targets=targets, cu_seqlens=cu).logprobs.mean()).backward()
        norms[normalised] = sum(m.gate.weight.grad.norm().item() for m in model.modules() if isinstance(m, MoE))
    assert norms[True] < 1e-6 < 1e-4 < norms[False]


def test_padding_does_not_count_in_the_balance():
    model = tiny("moe3").train()
    (doc,) = documents([20])
    alone = model(doc[None]).aux_loss
    padded = torch.cat([doc, torch.zeros(12, dtype=torch.long)])[None]
    valid = torch.arange(32)[None] < 20
    torch.testing.assert_close(model(padded, valid=valid).aux_loss, alone)
    assert not torch.allclose(model(padded).aux_loss, alone)


def test_flops_of_minimind3_are_those_of_the_plan():
    model = mm.MiniMind(ModelConfig.preset("minimind3", max_position_embeddings=64))
    assert abs(model.flops(1, 0) / 1e6 - 383) < 1
    assert abs(model.flops(1, 298) / 1e6 - 405) < 1


def test_wrong_shapes_end_in_a_sentence():
    model = tiny("dense2")
    with pytest.raises(ValueError, match="with cu_seqlens"):
        model(torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match="exceeds max_position_embeddings"):
        model(torch.zeros(1, 129, dtype=torch.long))
    with pytest.raises(ValueError, match="must have input_ids' shape"):
        model(torch.zeros(1, 5, dtype=torch.long), targets=torch.zeros(1, 4, dtype=torch.long))
