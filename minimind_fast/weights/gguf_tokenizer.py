"""A tokenizer inside a GGUF file.

Purpose: `write_tokenizer` stores vocabulary, merges, special ids and chat template; `pre_tokenizer` names the rule by which
    llama.cpp splits text before it merges.
Principle: llama.cpp knows such rules by name only, so a tokenizer is held against the rules whose names are known to split
    alike. MiniMind's tokenizers, and those trained here, split by GPT-2's pattern, which is `gpt-2` there. That digits stand
    alone in ours is a property of the merges, none of which holds a digit, and not of the splitting.
Properties: a tokenizer with any other rule is refused: under a wrong name the ids would be almost right.
"""

from __future__ import annotations

import json
from typing import Any

from minimind_fast.config import ModelConfig
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.errors import UserError

_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
# Qwen2's and Llama 3's patterns differ in the number of digits that a word may have.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split_by(pattern: str) -> list[dict[str, Any]]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [split, {**_GPT2, "use_regex": False}]


# llama.cpp's name -> the pre-tokenizers, in order, that split alike.
_RULES = {
    "gpt-2": [_GPT2],
    "smollm": [{"type": "Digits", "individual_digits": True}, _GPT2],
    "qwen2": _split_by(_WORDS % r"\p{N}"),
    "llama-bpe": _split_by(_WORDS % r"\p{N}{1,3}"),
}


def pre_tokenizer(tokenizer: Tokenizer) -> str:
    """llama.cpp's name for the rule by which a tokenizer splits text.

    Raises:
        ValueError: llama.cpp has no such rule, or none that is known to split alike.
    """
    state = json.loads(tokenizer.backend.to_str())
    model, rule = state["model"], state["pre_tokenizer"] or {}
    steps = rule["pretokenizers"] if rule.get("type") == "Sequence" else [rule]
    steps = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
    name = next((name for name, known in _RULES.items() if steps == known), None)
    problems = [] if name else ["it splits text by a rule without a name there"]
    if model["type"] != "BPE" or (state["decoder"] or {}).get("type") != "ByteLevel":
        problems.append("it is not a byte-level BPE")
    problems += [
        f"its model sets {key}"
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
        if model.get(key)
    ]
    # llama.cpp looks whole words up in the vocabulary first under this name only.
    if bool(model.get("ignore_merges")) != (name == "llama-bpe"):
        problems.append("ignore_merges is not what that rule has there")
    if state["normalizer"] and not (name == "qwen2" and state["normalizer"] == {"type": "NFC"}):
        problems.append("it normalises text first")
    if any(token[key] for token in state["added_tokens"] for key in ("lstrip", "rstrip", "single_word")):
        problems.append("its special tokens take spaces with them")
    if problems or name is None:
        raise UserError(f"{tokenizer.source}: llama.cpp cannot use this tokenizer: {'; '.join(problems)}")
    return name


def write_tokenizer(gguf: Any, writer: Any, tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Store a tokenizer.

    Args:
        gguf: the `gguf` package.
        writer: its GGUFWriter.
        config: for the number of embeddings; those without a token get a name that no text has.

    Raises:
        ValueError: the tokenizer cannot be stored, or has more ids than the model has embeddings.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}")
    rule = pre_tokenizer(tokenizer)
    kinds = gguf.TokenType
    tokens, types = [f"[PAD{i}]" for i in range(config.vocab_size)], [int(kinds.UNUSED)] * config.vocab_size
    for text, index in tokenizer.backend.get_vocab(with_added_tokens=True).items():
        tokens[index], types[index] = text, int(kinds.NORMAL)
    for index in tokenizer.special_tokens.values():
        types[index] = int(kinds.CONTROL if index in tokenizer.control_ids else kinds.USER_DEFINED)
    merges = json.loads(tokenizer.backend.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    if template := tokenizer.config.get("chat_template"):
        if isinstance(template, list):
            template = [{"name": part["name"], "template": part["template"]} for part in template]
        writer.add_chat_template(template)
