"""Train a tokenizer: byte-level BPE with MiniMind3's special tokens and a ChatML template.

Purpose: `train_bpe(texts, vocab_size)` gives a `Tokenizer` for another language or domain.
Principle: the Rust library counts and merges; special tokens keep MiniMind3's ids, so its chat layout still works.
Properties: the same texts give the same tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from minimind_fast.data.tokenizer import CONTROL_TOKENS, NUM_BYTES, TEXT_TOKENS, Tokenizer
from minimind_fast.errors import UserError

# ChatML, as MiniMind3 reads it. Every assistant turn opens with a thought, possibly empty, so both generation prompts
# (thought open, or empty and closed) are prefixes seen in training.
CHAT_TEMPLATE = r"""
{%- macro text(message) -%}
    {{- message.content if message.content is string else '' -}}
{%- endmacro -%}
{%- macro open_turn(role) -%}
    {{- '<|im_start|>' ~ role ~ '\n' -}}
{%- endmacro -%}
{%- set end_turn = '<|im_end|>\n' -%}
{%- set leading_system = messages[0].role == 'system' -%}

{%- if tools -%}
    {{- open_turn('system') -}}
    {%- if leading_system and text(messages[0]) -%}{{- text(messages[0]) ~ '\n\n' -}}{%- endif -%}
    {{- 'You can call these functions, one JSON description per line:\n<tools>\n' -}}
    {%- for tool in tools -%}{{- tool | tojson ~ '\n' -}}{%- endfor -%}
    {{- '</tools>\n\nTo call one, write its name and arguments as JSON in this form:\n' -}}
    {{- '<tool_call>\n{"name": "function", "arguments": {"argument": "value"}}\n</tool_call>' ~ end_turn -}}
{%- elif leading_system -%}
    {{- open_turn('system') ~ text(messages[0]) ~ end_turn -}}
{%- endif -%}

{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {%- if not loop.first -%}{{- open_turn('system') ~ text(message) ~ end_turn -}}{%- endif -%}
    {%- elif message.role == 'user' -%}
        {{- open_turn('user') ~ text(message) ~ end_turn -}}
    {%- elif message.role == 'tool' -%}
        {{- '\n' if loop.previtem and loop.previtem.role == 'tool' else open_turn('user') -}}
        {{- '<tool_response>\n' ~ text(message) ~ '\n</tool_response>' -}}
        {%- if loop.last or loop.nextitem.role != 'tool' -%}{{- end_turn -}}{%- endif -%}
    {%- elif message.role == 'assistant' -%}
        {%- set turn = namespace(thought='', answer=text(message)) -%}
        {%- if message.reasoning_content is string -%}
            {%- set turn.thought = message.reasoning_content -%}
        {%- elif '</think>' in turn.answer -%}
            {%- set parts = turn.answer.split('</think>', 1) -%}
            {%- set turn.thought = parts[0].split('<think>')[-1] -%}
            {%- set turn.answer = parts[1] -%}
        {%- endif -%}
        {%- set turn.answer = turn.answer.lstrip('\n') -%}
        {{- open_turn('assistant') ~ '<think>\n' ~ turn.thought.strip('\n') ~ '\n</think>\n\n' ~ turn.answer -}}
        {%- for item in message.tool_calls or [] -%}
            {%- set call = item.function or item -%}
            {%- if turn.answer or not loop.first -%}{{- '\n' -}}{%- endif -%}
            {{- '<tool_call>\n{"name": ' ~ call.name | tojson ~ ', "arguments": ' -}}
            {{- call.arguments if call.arguments is string else call.arguments | tojson -}}
            {{- '}\n</tool_call>' -}}
        {%- endfor -%}
        {{- end_turn -}}
    {%- else -%}
        {{- raise_exception('unknown role ' ~ message.role ~ ': use system, user, assistant or tool') -}}
    {%- endif -%}
{%- endfor -%}

{%- if add_generation_prompt -%}
    {{- open_turn('assistant') ~ ('<think>\n' if open_thinking or enable_thinking else '<think>\n\n</think>\n\n') -}}
{%- endif -%}
"""


def train_bpe(
    texts: Iterable[str], vocab_size: int = 6400, show_progress: bool = False, split_digits: bool = True
) -> Tokenizer:
    """Train a byte-level BPE with MiniMind3's special tokens at ids 0-35 and our ChatML template.

    Args:
        texts: the corpus, read once; memory grows with the number of different words, not with the text.
        vocab_size: total entries, including the 36 special tokens and the 256 bytes.
        show_progress: show the Rust library's progress bars.
        split_digits: make each digit a token of its own; otherwise frequent numbers become tokens, up to runs of 64 zeros.

    Raises:
        ValueError: the size is out of range, or the texts repeat too little to fill it.

    Source: Sennrich et al. 2016 (BPE); GPT-2 (byte level). Token names and ids are MiniMind3's.
    """
    special = [*CONTROL_TOKENS, *TEXT_TOKENS]
    if vocab_size < len(special) + NUM_BYTES:
        raise UserError(f"vocab_size {vocab_size} is too small: {len(special)} special tokens and {NUM_BYTES} bytes")
    backend = tokenizers.Tokenizer(models.BPE())
    byte_level = backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, normalized=False) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    if split_digits:  # only for training: if no merge contains a digit, digits stay single without this rule
        digit = pre_tokenizers.Split(tokenizers.Regex("[0-9]"), "isolated")
        # Order matters: splitting digits first would leave the line breaks before "1." as a word of their own.
        backend.pre_tokenizer = pre_tokenizers.Sequence([byte_level, digit])
    backend.train_from_iterator(texts, trainer=trainer)
    backend.pre_tokenizer = byte_level
    # The trainer marks all special tokens as control tokens; thoughts and tool calls must stay in decoded text.
    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        token["special"] = token["content"] in CONTROL_TOKENS
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    size = backend.get_vocab_size(with_added_tokens=True)
    if size != vocab_size:
        raise UserError(f"the texts give only {size} of {vocab_size} tokens: give more text or a smaller vocab_size")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
        "chat_template": CHAT_TEMPLATE,
    }
    return Tokenizer(backend, config, source="the trained tokenizer")
