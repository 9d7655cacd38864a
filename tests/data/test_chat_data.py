"""Which tokens of a chat are learned: each one checked, under three templates and one that drops old thoughts."""

import json
import re

import pytest

from minimind_fast.data import samples
from minimind_fast.data.cache import build_cache
from minimind_fast.data.chats import Chat, ChatEncoder, lay_out, read_chat
from minimind_fast.data.minimind.variety import SYSTEM_PROMPTS, Variety
from minimind_fast.data.packing import PackedBatches
from minimind_fast.data.rows import BadRow, DataError
from minimind_fast.data.tokenizer import Tokenizer

NAMES = ("ours", "minimind2", "minimind3")
EOS = "<|im_end|>"


@pytest.fixture(params=NAMES)
def tokenizer(request):
    return load(request.param, request)


def load(name, request):
    if name == "ours":
        return Tokenizer.load(samples.path("tokenizer"))
    return Tokenizer.load(request.getfixturevalue("shared") / "minimind" / name)


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def encode(tokenizer, turns, **weights):
    """The documents of one chat."""
    (result,) = ChatEncoder(tokenizer, **weights)([{"conversations": turns}], tokenizer)
    assert not isinstance(result, BadRow), result
    return result


def trained(tokenizer, document):
    """The texts of the runs of trained tokens; prints every token, for whom a failure makes look."""
    ids, weights = document
    assert len(ids) == len(weights)
    runs, open_run = [], []
    for index, weight in [*zip(ids, weights, strict=True), (0, 0)]:
        print(f"{weight:3} {tokenizer.token_bytes()[index]!r}")
        if weight:
            open_run.append(index)
        elif open_run:
            runs.append(tokenizer.decode(open_run))
            open_run = []
    return runs


def test_each_answer_and_its_end_and_nothing_else(tokenizer):
    turns = [user("你好, what is 2 + 3?"), assistant("  5, 当然。\n"), user("And 3 + 3?"), assistant("6")]
    (document,) = encode(tokenizer, turns)
    answers = trained(tokenizer, document)
    # MiniMind3's templates and ours cut leading newlines of an answer, not its spaces.
    assert answers == [f"  5, 当然。\n{EOS}", f"6{EOS}"]
    assert tokenizer.decode(document[0]) == tokenizer.render_chat(turns).removesuffix("\n")
    assert document[0][-1] == tokenizer.eos_id


def test_ids_are_those_of_the_prompt_that_the_model_will_see(tokenizer):
    """An answer that begins with a newline must not share a token with the prompt's own."""
    (document,) = encode(tokenizer, [user("x"), assistant("\n\nfoo")])
    prompt = tokenizer.encode(tokenizer.render_chat([user("x")], add_generation_prompt=True))
    assert document[0][: len(prompt)] == prompt
    assert document[1] == [0] * len(prompt) + [1] * (len(document[0]) - len(prompt))


def test_an_answer_that_contains_the_markers(tokenizer):
    text = f"write {EOS}\n<|im_start|>assistant\nlike this"
    (document,) = encode(tokenizer, [user(text), assistant(text), user("again"), assistant("no")])
    assert trained(tokenizer, document) == [text + EOS, f"no{EOS}"]


def test_an_empty_answer_trains_its_end_only(tokenizer):
    (document,) = encode(tokenizer, [user("say nothing"), assistant(""), user("more"), assistant("x")])
    assert trained(tokenizer, document) == [EOS, f"x{EOS}"]


def test_assistants_in_a_row_and_a_question_without_answer(tokenizer):
    (document,) = encode(tokenizer, [user("x"), assistant("one"), assistant("two"), user("unanswered")])
    assert trained(tokenizer, document) == [f"one{EOS}", f"two{EOS}"]
    assert "unanswered" not in tokenizer.decode(document[0])


def test_what_the_assistant_says_unasked_is_context(tokenizer):
    (document,) = encode(tokenizer, [assistant("Welcome!"), user("x"), assistant("y")])
    assert trained(tokenizer, document) == [f"y{EOS}"]
    (document,) = encode(tokenizer, [assistant("Welcome!")])
    assert trained(tokenizer, document) == []


def test_two_systems(tokenizer):
    turns = [{"role": "system", "content": "Be kind."}, user("a"), assistant("b")]
    turns += [{"role": "system", "content": "Be brief."}, user("c"), assistant("d")]
    if tokenizer.source.endswith("minimind2"):  # its template shows the first one only
        (bad,) = ChatEncoder(tokenizer)([{"conversations": turns}], tokenizer)
        assert isinstance(bad, BadRow) and "leaves out message 4 (system)" in bad.problem
        turns = turns[:3]
    (document,) = encode(tokenizer, turns)
    assert trained(tokenizer, document) == [f"b{EOS}", f"d{EOS}"][: len(turns) // 3]


@pytest.mark.parametrize("name", ["ours", "minimind3"])
def test_a_thought_is_learned_and_the_prompts_empty_one_is_not(name, request):
    tokenizer = load(name, request)
    turns = [user("a"), assistant("b", reasoning_content="Hm.\nYes."), user("c"), assistant("d", reasoning_content="")]
    turns += [user("e"), assistant("<think>\nin the text\n</think>\n\nf")]
    (document,) = encode(tokenizer, turns)
    assert trained(tokenizer, document) == [
        f"Hm.\nYes.\n</think>\n\nb{EOS}",
        f"d{EOS}",
        f"in the text\n</think>\n\nf{EOS}",
    ]


@pytest.mark.parametrize("name", ["ours", "minimind3"])
def test_tool_calls_and_results(name, request):
    tokenizer = load(name, request)
    schema = [{"type": "function", "function": {"name": "add", "description": "加", "parameters": {}}}]
    call = [{"name": "add", "arguments": {"a": 1}}, {"function": {"name": "add", "arguments": '{"a": 2}'}}]
    turns = [
        {"role": "system", "content": "", "tools": json.dumps(schema), "tool_calls": "", "reasoning_content": None}
    ]
    turns += [user("sum"), assistant(None, tool_calls=json.dumps(call))]
    turns += [{"role": "tool", "content": "3"}, {"role": "tool", "content": "4"}, assistant("3 and 4")]
    (document,) = encode(tokenizer, turns)
    calls = [f'<tool_call>\n{{"name": "add", "arguments": {{"a": {n}}}}}\n</tool_call>' for n in (1, 2)]
    assert trained(tokenizer, document) == ["\n".join(calls) + EOS, f"3 and 4{EOS}"]
    text = tokenizer.decode(document[0])
    assert "加" in text and text.count("<tool_response>\n") == 2


def test_a_template_that_leaves_tools_out_is_refused(request):
    tokenizer = load("minimind2", request)
    tools = [{"type": "function", "function": {"name": "add"}}]
    for turns, what in (
        ([user("x"), assistant("", tool_calls=[{"name": "add", "arguments": {}}])], "the tool call of message 2"),
        ([{**user("x"), "tools": tools}, assistant("y")], "the tools"),
        ([user("x"), assistant("y"), {"role": "tool", "content": "result"}, assistant("z")], "message 3 (tool)"),
    ):
        (bad,) = ChatEncoder(tokenizer)([{"conversations": turns}], tokenizer)
        assert isinstance(bad, BadRow) and what in bad.problem


def test_rows_without_roles_alternate(tokenizer):
    old = [{"content": "a"}, {"content": "b"}, {"content": "c"}, {"content": "d"}]
    assert encode(tokenizer, old) == encode(tokenizer, [user("a"), assistant("b"), user("c"), assistant("d")])


DROPS_THOUGHTS = """{%- for m in messages -%}
<|im_start|>{{ m.role }}\n
{%- if m.reasoning_content and loop.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif -%}
{{ m.content }}<|im_end|>\n
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"""


def with_template(template):
    base = Tokenizer.load(samples.path("tokenizer"))
    return Tokenizer(base.backend, {**base.config, "chat_template": template}, source="the folder")


def test_a_template_that_drops_old_thoughts_gives_a_document_for_each_view():
    tokenizer = with_template(DROPS_THOUGHTS)
    turns = [user("a"), assistant("b", reasoning_content="T1"), user("c"), assistant("d"), user("e"), assistant("f")]
    first, second = encode(tokenizer, turns)
    assert trained(tokenizer, first) == [f"<think>\nT1\n</think>\n\nb{EOS}"]
    # b without its thought is what the model sees later; it would never write it so.
    assert trained(tokenizer, second) == [f"d{EOS}", f"f{EOS}"]
    assert "T1" not in tokenizer.decode(second[0])


def test_templates_that_cannot_be_followed_say_so():
    chat = Chat([user("a"), assistant("b")])
    no_end = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    no_end += "{% if add_generation_prompt %}assistant: {% endif %}"
    with pytest.raises(ValueError, match=r"message 2: .* does not end an answer with <\|im_end\|>"):
        lay_out(with_template(no_end), chat)
    other_prompt = no_end.replace("assistant: ", "bot: ").replace("\n{%", "<|im_end|>\n{%")
    with pytest.raises(
        ValueError, match="message 2: .* of the folder does not begin an answer with its generation prompt"
    ):
        lay_out(with_template(other_prompt), chat)


def test_the_template_is_part_of_the_cache_key():
    one, other = with_template(DROPS_THOUGHTS), with_template(DROPS_THOUGHTS + " ")
    assert one.fingerprint == other.fingerprint
    names = {ChatEncoder(one).name, ChatEncoder(other).name, ChatEncoder(one, 10).name}
    assert len(names) == 3 and ChatEncoder(one).name in names


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, 'no field "conversations"'),
        ({"conversations": "x"}, "must be a list"),
        ({"conversations": []}, "at least one message"),
        ({"conversations": ["x"]}, "message 1 must be an object"),
        ({"conversations": [user("x"), {"role": "bot", "content": "y"}]}, 'message 2: role must be one of .*not "bot"'),
        ({"conversations": [user("x"), {"content": "y"}]}, "message 2: role must be .*not null"),
        ({"conversations": [user("x"), {"role": "assistant"}]}, 'message 2: "content" must be a string'),
        ({"conversations": [user(5), assistant("y")]}, 'message 1: "content" must be a string'),
        ({"conversations": [user("x"), assistant("y", reasoning_content=3)]}, '"reasoning_content" must be a string'),
        ({"conversations": [user("x"), assistant("", tool_calls="{oops")]}, "message 2: tool_calls: not JSON"),
        ({"conversations": [user("x"), assistant("", tool_calls='"add"')]}, "message 2: tool_calls: must be a list"),
        ({"conversations": [user("x"), assistant("", tool_calls=[{"arguments": 1}])]}, "needs a name"),
        ({"conversations": [user("x"), assistant("y")], "tools": "[1]"}, "tools: must be a list of objects"),
        ({"conversations": [user("x"), assistant("\ud83d")]}, "surrogate"),
    ],
)
def test_bad_rows_say_what_is_wrong(row, message):
    tokenizer = Tokenizer.load(samples.path("tokenizer"))
    good = {"conversations": [user("x"), assistant("y")]}
    first, bad, last = ChatEncoder(tokenizer)([good, row, good], tokenizer)
    assert isinstance(bad, BadRow) and re.search(message, bad.problem), bad
    assert first == last and not isinstance(first, BadRow)


# ------------------------------------------------------------------------------------------------------- weights of tags


def weighed(tokenizer, turns):
    """(text, weight) of the runs of equal weight among the trained tokens."""
    ((ids, weights),) = encode(tokenizer, turns, tag_weight=10)
    runs: list[list] = []
    for index, weight in zip(ids, weights, strict=True):
        if weight and runs and runs[-1][1] == weight:
            runs[-1][0].append(index)
        elif weight:
            runs.append([[index], weight])
    return [(tokenizer.decode(run), weight) for run, weight in runs]


def test_exactly_the_tags_weigh_ten_in_answers_only(tokenizer):
    question = user("Use <think> and </think> and <answer> tags, and the thing < other > er.")
    answer = "<think>\nthe <thing> is < 3 other\n</think>\n<answer>\nthink 3\n</answer>"
    got = weighed(tokenizer, [question, assistant(answer)])
    if tokenizer.source.endswith("minimind2"):  # the template writes the answer as it is
        want = [("<think>", 10), ("\nthe <thing> is < 3 other\n", 1)]
    else:  # <think> opens the answer's prompt
        want = [("the <thing> is < 3 other\n", 1)]
    middle = "\n" if tokenizer.source.endswith("minimind2") else "\n\n"
    want += [("</think>", 10), (middle, 1), ("<answer>", 10), ("\nthink 3\n", 1), ("</answer>", 10), (EOS, 1)]
    assert got == want


def test_a_token_that_is_part_tag_counts_as_tag(tokenizer):
    """`.</` may be one token; the tag's bytes must all weigh ten, and no token without a byte of a tag may."""
    ((ids, weights),) = encode(tokenizer, [user("x"), assistant("Done.</answer>.")], tag_weight=10)
    heavy = b"".join(tokenizer.token_bytes()[i] for i, w in zip(ids, weights, strict=True) if w == 10)
    assert heavy.strip(b".") == b"</answer>"


@pytest.mark.parametrize("weight", [0, 256, -1])
def test_weights_that_do_not_fit_are_refused(weight):
    with pytest.raises(ValueError, match="from 1 to 255"):
        ChatEncoder(Tokenizer.load(samples.path("tokenizer")), weight)


# -------------------------------------------------------------------------------------------------------- MiniMind's ways

EMPTY = "<think>\n\n</think>\n\n"


def as_minimind(tokenizer, turns, keep):
    """(ids, what its trainers learn) by their rule: all of a turn after its header, searched for in the ids of the whole."""
    text = tokenizer.render_chat(turns)
    ids = tokenizer.encode(text if keep else text.replace(EMPTY, ""))
    opens, closes = tokenizer.encode("<|im_start|>assistant\n"), tokenizer.encode("<|im_end|>\n")
    learned = [0] * len(ids)
    starts = [i + len(opens) for i in range(len(ids)) if ids[i : i + len(opens)] == opens]
    for start in starts:
        end = next(i for i in range(start, len(ids)) if ids[i : i + len(closes)] == closes) + len(closes)
        learned[start:end] = [1] * (end - start)
    return ids, learned


TURNS = {
    "plain": [user("你好"), assistant("5, 当然。")],
    "several": [{"role": "system", "content": "Be brief."}, user("a"), assistant("b"), user("c"), assistant("d e")],
    "thought": [user("a"), assistant("b", reasoning_content="Hm.\nYes."), user("c"), assistant("d")],
}


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("turns", TURNS.values(), ids=TURNS)
@pytest.mark.parametrize("name", ["ours", "minimind3"])
def test_whole_turns_and_dropped_thoughts_are_minimind_s_ids_and_labels(name, turns, keep, request):
    tokenizer = load(name, request)
    ((ids, weights),) = encode(tokenizer, turns, variety=Variety(empty_think_ratio=float(keep), whole_turn=True))
    assert (list(ids), list(weights)) == as_minimind(tokenizer, turns, keep)
    ((ids, weights),) = encode(tokenizer, turns, variety=Variety(empty_think_ratio=float(keep)))
    assert EOS + "\n" not in "".join(trained(tokenizer, (ids, weights))), "the newline is learned with whole turns only"
    assert tokenizer.decode(ids).count(EMPTY) == keep * tokenizer.render_chat(turns).count(EMPTY)


def test_a_row_is_drawn_by_seed_and_content_at_minimind_s_rates():
    draws = [Variety(0.2, 0.2).draw({"n": i}) for i in range(4000)]
    # Four standard deviations of 4000 draws are 0.025, for both together 0.012.
    assert abs(sum(d.system is not None for d in draws) / 4000 - 0.2) < 0.025
    assert abs(sum(not d.drops for d in draws) / 4000 - 0.2) < 0.025
    assert abs(sum(d.system is not None and not d.drops for d in draws) / 4000 - 0.04) < 0.012, "they are independent"
    assert {d.system for d in draws} == {None, *SYSTEM_PROMPTS}
    assert [Variety(0.2, 0.2, seed=7).draw({"n": i}) for i in range(99)] != draws[:99]


def test_draws_do_not_hang_on_the_order_and_the_log_counts_them(tmp_path):
    tokenizer = Tokenizer.load(samples.path("tokenizer"))
    rows = [{"conversations": [user(f"q{i}"), assistant("a")]} for i in range(60)]
    encoder = ChatEncoder(tokenizer, variety=Variety(0.5, 0.5))
    texts = [tokenizer.decode(documents[0][0]) for documents in encoder(rows, tokenizer)]
    again = ChatEncoder(tokenizer, variety=Variety(0.5, 0.5))(rows[::-1], tokenizer)
    assert [tokenizer.decode(documents[0][0]) for documents in again] == texts[::-1]
    other = ChatEncoder(tokenizer, variety=Variety(0.5, 0.5, seed=7))
    assert [tokenizer.decode(d[0][0]) for d in other(rows, tokenizer)] != texts and other.name != encoder.name

    file, said = tmp_path / "chats.jsonl", []
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for _ in range(2):  # made, and found
        build_cache(file, tokenizer, encode=ChatEncoder(tokenizer, variety=Variety(0.5, 0.5)), log=said.append)
    systems, shorter = (
        sum(map(test, texts)) for test in (lambda t: "<|im_start|>system" in t, lambda t: EMPTY not in t)
    )
    assert 15 < systems < 45 and 15 < shorter < 45
    counts = f"of 60 rows, {systems} were given a system prompt and {shorter} lost their empty thoughts (by seed 42;"
    assert [line.startswith(counts) for line in said if "rows" in line] == [True, True]


def test_no_system_prompt_where_there_is_one_or_are_tools(request):
    tokenizer = load("minimind3", request)
    tools = [{"type": "function", "function": {"name": "add"}}]
    always = Variety(system_ratio=1.0)
    own, with_tools = [{"role": "system", "content": "Mine."}, user("a"), assistant("b")], [user("a"), assistant("b")]
    rows = [{"conversations": own}, {"conversations": with_tools, "tools": tools}]
    assert ChatEncoder(tokenizer, variety=always)(rows, tokenizer) == ChatEncoder(tokenizer)(rows, tokenizer)
    unlearned = {"conversations": [user("a"), assistant("b", weight=0), user("c"), assistant("d")]}
    ((document,),) = ChatEncoder(tokenizer, variety=always)([unlearned], tokenizer)
    assert trained(tokenizer, document) == [f"d{EOS}"] and "<|im_start|>system" in tokenizer.decode(document[0])


def test_nothing_varied_is_the_cache_of_before():
    tokenizer = Tokenizer.load(samples.path("tokenizer"))
    assert ChatEncoder(tokenizer).name == ChatEncoder(tokenizer, variety=Variety(seed=7)).name
    names = {
        ChatEncoder(tokenizer, variety=v).name
        for v in (Variety(), Variety(0.1), Variety(0.0, 0.5), Variety(whole_turn=True))
    }
    assert len(names) == 4


# ------------------------------------------------------------------------------------------------------------ truncation


def test_truncation_in_an_answer_and_a_chat_whose_answers_are_cut_away(tmp_path, tokenizer):
    prompt = tokenizer.encode(tokenizer.render_chat([user("x")], add_generation_prompt=True))
    long = "word " * 300
    chats = [[user("x"), assistant(long)], [user(long), assistant("y")], [user("x"), assistant("z")]]
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({"conversations": chat}) + "\n" for chat in chats), encoding="utf-8")
    cache = build_cache(file, tokenizer, cache_dir=tmp_path / "cache", encode=ChatEncoder(tokenizer))
    positions = len(prompt) + 40
    data = PackedBatches(cache, batch_tokens=positions, max_seq_len=positions, seed=0, truncate=True, shuffle=False)
    assert data.num_without_targets == 1 and data.num_pieces == 2
    batches = list(data)
    cut = tokenizer.encode(long)[:41]  # the last position's target is one token further
    targets = [b.targets[b.targets != -100].tolist() for b in batches]
    assert sum(targets, []) == [*cut, *tokenizer.encode(f"z{EOS}")]
    assert [b.num_targets for b in batches] == [len(t) for t in targets] and min(b.num_targets for b in batches) > 0

    file.write_text(json.dumps({"conversations": chats[1]}) + "\n", encoding="utf-8")
    cache = build_cache(file, tokenizer, cache_dir=tmp_path / "cache", encode=ChatEncoder(tokenizer))
    with pytest.raises(DataError, match="no document with at least one target"):
        PackedBatches(cache, batch_tokens=positions, max_seq_len=positions, seed=0, truncate=True)


# ------------------------------------------------------------------------------------------------- real data, slow oracle


def slow_oracle(tokenizer, turns, tools):
    """Trained tokens by another road: the whole text is encoded once, and the answers are cut out by scanning it."""
    text = tokenizer.render_chat(turns, tools)
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    opening = "<|im_start|>assistant\n"
    count = 0
    at = 0
    for turn in turns:
        if turn["role"] != "assistant":
            continue
        at = text.index(opening, at) + len(opening)
        end = text.index(EOS, at) + len(EOS)
        if text.startswith("<think>\n\n</think>\n\n", at):
            begin = at + len("<think>\n\n</think>\n\n")
        elif text.startswith("<think>\n", at):
            begin = at + len("<think>\n")
        else:
            begin = at
        count += sum(first >= begin and last <= end for first, last in encoding.offsets)
        at = end
    return len(encoding.ids), count


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("file", ["sft_real.jsonl", "sft_tools_real.jsonl"])
def test_real_chats_have_the_oracles_counts(name, file, shared, request):
    tokenizer = load(name, request)
    if name == "minimind2" and "tools" in file:
        pytest.skip("MiniMind2's template has no tools: such rows are refused, see above")
    with (shared / "data" / file).open(encoding="utf-8") as lines:
        rows = [json.loads(line) for _, line in zip(range(200), lines, strict=False)]
    for row, result in zip(rows, ChatEncoder(tokenizer)(rows, tokenizer), strict=True):
        assert not isinstance(result, BadRow), result
        ((ids, weights),) = result
        chat = read_chat(row)
        assert isinstance(chat, Chat)
        whole, count = slow_oracle(tokenizer, chat.messages, chat.tools)
        assert chat.messages[-1]["role"] == "assistant"
        assert (len(ids), sum(weights)) == (whole - 1, count)  # the oracle's text ends with a newline
