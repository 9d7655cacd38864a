"""What clients send that would vanish or change its meaning: seen by the model, or refused."""

import json

import pytest

from minimind_fast.data import samples
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.serve.output import parse_call
from minimind_fast.serve.prompt import chat_prompt
from minimind_fast.serve.protocol import ApiError, Defaults, read_chat

ASK = {"role": "user", "content": "What is 3?"}
YES = {"role": "assistant", "content": "yes"}
SYSTEM = {"role": "system", "content": "Be kind."}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def called(**function):
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": function}]}


@pytest.mark.parametrize(
    ("messages", "missing"),
    [
        ([SYSTEM, ASK, YES, ASK], None),
        ([SYSTEM, ASK, YES, SYSTEM, ASK], r"message 4 \(system\)"),
        ([ASK, {"role": "tool", "content": "3"}], r"message 2 \(tool\)"),
        ([ASK, {**YES, "reasoning_content": "hm"}, ASK], "the thought of message 2"),
        (
            [ASK, called(name="add", arguments='{"a": 1}'), {"role": "tool", "content": "3"}],
            "the tool call of message 2",
        ),
    ],
)
def test_what_a_template_leaves_out_is_refused(messages, missing, shared):
    ask = read_chat({"messages": messages}, Defaults())
    chat_prompt(Tokenizer.load(samples.path("tokenizer")), ask)
    theirs = Tokenizer.load(shared / "minimind" / "minimind2")
    if missing is None:
        chat_prompt(theirs, ask)
        return
    with pytest.raises(ApiError, match=f"leaves out {missing}") as error:
        chat_prompt(theirs, ask)
    assert error.value.status == 400


@pytest.mark.parametrize("function", [{}, {"arguments": ""}, {"arguments": None}, {"arguments": "{}"}])
def test_a_call_without_arguments_in_the_history(function):
    ask = read_chat({"messages": [ASK, called(name="add", **function)], "tools": TOOLS}, Defaults())
    assert ask.messages[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": "{}"}


@pytest.mark.parametrize("arguments", ["{not json", "3", "[]"])
def test_arguments_that_are_no_object_are_refused(arguments):
    with pytest.raises(ApiError, match="must be a JSON object"):
        read_chat({"messages": [ASK, called(name="add", arguments=arguments)], "tools": TOOLS}, Defaults())


def test_one_call_at_a_time_cannot_be_promised():
    body = {"messages": [ASK], "tools": TOOLS}
    read_chat({**body, "parallel_tool_calls": True}, Defaults())
    with pytest.raises(ApiError, match="parallel_tool_calls: only true is supported"):
        read_chat({**body, "parallel_tool_calls": False}, Defaults())


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ({"name": "add", "arguments": {"a": 1}}, {"a": 1}),
        ({"name": "add", "parameters": {"a": 1}}, {"a": 1}),
        ({"name": "add", "arguments": '{"a": 1}'}, {"a": 1}),
        ({"name": "add", "arguments": ""}, {}),
        ({"name": "add"}, {}),
    ],
)
def test_a_call_as_models_write_it(written, arguments):
    call = parse_call(json.dumps(written))
    assert call is not None and call[0] == "add" and json.loads(call[1]) == arguments


@pytest.mark.parametrize(
    "written", ["{", "3", '{"name": "add", "arguments": [1]}', '{"arguments": {}}', '{"name": ""}']
)
def test_text_that_is_no_call(written):
    assert parse_call(written) is None
