"""Measures against arithmetic done by hand, on a model small enough to do it."""

import math

import pytest
import torch

import minimind_fast as mm
from minimind_fast.infer.score import Question, multiple_choice, perplexity, read_question, score


@pytest.fixture(scope="module")
def tokenizer(shared):
    return mm.Tokenizer.load(shared / "minimind" / "minimind3")


@pytest.fixture(scope="module", params=["minimind2", "minimind3-moe"])
def model(request):
    torch.manual_seed(0)
    small = {"hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 64}
    config = mm.ModelConfig.preset(request.param, **small, tie_word_embeddings=False)
    model = mm.MiniMind(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)  # far from the uniform distribution
    return model


@torch.no_grad()
def by_hand(model, context, continuation):
    ids, total = list(context), 0.0
    for token in continuation:
        total += model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)[token].item()
        ids.append(token)
    return total


@pytest.mark.parametrize("batch_tokens", [1, 20, 10**6])
def test_scores_are_sums_of_logprobs_in_the_pairs_order(model, batch_tokens):
    pairs = [([1], [5, 6, 7]), ([1, 2, 3, 4], [9]), ([8], []), ([4, 4], [1, 2, 3, 4, 5])]
    truth = [by_hand(model, c, x) for c, x in pairs]
    assert score(model, pairs, batch_tokens) == pytest.approx(truth, abs=1e-4)


def test_a_long_context_loses_its_beginning(model):
    context = [i % 50 for i in range(200)]
    assert score(model, [(context, [3, 4])])[0] == pytest.approx(score(model, [(context[-63:], [3, 4])])[0], abs=1e-5)
    with pytest.raises(ValueError, match="continuation of 65"):
        score(model, [([1], [2] * 65)])
    with pytest.raises(ValueError, match="at least one token"):
        score(model, [([], [2])])


def test_perplexity_counts_each_token_once(model, tokenizer):
    texts = ["春眠不觉晓，处处闻啼鸟。", "a", "", "The quick brown fox jumps over the lazy dog 🌸"]
    nats, tokens = 0.0, 0
    for text in texts:
        ids = tokenizer.encode(text)
        for begin in range(0, len(ids), 7):
            before = [tokenizer.bos_id] if begin == 0 else [ids[begin - 1]]
            nats -= by_hand(model, before, ids[begin : begin + 7])
        tokens += len(ids)
    size = sum(len(t.encode()) for t in texts)
    p = perplexity(model, tokenizer, texts, max_seq_len=7)
    assert (p.tokens, p.bytes) == (tokens, size)
    assert p.per_token == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert p.per_byte == pytest.approx(math.exp(nats / size), rel=1e-4)
    assert p.bits_per_byte == pytest.approx(nats / size / math.log(2), rel=1e-4)
    with pytest.raises(ValueError, match="nothing to measure"):
        perplexity(model, tokenizer, [""])


def test_the_likeliest_choice_is_the_model_s(model, tokenizer):
    context, choices = "天空是", ["蓝色的", "红", "绿色的东西"]
    values = []
    begin = tokenizer.encode(context)
    for c in choices:
        ids = tokenizer.encode(f"{context} {c}")
        values.append(by_hand(model, [tokenizer.bos_id, *ids[: len(begin)]], ids[len(begin) :]))
    best = max(range(3), key=values.__getitem__)
    best_norm = max(range(3), key=lambda i: values[i] / len(choices[i]))
    for wanted in range(3):
        a = multiple_choice(model, tokenizer, [Question(context, ["A", "B", "C"], choices, "ABC"[wanted], False)])
        assert (a.accuracy, a.accuracy_norm) == (float(wanted == best), float(wanted == best_norm))
        assert a.chance == pytest.approx(1 / 3) and a.questions == 1


def test_letters_are_scored_after_the_choices(model, tokenizer):
    context = "1+1=?\nA. 1\nB. 2\n答案："
    begin = tokenizer.encode(context)
    values = [
        by_hand(model, [tokenizer.bos_id, *begin], tokenizer.encode(f"{context} {c}")[len(begin) :]) for c in "AB"
    ]
    answer = "AB"[values.index(max(values))]
    assert multiple_choice(model, tokenizer, [Question("1+1=?", ["A", "B"], ["1", "2"], answer, True)]).accuracy == 1


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"question": "q", "A": "1", "B": "2", "answer": "B"}, Question("q", ["A", "B"], ["1", "2"], "B", True)),
        (
            {"id": 3, "Question": "q", "A": 1, "B": 2, "C": 3, "D": 4, "Answer": "D"},
            Question("q", list("ABCD"), list("1234"), "D", True),
        ),
        (
            {"question_stem": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "A"},
            Question("q", ["A", "B"], ["x", "y"], "A", False),
        ),
        (
            {
                "question": {"stem": "q", "choices": [{"text": "x", "label": "1"}, {"text": "y", "label": "2"}]},
                "answerKey": "2",
            },
            Question("q", ["1", "2"], ["x", "y"], "2", False),
        ),
        (
            {"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
            Question("q", ["A", "B"], ["x", "y"], "B", False),
        ),
    ],
)
def test_known_formats(row, wanted):
    assert read_question(row, "here") == wanted


@pytest.mark.parametrize(
    "row", [{}, {"question": "q", "A": "1", "B": "2"}, {"question": "q", "A": "1", "B": "2", "answer": "C"}]
)
def test_unknown_formats_are_told(row):
    with pytest.raises(ValueError, match="here: not a multiple-choice row"):
        read_question(row, "here")
