"""Packs with filler: the same numbers as without, and memory that does not grow with every new length."""

import ctypes

import pytest
import torch
from halves import needs_bf16
from stand_ins import Engine

import minimind_fast as mm
from minimind_fast.data import samples
from minimind_fast.data.batches import Batch
from minimind_fast.data.pairs import PairBatch
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.infer.decode import Decoder
from minimind_fast.infer.score import score
from minimind_fast.model import Teacher
from minimind_fast.ops import documents
from minimind_fast.ops.cpu import shapes as cpu_shapes
from minimind_fast.ops.documents import round_up, run, size_for
from minimind_fast.rl.preferences import answer_logprobs
from minimind_fast.rl.rewards import Rewards
from minimind_fast.rl.rollout import Prompt, Rollouts
from minimind_fast.training import setup as stage

SHAPE = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=6400)


def make(preset, dtype=torch.bfloat16):
    torch.manual_seed(0)
    return mm.MiniMind(mm.ModelConfig.preset(preset, **SHAPE)).to(dtype)


def pack(lengths):
    torch.manual_seed(1)
    ids = torch.randint(3, 6400, (sum(lengths),))
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return ids, ids.roll(-1), cu


def test_sizes_are_few_and_little_is_added():
    sizes = {n: round_up(n) for n in range(1, 4097)}
    assert all(n <= m == round_up(m) for n, m in sizes.items())
    assert all(m - n <= max(15, n / 16) for n, m in sizes.items())
    assert len({m for n, m in sizes.items() if 1024 < n <= 2048}) == 16


@pytest.mark.parametrize(("size", "largest"), [(0, 4), (1, 1), (7, 4), (23, 1000), (64, 21)])
def test_pieces_cover_all_once_in_powers_of_two(size, largest):
    found = list(cpu_shapes.pieces(size, largest))
    assert [i for s in found for i in range(s.start, s.stop)] == list(range(size))
    assert all((n := s.stop - s.start) <= largest and n & (n - 1) == 0 for s in found)


@pytest.mark.parametrize("preset", ["minimind2", "minimind3"])
@pytest.mark.parametrize("lengths", [[5, 30, 2], [3] * 11])
def test_a_filled_pack_gives_what_the_pack_gives(monkeypatch, preset, lengths):
    ids, targets, cu = pack(lengths)
    assert round_up(len(ids)) > len(ids)
    teacher = Teacher(torch.randn(len(ids), 64).bfloat16(), torch.randn(6400, 64).bfloat16())

    def results():
        model, batch = make(preset), Batch(ids, targets, cu, max(lengths), len(ids), len(lengths))
        seen = []
        model.model.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
        out = run(model, batch, targets=targets, return_entropy=True, return_hidden=True, teacher=teacher)
        (out.logprobs.sum() + out.kl.sum() + out.aux_loss).backward()
        head = run(model, batch, targets=targets, grad_weights=torch.ones(len(ids)))
        return seen, [*out[1:], run(model, batch).logits, head.logprobs, model.model.embed_tokens.weight.grad]

    sizes, filled = results()
    assert sizes == [round_up(len(ids))] * 3
    monkeypatch.setattr(documents, "compiled", lambda *_: False)
    sizes, plain = results()
    assert sizes == [len(ids)] * 3
    for got, want in zip(filled, plain, strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got, want)  # bf16: a matmul with more rows may round differently


@pytest.mark.parametrize("kind", ["next token", "pairs", "score", "rollout"])
def test_whoever_passes_a_pack_through_a_model_fills_it(kind):
    model = make("minimind3")
    ids, targets, cu = pack([5, 30, 2, 4])
    seen = []
    model.model.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
    batch = PairBatch(ids, targets, cu, 30, len(ids), 4, pairs=torch.arange(2), factor=0.1)
    if kind == "next token":
        stage.next_token_loss(Engine(model), batch)
    elif kind == "pairs":
        answer_logprobs(Engine(model), batch)
    elif kind == "score":
        score(model, [(ids[:30].tolist(), ids[30:].tolist())])
    else:
        prompts = [Prompt({}, ["", ""], [[5, 6]] * 2)]
        tokenizer = Tokenizer.load(samples.path("tokenizer"))
        how = dict(batch_size=1, generations=2, max_new_tokens=6, seed=3)
        Rollouts(prompts, tokenizer, Rewards(["length"]), **how).run(model, batch)
    assert seen == [48], "41 or 40 tokens are brought to 48"


def test_only_16_bit_weights_of_a_dense_model_on_a_cpu_ask_for_filler():
    half = make("minimind3", torch.float16)
    assert size_for(half, 17) == 32 == size_for(half, 32) == size_for(make("minimind3"), 17)
    for other in (make("minimind3-moe"), make("minimind3", torch.float32), half.to("meta")):
        assert size_for(other, 17) == 17


def test_a_filled_prefill_leaves_the_same_cache(monkeypatch):
    model = make("minimind3").eval()
    prompts = [list(range(3, 3 + n)) for n in (9, 4, 20)]

    def results():
        decoder = Decoder(model, 3, 24)
        logits = decoder.prefill(prompts)
        return logits, decoder.cache.clone(), decoder.step(logits.argmax(-1))

    filled = results()
    monkeypatch.setattr(documents, "compiled", lambda *_: False)
    for got, want in zip(filled, results(), strict=True):
        torch.testing.assert_close(got, want)


def used_mib():
    """Memory that this process holds from malloc."""

    class Info(ctypes.Structure):
        _fields_ = [(f"field{i}", ctypes.c_size_t) for i in range(10)]

    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("this C library has no mallinfo2")
    libc.mallinfo2.restype = Info
    info = libc.mallinfo2()
    return (info.field4 + info.field7) / 2**20  # mapped blocks, and the heap's


@needs_bf16
def test_grpo_takes_no_more_memory_from_step_to_step():
    """The number of tokens differs from step to step; oneDNN kept 0.5 MiB for each new matmul shape: 10 MiB a step."""
    model = make("minimind3").train()
    tokenizer = Tokenizer.load(samples.path("tokenizer"))
    prompts = [Prompt({}, ["", ""], [list(range(9, 269 + n))] * 2) for n in range(12)]
    rewards = Rewards(["length"])
    data = Rollouts(prompts, tokenizer, rewards, batch_size=1, generations=2, max_new_tokens=6, seed=3)
    data.written_by(Engine(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    used, lengths = [], set()
    for batch in data:
        assert batch.weights is not None and batch.advantages is not None
        logprobs, _ = data.run(model, batch)
        (-logprobs * batch.weights * batch.advantages).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        lengths.add(batch.input_ids.numel())
        used.append(used_mib())
    assert len(used) == 12 and len(lengths) > 9 and len(set(map(round_up, lengths))) == 2
    assert used[-1] - used[2] < 25, used  # one of the two sizes may first occur late
