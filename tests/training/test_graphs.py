"""--cuda_graphs: replays agree with eager passes. Without a GPU, rerunning stands in for replaying."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launching import run as run_script
from torch.utils._python_dispatch import TorchDispatchMode

import minimind_fast as mm
from minimind_fast.data.batches import Batch
from minimind_fast.model import MoE, Teacher
from minimind_fast.ops.attention import use as use_attention
from minimind_fast.ops.documents import run
from minimind_fast.proof.rule import NORM_FACTOR, compare
from minimind_fast.training import graphs
from minimind_fast.training.config import TrainConfig

SHAPE = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=512)
PRESETS = ["minimind2", "minimind3", "minimind2-moe", "minimind3-moe"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Again:
    """Stands in for a captured graph: reruns the function and writes its results to the captured addresses."""

    def __init__(self, work):
        self.work, self.me, self.made = work, work.__self__, "grads" if "backward" in work.__name__ else "outputs"
        self.layers = [m for m in self.me.model.modules() if isinstance(m, MoE)]
        work()
        self.fixed = getattr(self.me, self.made)
        self.loads = [(m.last_counts, m.last_scores) for m in self.layers]

    def __call__(self):
        captured, before = self.me.outputs, [(m.last_counts, m.last_scores) for m in self.layers]
        if self.made == "grads":
            self.me.outputs = self.me.alive
        self.work()
        if self.made == "outputs":
            self.me.alive = self.me.outputs
        now = [*getattr(self.me, self.made), *(x for m in self.layers for x in (m.last_counts, m.last_scores))]
        for a, b in zip([*self.fixed, *(x for pair in self.loads for x in pair)], now, strict=True):
            if a is not None and b is not None:
                a.detach().copy_(b.detach())
        for m, (counts, scores) in zip(self.layers, before, strict=True):
            m.last_counts, m.last_scores = counts, scores
        self.me.outputs = captured
        setattr(self.me, self.made, self.fixed)


def stand_for_cuda(patch):
    """Make capturing work without a GPU."""
    none = SimpleNamespace(wait_stream=lambda _: None)
    for name, fake in {
        "Stream": lambda: none,
        "current_stream": lambda: none,
        "stream": lambda _: nullcontext(),
    }.items():
        patch.setattr(torch.cuda, name, fake)
    patch.setattr(torch.cuda, "graph_pool_handle", object)
    captures = []

    def capture(work, pool):
        captures.append(pool)
        return Again(work)

    patch.setattr(graphs, "capture", capture)
    patch.setattr(graphs, "can_capture", lambda model: True)
    return captures


@pytest.fixture(autouse=True)
def eager_attention():
    with use_attention("eager"):
        yield


@pytest.fixture
def captures(monkeypatch):
    return stand_for_cuda(monkeypatch)


def make(preset, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    return mm.MiniMind(mm.ModelConfig.preset(preset, **SHAPE, **changes)).to(DEVICE, dtype).train()


def pack(lengths, seed=0):
    draw = torch.Generator().manual_seed(seed)
    ids, targets = (torch.randint(3, 512, (sum(lengths),), generator=draw) for _ in "it")
    targets[::5] = mm.IGNORE_INDEX
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return {"input_ids": ids.to(DEVICE), "targets": targets.to(DEVICE), "cu_seqlens": cu.to(DEVICE)} | {
        "max_seqlen": max(lengths)
    }


def learn(model, how):
    """Outputs and gradients of one pass."""
    model.zero_grad()
    out = model(**how)
    loss = sum(getattr(out, name).sum() for name in ("logprobs", "kl") if getattr(out, name) is not None)
    (-loss / 7 + out.aux_loss).backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got, wanted, rtol=1e-5):
    for name in wanted[0]._fields:
        a, b = getattr(got[0], name), getattr(wanted[0], name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.shape == b.shape and a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=rtol, atol=rtol, msg=lambda text, name=name: f"{name}: {text}")
    assert got[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        assert (got[1][name] - gradient).norm() <= rtol * gradient.norm(), name


@pytest.mark.parametrize("preset", PRESETS)
def test_a_replay_gives_what_a_plain_pass_gives(preset, captures):
    plain, model = make(preset), make(preset)
    graphs.install(model)
    # All are padded to 416 positions and 32 documents.
    for seed, lengths in enumerate([[200, 216], [200, 209], [30] * 13 + [20], [1, 1, 249, 160], [240, 175]]):
        how = pack(lengths, seed)
        assert_same(learn(model, how), learn(plain, how))
    assert len(captures) == 2  # forward and backward, once: the first pack ran eagerly
    learn(model, pack([30]))  # runs eagerly: the log's expert load must be this pack's
    learn(model, pack([240, 175], 4))
    for m in (m for m in model.modules() if isinstance(m, MoE)):
        assert int(m.last_counts.sum()) == 416 * plain.config.num_experts_per_tok


def test_what_a_stage_may_ask_for_is_replayed_too(captures):
    plain, model = make("minimind3"), make("minimind3")
    graphs.install(model)
    draw = torch.Generator().manual_seed(1)
    for i, lengths in enumerate([[40, 60], [35, 61], [90, 4]]):
        n = sum(lengths)
        hidden, weight = (torch.randn(rows, 48, generator=draw).to(DEVICE) for rows in (n, 512))
        kept = weight if i == 0 else kept  # noqa: F821
        weights = torch.rand(n, generator=draw).to(DEVICE)
        for extra in (
            {"grad_weights": torch.full((n,), 0.5, device=DEVICE)},
            {"return_entropy": True, "temperature": 0.7},
            {"return_hidden": True, "valid": weights > 0.5},
            {"teacher": Teacher(hidden, kept, 2.0, True)},
        ):
            how = pack(lengths, i) | extra
            assert_same(learn(model, how), learn(plain, how))
    assert len(captures) == 2 * 4


@pytest.mark.parametrize("lengths", [[3, 4], [40, 60]])
def test_a_batch_that_is_run_is_replayed_too(lengths, captures):
    """`run` passes Documents; a pack of 7 tokens gets more filler than its own length."""
    plain, model = make("minimind3-moe"), make("minimind3-moe")
    graphs.install(model)
    for seed in range(3):
        how = pack(lengths, seed)
        batch = Batch(how["input_ids"], how["targets"], how["cu_seqlens"], max(lengths), sum(lengths), 2)
        got, want = (run(net, batch, targets=batch.targets).logprobs for net in (model, plain))
        torch.testing.assert_close(got, want)
        got.sum().backward()
        assert torch.equal(batch.input_ids, how["input_ids"])
    assert len(captures) == 2


def test_a_replay_never_writes_into_a_batch(captures):
    """64 tokens need no filler, but the first such batch must not become the graph's buffer."""
    model = make("minimind3")
    graphs.install(model)
    hows = [pack([30, 34], seed) for seed in range(3)]
    before = [how["input_ids"].clone() for how in hows]
    for how in hows:
        learn(model, how)
    assert captures and all(torch.equal(how["input_ids"], ids) for how, ids in zip(hows, before, strict=True))


def test_gradients_add_up_over_micro_batches(captures):
    plain, model = make("minimind3"), make("minimind3")
    graphs.install(model)
    kept = []
    for net in (plain, model):
        outs = []
        for seed in range(4):
            outs.append(net(**pack([40, 50], seed)).logprobs)
            outs[-1].sum().neg().backward()
        kept.append(torch.stack(outs))
    assert captures
    torch.testing.assert_close(*kept)  # a replay does not overwrite an earlier one's outputs
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-5 * b.grad.norm()


def test_frozen_weights_get_no_gradient(captures):
    model = make("minimind3")
    model.model.layers.requires_grad_(False)
    graphs.install(model)
    for seed in range(3):
        gradients = learn(model, pack([40, 50], seed))[1]
    assert captures and set(gradients) == {"model.embed_tokens.weight", "model.norm.weight"}
    assert [len(g.grads) for g in model.forward.graphs.values()] == [2]


def test_only_passes_that_learn_from_packs_are_captured(captures):
    model = make("minimind3")
    graphs.install(model)
    how = pack([40, 50])
    for _ in range(3):
        with torch.no_grad():
            model(**how)
        model.eval()(**how)
        model.train()
        model(how["input_ids"].view(2, -1), how["targets"].view(2, -1)).logprobs.sum().backward()
        model(how["input_ids"], cu_seqlens=how["cu_seqlens"])
    assert not captures
    with pytest.raises(ValueError, match="exceeds max_position_embeddings"):
        model(**how | {"max_seqlen": 40000})


def test_few_graphs_for_many_packs(captures, monkeypatch):
    model = make("minimind2")
    graphs.install(model)
    draw = torch.Generator().manual_seed(0)
    for _ in range(60):
        lengths = torch.randint(1, 30, (int(torch.randint(8, 20, (1,), generator=draw)),), generator=draw)
        learn(model, pack(lengths.tolist()))
    assert 2 <= len(captures) <= 2 * 14
    monkeypatch.setattr(graphs, "MAX_GRAPHS", len(captures) // 2)
    for _ in range(2):
        learn(model, pack([300]))
    assert len(captures) // 2 == graphs.MAX_GRAPHS
    assert len(set(captures)) == 1  # one pool


def test_weights_that_moved_are_captured_again(captures):
    plain, model = make("minimind3"), make("minimind3")
    graphs.install(model)
    for _ in range(2):
        learn(model, pack([40, 50]))
    for net in (plain, model):
        for p in net.parameters():
            p.data = p.data * 1.5
    assert_same(learn(model, pack([40, 50])), learn(plain, pack([40, 50])))
    assert len(captures) == 4


def test_a_second_forward_before_the_backward_is_an_error(captures):
    model = make("minimind3")
    graphs.install(model)
    for _ in range(2):
        learn(model, pack([40, 50]))
    first, second = (model(**pack([40, 50], seed)).logprobs.sum() for seed in (1, 2))
    second.backward()
    with pytest.raises(RuntimeError, match="--cuda_graphs"):
        first.backward()


class _NoHost(TorchDispatchMode):
    """Rejects operators that wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select"), name
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("preset", ["minimind2", "minimind3"])
def test_what_is_captured_asks_the_host_for_nothing(preset, monkeypatch):
    stand_for_cuda(monkeypatch)

    def watched(work, pool):
        with _NoHost():
            work()
        return work

    monkeypatch.setattr(graphs, "capture", watched)
    model = make(preset)
    graphs.install(model)
    with mm.ops.use("none"):
        for _ in range(2):
            learn(model, pack([40, 50]) | {"grad_weights": torch.ones(90, device=DEVICE)})
    with pytest.raises(AssertionError, match="_local_scalar_dense"), _NoHost():
        int(torch.ones(1))


@pytest.mark.parametrize(
    "changes, attention, need",
    [
        ({}, "flash_attn", "a GPU"),
        ({"zero_stage": 3}, "flash_attn", "--zero_stage 0, 1 or 2"),
        ({"packing": False}, "flash_attn", "packed data"),
        ({"use_compile": True}, "flash_attn", "without --use_compile"),
        ({"gradient_checkpointing": True}, "flash_attn", "without --gradient_checkpointing"),
        ({}, "sdpa", "--attention flash_attn or torch_varlen"),
    ],
)
def test_what_cannot_be_captured_is_refused_by_name(changes, attention, need):
    config = TrainConfig(cuda_graphs=True, **({"zero_stage": 1} | changes))
    device = torch.device("cpu" if need == "a GPU" else "cuda")
    with pytest.raises(ValueError, match=f"--cuda_graphs needs .*{need}"):
        graphs.check(config, make("minimind3"), device, attention)


def test_a_mixture_needs_both_its_kernels(monkeypatch):
    monkeypatch.setattr("minimind_fast.ops.kernel", lambda name: None)  # Triton stays out of this process
    config, mixture = TrainConfig(cuda_graphs=True, zero_stage=1), make("minimind3-moe")
    how = (config, mixture, torch.device("cuda"), "flash_attn")
    with mm.ops.use("all"):
        graphs.check(*how)
    with mm.ops.use("moe_mlp"), pytest.raises(ValueError, match="moe_route and moe_mlp"):
        graphs.check(*how)


# In its own process, because it becomes a rank: three steps of two micro-batches at each (ZeRO stage, dtype), eager and
# replayed, on packs without filler; are the weights bitwise equal?
UNDER_ENGINE = """
import json, sys
sys.path.insert(0, sys.argv[2])
import pytest, torch
from minimind_fast.data.batches import Batch
from minimind_fast.ops.attention import use
from minimind_fast.training import graphs, ranks, setup
from minimind_fast.training.config import TrainConfig
from minimind_fast.training.zero.engine import Engine
from minimind_fast.training.zero.options import deepspeed_config
from test_graphs import make, pack, stand_for_cuda

ranks.prepare(1)
use("eager")
captures = stand_for_cuda(pytest.MonkeyPatch())
for zero, dtype in json.loads(sys.argv[1]):
    weights = []
    for graphed in (False, True):
        captures.clear()
        model = make("minimind3", getattr(torch, dtype))
        model.float()
        config = TrainConfig(zero_stage=zero, dtype=dtype, batch_size=1, accumulation_steps=2)
        engine = Engine(model, config, deepspeed_config(config, 1))
        if graphed:
            graphs.install(model)
        for step in range(3):
            for i in range(2):
                how = pack([100, 60, 96], 2 * step + i)
                batch = Batch(how["input_ids"], how["targets"], how["cu_seqlens"], 100, 200, 3, factor=1 / 300)
                out = setup.next_token_loss(engine, batch)
                engine.backward(out.total * batch.factor, last=i == 1)
            engine.step(1e-2)
        weights.append(torch.cat([p.detach().float().flatten() for p in model.parameters()]))
    print(json.dumps([torch.equal(*weights), len(captures), (weights[0] - weights[1]).abs().max().item()]))
"""
STAGES = [(0, "float32"), (1, "float32"), (2, "float32"), (0, "bfloat16"), (1, "bfloat16"), (2, "bfloat16")]


def test_under_deepspeed_a_run_of_replays_ends_with_the_same_weights():
    said = run_script("-c", [UNDER_ENGINE, json.dumps(STAGES), Path(__file__).parent])
    found = [json.loads(line) for line in said.splitlines() if line.startswith("[")]
    assert [f[:2] for f in found] == [[True, 2]] * len(STAGES), found


@pytest.mark.gpu
@pytest.mark.parametrize("preset", PRESETS)
def test_on_a_gpu(preset):
    """The truth is float32 without kernels; a replay is no further from it than an eager pass in bf16."""
    truth, plain, model = make(preset), make(preset, torch.bfloat16), make(preset, torch.bfloat16)
    graphs.install(model)
    for seed, lengths in enumerate([[200, 216], [200, 209], [30] * 13 + [20], [1, 1, 249, 160], [240, 175]]):
        how = pack(lengths, seed)
        with use_attention("auto"):
            got, wanted = learn(model, how), learn(plain, how)
        with mm.ops.use("none"):
            exact = learn(truth, how)
        pairs = [(got[0].logprobs, wanted[0].logprobs, exact[0].logprobs)]
        if not truth.config.use_moe:  # in a mixture, rounding decides near ties and so the gradients
            pairs += [(got[1][n], wanted[1][n], exact[1][n]) for n in exact[1]]
        for a, b, c in pairs:
            result = compare(a, b, c.double(), norm_factor=NORM_FACTOR + 3 * a.numel() ** -0.5)
            assert result.passed, result.reason
    assert len(model.forward.graphs) == 1
