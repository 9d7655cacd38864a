"""The protocol: OpenAI's requests, checked field by field, and OpenAI's errors.

Purpose: `read_json` for the body, `read_chat` and `read_completion` for its fields, `ApiError` for anything wrong.
Principle: known fields are taken from the object and checked for type and range; the rest are refused by name, because a
    silently ignored setting gives wrong answers that go unnoticed. Fields that change no token (`user`, `metadata`, ...)
    are accepted.
Properties: no value of a body reaches the model, the template or the log unchecked: depth, numbers and invalid UTF-8 are
    checked first. No dependency on the web framework.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from minimind_fast.errors import UserError
from minimind_fast.infer.sampling import Sampling

MAX_DEPTH = 32  # nesting of a body; enough for tool schemas
MAX_TOOLS = 128
MAX_MESSAGES = 2048
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256
MAX_TOP_LOGPROBS = 20
MAX_SEED = (1 << 63) - 1

# Fields that change no token of the answer.
IGNORED = frozenset(["metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "verbosity"])
ROLES = ("system", "developer", "user", "assistant", "tool")


class ApiError(Exception):
    """An error to return to the client.

    Args:
        status: HTTP status.
        message: a sentence the user can act on.
        param: the field at fault.
        code: machine-readable reason.
        kind: OpenAI's `type`.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, kind: str = ""
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.kind = kind or ("invalid_request_error" if status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400 error for a request that cannot be served as sent."""
    return ApiError(400, message, param, code)


@dataclass
class Ask:
    """Settings common to both endpoints."""

    model: str
    max_tokens: int | None
    sampling: Sampling
    seed: int | None
    stop: list[str]
    top_logprobs: int | None  # None: no log-probabilities
    stream: bool
    include_usage: bool
    user: str


@dataclass
class ChatAsk(Ask):
    """/v1/chat/completions."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    thinking: bool = False


@dataclass
class CompletionAsk(Ask):
    """/v1/completions."""

    prompt: str | list[int] = ""


@dataclass(frozen=True)
class Defaults:
    """Settings that a request omits."""

    temperature: float = 0.7
    top_p: float = 0.9
    thinking: bool = False
    strict: bool = False  # no `open_thinking` beside OpenAI's fields


def read_json(raw: bytes) -> dict[str, Any]:
    """Parse the body.

    Args:
        raw: as received.

    Returns:
        An object no deeper than MAX_DEPTH, with finite numbers and valid Unicode.

    Raises:
        ApiError: the body is not such an object.
    """

    def refuse(constant: str) -> None:
        raise UserError(f"{constant} is not JSON")

    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=refuse)
    except RecursionError:
        raise bad(f"the body is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:  # also invalid UTF-8, and integers of thousands of digits
        raise bad(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise bad("the body must be a JSON object")
    level: list[Any] = [body]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += value.keys()
                below += value.values()
            elif isinstance(value, list):
                below += value
            elif isinstance(value, float) and not math.isfinite(value):
                raise bad("a number in the body is too large")
            elif isinstance(value, str) and not _is_unicode(value):
                raise bad("a string in the body holds half a surrogate pair, which is not Unicode text")
        if not below:
            return body
        level = below
    raise bad(f"the body is nested deeper than {MAX_DEPTH} levels")


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


class Fields:
    """Takes checked fields out of an object; `end` refuses the rest.

    Args:
        body: from `read_json`.
    """

    def __init__(self, body: dict[str, Any]) -> None:
        self.rest = {name: value for name, value in body.items() if value is not None}  # null means absent

    def take(self, name: str, kinds: tuple[type, ...], what: str, default: Any = None) -> Any:
        """Take a value of one of the types; the default if it is absent or null."""
        value = self.rest.pop(name, None)
        if value is None:
            return default
        # True is an int to Python, not to a client.
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise bad(f"{name} must be {what}, not {_show(value)}", name)
        return value

    def number(self, name: str, low: float, high: float, default: float) -> float:
        """Take a number from low to high."""
        value = self.take(name, (int, float), "a number", default)
        if not low <= value <= high:
            raise bad(f"{name} must be between {low:g} and {high:g}, not {_show(value)}", name)
        return float(value)

    def whole(self, name: str, low: int, high: int, default: int | None) -> Any:
        """Take a whole number from low to high."""
        value = self.take(name, (int,), "a whole number", default)
        if value is not None and not low <= value <= high:
            raise bad(f"{name} must be between {low} and {high}, not {_show(value)}", name)
        return value

    def flag(self, name: str, default: Any = False) -> Any:
        """Take a boolean."""
        return self.take(name, (bool,), "true or false", default)

    def only(self, name: str, allowed: Sequence[Any], why: str) -> None:
        """Take a field of which only some values are supported."""
        value = self.rest.pop(name, None)
        if value is not None and not any(value == a and type(value) is type(a) for a in allowed):
            raise bad(f"{name}: {why}", name, "unsupported_value")

    def end(self) -> None:
        """Refuse unknown fields."""
        for name in self.rest:
            if name not in IGNORED:
                raise bad(f"unknown field {_show(name)}", name[:64], "unknown_parameter")


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _common(f: Fields, defaults: Defaults) -> dict[str, Any]:
    """Fields of both endpoints, except logprobs and the token limit's second name."""
    f.only("n", [1], "this server gives one answer per request; send n requests at once instead")
    for name in ("frequency_penalty", "presence_penalty"):
        f.only(name, [0, 0.0], "only 0 is supported; use repetition_penalty")
    f.only("logit_bias", [{}], "is not supported")
    sampling = Sampling(
        temperature=f.number("temperature", 0, 2, defaults.temperature),
        top_p=f.number("top_p", 1e-6, 1, defaults.top_p),
        top_k=f.whole("top_k", 0, 1 << 20, 0),
        min_p=f.number("min_p", 0, 1, 0),
        repetition_penalty=f.number("repetition_penalty", 0.01, 10, 1),
    )
    stop = f.take("stop", (str, list), "a string or a list of strings", [])
    stop = [stop] if isinstance(stop, str) else stop
    if len(stop) > MAX_STOPS or not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_CHARACTERS for s in stop):
        raise bad(f"stop must be up to {MAX_STOPS} strings of 1 to {MAX_STOP_CHARACTERS} characters", "stop")
    stream = f.flag("stream")
    options = Fields(f.take("stream_options", (dict,), "an object", {}))
    usage = options.flag("include_usage")
    options.flag("include_obfuscation")
    options.end()
    user = f.take("user", (str,), "a string", "")
    seed = f.whole("seed", -MAX_SEED, MAX_SEED, None)
    return {
        "model": f.take("model", (str,), "a string", ""),
        "sampling": sampling,
        "seed": seed,
        "stop": stop,
        "stream": stream,
        "include_usage": usage,
        "user": user[:256],
    }


def read_completion(body: dict[str, Any], defaults: Defaults) -> CompletionAsk:
    """Read the fields of /v1/completions.

    Args:
        body: from `read_json`.
        defaults: settings that the body omits.

    Raises:
        ApiError: an invalid or unknown field.
    """
    f = Fields(body)
    common = _common(f, defaults)
    f.only("best_of", [1], "only 1 is supported")
    f.only("echo", [False], "is not supported")
    f.only("suffix", [""], "is not supported")
    prompt = f.take("prompt", (str, list), "a string or a list of token ids", "")
    if isinstance(prompt, list):
        if len(prompt) == 1 and isinstance(prompt[0], (str, list)):
            prompt = prompt[0]
        if not isinstance(prompt, str) and not all(type(i) is int for i in prompt):
            raise bad("prompt must be one string or one list of token ids; send several requests at once", "prompt")
    max_tokens = f.whole("max_tokens", 1, 1 << 31, None)
    top = f.whole("logprobs", 0, MAX_TOP_LOGPROBS, None)
    f.end()
    return CompletionAsk(**common, max_tokens=max_tokens, top_logprobs=top, prompt=prompt)


def read_chat(body: dict[str, Any], defaults: Defaults) -> ChatAsk:
    """Read the fields of /v1/chat/completions.

    Args:
        body: from `read_json`.
        defaults: settings that the body omits.

    Raises:
        ApiError: an invalid or unknown field.
    """
    f = Fields(body)
    common = _common(f, defaults)
    f.only("response_format", [{"type": "text"}], "only text is supported")
    f.only("modalities", [["text"]], "only text is supported")
    max_tokens = f.whole("max_completion_tokens", 1, 1 << 31, None)
    older = f.whole("max_tokens", 1, 1 << 31, None)
    wanted, top = f.flag("logprobs"), f.whole("top_logprobs", 0, MAX_TOP_LOGPROBS, None)
    if top is not None and not wanted:
        raise bad("top_logprobs needs logprobs: true", "top_logprobs")
    # MiniMind's own field: it overrides the server's default, and true wins over the other two fields.
    asked = None if defaults.strict else f.flag("open_thinking", None)
    effort = f.take("reasoning_effort", (str,), "a string", None)
    thinking = defaults.thinking if asked is None else asked
    thinking = thinking if effort is None else effort not in ("none", "minimal")
    kwargs = Fields(f.take("chat_template_kwargs", (dict,), "an object", {}))
    for name in ("enable_thinking", "open_thinking"):
        thinking = kwargs.flag(name, thinking)
    kwargs.end()
    messages = [_message(m, i) for i, m in enumerate(f.take("messages", (list,), "a list of messages", []))]
    if not 0 < len(messages) <= MAX_MESSAGES:
        raise bad(f"messages must hold 1 to {MAX_MESSAGES} messages", "messages")
    tools = [_tool(t, i) for i, t in enumerate(f.take("tools", (list,), "a list of tools", []))]
    if len(tools) > MAX_TOOLS:
        raise bad(f"at most {MAX_TOOLS} tools", "tools")
    choice = f.take("tool_choice", (str, dict), '"auto" or "none"', "auto")
    f.only("parallel_tool_calls", [True], "only true is supported: an answer may hold several calls")
    if choice not in ("auto", "none"):
        raise bad('tool_choice must be "auto" or "none": a call cannot be forced here', "tool_choice")
    f.end()
    return ChatAsk(
        **common,
        max_tokens=older if max_tokens is None else max_tokens,
        top_logprobs=(top or 0) if wanted else None,
        messages=messages,
        tools=tools if tools and choice == "auto" else None,
        thinking=thinking or bool(asked),
    )


def _message(value: Any, index: int) -> dict[str, Any]:
    """Rebuild one message from checked parts only."""
    where = f"messages[{index}]"
    if not isinstance(value, dict):
        raise bad(f"{where} must be an object with role and content", where)
    f = Fields(value)
    role = f.take("role", (str,), "a string")
    if role not in ROLES:
        raise bad(f"{where}: role must be one of {', '.join(ROLES)}, not {_show(role)}", f"{where}.role")
    message: dict[str, Any] = {"role": "system" if role == "developer" else role}
    content = f.take("content", (str, list), "a string or a list of text parts")
    message["content"] = content if isinstance(content, str) else _text_of(content, where)
    f.take("name", (str,), "a string")  # accepted, but templates ignore it
    calls = []
    if role == "assistant":
        thought = f.take("reasoning_content", (str,), "a string") or f.take("reasoning", (str,), "a string")
        if thought is not None:
            message["reasoning_content"] = thought
        f.rest.pop("annotations", None)  # client libraries echo what they received
        calls = [_call(c, where) for c in f.take("tool_calls", (list,), "a list", [])]
        if calls:
            message["tool_calls"] = calls
    if role == "tool":
        message["tool_call_id"] = f.take("tool_call_id", (str,), "a string", "")
    if content is None and not calls:
        raise bad(f"{where} needs content", f"{where}.content")
    for name in f.rest:
        raise bad(f"{where}: unknown field {_show(name)}", where, "unknown_parameter")
    return message


def _text_of(parts: list[Any] | None, where: str) -> str:
    """The text of content parts."""
    texts = []
    for part in parts or []:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise bad(f"{where}: only text parts are supported in content", f"{where}.content")
        texts.append(part["text"])
    return "".join(texts)


def _call(value: Any, where: str) -> dict[str, Any]:
    """A call that the assistant made earlier."""
    function = value.get("function") if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if arguments is None or isinstance(arguments, str) and not arguments.strip():
        arguments = "{}"
    if not isinstance(name, str) or not isinstance(arguments, str):
        raise bad(f"{where}: a tool call must have function.name and function.arguments, both strings", where)
    try:
        read_json(arguments.encode())
    except ApiError:
        raise bad(f"{where}: function.arguments must be a JSON object, written as a string", where) from None
    return {"id": str(value.get("id", "")), "type": "function", "function": {"name": name, "arguments": arguments}}


def _tool(value: Any, index: int) -> dict[str, Any]:
    """A function the model may call; its schema goes into the prompt unchanged."""
    where = f"tools[{index}]"
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise bad(f'{where} must be {{"type": "function", "function": {{"name": "...", ...}}}}', where)
    if not isinstance(function.get("parameters", {}), dict):
        raise bad(f"{where}: parameters must be a JSON schema", where)
    return {"type": "function", "function": function}
