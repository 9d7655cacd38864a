"""What people bring: each case file with its right value; formats, containers, fields, templates.

`cases/` holds one file for each way in which data have been wrong, or right, in public reports.
"""

import bz2
import gzip
import json
import lzma
import shutil
from pathlib import Path

import pytest

from minimind_fast.data import samples
from minimind_fast.data.cache import build_cache, encode_pretrain
from minimind_fast.data.chats import Chat, ChatEncoder, read_chat
from minimind_fast.data.complete import check_complete
from minimind_fast.data.containers import expand
from minimind_fast.data.fields import read_arguments
from minimind_fast.data.formats import Formats
from minimind_fast.data.pairs import PairEncoder
from minimind_fast.data.rows import read_json, read_texts
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.errors import DataError, UserError

CASES = Path(__file__).parent / "cases"
END = "<|im_end|>"


@pytest.fixture(scope="module")
def ours():
    return Tokenizer.load(samples.path("tokenizer"))


def read(path, tokenizer, folder, encode=None, **how):
    """(what the log said, [(text, trained text)]) of each document."""
    said: list[str] = []
    name = Path(path).name
    if encode is None:
        encode = encode_pretrain
        if name.startswith("chat"):
            encode = ChatEncoder(tokenizer)
        elif name.startswith("dpo"):
            encode = PairEncoder(tokenizer)
    cache = build_cache(path, tokenizer, cache_dir=folder, encode=encode, log=said.append, **how)
    documents = []
    for i in range(cache.num_docs):
        ids = cache.document(i).tolist()
        mask = [1] * len(ids) if cache.mask is None else cache.mask[cache.offsets[i] : cache.offsets[i + 1]].tolist()
        trained = [index for index, weight in zip(ids, mask, strict=True) if weight]
        documents.append((tokenizer.decode(ids), tokenizer.decode(trained)))
    return said, documents


# File -> what its last document trains; more words that its text must hold follow.
READ = {
    "array.json": ("<|im_start|>c d<|im_end|>",),
    "bom.jsonl": ("<|im_start|>second<|im_end|>",),
    "chat_alpaca.jsonl": ("hello<|im_end|>", "user\nhi"),
    "chat_asst_first.jsonl": ("ok<|im_end|>", "Welcome!"),
    "chat_empty_asst.jsonl": (END,),
    "chat_loss_false.jsonl": ("GOOD<|im_end|>", "BAD"),
    "chat_weight0.jsonl": ("GOOD<|im_end|>", "BAD"),
    "chat_messages.jsonl": ("hello<|im_end|>",),
    "chat_parts.jsonl": ("ok<|im_end|>", "user\nhi"),
    "chat_prompt_completion.jsonl": ("hello<|im_end|>", "user\nhi"),
    "chat_sharegpt.jsonl": ("hello<|im_end|>", "user\nhi"),
    "chat_sharegpt_sysfield.jsonl": ("arr<|im_end|>", "system\nSpeak like a pirate."),
    "chat_sys_middle.jsonl": ("hello<|im_end|>go away<|im_end|>", "system\nBe rude."),
    "chat_two_sys.jsonl": ("go away<|im_end|>", "one.", "two."),
    "chat_think_multi.jsonl": ("r1\n</think>\n\nok<|im_end|>r2\n</think>\n\nok2<|im_end|>",),
    "chat_tool_emptyargs.jsonl": (
        '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call><|im_end|>3<|im_end|>',
        "<tool_response>\n3",
    ),
    "chat_ws_asst.jsonl": ("  lead and trail \n\n<|im_end|>",),
    "crlf.jsonl": ("<|im_start|>second<|im_end|>",),
    "dpo_multi.jsonl": ("bad<|im_end|>", "same"),
    "dpo_multi_early.jsonl": ("y<|im_end|>bad<|im_end|>",),
    "dpo_same_score.jsonl": ("b<|im_end|>",),
    "dpo_think.jsonl": ("u\n</think>\n\na<|im_end|>",),
    "dpo_trl_expl.jsonl": ("b<|im_end|>", "user\nq"),
    "dpo_trl_str.jsonl": ("b<|im_end|>", "user\nq"),
    "dpo_usermeta.jsonl": ("b<|im_end|>", "user\nq"),
    "ls_2028.jsonl": ("<|im_start|>one\u2028two\u2029three\x85four<|im_end|>",),
    "nul_escape.jsonl": ("<|im_start|>a\0b<|im_end|>",),
    "pretty.json": ("<|im_start|>c d<|im_end|>",),
    "surrogate_pair.jsonl": ("<|im_start|>😀<|im_end|>",),
    "z.jsonl.gz": ("<|im_start|>hi<|im_end|>",),
}
# File -> what its error says.
REFUSED = {
    "bom_only.jsonl": "no usable document",
    "caps.jsonl": 'line 1: has no field "text" (its fields: Text)',
    "chat_empty.jsonl": "at least one message",
    "chat_num.jsonl": 'line 1: message 1: "content" must be a string',
    "chat_role_gpt.jsonl": 'role must be one of system, user, assistant, tool, not "human"',
    "chat_tool_badargs.jsonl": "line 1: message 2: tool_calls: the arguments of add are not JSON",
    "chat_tool_fn_str.jsonl": 'line 1: message 2: tool_calls: "function" must be an object',
    "chat_tools_notlist.jsonl": "line 1: tools: must be a list of objects",
    "cr_only.jsonl": "line 1: lines end in a carriage return alone",
    "dpo_diffprompt.jsonl": "part at message 1",
    "dpo_prefix.jsonl": "part at message 3",
    "dpo_same.jsonl": "are the same",
    "dpo_same_meta.jsonl": "are the same",
    "dpo_null_rej.jsonl": 'rejected: message 2: "content" must be a string',
    "dupkeys.jsonl": 'the field "text" comes twice',
    "gbk.jsonl": "line 1: not UTF-8",
    "html.jsonl": "is a web page",
    "lfs_pointer.jsonl": "is a Git LFS pointer",
    "null.jsonl": 'line 1: "text" is null',
    "plain.txt": "line 1: not JSON",
    "surrogate_lone.jsonl": "line 1: .*half of a surrogate pair",
    "table.csv": "is a table (CSV)",
    "trunc.jsonl": "line 2: not JSON",
    "two_on_line.jsonl": "line 1: not JSON: Extra data",
    "z.jsonl.zst": "compressed file is damaged",  # its frame is
    "z.parquet": "is Parquet, but damaged",
}


@pytest.mark.parametrize("name", READ)
def test_a_case_that_is_read_trains_what_it_says(name, ours, tmp_path):
    trained, *words = READ[name]
    _, documents = read(CASES / name, ours, tmp_path)
    assert documents[-1][1] == trained
    assert all(word in documents[-1][0] for word in words)


@pytest.mark.parametrize("name", REFUSED)
def test_a_case_that_is_refused_says_why(name, ours, tmp_path):
    with pytest.raises(DataError) as error:
        read(CASES / name, ours, tmp_path)
    words = REFUSED[name].split(".*")
    assert str(CASES / name) in str(error.value) and all(word in str(error.value) for word in words), error.value


def test_a_row_that_is_refused_is_left_out_where_asked(ours, tmp_path):
    good = json.dumps({"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    for name in ("chat_tool_fn_str.jsonl", "chat_tool_badargs.jsonl", "chat_num.jsonl"):
        path = tmp_path / name
        path.write_text((CASES / name).read_text(encoding="utf-8") + "\n" + good, encoding="utf-8")
        said, documents = read(path, ours, tmp_path, on_bad_line="skip")
        assert [trained for _, trained in documents] == [f"b{END}"] and "left out 1 unusable lines" in said[-1]


# ------------------------------------------------------------------------------------------------------------- formats

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
B = {"role": "assistant", "content": "b"}
S = {"role": "system", "content": "s"}
CALL = {"name": "f", "arguments": {"x": 1}}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
CHATS = [
    ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [Q, A]),
    ("sharegpt", {"conversation": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]}, [Q, A]),
    (
        "sharegpt",
        {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        [S, Q, A],
    ),
    (
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "7"},
                {"from": "gpt", "value": "a"},
            ]
        },
        [Q, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "7"}, A],
    ),
    ("openai", {"messages": [S, Q, A], "id": 3}, [S, Q, A]),
    ("openai", {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, A]}, [Q, A]),
    (
        "openai",
        {"messages": [Q, {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": ""}}]},
        [Q, {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}],
    ),
    ("alpaca", {"instruction": "q", "input": "", "output": "a", "system": "s"}, [S, Q, A]),
    ("alpaca", {"instruction": "q", "input": "i", "output": "a"}, [{"role": "user", "content": "q\ni"}, A]),
    ("alpaca", {"instruction": "q", "output": "a", "history": [["q", "b"]]}, [Q, B, Q, A]),
    ("trl", {"prompt": "q", "completion": "a"}, [Q, A]),
    ("trl", {"prompt": [S, Q], "completion": [A], "source": "x"}, [S, Q, A]),
    ("trl", {"prompt": [Q], "answer": "3"}, [Q]),
    ("minimind", {"conversations": [{"content": "q"}, {"content": "a"}]}, [Q, A]),
]


@pytest.mark.parametrize(("name", "row", "messages"), CHATS)
def test_a_row_of_each_format_becomes_the_same_chat(name, row, messages):
    for forced in ("auto", name):
        formats = Formats("chats", forced)
        chat = read_chat(formats.adapt(row))
        assert isinstance(chat, Chat) and chat.messages == messages
        assert len(formats.seen) == 1
    with pytest.raises(DataError, match=f"not of --data_format {'alpaca' if name != 'alpaca' else 'openai'}"):
        Formats("chats", "alpaca" if name != "alpaca" else "openai").adapt(row)


PAIRS = [
    {"prompt": "q", "chosen": "a", "rejected": "b"},
    {"prompt": [Q], "chosen": [A], "rejected": [B]},
    {"prompt": "q", "chosen": [Q, A], "rejected": [Q, B], "score_chosen": 8.0},  # UltraFeedback: the prompt is in both
    {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "b"}},
    {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
    {"input": {"messages": [Q]}, "preferred_output": [A], "non_preferred_output": [B]},
    {"chosen": [Q, A], "rejected": [Q, B]},
]  # fmt: skip


@pytest.mark.parametrize("row", PAIRS)
@pytest.mark.parametrize("system", [None, "s"])
def test_pairs_of_each_format_are_the_same_pair(row, system, ours):
    row = row if system is None else {**row, "system": system}
    (documents,) = PairEncoder(ours)([Formats("pairs").adapt(row)], ours)
    before = [] if system is None else [S]
    assert isinstance(documents, list)
    assert [ours.decode(ids) for ids, _ in documents] == [
        ours.render_chat([*before, Q, answer]).rstrip("\n") for answer in (A, B)
    ]


def test_a_prompt_that_is_no_part_of_a_whole_chat_is_refused():
    row = {"prompt": "another", "chosen": [Q, A], "rejected": [Q, B]}
    with pytest.raises(DataError, match='"prompt" is not part of "chosen"'):
        Formats("pairs").adapt(row)


def test_the_log_says_what_a_file_was_taken_for_also_when_it_is_cached(ours, tmp_path):
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for _, row, _ in CHATS[:7]), encoding="utf-8")
    for _ in range(2):
        said, _ = read(path, ours, tmp_path, encode=ChatEncoder(ours))
        assert said[:2] == [
            "mixed.jsonl is taken for ShareGPT's chats (from, value).",
            "mixed.jsonl is taken for OpenAI's chats (messages).",
        ]
    with pytest.raises(DataError, match="line 5: not of --data_format sharegpt"):
        read(path, ours, tmp_path, encode=ChatEncoder(ours), data_format="sharegpt")
    with pytest.raises(DataError, match="--data_format alpaca has no text; choose auto, or of minimind"):
        read(path, ours, tmp_path, data_format="alpaca")


# ---------------------------------------------------------------------------------------------------------- containers

TEXTS = ["first", "天地玄黃 😀", "third"]


def lines(texts=TEXTS):
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


def parquet(texts=TEXTS):
    import io

    import pyarrow as pa
    from pyarrow import parquet as pq

    out = io.BytesIO()
    pq.write_table(pa.table({"text": texts, "id": list(range(len(texts)))}), out)
    return out.getvalue()


def zst(content):
    import zstandard

    return zstandard.ZstdCompressor().compress(content)


CONTAINERS = {
    "plain": lines,
    "gzip": lambda: gzip.compress(lines()),
    "two gzip members": lambda: gzip.compress(lines(TEXTS[:1])) + gzip.compress(lines(TEXTS[1:])),
    "bzip2": lambda: bz2.compress(lines()),
    "xz": lambda: lzma.compress(lines()),
    "zstd": lambda: zst(lines()),
    "two zstd frames": lambda: zst(lines(TEXTS[:1])) + zst(lines(TEXTS[1:])),
    "parquet": parquet,
    "array": lambda: json.dumps([{"text": text} for text in TEXTS]).encode(),
    "pretty array with a mark": lambda: b"\xef\xbb\xbf\n" + json.dumps([{"text": t} for t in TEXTS], indent=2).encode(),
    "gzipped array": lambda: gzip.compress(json.dumps([{"text": t} for t in TEXTS], indent=1).encode()),
}


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("read_bytes", [7, 1 << 20])
def test_a_container_is_known_by_its_bytes_and_not_by_its_name(name, read_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr("minimind_fast.data.containers.READ_BYTES", read_bytes * 8)
    path = tmp_path / "data"
    path.write_bytes(CONTAINERS[name]())
    assert list(read_texts([path], log=lambda _: None)) == TEXTS


@pytest.mark.parametrize("name", [n for n in CONTAINERS if n not in ("plain", "two gzip members", "two zstd frames")])
def test_a_container_that_was_cut_is_never_taken_for_a_whole_one(name, tmp_path):
    content = CONTAINERS[name]()
    for keep in range(8, len(content) - 1, 3):
        path = tmp_path / "data"
        path.write_bytes(content[:keep])
        with pytest.raises(DataError, match="cut short|damaged"):
            list(read_texts([path], log=lambda _: None))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"PK\x03\x04rest", "a zip archive"),
        ("{}".encode("utf-16"), "UTF-16 text"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (gzip.compress(b"a" * 257 + b"ustar" + b"\0" * 300, mtime=0), "a tar archive"),
        (b"ARROW1\0\0", "an Arrow file"),
        (b"%PDF-1.7", "a PDF"),
    ],
)
def test_what_cannot_be_read_is_called_by_its_name(content, what, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"data.jsonl is {what}"):
        list(read_texts([path]))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('[\n{"text": "a"}\n{"text": "b"}]', "line 3: .*a comma is missing"),
        ('[\n{"text": a}, {"text": "long enough to know"}]', "line 2: .*Expecting value"),
        ('[{"text": "a"}]\n[{"text": "b"}]', "line 1: .*something follows its end"),
        ('[{"text": "a"},\n3]', "line 2: a number, not an object"),
    ],
)
def test_an_array_that_is_none_is_named_with_its_line(content, problem, tmp_path):
    path = tmp_path / "data.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=problem):
        list(read_texts([path], log=lambda _: None))


def test_folders_and_globs(ours, tmp_path):
    for name in ("b/two.jsonl", "a.jsonl.gz", ".minimind_fast_cache/no.jsonl", "notes.md", "c.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        content = parquet([name]) if name.endswith("parquet") else lines([name])
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert list(read_texts([tmp_path], log=lambda _: None)) == ["a.jsonl.gz", "b/two.jsonl", "c.parquet"]
    assert expand([tmp_path / "*.jsonl*"]) == [tmp_path / "a.jsonl.gz"]
    assert expand([tmp_path / "**" / "*.jsonl"]) == [tmp_path / "b" / "two.jsonl"]
    (tmp_path / "[x].jsonl").write_bytes(lines(["brackets in a name"]))
    assert expand([tmp_path / "[x].jsonl"]) == [tmp_path / "[x].jsonl"]
    shutil.rmtree(tmp_path / "b")
    (tmp_path / "b").mkdir()
    for path, problem in ((tmp_path / "b", "a folder without data"), (tmp_path / "*.txt", "matches no file")):
        with pytest.raises(DataError, match=problem):
            expand([path])


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    path = tmp_path / "a.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd" + b"\0" * 20)
    with pytest.raises(UserError, match=r'a.zst needs the package zstandard: pip install "minimind_fast\[data\]"'):
        list(read_texts([path]))


# -------------------------------------------------------------------------------------------------------------- fields


@pytest.mark.parametrize("flag", ["weight", "loss", "train", "trainable", "training", "learn"])
@pytest.mark.parametrize(
    ("value", "trained"), [(0, ""), (False, ""), (0.0, ""), (1, "a" + END), (True, "a" + END), (None, "a" + END)]
)
def test_a_flag_on_an_answer_decides_whether_it_is_learned(flag, value, trained, ours):
    turns = [Q, {**A, flag: value}, Q, B]
    ((document,),) = ChatEncoder(ours)([{"conversations": turns}], ours)
    ids, weights = document
    assert ours.decode([i for i, w in zip(ids, weights, strict=True) if w]) == f"{trained}b{END}"
    assert "a" + END in ours.decode(ids)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"conversations": [Q, {**A, "weight": 0.5}]}, 'message 2: "weight" is 0.5'),
        ({"conversations": [Q, {**A, "loss": "no"}]}, 'message 2: "loss" is "no"'),
        ({"conversations": [Q, {**A, "refusal": "I will not"}]}, 'message 2: the field "refusal"'),
        ({"conversations": [{**Q, "images": ["a.png"]}, A]}, 'message 1: the field "images"'),
        ({"conversations": [Q, {**A, "train_detail": [1]}]}, '"train_detail"'),
        ({"weight": 0}, "the row says that it is not to be learned"),
        ({"label": False}, '"label" is false'),
        ({"kto_tag": False}, '"kto_tag" is false'),
        ({"images": ["a.png"]}, 'the field "images"'),
        ({"history": [["q", "a"]]}, 'the field "history"'),
        ({"chat_template_kwargs": {"enable_thinking": True}}, '"chat_template_kwargs"'),
        ({"system": "x", "conversations": [S, Q, A]}, '"system" and the system message say different things'),
        ({"system": "x", "system_prompt": "y"}, "system and system_prompt say different things"),
        ({"system": 3}, '"system" must be a string'),
        ({"conversations": [{"role": "user", "content": [{"type": "image_url"}]}, A]}, "only text parts"),
    ],
)
@pytest.mark.parametrize("kind", ["chat", "pair"])
def test_a_field_that_changes_the_meaning_is_refused_by_name(change, problem, kind, ours):
    row = {"conversations": [Q, A], **change}
    if kind == "chat":
        (result,) = ChatEncoder(ours)([row], ours)
    else:
        turns = row.pop("conversations")
        (result,) = PairEncoder(ours)([{**row, "chosen": turns, "rejected": [*turns[:-1], B]}], ours)
    assert problem in result.problem


def test_fields_that_mean_nothing_pass(ours):
    row = {
        "conversations": [{**Q, "id": 1, "name": "Ann"}, {**A, "weight": 1, "score": 3}],
        "label": True,
        "images": [],
    }
    row |= {"id": 7, "source": "web", "score": 0.1, "history": None, "weight": 1, "system": ""}
    ((document,),) = ChatEncoder(ours)([row], ours)
    assert ours.decode(document[0]) == ours.render_chat([Q, A]).rstrip("\n")


def test_a_pair_cannot_prefer_an_answer_that_is_not_learned(ours):
    (bad,) = PairEncoder(ours)([{"chosen": [Q, {**A, "weight": 0}], "rejected": [Q, B]}], ours)
    assert "chosen: an answer that is not to be learned" in bad.problem


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ({}, {}),
        ({"arguments": None}, {}),
        ({"arguments": ""}, {}),
        ({"arguments": " "}, {}),
        ({"arguments": {}}, {}),
        ({"arguments": '{"a": 1}'}, '{"a": 1}'),
        ({"arguments": {"a": 1}}, {"a": 1}),
        ({"parameters": {"a": 1}}, {"a": 1}),
    ],
)
def test_arguments_of_a_call(function, arguments):
    assert read_arguments({"name": "f", **function}, "here") == arguments


@pytest.mark.parametrize("arguments", ["{not json", "3", "[1]", 3, [1], '"a"', "null", "{" * 100_000])
def test_arguments_that_are_no_object_are_refused(arguments):
    with pytest.raises(DataError, match="here: the arguments of f"):
        read_arguments({"name": "f", "arguments": arguments}, "here")


# ----------------------------------------------------------------------------------------------------------- templates

THOUGHT = {**A, "reasoning_content": "hm"}
RESULT = {"role": "tool", "content": "3"}
CALLED = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


@pytest.mark.parametrize(
    ("messages", "tools", "missing"),
    [
        ([Q, A], None, None),
        ([S, Q, A, Q], None, None),
        ([S, Q, A, S, Q, A], None, "message 4 (system)"),  # the same text, which stands there once
        ([Q, THOUGHT], None, "the thought of message 2"),
        ([Q, {**A, "thinking": "hm"}, Q], None, "the thought of message 2"),
        ([{"role": "user", "content": "What is 3?"}, CALLED, RESULT], None, "the tool call of message 2"),
        ([{"role": "user", "content": "What is 3?"}, A, RESULT, B], None, "message 3 (tool)"),
        ([Q, A], TOOLS, "the tools"),
    ],
)
def test_a_template_that_leaves_something_out_is_told_by_what(messages, tools, missing, ours, shared):
    check_complete(ours, messages, tools)  # ours shows everything
    check_complete(Tokenizer.load(shared / "minimind" / "minimind3"), messages, tools)
    theirs = Tokenizer.load(shared / "minimind" / "minimind2")
    if missing is None:
        check_complete(theirs, messages, tools)
        return
    with pytest.raises(DataError) as error:
        check_complete(theirs, messages, tools)
    assert f"leaves out {missing}" in str(error.value)


def with_template(template):
    base = Tokenizer.load(samples.path("tokenizer"))
    return Tokenizer(base.backend, {**base.config, "chat_template": template}, source="the folder")


def test_arguments_that_a_template_leaves_out_and_thoughts_that_it_drops_later():
    names_only = with_template(
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
        "{% endfor %}"
    )
    with pytest.raises(DataError, match="leaves out the tool call of message 2"):
        check_complete(names_only, [Q, CALLED])
    newest = with_template(
        "{% for m in messages %}{% if loop.last and m.reasoning_content %}{{ m.reasoning_content }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    check_complete(newest, [Q, THOUGHT, Q, A])
    never = with_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(DataError, match="the thought of message 2"):
        check_complete(never, [Q, THOUGHT, Q, A])


# ---------------------------------------------------------------------------------------------------- one JSON value


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"a": 1,\n "b": "\xff"}', "line 2: not UTF-8 .byte 0xff"),
        (b'{"a": 1,\n "b": }', "line 2: not JSON: Expecting value at column 7"),
        (b'{"a": "\\ud83d"}', "half of a surrogate pair"),
        (b"", "line 1: not JSON"),
        (b"[" * 100_000, "not usable JSON"),
    ],
)
def test_a_json_file_that_is_none(content, problem, tmp_path):
    path = tmp_path / "c.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"c.json.*{problem}"):
        read_json(path)
    with pytest.raises(UserError, match=r"no\.json cannot be read: No such file"):
        read_json(tmp_path / "no.json")


def test_a_json_file_with_a_mark_and_carriage_returns(tmp_path):
    path = tmp_path / "c.json"
    path.write_bytes(b'\xef\xbb\xbf{"a":\r\n "\xe5\xa4\xa9"}')
    assert read_json(path) == {"a": "天"}
