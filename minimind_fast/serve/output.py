"""From tokens to the client's text: stop strings are cut, thoughts and tool calls are separated while streaming.

Purpose: `Answer.push(event)` returns the deltas that a token completes, `Answer.finish()` the rest.
Principle: two stages. Tokens become text, held back while its end may be the start of a stop string. Then a state machine
    (content, thought, call) reads the text and holds back what may be the start of a tag.
Properties: the joined content deltas are the answer's content, however the text was split. A call is emitted when complete;
    a malformed one stays content, so nothing is lost. Time is linear in the text.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

from minimind_fast.data.fields import read_arguments
from minimind_fast.data.tokenizer import StreamDecoder, Tokenizer
from minimind_fast.infer.generate import overlap
from minimind_fast.serve.batch import Event, Scores

THINK, END_THINK, CALL, END_CALL = "<think>", "</think>", "<tool_call>", "</tool_call>"


class Delta(NamedTuple):
    """A piece of the answer."""

    kind: str  # "content", "reasoning" or "call"
    text: str  # for a call: its arguments, as JSON
    name: str = ""  # for a call: the function
    call_id: str = ""


class Token(NamedTuple):
    """A token with its scores, for clients that ask for log-probabilities."""

    text: str
    raw: bytes
    scores: Scores
    offset: int  # characters of the answer before it


class Sections:
    """The state machine that separates thoughts, calls and content.

    Args:
        thinking: the text begins inside a thought.
        calls: detect tool calls; otherwise their tags are content.
    """

    def __init__(self, thinking: bool, calls: bool) -> None:
        self.state = "reasoning" if thinking else "content"
        self.calls, self.called = calls, False
        self._held = ""  # may be the start of a tag, or newlines before one
        self._fresh = True  # at the start of a section: leading newlines are dropped
        self._call: list[str] = []

    def push(self, text: str) -> list[Delta]:
        """Add text; return the deltas that are certain."""
        out: list[Delta] = []
        self._held += text
        while True:
            tags = {"reasoning": (END_THINK,), "call": (END_CALL,)}.get(self.state)
            tags = tags or ((THINK, CALL) if self.calls else (THINK,))
            at, tag = min(((i, t) for t in tags if (i := self._held.find(t)) >= 0), default=(-1, ""))
            if at < 0:
                keep = overlap(self._held, tags)
                sure, self._held = self._split(len(self._held) - keep)
                out += self._emit(sure)
                return out
            before, self._held = self._held[:at], self._held[at + len(tag) :]
            # A thought can only open the answer; a later <think> is content.
            if tag == THINK and (before.strip() or not self._fresh):
                out += self._emit(before + tag)
                continue
            out += self._emit(before.rstrip("\n") if tag != END_CALL else before)
            if tag == END_CALL:
                out += self._end_call()
            self.state = {THINK: "reasoning", CALL: "call"}.get(tag, "content")
            self._fresh = True

    def finish(self) -> list[Delta]:
        """Return what was held back."""
        held, self._held = self._held, ""
        if self.state == "call":  # cut off in the middle
            text = CALL + "".join(self._call) + held
            self.state, self._call = "content", []
            return [Delta("content", text)]
        return self._emit(held)

    def _split(self, end: int) -> tuple[str, str]:
        """Split off trailing newlines: they may belong to a tag, so they wait too."""
        if self.state == "call":
            return self._held[:end], self._held[end:]
        end = len(self._held[:end].rstrip("\n"))
        return self._held[:end], self._held[end:]

    def _emit(self, text: str) -> list[Delta]:
        if self.state == "call":
            self._call.append(text)
            return []
        if self._fresh:
            text = text.lstrip("\n")
        if not text:
            return []
        self._fresh = False
        return [Delta(self.state, text)]

    def _end_call(self) -> list[Delta]:
        text, self._call = "".join(self._call), []
        call = parse_call(text)
        if call is None:
            return [Delta("content", CALL + text + END_CALL)]
        self.called = True
        return [Delta("call", call[1], call[0], f"call_{uuid.uuid4().hex[:24]}")]


def parse_call(text: str) -> tuple[str, str] | None:
    """Parse a tool call as models write it.

    Args:
        text: between the tags.

    Returns:
        (name, arguments as JSON), or None if it is not a call.
    """
    try:
        call = json.loads(text)
        arguments = read_arguments(call, "") if isinstance(call, dict) else None
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return None
    if arguments is None or not isinstance(call.get("name"), str) or not call["name"]:
        return None
    return call["name"], json.dumps(arguments, ensure_ascii=False)


class Answer:
    """One answer as it grows.

    Args:
        tokenizer: the model's.
        stop: strings that end the text and are not part of it.
        thinking: the answer begins inside a thought.
        calls: detect tool calls.
        plain: everything is content (a completion, not a chat).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        thinking: bool = False,
        calls: bool = False,
        plain: bool = False,
    ) -> None:
        self.finish_reason: str | None = None
        self.count = 0  # tokens, including a stop token
        self._bytes = tokenizer.token_bytes()
        self._decoder = StreamDecoder(tokenizer, skip_special_tokens=True)
        self._stop, self._held, self._length = stop, "", 0
        self._sections = None if plain else Sections(thinking, calls)
        self._tokens: list[Token] = []  # not yet returned

    def push(self, event: Event) -> list[Delta]:
        """Add a token; return the deltas that are certain. The last one sets `finish_reason`."""
        assert event.token is not None and self.finish_reason is None
        self.count += 1
        stopped = event.finish == "stop"
        piece = "" if stopped else self._decoder.push(event.token)
        if event.scores is not None and not stopped:
            raw = self._raw(event.token)
            text = raw.decode("utf-8", errors="replace")
            self._tokens.append(Token(text, raw, event.scores, self._length))
        self._length += len(piece)
        self._held += piece
        found = [at for s in self._stop if (at := self._held.find(s)) >= 0]
        if event.finish and not found:
            rest = self._decoder.finish()
            self._held += rest
            found = [at for s in self._stop if (at := self._held.find(s)) >= 0] if rest else []
        if found:
            cut = self._length - len(self._held) + min(found)
            self._held = self._held[: min(found)]
            self._tokens = [t for t in self._tokens if t.offset < cut]
        if not found and not event.finish:
            sure = len(self._held) - overlap(self._held, self._stop)
            text, self._held = self._held[:sure], self._held[sure:]
            return self._divide(text)
        out = self._divide(self._held)
        if self._sections is not None:
            out += self._sections.finish()
        called = self._sections is not None and self._sections.called
        stopped = bool(found) or stopped
        self.finish_reason = ("tool_calls" if called else "stop") if stopped else "length"
        return out

    def take_tokens(self) -> list[Token]:
        """Return new tokens whose text has been emitted, with scores if requested.

        Tokens of held-back text wait with it: a stop string may still cut them off.
        """
        given = self._length - len(self._held) if self.finish_reason is None else self._length + 1
        out = [t for t in self._tokens if t.offset < given]
        self._tokens = self._tokens[len(out) :]
        return out

    def alternatives(self, scores: Scores) -> list[tuple[str, bytes, float]]:
        """The likeliest tokens as text, bytes and log-probability."""
        return [((raw := self._raw(i)).decode("utf-8", errors="replace"), raw, p) for i, p in scores.top]

    def _raw(self, token: int) -> bytes:
        return self._bytes[token] if token < len(self._bytes) else b""

    def _divide(self, text: str) -> list[Delta]:
        if self._sections is not None:
            return self._sections.push(text)
        return [Delta("content", text)] if text else []


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
