"""The command line as a user meets it: chat in a terminal and in a pipe, generate, and errors in sentences."""

import json
import os
import subprocess
import sys

import pytest
import torch

import minimind_fast as mm
from minimind_fast import cli
from minimind_fast.commands.chat import Conversation
from minimind_fast.infer.generate import generate_batch

CLI = [sys.executable, "-m", "minimind_fast.cli"]


@pytest.fixture(scope="module")
def folder(shared, tmp_path_factory):
    """A tiny random MiniMind3 with its tokenizer."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("chat") / "model"
    config = mm.ModelConfig.preset("minimind3", hidden_size=64, num_hidden_layers=2, max_position_embeddings=256)
    mm.save_pretrained(mm.MiniMind(config), path, tokenizer=mm.Tokenizer.load(shared / "minimind" / "minimind3"))
    return path


@pytest.fixture
def conversation(folder):
    return Conversation(mm.Tokenizer.load(folder))


def run(*args, stdin="", env=None):
    environment = {**os.environ, "MINIMIND_DEBUG": "", **(env or {})}
    done = subprocess.run(
        [*CLI, *map(str, args)], input=stdin.encode(), capture_output=True, timeout=60, env=environment
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


# ----------------------------------------------------------------------------------------------------------- command


def test_help_lists_every_command_and_every_command_has_help(capsys):
    assert cli.main([]) == 0
    listed = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert name in listed
        try:
            code = cli.main([name, "--help"])
        except SystemExit as left:
            code = left.code
        assert code == 0
        assert f"minimind-fast {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["chatt"], "unknown command 'chatt'; choose one of train, "),
        (["chat", "nowhere"], "nowhere: no such file or folder"),
        (["chat", "MODEL", "--top_p", "3"], "top_p must be"),
        (["chat", "MODEL", "--tools", "nowhere.json"], "nowhere.json"),
        (["chat", "MODEL", "--dtype", "int4"], "--dtype must be one of"),
        (["chat", "MODEL", "--tokenizer", "nowhere"], "nowhere"),
        (["generate", "MODEL", "--prompt", "a", "--max_new_tokens", "500"], "exceed the model's context of 256"),
        (["generate", "MODEL", "--prompt", "a", "b", "--stop", "x"], "one --prompt"),
    ],
)
def test_mistakes_are_a_line_and_exit_code_2(folder, capsys, args, message):
    assert cli.main([str(folder) if a == "MODEL" else a for a in args]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and len(error.splitlines()) == 1


def test_a_tokenizer_that_is_not_the_model_s_is_refused(folder, shared, capsys):
    assert (
        cli.main(["generate", str(folder), "--tokenizer", str(shared / "minimind" / "minimind2"), "--prompt", "a"]) == 2
    )
    assert "was trained with tokenizer" in capsys.readouterr().err


def test_a_pth_needs_its_tokenizer_and_then_works(folder, shared, tmp_path, capsys):
    config = mm.ModelConfig.preset("minimind2-small")
    file = tmp_path / "full_sft_512.pth"
    mm.save_pretrained(mm.MiniMind(config), file, format="pth")
    assert cli.main(["generate", str(file), "--prompt", "a"]) == 2
    assert "--tokenizer" in capsys.readouterr().err
    rest = [
        "--tokenizer",
        str(shared / "minimind" / "minimind2"),
        "--max_new_tokens",
        "3",
    ]
    assert cli.main(["generate", str(file), "--prompt", "你好", *rest]) == 0
    assert capsys.readouterr().out.startswith("你好")


def test_generate_several_and_one_give_the_same(folder, capsys):
    options = ["--max_new_tokens", "6", "--seed", "1"]
    assert cli.main(["generate", str(folder), "--prompt", "春天", "hello", *options]) == 0
    several = capsys.readouterr().out.strip().split("\n\n")
    assert cli.main(["generate", str(folder), "--prompt", "春天", *options]) == 0
    assert capsys.readouterr().out.strip() == several[0]


def test_unasked_the_answer_is_as_long_as_the_context_allows(folder, capsys):
    assert cli.main(["generate", str(folder), "--prompt", "春天"]) == 0
    prompt = 1 + len(mm.Tokenizer.load(folder).encode("春天"))
    assert f"[{256 - prompt} tokens" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- pipe


def test_a_pipe_gives_the_bare_answer(folder):
    options = ["--max_new_tokens", 8, "--seed", 3]
    code, out, err = run("chat", folder, *options, stdin="你好\n第二行\n")
    assert code == 0 and out.endswith("\n") and len(out.strip()) > 0 and "tokens" in err and ">" not in out
    model, tokenizer = mm.load_pretrained(folder), mm.Tokenizer.load(folder)
    text = tokenizer.render_chat([{"role": "user", "content": "你好\n第二行"}], add_generation_prompt=True)
    ids = generate_batch(model, [tokenizer.encode(text)], max_new_tokens=8, temperature=0.7, top_p=0.9, seed=3)[0]
    assert out.removesuffix("\n") == tokenizer.decode(ids, skip_special_tokens=True)
    assert (
        run("chat", folder, *options, stdin="你好\n第二行\n", env={"LC_ALL": "C", "PYTHONIOENCODING": "utf-8"})[1]
        == out
    )


def test_an_empty_pipe_is_an_error(folder):
    code, out, err = run("chat", folder, stdin="  \n")
    assert code == 2 and out == "" and "standard input is empty" in err


def test_a_reader_that_leaves_is_no_error(folder):
    command = " ".join([*CLI, "chat", str(folder), "--max_new_tokens", "200", "| head -c 1"])
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], input=b"x", capture_output=True, timeout=60)
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr


# ---------------------------------------------------------------------------------------------------------- terminal


def talk(folder, lines, tmp_path, *options):
    """What a terminal shows when a user types these lines."""
    pty = pytest.importorskip("pty")
    parent, child = pty.openpty()
    args = [*CLI, "chat", str(folder), "--max_new_tokens", "5", "--seed", "0", *options]
    process = subprocess.Popen(args, stdin=child, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path)
    os.close(child)
    os.write(parent, "".join(line + "\n" for line in lines).encode() + b"\x04")
    try:
        return process.communicate(timeout=60)[0].decode(), process.returncode
    finally:
        process.kill()
        os.close(parent)


def test_a_session_with_every_command(folder, tmp_path):
    lines = ["/help", "你好", '"""第一行', '第二行"""', "续\\", "行", "/nope", "/think on", "想", "/save a.json"]
    lines += ["/reset", "/system 你是诗人", "再来", "/save b.json", "/exit"]
    shown, code = talk(folder, lines, tmp_path)
    assert code == 0 and "Traceback" not in shown
    assert "/reset" in shown and "error: /nope: not understood" in shown and shown.count("first after") == 5
    saved = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["conversations"]
    assert [m["role"] for m in saved] == ["user", "assistant"] * 4
    assert [m["content"] for m in saved[::2]] == ["你好", "第一行\n第二行", "续\n行", "想"]
    saved = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))["conversations"]
    assert [m["role"] for m in saved] == ["system", "user", "assistant"] and saved[0]["content"] == "你是诗人"


def test_a_question_that_is_too_long_is_told_and_forgotten(folder, tmp_path):
    shown, code = talk(folder, ["很长" * 300, "短", "/save a.json"], tmp_path)
    assert code == 0 and "the context has room for 251: shorten it" in shown
    saved = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["conversations"]
    assert [m["content"] for m in saved[::2]] == ["短"]


def test_a_pretrained_model_continues(folder, tmp_path):
    shown, code = talk(folder, ["春眠", "晓"], tmp_path, "--raw")
    assert code == 0 and shown.count("first after") == 2


# ------------------------------------------------------------------------------------------------------ conversation


def test_the_prompt_is_the_template_s(conversation):
    tools = [{"type": "function", "function": {"name": "now", "parameters": {}}}]
    conversation.system, conversation.tools, conversation.thinking = "短", tools, True
    conversation.ask("一")
    conversation.answer("二")
    conversation.ask("三")
    messages = [
        {"role": "system", "content": "短"},
        {"role": "user", "content": "一"},
        {"role": "assistant", "content": "二"},
        {"role": "user", "content": "三"},
    ]
    text = conversation.tokenizer.render_chat(messages, tools=tools, add_generation_prompt=True, open_thinking=True)
    assert conversation.tokenizer.decode(conversation.prompt(10**6)) == text
    assert text.endswith("<think>\n") and "now" in text


def test_the_oldest_turns_go_first_and_the_system_prompt_stays(conversation):
    conversation.system = "系统"
    for i in range(6):
        conversation.ask(f"问题{i}")
        conversation.answer(f"回答{i}")
    conversation.ask("最后")
    whole = conversation.prompt(10**6)
    cut = conversation.tokenizer.decode(conversation.prompt(len(whole) - 1))
    assert "问题0" not in cut and "回答0" not in cut and "问题1" in cut and "系统" in cut and "最后" in cut
    conversation.history = 2
    cut = conversation.tokenizer.decode(conversation.prompt(10**6))
    assert "问题4" not in cut and "问题5" in cut and "最后" in cut
    with pytest.raises(ValueError, match="shorten it"):
        conversation.prompt(5)


def test_thoughts_are_kept_apart_and_tool_results_belong_to_their_turn(conversation):
    conversation.ask("几点？")
    conversation.answer("要看钟\n</think>\n\n<tool_call>\n{}\n</tool_call>")
    assert conversation.messages[-1]["reasoning_content"] == "要看钟"
    assert conversation.messages[-1]["content"].startswith("<tool_call>")
    conversation.give("三点")
    conversation.history = 1
    text = conversation.tokenizer.decode(conversation.prompt(10**6))
    assert "几点" in text and "<tool_response>\n三点\n</tool_response>" in text
