"""Generation: equal to the model without a cache, token by token; sampling against a plain oracle; streams of text."""

import functools
import gc
import math
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from stand_ins import UNORDERED, Operators

import minimind_fast as mm
from minimind_fast.infer import decode
from minimind_fast.infer.decode import Decoder, GraphStep, PlainStep, can_capture, new_cache
from minimind_fast.infer.generate import Stream, complete, generate, generate_batch, stream
from minimind_fast.infer.sampling import Noise, Sampling, choose, keep_likely, penalize, row_seed

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(p.name for p in GOLDEN.iterdir())
LENGTHS = (8, 3, 17, 1)


@pytest.fixture(params=CASES)
def case(request):
    return mm.load_pretrained(GOLDEN / request.param), load_file(GOLDEN / request.param / "golden.safetensors")


def ragged(golden):
    ids = golden["input_ids"]
    return [ids[i % 3, :n].tolist() for i, n in enumerate(LENGTHS)]


@torch.no_grad()
def no_cache(model, prompt, new):
    ids = torch.tensor([prompt])
    for _ in range(new):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids[0, len(prompt) :].tolist()


# --------------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("chunk", [None, 1, 3, 8])
def test_greedy_is_minimind_s_own(case, chunk):
    model, golden = case
    ids = model.generate(golden["input_ids"][:1, :8], max_new_tokens=16, stop_ids=(), prefill_chunk=chunk)
    assert torch.equal(ids, golden["greedy_ids"])


@pytest.mark.parametrize("chunk", [None, 4])
def test_rows_of_any_lengths_are_as_alone_and_as_without_a_cache(case, chunk):
    model, golden = case
    prompts = ragged(golden)
    outs = generate_batch(model, prompts, max_new_tokens=12, stop_ids=(), prefill_chunk=chunk)
    assert outs == [no_cache(model, p, 12) for p in prompts]


def test_sampled_rows_are_as_alone(case):
    model, golden = case
    prompts = ragged(golden)
    options = {"max_new_tokens": 24, "temperature": 1.0, "top_p": 0.95, "repetition_penalty": 1.1, "stop_ids": ()}
    outs = generate_batch(model, prompts, seed=11, **options)
    alone = [generate_batch(model, [p], seed=row_seed(11, r), **options)[0] for r, p in enumerate(prompts)]
    assert outs == alone
    assert outs == generate_batch(model, prompts, seed=[row_seed(11, r) for r in range(4)], **options)
    assert outs != generate_batch(model, prompts, seed=12, **options)


def test_equal_prompts_in_a_batch_get_noise_of_their_own(case):
    model, golden = case
    prompt = golden["input_ids"][0, :4].tolist()
    outs = generate_batch(model, [prompt] * 3, max_new_tokens=20, temperature=1.5, seed=0, stop_ids=())
    assert len({tuple(o) for o in outs}) == 3


def test_without_a_seed_every_draw_is_new_and_torch_s_generator_stays(case):
    model, golden = case
    prompt = golden["input_ids"][:1, :4]
    before = torch.get_rng_state()
    outs = {tuple(generate(model, prompt, max_new_tokens=20, temperature=2.0, stop_ids=())[0].tolist()) for _ in "ab"}
    assert len(outs) == 2
    assert torch.equal(before, torch.get_rng_state())


def test_rows_that_stop_leave_the_batch_and_the_others_go_on_unchanged(case):
    model, golden = case
    prompts = [golden["input_ids"][i, :n].tolist() for i in range(3) for n in (3, 6, 9, 12)]
    free = generate_batch(model, prompts, max_new_tokens=20, temperature=1.5, seed=1, stop_ids=())
    stops = {row[step] for row, step in zip(free[:6], (0, 2, 4, 7, 11, 15), strict=True)}
    done = complete(model, prompts, Sampling(1.5), max_new_tokens=20, seed=1, stop_ids=tuple(stops))
    ends = []
    for row, c in zip(free, done, strict=True):
        first = next((i for i, t in enumerate(row) if t in stops), None)
        assert c.ids == (row if first is None else row[: first + 1])
        assert c.finish_reason == ("length" if first is None else "stop")
        ends.append(first)
    assert len(set(ends)) > 3  # they did stop at different steps


def test_the_penalty_knows_the_prompt_and_what_was_said_also_after_a_row_has_left(case):
    model, golden = case
    prompts, s, new, wanted = ragged(golden), Sampling(repetition_penalty=1.3), 20, []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(new):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[:, -1]
            seen = torch.zeros_like(logits, dtype=torch.bool)
            seen[0, ids] = True
            ids.append(penalize(logits, seen, s.repetition_penalty).argmax().item())
        wanted.append(ids[len(prompt) :])
    assert generate_batch(model, prompts, max_new_tokens=new, stop_ids=(), repetition_penalty=1.3) == wanted
    assert wanted != [no_cache(model, p, new) for p in prompts]
    stop = wanted[0][2]
    cut = [w[: w.index(stop) + 1] if stop in w else w for w in wanted]
    assert generate_batch(model, prompts, max_new_tokens=new, stop_ids=(stop,), repetition_penalty=1.3) == cut


def test_ragged_tensor_and_padding(case):
    model, golden = case
    prompts = ragged(golden)
    width = max(LENGTHS)
    ids = torch.tensor([p + [5] * (width - len(p)) for p in prompts])
    free = generate_batch(model, prompts, max_new_tokens=6, stop_ids=())
    stop = free[1][2]
    done = complete(model, prompts, max_new_tokens=6, stop_ids=[stop])
    out = generate(model, ids, lengths=torch.tensor(LENGTHS), max_new_tokens=6, stop_ids=[stop])
    longest = max(len(p) + len(c.ids) for p, c in zip(prompts, done, strict=True))
    assert out.shape == (4, longest) and out.dtype == torch.int64
    for row, p, c in zip(out.tolist(), prompts, done, strict=True):
        assert row == p + c.ids + [model.config.pad_token_id] * (longest - len(p) - len(c.ids))


def test_eos_stops_by_default(case):
    model, golden = case
    prompt = golden["input_ids"][0, :5].tolist()
    model.config.eos_token_id = no_cache(model, prompt, 4)[3]
    out = generate_batch(model, [prompt], max_new_tokens=50)[0]
    assert out[-1] == model.config.eos_token_id and model.config.eos_token_id not in out[:-1] and len(out) <= 4


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.3])
def test_logprobs_are_the_model_s(case, temperature):
    model, golden = case
    ids = golden["input_ids"][:, :9]
    options = {"temperature": temperature, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.2, "seed": 3}
    out, logprobs = generate(model, ids, max_new_tokens=10, stop_ids=(), return_logprobs=True, **options)
    targets = torch.full_like(out, mm.IGNORE_INDEX)
    targets[:, 8:-1] = out[:, 9:]
    with torch.no_grad():
        truth = model(out, targets=targets, temperature=temperature or 1.0).logprobs
    torch.testing.assert_close(logprobs[:, 1:], truth[:, :-1], atol=2e-5, rtol=0)
    assert (logprobs[:, :9] == 0).all() and (logprobs[:, 9:] < 0).all()


def test_results_can_be_trained_on(case):
    model, golden = case
    model.train()
    out, logprobs = generate(model, golden["input_ids"][:, :4], max_new_tokens=3, return_logprobs=True, seed=0)
    assert model.training
    assert not out.is_inference() and not logprobs.is_inference() and not torch.is_inference_mode_enabled()
    (model(out, targets=out).logprobs * logprobs).sum().backward()


def test_training_mode_does_not_change_the_answer(case):
    model, golden = case
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.5
    prompt = golden["input_ids"][:1, :8]
    model.train()
    assert torch.equal(generate(model, prompt, max_new_tokens=16, stop_ids=()), golden["greedy_ids"])


def test_beyond_the_context_is_an_error_and_up_to_it_is_not(case):
    model, golden = case
    limit = model.config.max_position_embeddings
    prompt = (golden["input_ids"][0].tolist() * limit)[: limit - 3]
    assert len(generate_batch(model, [prompt], max_new_tokens=3, stop_ids=())[0]) == 3
    with pytest.raises(
        ValueError, match=rf"{limit - 3} prompt tokens \+ 4 new ones exceed the model's context of {limit}"
    ):
        generate_batch(model, [[1], prompt], max_new_tokens=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_step_is_what_the_model_gives_in_other_dtypes_too(case, dtype):
    """By norm, as half precision rounds at other places; float64 shows that the arithmetic is the same."""
    model, golden = case
    exact = mm.MiniMind(model.config).double().eval()
    exact.load_state_dict(model.state_dict())
    exact.model.rotary.cos, exact.model.rotary.sin = model.model.rotary.cos, model.model.rotary.sin
    model = exact if dtype == torch.float64 else model.to(dtype)
    ids = golden["input_ids"][:, :20]
    for rows in (1, 3):
        decoder = Decoder(model, rows, 20)
        decoder.prefill(ids[:rows, :12].tolist())
        for t in range(12, 20):
            logits = decoder.step(ids[:rows, t])
            with torch.no_grad():
                plain = model(ids[:rows, : t + 1]).logits[:, -1].double()
                truth = exact(ids[:rows, : t + 1]).logits[:, -1]
            error, allowed = (logits.double() - truth).norm(), (plain - truth).norm()
            assert error <= (1.5 * allowed if dtype == torch.bfloat16 else 1e-5 * truth.norm()), (rows, t)


@pytest.mark.parametrize("rows", [1, 4])
def test_the_cpu_step_is_the_plain_step(case, rows):
    model, golden = case
    prompts = ragged(golden)[:rows]
    fast, plain = (Decoder(model, rows, 40) for _ in "ab")
    plain._fast = PlainStep(model, plain.cache)
    for decoder in (fast, plain):
        decoder.prefill(prompts)
    for t in range(10):
        ids = torch.tensor([(7 * t + r) % model.config.vocab_size for r in range(rows)])
        torch.testing.assert_close(fast.step(ids), plain.step(ids), atol=2e-5, rtol=0)
    torch.testing.assert_close(fast.cache, plain.cache, atol=2e-5, rtol=0)


@pytest.mark.parametrize("before", [True, False])
def test_the_switch_of_onednn_is_put_back(before):
    was = torch._C._get_mkldnn_enabled()
    try:
        torch._C._set_mkldnn_enabled(before)
        model = mm.load_pretrained(GOLDEN / CASES[0], dtype=torch.bfloat16)
        generate(model, torch.tensor([[1, 2]]), max_new_tokens=3, stop_ids=())
        assert torch._C._get_mkldnn_enabled() == before
    finally:
        torch._C._set_mkldnn_enabled(was)


def test_the_switch_is_put_back_by_the_last_of_several_threads():
    was = torch._C._get_mkldnn_enabled()
    model = mm.load_pretrained(GOLDEN / CASES[0], dtype=torch.bfloat16)
    run = functools.partial(generate, model, torch.tensor([[1, 2]]), max_new_tokens=60, stop_ids=())
    with ThreadPoolExecutor(4) as pool:
        outs = [job.result() for job in [pool.submit(run) for _ in range(8)]]
    assert torch._C._get_mkldnn_enabled() == was
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_the_cache_holds_kv_heads_only():
    config = mm.ModelConfig(num_hidden_layers=2, hidden_size=64, vocab_size=128)
    decoder = Decoder(mm.MiniMind(config), 3, 10)
    assert decoder.cache.shape == (2, 3, 2 * config.num_key_value_heads, 10, config.head_dim)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.tensor([1, 2])}, r"must be \(B, T\)"),
        ({"input_ids": torch.tensor([[1, 999999]])}, "outside the model's vocabulary"),
        ({"input_ids": torch.tensor([[1, -1]])}, "token id -1"),
        ({"lengths": [3]}, "lengths"),
        ({"lengths": [0]}, "lengths"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"seed": [1, 2]}, "2 seeds for 1 prompts"),
        ({"prefill_chunk": 0}, "prefill_chunk"),
    ],
)
def test_wrong_options_are_told(change, message):
    model = mm.load_pretrained(GOLDEN / CASES[0])
    with pytest.raises(ValueError, match=message):
        generate(model, **{"input_ids": torch.tensor([[1, 2]]), **change})


def test_nothing_to_do():
    model = mm.load_pretrained(GOLDEN / CASES[0])
    assert generate_batch(model, []) == []
    assert generate_batch(model, [[1]], max_new_tokens=0) == [[]]
    assert generate(model, torch.tensor([[1, 2]]), max_new_tokens=0).tolist() == [[1, 2]]
    with pytest.raises(ValueError, match="at least one token"):
        generate_batch(model, [[]])


# ------------------------------------------------------------------------------------------------------- sampling


def oracle(logits, s, seen=()):
    """Probabilities after penalty, temperature, top-k, top-p and min-p, by plain Python."""
    logits = [x.item() for x in logits.double()]
    logits = [
        (x / s.repetition_penalty if x > 0 else x * s.repetition_penalty) if i in seen else x
        for i, x in enumerate(logits)
    ]
    logits = [x / s.temperature for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    kept = order[: s.top_k] if s.top_k else order
    weights = {i: math.exp(logits[i] - logits[order[0]]) for i in kept}
    total, mass, nucleus = sum(weights.values()), 0.0, []
    for i in kept:
        if mass / total < s.top_p:
            nucleus.append(i)
        mass += weights[i]
    nucleus = [i for i in nucleus if weights[i] >= s.min_p]
    total = sum(weights[i] for i in nucleus)
    return [weights[i] / total if i in nucleus else 0.0 for i in range(len(logits))]


OPTIONS = [
    Sampling(1.0),
    Sampling(0.7),
    Sampling(1.0, top_k=5),
    Sampling(1.0, top_p=0.8),
    Sampling(1.3, top_p=0.3),
    Sampling(1.0, top_p=1e-6),
    Sampling(1.0, min_p=0.1),
    Sampling(1.0, top_k=10**6, top_p=0.999),
    Sampling(1.0, repetition_penalty=1.5),
    Sampling(0.8, 0.9, 30, 0.02, 1.2),
]


@pytest.mark.parametrize("s", OPTIONS, ids=str)
@pytest.mark.parametrize("vocab", [11, 300])  # 300: more than top-p's first look
@pytest.mark.parametrize("spread", [0.3, 3.0])  # 0.3: flat, so that top-p must look at the whole row
def test_filters_are_the_oracle_s(s, vocab, spread):
    torch.manual_seed(vocab)
    logits = torch.randn(4, vocab) * spread
    seen = torch.rand(4, vocab) < 0.3
    after = penalize(logits, seen, s.repetition_penalty) if s.penalizes else logits
    probs = keep_likely(after / s.temperature, s).softmax(-1)
    for row in range(4):
        truth = torch.tensor(oracle(logits[row], s, set(seen[row].nonzero().flatten().tolist())))
        assert torch.equal(probs[row] > 0, truth > 0)
        torch.testing.assert_close(probs[row], truth, atol=1e-6, rtol=1e-5)


def test_a_draw_inverts_the_cumulative_distribution():
    logits = torch.tensor([[0.1, 0.0, 0.4, 0.5]]).log()
    uniform = torch.tensor([0, 0.09, 0.11, 0.49, 0.51], dtype=torch.float64)
    assert choose(logits.expand(5, -1), Sampling(1.0), uniform).tolist() == [0, 0, 2, 2, 3]
    impossible_first = torch.tensor([[-math.inf, 0.0, 0.0]])
    assert choose(impossible_first, Sampling(1.0), uniform[:1]).item() == 1
    last = torch.nextafter(torch.tensor([1.0], dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64))
    assert choose(torch.tensor([[5.0, 1.0, -math.inf]]), Sampling(1.0), last).item() == 1


def test_frequencies_follow_the_probabilities():
    torch.manual_seed(0)
    logits, s, n = torch.randn(1, 12) * 1.5, Sampling(0.9, top_p=0.9), 20000
    noise = Noise([5], "cpu")
    uniform = torch.cat([noise.next() for _ in range(n)])
    counts = choose(logits.expand(n, -1), s, uniform).bincount(minlength=12).double()
    expected = torch.tensor(oracle(logits[0], s), dtype=torch.float64) * n
    assert (counts[expected == 0] == 0).all()
    chi2 = ((counts - expected) ** 2 / expected)[expected > 0].sum()
    assert chi2 < 35  # 99.97% point of the chi-square distribution with 11 degrees of freedom


def test_ties_at_the_edge_stay_together():
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0]])
    assert (keep_likely(logits, Sampling(1.0, top_k=2)) > -math.inf).tolist() == [[False, True, True, False, True]]
    assert (keep_likely(logits, Sampling(1.0, top_p=0.1)) > -math.inf).tolist() == [[False, True, True, False, True]]


def test_noise_of_a_row_does_not_know_its_neighbours():
    together, alone = Noise([1, 2, 3], "cpu"), Noise([3], "cpu")
    for step in range(150):
        if step == 70:
            together.keep([0, 2])
        assert together.next()[-1] == alone.next()[0]


def test_row_seeds_differ():
    seeds = {row_seed(seed, row) for seed in range(50) for row in range(50)}
    assert len(seeds) == 2500 and row_seed(7, 0) == 7 and all(0 <= s < 1 << 63 for s in seeds)


def test_draws_have_a_fixed_order_of_addition_where_a_run_must_repeat():
    """On a GPU PyTorch refuses --deterministic anything else: no stage could show samples, no rollout begin."""
    logits = torch.randn(3, 400, generator=torch.Generator().manual_seed(0)) * 3
    uniform = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    how = [Sampling(0.7, top_p=0.9), Sampling(1.0, top_k=20, min_p=0.01)]
    wanted = [choose(logits, s, uniform) for s in how]
    torch.use_deterministic_algorithms(True)
    try:
        with Operators() as ran:
            got = [choose(logits, s, uniform) for s in how]
    finally:
        torch.use_deterministic_algorithms(False)
    assert "searchsorted" in ran.seen and not ran.seen & UNORDERED
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_greedy_takes_the_likeliest_after_the_penalty():
    logits = torch.tensor([[2.0, 1.9, -1.0], [-0.5, -0.6, -9.0]])
    seen = torch.tensor([[True, False, False], [True, False, False]])
    assert choose(logits, Sampling()).tolist() == [0, 0]
    assert choose(logits, Sampling(repetition_penalty=1.5), seen=seen).tolist() == [1, 1]


# ------------------------------------------------------------------------------------------------------- streaming


@pytest.fixture
def recite(monkeypatch):
    """A function (tokenizer, text, **options) -> Stream whose tokens are those of the text."""
    model = mm.MiniMind(
        mm.ModelConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, num_key_value_heads=1)
    )

    def make(tokenizer, text, **options) -> Stream:
        ids = iter([*tokenizer.encode(text), tokenizer.eos_id])

        def next_logits(*_):
            logits = torch.zeros(1, model.config.vocab_size)
            logits[0, next(ids)] = 9
            return logits

        monkeypatch.setattr(Decoder, "prefill", next_logits)
        monkeypatch.setattr(Decoder, "step", next_logits)
        return stream(model, tokenizer, [1], **{"max_new_tokens": 500, **options})

    return make


TEXT = "春眠不觉晓，处处闻啼鸟。🌸👩‍👩‍👧 naïve café — ok?\n𠮷野家"


@pytest.fixture(params=["minimind2", "minimind3"])
def tokenizer(request, shared):
    return mm.Tokenizer.load(shared / "minimind" / request.param)


def test_a_stream_never_ends_inside_a_character(recite, tokenizer):
    answer = recite(tokenizer, TEXT)
    pieces = list(answer)
    assert "".join(pieces) == TEXT and all(pieces) and "\ufffd" not in TEXT
    assert not any("\ufffd" in p for p in pieces) and len(pieces) > 20
    assert answer.finish_reason == "stop" and answer.ids == [*tokenizer.encode(TEXT), tokenizer.eos_id]
    assert answer.decode_s > 0 and answer.prefill_s > 0


def test_a_stream_that_is_cut_inside_a_character_says_so(recite, tokenizer):
    ids = tokenizer.encode("🌸")
    assert len(ids) > 1
    answer = recite(tokenizer, "🌸", max_new_tokens=len(ids) - 1)
    assert set("".join(answer)) == {"\ufffd"} and answer.finish_reason == "length"


@pytest.mark.parametrize(
    ("stop", "wanted"),
    [
        ("啼鸟", "春眠不觉晓，处处闻"),
        (["zzz", "🌸", "处处"], "春眠不觉晓，"),
        ("春", ""),
        ("处处闻啼鸟。🌸👩‍👩‍👧 naïve X", TEXT),  # begins like the text and then does not come
        ("家屋", TEXT),  # begins at the very end
    ],
)
def test_stop_strings(recite, tokenizer, stop, wanted):
    answer = recite(tokenizer, TEXT, stop=stop)
    assert "".join(answer) == wanted and answer.finish_reason == "stop"


def test_special_tokens_are_left_out_unless_asked_for(recite, tokenizer):
    assert "".join(recite(tokenizer, "a<|im_start|>b")) == "ab"
    assert "".join(recite(tokenizer, "a<|im_start|>b", skip_special_tokens=False)) == "a<|im_start|>b"


def test_a_stream_says_what_generate_gives(tokenizer):
    torch.manual_seed(0)
    model = mm.MiniMind(mm.ModelConfig.preset("minimind3", hidden_size=64, num_hidden_layers=2))
    options = {"max_new_tokens": 30, "temperature": 1.0, "top_p": 0.9, "seed": 4}
    prompt = [tokenizer.bos_id, *tokenizer.encode("你好")]
    answer = stream(model, tokenizer, prompt, **options)
    text = "".join(answer)
    ids = generate_batch(model, [prompt], **options)[0]
    assert answer.ids == ids and text == tokenizer.decode(
        [i for i in ids if i != tokenizer.eos_id], skip_special_tokens=True
    )


def test_wrong_stream_options_are_told_at_once(tokenizer):
    model = mm.MiniMind(
        mm.ModelConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, num_key_value_heads=1)
    )
    with pytest.raises(ValueError, match="stop string"):
        stream(model, tokenizer, [1], stop=[""])
    with pytest.raises(ValueError, match="exceed the model's context"):
        stream(model, tokenizer, [1], max_new_tokens=10**6)
    with pytest.raises(ValueError, match="top_p"):
        stream(model, tokenizer, [1], top_p=2.0)


# ---------------------------------------------------------------------------------------------- CUDA graphs, without


class _Graphs:
    """`torch.cuda` as far as `GraphStep` needs it, with PyTorch's rule for pools: one that was used needs a live graph."""

    def __init__(self):
        self.pools, self.captures = {}, 0  # pool -> its graphs
        self.Stream = self.current_stream = lambda: SimpleNamespace(wait_stream=lambda _: None)
        self.stream = lambda _: nullcontext()
        self.device = lambda _: nullcontext()
        self.graph_pool_handle = object
        self.CUDAGraph = type("Graph", (), {"replay": lambda _: None})

    @contextmanager
    def graph(self, graph, pool):
        graphs = self.pools.setdefault(pool, weakref.WeakSet())
        assert graphs or not self.captures, "the pool's last graph is gone"
        graphs.add(graph)
        self.captures += 1
        yield


def test_a_graph_that_rows_outgrow_is_captured_again_in_a_live_pool(monkeypatch):
    model = mm.load_pretrained(GOLDEN / CASES[0]).eval()
    monkeypatch.setattr(torch, "cuda", cuda := _Graphs())
    cache = new_cache(model, 2, 400)
    graphs, plain = GraphStep(model, cache), PlainStep(model, cache)
    ids = torch.tensor([5, 7])
    with torch.inference_mode():
        for position in (0, 255, 256, 399):
            at = torch.tensor([position, position])
            got = graphs(ids, at, position + 1, True)
            if position in (0, 256):  # captured just now, which here means run
                assert torch.equal(got, plain(ids, at, max(graphs.graphs), False))
    assert (cuda.captures, list(graphs.graphs)) == (2, [256, 400])  # not more slots than the cache has


@pytest.mark.parametrize("make", [GraphStep, PlainStep])
def test_a_decoder_that_is_done_keeps_no_memory_until_cycles_are_collected(make, monkeypatch):
    model = mm.load_pretrained(GOLDEN / CASES[0])
    decoder = Decoder(model, 1, 20)
    monkeypatch.setattr(torch, "cuda", _Graphs())
    monkeypatch.setattr("minimind_fast.infer.decode.captures", lambda _: make is GraphStep)
    decoder.device = torch.device("cuda")
    decoder._fast = decoder._make_fast()
    assert isinstance(decoder._fast, make)
    cache = weakref.ref(decoder.cache)
    gc.disable()
    try:
        del decoder
        assert cache() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "kernels, captured", [("all", True), ("moe_mlp", False), ("moe_route", False), ("none", False)]
)
def test_a_mixture_is_captured_only_with_both_its_kernels(kernels, captured, monkeypatch):
    monkeypatch.setattr("minimind_fast.ops.kernel", lambda name: None)  # Triton stays out of this process
    mixture, dense = (mm.MiniMind(mm.ModelConfig.preset("tiny", use_moe=moe)) for moe in (True, False))
    with mm.ops.use(kernels):
        assert can_capture(mixture) == captured and can_capture(dense)


# ------------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_cuda_graphs_give_the_plain_steps_tokens(name):
    model = mm.load_pretrained(GOLDEN / name, device="cuda")
    golden = load_file(GOLDEN / name / "golden.safetensors")
    prompt = golden["input_ids"][:1, :8].cuda()
    assert torch.equal(generate(model, prompt, max_new_tokens=16, stop_ids=()).cpu(), golden["greedy_ids"])
    prompts = ragged(golden)
    outs = generate_batch(model, prompts, max_new_tokens=300, stop_ids=())  # more than one graph's slots
    for prompt, out in zip(prompts, outs, strict=True):
        decoder = Decoder(model, 1, len(prompt) + 300)
        decoder._fast = PlainStep(model, decoder.cache)
        logits, plain = decoder.prefill([prompt]), []
        for _ in range(300):
            plain.append(int(logits.argmax()))
            logits = decoder.step(torch.tensor(plain[-1:], device="cuda"))
        assert out == plain


@pytest.mark.gpu
def test_the_same_seed_draws_the_same_on_a_gpu():
    golden = load_file(GOLDEN / CASES[0] / "golden.safetensors")
    options = {"max_new_tokens": 20, "temperature": 1.0, "seed": 3, "stop_ids": ()}
    outs = [
        generate_batch(mm.load_pretrained(GOLDEN / CASES[0], device=d), ragged(golden), **options)
        for d in ("cpu", "cuda")
    ]
    assert outs[0] == outs[1]


@pytest.mark.parametrize(("rows", "new_tokens", "mean"), [(64, 512, 150), (100, 900, 200)])
def test_rollouts_capture_a_bounded_number_of_graphs_and_use_them_again(monkeypatch, rows, new_tokens, mean):
    """Rows end one by one, as sampled answers do. A stand-in for `GraphStep` captures, and checks that the cache stays."""
    captured, places = [], set()

    class Counted(decode.GraphStep):
        def _capture(self, slots):
            captured.append((len(self.ids), slots))
            places.add(self.plain.cache.data_ptr())
            logits = torch.zeros(len(self.ids), 64)
            logits[:, 2] = math.log(63 / (mean - 1))  # the end's probability is 1 / mean
            return SimpleNamespace(replay=lambda: None), logits

    monkeypatch.setattr(torch, "cuda", _Graphs())
    monkeypatch.setattr(decode, "captures", lambda _: True)
    monkeypatch.setattr(decode, "GraphStep", Counted)
    shape = dict(hidden_size=16, num_hidden_layers=1, vocab_size=64, intermediate_size=16)
    config = mm.ModelConfig.preset("minimind3", num_attention_heads=2, num_key_value_heads=1, **shape)
    model = mm.MiniMind(config).eval()
    how = dict(max_new_tokens=new_tokens, workspace=decode.Workspace(model, rows, 100 + new_tokens))
    alone = [complete(model, [[5] * 100] * rows, Sampling(1.0), max_new_tokens=new_tokens, seed=s) for s in (1, 2)]
    captured.clear(), places.clear()
    again = [complete(model, [[5] * 100] * rows, Sampling(1.0), seed=s, **how) for s in (1, 2, 1)]
    assert again == [*alone, alone[0]]
    numbers = math.ceil(math.log2(rows / decode._GRAPH_ROWS)) + 1
    doublings = math.ceil(math.log2((100 + new_tokens) / decode._GRAPH_SLOTS)) + 1
    assert 2 <= len(captured) == len(set(captured)) <= numbers * doublings
    first = len(captured)
    complete(model, [[5] * 100] * rows, Sampling(1.0), seed=2, **how)
    assert len(captured) == first and len(places) == 1
    model.lm_head.weight.data = model.lm_head.weight.data.clone()  # as a checkpoint that is loaded would
    complete(model, [[5] * 100] * rows, Sampling(1.0), seed=1, **how)
    assert len(captured) > first
