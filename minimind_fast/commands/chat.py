"""Talking to a model: `minimind-fast chat` and `minimind-fast generate`.

Purpose: a streaming terminal chat, and a command that continues texts; both work in a pipe.
Principle: a `Conversation` holds the messages and renders them with the tokenizer's template, dropping the oldest turns
    when the context is full. Answers go to standard output, the rest (prompts, speed, hints) to standard error.
Properties: if standard input is not a terminal, all of it is one message and only the answer is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minimind_fast.commands.options import add_model_options, add_sampling_options, open_model, sampling_of
from minimind_fast.data import fields
from minimind_fast.data.complete import check_complete
from minimind_fast.data.rows import read_json
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.errors import UserError
from minimind_fast.infer.generate import Stream, generate_batch, stream
from minimind_fast.model import MiniMind

HELP = """\
  /reset            forget the conversation        /system TEXT   set the system prompt (and reset)
  /save FILE        write it as JSON               /think on|off  think before answering
  /tool RESULT      give a tool's result           /exit          leave (also Ctrl-D)
A line that ends with \\ goes on in the next; \"\"\" begins and ends a message of several lines.
Ctrl-C stops an answer."""


class Conversation:
    """The messages so far, and their token ids for the next answer.

    Args:
        tokenizer: must have a chat template.
        system: the system prompt, or "".
        tools: JSON schemas of functions.
        thinking: open the answer with a thought.
        history: turns (a question and what followed) to show the model; 0: all that fit.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        system: str = "",
        tools: Sequence[dict[str, Any]] | None = None,
        thinking: bool = False,
        history: int = 0,
    ) -> None:
        self.tokenizer, self.system, self.tools, self.thinking = tokenizer, system, tools, thinking
        self.history = history
        self.messages: list[dict[str, Any]] = []

    def ask(self, text: str) -> None:
        """Add a question."""
        self.messages.append({"role": "user", "content": text})

    def give(self, result: str) -> None:
        """Add a tool's result."""
        self.messages.append({"role": "tool", "content": result})

    def answer(self, text: str) -> None:
        """Add the model's answer; its thought is stored separately, since templates omit old thoughts.

        A template that knows no thoughts gets the text as it was written, so that nothing of it vanishes.
        """
        whole = message = {"role": "assistant", "content": text}
        thought, closed, rest = text.partition("</think>")
        if closed:
            message = {
                "role": "assistant",
                "content": rest.lstrip("\n"),
                "reasoning_content": thought.replace("<think>", "").strip("\n"),
            }
            try:
                check_complete(self.tokenizer, [{"role": "user", "content": "?"}, message])
            except UserError:
                message = whole
        self.messages.append(message)

    def prompt(self, room: int) -> list[int]:
        """Token ids of the newest turns that fit in `room` tokens.

        Raises:
            UserError: the last question alone does not fit, or the template leaves a message out.
        """
        starts = [i for i, m in enumerate(self.messages) if m["role"] == "user"] or [0]
        if self.history:
            starts = starts[-self.history :]
        head = [{"role": "system", "content": self.system}] if self.system else []
        ids: list[int] = []
        for start in starts:
            messages = head + self.messages[start:]
            thinking = {"open_thinking": True, "enable_thinking": True} if self.thinking else {}
            ids = self.tokenizer.encode(
                self.tokenizer.render_chat(messages, tools=self.tools, add_generation_prompt=True, **thinking)
            )
            if len(ids) <= room:
                check_complete(self.tokenizer, messages, self.tools, add_generation_prompt=True, **thinking)
                return ids
        raise UserError(f"the message has {len(ids)} tokens, the context has room for {room}: shorten it")


def read_tools(file: str | None) -> list[dict[str, Any]] | None:
    """Read tool schemas from a JSON file: a list, or an object with `tools`.

    Raises:
        ValueError: the file does not hold tool schemas.
    """
    if file is None:
        return None
    tools = read_json(file)
    tools = tools.get("tools") if isinstance(tools, dict) else tools
    if not isinstance(tools, list) or not all(isinstance(t, dict) for t in tools):
        raise UserError(f"{file} must hold a JSON list of tool schemas")
    return fields.read_tools(tools, file)


def note(text: str) -> None:
    """Print something that is not part of the answer."""
    print(text, file=sys.stderr, flush=True)


def speed(answer: Stream) -> str:
    """One line about the speed of an answer."""
    n = len(answer.ids)
    rate = f", {(n - 1) / answer.decode_s:.1f} tokens/s" if n > 1 and answer.decode_s else ""
    cut = ", cut at --max_new_tokens" if answer.finish_reason == "length" else ""
    return f"[{n} tokens{rate}, first after {answer.prefill_s:.2f} s{cut}]"


def read_stdin() -> str:
    """All of standard input as text, regardless of the locale."""
    return sys.stdin.buffer.read().decode("utf-8", errors="replace").strip("\n")


def read_message() -> str:
    """Read one message, possibly of several lines, from the terminal.

    Raises:
        EOFError: the user is done.
    """
    line = input("\n> ")
    if line.strip().startswith('"""'):
        lines = [line.strip()[3:]]
        while not lines[-1].endswith('"""'):
            lines.append(input("… "))
        lines[-1] = lines[-1].removesuffix('"""')
        return "\n".join(lines).strip("\n")
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input("… "))
    return "\n".join(lines)


class Chat:
    """A conversation with a model.

    Args:
        model: writes the answers.
        conversation: the messages.
        options: for `generate.stream`.
        raw: continue each text by itself instead of answering (for a pretrained model).
    """

    def __init__(self, model: MiniMind, conversation: Conversation, options: dict[str, Any], raw: bool = False) -> None:
        self.model, self.conversation, self.options, self.raw = model, conversation, options, raw

    def reply(self, text: str | None = None) -> Stream:
        """Stream the answer to standard output; Ctrl-C keeps what has arrived so far.

        Args:
            text: the text to continue (raw only).
        """
        tokenizer, limit = self.conversation.tokenizer, self.model.config.max_position_embeddings
        new = min(self.options["max_new_tokens"], limit - 1)
        talk = self.conversation
        ids = [tokenizer.bos_id, *tokenizer.encode(text or "")] if self.raw else talk.prompt(limit - new)
        answer = stream(self.model, tokenizer, ids, **{**self.options, "max_new_tokens": new})
        pieces = []
        try:
            for piece in answer:
                pieces.append(piece)
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            pass
        print(flush=True)
        if not self.raw:
            self.conversation.answer("".join(pieces))
        return answer

    def command(self, line: str) -> bool:
        """Run a /command; False to leave.

        Raises:
            ValueError: an unknown command, or a missing argument.
        """
        name, _, rest = line.partition(" ")
        rest, talk = rest.strip(), self.conversation
        if name in ("/exit", "/quit"):
            return False
        if name == "/reset":
            talk.messages.clear()
        elif name == "/system":
            talk.system = rest
            talk.messages.clear()
        elif name == "/think" and rest in ("on", "off"):
            talk.thinking = rest == "on"
        elif name == "/save" and rest:
            head = [{"role": "system", "content": talk.system}] if talk.system else []
            content = {"conversations": head + talk.messages}
            Path(rest).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
            note(f"saved to {rest}")
        elif name == "/tool" and rest:
            talk.give(rest)
            try:
                answer = self.reply()
            except UserError:
                talk.messages.pop()
                raise
            note(speed(answer))
        elif name == "/help":
            note(HELP)
        else:
            raise UserError(f"{line}: not understood; /help shows the commands")
        return True

    def say(self, text: str) -> None:
        """Ask and answer once.

        Raises:
            ValueError: the question does not fit and is discarded.
        """
        if self.raw:
            note(speed(self.reply(text)))
            return
        self.conversation.ask(text)
        try:
            answer = self.reply()
        except ValueError:
            self.conversation.messages.pop()
            raise
        note(speed(answer))
        if "<tool_call>" in self.conversation.messages[-1]["content"]:
            note("the model calls a tool: give its result with /tool RESULT")

    def loop(self) -> None:
        """Talk until the user leaves."""
        note("/help shows the commands, Ctrl-D leaves.")
        while True:
            try:
                text = read_message()
            except (EOFError, KeyboardInterrupt):
                note("")
                return
            try:
                if text.startswith("/"):
                    if not self.command(text):
                        return
                elif text.strip():
                    self.say(text)
            except (ValueError, OSError) as error:
                note(f"error: {error}")


def main(argv: list[str]) -> int:
    """`minimind-fast chat`: talk to a model in the terminal, or pipe one question in.

    Args:
        argv: arguments after `chat`.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="minimind-fast chat", description="Talk to a model.")
    add_model_options(parser)
    add_sampling_options(parser, temperature=0.7, top_p=0.9)
    parser.add_argument("--system", default="", help="the system prompt")
    parser.add_argument("--thinking", action="store_true", help="let the model think before it answers")
    parser.add_argument("--tools", metavar="FILE", help="JSON list of tool schemas")
    parser.add_argument("--history", type=int, default=0, help="turns to remember; 0: all that fit (default: 0)")
    parser.add_argument("--raw", action="store_true", help="continue each text instead (for a pretrained model)")
    args = parser.parse_args(argv)
    sampling, tools = sampling_of(args), read_tools(args.tools)
    model, tokenizer = open_model(args)
    options = {**vars(sampling), "max_new_tokens": args.max_new_tokens, "seed": args.seed}
    chat = Chat(model, Conversation(tokenizer, args.system, tools, args.thinking, args.history), options, args.raw)
    if not sys.stdin.isatty():
        text = read_stdin()
        if not text.strip():
            raise UserError("standard input is empty: pipe a question in, or run it in a terminal")
        chat.say(text)
        return 0
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  importing it gives input() its line editing and history
    chat.loop()
    return 0


def generate_main(argv: list[str]) -> int:
    """`minimind-fast generate`: continue a batch of texts.

    Args:
        argv: arguments after `generate`.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="minimind-fast generate", description="Continue texts.")
    add_model_options(parser)
    add_sampling_options(parser, temperature=0.0, top_p=1.0)
    parser.add_argument("--prompt", nargs="+", help="texts to continue (default: standard input, as one text)")
    parser.add_argument("--chat", action="store_true", help="answer each text by the chat template instead")
    parser.add_argument("--stop", nargs="+", default=[], help="end before the first of these texts (one prompt only)")
    args = parser.parse_args(argv)
    sampling = sampling_of(args)
    if args.stop and len(args.prompt or [""]) > 1:
        raise UserError("--stop works with one --prompt at a time")
    prompts = args.prompt or [read_stdin()]
    model, tokenizer = open_model(args)
    if args.chat:
        texts = [tokenizer.render_chat([{"role": "user", "content": p}], add_generation_prompt=True) for p in prompts]
        ids = [tokenizer.encode(text) for text in texts]
    else:
        ids = [[tokenizer.bos_id, *tokenizer.encode(p)] for p in prompts]
    new = args.max_new_tokens
    if new == parser.get_default("max_new_tokens"):  # not given: as many as fit in the context
        new = max(1, min(new, model.config.max_position_embeddings - max(map(len, ids))))
    options = {**vars(sampling), "max_new_tokens": new, "seed": args.seed}
    if len(prompts) == 1:
        answer = stream(model, tokenizer, ids[0], stop=args.stop, **options)
        print("" if args.chat else prompts[0], end="", flush=True)
        for piece in answer:
            print(piece, end="", flush=True)
        print()
        note(speed(answer))
        return 0
    for prompt, new in zip(prompts, generate_batch(model, ids, **options), strict=True):
        between = "\n" if args.chat else ""
        print(f"{prompt}{between}{tokenizer.decode(new, skip_special_tokens=True)}\n")
    return 0
