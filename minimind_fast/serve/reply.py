"""OpenAI's answers as objects: whole ones and stream chunks, for chats and for completions.

Purpose: `ChatReply` and `CompletionReply`, each with `whole` and `chunks`.
Principle: both are built from the same deltas: a whole answer is its deltas joined. A chunk carries one kind of delta.
Properties: absent fields are omitted or null as in OpenAI's API; log-probabilities go with their text.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from minimind_fast.serve.output import Answer, Delta, Token, usage

_TEXT = {"content": "content", "reasoning": "reasoning_content"}


def merged(deltas: Sequence[Delta]) -> list[Delta]:
    """Join neighbours of the same kind, except calls."""
    out: list[Delta] = []
    for delta in deltas:
        if out and delta.kind == out[-1].kind != "call":
            out[-1] = out[-1]._replace(text=out[-1].text + delta.text)
        else:
            out.append(delta)
    return out


class ChatReply:
    """/v1/chat/completions.

    Args:
        model: name to report.
        answer: source of the token counts and log-probabilities.
        prompt_tokens: count to report in the usage.
    """

    kind = "chat.completion"

    def __init__(self, model: str, answer: Answer, prompt_tokens: int) -> None:
        self.model, self.answer, self.prompt_tokens = model, answer, prompt_tokens
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self.calls = 0  # streamed so far

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def usage(self) -> dict[str, Any]:
        """Token counts so far."""
        return usage(self.prompt_tokens, self.answer.count)

    def whole(self, deltas: Sequence[Delta], tokens: Sequence[Token], logprobs: bool) -> dict[str, Any]:
        """The answer in one object."""
        message: dict[str, Any] = {"role": "assistant", "content": None}
        for kind, name in _TEXT.items():
            text = "".join(d.text for d in deltas if d.kind == kind)
            if text or kind == "content":
                message[name] = text
        calls = [_call(d) for d in deltas if d.kind == "call"]
        if calls:
            message["tool_calls"] = calls
            message["content"] = message["content"] or None
        shown = self._logprobs(tokens) if logprobs else None
        choice = {"index": 0, "message": message, "logprobs": shown, "finish_reason": self.answer.finish_reason}
        return {**self._object(self.kind, [choice]), "usage": self.usage()}

    def first(self) -> dict[str, Any] | None:
        """The chunk before any text."""
        return self._chunk({"role": "assistant", "content": ""})

    def chunks(self, deltas: Sequence[Delta], tokens: Sequence[Token]) -> Iterator[dict[str, Any]]:
        """Stream chunks, the last one with the finish reason once there is one."""
        shown = self._logprobs(tokens) if tokens else None
        for delta in merged(deltas):
            if delta.kind == "call":
                yield self._chunk({"tool_calls": [{"index": self.calls, **_call(delta)}]}, shown)
                self.calls += 1
            else:
                yield self._chunk({_TEXT[delta.kind]: delta.text}, shown)
            shown = None
        if self.answer.finish_reason or shown:
            yield self._chunk({}, shown, self.answer.finish_reason)

    def last(self) -> dict[str, Any]:
        """The chunk with the usage."""
        return {**self._object(f"{self.kind}.chunk", []), "usage": self.usage()}

    def _chunk(self, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._object(f"{self.kind}.chunk", [choice])

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        return {
            "content": [
                {
                    **_logprob(t.text, t.raw, t.scores.logprob),
                    "top_logprobs": [_logprob(*a) for a in self.answer.alternatives(t.scores)],
                }
                for t in tokens
            ]
        }


def _logprob(text: str, raw: bytes, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(raw)}


def _call(delta: Delta) -> dict[str, Any]:
    return {"id": delta.call_id, "type": "function", "function": {"name": delta.name, "arguments": delta.text}}


class CompletionReply(ChatReply):
    """/v1/completions."""

    kind = "text_completion"

    def __init__(self, model: str, answer: Answer, prompt_tokens: int) -> None:
        super().__init__(model, answer, prompt_tokens)
        self.id = f"cmpl-{uuid.uuid4().hex}"

    def whole(self, deltas: Sequence[Delta], tokens: Sequence[Token], logprobs: bool) -> dict[str, Any]:
        """The answer in one object."""
        text = "".join(d.text for d in deltas)
        choice = self._choice(text, self._logprobs(tokens) if logprobs else None, self.answer.finish_reason)
        return {**self._object(self.kind, [choice]), "usage": self.usage()}

    def first(self) -> dict[str, Any] | None:
        """None: completions begin with text."""
        return None

    def chunks(self, deltas: Sequence[Delta], tokens: Sequence[Token]) -> Iterator[dict[str, Any]]:
        """Stream chunks."""
        text = "".join(d.text for d in deltas)
        if text or tokens or self.answer.finish_reason:
            shown = self._logprobs(tokens) if tokens else None
            yield self._object(self.kind, [self._choice(text, shown, self.answer.finish_reason)])

    def last(self) -> dict[str, Any]:
        """The chunk with the usage."""
        return {**self._object(self.kind, []), "usage": self.usage()}

    def _choice(self, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        return {
            "tokens": [t.text for t in tokens],
            "token_logprobs": [t.scores.logprob for t in tokens],
            "top_logprobs": [{text: p for text, _, p in self.answer.alternatives(t.scores)} for t in tokens],
            "text_offset": [t.offset for t in tokens],
        }
