"""Data loading: batches from the token cache beside on-the-fly tokenisation, as in MiniMind's Dataset."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.suite.harness import Suite
from minimind_fast.data import samples
from minimind_fast.data.cache import TokenCache, build_cache
from minimind_fast.data.packing import PackedBatches, PaddedBatches
from minimind_fast.data.tokenizer import Tokenizer

LENGTH, ROWS_A_BATCH = 340, 32
NAMES = ("eager", "padded", "ours")
ROWS = {"test_loading": lambda suite: [(name,) for name in NAMES]}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenCache, Tokenizer]:
    tokenizer = Tokenizer.load(samples.path("tokenizer"))
    folder = tmp_path_factory.mktemp("cache")
    return build_cache(samples.path("pretrain.jsonl"), tokenizer, cache_dir=str(folder), log=lambda _: None), tokenizer


def _on_the_fly(tokenizer: Tokenizer, batches: int) -> tuple[int, int]:
    """(useful tokens, their checksum) of padded batches tokenised on the fly."""
    lines = Path(samples.path("pretrain.jsonl")).read_text(encoding="utf-8").splitlines()
    useful = total = 0
    for i in range(batches):
        rows = []
        for line in lines[i * ROWS_A_BATCH : (i + 1) * ROWS_A_BATCH]:
            text = json.loads(line)["text"]
            ids = [tokenizer.bos_id, *tokenizer.encode(text)[: LENGTH - 2], tokenizer.eos_id]
            rows.append(torch.tensor(ids + [tokenizer.pad_id] * (LENGTH - len(ids))))
            useful += len(ids) - 1
        total += int(torch.stack(rows)[:, 1:].sum())
    return useful, total


def test_loading(case: tuple[str], suite: Suite, benchmark: Any, cache: tuple[TokenCache, Tokenizer]) -> None:
    (name,) = case
    tokens, tokenizer = cache
    batches = 8

    def of_cache(source: Any) -> tuple[int, int]:
        useful = total = 0
        for batch, _ in zip(iter(source), range(batches), strict=False):
            useful += batch.num_targets
            total += int(batch.input_ids.sum())
        return useful, total

    calls: dict[str, Callable[[], tuple[int, int]]] = {
        "eager": lambda: _on_the_fly(tokenizer, batches),
        "padded": lambda: of_cache(PaddedBatches(tokens, batch_size=ROWS_A_BATCH, max_seq_len=LENGTH)),
        "ours": lambda: of_cache(PackedBatches(tokens, batch_tokens=ROWS_A_BATCH * LENGTH, max_seq_len=LENGTH, seed=1)),
    }
    call = calls[name]
    useful, _ = call()
    assert useful > 0
    first = tokens.document(0).tolist()
    text = json.loads(Path(samples.path("pretrain.jsonl")).read_text(encoding="utf-8").splitlines()[0])["text"]
    if first != [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]:
        pytest.fail("no time without a right answer: the cache's first document is not the file's first line")
    benchmark.group = "data loading"
    benchmark(call)  # host work on every machine
    seconds = benchmark.stats.stats.data if benchmark.stats is not None else []
    suite.host_row(benchmark, name, seconds, useful, kind="data loading", op="data loading")
