"""The Modelfile: its template, run by Go's own template engine, gives the text that Jinja gives."""

import json
import os
import shutil
import subprocess

import pytest

import minimind_fast as mm
from minimind_fast.data import samples
from minimind_fast.weights.ollama import Layout, modelfile

TOKENIZERS = ["sample", "minimind2", "minimind3"]
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {}}}}},
    {"type": "function", "function": {"name": "now", "description": "时间 <now>", "parameters": {"type": "object"}}},
]


def call(name: str, arguments: str) -> dict:
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}


SYSTEM, USER = {"role": "system", "content": "你是助手。"}, {"role": "user", "content": "Hello,  世界! <b>1 & 2</b>\n"}
ANSWER = {"role": "assistant", "content": "Hi. 🙂\n\nAnd?"}
ONE, TWO = call("weather", '{"city": "Paris"}'), call("now", "{}")
CHATS = {
    "one": [USER],
    "system": [SYSTEM, USER],
    "rounds": [SYSTEM, USER, ANSWER, USER],
    "thought": [USER, {**ANSWER, "reasoning_content": "hm\nhm"}, USER],
}
TOOL_CHATS = {
    "called": [
        SYSTEM,
        USER,
        {"role": "assistant", "content": "", "tool_calls": [ONE]},
        {"role": "tool", "content": "3"},
    ],
    "twice": [
        USER,
        {"role": "assistant", "content": "Let me see.", "tool_calls": [ONE, TWO]},
        {"role": "tool", "content": '{"t": 3}'},
        {"role": "tool", "content": "noon"},
    ],
    "answered": [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [TWO]},
        {"role": "tool", "content": "noon"},
        ANSWER,
        USER,
    ],
}
# Ollama's own types print themselves as JSON: so do these, which keep Python's spaces.
GO = """
package main

import ("encoding/json"; "io"; "os"; "text/template")

type raw string
func (r raw) String() string { return string(r) }
type Call struct { Function struct { Name string; Arguments raw } }
type Message struct { Role, Content, Thinking string; ToolCalls []Call }
type Tool struct { Function raw }

func main() {
    var all []struct { Template, System string; Messages []*Message; Tools []Tool; Think, IsThinkSet bool }
    text, _ := io.ReadAll(os.Stdin)
    if err := json.Unmarshal(text, &all); err != nil { panic(err) }
    for _, v := range all {
        t := template.Must(template.New("").Option("missingkey=zero").Parse(v.Template))
        values := map[string]any{"System": v.System, "Messages": v.Messages, "Tools": v.Tools, "Response": "",
            "Think": v.Think, "IsThinkSet": v.IsThinkSet}
        if err := t.Execute(os.Stdout, values); err != nil { panic(err) }
        os.Stdout.Write([]byte{0})
    }
}
"""


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    name = request.param
    shared = None if name == "sample" else request.getfixturevalue("shared") / "minimind" / name
    return mm.Tokenizer.load(shared or samples.path("tokenizer"))


@pytest.fixture(scope="module")
def go(tmp_path_factory):
    """Runs templates by Go's text/template, which Ollama uses."""
    if not shutil.which("go"):
        pytest.skip("needs Go to run Ollama's template")
    folder = tmp_path_factory.mktemp("go")
    (folder / "main.go").write_text(GO)
    environment = {**os.environ, "GO111MODULE": "off"}
    subprocess.run(["go", "build", "-o", "run", "main.go"], cwd=folder, check=True, env=environment)

    def run(cases: list[dict]) -> list[str]:
        done = subprocess.run([folder / "run"], input=json.dumps(cases).encode(), stdout=subprocess.PIPE, check=True)
        return done.stdout.decode().split("\0")[:-1]

    return run


def template_of(text: str) -> str:
    return text.split('TEMPLATE """')[1].split('"""')[0]


def as_ollama_has_it(messages: list[dict], tools: list[dict] | None, thinking: bool) -> dict:
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    turns = [
        {
            "Role": m["role"],
            "Content": m["content"],
            "Thinking": m.get("reasoning_content", ""),
            "ToolCalls": [
                {"Function": {k.title(): v for k, v in c["function"].items()}} for c in m.get("tool_calls", [])
            ],
        }
        for m in messages
    ]
    shown = [{"Function": json.dumps(t["function"], ensure_ascii=False)} for t in tools or []]
    return {"System": system, "Messages": turns, "Tools": shown, "Think": thinking, "IsThinkSet": True}


def test_go_lays_chats_out_as_jinja_does(tokenizer, go):
    template = template_of(modelfile(tokenizer, "m.gguf")[0])
    has_tools = "<tools>" in template
    chats = [(name, chat, None) for name, chat in CHATS.items()]
    if has_tools:
        chats += [(f"{name} with tools", chat, TOOLS) for name, chat in {**CHATS, **TOOL_CHATS}.items()]
    cases = [(*case, thinking) for case in chats for thinking in (False, True)]
    given = [{"Template": template, **as_ollama_has_it(chat, tools, thinking)} for _, chat, tools, thinking in cases]
    for (name, chat, tools, thinking), text in zip(cases, go(given), strict=True):
        options = {"open_thinking": True, "enable_thinking": True} if thinking else {"enable_thinking": False}
        assert text == tokenizer.render_chat(chat, tools=tools, add_generation_prompt=True, **options), (name, thinking)


def test_the_pieces_of_the_sample_tokenizer_s_template():
    layout = Layout.measured(mm.Tokenizer.load(samples.path("tokenizer")))
    assert layout.user == ("<|im_start|>user\n", "<|im_end|>\n") and layout.no_system == ""
    assert layout.answer == ("<|im_start|>assistant\n", "<|im_end|>\n")
    assert layout.thought == ("<think>\n", "\n</think>\n\n")
    assert layout.ask == "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert layout.ask_thinking == "<|im_start|>assistant\n<think>\n"
    assert layout.call == ('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>")
    assert layout.result == (
        "<|im_start|>user\n<tool_response>\n",
        "\n<tool_response>\n",
        "\n</tool_response>",
        "<|im_end|>\n",
    )


def test_what_ollama_looks_for_stands_where_it_looks():
    """The tags of thoughts directly around .Thinking; that of calls as the first text below .ToolCalls."""
    template = template_of(modelfile(mm.Tokenizer.load(samples.path("tokenizer")), "m.gguf")[0])
    assert "{{ if .Thinking }}<think>\n{{ .Thinking }}\n</think>\n\n{{ else }}" in template
    assert template.index(".ToolCalls") == template.index("$calls := .ToolCalls") + len("$calls := ")
    assert template.count("{{ if .ToolCalls }}{{ range slice .ToolCalls 0 1 }}<tool_call>\n{") == 1


def test_the_other_lines(tokenizer):
    text, note = modelfile(tokenizer, "m.gguf")
    assert note == "" and text.startswith("FROM ./m.gguf\n")
    assert 'PARAMETER stop "<|im_end|>"\n' in text and "PARAMETER repeat_penalty 1\n" in text


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "has no chat template"),
        ("{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}", "changes earlier turns"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "drops or changes a part"),
        ("{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}", "more than their roles"),
        ("{% for m in messages %}{{ '{{' + m.content }}{% endfor %}", "Go's braces"),
    ],
)
def test_a_template_that_cannot_be_laid_out_again_is_left_out_with_a_note(template, reason):
    tokenizer = mm.Tokenizer.load(samples.path("tokenizer"))
    tokenizer.config["chat_template"] = template
    text, note = modelfile(tokenizer, "m.gguf")
    assert "TEMPLATE" not in text and "no TEMPLATE in it" in note and reason in note
