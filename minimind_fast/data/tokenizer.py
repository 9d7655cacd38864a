"""Text to token ids and back: load a byte-level BPE, render a chat, stream decoded text.

Purpose: one `Tokenizer` for both MiniMind generations and for those trained here (`bpe.py`). Its ids and chat text equal
those of Transformers for the same folder, without needing Transformers.

Principle: the Rust library `tokenizers` does the BPE; the folder's own Jinja template lays out a chat. Byte-level BPE
splits text by GPT-2's pattern, maps each UTF-8 byte to a printable character, then merges neighbouring pieces in the
learned order. All 256 bytes are in the vocabulary, so every text can be encoded and decodes unchanged.

Properties: `encode_batch` runs on all cores. Nothing is added to the text: callers add bos or eos themselves. Templates
run in a sandbox, since a downloaded template is untrusted code. The fingerprint covers only what decides the ids, so a new
chat template does not invalidate a token cache.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from jinja2 import TemplateError
from tokenizers import decoders

from minimind_fast.data.rows import read_object, read_utf8
from minimind_fast.data.template import environment, plain, with_reasoning
from minimind_fast.errors import UserError

# MiniMind3's ids 0-35: the first 21 are control tokens that `skip_special_tokens` omits from decoded text; the other 15
# (tool calls, thoughts) are text to a reader and only kept whole by the tokenizer.
CONTROL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
    "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>",
    "<tts_pad>", "<tts_text_bos>", "<tts_text_eod>", "<tts_text_bos_single>",
)  # fmt: skip
TEXT_TOKENS = (
    "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>",
    *(f"<|buffer{i}|>" for i in range(1, 10)),
)  # fmt: skip
NUM_BYTES = 256


class Tokenizer:
    """A tokenizer.json with its special tokens and chat template.

    Args:
        backend: the Rust tokenizer.
        config: the content of tokenizer_config.json: `bos_token`, `eos_token`, `pad_token`, `chat_template`, ...
        source: where it came from, for error messages.

    Raises:
        ValueError: bos, eos or pad is not named in the config, or is not in the vocabulary. Bos and pad may be null: eos
            takes their place.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, Any], source: str = "tokenizer"):
        # A stored padding or truncation rule would silently change ids.
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.config = dict(config)
        self.source = source
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        added = backend.get_added_tokens_decoder()
        self.special_tokens: dict[str, int] = {token.content: index for index, token in sorted(added.items())}
        self.control_ids = frozenset(index for index, token in added.items() if token.special)
        self.eos_id = self._named_id("eos_token")
        # Null in Qwen's and Llama's folders: a text then begins after the end of the one before.
        self.bos_id = self._named_id("bos_token") if self.has("bos_token") else self.eos_id
        self.pad_id = self._named_id("pad_token") if self.has("pad_token") else self.eos_id
        self._fingerprint: str | None = None
        self._token_bytes: list[bytes] | None = None
        self._templates: dict[str, Any] = {}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Open a tokenizer folder, or a tokenizer.json file with the files beside it.

        Args:
            path: a folder with tokenizer.json (and tokenizer_config.json, chat_template.jinja), or the file itself.

        Raises:
            ValueError: the path, the file or a field is missing or unreadable.
        """
        path = Path(path)
        if not path.exists():
            raise UserError(f"tokenizer path {path} does not exist: give a folder with tokenizer.json, or that file")
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"{path} has no tokenizer.json: train one with train/tokenizer.py, or give another folder")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the Rust library raises plain Exception
            raise UserError(f"{file} is not a tokenizer of the `tokenizers` library: {error}") from error
        config: dict[str, Any] = {}
        config_file = file.with_name("tokenizer_config.json")
        if config_file.is_file():
            config = read_object(config_file)
        else:
            config = {"bos_token": CONTROL_TOKENS[1], "eos_token": CONTROL_TOKENS[2], "pad_token": CONTROL_TOKENS[0]}
        template_file = file.with_name("chat_template.jinja")
        if template_file.is_file():  # newer Transformers writes it here and prefers it
            config["chat_template"] = read_utf8(template_file)
        return cls(backend, config, source=str(path))

    def has(self, field: str) -> bool:
        """Whether the config names this special token; false only where it says null.

        Args:
            field: bos_token or pad_token.
        """
        return field not in self.config or self.config[field] is not None

    def _named_id(self, field: str) -> int:
        token = self.config.get(field)
        content = token.get("content") if isinstance(token, dict) else token
        if not isinstance(content, str):
            raise UserError(f"{self.source}: tokenizer_config.json lacks the field {field!r}")
        index = self.backend.token_to_id(content)
        if index is None:
            raise UserError(f"{self.source}: {field} {content!r} is not in the vocabulary of tokenizer.json")
        return index

    def encode(self, text: str) -> list[int]:
        """Encode a text; special tokens written in it become their ids, nothing is added."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts on all cores; the ids equal those of `encode`."""
        # The "fast" form omits character offsets, which are not needed.
        return [e.ids for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Decode ids; invalid UTF-8 comes out as U+FFFD.

        Args:
            ids: token ids.
            skip_special_tokens: omit control tokens such as `<|im_end|>` (`<think>` and tool tags stay).
        """
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self) -> list[bytes]:
        """Return the bytes of each token, indexed by id.

        Raises:
            ValueError: the tokenizer is not byte-level, so ids have no bytes of their own.
        """
        if self._token_bytes is None:
            if not isinstance(self.backend.decoder, decoders.ByteLevel):
                raise UserError(f"{self.source} is not a byte-level tokenizer: its ids cannot be decoded one by one")
            to_byte = _byte_of_character()
            table = [b""] * self.vocab_size
            for token, index in self.backend.get_vocab(with_added_tokens=True).items():
                known = all(character in to_byte for character in token)
                table[index] = bytes(to_byte[c] for c in token) if known else token.encode("utf-8")
            self._token_bytes = table
        return self._token_bytes

    @property
    def fingerprint(self) -> str:
        """16 hex digits, equal exactly when the same rules decide the ids."""
        if self._fingerprint is None:
            state = json.loads(self.backend.to_str())
            rules = {key: state.get(key) for key in ("model", "added_tokens", "normalizer", "pre_tokenizer")}
            # Fields at their "off" value are left out: newer libraries write more of them without changing ids.
            rules["model"] = {key: value for key, value in rules["model"].items() if value not in (None, False)}
            canonical = json.dumps(rules, sort_keys=True, separators=(",", ":"))
            self._fingerprint = hashlib.sha256(canonical.encode("utf-8")).hexdigest()[:16]
        return self._fingerprint

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **template_kwargs: Any,
    ) -> str:
        """Render a conversation as the text that the model is trained on.

        Args:
            messages: dicts with `role`, `content` and optionally `reasoning_content`, `tool_calls`.
            tools: JSON schemas of the functions that the assistant may call.
            add_generation_prompt: end with the opening of the assistant's turn.
            template_kwargs: more template variables, such as `open_thinking=True`.

        Returns:
            The text, equal to that of Transformers' `apply_chat_template(..., tokenize=False)` for the same folder.

        Raises:
            ValueError: no messages, no template, or the template refuses the messages.
        """
        if not messages:
            raise UserError("a chat needs at least one message")
        if not all(isinstance(message, Mapping) for message in messages):
            raise UserError('each chat message must be an object such as {"role": "user", "content": "..."}')
        variables = {name: token for name in self.config if (token := _token_text(name, self.config[name])) is not None}
        variables.update(plain(template_kwargs))
        template = self._template(with_tools=tools is not None)
        chat = [with_reasoning({k: v for k, v in message.items() if v is not None}) for message in messages]
        try:
            return template.render(
                messages=plain(chat),
                tools=plain(tools),
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        except (TemplateError, TypeError) as error:
            raise UserError(f"the chat template of {self.source} cannot lay out these messages: {error}") from error

    def _template(self, with_tools: bool) -> Any:
        source = self.config.get("chat_template")
        if isinstance(source, list):  # the older form: several named templates
            source = {item["name"]: item["template"] for item in source}
        if isinstance(source, dict):
            source = source.get("tool_use" if with_tools and "tool_use" in source else "default")
        if not source:
            raise UserError(f"{self.source} has no chat template: add `chat_template` to its tokenizer_config.json")
        if source not in self._templates:
            try:
                self._templates[source] = environment().from_string(source)
            except TemplateError as error:
                raise UserError(f"{self.source}: its chat template is not valid Jinja: {error}") from error
        return self._templates[source]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write tokenizer.json and tokenizer_config.json, which Transformers' `AutoTokenizer` opens too."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _write_text(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.config}
        _write_text(folder / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2))
        # A template left from an earlier tokenizer in this folder would win over ours.
        (folder / "chat_template.jinja").unlink(missing_ok=True)


class StreamDecoder:
    """Decodes ids one at a time, never emitting half a character.

    Args:
        tokenizer: must be byte-level.
        skip_special_tokens: as in `Tokenizer.decode`.

    All pieces joined, including `finish`, equal `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = False):
        self._bytes = tokenizer.token_bytes()
        self._skip = tokenizer.control_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Add one id; return the text it completes, empty inside a multi-byte character."""
        if token_id in self._skip or not 0 <= token_id < len(self._bytes):
            return ""
        return self._utf8.decode(self._bytes[token_id])

    def finish(self) -> str:
        """Return what is left, an incomplete character as U+FFFD, and reset."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def _token_text(name: str, value: Any) -> str | None:
    """The text of a config entry such as bos_token, a template variable; None for other entries."""
    if not name.endswith("_token"):
        return None
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 bytes stand for themselves, the others for U+0100, U+0101, ... in order."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in visible}
    hidden = [byte for byte in range(NUM_BYTES) if byte not in set(visible)]
    return table | {chr(0x100 + index): byte for index, byte in enumerate(hidden)}


def _write_text(path: Path, text: str) -> None:
    """Write to a temporary file and rename, so a killed save leaves the old file intact."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
