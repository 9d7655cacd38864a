"""Flash attention on GPUs that are not here: each release's signature, and which one a GPU gets."""

import importlib
import inspect
import sys
import types

import flash_signatures as recorded
import pytest
import torch

import minimind_fast as mm
from minimind_fast.ops import flash, precision
from minimind_fast.ops.attention import attention, resolve

RELEASES = {
    "flash_attn": recorded.flash_attn_2,
    "flash_attn_interface": recorded.flash_attn_3,
    "flash_attn.cute": recorded.flash_attn_4,
}
CARDS = {"A100": (8, 0), "RTX 3090": (8, 6), "RTX 4090": (8, 9), "H200": (9, 0), "B200": (10, 0), "RTX 5090": (12, 0)}


def packed(kv_heads=2):
    torch.manual_seed(0)
    q, k, v = (torch.randn(12, n, 8, requires_grad=True) for n in (4, kv_heads, kv_heads))
    return q, k, v, torch.tensor([0, 5, 12], dtype=torch.int32)


@pytest.fixture
def card(monkeypatch):
    """Make attention believe in a GPU and in installed packages; on the CPU's tensors only the choice is a GPU's."""
    attention_module = sys.modules[attention.__module__]  # `ops.attention` is the function

    def become(capability, *packages):
        for module in ("flash_attn", "flash_attn.cute", "flash_attn_interface"):
            there = types.ModuleType(module)
            if module in packages:
                there.flash_attn_varlen_func = RELEASES[module]
            monkeypatch.setitem(sys.modules, module, there if packages else None)
        monkeypatch.setattr(precision, "_card", {"capability": capability})
        monkeypatch.setattr(flash, "_imported", {})
        monkeypatch.setattr(attention_module, "_dao", {})
        monkeypatch.setattr(attention_module, "_chosen", {})

    return become


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("module", RELEASES)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_each_generation_gets_its_arguments_where_it_expects_them(module, kv_heads):
    q, k, v, cu = packed(kv_heads)
    generation = next(g for g in flash.GENERATIONS if g.module == module)
    out = flash.call(generation, RELEASES[module])(q, k, v, cu, 7, 0.0)
    assert torch.equal(out, attention(q, k, v, cu, 7, "eager"))
    assert recorded.calls[-1]["deterministic"] is False


@pytest.mark.parametrize("release", [recorded.torch_2_11, recorded.torch_2_13])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_pytorch_s_own_gets_its_arguments_where_it_expects_them(release, kv_heads):
    q, k, v, cu = packed(kv_heads)
    out = flash.call_torch(release)(q, k, v, cu, 7, 0.0)
    assert torch.equal(out, attention(q, k, v, cu, 7, "eager"))


def test_the_installed_pytorch_has_a_recorded_signature():
    """An upgrade that moves a parameter shows here, not on a GPU."""
    varlen = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    known = [list(inspect.signature(release).parameters) for release in (recorded.torch_2_11, recorded.torch_2_13)]
    assert list(inspect.signature(varlen).parameters) in known


@pytest.mark.parametrize(
    ("name", "installed", "chosen", "why"),
    [
        ("H200", ("flash_attn.cute", "flash_attn_interface", "flash_attn"), "flash_attn_interface", ""),
        ("H200", ("flash_attn.cute", "flash_attn"), "flash_attn.cute", ""),
        ("B200", ("flash_attn.cute", "flash_attn_interface"), "flash_attn.cute", "flash_attn_interface does not train"),
        ("A100", ("flash_attn.cute", "flash_attn"), "flash_attn", "cute does not train on compute capability 8.0"),
        ("RTX 3090", ("flash_attn.cute", "flash_attn"), "flash_attn", "capability 8.6"),
        ("RTX 4090", ("flash_attn.cute",), None, "flash_attn.cute does not train on compute capability 8.9"),
        ("RTX 5090", ("flash_attn.cute", "flash_attn"), "flash_attn.cute", ""),
        ("RTX 4090", ("flash_attn",), "flash_attn", ""),
        ("RTX 4090", (), None, "flash-attn is not installed"),
    ],
)  # fmt: skip
def test_a_gpu_gets_a_generation_that_trains_on_it(card, name, installed, chosen, why):
    card(CARDS[name], *installed)
    backend, reason = resolve("auto", "cuda")
    assert backend == ("torch_varlen" if chosen is None else "flash_attn") and why in reason
    assert chosen is None or f"{chosen} is installed" in reason
    if chosen is None:
        with pytest.raises(ValueError, match="--attention flash_attn: .*pip install flash-attn"):
            resolve("flash_attn", "cuda")
    else:
        q, k, v, cu = packed()
        assert attention(q, k, v, cu, 7, "eager").equal(flash.best(CARDS[name])[0](q, k, v, cu, 7, 0.0))


def test_determinism_is_asked_of_every_generation_and_decides_among_them(card, deterministic):
    q, k, v, cu = packed()
    for name, expected in (("H200", "flash_attn.cute"), ("RTX 5090", "flash_attn")):
        card(CARDS[name], "flash_attn.cute", "flash_attn")
        attend, why = flash.best(CARDS[name])
        assert f"{expected} is installed" in why
        attend(q, k, v, cu, 7, 0.0)
        assert recorded.calls[-1]["deterministic"] is True
    assert "flash_attn.cute cannot repeat its sums on this GPU" in why


def test_dropout_reaches_the_one_that_has_it():
    q, k, v, cu = packed()
    for generation in flash.GENERATIONS:
        attend = flash.call(generation, RELEASES[generation.module])
        if generation.dropout:
            attend(q, k, v, cu, 7, 0.1)
            assert recorded.calls[-1]["dropout_p"] == 0.1
        else:
            with pytest.raises(ValueError, match="has no dropout"):
                attend(q, k, v, cu, 7, 0.1)
    with pytest.raises(ValueError, match="has no dropout"):
        flash.call_torch(recorded.torch_2_13)(q, k, v, cu, 7, 0.1)


class Traced(Exception):
    """Dynamo has compiled the whole model; running it would need the GPU."""


@pytest.mark.parametrize("installed", [(), ("flash_attn",), ("flash_attn_interface",)], ids=["torch", "2", "3"])
def test_a_compiled_model_is_one_graph_with_a_gpu_s_attention(card, monkeypatch, installed):
    """What --use_compile does on a GPU, on the CPU's tensors: nothing in the choice or in the call breaks the graph."""
    card(CARDS["H200"], *installed)
    module = sys.modules[attention.__module__]
    monkeypatch.setattr(module, "resolve", lambda backend, *_: resolve(backend, "cuda"))
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)

        def run(*_):
            raise Traced

        return run

    config = mm.ModelConfig.preset(
        "minimind3", hidden_size=32, num_hidden_layers=2, vocab_size=64, intermediate_size=64
    )
    model, ids = mm.MiniMind(config).train(), torch.arange(12)
    torch._dynamo.reset()
    model.model.compile(dynamic=True, backend=backend, fullgraph=True)
    with pytest.raises(Traced):
        model(ids, targets=ids, cu_seqlens=torch.tensor([0, 5, 12], dtype=torch.int32), max_seqlen=7)
    torch._dynamo.reset()
    (graph,) = graphs
    mark = "searchsorted" if installed else "varlen_attn"  # the stand-ins are traced into
    assert sum(mark in str(node.target) for node in graph.graph.nodes) == config.num_hidden_layers


def test_a_generation_that_cannot_be_traced_is_left_out_of_the_graph(card):
    """`flash_attn.cute` compiles kernels of its own in its call: a break a layer, and no attempt to trace it."""
    card(CARDS["H200"], "flash_attn.cute")
    attend, _ = flash.best(CARDS["H200"])
    q, k, v, cu = packed()
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: attend(x * 2, k, v, cu, 7, 0.0) * 3, backend=count)
    torch.testing.assert_close(compiled(q), attend(q * 2, k, v, cu, 7, 0.0) * 3)
    torch._dynamo.reset()
    assert len(graphs) == 2
