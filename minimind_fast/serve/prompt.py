"""From messages to token ids, safe against control tokens in user text.

Purpose: `chat_prompt(tokenizer, ask)` and `completion_prompt(tokenizer, ask)`.
Principle: the template renders the chat as text, and the tokenizer would read a `<|im_end|>` inside a message as the end of
    the turn: a message, or a page that a tool reads, could then impersonate the system. So control tokens in the client's
    strings are split by a noncharacter mark, and the text is encoded piecewise between marks, each half as ordinary text.
Properties: texts without control tokens get exactly the ids of training. Tags that are text (`<think>`, `<tool_call>`)
    stay, since assistants write them.
"""

from __future__ import annotations

import re
from typing import Any

from minimind_fast.data.complete import check_complete
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.serve.protocol import ChatAsk, CompletionAsk, bad

_MARK = "\ufdd0"  # a noncharacter: not in valid text, and refused below


def chat_prompt(tokenizer: Tokenizer, ask: ChatAsk) -> tuple[list[int], bool]:
    """Encode a chat for the next answer.

    Args:
        tokenizer: must have a chat template.
        ask: checked messages and tools.

    Returns:
        (token ids, whether the answer begins inside a thought).

    Raises:
        ApiError: the template refuses the messages, or does not support tools.
    """
    control = [token for token, index in tokenizer.special_tokens.items() if index in tokenizer.control_ids]
    pattern = re.compile("|".join(re.escape(t) for t in sorted(control, key=len, reverse=True)) or r"(?!)")
    messages: Any = _broken(ask.messages, pattern)
    tools: Any = _broken(ask.tools, pattern)
    thinking = {"open_thinking": True, "enable_thinking": True} if ask.thinking else {"enable_thinking": False}
    try:
        text = tokenizer.render_chat(messages, tools=tools, add_generation_prompt=True, **thinking)
        if tools and text == tokenizer.render_chat(messages, tools=None, add_generation_prompt=True, **thinking):
            raise bad("this model's chat template has no place for tools", "tools", "unsupported_value")
        check_complete(tokenizer, messages, tools, add_generation_prompt=True, **thinking)
    except (ValueError, RecursionError) as error:
        raise bad(f"{error}", "messages") from None
    ids = [i for piece in text.split(_MARK) for i in tokenizer.encode(piece)]
    return ids, text.rstrip().endswith("<think>")


def _broken(value: Any, control: re.Pattern[str]) -> Any:
    """Copy a value with every control token in its strings split by the mark."""
    if isinstance(value, str):
        if _MARK in value:
            raise bad("a message holds U+FDD0, which is not a character")
        return control.sub(lambda m: m[0][:1] + _MARK + m[0][1:], value)
    if isinstance(value, dict):
        return {_broken(key, control): _broken(item, control) for key, item in value.items()}
    if isinstance(value, list):
        return [_broken(item, control) for item in value]
    return value


def completion_prompt(tokenizer: Tokenizer, ask: CompletionAsk) -> list[int]:
    """Token ids to continue: text is encoded after bos, as in training; ids are used as given.

    Raises:
        ApiError: no ids, or an unknown one.
    """
    if isinstance(ask.prompt, str):
        return [tokenizer.bos_id, *tokenizer.encode(ask.prompt)]
    if not ask.prompt:
        raise bad("prompt must not be an empty list", "prompt")
    if not all(0 <= i < tokenizer.vocab_size for i in ask.prompt):
        raise bad(f"prompt: token ids are 0 to {tokenizer.vocab_size - 1}", "prompt")
    return ask.prompt
