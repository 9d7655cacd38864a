"""Fields of a row or a message that change what it teaches: honoured, or refused by name.

Purpose: `learned` and `row_system` read such fields, `refuse` names those that nothing here understands; `read_calls` reads
    tool calls as the many dialects write them.
Principle: a field that is dropped in silence changes the training: a system prompt that is not seen, an answer marked as bad
    that is trained. Fields that mean nothing to training (an id, a source, a score) pass.
Properties: a neutral value (null, "", an empty list, weight 1, loss true) is always accepted.

Source: the fine-tuning formats of OpenAI (`weight`, `tools`, `functions`), Axolotl (`train`, `train_detail`), LLaMA-Factory
(`system`, `kto_tag`, `images`) and TRL (`label`, `chat_template_kwargs`), by their documents.
"""

from __future__ import annotations

import json
from typing import Any

from minimind_fast.errors import DataError

# "Is this answer learned?", as the dialects ask it.
FLAGS = ("weight", "loss", "train", "trainable", "training", "learn")
SYSTEM = ("system", "system_prompt")
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
_IN_A_MESSAGE = (*MEDIA, "refusal", "prefix", "train_detail", "mask", "masked", "loss_mask", "loss_weight")
_IN_A_ROW = (*MEDIA, "history", "chat_template_kwargs", "mask", "loss_mask", "labels", "loss_weight", "completion_mask")
_VERDICTS = ("label", "kto_tag")  # whether the answer is a good one


def is_neutral(value: Any) -> bool:
    """Whether a field says nothing: null, false, or empty."""
    return value is None or value is False or (isinstance(value, (str, list, dict)) and not value)


def learned(fields: dict[str, Any], where: str) -> bool | None:
    """Whether an answer is to be learned, by `weight`, `loss` and their like.

    Args:
        fields: a message or a row.
        where: names it in errors.

    Returns:
        False or True as the field says; None if there is none.

    Raises:
        DataError: a value other than 0, 1, true, false.
    """
    said = None
    for name in FLAGS:
        value = fields.get(name)
        if value is None:
            continue
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise DataError(f'{where}"{name}" is {json.dumps(value)}: only 0 and 1, false and true are understood')
        said = bool(value) and said is not False
    return said


def refuse(fields: dict[str, Any], of_a_row: bool, where: str = "") -> None:
    """Refuse fields that would change the training and are not understood.

    Args:
        fields: a message or a row.
        of_a_row: which of the two.
        where: names it in errors.

    Raises:
        DataError: names the field.
    """
    for name in _IN_A_ROW if of_a_row else _IN_A_MESSAGE:
        if not is_neutral(fields.get(name)):
            raise DataError(f'{where}the field "{name}" is not supported: it would change what is learned; remove it')
    if of_a_row:
        if learned(fields, where) is False:
            raise DataError(f"{where}the row says that it is not to be learned: remove it")
        for name in _VERDICTS:
            if fields.get(name) is False:
                raise DataError(f'{where}"{name}" is false: the answer is marked as a bad one; remove the row')


def row_system(row: dict[str, Any]) -> str | None:
    """The system prompt that stands beside the messages.

    Raises:
        DataError: it is no text, or there are two.
    """
    found = {name: row[name] for name in SYSTEM if not is_neutral(row.get(name))}
    for name, text in found.items():
        if not isinstance(text, str):
            raise DataError(f'"{name}" must be a string')
    if len(set(found.values())) > 1:
        raise DataError(f"{' and '.join(found)} say different things: keep one")
    text = next(iter(found.values()), "")
    return text if text.strip() else None


def text_of(content: Any, where: str) -> Any:
    """Join content that comes in parts, `[{"type": "text", "text": "..."}]`; other content as it is.

    Raises:
        DataError: a part that is not text.
    """
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise DataError(f"{where}: only text parts are supported in content")
    return "".join(part["text"] for part in content)


def json_list(value: Any, where: str) -> list[dict[str, Any]] | None:
    """A list of objects, or that as JSON in a string; None if empty.

    Raises:
        DataError: anything else.
    """
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON: {error}") from None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise DataError(f"{where}: must be a list of objects, or that as JSON in a string")
    return value


def read_tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    """Tool schemas, as objects or as JSON in a string.

    Raises:
        DataError: not a list of objects with a name.
    """
    tools = json_list(value, where)
    for tool in tools or ():
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name", ""), str):
            raise DataError(f'{where}: each must be an object such as {{"function": {{"name": "...", ...}}}}')
    return tools


def read_calls(value: Any, where: str) -> list[dict[str, Any]] | None:
    """Tool calls, as objects or as JSON in a string; no arguments become `{}`.

    Raises:
        DataError: a call without a name, or arguments that are no JSON object.
    """
    calls = []
    for call in json_list(value, where) or ():
        function = call.get("function", call)
        if not isinstance(function, dict):
            raise DataError(
                f'{where}: "function" must be an object with name and arguments, not {json.dumps(function)}'
            )
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise DataError(f"{where}: each call needs a name")
        function = {**function, "arguments": read_arguments(function, where)}
        function.pop("parameters", None)
        calls.append({**call, "function": function} if "function" in call else function)
    return calls or None


def read_arguments(function: dict[str, Any], where: str) -> dict[str, Any] | str:
    """The arguments of a call, under the name `arguments` or `parameters`.

    Args:
        function: holds them as an object, as JSON in a string, or not at all.
        where: names the call in errors.

    Returns:
        An object or its JSON, as given; `{}` where there are none.

    Raises:
        DataError: not a JSON object.
    """
    value = function.get("arguments")
    value = function.get("parameters") if value is None else value
    if value is None or isinstance(value, str) and not value.strip():
        return {}
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: the arguments of {function.get('name')} are not JSON: {error}") from None
    if not isinstance(found, dict):
        raise DataError(f"{where}: the arguments of {function.get('name')} must be a JSON object")
    return value
