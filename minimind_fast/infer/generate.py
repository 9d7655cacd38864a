"""Generation with a KV cache: prompts in, tokens or streamed text out.

Purpose: `generate` for a tensor of rows, `generate_batch` for prompts of any length, `stream` for text as it arrives.
Principle: prompts run through the packed path as in training and fill a cache that is allocated once. Each step then runs
    one token per row against the cache. The model does not know the cache: a context object attends (see `decode.py`).
Properties: the cache holds kv heads only; nothing is concatenated or reallocated; finished rows leave the batch. Prefill
    in chunks gives the same result. A row's tokens do not depend on other rows (except for matmul rounding, which varies
    with the batch size).

Shapes: B batch, T tokens, V vocab.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from minimind_fast.data.tokenizer import StreamDecoder, Tokenizer
from minimind_fast.errors import UserError
from minimind_fast.infer.decode import Decoder, Workspace
from minimind_fast.infer.sampling import Noise, Sampling, choose, chosen_logprobs, row_seed
from minimind_fast.model import MiniMind


class Generation(NamedTuple):
    """What `generate` returns with `return_logprobs`."""

    ids: Tensor  # (B, T + new) int64
    logprobs: Tensor  # (B, T + new) float32 of each new token; 0 at prompt and padding


@dataclass
class Completion:
    """One row's new tokens."""

    ids: list[int]  # includes the stop id, if one ended the row
    logprobs: list[float]  # empty unless asked for
    finish_reason: str  # "stop" or "length"


@overload
def generate(
    model: MiniMind, input_ids: Tensor, *, return_logprobs: Literal[False] = False, **options: Any
) -> Tensor: ...
@overload
def generate(model: MiniMind, input_ids: Tensor, *, return_logprobs: Literal[True], **options: Any) -> Generation: ...
def generate(  # pyright: ignore[reportInconsistentOverload]  the overloads leave the options to this one
    model: MiniMind,
    input_ids: Tensor,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | Sequence[int] | None = None,
    stop_ids: Sequence[int] | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    return_logprobs: bool = False,
    prefill_chunk: int | None = None,
) -> Tensor | Generation:
    """Continue each row of a tensor.

    Args:
        model: put into evaluation mode for the call.
        input_ids: (B, T) int64; rows shorter than T are padded on the right, see `lengths`.
        max_new_tokens: limit for each row.
        temperature: 0 for greedy; for this and the next four see `sampling.Sampling`.
        top_p: probability mass to keep.
        top_k: number of tokens to keep; 0 for all.
        min_p: keep tokens with at least this share of the likeliest token's probability.
        repetition_penalty: penalty on tokens already in the row.
        seed: row r samples with `sampling.row_seed(seed, r)`; a sequence gives each row's seed; None: a random one.
        stop_ids: a row ends at the first of these, which it keeps; None: any of the model's end ids; () for none.
        lengths: (B,) prompt tokens in each row; None: T for all.
        return_logprobs: also return the new tokens' log-probabilities, at the given temperature, before filters.
        prefill_chunk: prefill this many tokens at a time (less memory, same result); None: at once.

    Returns:
        (B, longest) int64: each row's prompt, then its new tokens, then the pad id; or Generation.

    Raises:
        ValueError: an option out of range, an unknown token, or more tokens than max_position_embeddings.
    """
    if input_ids.dim() != 2:
        raise UserError(f"input_ids must be (B, T), not {tuple(input_ids.shape)}; for one prompt: input_ids[None]")
    rows, width = input_ids.shape
    counts = [width] * rows if lengths is None else [int(n) for n in lengths]
    if len(counts) != rows or not all(0 < n <= width for n in counts):
        raise UserError(f"lengths must be {rows} numbers between 1 and {width}, not {counts}")
    prompts = [row[:n] for row, n in zip(input_ids.tolist(), counts, strict=True)]
    done = complete(
        model,
        prompts,
        Sampling(temperature, top_p, top_k, min_p, repetition_penalty),
        max_new_tokens=max_new_tokens,
        seed=seed,
        stop_ids=stop_ids,
        logprobs=return_logprobs,
        prefill_chunk=prefill_chunk,
    )
    longest = max((n + len(c.ids) for n, c in zip(counts, done, strict=True)), default=width)
    pad = model.config.pad_token_id
    ids = [p + c.ids + [pad] * (longest - len(p) - len(c.ids)) for p, c in zip(prompts, done, strict=True)]
    out = torch.tensor(ids, dtype=torch.int64, device=input_ids.device).view(rows, longest)
    if not return_logprobs:
        return out
    logprobs = torch.zeros(rows, longest)
    for row, (n, c) in enumerate(zip(counts, done, strict=True)):
        logprobs[row, n : n + len(c.ids)] = torch.tensor(c.logprobs)
    return Generation(out, logprobs.to(input_ids.device))


def generate_batch(
    model: MiniMind, prompts: Sequence[Sequence[int]], *, max_new_tokens: int = 128, **options
) -> list[list[int]]:
    """Continue prompts of any length.

    Args:
        model: put into evaluation mode for the call.
        prompts: token ids, at least one each.
        max_new_tokens: limit for each prompt.
        options: temperature, top_p, top_k, min_p, repetition_penalty, seed, stop_ids, prefill_chunk as in `generate`.

    Returns:
        Each prompt's new tokens, in order, including the stop id if one ended it.

    Raises:
        ValueError: as for `generate`.
    """
    rest = {name: options.pop(name) for name in ("seed", "stop_ids", "prefill_chunk") if name in options}
    done = complete(model, prompts, Sampling(**options), max_new_tokens=max_new_tokens, **rest)
    return [c.ids for c in done]


def complete(
    model: MiniMind,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | None = None,
    *,
    max_new_tokens: int = 128,
    seed: int | Sequence[int] | None = None,
    stop_ids: Sequence[int] | None = None,
    logprobs: bool = False,
    prefill_chunk: int | None = None,
    workspace: Workspace | None = None,
) -> list[Completion]:
    """Continue prompts of any length; `generate`, `generate_batch` and RL rollouts are built on this.

    Args:
        model: put into evaluation mode for the call.
        prompts: token ids, at least one each.
        sampling: how tokens are chosen; None: greedy.
        max_new_tokens: limit for each prompt.
        seed, stop_ids, prefill_chunk: as in `generate`.
        logprobs: also return each new token's log-probability at the sampling temperature, before filters.
        workspace: the model's, for callers that come again; None: cache and graphs of this call's own.

    Returns:
        One Completion per prompt, in order.

    Raises:
        ValueError: as for `generate`.
    """
    done = [Completion([], [], "length") for _ in prompts]
    how = (sampling or Sampling(), max_new_tokens, seed, stop_ids, logprobs, prefill_chunk, workspace)
    steps = _steps(model, prompts, *how)
    for rows, ids, logps, stopped in steps:
        for row, token, stop in zip(rows, ids, stopped, strict=True):
            done[row].ids.append(token)
            if stop:
                done[row].finish_reason = "stop"
        if logprobs:
            for row, logp in zip(rows, logps, strict=True):
                done[row].logprobs.append(logp)
    return done


def _steps(
    model: MiniMind,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    max_new_tokens: int,
    seed: int | Sequence[int] | None,
    stop_ids: Sequence[int] | None,
    logprobs: bool,
    prefill_chunk: int | None,
    workspace: Workspace | None = None,
) -> Iterator[tuple[list[int], list[int], list[float], list[bool]]]:
    """Yield at each step (active rows, their new tokens, log-probabilities, which of them end here)."""
    prompts = [list(p) for p in prompts]
    check_prompts(model, prompts, max_new_tokens)
    if not prompts or max_new_tokens == 0:
        return
    seeds = _seeds(seed, len(prompts))
    stops = model.config.stop_ids if stop_ids is None else {int(i) for i in stop_ids}
    was_training = model.training
    model.eval()
    try:
        # Inference mode inside each call, not around the loop: a generator would leak it to its caller.
        size = len(prompts), max(map(len, prompts)) + max_new_tokens
        decoder = Decoder(model, *size) if workspace is None else workspace.decoder(*size)
        logits = decoder.prefill(prompts, prefill_chunk)
        picker = _Picker(prompts, sampling, seeds, logits, logprobs)
        rows: list[int | None] = list(range(len(prompts)))  # the row at each place of the batch; None: finished
        for step in range(max_new_tokens):
            ids, logps = picker.pick(logits)
            tokens = ids.tolist()
            places = [i for i, row in enumerate(rows) if row is not None]
            found, values = [tokens[i] for i in places], logps.tolist() if logprobs else []
            stopped = [t in stops for t in found]
            yield [rows[i] for i in places], found, [values[i] for i in places] if logprobs else [], stopped  # type: ignore[misc]
            if step + 1 == max_new_tokens or all(stopped):
                return
            for i, stop in zip(places, stopped, strict=True):
                if stop:
                    rows[i] = None
            going_on = [i for i, row in enumerate(rows) if row is not None]
            keep = decoder.rows_for(len(going_on), len(rows))
            if keep < len(rows):  # a round number, filled up with finished rows
                kept = [*going_on, *(i for i, row in enumerate(rows) if row is None)][:keep]
                rows = [rows[i] for i in kept]
                ids = decoder.keep(kept, ids)
                picker.keep(kept)
            logits = decoder.step(ids)
    finally:
        model.train(was_training)


class _Picker:
    """Sampling with its state: noise and, for the repetition penalty, the tokens seen."""

    def __init__(
        self, prompts: list[list[int]], sampling: Sampling, seeds: list[int], logits: Tensor, logprobs: bool
    ) -> None:
        self.sampling, self.logprobs = sampling, logprobs
        self.noise = None if sampling.greedy else Noise(seeds, logits.device)
        self.seen = None
        if sampling.penalizes:
            self.seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
            for row, prompt in enumerate(prompts):
                self.seen[row, torch.tensor(prompt, device=logits.device)] = True

    @torch.inference_mode()
    def pick(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        ids = choose(logits, self.sampling, self.noise.next() if self.noise else None, self.seen)
        if self.seen is not None:
            self.seen.scatter_(1, ids.unsqueeze(1), True)
        return ids, chosen_logprobs(logits, ids, self.sampling.temperature) if self.logprobs else ids

    def keep(self, rows: list[int]) -> None:
        if self.noise:
            self.noise.keep(rows)
        if self.seen is not None:
            self.seen = self.seen[rows]


def _seeds(seed: int | Sequence[int] | None, rows: int) -> list[int]:
    if seed is None:
        seed = random.SystemRandom().getrandbits(62)
    if isinstance(seed, int):
        return [row_seed(seed, row) for row in range(rows)]
    if len(seed) != rows:
        raise UserError(f"{len(seed)} seeds for {rows} prompts: give one number, or one a prompt")
    return list(seed)


def check_prompts(model: MiniMind, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Refuse impossible requests before anything runs.

    Raises:
        ValueError: an empty prompt, an id outside the vocabulary, or prompt and new tokens beyond the context.
    """
    vocab, limit = model.config.vocab_size, model.config.max_position_embeddings
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens must be 0 or more, not {max_new_tokens}")
    for prompt in prompts:
        if not prompt:
            raise UserError("a prompt needs at least one token; begin with the tokenizer's bos_id")
        if min(prompt) < 0 or max(prompt) >= vocab:
            bad = min(prompt) if min(prompt) < 0 else max(prompt)
            raise UserError(f"token id {bad} is outside the model's vocabulary of {vocab}: is it the right tokenizer?")
        if len(prompt) + max_new_tokens > limit:
            raise UserError(
                f"{len(prompt)} prompt tokens + {max_new_tokens} new ones exceed the model's context of {limit} "
                "(max_position_embeddings): shorten the prompt or lower max_new_tokens"
            )


class Stream:
    """Text pieces of one prompt's continuation as they arrive; iterate over it once.

    During and after the iteration: `ids` are the new tokens, `finish_reason` is "stop" or "length" (None while running),
    `prefill_s` the seconds until the first token, `decode_s` the seconds since.
    """

    def __init__(self, model: MiniMind, tokenizer: Tokenizer, prompt: Sequence[int], options: dict) -> None:
        self._decoder = StreamDecoder(tokenizer, skip_special_tokens=options.pop("skip_special_tokens", True))
        stop = options.pop("stop", ())
        self._stop = [stop] if isinstance(stop, str) else list(stop)
        if any(not s for s in self._stop):
            raise UserError("a stop string must not be empty")
        keys = ("max_new_tokens", "seed", "stop_ids", "prefill_chunk")
        rest = [options.pop(key, default) for key, default in zip(keys, (128, None, None, None), strict=True)]
        check_prompts(model, [prompt], rest[0])
        self._steps = _steps(model, [prompt], Sampling(**options), rest[0], rest[1], rest[2], False, rest[3])
        self.ids: list[int] = []
        self.finish_reason: str | None = None
        self.prefill_s = self.decode_s = 0.0

    def __iter__(self) -> Iterator[str]:
        begin_s = time.perf_counter()
        held = ""  # may be the start of a stop string
        for _, (token,), _, (stopped,) in self._steps:
            now_s = time.perf_counter()
            if not self.ids:
                self.prefill_s, begin_s = now_s - begin_s, now_s
            self.decode_s = now_s - begin_s
            self.ids.append(token)
            held += "" if stopped else self._decoder.push(token)
            found = [at for s in self._stop if (at := held.find(s)) >= 0]
            if found:
                held, stopped = held[: min(found)], True
            if stopped:
                self.finish_reason = "stop"
                if not found:
                    held += self._decoder.finish()
                break
            safe = len(held) - overlap(held, self._stop)
            if safe:
                yield held[:safe]
                held = held[safe:]
        else:
            self.finish_reason = "length"
            held += self._decoder.finish()
        if held:
            yield held
        self._steps.close()  # type: ignore[attr-defined]


def stream(model: MiniMind, tokenizer: Tokenizer, prompt_ids: Sequence[int], **options) -> Stream:
    """Continue one prompt as a stream of text.

    Args:
        model: put into evaluation mode meanwhile.
        tokenizer: must be byte-level.
        prompt_ids: at least one token id.
        options: as for `generate`, plus `stop` (one or several strings: the text ends before the first of them) and
            `skip_special_tokens` (default True).

    Returns:
        An iterable of non-empty strings that never split a character; joined, they are the whole text.

    Raises:
        ValueError: as for `generate`.
    """
    return Stream(model, tokenizer, prompt_ids, options)


def overlap(text: str, stops: Sequence[str]) -> int:
    """Length of the longest suffix of the text that may be the start of a stop string; 0 if there is none."""
    longest = max(map(len, stops), default=1) - 1
    for n in range(min(longest, len(text)), 0, -1):
        if any(s.startswith(text[-n:]) for s in stops):
            return n
    return 0


MiniMind.generator = staticmethod(generate)  # for `model.generate`; the model cannot import what stands above it
