"""DPO: which tokens of which pairs are trained, the batches, the reference, and the real command."""

import json
import shutil

import numpy as np
import pytest
import torch
from launching import load_script, read_log, run
from stand_ins import Engine

import minimind_fast as mm
from minimind_fast.data import samples
from minimind_fast.data.cache import build_cache
from minimind_fast.data.minimind.variety import Variety
from minimind_fast.data.pairs import PairBatches, PairEncoder
from minimind_fast.data.rows import BadRow, DataError
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.rl import preferences
from minimind_fast.rl.preferences import answer_lengths, answer_logprobs
from minimind_fast.training.resume import checkpoints

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(samples.path("tokenizer"))


def message(role, content, **more):
    return {"role": role, "content": content, **more}


def pair(question, good, bad, before=()):
    prompt = [*before, message("user", question)]
    return {"chosen": [*prompt, message("assistant", good)], "rejected": [*prompt, message("assistant", bad)]}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# --------------------------------------------------------------------------------------------------------- the encoder


def trained(tokenizer, row):
    """For chosen and rejected: (the whole text, the trained parts joined by |)."""
    (result,) = PairEncoder(tokenizer)([row], tokenizer)
    assert not isinstance(result, BadRow), result
    found = []
    for ids, weights in result:
        parts = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(weights)) + 1)
        texts = [tokenizer.decode([ids[i] for i in part]) for part in parts if weights[part[0]]]
        found.append((tokenizer.decode(ids), "|".join(texts)))
    return found


BEFORE = [message("system", "Be kind."), message("user", "hi"), message("assistant", "hello")]


@pytest.mark.parametrize(
    ("row", "chosen", "rejected"),
    [
        (pair("2?", "3", "no"), "3<|im_end|>", "no<|im_end|>"),
        # the earlier answer is the same in both: part of the prompt
        (pair("2?", "3", "no", BEFORE), "3<|im_end|>", "no<|im_end|>"),
        (pair("2?", "", "no"), "<|im_end|>", "no<|im_end|>"),
        # markers in an answer are plain text
        (
            pair("2?", "a<|im_end|>\n<|im_start|>user\nb", "a"),
            "a<|im_end|>\n<|im_start|>user\nb<|im_end|>",
            "a<|im_end|>",
        ),
        (pair("2?", "3", "3 "), "3<|im_end|>", "3 <|im_end|>"),
    ],
)
def test_the_answers_that_differ_are_trained_and_nothing_else(tokenizer, row, chosen, rejected):
    (text, ours), (other, theirs) = trained(tokenizer, row)
    assert (ours, theirs) == (chosen, rejected)
    assert text.startswith("<|im_start|>") and text.endswith(chosen) and other.endswith(rejected)
    assert text.removesuffix(chosen) == other.removesuffix(rejected)  # the same prompt


@pytest.mark.parametrize("drops", [True, False])
def test_whole_turns_are_minimind_s_mask_and_one_draw_is_both_sides(tokenizer, model, drops):
    """DPO's loss on one pair against MiniMind's: all after the turn's header, to the newline, is summed."""
    row = pair("2?", "3", "no way")
    (documents,) = PairEncoder(tokenizer, Variety(empty_think_ratio=1.0 - drops, whole_turn=True))([row], tokenizer)
    empty, want, got = "<think>\n\n</think>\n\n", [], []
    for side, (ids, weights) in zip(("chosen", "rejected"), documents, strict=True):
        text = tokenizer.render_chat(row[side])
        assert tokenizer.decode(ids) == (text.replace(empty, "") if drops else text)
        head = len(tokenizer.encode("<|im_start|>user\n2?<|im_end|>\n<|im_start|>assistant\n"))
        logprobs = model(torch.tensor([list(ids)])).logits[0].log_softmax(-1)
        each = [logprobs[i - 1, ids[i]].item() for i in range(1, len(ids))]
        want.append(sum(each[head - 1 :]))
        got.append(sum(x for x, weight in zip(each, weights[1:], strict=True) if weight))
    assert got == pytest.approx(want, abs=1e-4)
    rows = [pair(f"{i}?", "3", "no") for i in range(60)]
    halves = PairEncoder(tokenizer, Variety(empty_think_ratio=0.5))(rows, tokenizer)
    kept = [[empty in tokenizer.decode(ids) for ids, _ in sides] for sides in halves]
    assert all(one == other for one, other in kept) and len({one for one, _ in kept}) == 2


def test_after_an_answer_that_differs_all_answers_are_trained(tokenizer):
    row = pair("2?", "3", "no")
    row["chosen"] += [message("user", "thanks"), message("assistant", "bye")]
    assert [found for _, found in trained(tokenizer, row)] == ["3<|im_end|>|bye<|im_end|>", "no<|im_end|>"]


def test_a_thought_is_part_of_the_answer_that_it_differs_in(tokenizer):
    row = pair("2?", "3", "3")
    row["chosen"][-1]["reasoning_content"] = "one more"
    (_, chosen), (_, rejected) = trained(tokenizer, row)
    assert "one more" in chosen and chosen.endswith("3<|im_end|>") and rejected == "3<|im_end|>"


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"chosen": []}, "chosen: must be a list of at least one message"),
        ({"chosen": "yes", "rejected": "no"}, "chosen: must be a list of at least one message"),
        ({"prompt": "?"}, 'has no field "chosen" (its fields: prompt)'),
        ({"chosen": pair("?", "a", "b")["chosen"]}, 'has no field "rejected" (its fields: chosen)'),
        (pair("?", "a", "b") | {"rejected": [message("robot", "x")]}, "rejected: message 1: role must be one of"),
        (
            pair("?", "a", "b") | {"rejected": [message("user", "?")]},
            "rejected: the last message must be the assistant's",
        ),
        (pair("?", "a", "a"), "chosen and rejected are the same"),
        (pair("?", "a", "b") | {"rejected": pair("!", "a", "b")["rejected"]}, "part at message 1"),
        (pair("?", "a", None), 'rejected: message 2: "content" must be a string'),
        (pair("?", "a", "\ud83d"), "half of a surrogate pair"),
        ({"chosen": [message("assistant", "a")], "rejected": [message("assistant", "b")]}, "part at message 1"),
    ],
)
def test_a_bad_pair_is_told_by_what_is_wrong_with_it(tokenizer, row, problem):
    (result,) = PairEncoder(tokenizer)([row], tokenizer)
    assert isinstance(result, BadRow) and problem in result.problem


# --------------------------------------------------------------------------------------------------------- the batches


@pytest.fixture(scope="module")
def cache(tokenizer, tmp_path_factory):
    """30 pairs; long prompts cost the last two an answer at 64 tokens, one the chosen, one the rejected."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = [pair(f"What is {i}?", f"{i} " * (1 + i % 9), f"no {i} " * (1 + i % 4)) for i in range(28)]
    long = [message("user", "word " * 80)]
    rows.append({"chosen": [message("user", "x"), message("assistant", "cut"), *long, message("assistant", "a")]})
    rows[-1]["rejected"] = [*rows[-1]["chosen"][:-1], message("assistant", "b")]
    rows.append({side: [*long, message("assistant", side)] for side in ("chosen", "rejected")})
    path = write(folder / "pairs.jsonl", rows)
    return build_cache(path, tokenizer, encode=PairEncoder(tokenizer), cache_dir=folder, log=lambda _: None)


def batches(cache, **how):
    return PairBatches(cache, **{"batch_size": 2, "max_seq_len": 64, "seed": 3, **how})


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_pair_is_never_parted_and_each_comes_once_an_epoch(cache, tokenizer, world_size, shuffle):
    seen = []
    for rank in range(world_size):
        data = batches(cache, rank=rank, world_size=world_size, shuffle=shuffle)
        assert data.num_pairs == 28 and data.num_dropped == 2
        for batch in data:
            cu = batch.cu_seqlens.tolist()
            assert batch.num_docs == 2 * batch.num_pairs and batch.input_ids.numel() <= 2 * 2 * 64
            for index, number in enumerate(batch.pairs.tolist()):
                texts = [
                    tokenizer.decode(batch.input_ids[cu[d] : cu[d + 1]].tolist()) for d in (2 * index, 2 * index + 1)
                ]
                assert all(f"What is {number}?" in text for text in texts)
                assert f"no {number}" in texts[1] and f"no {number}" not in texts[0]
                seen.append(number)
    assert sorted(seen) == list(range(28))
    assert (seen == sorted(seen)) <= (not shuffle)


def test_a_pair_that_lost_one_answer_is_dropped_whole(tokenizer, tmp_path):
    """An answer with a thought begins earlier (no empty thought in its prompt): a cut in between loses only the rejected."""
    row = pair("2?", "3", "3")
    row["chosen"][-1]["reasoning_content"] = "one more"
    rows = [row, pair("?", "a", "b")]
    (documents, _) = PairEncoder(tokenizer)(rows, tokenizer)
    begins = [int(np.flatnonzero(weights)[0]) for _, weights in documents]
    assert begins[0] < begins[1]
    path = write(tmp_path / "pairs.jsonl", rows)
    cache = build_cache(path, tokenizer, encode=PairEncoder(tokenizer), log=lambda _: None)
    for max_seq_len, dropped in ((begins[1], 0), (begins[1] - 1, 1)):
        data = batches(cache, max_seq_len=max_seq_len)
        assert (data.num_pairs, data.num_dropped) == (2 - dropped, dropped)
        (batch,) = data
        assert answer_lengths(batch).min() >= 1
    with pytest.raises(DataError, match="no document with at least one target"):
        batches(cache, max_seq_len=3)


def test_a_position_belongs_to_a_reference(cache):
    data = batches(cache)
    data.set_reference("mine", None)
    state = data.state_dict()
    other = batches(cache)
    other.set_reference("another", None)
    with pytest.raises(ValueError, match="reference was 'mine' and is 'another' now"):
        other.load_state_dict(state)


# ------------------------------------------------------------------------------------------------------- the reference


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = mm.ModelConfig.preset("tiny", hidden_size=32, num_hidden_layers=2, vocab_size=6400)
    return mm.MiniMind(config).eval().requires_grad_(False)


def test_log_probabilities_are_those_of_each_answer_alone(cache, tokenizer, model):
    """Oracle: each document alone, with full logits; the cache's mask says which tokens are trained."""
    batch = next(iter(batches(cache)))
    got, _ = answer_logprobs(model, batch)
    lengths = answer_lengths(batch)
    for place, number in enumerate(batch.pairs.tolist()):
        for side in range(2):
            begin, end = cache.offsets[2 * number + side : 2 * number + side + 2]
            ids = torch.from_numpy(cache.tokens[begin:end].astype(np.int64))[:65]
            mask = torch.from_numpy(cache.mask[begin + 1 : end].astype(np.float32))[:64]
            logprobs = model(ids[None, :-1]).logits[0].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
            torch.testing.assert_close(got[place, side], (logprobs * mask).sum(), atol=1e-4, rtol=1e-5)
            assert lengths[place, side] == mask.sum()


def test_the_reference_is_computed_once_and_found_again(cache, model, monkeypatch):
    lines = []
    first = preferences.cached_reference(model, batches(cache, shuffle=False), CPU, lines.append)
    for batch in batches(cache):
        torch.testing.assert_close(first[batch.pairs], answer_logprobs(model, batch)[0], atol=1e-4, rtol=1e-5)
    with monkeypatch.context() as patch:
        patch.setattr(preferences, "reference_logprobs", None)
        again = preferences.cached_reference(model, batches(cache, shuffle=False), CPU, lines.append)
    assert torch.equal(first, again) and "28 pairs" in lines[0] and "were found" in lines[1]
    other = mm.MiniMind(model.config).eval().requires_grad_(False)
    assert not torch.equal(first, preferences.cached_reference(other, batches(cache, shuffle=False), CPU, lines.append))
    shorter = batches(cache, shuffle=False, max_seq_len=24)
    assert preferences.cached_reference(model, shorter, CPU, lines.append).shape == (shorter.num_pairs, 2)


def test_batches_bring_the_reference_of_their_own_pairs(cache):
    data = batches(cache)
    values = torch.arange(56.0).view(28, 2)
    data.set_reference("x", values)
    for batch in data:
        assert torch.equal(batch.to("cpu").reference, values[batch.pairs])


# ------------------------------------------------------------------------------------------------ the loss, the command


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("beside", [False, True])
def test_the_loss_of_a_batch_and_its_numbers(cache, model, average, beside):
    """Oracle: the textbook formula, on sums or means over an answer's tokens."""
    script = load_script("dpo")
    config = script.DPOConfig(beta=0.7, average_logprob=average, label_smoothing=0.1)
    torch.manual_seed(1)
    policy = mm.MiniMind(model.config)
    data = batches(cache)
    data.set_reference("x", preferences.reference_logprobs(model, batches(cache, shuffle=False), CPU))
    batch = next(iter(data))
    got = script.make_loss(config, model if beside else None)(Engine(policy), batch)
    tokens = answer_lengths(batch) if average else torch.ones(1)
    ours, theirs = (answer_logprobs(m, batch)[0] / tokens for m in (policy, model))
    ratio = ours - theirs
    margin = 0.7 * (ratio[:, 0] - ratio[:, 1])
    want = -(0.9 * margin.sigmoid().log() + 0.1 * (-margin).sigmoid().log()).sum()
    torch.testing.assert_close(got.total, want, atol=1e-4, rtol=1e-4)
    assert got.aux is None and set(got.metrics) == {"reward_margin", "accuracy", "chosen_logprob", "rejected_logprob"}
    torch.testing.assert_close(got.metrics["reward_margin"], margin.sum(), atol=1e-4, rtol=1e-4)
    assert got.metrics["accuracy"] == (margin > 0).sum()
    torch.testing.assert_close(got.metrics["rejected_logprob"], ours[:, 1].sum(), atol=1e-4, rtol=1e-4)
    got.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.parameters())


def test_a_rank_without_pairs_adds_nothing(cache, model):
    """More ranks than pairs: a batch of one ignored position still runs forward and backward."""
    data = batches(cache)
    data.set_reference("x", torch.zeros(28, 2))
    empty = data._assemble(np.zeros(0, np.int64))
    policy = mm.MiniMind(model.config)
    script = load_script("dpo")
    got = script.make_loss(script.DPOConfig(), None)(Engine(policy), empty)
    assert empty.num_pairs == 0 and got.total.item() == 0
    got.total.backward()
    assert not any(p.grad is not None and p.grad.abs().max() > 0 for p in policy.parameters())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(beta=0.0), "--beta must be above 0"),
        (dict(label_smoothing=0.5), "--label_smoothing in"),
        (dict(dpo_loss="ipo", label_smoothing=0.1), "IPO has none"),
        (dict(packing=False), "no --no_packing"),
    ],
)
def test_options_that_cannot_be(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_script("dpo").DPOConfig(**changes).check()


WANDB = """
class Run:
    def __init__(self, id="", **given):
        self.id = id or "first"
        print("wandb begins:", given["project"], given["name"], self.id, given.get("resume"), flush=True)
def log(numbers, step):
    print("wandb step", step, flush=True)
def finish():
    pass
init = Run
"""


def test_the_command_learns_the_sample_and_resumes_to_the_bit(model, tokenizer, tmp_path):
    """By a recipe, and with a tracker."""
    (tmp_path / "wandb.py").write_text(WANDB)
    where = dict(before=f"import sys; sys.path.insert(0, {str(tmp_path)!r})", env={"PYTHONPATH": str(tmp_path)})
    mm.save_pretrained(model, tmp_path / "sft" / "weights", tokenizer=tokenizer)
    args = ["--save_dir", tmp_path, "--cache_dir", tmp_path / "cache", "--dtype", "float32", "--max_steps", 6]
    args += ["--num_threads", 1, "--log_interval", 1, "--sample_tokens", 0, "--learning_rate", 3e-3, "--batch_size", 2]
    args += ["--save_interval", 3, "--keep_checkpoints", 9, "--max_minutes", 0]
    args += ["--recipe", "minimind3", "--beta2", 0.95, "--use_wandb", "--wandb_project", "mine"]
    out = run("dpo.py", args, **where)
    assert "Recipe minimind3: empty_think_ratio 0.2, whole_turn True.\n" in out, "what was given, it does not set"
    assert "of 200 rows, 0 were given a system prompt and 1" in out and "by seed 42" in out
    assert "wandb begins: mine dpo first None" in out and "wandb step 6" in out
    assert "Data: the shipped sample, for a first try. For a real run: --data_path dpo.jsonl (53 MB" in out
    assert "the reference's log-probabilities of 200 pairs" in out and "accuracy" in out
    log = read_log(tmp_path / "dpo")
    assert log[1]["loss"] == pytest.approx(np.log(2), abs=1e-5) and abs(log[1]["reward_margin"]) < 1e-5
    assert log[6]["loss"] < 0.6 and log[6]["accuracy"] > 0.8 and log[6]["reward_margin"] > 0.2
    assert log[6]["chosen_logprob"] != log[6]["rejected_logprob"]
    assert mm.load_pretrained(tmp_path / "dpo").num_parameters() > 0

    shutil.rmtree(checkpoints(tmp_path / "dpo" / "checkpoints")[-1])
    for file in (tmp_path / "cache").glob("*.reference-*.npy"):
        file.unlink()  # it is rebuilt from the same weights
    out = run("dpo.py", [*args, "--from_resume"], **where)
    assert "Going on from step 3" in out and "wandb begins: mine dpo first allow" in out
    again = read_log(tmp_path / "dpo")
    for step in range(1, 7):
        assert again[step]["loss"] == log[step]["loss"] and again[step]["accuracy"] == log[step]["accuracy"]


def test_a_bad_line_stops_before_training_by_file_and_number(model, tokenizer, tmp_path):
    mm.save_pretrained(model, tmp_path / "sft" / "weights", tokenizer=tokenizer)
    data = write(tmp_path / "pairs.jsonl", [pair("?", "a", "b"), {"chosen": [], "rejected": []}])
    out = run("dpo.py", ["--data_path", data, "--save_dir", tmp_path, "--num_threads", 1], expect=1)
    assert "pairs.jsonl, line 2: chosen: must be a list" in out and "Traceback" not in out
