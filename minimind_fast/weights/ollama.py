"""A Modelfile, with which Ollama makes a model of a GGUF file.

Purpose: `modelfile` names the file, lays out chats, stops at the end of a turn, and samples as our server does.
Principle: Ollama reads no Jinja; it has templates in Go's language. So the tokenizer's template is measured: it renders
    chats of marks, and what stands between the marks is the layout of a turn, of tools, calls and results. The layout is
    then written down in Go's language.
Properties: the pieces, laid together, must give the template's own text, or the Modelfile has no template and a note says
    so. Tools and calls differ in spaces: Go writes JSON without any.

Source: Ollama's documentation of Modelfiles and templates. It finds the tags of thoughts around `.Thinking` and those of
    calls in the first text below `.ToolCalls`, which fixes where these stand.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.errors import UserError

# Marks: what templates may strip, such as spaces, is not in them.
_SYSTEM, _USER, _ANSWER, _THOUGHT, _RESULT, _NEXT = "@system@", "@user@", "@answer@", "@thought@", "@result@", "@next@"
_NAMES = ("@one@", "@two@")
_SAMPLING = {"temperature": 0.7, "top_p": 0.9, "top_k": 0, "min_p": 0, "repeat_penalty": 1}


def modelfile(tokenizer: Tokenizer, file: str) -> tuple[str, str]:
    """Write the Modelfile of a GGUF file.

    Args:
        tokenizer: its chat template is laid out again.
        file: the GGUF file's name, in the Modelfile's folder.

    Returns:
        (the text, a note about what it lacks, or "").
    """
    lines, note = [f"FROM ./{file}"], ""
    try:
        template = Layout.measured(tokenizer).in_go()
        lines.append(f'TEMPLATE """{template}"""')
    except ValueError as error:
        note = f"no TEMPLATE in it: {error}"
    end = next(text for text, index in tokenizer.special_tokens.items() if index == tokenizer.eos_id)
    lines.append(f'PARAMETER stop "{end}"')
    lines += [f"PARAMETER {name} {value}" for name, value in _SAMPLING.items()]
    return "\n".join(lines) + "\n", note


@dataclass
class Layout:
    """What a chat template puts around the parts of a chat; each pair is (before, after)."""

    no_system: str  # instead of a system turn
    system: tuple[str, str]
    user: tuple[str, str]
    answer: tuple[str, str]
    thought: tuple[str, str] | None  # between the answer's opening and its text; without a thought, both together
    ask: str  # opens the answer to write, without a thought
    ask_thinking: str
    tools: tuple[str, str, str, str] | None = None  # before the system text, after it, between two tools, after them
    only_tools: str = ""  # before the tools if there is no system text
    call: tuple[str, str, str] | None = None  # before the name, before the arguments, after them
    call_gap: tuple[str, str] = ("", "")  # between text and a call, between two calls
    result: tuple[str, str, str, str] | None = None  # opens a turn, opens the next one, closes one, closes the turn

    @classmethod
    def measured(cls, tokenizer: Tokenizer) -> Layout:
        """The layout of a tokenizer's chat template.

        Raises:
            ValueError: it has no template, or one that is not made of such pieces.
        """

        def text(*messages: dict[str, Any], **options: Any) -> str:
            return tokenizer.render_chat(messages, **options)

        def added(message: dict[str, Any], *before: dict[str, Any]) -> str:
            return _rest(text(*before, message), text(*before))

        system, user = {"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}
        answer = {"role": "assistant", "content": _ANSWER}
        turn = added(user, system)
        plain, thoughtful = added(answer, system, user), added({**answer, "reasoning_content": _THOUGHT}, system, user)
        thought = None
        opening, closing = _around(plain, _ANSWER)
        if _THOUGHT in thoughtful:
            before, after = _around(thoughtful, _THOUGHT)
            after = _around(after, _ANSWER)[0]
            tag = before.rfind("<")
            thought = (before[tag:], after)
            if tag < 0 or opening != before + after:
                raise UserError("the chat template leaves empty thoughts out")
            opening = before[:tag]
        thinking = {"open_thinking": True, "enable_thinking": True}
        so_far = text(system, user)
        found = cls(
            no_system=_before(text(user), turn),
            system=_around(text(system), _SYSTEM),
            user=_around(turn, _USER),
            answer=(opening, closing),
            thought=thought,
            ask=_rest(text(system, user, add_generation_prompt=True, enable_thinking=False), so_far),
            ask_thinking=_rest(text(system, user, add_generation_prompt=True, **thinking), so_far),
        )
        chat = (system, user, answer, {"role": "user", "content": _NEXT})
        if text(*chat, add_generation_prompt=True, enable_thinking=False) != found._joined():
            raise UserError("the chat template lays turns out by more than their roles")
        found._measure_tools(text)
        return found

    def _joined(self) -> str:
        thought = "".join(self.thought or ())
        turns = [(self.system, _SYSTEM), (self.user, _USER), (self.answer, thought + _ANSWER), (self.user, _NEXT)]
        return "".join(before + text + after for (before, after), text in turns) + self.ask

    def _measure_tools(self, text: Any) -> None:
        """Fill in what concerns tools, if the template has a place for them."""
        system, user = {"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}
        tools = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in _NAMES]
        calls = [{"type": "function", "function": {"name": name, "arguments": '{"at": 1}'}} for name in _NAMES]
        turn = _USER.join(self.user)
        with_tools = text(system, user, tools=tools)
        if with_tools == text(system, user):
            return
        shown = [json.dumps(tool) for tool in tools]
        head, rest = _around(with_tools, shown[0])
        gap, tail = _around(rest, shown[1])
        self.tools = (*_around(head, _SYSTEM), gap, _before(tail, turn))
        self.only_tools = _around(text(user, tools=tools), shown[0])[0]

        so_far = text(system, user)
        opening, closing = self.answer[0] + "".join(self.thought or ()), self.answer[1]

        def asked(content: str, *calls: Any) -> str:
            message = {"role": "assistant", "content": content, "tool_calls": list(calls)}
            return _before(_rest(_rest(text(system, user, message), so_far), opening), closing)

        before, rest = _around(asked("", calls[0]), _NAMES[0])
        middle, after = _around(rest, '{"at": 1}')
        self.call = (before, middle, after)
        one, two = asked("", calls[0]), _before(asked("", *calls), before + _NAMES[1] + middle + '{"at": 1}' + after)
        lead = _rest(_before(asked(_ANSWER, calls[0]), one), _ANSWER)
        self.call_gap = (lead, _rest(two, one))

        results = [{"role": "tool", "content": mark} for mark in (_RESULT, _NEXT)]
        asking = {"role": "assistant", "content": "", "tool_calls": calls}
        so_far = text(system, user, asking)
        before, after = _around(_rest(text(system, user, asking, results[0]), so_far), _RESULT)
        between, _ = _around(_around(_rest(text(system, user, asking, *results), so_far), _RESULT)[1], _NEXT)
        close = os.path.commonprefix([between, after])
        self.result = (before, _rest(between, close), close, _rest(after, close))

    def in_go(self) -> str:
        """The template in Go's language, with Ollama's variables.

        Raises:
            ValueError: a piece cannot be written there.
        """
        pieces = [
            text for value in vars(self).values() for text in ([value] if isinstance(value, str) else value or ())
        ]
        if any(bad in piece for piece in pieces for bad in ("{{", '"""')):
            raise UserError("the chat template's own text holds Go's braces or three quotes")
        turns = _when('eq .Role "user"', "{{ .Content }}".join(self.user), closed=False)
        turns += '{{ else if eq .Role "assistant" }}' + self._answer_in_go()
        if self.result:
            first, again, close, end = self.result
            turns += '{{ else if eq .Role "tool" }}' + _when('eq $previous "tool"', again, first)
            turns += "{{ .Content }}" + close + _when('ne $next "tool"', end)
        ask = self.ask
        if self.ask_thinking != ask:
            ask = _when("and $.IsThinkSet $.Think", self.ask_thinking, ask)
        return (
            self._system_in_go()
            + '{{ $previous := "" }}{{ range $i, $_ := .Messages }}'
            + '{{ $rest := slice $.Messages $i }}{{ $next := "" }}'
            + _when("gt (len $rest) 1", "{{ $next = (index $rest 1).Role }}")
            + turns
            + "{{ end }}{{ $previous = .Role }}"
            + _when('and (not $next) (ne .Role "assistant")', ask)
            + "{{ end }}"
        )

    def _system_in_go(self) -> str:
        plain = _when(".System", "{{ .System }}".join(self.system), self.no_system)
        if not self.tools:
            return plain
        before, after, gap, end = self.tools
        same = os.path.commonprefix([before, self.only_tools])
        rest = self.only_tools[len(same) :]
        if same == before and after.endswith(rest):  # the usual case: a system text only stands in between
            head = before + _when(".System", "{{ .System }}" + after[: len(after) - len(rest)]) + rest
        else:
            head = _when(".System", before + "{{ .System }}" + after, self.only_tools)
        tool = _when("$i", gap) + '{"type": "function", "function": {{ .Function }}}'
        return _when(".Tools", head + "{{ range $i, $_ := .Tools }}" + tool + "{{ end }}" + end, plain)

    def _answer_in_go(self) -> str:
        opening, closing = self.answer
        out = opening
        if self.thought:
            before, after = self.thought
            out += _when(".Thinking", before + "{{ .Thinking }}" + after, before + after)
        out += "{{ .Content }}"
        if self.call:
            lead, gap = self.call_gap
            name, arguments, end = self.call
            call = name + "{{ .Function.Name }}" + arguments + "{{ .Function.Arguments }}" + end
            if lead:  # by a variable: the first branch on .ToolCalls must open with the tag
                out += "{{ $calls := .ToolCalls }}" + _when("and .Content $calls", lead)
            first = "{{ range slice .ToolCalls 0 1 }}" + call + "{{ end }}"
            out += _when(".ToolCalls", first + "{{ range slice .ToolCalls 1 }}" + gap + call + "{{ end }}")
        return out + _when("$next", closing)


def _when(condition: str, text: str, otherwise: str = "", closed: bool = True) -> str:
    """Text under a condition, in Go's language."""
    if not (text or otherwise):
        return ""
    out = "{{ if " + condition + " }}" + text + ("{{ else }}" + otherwise) * bool(otherwise)
    return out + "{{ end }}" * closed


def _around(text: str, mark: str) -> tuple[str, str]:
    before, found, after = text.partition(mark)
    if not found:
        raise UserError("the chat template drops or changes a part of a chat")
    return before, after


def _rest(text: str, start: str) -> str:
    if not text.startswith(start):
        raise UserError("the chat template changes earlier turns when one is added")
    return text[len(start) :]


def _before(text: str, end: str) -> str:
    if not text.endswith(end):
        raise UserError("the chat template lays turns out by more than their roles")
    return text[: len(text) - len(end)]
