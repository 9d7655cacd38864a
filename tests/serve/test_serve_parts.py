"""The server's parts by themselves: rows that come and go, turns in the queue, text told apart in any pieces."""

import random

import pytest
import torch
from live_server import TOKENIZER
from test_generate import CASES, GOLDEN

import minimind_fast as mm
from minimind_fast.infer.generate import generate_batch
from minimind_fast.infer.sampling import Sampling
from minimind_fast.infer.slots import Slots
from minimind_fast.serve.batch import Batcher, Event, Job
from minimind_fast.serve.output import Answer, Sections, parse_call
from minimind_fast.serve.queue import FairQueue, Full
from minimind_fast.serve.reply import merged


@pytest.mark.parametrize("name", CASES)
def test_rows_that_come_and_go_at_random_say_what_they_say_alone(name):
    model, draw = mm.load_pretrained(GOLDEN / name), random.Random(0)
    prompts = [[draw.randrange(3, 160) for _ in range(draw.randrange(1, 30))] for _ in range(24)]
    lengths = [draw.randrange(1, 20) for _ in prompts]
    want = [generate_batch(model, [p], max_new_tokens=n, stop_ids=())[0] for p, n in zip(prompts, lengths, strict=True)]
    slots, said, rows, waiting, piece = Slots(model, 5, 64), [[] for _ in prompts], [], list(range(24)), 0
    while waiting or rows:
        new = []
        if waiting and (slots.free or piece):
            row = waiting[0]
            if piece or len(prompts[row]) > 12:
                part = prompts[row][piece : piece + 12]
                piece += len(part)
                logits = slots.begin_piece(part, piece == len(prompts[row]))
                new = [row] if piece == len(prompts[row]) else []
                piece = 0 if new else piece
            else:
                both = [r for r in waiting[:2] if len(prompts[r]) <= 12][: slots.free]
                new = both if waiting[: len(both)] == both else both[:1]
                logits = slots.join([prompts[r] for r in new])
            for r, token in zip(new, logits.argmax(-1).tolist(), strict=False):
                said[r].append(token)
            waiting = waiting[len(new) :]
            rows += new
        for i in reversed(range(len(rows))):
            if len(said[rows[i]]) == lengths[rows[i]]:
                slots.leave(i)
                rows[i] = rows[-1]
                rows.pop()
        if rows:
            tokens = slots.step(torch.tensor([said[r][-1] for r in rows])).argmax(-1).tolist()
            for r, token in zip(rows, tokens, strict=True):
                said[r].append(token)
    assert said == want
    assert float(slots.cache.abs().max()) == 0  # every row was wiped


def test_clients_take_turns():
    queue = FairQueue(10)
    for i in range(4):
        queue.put("greedy", f"g{i}")
    queue.put("modest", "m0")
    queue.put("late", "l0")
    queue.put("modest", "m1")
    assert queue.remove("greedy", "g1") and not queue.remove("greedy", "g1")
    assert not queue.remove("nobody", "g1")
    assert queue.peek() == "g0"
    assert [queue.pop() for _ in range(len(queue))] == ["g0", "m0", "l0", "g2", "m1", "g3"]
    assert not queue


def test_the_queue_is_bounded_and_one_client_cannot_shut_others_out():
    queue = FairQueue(4)
    queue.put("a", 0)
    for i in range(2):
        queue.put("b", i)
    with pytest.raises(Full):
        queue.put("b", 2)
    queue.put("a", 1)
    with pytest.raises(Full):
        queue.put("c", 0)
    assert len(queue) == 4


def test_a_long_prompt_delays_a_running_row_by_one_piece_a_turn():
    model = mm.load_pretrained(GOLDEN / CASES[0])
    batcher, given = Batcher(model, 4, 256, 8, prefill_chunk=8), []
    batcher._deliver = lambda events: given.extend((job.client, event.token) for job, event in events)
    job = {"sampling": Sampling(), "seed": 0, "stop_ids": frozenset()}
    batcher.submit(Job([5], 100, **job, client="short"))
    batcher._turn()
    batcher.submit(Job([7] * 80, 5, **job, client="long"))
    batcher.submit(Job([9], 5, **job, client="third"))
    for turn in range(1, 10):
        batcher._turn()
        assert [c for c, _ in given].count("short") == turn + 2
    assert "long" not in [c for c, _ in given]
    batcher._turn()
    assert [c for c, _ in given].count("long") == 2  # its first token, and one of this turn's step
    batcher._turn()
    assert "third" in [c for c, _ in given]


TEXTS = {
    "plain": ("Hello\n\nthere\n", [("content", "Hello\n\nthere\n")]),
    "thought": ("<think>\nHm <b>\n</think>\n\nYes < no", [("reasoning", "Hm <b>"), ("content", "Yes < no")]),
    "later thought": ("I say <think> aloud", [("content", "I say <think> aloud")]),
    "call": (
        'Look:\n<tool_call>\n{"name": "f", "arguments": {"a": "</x>"}}\n</tool_call>\n',
        [("content", "Look:"), ("call", '{"a": "</x>"}')],
    ),
    "no call": ("<tool_call>\n[1]\n</tool_call>", [("content", "<tool_call>\n[1]\n</tool_call>")]),
    "cut call": ('<tool_call>\n{"na', [("content", '<tool_call>\n{"na')]),
    "empty thought": ("<think>\n\n</think>\n\nYes", [("content", "Yes")]),
}


@pytest.mark.parametrize("text, want", TEXTS.values(), ids=TEXTS)
def test_sections_are_the_same_in_any_pieces(text, want):
    draw = random.Random(1)
    for pieces in range(60):
        sections, deltas, at = Sections(False, True), [], 0
        while at < len(text):
            size = pieces + 1 if pieces < 8 else draw.randrange(1, 12)
            deltas += sections.push(text[at : at + size])
            at += size
        deltas += sections.finish()
        assert [(d.kind, d.text) for d in merged(deltas)] == want


def test_calls_are_read_in_the_forms_that_models_write():
    assert parse_call('{"name": "f"}') == ("f", "{}")
    assert parse_call('{"name": "f", "arguments": "{\\"a\\": 1}"}') == ("f", '{"a": 1}')
    for text in ("", "7", "[]", "{}", '{"name": 3}', '{"name": "f", "arguments": [1]}', "[" * 100_000):
        assert parse_call(text) is None


def test_a_stop_string_that_nearly_comes_is_given_out_after_all():
    ids = TOKENIZER.encode("abc, abd, abe")
    answer, text = Answer(TOKENIZER, ["abx", "be!"]), ""
    for i, token in enumerate(ids):
        finish = "length" if i + 1 == len(ids) else None
        text += "".join(d.text for d in answer.push(Event(token, None, finish)))
    assert (text, answer.finish_reason) == ("abc, abd, abe", "length")
